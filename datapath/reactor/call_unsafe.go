package reactor

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// call makes the system call of io once. It may sleep, so it is a Syscall, not
// a RawSyscall: the Go scheduler must be able to take the processor away.
func (io *IO) call() (int, unix.Errno) {
	var n uintptr
	var errno unix.Errno
	switch io.Op {
	case OpRead, OpWrite:
		if io.RWFlags != 0 {
			nr := uintptr(unix.SYS_PREADV2)
			if io.Op == OpWrite {
				nr = unix.SYS_PWRITEV2
			}
			v := unix.Iovec{Base: unsafe.SliceData(io.Buf)}
			v.SetLen(len(io.Buf))
			n, _, errno = unix.Syscall6(nr, uintptr(io.FD), uintptr(unsafe.Pointer(&v)), 1, uintptr(io.Offset), 0, uintptr(io.RWFlags))
			break
		}
		nr := uintptr(unix.SYS_PREAD64)
		if io.Op == OpWrite {
			nr = unix.SYS_PWRITE64
		}
		n, _, errno = unix.Syscall6(nr, uintptr(io.FD), uintptr(unsafe.Pointer(unsafe.SliceData(io.Buf))), uintptr(len(io.Buf)), uintptr(io.Offset), 0, 0)
	case OpFsync:
		_, _, errno = unix.Syscall(unix.SYS_FDATASYNC, uintptr(io.FD), 0, 0)
	case OpFallocate:
		_, _, errno = unix.Syscall6(unix.SYS_FALLOCATE, uintptr(io.FD), uintptr(io.Mode), uintptr(io.Offset), uintptr(io.Length), 0, 0)
	case OpFunc:
		return io.Func(), 0
	case OpCommand:
		return 0, unix.EOPNOTSUPP // it exists in rings only
	}
	return int(n), errno
}

// Inline does io on the calling thread at once and returns its result: bytes
// moved, or a negative errno. Done is not called. It is for files that answer
// from memory; anything else would stop the reactor.
//
// Plain reads and writes are RawSyscalls: at 4 KiB the scheduler's bookkeeping
// would be 2 % of the cost. Where such a file has been swapped out, a garbage
// collection that begins in the meantime waits for the page.
func (io *IO) Inline() int {
	if io.Op > OpWrite || io.RWFlags != 0 {
		io.run()
		return io.Result
	}
	nr := uintptr(unix.SYS_PREAD64)
	if io.Op == OpWrite {
		nr = unix.SYS_PWRITE64
	}
	for {
		n, _, errno := unix.RawSyscall6(nr, uintptr(io.FD), uintptr(unsafe.Pointer(unsafe.SliceData(io.Buf))), uintptr(len(io.Buf)), uintptr(io.Offset), 0, 0)
		switch errno {
		case 0:
			io.Result = int(n)
		case unix.EINTR:
			continue
		default:
			io.Result = -int(errno)
		}
		return io.Result
	}
}
