package filter

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// refusing takes registered buffers, and then refuses every request that has one.
type refusing struct{ datapath.Device }

func (d refusing) FixedBuffers() (int, error) { return 512, nil }

func (d refusing) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	return refusingQueue{below, r}, err
}

type refusingQueue struct {
	datapath.Queue
	r *reactor.Reactor
}

func (q refusingQueue) Submit(r *datapath.Request) {
	if r.Fixed == 0 {
		q.Queue.Submit(r)
		return
	}
	q.r.Defer(&reactor.Deferred{Func: func() { r.Complete(datapath.StatusNotSupported) }})
}

func TestStatsCountARefusedRequestWhenItComesAgain(t *testing.T) {
	r, err := reactor.Start(reactor.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	for _, timed := range []bool{false, true} {
		d := NewStats(refusing{memory(t, memdev.Config{})}, StatsConfig{})
		if align, err := datapath.FixedBuffersOf(d); err != nil || align != 512 {
			t.Errorf("multiples of %d, %v", align, err)
		}
		ended := make(chan datapath.Status)
		var queue datapath.Queue
		var timing datapath.Timing
		request := &datapath.Request{Op: datapath.OpRead, Length: 4096, Fixed: 1}
		request.Done = func(x *datapath.Request) {
			if x.Fixed != 0 && x.Status == datapath.StatusNotSupported {
				x.Fixed, x.Buf = 0, make([]byte, 4096)
				if timed {
					timing.Begin(datapath.StageQueue, timing.Began())
				}
				queue.Submit(x)
				return
			}
			if timed {
				timing.End(r.Tick())
			}
			go func() { ended <- x.Status }() // taken below
		}
		if err := r.Run(func(r *reactor.Reactor) {
			if queue, err = d.OpenQueue(r, 1); err != nil {
				t.Error(err)
				return
			}
			if timed {
				timing.Begin(datapath.StageReceive, r.Tick())
				request.Timing = &timing
			}
			queue.Submit(request)
		}); err != nil {
			t.Fatal(err)
		}
		if status := <-ended; status != datapath.StatusOK {
			t.Errorf("ended with %s", status)
		}
		if o := d.Snapshot().Op(datapath.OpRead); o.Count != 1 || o.Errors != 0 || o.InFlight != 0 || o.Bytes != 4096 || o.Latency.Count != 1 {
			t.Errorf("timed %t: %d requests, %d errors, %d in flight, %d bytes, %d measured", timed, o.Count, o.Errors, o.InFlight, o.Bytes, o.Latency.Count)
		}
		if err := r.Run(func(*reactor.Reactor) { err = queue.Close() }); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := datapath.FixedBuffersOf(NewLimit(refusing{memory(t, memdev.Config{})}, Limits{})); err == nil {
		t.Error("a layer that does not know of registered buffers passes them on")
	}
}
