package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// lockModel is who has and who waits for blocks, in the order of their coming.
type lockModel struct {
	word    uint32
	mask    uint32
	wait    *lockWait
	cluster uint32
	has     bool
}

// TestLocksServeInTheOrderOfComing compares the words and lines with a list.
func TestLocksServeInTheOrderOfComing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := &blockLocks{}
		var all []*lockModel
		blocked := func(m *lockModel, before []*lockModel) bool {
			return slices.ContainsFunc(before, func(x *lockModel) bool { return x.word == m.word && x.mask&m.mask != 0 })
		}
		// Two clusters that share a word, one that shares their line, and another.
		clusters := []uint32{5, 5 + lockWords, 5 + lockLines, 6}
		verify := func() {
			for _, v := range clusters {
				var has, waits uint32
				for _, m := range all {
					if m.word == v%lockWords && m.has {
						has |= m.mask
					} else if m.word == v%lockWords {
						waits |= m.mask
					}
				}
				if got, want := l.word(v).Load(), uint64(waits)<<32|uint64(has); got != want {
					t.Fatalf("word of cluster %d: %#x, want %#x", v, got, want)
				}
			}
		}
		release := func(i int) {
			m := all[i]
			all = slices.Delete(all, i, i+1)
			served := l.release(m.cluster, m.mask)
			for k, x := range all {
				if x.has || blocked(x, all[:k]) {
					continue
				}
				x.has = true
				if served == nil || served != x.wait {
					t.Fatal("somebody was not served in turn")
				}
				served = served.next
			}
			if served != nil {
				t.Fatal("somebody was served who has to wait")
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			v := rapid.SampledFrom(clusters).Draw(t, "cluster")
			first := rapid.Uint32Range(0, 31).Draw(t, "first")
			m := &lockModel{word: v % lockWords, cluster: v, mask: maskOf(first, rapid.Uint32Range(1, 32-first).Draw(t, "count")), wait: &lockWait{}}
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0, 1:
				m.has = l.take(m.cluster, m.mask, m.wait)
				if m.has == blocked(m, all) {
					t.Fatalf("take: %v", m.has)
				}
				all = append(all, m)
			case 2:
				free := !blocked(m, all)
				if got := l.try(m.cluster, m.mask); got != free {
					t.Fatalf("try: %v", got)
				} else if got {
					m.has = true
					all = append(all, m)
				}
			case 3:
				if i := slices.IndexFunc(all, func(m *lockModel) bool { return m.has }); i >= 0 {
					release(i)
				}
			}
			verify()
		}
		for len(all) > 0 {
			release(slices.IndexFunc(all, func(m *lockModel) bool { return m.has }))
			verify()
		}
		for i := range l.lines {
			if l.lines[i].first != nil || l.lines[i].last != nil {
				t.Fatal("a line is not empty at the end")
			}
		}
	})
}

// TestWidenedBlocksAreHandedOn widens a lock that others wait for.
func TestWidenedBlocksAreHandedOn(t *testing.T) {
	l := &blockLocks{}
	if !l.try(1, 1) || !l.widen(1, 1) {
		t.Fatal("the rest of a cluster that nobody uses cannot be had")
	}
	var a, b lockWait
	if l.take(1, 2, &a) || l.take(1, 1, &b) {
		t.Fatal("blocks were taken twice")
	}
	if l.widen(1, 1) {
		t.Fatal("widened twice")
	}
	if served := l.release(1, ^uint32(1)); served != &a || served.next != nil {
		t.Fatal("the one who waits for what was widened is not served alone")
	}
	if l.widen(1, 1) {
		t.Fatal("widened over another's blocks")
	}
	if served := l.release(1, 1); served != &b {
		t.Fatal("the other is not served")
	}
}

// TestChangesBeginInTheOrderOfComing compares the order of changes with a list.
func TestChangesBeginInTheOrderOfComing(t *testing.T) {
	type change struct {
		*slot
		held, began bool
	}
	rapid.Check(t, func(t *rapid.T) {
		o := &changeOrder{}
		var all []*change
		blocked := func(c *change) bool {
			for _, x := range all {
				if x == c {
					return false
				}
				if x.place.overlaps(&c.place) {
					return true
				}
			}
			return false
		}
		leave := func(i int) {
			c := all[i]
			all = slices.Delete(all, i, i+1)
			turns := o.leave(c.slot)
			for _, x := range all {
				if x.began || x.held || blocked(x) {
					continue
				}
				x.began = true
				if turns != x.slot {
					t.Fatal("somebody's turn was passed over")
				}
				turns = turns.behind
			}
			if turns != nil {
				t.Fatal("somebody began who has to wait")
			}
		}
		begun := func() int { return slices.IndexFunc(all, func(c *change) bool { return c.began }) }
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "step") {
			case 0, 1, 2:
				offset := rapid.Uint64Range(0, 64).Draw(t, "offset") * 512
				length := rapid.Uint64Range(1, 64).Draw(t, "length") * 512
				c := &change{slot: &slot{r: &datapath.Request{Offset: offset, Length: length}, end: offset + length}}
				c.held = rapid.IntRange(0, 4).Draw(t, "held") == 0
				lasting := rapid.Bool().Draw(t, "lasting")
				c.began = o.enter(c.slot, lasting, c.held)
				if want := !c.held && !blocked(c); c.began != want {
					t.Fatalf("enter: %v", c.began)
				}
				if c.place.listed != (lasting || !c.began) {
					t.Fatalf("listed: %v", c.place.listed)
				}
				if c.place.listed {
					all = append(all, c)
				}
			case 3:
				if i := slices.IndexFunc(all, func(c *change) bool { return c.held }); i >= 0 {
					all[i].held = false
					all[i].began = o.free(all[i].slot)
					if all[i].began == blocked(all[i]) {
						t.Fatalf("free: %v", all[i].began)
					}
				}
			case 4:
				if i := begun(); i >= 0 {
					leave(i)
				}
			}
			if int(o.busy.Load()) != len(all) {
				t.Fatalf("busy: %d of %d", o.busy.Load(), len(all))
			}
		}
		for _, c := range all {
			if c.held {
				c.held = false
				c.began = o.free(c.slot)
			}
		}
		for len(all) > 0 {
			leave(begun())
		}
		if o.first != nil || o.last != nil || o.busy.Load() != 0 {
			t.Fatal("the list is not empty at the end")
		}
	})
}

// begin submits requests in one turn; wait waits for them. One alone brings its tag.
func (p *port) begin(t *testing.T, requests ...*datapath.Request) (wait func() bool) {
	t.Helper()
	done := make(chan struct{}, len(requests))
	for i, r := range requests {
		r.Tag, r.Done = r.Tag+uint32(i), func(*datapath.Request) { done <- struct{}{} }
	}
	if err := p.r.Run(func(*reactor.Reactor) {
		for _, r := range requests {
			p.q.Submit(r)
		}
	}); err != nil {
		t.Error(err)
		return func() bool { return false }
	}
	return func() bool {
		for _, r := range requests {
			select {
			case <-done:
			case <-time.After(hangAfter):
				t.Errorf("%v of %d bytes at %d does not end", r.Op, r.Length, r.Offset)
				return false
			}
		}
		for _, r := range requests {
			if r.Status != datapath.StatusOK {
				t.Errorf("%v of %d bytes at %d: %v", r.Op, r.Length, r.Offset, r.Status)
				return false
			}
		}
		return true
	}
}

// TestOldCopyOfAChangeNeverOvertakes does what a client does whose connection is cut
// while a change is under way: it sends a copy of the change through another queue,
// and when that was answered a newer change of the same place. The old copy must not
// come after it, whatever it is, also while snapshots hold changes back and layers
// are merged.
func TestOldCopyOfAChangeNeverOvertakes(t *testing.T) {
	slow := filter.NewDelay(memory(64<<20), filter.DelayConfig{Seed: devtest.Seed(t), Latency: map[datapath.Op]filter.Latency{
		datapath.OpWrite: {Jitter: 2 * time.Millisecond}, datapath.OpRead: {Jitter: 200 * time.Microsecond}}})
	h := newHammer(t, 4, nil, slow)
	p := h.rig.pool
	const own = 2 << 20 // bytes each worker has for itself
	d := h.rig.volume("v", 4*own)
	for worker := range uint64(4) {
		var ports [3]*port
		for i := range ports {
			ports[i] = func() *port {
				q, err := openPort(h.reactors[i], d, 2) // few pieces: large changes come to their locks late
				if err != nil {
					t.Fatal(err)
				}
				return q
			}()
		}
		random := rand.New(rand.NewPCG(devtest.Seed(t), worker))
		h.go_(func() {
			defer func() {
				for _, q := range ports {
					if err := q.close(); err != nil {
						t.Error(err)
					}
				}
			}()
			for round := uint64(1); !h.stop.Load(); round++ {
				old := datapath.Request{Op: []datapath.Op{datapath.OpWrite, datapath.OpWrite, datapath.OpDiscard, datapath.OpWriteZeroes}[random.IntN(4)]}
				old.Length = []uint64{512, 4096, 6 << 10, 128 << 10, 700 << 10, 1<<20 + 512}[random.IntN(6)]
				old.Offset = uint64(random.IntN(1024)) * 1024
				if random.IntN(2) == 0 {
					old.Offset &^= 4095
				}
				if old.Op == datapath.OpWrite {
					old.Buf = bytes.Repeat([]byte{byte(2*round) | 1}, int(old.Length))
				}
				old.Offset += worker * own
				copied := old
				at := old.Offset + uint64(random.Int64N(int64(old.Length/512)))*512
				newer := datapath.Request{Op: datapath.OpWrite, Offset: at, Length: min(old.Offset+old.Length-at, 512<<random.IntN(5))}
				newer.Buf = bytes.Repeat([]byte{byte(2 * round)}, int(newer.Length))
				got := make([]byte, newer.Length)
				same := func(when string) bool {
					r := &datapath.Request{Op: datapath.OpRead, Offset: newer.Offset, Length: newer.Length, Buf: got}
					if !ports[random.IntN(3)].begin(t, r)() {
						return false
					}
					if !bytes.Equal(got, newer.Buf) {
						t.Errorf("round %d: an old copy of %v of %d bytes at %d has overtaken a write of %d bytes at %d, %s", round, old.Op, old.Length, old.Offset, newer.Length, newer.Offset, when)
					}
					return !t.Failed()
				}
				first := random.IntN(3)
				oldDone := ports[first].begin(t, &old)
				if !ports[(first+1)%3].begin(t, &copied)() || !ports[(first+2)%3].begin(t, &newer)() || !same("while it was under way") || !oldDone() || !same("in the end") {
					return
				}
			}
		})
	}
	h.go_(func() {
		for n := 0; !h.stop.Load() && h.space(); n++ {
			name := fmt.Sprintf("s%d", n)
			if _, err := p.CreateSnapshot("v", name, nil); err != nil {
				t.Errorf("snapshot: %v", err)
				return
			}
			time.Sleep(2 * time.Millisecond)
			if _, err := p.DeleteSnapshot("v", name); err != nil {
				t.Errorf("delete: %v", err)
				return
			}
		}
	})
	h.upkeep()
	time.Sleep(hammerTime())
	h.end()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	within(t, time.Minute, "Close", h.rig.close)
}

// TestMergeHasItsTurnBesideWritersWithoutPause writes to the same few clusters of a
// volume from three reactors, always with the next write waiting already, while a
// layer has to be merged into just these clusters.
func TestMergeHasItsTurnBesideWritersWithoutPause(t *testing.T) {
	h := newHammer(t, 4, nil, memory(64<<20))
	p := h.rig.pool
	d := h.rig.volume("v", 8<<20)
	fill := h.port(d, 0)
	if !fill.begin(t, &datapath.Request{Op: datapath.OpWrite, Length: 8 << 20, Buf: make([]byte, 8<<20)})() {
		t.FailNow()
	}
	for i := range 3 {
		q := h.port(d, i)
		h.go_(func() {
			defer func() { _ = q.close() }() // was told of before
			for !h.stop.Load() {
				var list []*datapath.Request
				for k := range uint64(12) {
					list = append(list, &datapath.Request{Op: datapath.OpWrite, Offset: k % 4 * clusterSize, Length: 64 << 10, Buf: make([]byte, 64<<10)})
				}
				if !q.begin(t, list...)() {
					return
				}
			}
		})
	}
	for n := range 10 {
		name := fmt.Sprintf("s%d", n)
		if _, err := p.CreateSnapshot("v", name, nil); err != nil {
			t.Fatal(err)
		}
		j, err := p.DeleteSnapshot("v", name)
		if err != nil {
			t.Fatal(err)
		}
		within(t, time.Minute, "the merge", func() {
			if j, err := p.WaitJob(t.Context(), j.ID); err != nil || j.Err != "" {
				t.Errorf("merge: %v, %+v", err, j)
			}
		})
	}
	h.end()
	if err := errors.Join(fill.close(), d.Close()); err != nil {
		t.Error(err)
	}
	within(t, time.Minute, "Close", h.rig.close)
}

// volumePorts is a volume on a slow disk with a queue on each of two reactors.
func volumePorts(t *testing.T, depth int, latency time.Duration) (g *rig, a, b *port, end func()) {
	t.Helper()
	slow := filter.NewDelay(memory(64<<20), filter.DelayConfig{})
	g = newRig(t, 4, slow)
	g.open()
	d := g.volume("v", 16<<20)
	var err error
	if a, err = openPort(g.r, d, depth); err != nil {
		t.Fatal(err)
	}
	if b, err = openPort(devtest.Reactors(t, reactor.EngineAuto, 1)[0], d, depth); err != nil {
		t.Fatal(err)
	}
	if !a.begin(t, &datapath.Request{Op: datapath.OpWrite, Length: 16 << 20, Buf: make([]byte, 16<<20)})() {
		t.FailNow()
	}
	slow.Set(datapath.OpWrite, filter.Latency{Fixed: latency})
	return g, a, b, func() {
		if err := errors.Join(a.close(), b.close(), d.Close()); err != nil {
			t.Error(err)
		}
		g.close()
	}
}

func filled(op datapath.Op, offset, length uint64, with byte) *datapath.Request {
	r := &datapath.Request{Op: op, Offset: offset, Length: length}
	if op == datapath.OpWrite {
		r.Buf = bytes.Repeat([]byte{with}, int(length))
	}
	return r
}

// TestChangesHeldBackKeepTheirPlace holds the changes of one queue back, as a
// snapshot does for a moment, while another queue is not held back yet, or no more.
func TestChangesHeldBackKeepTheirPlace(t *testing.T) {
	_, a, b, end := volumePorts(t, 4, 0)
	defer end()
	qa, qb := a.q.(*queue), b.q.(*queue)
	pause := func(p *port, q *queue) {
		paused := make(chan struct{})
		p.r.Post(reactor.TaskFunc(func(*reactor.Reactor) { q.pause(func() { close(paused) }) }))
		<-paused // changes that wait their turn do not count as under way
	}
	resume := func(p *port, q *queue) {
		if err := p.r.Run(func(*reactor.Reactor) { q.resume() }); err != nil {
			t.Fatal(err)
		}
	}
	for _, old := range []*datapath.Request{
		filled(datapath.OpWrite, 4096, 4096, 1), filled(datapath.OpWrite, 4096, 512, 1), filled(datapath.OpWrite, 512, 2<<20, 1),
		filled(datapath.OpDiscard, 0, 3<<20, 1), filled(datapath.OpWriteZeroes, 0, 8192, 1)} {
		pause(a, qa)
		oldDone := a.begin(t, old)
		copied := *old
		copyDone := b.begin(t, &copied) // behind the old one
		pause(b, qb)
		beside := filled(datapath.OpWrite, 12<<20, 4096, 5)
		beside.Tag = 1
		besideDone := b.begin(t, beside)
		resume(b, qb)
		if !besideDone() { // does not wait for what does not concern it
			t.FailNow()
		}
		newer := filled(datapath.OpWrite, 4096, 512, 2)
		newer.Tag = 2
		newerDone := b.begin(t, newer)
		time.Sleep(5 * time.Millisecond)
		if err := b.r.Run(func(*reactor.Reactor) {
			if qb.modifying > 0 {
				t.Errorf("%v of %d bytes: a copy has begun before the one that was held back", old.Op, old.Length)
			}
		}); err != nil {
			t.Fatal(err)
		}
		resume(a, qa)
		got := filled(datapath.OpRead, 4096, 512, 0)
		got.Buf = make([]byte, 512)
		if !oldDone() || !copyDone() || !newerDone() || !a.begin(t, got)() {
			t.FailNow()
		}
		if !bytes.Equal(got.Buf, newer.Buf) {
			t.Errorf("%v of %d bytes: the newer write was overtaken", old.Op, old.Length)
		}
	}
}

// TestPartsOfBlocksKeepTheirOrderWithoutMemory uses up a queue's memory for parts of
// blocks before the old copy comes.
func TestPartsOfBlocksKeepTheirOrderWithoutMemory(t *testing.T) {
	_, a, b, end := volumePorts(t, 5*bounceCount, 50*time.Millisecond)
	defer end()
	var list []*datapath.Request
	for i := range uint64(4 * bounceCount) {
		list = append(list, filled(datapath.OpWrite, 1<<20+i*blockSize, 512, 9))
	}
	list = append(list, filled(datapath.OpWrite, 0, 512, 1))
	oldDone := a.begin(t, list...)
	newer := filled(datapath.OpWrite, 0, 512, 2)
	if !b.begin(t, filled(datapath.OpWrite, 0, 512, 1))() || !b.begin(t, newer)() || !oldDone() {
		t.FailNow()
	}
	got := &datapath.Request{Op: datapath.OpRead, Length: 512, Buf: make([]byte, 512)}
	if !b.begin(t, got)() {
		t.FailNow()
	}
	if !bytes.Equal(got.Buf, newer.Buf) {
		t.Error("the newer write was overtaken")
	}
}

// TestChangesThatWaitHearOfAStoppedPool stops the pool while a change waits its turn.
func TestChangesThatWaitHearOfAStoppedPool(t *testing.T) {
	slow := memory(64 << 20)
	g := newRig(t, 4, slow)
	g.open()
	d := g.volume("v", 1<<20)
	a, err := openPort(g.r, d, 4)
	if err != nil {
		t.Fatal(err)
	}
	q := a.q.(*queue)
	if err := g.r.Run(func(*reactor.Reactor) { q.pause(func() {}) }); err != nil {
		t.Fatal(err)
	}
	r := filled(datapath.OpWrite, 0, 4096, 1)
	done := make(chan datapath.Status, 1)
	r.Done = func(r *datapath.Request) { done <- r.Status }
	if err := g.r.Run(func(*reactor.Reactor) { q.Submit(r) }); err != nil {
		t.Fatal(err)
	}
	g.pool.fail(errors.New("stopped by the test"))
	if err := g.r.Run(func(*reactor.Reactor) { q.resume() }); err != nil {
		t.Fatal(err)
	}
	if s := <-done; s != datapath.StatusIO {
		t.Errorf("the change ended with %v", s)
	}
	if q.v.order.busy.Load() != 0 {
		t.Error("the change has kept its place")
	}
	if err := errors.Join(a.close(), d.Close()); err != nil {
		t.Error(err)
	}
	_ = g.pool.Close() // has failed
}
