package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// send writes without waiting and returns how much the socket took. It never
// sleeps, so it needs not tell Go's scheduler.
func send(fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return transferred(n, errno)
}

// receive reads what is there. With flags 0 it waits for the first byte, at most
// the socket's receive timeout, and returns 0 when none came.
func receive(fd int, b []byte, flags int) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		uintptr(flags), 0, 0)
	if errno == 0 && n == 0 {
		return 0, unix.ECONNRESET // the end of the stream: a reply is due
	}
	return transferred(n, errno)
}

func transferred(n uintptr, errno unix.Errno) (int, error) {
	switch errno {
	case 0:
		return int(n), nil
	case unix.EAGAIN, unix.EINTR:
		return 0, nil
	}
	return 0, errno
}
