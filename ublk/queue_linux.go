package ublk

import (
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/datapath/uring"
)

// queue is one hardware queue of a device, served by one reactor.
type queue struct {
	target     *Target          // immutable
	reactor    *reactor.Reactor // immutable
	index      uint16           // immutable
	ioMax      int              // bytes; immutable
	timed      bool             // the device records the stages of requests; immutable
	autoBuffer bool             // the driver registers the data of requests with the ring; immutable
	userCopy   bool             // data is read from and written to /dev/ublkcN; immutable
	fetch      uint32           // numbers of the commands; immutable
	commit     uint32

	descriptors []byte // shared with the kernel, which writes them; mapped read-only
	memory      []byte // buffers: one of ioMax a slot, or with user copy one for hard times

	// Owned by the reactor.
	buffers    int            // the first place of the ring's table for them, one a slot; buffersNone: none is used
	fixedAlign uint64         // what offset and length of a request must be multiples of to go without a copy
	below      datapath.Queue // nil when closed
	info       datapath.Info
	slots      []slot // by tag
	waiting    []*slot
	lent       bool // memory is in use, with user copy
	retry      reactor.Deferred
	copying    reactor.IO
	atDevice   int // requests given to below and not completed
	retired    int // slots whose command came back for good
	held       []*slot
	fetched    bool // the kernel has been given the slots
	holding    bool // nothing is begun or committed any more: the process gives the device up
	stopping   bool // what would be held fails instead: the kernel waits for it to remove the device

	drained  chan struct{} // closed when everything has been given back; nil then
	emptied  chan struct{} // made by giveUp, closed when no request is at the device
	counters queueCounters
}

// slot is one tag: a request of the kernel and what serves it.
type slot struct {
	queue   *queue
	tag     uint16
	command reactor.IO // FETCH or COMMIT_AND_FETCH, in flight while the slot is the kernel's
	bytes   [ioCommandSize]byte
	request datapath.Request
	timing  datapath.Timing // of it, where the device records them
	buffer  []byte          // of the request in flight
}

const buffersNone = -1

// queueCounters are written by the reactor and read by anyone.
type queueCounters struct {
	requests [datapath.OpCount]atomic.Uint64
	read     atomic.Uint64 // bytes
	written  atomic.Uint64 // bytes
	passed   atomic.Uint64
	errors   atomic.Uint64
	inFlight atomic.Int64
	retired  atomic.Int64
	failed   atomic.Int64 // the first errno with which a command came back that should not have
}

// mapSize is the length of the descriptors of a queue. Those of queues lie as far apart
// as the deepest queue's are long (ublk_max_cmd_buf_size in the driver).
func mapSize(depth int) int {
	page := os.Getpagesize()
	return (depth*descriptorSize + page - 1) / page * page
}

// prepare makes everything the queue needs but what the driver has to give, so that
// connect is short. It runs on the reactor.
func (q *queue) prepare(depth int, device datapath.Device) (err error) {
	if err = q.reactor.Reserve(depth); err != nil {
		return err
	}
	size := q.ioMax
	if !q.userCopy {
		size *= depth
	}
	if q.memory, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
		q.reactor.Release(depth)
		return fmt.Errorf("buffers of queue %d: %w", q.index, err)
	}
	if q.below, err = device.OpenQueue(q.reactor, depth); err != nil {
		_ = unix.Munmap(q.memory) // unused
		q.reactor.Release(depth)
		return err
	}
	info := device.Info()
	q.timed = info.Has(datapath.FeatureTimed)
	q.slots = make([]slot, depth)
	q.waiting = make([]*slot, 0, depth)
	q.held = make([]*slot, 0, depth)
	q.drained = make(chan struct{})
	q.retry.Func = q.beginWaiting
	for i := range q.slots {
		s := &q.slots[i]
		s.queue, s.tag = q, uint16(i)
		s.command = reactor.IO{Op: reactor.OpCommand, Buf: s.bytes[:], Done: func(*reactor.IO) { q.arrived(s) }}
		s.request = datapath.Request{Tag: uint32(i), Done: func(*datapath.Request) { q.completed(s) }}
		if q.timed {
			s.request.Timing = &s.timing
		}
	}
	return nil
}

// takePlaces lets the queue go without copies: it takes places for the data of its requests
// in the ring's table. It reports false when there are none. It runs on the reactor, after
// prepare.
func (q *queue) takePlaces() bool {
	align, err := datapath.FixedBuffersOf(q.target.config.Device)
	if err != nil || !q.autoBuffer {
		return false
	}
	first, ok := q.reactor.AddBuffers(len(q.slots))
	if ok {
		q.buffers, q.fixedAlign = first, uint64(align)
	}
	return ok
}

// connect maps the queue's descriptors from /dev/ublkcN, which fd is, and gives every
// slot to the kernel. It runs on the reactor, whose thread is the queue's server from
// then on.
func (q *queue) connect(fd int) error {
	var err error
	q.descriptors, err = unix.Mmap(fd, int64(q.index)*int64(mapSize(queueDepthMax)), mapSize(len(q.slots)), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map the descriptors of queue %d: %w", q.index, err)
	}
	q.fetched = true
	q.copying.FD = fd
	for i := range q.slots {
		s := &q.slots[i]
		s.command.FD = fd
		q.give(s, q.fetch, 0)
	}
	return nil
}

// give submits a command of s: from now on the slot is the kernel's.
func (q *queue) give(s *slot, number uint32, result int32) {
	address := uint64(0)
	if !q.userCopy {
		address = uring.Address(q.own(s))
	}
	if q.autoBuffer {
		s.command.Address = autoBufferOf(q.place(s))
	}
	encodeIOCommand(&s.bytes, q.index, s.tag, result, address)
	s.command.Mode = number
	q.reactor.SubmitIO(&s.command)
}

// place is where the data of s is registered.
func (q *queue) place(s *slot) uint64 {
	if q.buffers == buffersNone {
		return autoBufferNone
	}
	return uint64(q.buffers + int(s.tag))
}

// passes reports whether the request of s can do without a copy.
func (q *queue) passes(s *slot, d *descriptor) bool {
	return q.buffers != buffersNone && d.flags&kernelNeedBuffer == 0 && (s.request.Offset|s.request.Length)&(q.fixedAlign-1) == 0
}

// own is the slot's own memory, without user copy.
func (q *queue) own(s *slot) []byte {
	return q.memory[int(s.tag)*q.ioMax : (int(s.tag)+1)*q.ioMax]
}

// arrived is the end of a command: the kernel has a request for the slot, or wants
// the slot no more.
func (q *queue) arrived(s *slot) {
	result := s.command.Result
	if result != ioResultOK {
		if result != ioResultAbort && q.counters.failed.CompareAndSwap(0, int64(-result)) {
			q.target.log.Error("ublk command failed", "device", q.target.path, "queue", q.index, "tag", s.tag, "error", s.command.Errno())
		}
		q.retired++
		q.counters.retired.Store(int64(q.retired))
		q.settle()
		return
	}
	if q.holding {
		q.hold(s)
		return
	}
	if q.timed {
		s.timing.Begin(datapath.StageReceive, q.reactor.Tick())
	}
	var d descriptor
	d.decode(q.descriptors[int(s.tag)*descriptorSize:])
	r := &s.request
	r.Buf, r.Fixed = nil, 0
	if !d.requestOf(r) {
		q.fail(s, unix.EOPNOTSUPP)
		return
	}
	if status := datapath.Validate(&q.info, r); status != datapath.StatusOK {
		q.fail(s, status.Errno())
		return
	}
	if r.Op == datapath.OpRead || r.Op == datapath.OpWrite {
		if r.Length > uint64(q.ioMax) || r.Length == 0 {
			q.fail(s, unix.EINVAL)
			return
		}
		if !q.passes(s, &d) {
			q.beginCopied(s)
			return
		}
		r.Fixed = uint16(q.place(s)) + 1
	}
	q.begin(s)
}

// beginCopied begins a read or write through memory of ours, when there is some.
func (q *queue) beginCopied(s *slot) {
	if len(q.waiting) > 0 || !q.takeBuffer(s) {
		s.request.MarkRecent(datapath.StageQueue, q.reactor)
		q.waiting = append(q.waiting, s)
		q.reactor.WaitBuffers(&q.retry)
		return
	}
	q.begin(s)
}

// takeBuffer gives s memory for its request, or reports false when there is none now.
func (q *queue) takeBuffer(s *slot) bool {
	length := int(s.request.Length)
	switch {
	case !q.userCopy:
		s.buffer = q.own(s)[:length]
	default:
		if s.buffer = q.reactor.Buffers().Alloc(length); s.buffer == nil {
			if q.lent {
				return false
			}
			q.lent = true // the queue makes progress however much others hold
			s.buffer = q.memory[:length]
		}
	}
	s.request.Buf = s.buffer
	return true
}

func (q *queue) giveBuffer(s *slot) {
	switch {
	case s.buffer == nil || !q.userCopy:
	case &s.buffer[0] == &q.memory[0]:
		q.lent = false
		if len(q.waiting) > 0 {
			q.reactor.Defer(&q.retry)
		}
	default:
		q.reactor.FreeBuffer(s.buffer)
	}
	s.buffer, s.request.Buf = nil, nil
}

// beginWaiting goes on with requests that waited for buffers, in their order.
func (q *queue) beginWaiting() {
	n := 0
	for _, s := range q.waiting {
		if !q.takeBuffer(s) {
			break
		}
		n++
		q.begin(s)
	}
	q.waiting = append(q.waiting[:0], q.waiting[n:]...)
	if len(q.waiting) > 0 {
		q.reactor.WaitBuffers(&q.retry)
	}
}

// begin gives the request of s, with its buffer, to the device.
func (q *queue) begin(s *slot) {
	r := &s.request
	if r.Op == datapath.OpWrite && q.userCopy && r.Fixed == 0 {
		r.Mark(datapath.StageReceive, q.reactor)
		if !q.copy(s, reactor.OpRead) {
			q.giveBuffer(s)
			q.fail(s, unix.EIO)
			return
		}
	}
	r.Mark(datapath.StageQueue, q.reactor)
	q.atDevice++
	q.counters.inFlight.Store(int64(q.atDevice))
	q.below.Submit(r)
}

// copy moves the data of a request between its buffer and the kernel. It is a memory
// copy and does not wait. It fails when the request is gone: the device is removed.
func (q *queue) copy(s *slot, op reactor.IOOp) bool {
	q.copying.Op = op
	q.copying.Buf = s.buffer
	q.copying.Offset = ioOffset(q.index, s.tag)
	n := q.copying.Inline()
	q.copying.Buf = nil
	return n == len(s.buffer)
}

// completed is the device's answer.
func (q *queue) completed(s *slot) {
	q.atDevice--
	q.counters.inFlight.Store(int64(q.atDevice))
	r := &s.request
	result := int32(0)
	passed := r.Fixed != 0
	switch {
	case passed && r.Status == datapath.StatusNotSupported && !q.holding:
		r.Fixed = 0 // what it has moved is moved again
		if q.timed {
			s.timing.Begin(datapath.StageQueue, s.timing.Began())
		}
		q.beginCopied(s)
		q.settle()
		return
	case r.Status == datapath.StatusShutdown && !q.stopping:
		// The store goes, the device stays: whoever recovers it answers this.
		q.giveBuffer(s)
		q.hold(s)
		return
	case r.Status != datapath.StatusOK:
		result = -int32(r.Status.Errno())
		q.counters.errors.Add(1)
	case r.Op == datapath.OpRead && q.userCopy && !passed && !q.holding && !q.copy(s, reactor.OpWrite):
		result = -int32(unix.EIO)
		q.counters.errors.Add(1)
	case r.Op == datapath.OpRead:
		result = int32(r.Length)
		q.counters.read.Add(r.Length)
	case r.Op == datapath.OpWrite:
		result = int32(r.Length)
		q.counters.written.Add(r.Length)
	}
	if passed {
		q.counters.passed.Add(1)
	}
	q.counters.requests[r.Op].Add(1)
	q.giveBuffer(s)
	if q.holding {
		q.hold(s) // done, and will be done again: nobody was told
		return
	}
	q.give(s, q.commit, result)
	if q.timed {
		s.timing.End(q.reactor.Tick())
	}
	q.settle()
}

// fail ends a request that did not get to the device.
func (q *queue) fail(s *slot, errno unix.Errno) {
	q.counters.errors.Add(1)
	q.give(s, q.commit, -int32(errno))
}

// hold keeps a request from being answered.
func (q *queue) hold(s *slot) {
	if q.stopping {
		q.fail(s, unix.EIO)
		return
	}
	q.held = append(q.held, s)
	q.settle()
}

// settle tells whoever waits that the queue is at rest.
func (q *queue) settle() {
	if q.atDevice > 0 {
		return
	}
	if q.emptied != nil {
		close(q.emptied)
		q.emptied = nil
	}
	if q.retired == len(q.slots) && q.drained != nil {
		q.finish()
	}
}

// leave ends a queue that has been given up.
func (q *queue) leave() {
	switch {
	case q.drained == nil: // everything has come back
	case !q.fetched || q.retired+len(q.held) == len(q.slots):
		q.finish() // no command is in flight; held requests are the kernel's to issue again
	default:
		q.close(false)
	}
}

// finish gives back what prepare and connect took. Nothing of the queue is in flight.
func (q *queue) finish() {
	q.close(true)
	close(q.drained)
	q.drained = nil
}

// close closes the path into the device and, unless commands are still in flight,
// everything else.
func (q *queue) close(all bool) {
	if q.below != nil {
		if err := q.below.Close(); err != nil {
			q.target.log.Error("ublk: closing a device queue", "device", q.target.path, "queue", q.index, "error", err)
		}
		q.below = nil
	}
	q.reactor.CancelWait(&q.retry)
	if q.descriptors != nil {
		_ = unix.Munmap(q.descriptors) // a mapping of ours
		q.descriptors = nil
	}
	if !all {
		return // the kernel has addresses in memory, and the reactor slots of ours
	}
	_ = unix.Munmap(q.memory) // a mapping of ours
	q.memory = nil
	if q.buffers != buffersNone {
		// Held requests go to another server only when the ring has let go of their data.
		q.reactor.RemoveBuffers(q.buffers, len(q.slots))
		q.buffers = buffersNone
	}
	q.reactor.Release(len(q.slots))
}

// giveUp stops serving: what is at the device runs to its end, nothing more is
// begun. The channel is closed when that has happened.
func (q *queue) giveUp() <-chan struct{} {
	done := make(chan struct{})
	q.holding = true
	q.held = append(q.held, q.waiting...)
	q.waiting = q.waiting[:0]
	q.emptied = done
	q.settle()
	return done
}

// failHeld lets the kernel remove the device: it waits for every request.
func (q *queue) failHeld() {
	q.stopping = true
	held := q.held
	q.held = q.held[:0]
	for _, s := range held {
		q.fail(s, unix.EIO)
	}
}
