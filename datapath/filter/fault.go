package filter

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// FaultAction is what a rule does to a request.
type FaultAction uint8

// The actions.
const (
	// FaultFail ends the request with the rule's status; nothing is done.
	FaultFail FaultAction = iota
	// FaultPartial does the first part of a write, discard or write-zeroes, up to
	// a block boundary chosen by the seed (maybe nothing, maybe all of it), then
	// fails: each block is old or new. Other operations just fail.
	FaultPartial
	// FaultHang keeps the request until Release, which fails it with the rule's
	// status, or does it when that is StatusOK.
	FaultHang
	// FaultDrop answers StatusOK and does nothing: a device that lies. It needs
	// FaultConfig.Lying and applies to changes and flushes only.
	FaultDrop
)

// FaultRule says which requests fail, and how. A request is matched by every
// field that is set; the first rule that matches and strikes decides.
type FaultRule struct {
	Ops    []datapath.Op  // any of these; all operations when empty
	Flags  datapath.Flags // all of these
	Offset uint64         // the range touched; a flush lies in the range that begins at 0
	Length uint64         // 0: to the end of the device

	// Of the requests that match, counted over all queues:
	After       uint64  // the first ones pass
	Count       uint64  // as many are struck, then the rule is spent; 0: no end
	Probability float64 // each of the others is struck with this chance, by the seed; 0: all of them

	Action FaultAction
	Status datapath.Status // StatusIO when StatusOK, but for FaultHang

	// Transient lets later flushes succeed after this rule has failed one. Without
	// it a failed flush is sticky, as datapath asks of every device.
	Transient bool
}

// FaultConfig says how a Fault behaves.
type FaultConfig struct {
	Rules []FaultRule
	Seed  uint64
	Lying bool // FaultDrop is allowed
}

// Fault is a device that fails by rules. With a seed and one queue it fails the
// same way every time.
type Fault struct {
	datapath.Device // the device below; Close closes it

	seed  uint64 // immutable
	lying bool   // immutable

	rules  atomic.Pointer[[]*faultRule]
	struck atomic.Uint64 // requests
	sticky atomic.Uint32 // the status of the flush that failed, 0 for none

	mu     sync.Mutex
	queues map[*faultQueue]struct{} // open; guarded by mu
}

type faultRule struct {
	FaultRule        // immutable
	ops       uint32 // bits; immutable
	matched   atomic.Uint64
	struck    atomic.Uint64
}

// ErrLying refuses a rule that drops changes on a device not marked as lying.
var ErrLying = errors.New("filter: a rule drops changes, but the device is not marked as lying")

// NewFault makes what passes to below fail by rules.
func NewFault(below datapath.Device, c FaultConfig) (*Fault, error) {
	d := &Fault{Device: below, seed: c.Seed, lying: c.Lying, queues: make(map[*faultQueue]struct{})}
	if err := d.SetRules(c.Rules); err != nil {
		return nil, err
	}
	return d, nil
}

// Unwrap is the device below.
func (d *Fault) Unwrap() datapath.Device { return d.Device }

// SetRules replaces the rules; their counts begin anew. Requests that hang stay
// so until Release, a failed flush stays sticky. Any goroutine.
func (d *Fault) SetRules(rules []FaultRule) error {
	compiled := make([]*faultRule, 0, len(rules))
	for i, rule := range rules {
		c := &faultRule{FaultRule: rule}
		for _, op := range rule.Ops {
			c.ops |= 1 << op
		}
		if len(rule.Ops) == 0 {
			c.ops = 1<<datapath.OpCount - 1
		}
		if rule.Action > FaultDrop {
			return fmt.Errorf("filter: fault rule %d: unknown action %d", i, rule.Action)
		}
		if rule.Action == FaultDrop {
			if !d.lying {
				return fmt.Errorf("fault rule %d: %w", i, ErrLying)
			}
			c.ops &= 1<<datapath.OpWrite | 1<<datapath.OpFlush | 1<<datapath.OpDiscard | 1<<datapath.OpWriteZeroes
		}
		if c.Length == 0 || c.Length > math.MaxUint64-c.Offset {
			c.Length = math.MaxUint64 - c.Offset
		}
		if c.Status == datapath.StatusOK && c.Action != FaultHang {
			c.Status = datapath.StatusIO
		}
		compiled = append(compiled, c)
	}
	d.rules.Store(&compiled)
	return nil
}

// Struck is how many requests rules have struck. Any goroutine.
func (d *Fault) Struck() uint64 { return d.struck.Load() }

// Hanging is how many requests hang now. It is for ordinary goroutines, not for
// a reactor.
func (d *Fault) Hanging() (n int) {
	for _, q := range d.open() {
		_ = q.reactor.Run(func(*reactor.Reactor) { n += q.hanging }) // a stopped reactor holds no requests
	}
	return n
}

// Release lets go of every request that hangs. It is for ordinary goroutines,
// not for a reactor.
func (d *Fault) Release() {
	for _, q := range d.open() {
		q.reactor.Post(q) // a stopped reactor holds no requests
	}
}

func (d *Fault) open() []*faultQueue {
	d.mu.Lock()
	defer d.mu.Unlock()
	queues := make([]*faultQueue, 0, len(d.queues))
	for q := range d.queues {
		queues = append(queues, q)
	}
	return queues
}

// strikes returns the rule that strikes r, or nil, and a random number for it.
func (d *Fault) strikes(r *datapath.Request) (*faultRule, uint64) {
	for i, rule := range *d.rules.Load() {
		if rule.ops>>r.Op&1 == 0 || r.Flags&rule.Flags != rule.Flags || !rule.touches(r) {
			continue
		}
		n := rule.matched.Add(1)
		if n <= rule.After {
			continue
		}
		random := mix(d.seed + uint64(i)<<32 + n)
		if rule.Probability > 0 && float64(random>>11)/(1<<53) >= rule.Probability {
			continue
		}
		if struck := rule.struck.Add(1); rule.Count > 0 && struck > rule.Count {
			continue
		}
		d.struck.Add(1)
		return rule, mix(random)
	}
	return nil, 0
}

func (f *faultRule) touches(r *datapath.Request) bool {
	if f.Offset == 0 && r.Length == 0 { // a flush
		return true
	}
	return r.Offset < f.Offset+f.Length && f.Offset < r.Offset+r.Length
}

// mix is the finalizer of splitmix64: a number that looks random, from a count.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Info implements [datapath.Device]. Requests that wait still own their buffers.
func (d *Fault) Info() datapath.Info { return holding(d.Device) }

// OpenQueue implements [datapath.Device].
func (d *Fault) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &faultQueue{dev: d, below: below, reactor: r, slots: make([]faultSlot, depth)}
	q.ended = q.end
	q.completions.Init(r, depth)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queues[q] = struct{}{}
	return q, nil
}

type faultQueue struct {
	dev     *Fault                  // immutable
	below   datapath.Queue          // immutable
	reactor *reactor.Reactor        // immutable
	ended   func(*datapath.Request) // immutable: end as a value, made once

	// Owned by the reactor.
	slots       []faultSlot // by tag
	hanging     int
	completions datapath.Completions
}

type faultSlot struct {
	hung   *datapath.Request
	status datapath.Status // to end with

	// A partial request runs with these two changed.
	done   func(*datapath.Request)
	length uint64
	buf    []byte
}

// Submit implements [datapath.Queue].
func (q *faultQueue) Submit(r *datapath.Request) {
	rule, random := q.dev.strikes(r)
	if rule == nil {
		if sticky := datapath.Status(q.dev.sticky.Load()); sticky != 0 && r.Op == datapath.OpFlush {
			q.completions.Add(r, sticky)
			return
		}
		q.below.Submit(r)
		return
	}
	if r.Op == datapath.OpFlush && !rule.Transient && rule.Action != FaultDrop && rule.Status != datapath.StatusOK {
		q.dev.sticky.CompareAndSwap(0, uint32(rule.Status))
	}
	s := &q.slots[r.Tag]
	switch rule.Action {
	case FaultDrop:
		q.completions.Add(r, datapath.StatusOK)
		return
	case FaultHang:
		s.hung, s.status = r, rule.Status
		q.hanging++
		return
	case FaultPartial:
		if r.Modifies() {
			q.part(r, s, rule.Status, random)
			return
		}
	}
	q.completions.Add(r, rule.Status)
}

// part passes the first blocks of r on. The cut lies on a block boundary of the
// device, so that no block is half written.
func (q *faultQueue) part(r *datapath.Request, s *faultSlot, status datapath.Status, random uint64) {
	first := r.Offset / datapath.BlockSize
	blocks := (r.Offset+r.Length+datapath.BlockSize-1)/datapath.BlockSize - first
	cut := (first + random%(blocks+1)) * datapath.BlockSize
	if cut <= r.Offset {
		q.completions.Add(r, status)
		return
	}
	s.done, s.length, s.buf, s.status = r.Done, r.Length, r.Buf, status
	r.Done = q.ended
	r.Length = min(r.Length, cut-r.Offset)
	if r.Op == datapath.OpWrite {
		r.Buf = r.Buf[:r.Length]
	}
	q.below.Submit(r)
}

// end is told when the done part of a partial request has ended.
func (q *faultQueue) end(r *datapath.Request) {
	s := &q.slots[r.Tag]
	r.Done, r.Length, r.Buf = s.done, s.length, s.buf
	s.done, s.buf = nil, nil
	r.Complete(s.status)
}

// RunTask is the message of Release.
func (q *faultQueue) RunTask(*reactor.Reactor) {
	for i := range q.slots {
		s := &q.slots[i]
		if s.hung == nil {
			continue
		}
		r := s.hung
		s.hung = nil
		q.hanging--
		if s.status != datapath.StatusOK {
			q.completions.Add(r, s.status)
		} else {
			q.below.Submit(r)
		}
	}
}

// Close implements [datapath.Queue].
func (q *faultQueue) Close() error {
	q.dev.mu.Lock()
	delete(q.dev.queues, q)
	q.dev.mu.Unlock()
	return q.below.Close()
}
