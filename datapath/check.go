package datapath

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/invariant"
)

// Checked wraps d and stops the process when d, or whoever uses it, breaks a
// rule of this package:
//
//   - a request that [Validate] refuses, a tag out of range or in use, a buffer
//     of another length than the request, a registered one ([Request.Fixed]) for a
//     device that takes none, more than depth in flight;
//   - a completion inside Submit, a second one, one on another thread;
//   - a field changed that the device does not own, a status out of the set,
//     extents that are empty, too many, too long or not in the caller's array;
//   - Submit after Close, a queue closed with requests in flight, a device closed
//     with queues open, either closed twice.
//
// It passes down requests of its own, so that a late second completion meets its
// slot and not the export. It costs two system calls a request (the thread's id)
// and allocates nothing. A device that shrinks while requests are on their way is
// taken for an export that did not validate.
func Checked(d Device) Device { return &checkedDevice{below: d} }

type checkedDevice struct {
	below Device // immutable

	queues atomic.Int64 // open
	closed atomic.Bool
}

// Unwrap is the device below.
func (d *checkedDevice) Unwrap() Device { return d.below }

// Info implements [Device].
func (d *checkedDevice) Info() Info { return d.below.Info() }

// FixedBuffers implements [FixedBuffers], as far as the device below does.
func (d *checkedDevice) FixedBuffers() (align int, err error) { return FixedBuffersOf(d.below) }

func (d *checkedDevice) takesFixed() bool {
	_, err := FixedBuffersOf(d.below)
	return err == nil
}

// OpenQueue implements [Device].
func (d *checkedDevice) OpenQueue(r *reactor.Reactor, depth int) (Queue, error) {
	invariant.Check(!d.closed.Load(), "OpenQueue on a closed device")
	invariant.Check(depth > 0, "OpenQueue with depth %d", depth)
	below, err := d.below.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	d.queues.Add(1)
	q := &checkedQueue{dev: d, below: below, thread: unix.Gettid(), slots: make([]checkedSlot, depth)}
	for i := range q.slots {
		q.slots[i].down.Done = q.done
	}
	return q, nil
}

// Close implements [Device].
func (d *checkedDevice) Close() error {
	n := d.queues.Load()
	invariant.Check(n == 0, "device closed with %d queues open", n)
	invariant.Check(!d.closed.Swap(true), "device closed twice")
	return d.below.Close()
}

type checkedQueue struct {
	dev    *checkedDevice // immutable
	below  Queue          // immutable
	thread int            // immutable: the reactor's thread

	// Owned by the reactor.
	slots      []checkedSlot // by tag
	inflight   int
	submitting int // calls of Submit under way
	closed     bool
}

// checkedSlot is one request in flight, twice: as the export made it and as it
// was handed down.
type checkedSlot struct {
	up   *Request // nil: the slot is free
	down Request
}

// bad stops the process over request r. It is apart so that nothing escapes on
// the way of a good request.
//
//go:noinline
func (q *checkedQueue) bad(r *Request, what string) {
	invariant.Check(false, "%s: %s of %d bytes at %d, flags %#x, tag %d, status %s, %d of %d in flight",
		what, r.Op, r.Length, r.Offset, uint16(r.Flags), r.Tag, r.Status, q.inflight, len(q.slots))
}

// Submit implements [Queue].
func (q *checkedQueue) Submit(r *Request) {
	info := q.dev.below.Info()
	moves := r.Op == OpRead || r.Op == OpWrite
	switch {
	case q.closed:
		q.bad(r, "submitted to a closed queue")
	case unix.Gettid() != q.thread:
		q.bad(r, "submitted on a thread that is not the queue's reactor")
	case q.inflight >= len(q.slots):
		q.bad(r, "submitted to a full queue")
	case uint64(r.Tag) >= uint64(len(q.slots)):
		q.bad(r, "tag out of range")
	case q.slots[r.Tag].up != nil:
		q.bad(r, "tag in use")
	case r.Done == nil:
		q.bad(r, "no Done")
	case r.Op >= OpCount:
		q.bad(r, "unknown operation")
	case r.Op == OpFlush && (r.Offset != 0 || r.Length != 0):
		q.bad(r, "flush with a range")
	case Validate(&info, r) != StatusOK:
		q.bad(r, "not validated")
	case r.Fixed != 0 && (!moves || r.Buf != nil):
		q.bad(r, "registered buffer beside another, or on an operation that moves no data")
	case r.Fixed != 0 && !q.dev.takesFixed():
		q.bad(r, "registered buffer for a device that takes none")
	case moves && r.Fixed == 0 && uint64(len(r.Buf)) != r.Length:
		q.bad(r, "buffer of another length than the request")
	case !moves && r.Buf != nil:
		q.bad(r, "buffer on an operation that moves no data")
	case moves && info.MaxIO != 0 && r.Length > uint64(info.MaxIO):
		q.bad(r, "longer than the device's largest request")
	}
	s := &q.slots[r.Tag]
	s.up = r
	done := s.down.Done
	s.down = *r
	s.down.Done = done
	s.down.Status, s.down.Zero = StatusOK, false
	s.down.Extents = r.Extents[:0]
	q.inflight++
	q.submitting++
	q.below.Submit(&s.down)
	q.submitting--
}

// done gets every completion of the device below.
func (q *checkedQueue) done(d *Request) {
	if uint64(d.Tag) >= uint64(len(q.slots)) || d != &q.slots[d.Tag].down {
		q.bad(d, "tag changed by the device")
	}
	s := &q.slots[d.Tag]
	up := s.up
	switch {
	case unix.Gettid() != q.thread:
		q.bad(d, "completed on another thread")
	case up == nil:
		q.bad(d, "completed twice")
	case q.submitting != 0:
		q.bad(d, "completed inside Submit")
	case d.Status >= statusCount:
		q.bad(d, "status out of the set")
	case d.Op != up.Op, d.Flags != up.Flags, d.Offset != up.Offset, d.Length != up.Length, d.Fixed != up.Fixed, d.Context != up.Context, d.Timing != up.Timing:
		q.bad(d, "field changed by the device")
	case len(d.Buf) != len(up.Buf),
		len(d.Buf) > 0 && &d.Buf[0] != &up.Buf[0] && (d.Op != OpRead || d.Flags&FlagLend == 0):
		q.bad(d, "buffer changed by the device")
	case d.Zero && (d.Op != OpRead || d.Status != StatusOK):
		q.bad(d, "marked as zero without being a successful read")
	case d.Op == OpExtents && d.Status == StatusOK:
		q.checkExtents(d, up)
	case len(d.Extents) != 0 && d.Op != OpExtents:
		q.bad(d, "extents on another operation")
	}
	s.up = nil
	q.inflight--
	up.Zero, up.Extents, up.Buf = d.Zero, d.Extents, d.Buf
	up.Complete(d.Status)
}

func (q *checkedQueue) checkExtents(d, up *Request) {
	switch {
	case len(d.Extents) == 0:
		q.bad(d, "no extents")
	case cap(d.Extents) != cap(up.Extents) || &d.Extents[:1][0] != &up.Extents[:1][0]:
		q.bad(d, "extents beyond the capacity of the caller's array")
	case d.Flags&FlagOneExtent != 0 && (len(d.Extents) != 1 || d.Extents[0].Length > d.Length):
		q.bad(d, "more than one extent asked for")
	}
	var covered uint64
	for _, e := range d.Extents {
		if e.Length == 0 {
			q.bad(d, "empty extent")
		}
		if covered >= d.Length {
			q.bad(d, "extent that begins past the range")
		}
		covered += e.Length
	}
}

// Close implements [Queue].
func (q *checkedQueue) Close() error {
	invariant.Check(!q.closed, "queue closed twice")
	invariant.Check(unix.Gettid() == q.thread, "queue closed on a thread that is not its reactor")
	invariant.Check(q.inflight == 0, "queue closed with %d requests in flight", q.inflight)
	q.closed = true
	err := q.below.Close()
	q.dev.queues.Add(-1)
	return err
}
