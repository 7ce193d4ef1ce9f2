package filter

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/histogram"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Stats counts the requests of a device and measures how long they take. Each
// queue counts for itself, in memory only its reactor writes; a reader sums.
type Stats struct {
	datapath.Device // the device below; Close closes it

	mu      sync.Mutex
	queues  []*statsQueue // open; guarded by mu
	retired StatsSnapshot // what closed queues counted; guarded by mu
}

// OpStats is what was counted for one operation.
type OpStats struct {
	Count    uint64 // completed
	Errors   uint64 // of these, not StatusOK
	Bytes    uint64 // length of those that succeeded
	InFlight int64
	Latency  histogram.Snapshot // of all completed
}

func (o *OpStats) add(p *OpStats) {
	o.Count += p.Count
	o.Errors += p.Errors
	o.Bytes += p.Bytes
	o.InFlight += p.InFlight
	o.Latency.Add(&p.Latency)
}

// StatsSnapshot is what was counted, by operation.
type StatsSnapshot [datapath.OpCount]OpStats

// NewStats counts what passes to below.
func NewStats(below datapath.Device) *Stats { return &Stats{Device: below} }

// Unwrap is the device below.
func (d *Stats) Unwrap() datapath.Device { return d.Device }

// OpenQueue implements [datapath.Device].
func (d *Stats) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &statsQueue{dev: d, below: below, reactor: r, slots: make([]statsSlot, depth)}
	q.ended = q.end
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queues = append(d.queues, q)
	return q, nil
}

// Snapshot sums what all queues, open and closed, have counted since the device
// was made. Counts never go back. Any goroutine.
func (d *Stats) Snapshot() *StatsSnapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.retired
	for _, q := range d.queues {
		q.addTo(&s)
	}
	return &s
}

// InFlight is how many requests are under way, of all queues. Any goroutine.
func (d *Stats) InFlight() (n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, q := range d.queues {
		for op := range q.ops {
			n += q.ops[op].inFlight.Load()
		}
	}
	return n
}

func (d *Stats) retire(q *statsQueue) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, open := range d.queues {
		if open == q {
			d.queues = append(d.queues[:i], d.queues[i+1:]...)
			q.addTo(&d.retired)
			return
		}
	}
}

type statsQueue struct {
	dev     *Stats                  // immutable
	below   datapath.Queue          // immutable
	reactor *reactor.Reactor        // immutable
	ended   func(*datapath.Request) // immutable: end as a value, made once

	slots []statsSlot // by tag; owned by the reactor

	ops [datapath.OpCount]opCounters // written by the reactor, read by Snapshot
}

type statsSlot struct {
	done  func(*datapath.Request)
	start int64 // nanoseconds on the reactor's clock
}

type opCounters struct {
	count, errors, bytes atomic.Uint64
	inFlight             atomic.Int64
	latency              histogram.Histogram
}

func (q *statsQueue) addTo(s *StatsSnapshot) {
	for op := range q.ops {
		c := &q.ops[op]
		o := OpStats{Count: c.count.Load(), Errors: c.errors.Load(), Bytes: c.bytes.Load(), InFlight: c.inFlight.Load()}
		c.latency.AddTo(&o.Latency)
		s[op].add(&o)
	}
}

// Submit implements [datapath.Queue].
func (q *statsQueue) Submit(r *datapath.Request) {
	s := &q.slots[r.Tag]
	s.done, s.start = r.Done, q.reactor.Clock()
	r.Done = q.ended
	q.ops[r.Op].inFlight.Add(1)
	q.below.Submit(r)
}

func (q *statsQueue) end(r *datapath.Request) {
	s := &q.slots[r.Tag]
	c := &q.ops[r.Op]
	c.latency.Record(time.Duration(q.reactor.Clock() - s.start))
	c.count.Add(1)
	if r.Status == datapath.StatusOK {
		c.bytes.Add(r.Length)
	} else {
		c.errors.Add(1)
	}
	c.inFlight.Add(-1)
	r.Done = s.done
	s.done = nil
	r.Done(r)
}

// Close implements [datapath.Queue].
func (q *statsQueue) Close() error {
	err := q.below.Close()
	q.dev.retire(q)
	return err
}
