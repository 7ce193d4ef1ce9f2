//go:build linux

package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Config says what ring to make.
type Config struct {
	Entries   uint32 // submission entries; rounded up to a power of two by the kernel
	CQEntries uint32 // completion entries; 0: four times Entries
	SQE128    bool   // 128-byte submission entries, for OpURingCmd with a large command (ublk)
}

// Ring is one io_uring. Every method runs on the thread that called [Open].
type Ring struct {
	fd       int
	flags    uint32 // setup flags in force; immutable
	features uint32 // immutable
	ops      [probeOpsMax]bool

	ringMemory, sqeMemory []byte

	// Submission side. The kernel moves the head, we move the tail.
	sqHead, sqTail, sqFlags *uint32
	sqMask, sqEntries       uint32
	sqeShift                uint // log2 of an SQE's size
	sqes                    unsafe.Pointer
	pending                 uint32 // our tail, ahead of *sqTail until the next Enter

	// Completion side. The kernel moves the tail, we move the head.
	cqHead, cqTail    *uint32
	cqMask, cqEntries uint32
	cqes              unsafe.Pointer

	// Memory the kernel reads by address during a call; here because a Ring lies
	// on the heap and does not move, as a goroutine's stack may.
	arg     getEventsArg
	timeout timespec
	span    timespec // of Timeout
	vector  iovec
	file    int32
}

// ErrUnsupported marks a kernel, or a sandbox, in which io_uring cannot be used.
var ErrUnsupported = errors.New("uring: not supported")

// setupLadder lists setup flags, best first. Each rung works on older kernels
// than the one above: SINGLE_ISSUER and DEFER_TASKRUN are of Linux 6.1,
// COOP_TASKRUN and SUBMIT_ALL of 5.18/5.19.
var setupLadder = []uint32{
	SetupSubmitAll | SetupCoopTaskrun | SetupTaskrunFlag | SetupSingleIssuer | SetupDeferTaskrun,
	SetupSubmitAll | SetupCoopTaskrun | SetupTaskrunFlag,
	SetupSubmitAll,
	0,
}

// Open makes a ring. The calling goroutine must be locked to its thread and is
// the only one to use the ring from then on.
//
// Errors: ErrUnsupported (wrapped, with the kernel's reason) when the host has no
// usable io_uring: too old (needs 5.11 for timeouts in io_uring_enter),
// forbidden by kernel.io_uring_disabled or seccomp.
func Open(c Config) (*Ring, error) {
	if c.CQEntries == 0 {
		c.CQEntries = 4 * c.Entries
	}
	var (
		p   setupParams
		fd  uintptr
		err unix.Errno
	)
	for _, rung := range setupLadder {
		p = setupParams{CQEntries: c.CQEntries, Flags: rung | SetupCQSize | SetupClamp}
		if c.SQE128 {
			p.Flags |= SetupSQE128
		}
		fd, _, err = unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(c.Entries), uintptr(unsafe.Pointer(&p)), 0)
		if err != unix.EINVAL {
			break
		}
	}
	switch err {
	case 0:
	case unix.ENOSYS, unix.EPERM, unix.EINVAL, unix.EACCES:
		return nil, fmt.Errorf("%w: io_uring_setup: %s (see sysctl kernel.io_uring_disabled and the seccomp profile)", ErrUnsupported, err)
	default:
		return nil, fmt.Errorf("uring: io_uring_setup: %w", err)
	}
	r := &Ring{fd: int(fd), flags: p.Flags, features: p.Features}
	unix.CloseOnExec(r.fd)
	const needed = FeatureSingleMmap | FeatureNoDrop | FeatureExtArg
	if p.Features&needed != needed {
		_ = unix.Close(r.fd) // nothing was submitted
		return nil, fmt.Errorf("%w: features %#x lack some of %#x (needs Linux 5.11)", ErrUnsupported, p.Features, needed)
	}
	if err := r.mmap(&p); err != nil {
		_ = unix.Close(r.fd) // nothing was submitted
		return nil, err
	}
	r.probe()
	return r, nil
}

func (r *Ring) mmap(p *setupParams) error {
	r.sqeShift = 6
	if p.Flags&SetupSQE128 != 0 {
		r.sqeShift = 7
	}
	size := max(int(p.SQOff.Array+4*p.SQEntries), int(p.CQOff.CQEs+p.CQEntries*uint32(unsafe.Sizeof(CQE{}))))
	var err error
	if r.ringMemory, err = unix.Mmap(r.fd, int64(offSQRing), size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("uring: map rings: %w", err)
	}
	if r.sqeMemory, err = unix.Mmap(r.fd, int64(offSQEs), int(p.SQEntries)<<r.sqeShift, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		_ = unix.Munmap(r.ringMemory) // fresh mapping
		return fmt.Errorf("uring: map submission entries: %w", err)
	}
	base := unsafe.Pointer(unsafe.SliceData(r.ringMemory))
	word := func(offset uint32) *uint32 { return (*uint32)(unsafe.Add(base, offset)) }
	r.sqHead, r.sqTail, r.sqFlags = word(p.SQOff.Head), word(p.SQOff.Tail), word(p.SQOff.Flags)
	r.sqMask, r.sqEntries = *word(p.SQOff.RingMask), p.SQEntries
	r.sqes = unsafe.Pointer(unsafe.SliceData(r.sqeMemory))
	r.cqHead, r.cqTail = word(p.CQOff.Head), word(p.CQOff.Tail)
	r.cqMask, r.cqEntries = *word(p.CQOff.RingMask), p.CQEntries
	r.cqes = unsafe.Add(base, p.CQOff.CQEs)
	for i := range p.SQEntries { // entry i of the ring is always SQE i
		*(*uint32)(unsafe.Add(base, p.SQOff.Array+4*i)) = i
	}
	r.pending = *r.sqTail
	return nil
}

func (r *Ring) probe() {
	var b struct {
		header probeHeader
		ops    [probeOpsMax]probeOp
	}
	if r.register(registerProbe, unsafe.Pointer(&b), probeOpsMax) != 0 {
		return
	}
	for i := range int(b.header.OpsLen) {
		r.ops[b.ops[i].Op] = b.ops[i].Flags&probeSupported != 0
	}
}

// Close releases the ring. The kernel cancels what is still in flight and may
// touch its buffers until then: the caller has waited for every completion.
func (r *Ring) Close() error {
	err := errors.Join(unix.Munmap(r.sqeMemory), unix.Munmap(r.ringMemory), unix.Close(r.fd))
	r.fd = -1
	return err
}

// Supports reports whether the kernel knows the opcode.
func (r *Ring) Supports(op uint8) bool { return r.ops[op] }

// SetupFlags are the flags the ring was made with.
func (r *Ring) SetupFlags() uint32 { return r.flags }

// FD is the ring's file descriptor.
func (r *Ring) FD() int { return r.fd }

// CQEntries is how many completions fit before the kernel keeps them aside.
func (r *Ring) CQEntries() int { return int(r.cqEntries) }

// SQE returns the next free submission entry, zeroed, or nil when the ring is
// full and Enter has to run first. The entry is submitted by the next Enter.
func (r *Ring) SQE() *SQE {
	if r.pending-atomic.LoadUint32(r.sqHead) >= r.sqEntries {
		return nil
	}
	s := (*SQE)(unsafe.Add(r.sqes, uintptr(r.pending&r.sqMask)<<r.sqeShift))
	if r.sqeShift == 7 {
		*(*[2]SQE)(unsafe.Pointer(s)) = [2]SQE{}
	} else {
		*s = SQE{}
	}
	r.pending++
	return s
}

// Command is the command area of an entry: the 16 bytes from offset 48 on, or 80
// where the ring has SQE128.
func (r *Ring) Command(s *SQE) []byte {
	length := 16
	if r.sqeShift == 7 {
		length = 80
	}
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(s), 48)), length)
}

// Pending is how many entries the next Enter submits.
func (r *Ring) Pending() uint32 { return r.pending - atomic.LoadUint32(r.sqHead) }

// NeedsEnter reports whether the kernel has completions to post that only an
// Enter lets it post. It reads memory only.
func (r *Ring) NeedsEnter() bool {
	return atomic.LoadUint32(r.sqFlags)&(sqTaskrun|sqCQOverflow) != 0
}

// Enter submits every pending entry, lets the kernel post completions, and
// waits until there are at least wait of them or timeout nanoseconds have
// passed (negative: no limit). Interruption by a signal is not an error.
//
// A wait of 0 never sleeps.
func (r *Ring) Enter(wait uint32, timeout int64) error {
	return r.enter(wait, timeout, false)
}

// Nap is an Enter that waits for one completion, for as long as it takes, and is hidden from
// the Go scheduler, which takes the thread for a running one: its monitor does not wake
// every 20 µs to take the processor away, which on a reactor's own CPU costs 3 to 6 % of it.
// The price is that a garbage collection waits to stop the world. So the caller has an entry
// in the ring, made by Timeout, that completes within a millisecond or so: one entry for
// many naps, where a limit of each would cost the kernel a timer, which is 7 µs of CPU in a
// virtual machine.
func (r *Ring) Nap() error { return r.enter(1, -1, true) }

// Timeout makes s an entry that completes, with -ETIME, that many nanoseconds after it is
// submitted. There is one at a time in a ring.
func (r *Ring) Timeout(s *SQE, nanoseconds int64) {
	r.span = timespec{Sec: nanoseconds / 1e9, Nsec: nanoseconds % 1e9}
	s.Opcode, s.FD = OpTimeout, -1
	s.Addr, s.Length = uint64(uintptr(unsafe.Pointer(&r.span))), 1
}

func (r *Ring) enter(wait uint32, timeout int64, hidden bool) error {
	atomic.StoreUint32(r.sqTail, r.pending)
	for {
		submit := r.Pending() // by the kernel's head: an Enter that failed took nothing
		var err unix.Errno
		var n uintptr
		switch {
		case wait == 0 || hidden:
			n, _, err = unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(wait), uintptr(enterGetEvents), 0, 0)
		case timeout < 0:
			n, _, err = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(wait), uintptr(enterGetEvents), 0, 0)
		default:
			r.timeout = timespec{Sec: timeout / 1e9, Nsec: timeout % 1e9}
			r.arg = getEventsArg{Timeout: uint64(uintptr(unsafe.Pointer(&r.timeout)))}
			n, _, err = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(wait),
				uintptr(enterGetEvents|enterExtArg), uintptr(unsafe.Pointer(&r.arg)), unsafe.Sizeof(r.arg))
		}
		runtime.KeepAlive(r)
		switch err {
		case 0:
			if n == 0 || r.Pending() == 0 {
				return nil
			}
		case unix.ETIME, unix.EINTR:
			return nil // what was submitted is gone from the ring; the rest goes with the next Enter
		case unix.EAGAIN, unix.EBUSY:
			return nil // completions first; the caller reaps and comes again
		default:
			return fmt.Errorf("uring: io_uring_enter: %w", err)
		}
	}
}

// Peek returns the oldest completion, or nil. It stays in the ring until Seen.
func (r *Ring) Peek() *CQE {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return nil
	}
	return (*CQE)(unsafe.Add(r.cqes, uintptr(head&r.cqMask)*unsafe.Sizeof(CQE{})))
}

// Seen removes the oldest completion.
func (r *Ring) Seen() { atomic.StoreUint32(r.cqHead, *r.cqHead+1) }

// RegisterBuffers makes an empty table of count registered buffers, to be
// filled by UpdateBuffer (needs Linux 5.19 for sparse tables).
func (r *Ring) RegisterBuffers(count int) error {
	a := rsrcRegister{Count: uint32(count), Flags: rsrcRegisterSparse}
	if err := r.register(registerBuffers2, unsafe.Pointer(&a), int(unsafe.Sizeof(a))); err != 0 {
		return fmt.Errorf("uring: register %d buffers: %w", count, err)
	}
	return nil
}

// UpdateBuffer puts memory, which must not be Go heap, at index of the table; nil empties
// the place, also of what a driver has registered there.
// The pages are pinned until the ring closes and count against RLIMIT_MEMLOCK.
func (r *Ring) UpdateBuffer(index int, memory []byte) error {
	r.vector = iovec{Base: Address(memory), Len: uint64(len(memory))}
	u := rsrcUpdate2{Offset: uint32(index), Data: uint64(uintptr(unsafe.Pointer(&r.vector))), Count: 1}
	if err := r.registerUpdate(registerBuffersUpdate, &u); err != 0 {
		return fmt.Errorf("uring: register buffer of %d bytes: %w", len(memory), err)
	}
	return nil
}

// RegisterFiles makes an empty table of count registered files (Linux 5.19).
func (r *Ring) RegisterFiles(count int) error {
	a := rsrcRegister{Count: uint32(count), Flags: rsrcRegisterSparse}
	if err := r.register(registerFiles2, unsafe.Pointer(&a), int(unsafe.Sizeof(a))); err != 0 {
		return fmt.Errorf("uring: register %d files: %w", count, err)
	}
	return nil
}

// UpdateFile puts fd at index of the table; -1 empties the place.
func (r *Ring) UpdateFile(index, fd int) error {
	r.file = int32(fd)
	u := rsrcUpdate2{Offset: uint32(index), Data: uint64(uintptr(unsafe.Pointer(&r.file))), Count: 1}
	if err := r.registerUpdate(registerFilesUpdate2, &u); err != 0 {
		return fmt.Errorf("uring: register file %d: %w", fd, err)
	}
	return nil
}

func (r *Ring) registerUpdate(op uintptr, u *rsrcUpdate2) unix.Errno {
	n, _, err := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(unsafe.Pointer(u)), unsafe.Sizeof(*u), 0, 0)
	if err == 0 && n != 1 {
		return unix.EINVAL
	}
	return err
}

func (r *Ring) register(op uintptr, arg unsafe.Pointer, n int) unix.Errno {
	_, _, err := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(arg), uintptr(n), 0, 0)
	return err
}

// Address is the address of b's first byte as an SQE wants it. b must stay
// reachable until the completion.
func Address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
