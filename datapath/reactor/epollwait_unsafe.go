//go:build linux

package reactor

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// epollWait is epoll_pwait without the wrapper's allocation-free but scheduler
// visible path when it does not sleep.
func (e *epollEngine) epollWait(milliseconds int) (int, unix.Errno) {
	call := unix.RawSyscall6
	if milliseconds != 0 {
		call = unix.Syscall6
	}
	n, _, errno := call(unix.SYS_EPOLL_PWAIT, uintptr(e.fd), uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), uintptr(milliseconds), 0, 0)
	return int(n), errno
}
