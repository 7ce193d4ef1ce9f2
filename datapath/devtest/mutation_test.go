package devtest

import (
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// broken is a device over memory with one mistake in it.
type broken struct {
	datapath.Device
	submit func(q *brokenQueue, r *datapath.Request)
}

func (d *broken) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	q := &brokenQueue{Queue: below, dev: d, reactor: r}
	q.completions.Init(r, depth)
	return q, err
}

type brokenQueue struct {
	datapath.Queue
	dev         *broken
	reactor     *reactor.Reactor
	completions datapath.Completions
	count       int
}

func (q *brokenQueue) Submit(r *datapath.Request) { q.dev.submit(q, r) }

func (q *brokenQueue) store() *memdev.Store { return q.dev.Device.(*memdev.Device).Store() }

// later runs f in a later turn, so that others come between.
func (q *brokenQueue) later(f func()) {
	t := &reactor.Timer{Func: f}
	q.reactor.Arm(t, 0)
}

// TestLoadsFindBrokenDevices makes mistakes of the kind that devices make and
// wants the random loads to find them.
func TestLoadsFindBrokenDevices(t *testing.T) {
	if raceEnabled {
		t.Skip("the mistakes need the speed of the ordinary build to show in time")
	}
	reactors := Reactors(t, reactor.EngineAuto, reactorCount)
	for _, test := range []struct {
		name     string
		want     string // part of one of the errors
		overlaps bool   // the load of overlaps finds it, else the modelled load
		submit   func(q *brokenQueue, r *datapath.Request)
	}{
		{"blocks are written in two halves", "torn", true, func(q *brokenQueue, r *datapath.Request) {
			if r.Op != datapath.OpWrite {
				q.Queue.Submit(r)
				return
			}
			q.store().Write(r.Buf[:1000], r.Offset)
			q.later(func() {
				q.store().Write(r.Buf[1000:], r.Offset+1000)
				q.completions.Add(r, datapath.StatusOK)
			})
		}},
		{"writes complete before they are visible", "another", true, func(q *brokenQueue, r *datapath.Request) {
			if q.count++; r.Op != datapath.OpWrite || q.count%7 != 0 {
				q.Queue.Submit(r)
				return
			}
			data := append([]byte{}, r.Buf...)
			offset := r.Offset
			q.completions.Add(r, datapath.StatusOK)
			q.later(func() { q.later(func() { q.store().Write(data, offset) }) })
		}},
		{"a write is lost now and then", "want", false, func(q *brokenQueue, r *datapath.Request) {
			if q.count++; r.Op == datapath.OpWrite && q.count%50 == 0 {
				q.completions.Add(r, datapath.StatusOK)
				return
			}
			q.Queue.Submit(r)
		}},
		{"unaligned writes carry old neighbours along", "want", false, func(q *brokenQueue, r *datapath.Request) {
			if r.Op != datapath.OpWrite || r.Offset%datapath.BlockSize == 0 {
				q.Queue.Submit(r)
				return
			}
			block := r.Offset / datapath.BlockSize * datapath.BlockSize
			data := make([]byte, r.Offset-block+r.Length)
			q.store().Read(data, block)
			q.later(func() {
				copy(data[r.Offset-block:], r.Buf)
				q.store().Write(data, block)
				q.completions.Add(r, datapath.StatusOK)
			})
		}},
		{"write-zeroes forgets the tail", "want", false, func(q *brokenQueue, r *datapath.Request) {
			if r.Op == datapath.OpWriteZeroes && r.Length%datapath.BlockSize != 0 {
				q.store().Zero(r.Offset, r.Length/datapath.BlockSize*datapath.BlockSize, false)
				q.completions.Add(r, datapath.StatusOK)
				return
			}
			q.Queue.Submit(r)
		}},
		{"extents call data zero", "covers data", false, func(q *brokenQueue, r *datapath.Request) {
			if r.Op == datapath.OpExtents {
				r.Extents = append(r.Extents[:0], datapath.Extent{Length: r.Length, State: datapath.ExtentZero})
				q.completions.Add(r, datapath.StatusOK)
				return
			}
			q.Queue.Submit(r)
		}},
		{"a write scribbles on its buffer", "changed its buffer", false, func(q *brokenQueue, r *datapath.Request) {
			if r.Op == datapath.OpWrite {
				q.store().Write(r.Buf, r.Offset)
				r.Buf[len(r.Buf)-1]++
				q.completions.Add(r, datapath.StatusOK)
				return
			}
			q.Queue.Submit(r)
		}},
		{"nothing", "", false, func(q *brokenQueue, r *datapath.Request) { q.Queue.Submit(r) }},
		{"nothing", "", true, func(q *brokenQueue, r *datapath.Request) { q.Queue.Submit(r) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			seed := Seed(t)
			var found error
			for try := range uint64(10) {
				g := newRig(t, &Options{DiscardZeroes: true}, func(t *testing.T) datapath.Device {
					m, err := memdev.New(memdev.Config{Size: 8 << 20})
					if err != nil {
						t.Fatal(err)
					}
					return &broken{Device: m, submit: test.submit}
				}, reactors)
				if test.overlaps {
					found = overlaps(g, seed+try, loadBudget)
				} else {
					found = randomLoad(g, seed+try, loadBudget)
				}
				settle(t, reactors)
				g.close()
				if found != nil {
					break
				}
			}
			switch {
			case test.want == "" && found != nil:
				t.Errorf("seed %d: %v", seed, found)
			case test.want != "" && (found == nil || !strings.Contains(found.Error(), test.want)):
				t.Errorf("seed %d: found %v, want %q", seed, found, test.want)
			}
		})
	}
}

// settle lets timers of the broken device run out.
func settle(t *testing.T, reactors []*reactor.Reactor) {
	t.Helper()
	for range 4 {
		for _, r := range reactors {
			done := make(chan struct{})
			if err := r.Run(func(r *reactor.Reactor) { r.Arm(&reactor.Timer{Func: func() { close(done) }}, 0) }); err != nil {
				t.Fatal(err)
			}
			<-done
		}
	}
}
