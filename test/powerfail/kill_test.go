package powerfail

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	killsShort = 10
	killsLong  = 200

	killPool        = "512MiB"
	killVolume      = 24 << 20 // of the volume under load, at first
	killVolumeMax   = 32 << 20
	killConnections = 2
	killDepth       = 16 // requests in flight on a connection
	killSnapshots   = 5
	killClones      = 2
	killVolumes     = 4 // others, that come and go

	mib = 1 << 20
)

// image is a snapshot, or a clone that nobody writes: what it holds never changes.
type image struct {
	size        int64
	begun, done stamp // when it was taken; done is 0 if the daemon died meanwhile
	known       bool  // it was read once, and sum is its content
	sum         [sha256.Size]byte
}

// deed is a command that changes what there is, and what that will be.
type deed struct {
	args []string
	kind string // snapshot or volume
	name string
	size int64  // afterwards; 0: it is gone
	as   *image // what a snapshot or clone shows
	of   *image // same, known before
}

// killer is the run: a daemon, a client of it, and what both agreed on.
type killer struct {
	t      *testing.T
	n      *node
	random *rand.Rand
	next   int // number for the name of the next thing

	mu     sync.Mutex
	blocks *blocks

	// Between the rounds, and owned by the goroutine of deeds within one.
	sizes   map[string]int64  // of volumes
	images  map[string]*image // snapshots, and clones
	pending *deed             // began, and was not answered

	down atomic.Bool // the daemon is being killed

	replies atomic.Int64
	deeds   int
	opened  []time.Duration
	halfway int // kills while it opened
	during  map[string]int
}

// TestNothingAcknowledgedIsLostByKills kills the daemon again and again under load.
func TestNothingAcknowledgedIsLostByKills(t *testing.T) {
	binary := requireBinary(t)
	dir, err := os.MkdirTemp("/var/tmp", "ashlar-kill-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && os.Getenv("ASHLAR_KEEP") == "1" {
			t.Logf("kept: %s", dir)
			return
		}
		_ = os.RemoveAll(dir) // nothing of value
	})
	kills := killsShort
	if long() {
		kills = killsLong
	}
	pool := filepath.Join(dir, "pool.image")
	k := &killer{
		t: t, random: rand.New(rand.NewPCG(seed(t), 9)), during: map[string]int{},
		n:      newNode(t, binary, dir, "--default-pool", killPool, "--pool-file", pool, "--log-level", "warn"),
		blocks: newBlocks(killVolume / blockSize), sizes: map[string]int64{"a": killVolume}, images: map[string]*image{},
	}
	k.n.start()
	k.n.run("volume", "create", "a", "--size", fmt.Sprint(killVolume))
	begun := time.Now()
	for round := range kills {
		during := k.load(time.Duration(20+k.random.IntN(400)) * time.Millisecond)
		k.n.checkPool(fmt.Sprintf("after kill %d", round), false, pool)
		for k.random.IntN(3) == 0 {
			k.n.launch()
			time.Sleep(time.Duration(k.random.IntN(80)) * time.Millisecond)
			k.n.kill()
			k.halfway++
		}
		k.opened = append(k.opened, k.n.start())
		k.compare(round)
		if t.Failed() {
			t.Fatalf("kill %d was during %q", round, during)
		}
	}
	k.n.stop()
	k.n.checkPool("at the end", true, pool)
	t.Logf("%d kills in %v (and %d more while it opened); ready again: %s", kills, time.Since(begun).Round(time.Second), k.halfway, percentiles(k.opened))
	t.Logf("%d replies and %d commands were kept; killed during: %v", k.replies.Load(), k.deeds, k.during)
}

// load works on the daemon and kills it after a while; during is the command that
// had no answer then.
func (k *killer) load(length time.Duration) (during string) {
	k.t.Helper()
	k.down.Store(false)
	var work sync.WaitGroup
	for i := range killConnections {
		c, err := dialNBD(k.n.path("nbd"), "a")
		if err != nil {
			k.t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(k.random.Uint64(), uint64(i)))
		flying := &flight{slots: make(chan uint64, killDepth)}
		for slot := range killDepth {
			flying.slots <- uint64(slot)
		}
		work.Go(func() { k.send(c, r, flying) })
		work.Go(func() { k.receive(c, flying) }) // ends with the connection
	}
	r := rand.New(rand.NewPCG(k.random.Uint64(), 99))
	work.Go(func() { k.administer(r) })
	time.Sleep(length)
	k.down.Store(true)
	k.n.kill()
	work.Wait()
	if k.pending == nil {
		return ""
	}
	k.during[k.pending.args[0]+" "+k.pending.args[1]]++
	return strings.Join(k.pending.args, " ")
}

// flight is what is in flight on a connection.
type flight struct {
	slots chan uint64 // free ones; closed by the receiver when the connection ends

	mu    sync.Mutex
	spans [killDepth]span // of each slot
}

type span struct{ first, count int }

// send keeps the connection busy until it breaks.
func (k *killer) send(c *client, r *rand.Rand, flying *flight) {
	data := make([]byte, 128*blockSize)
	for slot := range flying.slots {
		kind, flags := uint16(nbdWrite), uint16(0)
		switch n := r.IntN(100); {
		case n < 4:
			kind = nbdFlush
		case n < 12:
			kind = nbdTrim
		case n < 18:
			kind = nbdWriteZeroes
		case n < 26:
			flags = nbdFUA
		}
		count := 1 + r.IntN(4)
		if r.IntN(8) == 0 {
			count = 1 + r.IntN(128)
		}
		var s span
		var seq stamp
		if kind != nbdFlush {
			s, seq = k.choose(r, int(c.size/blockSize), count, kind != nbdWrite)
		}
		flying.mu.Lock()
		flying.spans[slot] = s
		flying.mu.Unlock()
		var payload []byte
		if kind == nbdWrite {
			payload = data[:s.count*blockSize]
			for i := range s.count {
				fill(payload[i*blockSize:], s.first+i, seq)
			}
		}
		if err := c.send(kind, flags, slot, int64(s.first)*blockSize, int64(s.count)*blockSize, payload); err != nil {
			if !k.down.Load() {
				k.t.Errorf("send: %v", err)
			}
			return
		}
	}
}

// choose picks blocks of which none is in flight, and notes their change.
func (k *killer) choose(r *rand.Rand, blocks, count int, zero bool) (span, stamp) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		first := r.IntN(blocks)
		if r.IntN(2) == 0 {
			first /= 16 // a hot part, where blocks are overwritten
		}
		n := min(count, blocks-first)
		if !slices.Contains(k.blocks.busy[first:first+n], true) {
			return span{first, n}, k.blocks.submit(first, n, zero)
		}
		count = max(1, count/2)
	}
}

// receive takes replies until the connection ends: also those that the daemon sent
// before it died.
func (k *killer) receive(c *client, flying *flight) {
	defer c.close()
	defer close(flying.slots)
	for {
		slot, errno, err := c.receive()
		if err != nil {
			if !k.down.Load() || !ended(err) {
				k.t.Errorf("receive: %v", err)
			}
			return
		}
		if errno != 0 || slot >= killDepth {
			k.t.Errorf("reply %d: errno %d", slot, errno)
			return
		}
		flying.mu.Lock()
		s := flying.spans[slot]
		flying.mu.Unlock()
		k.mu.Lock()
		if s.count > 0 {
			k.blocks.ack(s.first, s.count)
		}
		k.mu.Unlock()
		k.replies.Add(1)
		flying.slots <- slot
	}
}

func (k *killer) stamp() stamp {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.blocks.tick()
}

// administer makes and deletes snapshots, clones and volumes until the daemon dies.
func (k *killer) administer(r *rand.Rand) {
	for !k.down.Load() {
		d := k.plan(r)
		k.pending = d
		if d.as != nil && d.of == nil {
			d.as.begun = k.stamp()
		}
		if _, err := k.n.try(d.args...); err != nil {
			if !k.down.Load() {
				k.t.Error(err)
			}
			return
		}
		if d.as != nil && d.of == nil {
			d.as.done = k.stamp()
		}
		k.do(d)
		k.deeds++
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
	}
}

// do takes a deed as done.
func (k *killer) do(d *deed) {
	k.pending = nil
	switch {
	case d.size == 0:
		delete(k.sizes, d.name)
		delete(k.images, d.name)
	default:
		if d.kind == "volume" {
			k.sizes[d.name] = d.size
		}
		if d.as != nil {
			k.images[d.name] = d.as
		}
		if d.name == "a" {
			k.mu.Lock()
			k.blocks.grow(int(d.size) / blockSize)
			k.mu.Unlock()
		}
	}
}

// plan picks something that can be done now.
func (k *killer) plan(r *rand.Rand) *deed {
	var snapshots, clones, others []string
	for name := range k.images {
		if _, volume := k.sizes[name]; volume {
			clones = append(clones, name)
		} else {
			snapshots = append(snapshots, name)
		}
	}
	for name := range k.sizes {
		if name != "a" && k.images[name] == nil {
			others = append(others, name)
		}
	}
	for _, names := range [][]string{snapshots, clones, others} {
		slices.Sort(names) // a seed repeats the choice
	}
	pick := func(names []string) string { return names[r.IntN(len(names))] }
	k.next++
	for {
		switch n := r.IntN(100); {
		case n < 30 && len(snapshots) < killSnapshots:
			name := fmt.Sprintf("a@s%d", k.next)
			return &deed{args: []string{"snapshot", "create", name}, kind: "snapshot", name: name, size: k.sizes["a"], as: &image{size: k.sizes["a"]}}
		case n >= 30 && n < 55 && len(snapshots) > 0:
			name := pick(snapshots)
			return &deed{args: []string{"snapshot", "delete", name, "--yes"}, kind: "snapshot", name: name}
		case n >= 55 && n < 65 && len(clones) < killClones && len(snapshots) > 0:
			from, name := pick(snapshots), fmt.Sprintf("c%d", k.next)
			of := k.images[from]
			return &deed{args: []string{"volume", "clone", from, name}, kind: "volume", name: name, size: of.size, as: of, of: of}
		case n >= 65 && n < 72 && len(clones) > 0:
			name := pick(clones)
			return &deed{args: []string{"volume", "delete", name, "--yes"}, kind: "volume", name: name}
		case n >= 72 && n < 82 && len(others) < killVolumes:
			name, size := fmt.Sprintf("v%d", k.next), int64(1+r.IntN(64))*mib
			return &deed{args: []string{"volume", "create", name, "--size", fmt.Sprint(size)}, kind: "volume", name: name, size: size}
		case n >= 82 && n < 88 && len(others) > 0:
			name := pick(others)
			return &deed{args: []string{"volume", "delete", name, "--yes"}, kind: "volume", name: name}
		case n >= 88 && n < 96 && len(others) > 0:
			name := pick(others)
			size := k.sizes[name] + mib
			return &deed{args: []string{"volume", "resize", name, "--size", fmt.Sprint(size)}, kind: "volume", name: name, size: size}
		case n >= 96 && k.sizes["a"] < killVolumeMax:
			size := k.sizes["a"] + mib/2
			return &deed{args: []string{"volume", "resize", "a", "--size", fmt.Sprint(size)}, kind: "volume", name: "a", size: size}
		}
	}
}

// compare wants a daemon that has just opened its pool to have everything.
func (k *killer) compare(round int) {
	k.t.Helper()
	volumes, snapshots := k.n.list("volume"), k.n.list("snapshot")
	if d := k.pending; d != nil { // done or not, nothing between
		there := volumes
		if d.kind == "snapshot" {
			there = snapshots
		}
		if size, exists := there[d.name]; size == d.size && exists == (d.size != 0) {
			k.do(d)
		}
		k.pending = nil
	}
	for name, size := range k.sizes {
		if got, exists := volumes[name]; !exists || got != size {
			k.t.Errorf("kill %d: volume %s: %d bytes, %v; want %d", round, name, got, exists, size)
		}
		delete(volumes, name)
	}
	for name := range k.images {
		if _, volume := k.sizes[name]; volume {
			continue
		}
		if _, exists := snapshots[name]; !exists {
			k.t.Errorf("kill %d: snapshot %s is missing", round, name)
		}
		delete(snapshots, name)
	}
	if len(volumes)+len(snapshots) > 0 {
		k.t.Errorf("kill %d: nobody made, or somebody deleted, %v, %v", round, volumes, snapshots)
	}
	for name, i := range k.images {
		data, err := readAll(k.n.path("nbd"), name)
		if err != nil {
			k.t.Errorf("kill %d: %v", round, err)
			continue
		}
		sum := sha256.Sum256(data)
		if i.known {
			if sum != i.sum {
				k.t.Errorf("kill %d: %s is not what it was", round, name)
			}
			continue
		}
		if err := k.blocks.cut(data, i.begun, i.done); err != nil {
			k.t.Errorf("kill %d: %s: %v", round, name, err)
		}
		i.known, i.sum = true, sum
	}
	data, err := readAll(k.n.path("nbd"), "a")
	if err != nil {
		k.t.Errorf("kill %d: %v", round, err)
		return
	}
	if len(data) != len(k.blocks.changes)*blockSize {
		k.t.Errorf("kill %d: %d bytes, want %d blocks", round, len(data), len(k.blocks.changes))
		return
	}
	wrong := k.blocks.settle(data)
	for _, err := range wrong[:min(len(wrong), 5)] {
		k.t.Errorf("kill %d: %v", round, err)
	}
	if len(wrong) > 0 {
		k.t.Errorf("kill %d: %d blocks are not what was acknowledged", round, len(wrong))
	}
}
