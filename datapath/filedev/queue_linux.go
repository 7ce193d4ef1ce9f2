package filedev

import (
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/buf"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// queue is one reactor's path to the file.
type queue struct {
	d        *Device          // immutable
	r        *reactor.Reactor // immutable
	file     *reactor.File    // immutable
	tail     *reactor.File    // immutable
	syncFile *reactor.File    // immutable; where fdatasync is called

	// Owned by the reactor.
	slots       []slot  // by Request.Tag
	finished    []*slot // to be completed after Submit has returned
	finishing   []*slot
	finishLater reactor.Deferred
	checked     int64   // the turn in which the file's size was looked at
	whole       bool    // it had not been cut short
	waitPlace   []*slot // wait for a place in the disk's queue, oldest first
	waitLock    []*slot // wait for a region
	retrying    []*slot
	retryLater  reactor.Deferred
	wakeLater   reactor.Deferred
	inFlight    int // of ours in the kernel

	bouncers   []bouncer
	bounceMem  []byte
	freeBounce []*bouncer
	waitBounce []*slot // unaligned requests that wait for a bouncer, oldest first

	waiting atomic.Bool // waitLock may not be empty; written by the reactor, read by others that release regions
	woken   atomic.Bool // a message to retry is on its way
}

// slot is the state of one request.
type slot struct {
	q      *queue
	r      *datapath.Request
	b      *bouncer // serves r; nil: the slot does
	io     reactor.IO
	status datapath.Status
	next   func(*slot) // what a parked slot tries again
	hold   hold
	moved  int    // bytes done
	end    int    // bytes to do by plain operations of this slot
	synced bool   // the fdatasync of a flush or FUA is wanted or under way
	syncs  uint64 // calls of fdatasync that had begun when this one was wanted
}

// OpenQueue implements datapath.Device.
func (d *Device) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	if depth < 1 {
		return nil, fmt.Errorf("%s: queue depth %d: must be at least 1", d.path, depth)
	}
	if err := r.Reserve(depth); err != nil {
		return nil, fmt.Errorf("%s: %w", d.path, err)
	}
	q := &queue{
		d: d, r: r,
		slots:      make([]slot, depth),
		finished:   make([]*slot, 0, depth),
		finishing:  make([]*slot, 0, depth),
		waitPlace:  make([]*slot, 0, depth),
		waitLock:   make([]*slot, 0, depth),
		retrying:   make([]*slot, 0, depth),
		waitBounce: make([]*slot, 0, depth),
	}
	q.finishLater.Func = q.finish
	q.retryLater.Func = q.retryLocks
	q.wakeLater.Func = q.wakeWaiters
	for i := range q.slots {
		s := &q.slots[i]
		s.q = q
		s.io.Done = func(*reactor.IO) { s.q.done(s) }
		s.io.Func = s.run
	}
	if err := d.addQueue(q); err != nil {
		r.Release(depth)
		return nil, err
	}
	q.file = r.AddFile(int(d.file.Fd()))
	q.syncFile = q.file
	if d.tail != nil {
		// A flush has a descriptor of its own, since the kernel reports a failed
		// write-back once per descriptor: a failed RWF_DSYNC must not take away
		// what fdatasync has to hear.
		q.tail = r.AddFile(int(d.tail.Fd()))
		q.syncFile = q.tail
	}
	if d.access == AccessDirect {
		if err := q.openBouncers(); err != nil {
			q.release()
			return nil, fmt.Errorf("%s: %w", d.path, err)
		}
	}
	return q, nil
}

// addQueue makes q known to the other queues.
func (d *Device) addQueue(q *queue) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.depth+len(q.slots) > holdersMax {
		return fmt.Errorf("%s: queues of depth %d are open, %d more exceed the bound of %d", d.path, d.depth, len(q.slots), holdersMax)
	}
	d.depth += len(q.slots)
	queues := append(slices.Clone(*d.queues.Load()), q)
	d.queues.Store(&queues)
	return nil
}

func (d *Device) removeQueue(q *queue) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.depth -= len(q.slots)
	queues := slices.DeleteFunc(slices.Clone(*d.queues.Load()), func(p *queue) bool { return p == q })
	d.queues.Store(&queues)
}

// Close implements datapath.Queue.
func (q *queue) Close() error {
	err := q.closeBouncers()
	q.release()
	return err
}

func (q *queue) release() {
	q.d.removeQueue(q)
	q.r.RemoveFile(q.file)
	if q.tail != nil {
		q.r.RemoveFile(q.tail)
	}
	q.r.Release(len(q.slots))
}

// Submit implements datapath.Queue.
func (q *queue) Submit(r *datapath.Request) {
	s := &q.slots[r.Tag]
	s.r, s.status, s.moved, s.end, s.synced = r, datapath.StatusOK, 0, int(r.Length), false
	s.io.Fixed = 0
	r.Zero = false
	r.MarkRecent(datapath.StageDevice, q.r)
	modifies := r.Modifies()
	fua := r.Flags&datapath.FlagFUA != 0 && modifies
	if failed := q.d.failed.Load(); failed != 0 && (fua || r.Op == datapath.OpFlush || modifies && failed&failedShrunk != 0) {
		q.later(s, datapath.StatusIO)
		return
	}
	if r.Length == 0 && (r.Op == datapath.OpRead || modifies) {
		q.later(s, datapath.StatusOK)
		return
	}
	switch r.Op {
	case datapath.OpRead, datapath.OpWrite:
		if r.Fixed != 0 && !q.suitsFixed(r) {
			q.later(s, datapath.StatusNotSupported)
			return
		}
		switch q.d.access {
		case AccessInline:
			q.inline(s)
		case AccessBuffered:
			q.buffered(s)
		default:
			q.direct(s)
		}
	case datapath.OpFlush:
		q.sync(s)
	case datapath.OpDiscard, datapath.OpWriteZeroes:
		if r.Op == datapath.OpDiscard && !q.d.discards {
			q.later(s, datapath.StatusNotSupported)
			return
		}
		q.zero(s)
	case datapath.OpCache, datapath.OpExtents:
		feature := datapath.FeatureCache
		if r.Op == datapath.OpExtents {
			feature = datapath.FeatureExtents
		}
		if !q.d.info.Has(feature) {
			q.later(s, datapath.StatusNotSupported)
			return
		}
		s.io.Op = reactor.OpFunc
		q.submitNow(s)
	default:
		q.later(s, datapath.StatusNotSupported)
	}
}

// later completes s once the caller of Submit has its turn back.
func (q *queue) later(s *slot, status datapath.Status) {
	s.status = status
	q.finished = append(q.finished, s)
	q.r.Defer(&q.finishLater)
}

func (q *queue) finish() {
	q.finished, q.finishing = q.finishing[:0], q.finished
	for i, s := range q.finishing {
		q.finishing[i] = nil
		s.r.Complete(s.status)
	}
}

// inline serves files in memory on the spot.
func (q *queue) inline(s *slot) {
	if s.r.Op == datapath.OpWrite {
		q.inlineWrite(s)
		return
	}
	if s.r.Flags&datapath.FlagLend != 0 {
		if now := q.r.Now(); now != q.checked { // once a turn
			q.checked = now
			q.whole = q.d.lender.whole()
		}
		if q.whole && q.d.lender.lend(s.r) {
			q.later(s, datapath.StatusOK)
			return
		}
	}
	s.startInlineRead()
}

// startInlineRead reads, or parks when writes on other queues are in the way.
func (s *slot) startInlineRead() {
	q := s.q
	for range inlineReadTries {
		version, still := q.d.locks.version(s.r.Offset, s.r.Length)
		if !still {
			continue
		}
		s.moved = 0
		if status := q.inlineAll(s); status != datapath.StatusOK {
			q.later(s, status)
			return
		}
		if now, still := q.d.locks.version(s.r.Offset, s.r.Length); still && now == version {
			q.later(s, datapath.StatusOK)
			return
		}
	}
	q.parkForLock(s, (*slot).startInlineRead)
	q.r.Defer(&q.retryLater) // nobody wakes those who wait for no ticket
}

// inlineReadTries is how often a read is tried at once. A write in its way takes
// as long as the read itself.
const inlineReadTries = 4

// inlineWrite writes at once, without waiting for anyone: the caller may use the
// buffer again when Submit returns.
func (q *queue) inlineWrite(s *slot) {
	q.d.locks.beginWrite(s.r.Offset, s.r.Length)
	status := q.inlineAll(s)
	q.d.locks.endWrite(s.r.Offset, s.r.Length)
	if status != datapath.StatusOK {
		q.later(s, status)
		return
	}
	q.d.lender.written(s.r.Offset, s.r.Length)
	q.written(s)
}

func (q *queue) inlineAll(s *slot) datapath.Status {
	s.io.FD, s.io.File = int(q.d.file.Fd()), nil
	s.io.RWFlags = 0
	s.io.Op = ioOp(s.r)
	for s.moved < s.end {
		s.io.Buf, s.io.Offset = s.r.Buf[s.moved:], int64(s.r.Offset)+int64(s.moved)
		n := s.io.Inline()
		if n <= 0 {
			return q.d.failure(s.io.Op, n)
		}
		s.moved += n
	}
	return datapath.StatusOK
}

// written ends a write that is in the file, after an fdatasync if it asked for
// one. It may be called inside Submit.
func (q *queue) written(s *slot) {
	q.unlock(&s.hold)
	if s.r.Flags&datapath.FlagFUA != 0 {
		q.sync(s)
		return
	}
	q.later(s, datapath.StatusOK)
}

// buffered serves what the page cache can take or give at once inline, and
// gives the rest to the engine.
func (q *queue) buffered(s *slot) {
	kind := lockRead
	if s.r.Op == datapath.OpWrite {
		kind = lockWrite
	}
	s.hold.want(s.r.Offset, s.r.Length, kind)
	s.startBuffered()
}

func (s *slot) startBuffered() {
	q := s.q
	if !q.lock(s, &s.hold, (*slot).startBuffered) {
		return
	}
	s.io.FD, s.io.File = int(q.d.file.Fd()), nil
	s.io.Op = ioOp(s.r)
	no := &q.d.noNowaitRead
	if s.r.Op == datapath.OpWrite {
		no = &q.d.noNowaitWrite
	}
	for s.moved < s.end && !no.Load() {
		s.io.Buf, s.io.Offset = s.r.Buf[s.moved:], int64(s.r.Offset)+int64(s.moved)
		s.io.RWFlags = unix.RWF_NOWAIT
		n := s.io.Inline()
		if n == -int(unix.EAGAIN) {
			break
		}
		if unsupported(n) {
			no.Store(true)
			break
		}
		if n <= 0 {
			q.unlock(&s.hold)
			q.later(s, q.d.failure(s.io.Op, n))
			return
		}
		s.moved += n
	}
	switch {
	case s.moved < s.end:
		q.transfer(s)
	case s.r.Op == datapath.OpWrite:
		q.written(s)
	default:
		q.unlock(&s.hold)
		q.later(s, datapath.StatusOK)
	}
}

// direct serves O_DIRECT files: whole blocks as they are, the rest by bouncing.
func (q *queue) direct(s *slot) {
	if !q.suits(s.r) {
		q.bounce(s)
		return
	}
	switch {
	case s.r.Op == datapath.OpWrite:
		s.hold.want(s.r.Offset, s.r.Length, lockWrite)
	case q.d.tears:
		s.hold.want(s.r.Offset, s.r.Length, lockRead)
	}
	s.startTransfer()
}

// suits reports whether the kernel takes the request as it is.
func (q *queue) suits(r *datapath.Request) bool {
	mask := uint64(q.d.align - 1)
	return (r.Offset|r.Length)&mask == 0 && (r.Fixed != 0 || buf.Aligned(r.Buf, q.d.memoryAlign))
}

// suitsFixed reports whether a request with a registered buffer can be served.
func (q *queue) suitsFixed(r *datapath.Request) bool {
	_, err := q.d.FixedBuffers()
	return err == nil && q.suits(r) && r.Offset+r.Length <= q.d.aligned.Load()
}

// startTransfer begins a transfer under its lock, or parks.
func (s *slot) startTransfer() {
	if s.q.lock(s, &s.hold, (*slot).startTransfer) {
		s.q.transfer(s)
	}
}

// transfer moves what is left of s by the engine.
func (q *queue) transfer(s *slot) {
	s.io.Op = ioOp(s.r)
	s.io.File = q.file
	s.io.RWFlags = q.d.writeFlags(s.r)
	s.io.Offset = int64(s.r.Offset) + int64(s.moved)
	if s.io.Fixed = s.r.Fixed; s.io.Fixed != 0 {
		s.io.Buf, s.io.Address, s.io.Length = nil, uint64(s.moved), int64(s.end-s.moved)
	} else {
		s.io.Buf = s.r.Buf[s.moved:s.end]
	}
	q.submit(s)
}

// writeFlags are those of a write of whole blocks for r: direct I/O makes a FUA
// durable by itself. Through the page cache it takes an fdatasync afterwards, so
// that an error of the write can be told from one of earlier data.
func (d *Device) writeFlags(r *datapath.Request) uint8 {
	if r.Op == datapath.OpWrite && r.Flags&datapath.FlagFUA != 0 && d.access == AccessDirect && !d.noDsync.Load() {
		return unix.RWF_DSYNC
	}
	return 0
}

func ioOp(r *datapath.Request) reactor.IOOp {
	if r.Op == datapath.OpRead {
		return reactor.OpRead
	}
	return reactor.OpWrite
}

// again reports whether the result n says to do the same once more.
func again(n int) bool { return n == -int(unix.EAGAIN) || n == -int(unix.EINTR) }

// unsupported reports whether the result n says that the kernel or the
// filesystem does not know the operation or a flag of it.
func unsupported(n int) bool { return n == -int(unix.EOPNOTSUPP) || n == -int(unix.ENOSYS) }

// failure maps the result of a transfer that moved nothing. 0 is the end of the
// file: it shrank under us, and what was there is gone.
func (d *Device) failure(op reactor.IOOp, n int) datapath.Status {
	if n == 0 {
		if op == reactor.OpRead {
			d.failed.Or(failedShrunk)
		}
		return datapath.StatusIO
	}
	return datapath.StatusOfErrno(unix.Errno(-n))
}

// syncFailure is failure for a write with RWF_DSYNC: that is a flush, too.
func (d *Device) syncFailure(n int) datapath.Status {
	status := d.failure(reactor.OpWrite, n)
	if status == datapath.StatusIO {
		d.failed.Or(failedFlush)
	}
	return status
}

// submit gives s.io to the engine, or parks it while the disk's queue is full.
func (q *queue) submit(s *slot) {
	if len(q.waitPlace) > 0 || !q.takePlace() {
		q.parkForPlace(s, (*slot).placed)
		return
	}
	s.placed()
}

// takePlace takes a place in the disk's queue. A queue that has none can always
// have one, so that it never depends on the others.
func (q *queue) takePlace() bool {
	if q.d.inFlight.Add(1) <= q.d.inFlightMax || q.inFlight == 0 {
		q.inFlight++
		return true
	}
	q.d.inFlight.Add(-1)
	return false
}

// placed gives s.io to the engine; its place is taken.
func (s *slot) placed() { s.q.r.SubmitIO(&s.io) }

// submitNow gives s.io to the engine, whether or not there is a place.
func (q *queue) submitNow(s *slot) {
	q.inFlight++
	q.d.inFlight.Add(1)
	s.placed()
}

// leavePlace gives a place back.
func (q *queue) leavePlace() {
	q.inFlight--
	q.d.inFlight.Add(-1)
}

// parkForPlace keeps s until the disk's queue has a place for it, and then calls
// next. Something of this queue is in the kernel, whose completion retries.
func (q *queue) parkForPlace(s *slot, next func(*slot)) {
	s.next = next
	q.waitPlace = append(q.waitPlace, s)
}

// retryPlaces lets those who wait for a place have what is free, in order.
func (q *queue) retryPlaces() {
	for len(q.waitPlace) > 0 && q.takePlace() {
		s := takeFirst(&q.waitPlace)
		s.next(s)
	}
}

// lock takes the regions of h, which is s's or its bouncer's, or parks s to call
// next when they may be free.
func (q *queue) lock(s *slot, h *hold, next func(*slot)) bool {
	held, wake := q.d.locks.take(h)
	if !held {
		// Whoever releases looks at waiting. What was released before we set it, we
		// see ourselves.
		q.waiting.Store(true)
		var more bool
		held, more = q.d.locks.take(h)
		wake = wake || more
	}
	if !held {
		q.parkForLock(s, next)
	}
	if wake {
		q.wakeWaiters()
	}
	return held
}

func (q *queue) unlock(h *hold) {
	if h.taken > 0 && q.d.locks.release(h) {
		q.wakeWaiters()
	}
}

// parkForLock keeps s until its regions may be free.
func (q *queue) parkForLock(s *slot, next func(*slot)) {
	s.next = next
	q.waitLock = append(q.waitLock, s)
}

// wakeWaiters has every queue with parked requests try them again.
func (q *queue) wakeWaiters() {
	for _, p := range *q.d.queues.Load() {
		switch {
		case !p.waiting.Load():
		case p == q:
			q.r.Defer(&q.retryLater)
		case p.woken.CompareAndSwap(false, true) && !p.r.TryPost(p):
			p.woken.Store(false)
			q.r.Defer(&q.wakeLater) // its mailbox is full
		}
	}
}

// RunTask implements reactor.Task: another queue has released regions. The queue
// may have been closed since; nothing is parked then.
func (q *queue) RunTask(*reactor.Reactor) {
	q.woken.Store(false)
	q.retryLocks()
}

// retryLocks tries all requests that wait for regions.
func (q *queue) retryLocks() {
	batch := q.waitLock
	q.waitLock = q.retrying[:0]
	for i, s := range batch {
		batch[i] = nil
		s.next(s)
	}
	q.retrying = batch[:0]
	if len(q.waitLock) == 0 {
		q.waiting.Store(false)
	}
}

func takeFirst(list *[]*slot) *slot {
	l := *list
	s := l[0]
	copy(l, l[1:])
	l[len(l)-1] = nil
	*list = l[:len(l)-1]
	return s
}

// done continues s after its operation of the kernel.
func (q *queue) done(s *slot) {
	q.leavePlace()
	q.step(s)
	q.retryPlaces()
}

func (q *queue) step(s *slot) {
	n := s.io.Result
	if s.synced {
		q.syncDone(s)
		return
	}
	switch s.r.Op {
	case datapath.OpRead, datapath.OpWrite:
		q.moved(s, n)
	case datapath.OpDiscard, datapath.OpWriteZeroes:
		q.zeroDone(s)
	default:
		q.end(s, datapath.Status(n))
	}
}

// moved continues a read or write after a transfer with result n.
func (q *queue) moved(s *slot, n int) {
	durable := s.io.RWFlags&unix.RWF_DSYNC != 0
	switch {
	case again(n):
		q.transfer(s)
		return
	case s.r.Fixed != 0 && (n == -int(unix.EINVAL) || n == -int(unix.EFAULT)):
		q.end(s, datapath.StatusNotSupported) // the shape of the memory, maybe: a copy has another
		return
	case durable && unsupported(n):
		q.d.noDsync.Store(true) // before Linux 4.7, or an odd filesystem: fdatasync instead
		q.transfer(s)
		return
	case durable && n <= 0:
		q.end(s, q.d.syncFailure(n))
		return
	case n > 0 && s.moved+n < s.end:
		// In direct mode the rest must begin at a whole block. Where less than one
		// was moved the file ends.
		if n &^= q.d.align - 1; n > 0 {
			s.moved += n
			q.transfer(s)
			return
		}
	}
	if n <= 0 {
		q.end(s, q.d.failure(s.io.Op, n))
		return
	}
	if s.moved += n; s.r.Op == datapath.OpWrite && s.r.Flags&datapath.FlagFUA != 0 && !durable {
		q.unlock(&s.hold)
		q.sync(s)
		return
	}
	q.end(s, datapath.StatusOK)
}

// end completes s after an operation of the kernel: Submit has returned long ago.
func (q *queue) end(s *slot, status datapath.Status) {
	q.unlock(&s.hold)
	s.r.Complete(status)
}

// sync makes everything durable, for a flush or at the end of a FUA. It may be
// called inside Submit.
//
// One fdatasync runs at a time, over all queues: the kernel tells of a failed
// write-back once, so of two that overlap, one could succeed without the data. A
// flush that waited while another ran from its beginning to its end has been done
// by that one.
func (q *queue) sync(s *slot) {
	s.r.Mark(datapath.StageCommit, q.r)
	s.synced = true
	s.syncs = q.d.syncs.Load()
	s.hold.wantSync()
	s.startSync()
}

func (s *slot) startSync() {
	q := s.q
	if !q.lock(s, &s.hold, (*slot).startSync) {
		return
	}
	switch begun := q.d.syncs.Load(); {
	case q.d.failed.Load() != 0:
		q.unlock(&s.hold)
		q.later(s, datapath.StatusIO)
		return
	case begun > s.syncs: // and ended well, since we have the lock
		q.unlock(&s.hold)
		q.later(s, datapath.StatusOK)
		return
	}
	q.d.syncs.Add(1)
	s.io.Op, s.io.File = reactor.OpFsync, q.syncFile
	if q.d.access != AccessInline {
		q.submitNow(s)
		return
	}
	s.io.FD = q.syncFile.FD()
	q.later(s, q.syncEnd(s, s.io.Inline()))
}

func (q *queue) syncDone(s *slot) {
	if again(s.io.Result) {
		q.submitNow(s)
		return
	}
	q.end(s, q.syncEnd(s, s.io.Result))
}

// syncEnd notes the result of an fdatasync before the next one can begin.
func (q *queue) syncEnd(s *slot, n int) datapath.Status {
	status := datapath.StatusOK
	if n < 0 {
		q.d.failed.Or(failedFlush)
		status = datapath.StatusIO
	}
	q.unlock(&s.hold)
	return status
}
