//go:build !race

package pool

import (
	"errors"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// bout submits the same requests again and again.
type bout struct {
	q        datapath.Queue
	requests []*datapath.Request
	left     int // owned by the reactor
	done     chan struct{}
}

// RunTask implements reactor.Task.
func (b *bout) RunTask(*reactor.Reactor) {
	b.left = len(b.requests)
	for _, r := range b.requests {
		b.q.Submit(r)
	}
}

// TestWaitingAllocatesNothing: for blocks, for earlier changes, for parts of blocks,
// for a rate.
func TestWaitingAllocatesNothing(t *testing.T) {
	m, err := memdev.New(memdev.Config{Size: 32 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() }) // memory
	g := newRig(t, 4, m)
	p := g.open()
	d := g.volume("v", 8<<20)
	q, err := openPort(g.r, d, 32)
	if err != nil {
		t.Fatal(err)
	}
	if !q.begin(t, &datapath.Request{Op: datapath.OpWrite, Length: 8 << 20, Buf: make([]byte, 8<<20)})() {
		t.FailNow()
	}
	list := func(n int, length uint64) (all []*datapath.Request) {
		for i := range n {
			all = append(all, &datapath.Request{Op: datapath.OpWrite, Tag: uint32(i), Length: length, Buf: alignedBytes(int(length))})
		}
		return all
	}
	for name, requests := range map[string][]*datapath.Request{"blocks": list(16, 8192), "earlier changes": list(6, 6<<20), "parts of blocks": list(32, 512), "a rate": list(8, 4096)} {
		if name == "a rate" {
			if err := p.SetLimits("v", Limits{IOPS: 2000}); err != nil {
				t.Fatal(err)
			}
		}
		b := &bout{q: q.q, requests: requests, done: make(chan struct{}, 1)}
		for _, r := range requests {
			r.Done = func(r *datapath.Request) {
				if r.Status != datapath.StatusOK {
					t.Errorf("%s: %v", name, r.Status)
				}
				if b.left--; b.left == 0 {
					b.done <- struct{}{}
				}
			}
		}
		if n := testing.AllocsPerRun(50, func() { g.r.Post(b); <-b.done }); n >= 1 {
			t.Errorf("%s: %v allocations", name, n)
		}
		if err := p.SetLimits("v", Limits{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(q.close(), d.Close()); err != nil {
		t.Error(err)
	}
	g.close()
}
