package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// within fails the test when f does not end: a deadlock is to say where it is.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(d):
		panic(what + " does not end") // with all stacks
	}
}

// hammer is a pool that is used from several reactors while it works on itself.
type hammer struct {
	*testing.T
	rig      *rig
	reactors []*reactor.Reactor
	stop     atomic.Bool
	workers  sync.WaitGroup
}

func newHammer(t *testing.T, zoneRegions int, config func(*Config), disks ...datapath.Device) *hammer {
	h := &hammer{T: t, rig: newRig(t, zoneRegions, disks...), reactors: devtest.Reactors(t, reactor.EngineAuto, 3)}
	h.rig.config.Manual = false
	h.rig.config.SumCacheBytes = pageSize
	if config != nil {
		config(&h.rig.config)
	}
	h.rig.open()
	return h
}

func (h *hammer) go_(f func()) {
	h.workers.Add(1)
	go func() {
		defer h.workers.Done()
		f()
	}()
}

// upkeep has the pool do at short intervals what it does in time.
func (h *hammer) upkeep() {
	p := h.rig.pool
	h.go_(func() {
		for !h.stop.Load() {
			_ = p.cleanRegions(0)
			p.dropSums()
		}
	})
	h.go_(func() {
		for !h.stop.Load() {
			_ = p.checkpoint()
			time.Sleep(time.Millisecond)
		}
	})
	h.go_(func() {
		for !h.stop.Load() {
			p.Info()
			_ = p.commitAll()
			time.Sleep(time.Millisecond)
		}
	})
}

// space waits until half of the pool is free: what was deleted has to come back while
// the others go on.
func (h *hammer) space() bool {
	for range 3000 {
		if i := h.rig.pool.Info(); i.Free > i.Total/2 || h.stop.Load() {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.Errorf("space does not come back: %+v, jobs %+v", h.rig.pool.Info(), h.rig.pool.Jobs())
	return false
}

func (h *hammer) end() {
	h.stop.Store(true)
	within(h.T, time.Minute, "the work", h.workers.Wait)
}

func (h *hammer) port(d datapath.Device, i int) *port {
	p, err := openPort(h.reactors[i%len(h.reactors)], d, 16)
	if err != nil {
		h.Fatal(err)
	}
	return p
}

func hammerTime() time.Duration {
	switch {
	case longTests:
		return 30 * time.Second
	case raceEnabled:
		return 3 * time.Second
	}
	return 2 * time.Second
}

// TestBlocksHaveOneOrderWhileThePoolWorks writes and reads the same few blocks from
// three reactors while snapshots come and go, are merged, scrubbed, cleaned and
// written to checkpoints. Each block has to behave as one register.
func TestBlocksHaveOneOrderWhileThePoolWorks(t *testing.T) {
	h := newHammer(t, 2, nil, memory(24<<20), memory(16<<20))
	p := h.rig.pool
	d := h.rig.volume("v", 8<<20)
	history := &devtest.History{}
	var values atomic.Uint64
	// Blocks of 512 bytes, so that writes share blocks of the pool: registers.
	registers := []uint64{0, 1, 7, 8, 255, 256, 257, 300, 2048, 2049}
	for i := range 3 {
		for range 2 {
			q := h.port(d, i)
			record := history.Recorder()
			random := rand.New(rand.NewPCG(devtest.Seed(t), uint64(i)))
			h.go_(func() {
				defer func() {
					if err := q.close(); err != nil {
						t.Error(err)
					}
				}()
				for !h.stop.Load() {
					x := registers[random.IntN(len(registers))]
					b := make([]byte, 512)
					if random.IntN(2) == 0 {
						token := record.Read(x)
						if s, err := q.one(datapath.OpRead, 0, x*512, b, 512); err != nil || s != datapath.StatusOK {
							t.Errorf("read: %v %v", s, err)
							return
						}
						record.Got(token, binary.LittleEndian.Uint64(b))
						continue
					}
					value := values.Add(1)
					for k := 0; k < len(b); k += 8 {
						binary.LittleEndian.PutUint64(b[k:], value)
					}
					var flags datapath.Flags
					if random.IntN(8) == 0 {
						flags = datapath.FlagFUA
					}
					token := record.Write(x, value)
					switch s, err := q.one(datapath.OpWrite, flags, x*512, b, 512); {
					case err != nil || s != datapath.StatusOK:
						t.Errorf("write: %v %v", s, err)
						return
					default:
						record.Wrote(token)
					}
				}
			})
		}
	}
	// Discards and zeroes beside the registers, in the same clusters.
	for i := range 2 {
		q := h.port(d, i)
		random := rand.New(rand.NewPCG(7, uint64(i)))
		h.go_(func() {
			defer func() { _ = q.close() }() // was told of before
			for !h.stop.Load() {
				op := []datapath.Op{datapath.OpDiscard, datapath.OpWriteZeroes, datapath.OpWrite, datapath.OpFlush}[random.IntN(4)]
				offset, length := uint64(600+random.IntN(1000))*512, uint64(1+random.IntN(300))*512
				r := &datapath.Request{Op: op, Offset: offset, Length: length}
				switch op {
				case datapath.OpWrite:
					r.Buf = make([]byte, length)
				case datapath.OpFlush:
					r.Offset, r.Length = 0, 0
				}
				if err := q.do(r); err != nil || r.Status != datapath.StatusOK && r.Status != datapath.StatusNoSpace {
					t.Errorf("%v: %v %v", op, r.Status, err)
					return
				}
			}
		})
	}
	h.upkeep()
	h.go_(func() {
		for n := 0; !h.stop.Load(); n++ {
			name := fmt.Sprintf("s%d", n)
			if !h.space() {
				return
			}
			if _, err := p.CreateSnapshot("v", name, nil); err != nil {
				t.Errorf("snapshot: %v", err)
				return
			}
			if n >= 3 {
				if _, err := p.DeleteSnapshot("v", fmt.Sprintf("s%d", n-3+n%2)); err != nil && !errors.Is(err, ErrNotFound) {
					t.Errorf("delete: %v", err)
					return
				}
			}
			if n%8 == 7 {
				for k := max(n-8, 0); k <= n; k++ {
					_, _ = p.DeleteSnapshot("v", fmt.Sprintf("s%d", k)) // some are gone
				}
			}
		}
	})
	h.go_(func() {
		for !h.stop.Load() {
			if _, err := p.Scrub(1 << 40); err != nil && !errors.Is(err, ErrInUse) {
				t.Errorf("scrub: %v", err)
				return
			}
			for _, j := range p.Jobs() {
				if j.Kind == JobScrub && j.Found > 0 {
					t.Errorf("the scrub found damage: %+v", j)
					return
				}
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	time.Sleep(hammerTime())
	h.end()
	if err := history.Check(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	within(t, time.Minute, "Close", h.rig.close)
}

// TestVolumesComeAndGoWhileLayersAreMerged deletes and reverts volumes just when the
// layers below them are merged into them, beside a volume that must not notice.
func TestVolumesComeAndGoWhileLayersAreMerged(t *testing.T) {
	h := newHammer(t, 4, nil, memory(64<<20))
	p := h.rig.pool
	d := h.rig.volume("witness", 4<<20)
	q := h.port(d, 0)
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i>>12) | 1
	}
	h.go_(func() {
		for n := uint64(0); !h.stop.Load(); n++ {
			at := n % 4 << 20
			data[0] = byte(n)
			if s, err := q.one(datapath.OpWrite, 0, at, data, 1<<20); err != nil || s != datapath.StatusOK {
				t.Errorf("write: %v %v", s, err)
				return
			}
			got := make([]byte, 1<<20)
			if s, err := q.one(datapath.OpRead, 0, at, got, 1<<20); err != nil || s != datapath.StatusOK || string(got) != string(data) {
				t.Errorf("read: %v %v, or another volume's data", s, err)
				return
			}
			if s, err := q.one(datapath.OpDiscard, 0, at, nil, 1<<20); err != nil || s != datapath.StatusOK {
				t.Errorf("discard: %v %v", s, err)
				return
			}
		}
	})
	h.upkeep()
	fresh := make([]byte, blockSize)
	for i := range 2 {
		h.go_(func() {
			name := fmt.Sprintf("v%d", i)
			for n := 0; !h.stop.Load() && h.space(); n++ {
				if _, err := p.CreateVolume(VolumeSpec{Name: name, Size: 4 << 20}); err != nil {
					t.Errorf("create: %v", err)
					return
				}
				use := func(f func(*port)) {
					d, err := p.OpenVolume(name)
					if err != nil {
						t.Error(err)
						return
					}
					q := h.port(d, i+1)
					f(q)
					if err := errors.Join(q.close(), d.Close()); err != nil {
						t.Error(err)
					}
				}
				scatter := func(q *port) {
					for k := range uint64(24) {
						if s, err := q.one(datapath.OpWrite, 0, k*clusterSize+uint64(n%32)*blockSize, fresh[:blockSize], blockSize); err != nil || s != datapath.StatusOK {
							t.Errorf("write: %v %v", s, err)
							return
						}
					}
				}
				use(scatter)
				for k := range 3 {
					if _, err := p.CreateSnapshot(name, fmt.Sprintf("s%d", k), nil); err != nil {
						t.Errorf("snapshot: %v", err)
						return
					}
					n++
					use(scatter)
				}
				for _, k := range []int{1, 2} {
					if _, err := p.DeleteSnapshot(name, fmt.Sprintf("s%d", k)); err != nil {
						t.Errorf("delete: %v", err)
						return
					}
				}
				time.Sleep(time.Duration(n%5) * time.Millisecond)
				if n%2 == 0 {
					if err := p.Revert(name, "s0"); err != nil {
						t.Errorf("revert: %v", err)
						return
					}
				}
				if _, err := p.DeleteVolume(name, true); err != nil {
					t.Errorf("delete: %v", err)
					return
				}
			}
		})
	}
	time.Sleep(hammerTime())
	h.end()
	if err := errors.Join(q.close(), d.Close()); err != nil {
		t.Error(err)
	}
	within(t, time.Minute, "Close", h.rig.close)
	h.rig.config.Manual = true
	p = h.rig.open() // proves that every cluster has one owner
	if n := len(p.Volumes()); n != 1 {
		t.Errorf("%d volumes are left", n)
	}
	h.rig.close()
}

// TestDiscardThenWriteWorksAtOnceOnAFullPool fills a pool and gives back just what
// the next write needs, from several queues.
func TestDiscardThenWriteWorksAtOnceOnAFullPool(t *testing.T) {
	for _, manual := range []bool{true, false} {
		h := newHammer(t, 1, func(c *Config) { c.Manual = manual }, memory(10<<20))
		d := h.rig.volume("v", 32<<20)
		q := h.port(d, 0)
		data := make([]byte, clusterSize)
		full := uint64(0)
		for ; ; full++ {
			s, err := q.one(datapath.OpWrite, 0, full*clusterSize, data, clusterSize)
			if err != nil {
				t.Fatal(err)
			}
			if s == datapath.StatusNoSpace {
				break
			}
		}
		if full < 20 {
			t.Fatalf("the pool took %d clusters", full)
		}
		for i := range 3 {
			q := h.port(d, i)
			h.go_(func() {
				for n := uint64(0); n < 40; n++ {
					at := (uint64(i) + 3*n) % full * clusterSize // given up, and written again
					if s, err := q.one(datapath.OpDiscard, 0, at, nil, clusterSize); err != nil || s != datapath.StatusOK {
						t.Errorf("discard: %v %v", s, err)
					}
					began := time.Now()
					if s, err := q.one(datapath.OpWrite, 0, at, data, clusterSize); err != nil || s != datapath.StatusOK {
						t.Errorf("write after a discard on a full pool: %v %v", s, err)
					}
					if took := time.Since(began); took > time.Second {
						t.Errorf("a write after a discard on a full pool took %v", took)
					}
				}
				if err := q.close(); err != nil {
					t.Error(err)
				}
			})
		}
		h.workers.Wait()
		for i := range full { // owned blocks stay writable
			if s, err := q.one(datapath.OpWrite, 0, i*clusterSize, data[:4096], 4096); err != nil || s != datapath.StatusOK {
				t.Fatalf("overwrite on a full pool: %v %v", s, err)
			}
		}
		if err := errors.Join(q.close(), d.Close()); err != nil {
			t.Error(err)
		}
		within(t, time.Minute, "Close", h.rig.close)
	}
}

// TestThickVolumesAlwaysFindSpace fills what is left with a thin volume, and then
// hammers a thick one from several queues, with discards.
func TestThickVolumesAlwaysFindSpace(t *testing.T) {
	h := newHammer(t, 2, nil, memory(24<<20))
	p := h.rig.pool
	if _, err := p.CreateVolume(VolumeSpec{Name: "thick", Size: 6 << 20, Thick: true}); err != nil {
		t.Fatal(err)
	}
	thick, err := p.OpenVolume("thick")
	if err != nil {
		t.Fatal(err)
	}
	thin := h.rig.volume("thin", 64<<20)
	data := make([]byte, clusterSize)
	h.upkeep()
	q := h.port(thin, 0)
	h.go_(func() {
		for i := uint64(0); !h.stop.Load(); i++ {
			op, b := datapath.OpWrite, data
			if i%7 == 0 {
				op, b = datapath.OpDiscard, nil
			}
			if s, err := q.one(op, 0, i*5%512*clusterSize, b, clusterSize); err != nil || s != datapath.StatusOK && s != datapath.StatusNoSpace {
				t.Errorf("thin: %v %v", s, err)
				return
			}
		}
	})
	for i := range 3 {
		q := h.port(thick, i)
		random := rand.New(rand.NewPCG(3, uint64(i)))
		h.go_(func() {
			for !h.stop.Load() {
				op, b := datapath.OpWrite, data[:64<<10]
				if random.IntN(3) == 0 {
					op, b = datapath.OpDiscard, nil
				}
				if s, err := q.one(op, 0, uint64(random.IntN(47))*clusterSize+uint64(random.IntN(3))*(64<<10), b, 64<<10); err != nil || s != datapath.StatusOK {
					t.Errorf("thick: %v: %v %v, %+v", op, s, err, p.Info())
					break
				}
			}
			if err := q.close(); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(hammerTime())
	h.end()
	if err := errors.Join(q.close(), thick.Close(), thin.Close()); err != nil {
		t.Error(err)
	}
	within(t, time.Minute, "Close", h.rig.close)
}

// TestCloseWhileThePoolWorks closes pools in the middle of merges, cleaning and
// rebuilding.
func TestCloseWhileThePoolWorks(t *testing.T) {
	rounds := 12
	if longTests {
		rounds = 200
	}
	disk := memory(128 << 20)
	g := newRig(t, 2, disk)
	g.config.Manual = false
	g.config.SumCacheBytes = pageSize
	data := make([]byte, blockSize)
	for n := range rounds {
		g.open()
		name := fmt.Sprintf("v%d", n)
		d := g.volume(name, 4<<20)
		q, err := openPort(g.r, d, 8)
		if err != nil {
			t.Fatal(err)
		}
		for k := range 4 {
			for i := range uint64(32) {
				if s, err := q.one(datapath.OpWrite, 0, i*clusterSize+uint64(k)*blockSize, data, blockSize); err != nil || s != datapath.StatusOK {
					t.Fatalf("write: %v %v", s, err)
				}
			}
			if _, err := g.pool.CreateSnapshot(name, fmt.Sprintf("s%d", k), nil); err != nil {
				t.Fatal(err)
			}
		}
		for k := range 3 {
			if _, err := g.pool.DeleteSnapshot(name, fmt.Sprintf("s%d", k)); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(q.close(), d.Close()); err != nil {
			t.Fatal(err)
		}
		if n%3 == 0 {
			if _, err := g.pool.DeleteVolume(name, true); err != nil {
				t.Fatal(err)
			}
		}
		if n%4 == 3 {
			g.pool.fail(errors.New("killed by the test"))
		}
		began := time.Now()
		within(t, time.Minute, "Close", func() { _ = g.pool.Close() }) // of a pool that was killed fails
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("Close took %v", took)
		}
		if n%4 == 3 {
			disk.CrashLose()
		}
		if n%2 == 1 { // so that the pool does not fill up
			g.open()
			for _, v := range g.pool.Volumes() {
				if _, err := g.pool.DeleteVolume(v.Name, true); err != nil {
					t.Fatal(err)
				}
			}
			within(t, time.Minute, "Close", g.close)
		}
	}
}
