package reactor

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/buf"
	"github.com/ashlar-storage/ashlar/datapath/uring"
)

// User data of an entry: kind in the top byte, a generation in the middle, the
// slot's index below. A generation tells a late completion from one of the
// slot's next use.
const (
	kindIO uint64 = iota + 1
	kindWatch
	kindWrite
	kindIgnored
	kindNap
)

const (
	filesMax = 256 // places in the table of registered files
	// driverBuffersMax is how many buffers drivers may register in a ring, beside the
	// arena's own: 64 ublk queues of 64 requests. A place costs 8 bytes. The kernel's
	// limit for the table is 16384.
	driverBuffersMax = 4096
)

type ringEngine struct {
	r    *Reactor
	ring *uring.Ring

	ios     []*IO // slots of operations in flight
	freeIOs []uint32

	watches     []watchSlot
	freeWatches []uint32

	fixedFiles   []bool // places taken in the kernel's table; nil when it has none
	fixedBuffers []bool // chunks of the arena the kernel knows; nil when it has no table
	multiPoll    bool
	napEnds      bool // the entry that ends a nap is with the kernel

	driverBuffers     []bool // places taken for drivers; they follow those of the arena. Nil when there are none
	driverBuffersFrom int    // the first of these places
}

type watchSlot struct {
	watch      *Watch // nil: the watch has ended, completions are still owed
	generation uint32
	owed       int // entries in the kernel: poll for reading, poll for writing
	writing    bool
}

func newRingEngine(r *Reactor) (*ringEngine, error) {
	ring, err := uring.Open(uring.Config{Entries: uint32(r.config.Entries)})
	if err != nil {
		return nil, err
	}
	e := &ringEngine{r: r, ring: ring, multiPoll: true}
	for _, op := range []uint8{uring.OpRead, uring.OpWrite, uring.OpFsync, uring.OpPollAdd, uring.OpPollRemove, uring.OpFallocate, uring.OpTimeout} {
		if !ring.Supports(op) {
			_ = ring.Close() // nothing in flight
			return nil, fmt.Errorf("%w: the kernel lacks opcode %d", uring.ErrUnsupported, op)
		}
	}
	if ring.RegisterFiles(filesMax) == nil {
		e.fixedFiles = make([]bool, filesMax)
	}
	chunks := int(r.arena.Limit() / buf.ChunkSize)
	switch {
	case ring.RegisterBuffers(chunks+driverBuffersMax) == nil:
		e.fixedBuffers = make([]bool, chunks)
		e.driverBuffers, e.driverBuffersFrom = make([]bool, driverBuffersMax), chunks
	case ring.RegisterBuffers(chunks) == nil:
		e.fixedBuffers = make([]bool, chunks)
	}
	return e, nil
}

func (e *ringEngine) kind() EngineKind { return EngineRing }

func (e *ringEngine) describe() string {
	return fmt.Sprintf("io_uring (setup flags %#x, registered files %t, registered buffers %t)",
		e.ring.SetupFlags(), e.fixedFiles != nil, e.fixedBuffers != nil)
}

func (e *ringEngine) commands() bool { return e.ring.Supports(uring.OpURingCmd) }

func (e *ringEngine) close() { _ = e.ring.Close() } // everything has completed

func (e *ringEngine) growBuffers(index int, memory []byte) {
	if e.fixedBuffers != nil && e.ring.UpdateBuffer(index, memory) == nil {
		e.fixedBuffers[index] = true // else RLIMIT_MEMLOCK: the plain operations serve
		e.r.arena.Pin(index)
	}
}

func (e *ringEngine) reserve(total int) {
	for n := len(e.ios); n < total; n++ {
		e.ios = append(e.ios, nil)
		e.freeIOs = append(e.freeIOs, uint32(n))
	}
}

func (e *ringEngine) addFile(f *File) {
	for i, taken := range e.fixedFiles {
		if !taken && e.ring.UpdateFile(i, f.fd) == nil {
			e.fixedFiles[i] = true
			f.fixed = i
			return
		}
	}
}

func (e *ringEngine) removeFile(f *File) {
	if f.fixed >= 0 {
		_ = e.ring.UpdateFile(f.fixed, -1) // the place stays taken in the kernel until the ring closes
		e.fixedFiles[f.fixed] = false
		f.fixed = -1
	}
}

func (e *ringEngine) addBuffers(count int) (first int, ok bool) {
	run := 0
	for i, taken := range e.driverBuffers {
		if run++; taken {
			run = 0
		}
		if run == count {
			first = i + 1 - count
			for j := first; j <= i; j++ {
				e.driverBuffers[j] = true
			}
			return e.driverBuffersFrom + first, true
		}
	}
	return 0, false
}

func (e *ringEngine) removeBuffers(first, count int) {
	for place := first; place < first+count; place++ {
		_ = e.ring.UpdateBuffer(place, nil) // a place of the table: emptying it cannot fail
		e.driverBuffers[place-e.driverBuffersFrom] = false
	}
}

// entry is a free submission entry; when the ring is full, what is in it goes to
// the kernel first.
func (e *ringEngine) entry() *uring.SQE {
	for {
		if s := e.ring.SQE(); s != nil {
			return s
		}
		e.enter(0, 0)
	}
}

func (e *ringEngine) enter(wait uint32, timeout int64) {
	e.r.stats.enters.Add(1)
	if err := e.ring.Enter(wait, timeout); err != nil {
		// Only a bug of ours makes io_uring_enter fail (EBADF, EFAULT, EINVAL).
		panic(fmt.Sprintf("reactor %s: %v", e.r.config.Name, err))
	}
}

func (e *ringEngine) submit(io *IO) {
	n := len(e.freeIOs) - 1
	io.slot = e.freeIOs[n]
	e.freeIOs = e.freeIOs[:n]
	e.ios[io.slot] = io
	s := e.entry()
	s.UserData = kindIO<<56 | uint64(io.slot)
	s.FD = int32(io.FD)
	if io.File != nil {
		if io.File.fixed >= 0 {
			s.FD = int32(io.File.fixed)
			s.Flags = uring.SQEFixedFile
		} else {
			s.FD = int32(io.File.fd)
		}
	}
	switch io.Op {
	case OpRead, OpWrite:
		if io.Fixed != 0 {
			s.Opcode = uring.OpReadFixed + uint8(io.Op)
			s.BufIndex = io.Fixed - 1
			s.Addr, s.Length = io.Address, uint32(io.Length)
			s.Offset = uint64(io.Offset)
			s.OpFlags = uint32(io.RWFlags)
			break
		}
		s.Opcode = uring.OpRead + uint8(io.Op) // OpWrite follows OpRead in both
		if chunk := e.r.arena.Chunk(io.Buf); chunk >= 0 && e.fixedBuffers != nil && e.fixedBuffers[chunk] {
			s.Opcode = uring.OpReadFixed + uint8(io.Op)
			s.BufIndex = uint16(chunk)
		}
		s.Addr = uring.Address(io.Buf)
		s.Length = uint32(len(io.Buf))
		s.Offset = uint64(io.Offset)
		s.OpFlags = uint32(io.RWFlags)
	case OpFsync:
		s.Opcode = uring.OpFsync
		s.OpFlags = uring.FsyncDataSync
	case OpFallocate:
		s.Opcode = uring.OpFallocate
		s.Length = io.Mode
		s.Offset = uint64(io.Offset)
		s.Addr = uint64(io.Length)
	case OpCommand:
		s.Opcode = uring.OpURingCmd
		s.Offset = uint64(io.Mode)
		s.Addr = io.Address
		copy(e.ring.Command(s), io.Buf)
	}
}

func (e *ringEngine) watch(w *Watch) error {
	n := len(e.freeWatches) - 1
	if n < 0 {
		e.watches = append(e.watches, watchSlot{})
		e.freeWatches = append(e.freeWatches, uint32(len(e.watches)-1))
		n = 0
	}
	w.slot = e.freeWatches[n]
	e.freeWatches = e.freeWatches[:n]
	slot := &e.watches[w.slot]
	slot.watch, slot.writing = w, false
	slot.generation = (slot.generation + 1) & 0xffffff
	e.armRead(w.slot)
	return nil
}

func (e *ringEngine) userData(kind uint64, index uint32) uint64 {
	return kind<<56 | uint64(e.watches[index].generation)<<32 | uint64(index)
}

func (e *ringEngine) armRead(index uint32) {
	slot := &e.watches[index]
	s := e.entry()
	s.Opcode = uring.OpPollAdd
	s.FD = int32(slot.watch.FD)
	s.OpFlags = unix.POLLIN | unix.POLLRDHUP
	if e.multiPoll {
		s.Length = uring.PollAddMulti
	}
	s.UserData = e.userData(kindWatch, index)
	slot.owed++
}

func (e *ringEngine) wantWrite(w *Watch) {
	slot := &e.watches[w.slot]
	if slot.writing {
		return
	}
	slot.writing = true
	slot.owed++
	s := e.entry()
	s.Opcode = uring.OpPollAdd
	s.FD = int32(w.FD)
	s.OpFlags = unix.POLLOUT
	s.UserData = e.userData(kindWrite, w.slot)
}

func (e *ringEngine) unwatch(w *Watch) {
	slot := &e.watches[w.slot]
	if slot.watch != w {
		return
	}
	slot.watch = nil
	e.cancel(e.userData(kindWatch, w.slot))
	if slot.writing {
		e.cancel(e.userData(kindWrite, w.slot))
	}
	e.retire(w.slot)
	e.enter(0, 0) // the kernel has let go of the descriptor when we return
}

func (e *ringEngine) cancel(userData uint64) {
	s := e.entry()
	s.Opcode = uring.OpPollRemove
	s.Addr = userData
	s.UserData = kindIgnored << 56
}

func (e *ringEngine) retire(index uint32) {
	if slot := &e.watches[index]; slot.watch == nil && slot.owed == 0 {
		e.freeWatches = append(e.freeWatches, index)
	}
}

func (e *ringEngine) poll() int {
	if e.ring.Pending() > 0 || e.ring.NeedsEnter() {
		e.enter(0, 0)
	}
	return e.reap()
}

func (e *ringEngine) wait(timeout int64) int {
	e.enter(1, timeout)
	e.r.now = e.r.clock()
	return e.reap()
}

// nap keeps one entry with the kernel that ends it: it comes limit after it was made, which
// may have been before this nap.
func (e *ringEngine) nap(limit int64) int {
	if !e.napEnds {
		e.napEnds = true
		s := e.entry()
		e.ring.Timeout(s, limit)
		s.UserData = kindNap << 56
	}
	e.r.stats.enters.Add(1)
	if err := e.ring.Nap(); err != nil {
		panic(fmt.Sprintf("reactor %s: %v", e.r.config.Name, err)) // as in enter
	}
	e.r.now = e.r.clock()
	return e.reap()
}

func (e *ringEngine) reap() int {
	count := 0
	for {
		c := e.ring.Peek()
		if c == nil {
			return count
		}
		done := *c
		e.ring.Seen()
		index := uint32(done.UserData)
		switch done.UserData >> 56 {
		case kindIO:
			io := e.ios[index]
			e.ios[index] = nil
			e.freeIOs = append(e.freeIOs, index)
			io.Result = int(done.Result)
			e.r.finish(io)
		case kindWatch, kindWrite:
			e.reapWatch(index, &done)
		case kindNap:
			e.napEnds = false
			continue
		default:
			continue
		}
		count++
	}
}

func (e *ringEngine) reapWatch(index uint32, done *uring.CQE) {
	slot := &e.watches[index]
	if uint32(done.UserData>>32)&0xffffff != slot.generation {
		return // cannot be: a slot is reused only when nothing is owed
	}
	if done.UserData>>56 == kindWrite {
		slot.owed--
		slot.writing = false
		if slot.watch == nil {
			e.retire(index)
		} else {
			slot.watch.Ready(unix.EPOLLOUT)
		}
		return
	}
	armed := done.Flags&uring.CQEMore != 0
	if !armed {
		slot.owed--
	}
	w := slot.watch
	if w == nil {
		e.retire(index)
		return
	}
	if done.Result == -int32(unix.EINVAL) && e.multiPoll { // before Linux 5.13
		e.multiPoll = false
		e.armRead(index)
		return
	}
	if !armed && done.Result >= 0 {
		e.armRead(index)
	}
	events := uint32(unix.EPOLLIN | unix.EPOLLERR)
	if done.Result >= 0 {
		events = uint32(done.Result)
	}
	w.Ready(events)
}
