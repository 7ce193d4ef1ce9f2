package filter

import (
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Latency is how long a request is held: Fixed, and a random part below Jitter.
type Latency struct{ Fixed, Jitter time.Duration }

// DelayConfig says how a Delay treats requests. Operations not named pass at once.
type DelayConfig struct {
	Latency map[datapath.Op]Latency
	Seed    uint64 // of the jitter; queue n draws from (Seed, n)
}

// Delay holds each request back for a while before it passes on, so that
// jitter also changes the order in which requests reach the device below.
type Delay struct {
	datapath.Device // the device below; Close closes it

	seed   uint64        // immutable
	queues atomic.Uint64 // opened so far

	latency [datapath.OpCount]struct{ fixed, jitter atomic.Int64 } // nanoseconds
}

// NewDelay delays what passes to below.
func NewDelay(below datapath.Device, c DelayConfig) *Delay {
	d := &Delay{Device: below, seed: c.Seed}
	for op, l := range c.Latency {
		d.Set(op, l)
	}
	return d
}

// Unwrap is the device below.
func (d *Delay) Unwrap() datapath.Device { return d.Device }

// Set changes how long requests of one operation are held from now on. Any
// goroutine.
func (d *Delay) Set(op datapath.Op, l Latency) {
	d.latency[op].fixed.Store(int64(l.Fixed))
	d.latency[op].jitter.Store(int64(l.Jitter))
}

// Info implements [datapath.Device]. Requests that wait still own their buffers.
func (d *Delay) Info() datapath.Info { return holding(d.Device) }

// OpenQueue implements [datapath.Device].
func (d *Delay) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &delayQueue{
		dev: d, below: below, reactor: r,
		random: rand.New(rand.NewPCG(d.seed, d.queues.Add(1)-1)),
		slots:  make([]delaySlot, depth),
	}
	for i := range q.slots {
		s := &q.slots[i]
		s.timer.Func = func() {
			held := s.held
			s.held = nil
			q.below.Submit(held)
		}
	}
	return q, nil
}

type delayQueue struct {
	dev     *Delay           // immutable
	below   datapath.Queue   // immutable
	reactor *reactor.Reactor // immutable

	// Owned by the reactor.
	random *rand.Rand
	slots  []delaySlot // by tag
}

type delaySlot struct {
	held  *datapath.Request
	timer reactor.Timer
}

// Submit implements [datapath.Queue].
func (q *delayQueue) Submit(r *datapath.Request) {
	l := &q.dev.latency[r.Op]
	hold := l.fixed.Load()
	if jitter := l.jitter.Load(); jitter > 0 {
		hold += q.random.Int64N(jitter)
	}
	if hold <= 0 {
		q.below.Submit(r)
		return
	}
	r.MarkRecent(datapath.StageDevice, q.reactor)
	s := &q.slots[r.Tag]
	s.held = r
	q.reactor.Arm(&s.timer, time.Duration(hold))
}

// Close implements [datapath.Queue].
func (q *delayQueue) Close() error { return q.below.Close() }
