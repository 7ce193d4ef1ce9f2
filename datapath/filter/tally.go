package filter

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/histogram"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// tallyPatience is how long a reader waits for a reactor's counts. A turn takes
// microseconds; a reactor that is stuck must not keep its numbers from being read.
const tallyPatience = 250 * time.Millisecond

// tally is what one reactor counts for one device, over all its queues.
type tally struct {
	reactor *reactor.Reactor // immutable
	slow    *SlowRequests    // immutable; nil: none
	name    string           // immutable

	queues int // open; guarded by Stats.mu

	// Owned by the reactor. Memory for an operation is made when it is first asked for.
	ops [datapath.OpCount]*opTally

	changed atomic.Bool // there is something that was not fetched

	fetching sync.Mutex // held by one reader at a time, who waits for the reactor

	mu   sync.Mutex
	last *PackedStats // as of the last fetch; nil: there was none; guarded by mu
}

// opTally counts one operation.
type opTally struct {
	begun, count, errors, bytes uint64
	latency                     histogram.Histogram
	stages                      [datapath.StageCount]histogram.Histogram
}

// op is the count of op, which is about to change. Reactor.
func (t *tally) op(op datapath.Op) *opTally {
	if !t.changed.Load() {
		t.changed.Store(true)
	}
	if t.ops[op] == nil {
		t.ops[op] = &opTally{}
	}
	return t.ops[op]
}

// Record implements [datapath.Recorder]. It runs on the reactor.
func (t *tally) Record(x *datapath.Timing) {
	c := t.op(x.Op)
	total := x.Total()
	c.latency.Record(time.Duration(total))
	for s := range datapath.StageCount {
		if ns, entered := x.Spent(s); entered {
			c.stages[s].Record(time.Duration(ns))
		}
	}
	if t.slow != nil && total >= int64(t.slow.threshold) {
		t.slow.add(t.name, x)
	}
}

// stats is c as readers see it; it shares c's memory.
func (c *opTally) stats() *OpStats {
	o := &OpStats{Count: c.count, Errors: c.errors, Bytes: c.bytes, InFlight: int64(c.begun - c.count), Latency: c.latency}
	for s := range c.stages {
		if c.stages[s].Count > 0 {
			o.Stages[s] = &c.stages[s]
		}
	}
	return o
}

// copying has a reactor copy its counts for a reader, into memory of the reader's.
type copying struct {
	t    *tally
	used [datapath.OpCount]bool
	to   *[datapath.OpCount]opTally
	over atomic.Bool // the reactor has begun, or the reader has given up: whoever is first
	done chan struct{}
}

// copies is memory for readers.
var copies = sync.Pool{New: func() any { return new([datapath.OpCount]opTally) }}

// RunTask implements [reactor.Task].
func (c *copying) RunTask(*reactor.Reactor) {
	if c.over.Swap(true) {
		return
	}
	c.t.changed.Store(false)
	for op, from := range c.t.ops {
		if from != nil {
			c.to[op], c.used[op] = *from, true
		}
	}
	close(c.done)
}

// fetch brings last up to date.
func (t *tally) fetch() {
	t.fetching.Lock()
	defer t.fetching.Unlock()
	if !t.changed.Load() {
		return
	}
	c := &copying{t: t, to: copies.Get().(*[datapath.OpCount]opTally), done: make(chan struct{})}
	timer := time.NewTimer(tallyPatience)
	defer timer.Stop()
	for !t.reactor.TryPost(c) {
		select {
		case <-timer.C:
			copies.Put(c.to)
			return // its mailbox is full, or it has stopped
		case <-time.After(time.Millisecond):
		}
	}
	select {
	case <-c.done:
	case <-timer.C:
		if !c.over.Swap(true) {
			copies.Put(c.to)
			return // the reactor will find that it is over
		}
		<-c.done // it has just begun
	}
	now := &PackedStats{}
	for op := range c.to {
		if c.used[op] {
			now[op] = c.to[op].stats().pack()
		}
	}
	copies.Put(c.to)
	t.mu.Lock()
	t.last = now
	t.mu.Unlock()
}

// addTo adds what was fetched last to s.
func (t *tally) addTo(s *StatsSnapshot) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.AddPacked(t.last)
}
