package datapath_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// puppet is a device that does what a test says, when the test says it.
type puppet struct {
	info    datapath.Info
	handed  []*datapath.Request
	onEntry func(r *datapath.Request)
}

func newPuppet() *puppet {
	return &puppet{info: datapath.Info{Size: 1 << 20, MinIO: 512, PreferredIO: datapath.BlockSize, MaxIO: 64 << 10}}
}

func (p *puppet) Info() datapath.Info { return p.info }
func (p *puppet) OpenQueue(*reactor.Reactor, int) (datapath.Queue, error) {
	return puppetQueue{p}, nil
}
func (p *puppet) Close() error { return nil }

type puppetQueue struct{ *puppet }

func (q puppetQueue) Submit(r *datapath.Request) {
	q.handed = append(q.handed, r)
	if q.onEntry != nil {
		q.onEntry(r)
	}
}

// caught runs f on the reactor and returns what it panicked with.
func caught(t *testing.T, r *reactor.Reactor, f func()) (message string) {
	t.Helper()
	err := r.Run(func(*reactor.Reactor) {
		defer func() {
			if p := recover(); p != nil {
				message = fmt.Sprint(p)
			}
		}()
		f()
	})
	if err != nil {
		t.Fatal(err)
	}
	return message
}

func readOf(tag uint32, done func(*datapath.Request)) *datapath.Request {
	return &datapath.Request{Op: datapath.OpRead, Tag: tag, Length: 512, Buf: make([]byte, 512), Done: done}
}

func TestCheckedStopsWhoeverBreaksARule(t *testing.T) {
	r, other := start(t), start(t)
	ignore := func(*datapath.Request) {}
	extents := func(flags datapath.Flags, places int) *datapath.Request {
		return &datapath.Request{Op: datapath.OpExtents, Flags: flags, Length: 8192, Done: ignore,
			Context: datapath.ContextAllocation, Extents: make([]datapath.Extent, 0, places)}
	}
	for _, test := range []struct {
		want string // "" for none
		do   func(p *puppet, q datapath.Queue)
	}{
		{"", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			q.Submit(readOf(1, ignore))
			p.handed[1].Complete(datapath.StatusOK)
			p.handed[0].Complete(datapath.StatusIO)
		}},
		{"completed twice", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			p.handed[0].Complete(datapath.StatusOK)
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"completed inside Submit", func(p *puppet, q datapath.Queue) {
			p.onEntry = func(r *datapath.Request) { r.Complete(datapath.StatusOK) }
			q.Submit(readOf(0, ignore))
		}},
		{"full queue", func(_ *puppet, q datapath.Queue) {
			for i := range uint32(3) {
				q.Submit(readOf(i, ignore))
			}
		}},
		{"tag in use", func(_ *puppet, q datapath.Queue) {
			q.Submit(readOf(1, ignore))
			q.Submit(readOf(1, ignore))
		}},
		{"tag out of range", func(_ *puppet, q datapath.Queue) { q.Submit(readOf(2, ignore)) }},
		{"no Done", func(_ *puppet, q datapath.Queue) { q.Submit(readOf(0, nil)) }},
		{"unknown operation", func(_ *puppet, q datapath.Queue) {
			q.Submit(&datapath.Request{Op: datapath.OpCount, Done: ignore})
		}},
		{"not validated", func(_ *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Offset = 1 << 20
			q.Submit(b)
		}},
		{"not validated", func(_ *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Offset = 100 // no multiple of MinIO
			q.Submit(b)
		}},
		{"flush with a range", func(_ *puppet, q datapath.Queue) {
			q.Submit(&datapath.Request{Op: datapath.OpFlush, Length: 512, Done: ignore})
		}},
		{"buffer of another length", func(_ *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Buf = b.Buf[:511]
			q.Submit(b)
		}},
		{"registered buffer beside", func(_ *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Fixed = 1
			q.Submit(b)
		}},
		{"registered buffer beside another, or on", func(_ *puppet, q datapath.Queue) {
			q.Submit(&datapath.Request{Op: datapath.OpDiscard, Length: 512, Fixed: 1, Done: ignore})
		}},
		{"takes none", func(_ *puppet, q datapath.Queue) {
			q.Submit(&datapath.Request{Op: datapath.OpRead, Length: 512, Fixed: 1, Done: ignore})
		}},
		{"moves no data", func(_ *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Op = datapath.OpDiscard
			q.Submit(b)
		}},
		{"largest request", func(_ *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Length, b.Buf = 128<<10, make([]byte, 128<<10)
			q.Submit(b)
		}},
		{"status out of the set", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			p.handed[0].Complete(99)
		}},
		{"field changed", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			p.handed[0].Offset = 512
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"tag changed", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			p.handed[0].Tag = 1
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"buffer changed", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			p.handed[0].Buf = make([]byte, 512)
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"", func(p *puppet, q datapath.Queue) {
			b := readOf(0, ignore)
			b.Flags = datapath.FlagLend
			q.Submit(b)
			p.handed[0].Buf = make([]byte, 512)
			p.handed[0].Complete(datapath.StatusOK)
			if &b.Buf[0] != &p.handed[0].Buf[0] {
				panic("the lent buffer did not come back")
			}
		}},
		{"marked as zero", func(p *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			p.handed[0].Zero = true
			p.handed[0].Complete(datapath.StatusIO)
		}},
		{"no extents", func(p *puppet, q datapath.Queue) {
			q.Submit(extents(0, 2))
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"empty extent", func(p *puppet, q datapath.Queue) {
			q.Submit(extents(0, 2))
			p.handed[0].Extents = append(p.handed[0].Extents, datapath.Extent{})
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"capacity", func(p *puppet, q datapath.Queue) {
			q.Submit(extents(0, 1))
			p.handed[0].Extents = append(p.handed[0].Extents, datapath.Extent{Length: 1}, datapath.Extent{Length: 1})
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"past the range", func(p *puppet, q datapath.Queue) {
			q.Submit(extents(0, 2))
			p.handed[0].Extents = append(p.handed[0].Extents, datapath.Extent{Length: 8192}, datapath.Extent{Length: 1})
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"one extent", func(p *puppet, q datapath.Queue) {
			q.Submit(extents(datapath.FlagOneExtent, 2))
			p.handed[0].Extents = append(p.handed[0].Extents, datapath.Extent{Length: 8193})
			p.handed[0].Complete(datapath.StatusOK)
		}},
		{"1 requests in flight", func(_ *puppet, q datapath.Queue) {
			q.Submit(readOf(0, ignore))
			_ = q.Close()
		}},
		{"closed queue", func(_ *puppet, q datapath.Queue) {
			_ = q.Close()
			q.Submit(readOf(0, ignore))
		}},
		{"closed twice", func(_ *puppet, q datapath.Queue) {
			_ = q.Close()
			_ = q.Close()
		}},
	} {
		name := test.want
		if name == "" {
			name = "nothing broken"
		}
		t.Run(name, func(t *testing.T) {
			p := newPuppet()
			d := datapath.Checked(p)
			got := caught(t, r, func() {
				q, err := d.OpenQueue(r, 2)
				if err != nil {
					t.Error(err)
				}
				test.do(p, q)
			})
			if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("stopped with %q, want %q", got, test.want)
			}
		})
	}
	t.Run("another thread", func(t *testing.T) {
		p := newPuppet()
		d := datapath.Checked(p)
		var q datapath.Queue
		caught(t, r, func() {
			q, _ = d.OpenQueue(r, 2) // the puppet makes no errors
			q.Submit(readOf(0, ignore))
		})
		for want, do := range map[string]func(){
			"completed on another thread": func() { p.handed[0].Complete(datapath.StatusOK) },
			"submitted on a thread":       func() { q.Submit(readOf(1, ignore)) },
			"closed on a thread":          func() { _ = q.Close() },
		} {
			if got := caught(t, other, do); !strings.Contains(got, want) {
				t.Errorf("stopped with %q, want %q", got, want)
			}
		}
		if got := caught(t, r, func() { _ = d.Close() }); !strings.Contains(got, "1 queues open") {
			t.Errorf("stopped with %q", got)
		}
	})
}

func start(t *testing.T) *reactor.Reactor {
	t.Helper()
	return devtest.Reactors(t, reactor.EngineAuto, 1)[0]
}

func TestCheckedPassesEverythingThrough(t *testing.T) {
	devtest.Run(t, func(t *testing.T) datapath.Device {
		d, err := memdev.New(memdev.Config{Size: 8 << 20})
		if err != nil {
			t.Fatal(err)
		}
		return datapath.Checked(d)
	}, devtest.Options{DiscardZeroes: true, Engines: []reactor.EngineKind{reactor.EngineEpoll}})
}

func TestCompletionsEndLaterInOrder(t *testing.T) {
	r := start(t)
	var c datapath.Completions
	var got []uint32
	finished := make(chan struct{})
	err := r.Run(func(r *reactor.Reactor) {
		c.Init(r, 4)
		var requests [4]datapath.Request
		round := 0
		done := func(q *datapath.Request) {
			got = append(got, q.Tag)
			if round++; round <= 8 { // again, from inside Done
				before := len(got)
				c.Add(q, datapath.StatusOK)
				if len(got) != before {
					t.Error("Add completed a request")
				}
			} else if round == 12 {
				close(finished)
			}
		}
		for i := range requests {
			requests[i].Tag, requests[i].Done = uint32(i), done
			c.Add(&requests[i], datapath.StatusOK)
		}
		if len(got) != 0 {
			t.Error("Add completed a request")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	<-finished
	if want := "[0 1 2 3 0 1 2 3 0 1 2 3]"; fmt.Sprint(got) != want {
		t.Errorf("order %v, want %s", got, want)
	}
}
