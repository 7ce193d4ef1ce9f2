package filter

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/rate"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Limits are the rates a Limit allows. Every operation but a flush counts as one
// request; reads and writes also count their bytes. A flush is never held back:
// it has nothing to do with requests that have not completed.
type Limits = rate.Limits

// Limit holds requests back to a rate that all queues of the device share.
//
// A queue that has to wait keeps its requests in order and asks for the turn of
// the first one only; queues that wait therefore take turns, however many
// requests each of them holds. A request larger than the burst runs when its
// turn comes and makes the following ones wait for it.
type Limit struct {
	datapath.Device // the device below; Close closes it

	start  time.Time                  // origin of the clock all queues share
	rate   atomic.Pointer[rate.Turns] // in force; nil: no limit
	waited atomic.Uint64              // requests that had to wait

	mu     sync.Mutex
	limits Limits                   // in force; guarded by mu
	queues map[*limitQueue]struct{} // open; guarded by mu
}

// NewLimit limits what passes to below.
func NewLimit(below datapath.Device, l Limits) *Limit {
	d := &Limit{Device: below, start: time.Now(), queues: make(map[*limitQueue]struct{})}
	d.set(l)
	return d
}

// Unwrap is the device below.
func (d *Limit) Unwrap() datapath.Device { return d.Device }

// Limits are the limits in force. Any goroutine.
func (d *Limit) Limits() Limits {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.limits
}

// Waited is how many requests have been held back so far. Any goroutine.
func (d *Limit) Waited() uint64 { return d.waited.Load() }

// SetLimits changes the limits. Requests that wait are measured anew, by the new
// rate. It is for ordinary goroutines, not for a reactor.
func (d *Limit) SetLimits(l Limits) {
	d.set(l)
	d.mu.Lock()
	queues := make([]*limitQueue, 0, len(d.queues))
	for q := range d.queues {
		queues = append(queues, q)
	}
	d.mu.Unlock()
	for _, q := range queues {
		q.reactor.Post(q) // a stopped reactor holds no requests
	}
}

func (d *Limit) set(l Limits) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.limits = l
	d.rate.Store(rate.New(l))
}

func (d *Limit) now() int64 { return int64(time.Since(d.start)) }

// Info implements [datapath.Device]. Requests that wait still own their buffers.
func (d *Limit) Info() datapath.Info { return holding(d.Device) }

// OpenQueue implements [datapath.Device].
func (d *Limit) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &limitQueue{dev: d, below: below, reactor: r, line: rate.NewLine[*datapath.Request](depth)}
	q.timer.Func = q.release
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queues[q] = struct{}{}
	return q, nil
}

type limitQueue struct {
	dev     *Limit           // immutable
	below   datapath.Queue   // immutable
	reactor *reactor.Reactor // immutable

	// Owned by the reactor.
	line   rate.Line[*datapath.Request]
	timer  reactor.Timer
	closed bool
}

// Submit implements [datapath.Queue].
func (q *limitQueue) Submit(r *datapath.Request) {
	turns := q.dev.rate.Load()
	if r.Op == datapath.OpFlush || turns == nil && q.line.Empty() {
		q.below.Submit(r)
		return
	}
	wait, waits := q.line.Enter(turns, q.dev.now(), r, r.DataBytes())
	if !waits {
		q.below.Submit(r)
		return
	}
	if wait > 0 {
		q.reactor.Arm(&q.timer, wait)
	}
	q.dev.waited.Add(1)
}

// release passes on every request whose turn has come. Requests completed by the
// device below cannot submit from in here, since none completes inside Submit.
func (q *limitQueue) release() {
	for !q.line.Empty() {
		r, wait := q.line.Leave(q.dev.rate.Load(), q.dev.now())
		if wait > 0 {
			q.reactor.Arm(&q.timer, wait)
			return
		}
		q.below.Submit(r)
	}
	q.reactor.Disarm(&q.timer)
}

// RunTask is the message of SetLimits: look again.
func (q *limitQueue) RunTask(*reactor.Reactor) {
	if !q.closed {
		q.release()
	}
}

// Close implements [datapath.Queue].
func (q *limitQueue) Close() error {
	q.closed = true
	q.reactor.Disarm(&q.timer)
	q.dev.mu.Lock()
	delete(q.dev.queues, q)
	q.dev.mu.Unlock()
	return q.below.Close()
}
