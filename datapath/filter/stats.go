package filter

import (
	"slices"
	"sync"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/histogram"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// StatsConfig says what a Stats does beyond counting. The zero value is the usual.
type StatsConfig struct {
	Name string // of the device, in the records of slow requests
	// NoStages leaves the stages out: latency is then that of the device, from
	// Submit to Done. It is there to measure what stages cost.
	NoStages bool
	// Slow takes the requests that took at least as long as it says; nil: none.
	Slow *SlowRequests
}

// Stats counts the requests of a device and measures how long they take, as a whole
// and by stage (see [datapath.Timing]).
//
// What a reactor counts is its own memory, without locks and atomics; whoever asks
// for a Snapshot has each reactor copy what is new since the last one.
type Stats struct {
	datapath.Device // the device below; Close closes it
	config          StatsConfig

	mu      sync.Mutex
	tallies map[*reactor.Reactor]*tally // of reactors with queues open; guarded by mu
	retired *PackedStats                // what closed queues counted; nil: nothing; guarded by mu
}

// OpStats is what was counted for one operation.
type OpStats struct {
	Count    uint64 // completed
	Errors   uint64 // of these, not StatusOK
	Bytes    uint64 // length of those that succeeded
	InFlight int64

	// Latency is that of all completed: from the arrival of the request at the
	// export to the reply on its way.
	Latency histogram.Histogram
	// Stages are the parts of it, by stage; nil: no request came there. The count of
	// a stage is that of the requests that did.
	Stages [datapath.StageCount]*histogram.Histogram
}

// Add adds what p has.
func (o *OpStats) Add(p *OpStats) {
	o.Count += p.Count
	o.Errors += p.Errors
	o.Bytes += p.Bytes
	o.InFlight += p.InFlight
	o.Latency.Add(&p.Latency)
	for i, h := range p.Stages {
		if h == nil {
			continue
		}
		if o.Stages[i] == nil {
			o.Stages[i] = &histogram.Histogram{}
		}
		o.Stages[i].Add(h)
	}
}

// StatsSnapshot is what was counted, by operation; nil: never asked for.
type StatsSnapshot [datapath.OpCount]*OpStats

// Op is what was counted for op, which may be nothing. It is not to be changed.
func (s *StatsSnapshot) Op(op datapath.Op) *OpStats {
	if o := s[op]; o != nil {
		return o
	}
	return &noStats
}

var noStats OpStats

// Add adds what p has.
func (s *StatsSnapshot) Add(p *StatsSnapshot) {
	for op, o := range p {
		if o != nil {
			s.add(datapath.Op(op), o)
		}
	}
}

func (s *StatsSnapshot) add(op datapath.Op, o *OpStats) {
	if s[op] == nil {
		s[op] = &OpStats{}
	}
	s[op].Add(o)
}

// InFlight is how many requests of all operations were under way.
func (s *StatsSnapshot) InFlight() (n int64) {
	for _, o := range s {
		if o != nil {
			n += o.InFlight
		}
	}
	return n
}

// NewStats counts what passes to below.
func NewStats(below datapath.Device, c StatsConfig) *Stats {
	return &Stats{Device: below, config: c, tallies: map[*reactor.Reactor]*tally{}}
}

// Unwrap is the device below.
func (d *Stats) Unwrap() datapath.Device { return d.Device }

// Info implements [datapath.Device].
func (d *Stats) Info() datapath.Info {
	info := d.Device.Info()
	info.Features &^= datapath.FeatureTimed // of a Stats below, which sees less
	if !d.config.NoStages {
		info.Features |= datapath.FeatureTimed
	}
	return info
}

// FixedBuffers implements [datapath.FixedBuffers], as far as the device below does:
// counting takes no bytes.
func (d *Stats) FixedBuffers() (align int, err error) { return datapath.FixedBuffersOf(d.Device) }

// OpenQueue implements [datapath.Device].
func (d *Stats) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &statsQueue{dev: d, below: below, reactor: r, slots: make([]statsSlot, depth), stages: !d.config.NoStages}
	q.ended = q.end
	d.mu.Lock()
	defer d.mu.Unlock()
	if q.tally = d.tallies[r]; q.tally == nil {
		q.tally = &tally{reactor: r, slow: d.config.Slow, name: d.config.Name}
		d.tallies[r] = q.tally
	}
	q.tally.queues++
	return q, nil
}

// Snapshot sums what all queues, open and closed, have counted since the device was
// made. Counts never go back. It is for ordinary goroutines, not for a reactor: it
// asks the reactors, and of one that does not answer in time it has what that
// counted before.
func (d *Stats) Snapshot() *StatsSnapshot {
	d.mu.Lock()
	tallies := make([]*tally, 0, len(d.tallies))
	for _, t := range d.tallies {
		tallies = append(tallies, t)
	}
	d.mu.Unlock()
	for _, t := range tallies {
		t.fetch()
	}
	// A queue that closed meanwhile is in retired, or still in tallies: together once.
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &StatsSnapshot{}
	s.AddPacked(d.retired)
	for _, t := range d.tallies {
		t.addTo(s)
	}
	return s
}

// leave retires what t counted when its last queue closes. It runs on t's reactor.
func (d *Stats) leave(t *tally) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t.queues--; t.queues > 0 {
		return
	}
	delete(d.tallies, t.reactor)
	if t.ops == [datapath.OpCount]*opTally{} {
		return // no request came
	}
	sum := StatsSnapshot{}
	sum.AddPacked(d.retired)
	for op, c := range t.ops {
		if c != nil {
			sum.add(datapath.Op(op), c.stats())
		}
	}
	d.retired = sum.Pack()
}

type statsQueue struct {
	dev     *Stats                  // immutable
	below   datapath.Queue          // immutable
	reactor *reactor.Reactor        // immutable
	ended   func(*datapath.Request) // immutable: end as a value, made once
	stages  bool                    // immutable
	tally   *tally                  // immutable; what is in it belongs to the reactor

	slots []statsSlot // by tag; owned by the reactor
}

// statsSlot is one request in flight.
type statsSlot struct {
	done   func(*datapath.Request)
	own    bool            // timing is the request's: the export has none
	plain  bool            // only the whole is measured, from start
	start  int64           // nanoseconds on the reactor's clock
	timing datapath.Timing // where own
}

// Submit implements [datapath.Queue].
func (q *statsQueue) Submit(r *datapath.Request) {
	s := &q.slots[r.Tag]
	s.done = r.Done
	r.Done = q.ended
	s.own, s.plain = false, false
	switch {
	case !q.stages:
		s.plain = true
	case r.Timing == nil:
		s.own = true
		s.timing.Begin(datapath.StageQueue, q.reactor.Tick())
		s.timing.Claim(q.tally)
		r.Timing = &s.timing
	default:
		s.plain = !r.Timing.Claim(q.tally) // another counts above
	}
	if s.plain {
		s.start = q.reactor.Tick()
	}
	q.tally.op(r.Op).begun++
	q.below.Submit(r)
}

func (q *statsQueue) end(r *datapath.Request) {
	s := &q.slots[r.Tag]
	c := q.tally.op(r.Op)
	if r.Fixed != 0 && r.Status == datapath.StatusNotSupported {
		q.refused(r, s, c)
		return
	}
	c.count++
	if r.Status == datapath.StatusOK {
		c.bytes += r.Length
	} else {
		c.errors++
	}
	switch t := r.Timing; {
	case s.plain:
		c.latency.Record(time.Duration(q.reactor.Tick() - s.start))
	default:
		t.Op, t.Status, t.Offset, t.Length = r.Op, r.Status, r.Offset, r.Length
		if s.own {
			t.End(q.reactor.Tick())
			r.Timing = nil
		} else {
			t.Enter(datapath.StageReply, q.reactor.Tick())
		}
	}
	r.Done = s.done
	s.done = nil
	r.Done(r)
}

// refused is the end of a request that comes again with other memory: only then it is
// counted.
func (q *statsQueue) refused(r *datapath.Request, s *statsSlot, c *opTally) {
	c.begun--
	if s.own {
		r.Timing = nil
	}
	r.Done = s.done
	s.done = nil
	r.Done(r)
}

// Close implements [datapath.Queue].
func (q *statsQueue) Close() error {
	err := q.below.Close()
	q.dev.leave(q.tally)
	return err
}

// stages lists those of a timing that were entered, in order.
func stages(t *datapath.Timing) []StageTime {
	var list []StageTime
	for s := range datapath.StageCount {
		if ns, entered := t.Spent(s); entered {
			list = append(list, StageTime{s, time.Duration(ns)})
		}
	}
	return slices.Clip(list)
}
