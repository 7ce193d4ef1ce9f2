package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// TestAddDiskWhileVolumesAreOpen adds disks to a pool that is full, under writers on
// three reactors whose queues come and go. Then power is lost.
func TestAddDiskWhileVolumesAreOpen(t *testing.T) {
	group := memdisk.NewGroup(memdisk.Config{Size: 12 << 20}, memdisk.Config{Size: 24 << 20}, memdisk.Config{Size: 24 << 20}, memdisk.Config{Size: 24 << 20})
	h := newHammer(t, 2, nil, group.Disk(0))
	p := h.rig.pool
	d := h.rig.volume("v", 48<<20)
	const own = 16 << 20
	last := make([][]byte, 3) // what each worker has flushed
	for i := range 3 {
		h.go_(func() {
			state := make([]byte, own/clusterSize)
			for round := 1; !h.stop.Load(); round++ {
				q := h.port(d, i)
				for range 40 {
					c := rand.IntN(len(state))
					b := bytes.Repeat([]byte{byte(round) | 1}, blockSize)
					switch s, err := q.one(datapath.OpWrite, 0, uint64(i)*own+uint64(c)*clusterSize, b, blockSize); {
					case err != nil || s != datapath.StatusOK && s != datapath.StatusNoSpace:
						t.Errorf("write: %v %v", s, err)
						return
					case s == datapath.StatusOK:
						state[c] = b[0]
					}
				}
				if s, err := q.one(datapath.OpFlush, 0, 0, nil, 0); err != nil || s != datapath.StatusOK {
					t.Errorf("flush: %v %v", s, err)
					return
				}
				last[i] = bytes.Clone(state)
				if err := q.close(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	h.upkeep()
	var disks []Disk
	for i := 1; i < 4; i++ {
		time.Sleep(hammerTime() / 4)
		x := Disk{Path: fmt.Sprint("added", i), Device: group.Disk(i)}
		disks = append(disks, x)
		before := p.Info().Total
		if err := p.AddDisk(x); err != nil {
			t.Fatal(err)
		}
		if after := p.Info().Total; after < before+16<<20 {
			t.Errorf("%d bytes, were %d", after, before)
		}
	}
	time.Sleep(hammerTime() / 4)
	h.end()
	p.fail(errors.New("killed by the test"))
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	_ = p.Close() // has failed
	group.CrashLose()
	h.rig.config.Disks = append(disks, h.rig.disks...)
	h.rig.config.Manual = true
	h.rig.open()
	d, err := h.rig.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	c := devtest.NewClient(t, h.rig.r, d, 8)
	used := map[int]bool{}
	for i, state := range last {
		for k, want := range state {
			if got := c.Read(uint64(i)*own+uint64(k)*clusterSize, blockSize); !bytes.Equal(got, bytes.Repeat([]byte{want}, blockSize)) {
				t.Fatalf("worker %d, cluster %d: %d, want %d", i, k, got[0], want)
			}
		}
	}
	h.rig.pool.volumes["v"].head.Load().each(0, func(_ uint32, e entry) bool {
		if e.cluster() != noCluster {
			used[h.rig.pool.zoneOf(e.cluster()).disk.index] = true
		}
		return true
	})
	if len(used) != 4 {
		t.Errorf("disks in use: %v", used)
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	h.rig.close()
}

// stubborn is a disk that opens some queues only.
type stubborn struct {
	datapath.Device
	queues int // still to be opened
}

func (d *stubborn) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	if d.queues--; d.queues < 0 {
		return nil, errors.New("no more queues")
	}
	return d.Device.OpenQueue(r, depth)
}

// TestAddDiskThatFailsChangesNothing: whether a queue of it cannot be had, or a write.
func TestAddDiskThatFailsChangesNothing(t *testing.T) {
	g := newRig(t, 4, memory(20<<20))
	g.open()
	d := g.volume("v", 8<<20)
	a, b := devtest.NewClient(t, g.r, d, 4), devtest.NewClient(t, g.r, d, 4)
	data := bytes.Repeat([]byte{3}, 1<<20)
	fails := func(x datapath.Device) {
		t.Helper()
		before := g.pool.Info()
		if err := g.pool.AddDisk(Disk{Path: "bad", Device: x}); err == nil {
			t.Fatal("it was added")
		}
		if after := g.pool.Info(); after.Total != before.Total || len(after.Members) != 1 || after.State != StateOnline {
			t.Errorf("%+v", after)
		}
		for _, c := range []*devtest.Client{a, b} {
			c.Write(0, data)
			c.Flush()
			if q := c.Read(0, 1<<20); !bytes.Equal(q, data) {
				t.Error("data differ")
			}
		}
	}
	for queues := range 3 { // the pool's own, and those of a and b
		fails(&stubborn{memory(40 << 20), queues})
	}
	if err := g.pool.AddDisk(Disk{Path: "good", Device: memory(40 << 20)}); err != nil {
		t.Fatal(err)
	}
	a.Write(4<<20, data)
	b.Flush()
	a.Close()
	b.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	g.close()
}

// TestCrashWhileAPoolBecomesLarger loses power at every event of growing and of adding
// a disk, and of what is done with the space at once.
func TestCrashWhileAPoolBecomesLarger(t *testing.T) {
	l := newLab(t)
	if !longTests {
		l.deep, l.again, l.cuts = 5, 211, 6
	}
	larger := func(name string, size uint64) base {
		b := l.makeBase(name, 1, size, "xwof", nil)
		for i := uint64(0); ; i++ {
			if b.group.Disk(0).Info().Size >= 16<<20 {
				return b
			}
			b.group.Disk(0).Truncate(16 << 20)
		}
	}
	spare := func(name string, size uint64) base {
		group := memdisk.NewGroup(memdisk.Config{Size: size}, memdisk.Config{Size: 8 << 20})
		return l.makeBaseOn(name, group, group.Disks()[:1], "xwof", nil)
	}
	o := memdisk.ImageOptions{Seed: devtest.Seed(t), Subsets: 3, Each: 4, Random: 2, Torn: 1, Masks: 1}
	for _, b := range []base{larger("short zone", 8<<20), larger("whole zones", 8390*1024)} {
		for _, ops := range []string{"g", "gb", "gbf", "gm", "gS", "gTT"} {
			l.crashes(b, ops, o, true, true)
		}
	}
	for _, ops := range []string{"a", "ab", "abbbf", "abm", "aS", "aTTm"} {
		l.crashes(spare("spare", 8<<20), ops, o, true, true)
	}
	t.Logf("%d images", l.images)
}

// TestCrashWithThickVolumes loses power at every event in the life of a thick volume.
func TestCrashWithThickVolumes(t *testing.T) {
	l := newLab(t)
	if !longTests {
		l.deep, l.again, l.cuts = 5, 211, 6
	}
	o := memdisk.ImageOptions{Seed: devtest.Seed(t), Subsets: 3, Each: 4, Random: 2, Torn: 1, Masks: 1}
	b := l.makeBase("fresh", 1, 10<<20, "xwof", nil)
	for n := range 6 {
		for _, after := range []string{"", "m", "b"} {
			l.crashes(b, "TTTTTT"[:n+1]+after, o, true, true)
		}
	}
	t.Logf("%d images", l.images)
}

// A zone that gives clusters must be known already to whoever gets one.
func TestNewClustersHaveAZone(t *testing.T) {
	g := newRig(t, 1, memory(16<<20))
	p := g.open()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // until stop
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			p.alloc.mu.Lock()
			giving := len(p.alloc.zones)
			p.alloc.mu.Unlock()
			if known := len(*p.zones.Load()); known < giving {
				t.Errorf("%d zones give clusters, and %d are known", giving, known)
				return
			}
		}
	}()
	for i := range 4 {
		if err := p.AddDisk(Disk{Path: fmt.Sprint("added", i), Device: memory(512 << 20)}); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	<-stopped
	g.close()
}
