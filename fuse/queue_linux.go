package fuse

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// queue is one reactor that serves a connection. All queues of a target read the same
// descriptor; whoever is first has the request.
type queue struct {
	target  *Target          // immutable
	reactor *reactor.Reactor // immutable
	ioMax   int              // bytes; immutable
	timed   bool             // the device records the stages of requests; immutable after prepare

	// Owned by the reactor.
	fd      int            // /dev/fuse; -1 before connect and after close
	below   datapath.Queue // nil when closed
	info    datapath.Info
	inbox   *inbox // nil when closed
	page    []byte // head and out are in it
	head    []byte // of the request that is being read
	out     []byte // of the answer that is being written
	vector  vector
	watch   reactor.Watch
	watched bool
	pull    reactor.Deferred // reads requests
	slots   []slot
	free    []*slot
	waiting []*slot // reads that wait for memory
	held    []*slot // requests of a store that shut down: for whoever recovers
	retry   reactor.Deferred

	readFrom int64 // where timed: when the last read of a request began
	readTo   int64 // and when it ended, the data of a write among it

	atDevice int  // requests given to below and not completed
	holding  bool // nothing is read or begun any more: the process gives the device up
	stopping bool // what could be left to another process is answered instead
	gone     bool // the connection is broken

	emptied  chan struct{} // made by giveUp, closed when no request is at the device
	counters queueCounters
}

// slot is a request of the kernel's and what serves it.
type slot struct {
	queue   *queue
	unique  uint64
	request datapath.Request
	timing  datapath.Timing // of it, where the device records them
	segment *segment        // of a write's data
	buffer  []byte          // of a read's data
}

// queueCounters are written by the reactor and read by anyone.
type queueCounters struct {
	requests [datapath.OpCount]atomic.Uint64
	read     atomic.Uint64 // bytes
	written  atomic.Uint64 // bytes
	errors   atomic.Uint64
	control  atomic.Uint64
	inFlight atomic.Int64
	gone     atomic.Bool
}

// prepare makes everything the queue needs but the connection. It runs on the reactor.
func (q *queue) prepare(depth int, device datapath.Device) (err error) {
	q.fd = -1
	if q.page, err = newPage(); err != nil {
		return err
	}
	q.head, q.out = q.page[:headSize], q.page[pageSize/2:pageSize/2+outSizeMax]
	if q.inbox, err = useInbox(q.reactor); err != nil {
		q.close()
		return err
	}
	if q.below, err = device.OpenQueue(q.reactor, depth); err != nil {
		q.close()
		return err
	}
	info := device.Info()
	q.timed = info.Has(datapath.FeatureTimed)
	q.slots = make([]slot, depth)
	q.free = make([]*slot, 0, depth)
	q.waiting = make([]*slot, 0, depth)
	q.held = make([]*slot, 0, depth)
	q.pull.Func = q.receive
	q.retry.Func = q.beginWaiting
	q.watch.Ready = func(uint32) { q.reactor.Defer(&q.pull) }
	for i := range q.slots {
		s := &q.slots[i]
		s.queue = q
		s.request = datapath.Request{Tag: uint32(i), Done: func(*datapath.Request) { q.completed(s) }}
		if q.timed {
			s.request.Timing = &s.timing
		}
		q.free = append(q.free, s)
	}
	return nil
}

// connect begins to serve. It runs on the reactor.
func (q *queue) connect(fd int) error {
	q.fd, q.watch.FD = fd, fd
	if err := q.reactor.AddWatch(&q.watch); err != nil {
		return err
	}
	q.watched = true
	q.reactor.Defer(&q.pull) // what is there already
	return nil
}

// receive reads requests until there are none, or nothing to serve them with.
func (q *queue) receive() {
	for !q.holding && !q.gone && q.fd >= 0 && len(q.free) > 0 {
		room := q.inbox.room(max(q.ioMax, readLeast))
		if room == nil {
			q.inbox.wait(q)
			return
		}
		if q.timed {
			q.readFrom = q.reactor.Tick()
		}
		n, errno := q.vector.read(q.fd, q.head, room)
		switch errno {
		case 0:
			if q.timed {
				q.readTo = q.reactor.Tick()
			}
			q.handle(n, room)
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ENOENT: // ENOENT: its client did not wait for it
		case unix.ENODEV, unix.ECONNABORTED:
			q.lose()
		default:
			q.target.log.Error("fuse: reading a request", "device", q.target.config.Name, "error", errno)
			q.lose()
		}
	}
}

// lose is the end of the connection, which only the kernel brings about.
func (q *queue) lose() {
	q.gone = true
	q.counters.gone.Store(true)
	q.unwatch()
}

func (q *queue) unwatch() {
	if q.watched {
		q.watched = false
		q.reactor.RemoveWatch(&q.watch)
	}
}

// handle answers a request that was read, or gives it to the device.
func (q *queue) handle(n int, room []byte) {
	var c call
	if err := c.decode(q.head[:min(n, headSize)], n); err != nil {
		if n >= headerInSize {
			q.fail(c.unique, unix.EIO)
		}
		q.target.log.Error("fuse: bytes that are no request", "device", q.target.config.Name, "length", n)
		return
	}
	switch c.op {
	case opRead, opWrite, opFsync, opFallocate:
		q.begin(&c, room)
		return
	}
	q.counters.control.Add(1)
	body := q.out[headerOutSize:]
	switch c.op {
	case opForget, opBatchForget: // have no answer; the root is not forgotten
	case opInterrupt:
		q.fail(c.unique, unix.ENOSYS) // do not ask again: a request ends soon, or its store is away
	case opGetattr:
		putAttr(body, q.info.Size)
		q.answer(c.unique, attrOutSize)
	case opStatfs:
		putStatfs(body, q.info.Size)
		q.answer(c.unique, statfsSize)
	case opOpen:
		putOpen(body)
		q.answer(c.unique, openOutSize)
	case opRelease, opFlush, opAccess, opDestroy:
		q.answer(c.unique, 0)
	case opSetattr:
		q.fail(c.unique, unix.EPERM) // its size is the device's
	case opLookup:
		q.fail(c.unique, unix.ENOTDIR)
	default:
		q.fail(c.unique, unix.ENOSYS)
	}
}

// begin gives a request to the device. There is a free slot.
func (q *queue) begin(c *call, room []byte) {
	s := q.free[len(q.free)-1]
	s.unique = c.unique
	r := &s.request
	r.Flags, r.Buf, r.Offset, r.Length = 0, nil, c.offset, c.length
	switch c.op {
	case opRead:
		r.Op = datapath.OpRead
		// The file may be read to beyond its end; the loop device is not.
		r.Length = min(r.Length, q.info.Size-min(q.info.Size, r.Offset))
		if r.Length == 0 {
			q.answer(c.unique, 0)
			return
		}
		if r.Length > uint64(q.ioMax) {
			q.fail(c.unique, unix.EINVAL)
			return
		}
	case opWrite:
		r.Op = datapath.OpWrite
		if r.Length == 0 || r.Length > uint64(q.ioMax) {
			q.fail(c.unique, unix.EINVAL)
			return
		}
	case opFsync:
		r.Op, r.Offset, r.Length = datapath.OpFlush, 0, 0
		if !q.info.Has(datapath.FeatureFlush) {
			q.answer(c.unique, 0) // nothing is volatile
			return
		}
	case opFallocate:
		// The loop driver's discards look like its write-zeroes, so they have to read
		// as zeros too.
		r.Op = datapath.OpWriteZeroes
		if c.mode == fallocZero|fallocKeep {
			r.Flags = datapath.FlagNoUnmap
		} else if c.mode != fallocPunch|fallocKeep {
			q.fail(c.unique, unix.EOPNOTSUPP)
			return
		}
		if !q.info.Has(datapath.FeatureWriteZeroes) {
			q.fail(c.unique, unix.EOPNOTSUPP) // the kernel writes zeros then
			return
		}
	}
	if status := datapath.Validate(&q.info, r); status != datapath.StatusOK {
		q.fail(c.unique, status.Errno())
		return
	}
	q.free = q.free[:len(q.free)-1]
	if q.timed {
		s.timing.Begin(datapath.StageReceive, q.readFrom)
		s.timing.Enter(datapath.StageQueue, q.readTo)
	}
	switch {
	case c.op == opWrite:
		r.Buf = room[:r.Length]
		s.segment = q.inbox.keep(len(r.Buf))
	case c.op == opRead && (len(q.waiting) > 0 || !q.takeBuffer(s)):
		q.waiting = append(q.waiting, s)
		return
	}
	q.submit(s)
}

// takeBuffer gives a read memory, or reports false when there is none now.
func (q *queue) takeBuffer(s *slot) bool {
	s.buffer = q.inbox.takeBuffer(q, int(s.request.Length))
	s.request.Buf = s.buffer
	return s.buffer != nil
}

// giveBuffers gives back the memory of a request.
func (q *queue) giveBuffers(s *slot) {
	if s.segment != nil {
		q.inbox.give(s.segment)
		s.segment = nil
	}
	if s.buffer != nil {
		q.inbox.giveBuffer(s.buffer)
		s.buffer = nil
	}
	s.request.Buf = nil
}

// beginWaiting goes on with reads that waited for memory, in their order.
func (q *queue) beginWaiting() {
	n := 0
	for _, s := range q.waiting {
		if q.holding || !q.takeBuffer(s) {
			break
		}
		n++
		q.submit(s)
	}
	q.waiting = append(q.waiting[:0], q.waiting[n:]...)
}

func (q *queue) submit(s *slot) {
	q.atDevice++
	q.counters.inFlight.Store(int64(q.atDevice))
	q.below.Submit(&s.request)
}

// completed is the device's answer.
func (q *queue) completed(s *slot) {
	q.atDevice--
	q.counters.inFlight.Store(int64(q.atDevice))
	r := &s.request
	if r.Status == datapath.StatusShutdown && !q.stopping && q.target.recoverable() {
		// The store goes, the device stays: whoever recovers it has this sent again.
		q.giveBuffers(s)
		q.held = append(q.held, s)
		q.settle()
		return
	}
	q.counters.requests[r.Op].Add(1) // before its client can know
	switch {
	case r.Status != datapath.StatusOK:
		q.fail(s.unique, r.Status.Errno())
	case r.Op == datapath.OpRead:
		q.counters.read.Add(r.Length)
		putHeader(q.out, len(r.Buf), 0, s.unique)
		q.write(q.out[:headerOutSize], r.Buf)
	case r.Op == datapath.OpWrite:
		clear(q.out[headerOutSize : headerOutSize+8])
		binary.NativeEndian.PutUint32(q.out[headerOutSize:], uint32(r.Length))
		q.counters.written.Add(r.Length)
		q.answer(s.unique, 8)
	default:
		q.answer(s.unique, 0)
	}
	if q.timed { // the kernel has taken the answer
		s.timing.End(q.reactor.Tick())
	}
	q.giveBuffers(s)
	if len(q.free) == 0 {
		q.reactor.Defer(&q.pull) // which ended for want of a slot
	}
	q.free = append(q.free, s)
	q.settle()
}

// answer ends a request with what is in q.out: size bytes after the header.
func (q *queue) answer(unique uint64, size int) {
	putHeader(q.out, size, 0, unique)
	q.write(q.out[:headerOutSize+size], nil)
}

// fail ends a request with an error.
func (q *queue) fail(unique uint64, errno unix.Errno) {
	if errno != unix.ENOSYS && errno != unix.EOPNOTSUPP {
		q.counters.errors.Add(1)
	}
	putHeader(q.out, 0, int32(errno), unique)
	q.write(q.out[:headerOutSize], nil)
}

// write sends an answer.
func (q *queue) write(a, b []byte) {
	for {
		switch errno := q.vector.write(q.fd, a, b); errno {
		case 0, unix.ENOENT: // ENOENT: its client does not wait any more, or the connection is gone
		case unix.EINTR:
			continue
		case unix.ENODEV, unix.EPERM, unix.ECONNABORTED:
			if !q.gone {
				q.lose()
			}
		default:
			q.target.log.Error("fuse: the kernel does not take an answer", "device", q.target.config.Name, "error", errno)
		}
		return
	}
}

// settle tells whoever waits that nothing is at the device.
func (q *queue) settle() {
	if q.atDevice == 0 && q.emptied != nil {
		close(q.emptied)
		q.emptied = nil
	}
}

// giveUp stops serving: what is at the device runs to its end and is answered, nothing
// more is read. The channel is closed when that has happened.
func (q *queue) giveUp(stopping bool) <-chan struct{} {
	done := make(chan struct{})
	q.holding, q.stopping = true, stopping
	q.unwatch()
	q.emptied = done
	q.settle()
	return done
}

// failHeld ends what would be another process's to answer: there will be none, and the
// loop driver waits for it.
func (q *queue) failHeld() {
	q.stopping = true
	if q.fd < 0 {
		return
	}
	for _, s := range q.held {
		q.fail(s.unique, unix.EIO)
		q.free = append(q.free, s)
	}
	q.held = q.held[:0]
	q.reactor.Defer(&q.pull)
}

// close gives back what prepare took. Nothing is at the device.
func (q *queue) close() {
	q.holding = true
	q.unwatch()
	q.fd = -1
	if q.below != nil {
		if err := q.below.Close(); err != nil {
			q.target.log.Error("fuse: closing a device queue", "device", q.target.config.Name, "error", err)
		}
		q.below = nil
	}
	q.reactor.CancelWait(&q.retry)
	for _, s := range q.waiting { // reads that have no memory
		s.request.Buf = nil
	}
	q.waiting = q.waiting[:0]
	if q.inbox != nil {
		q.inbox.leave(q)
		q.inbox = nil
	}
	if q.page != nil {
		_ = unix.Munmap(q.page) // a mapping of ours
		q.page, q.head, q.out = nil, nil, nil
	}
}
