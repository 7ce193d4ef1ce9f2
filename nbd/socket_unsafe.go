package nbd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// wire is the descriptor of a stream that a reactor owns, and what its system
// calls need.
type wire struct {
	fd     int
	iov    [iovMax]unix.Iovec
	header unix.Msghdr
}

// receiveInto reads into head, then into space, without waiting.
//
// RawSyscall: with MSG_DONTWAIT the call copies and returns; it never sleeps.
func (c *wire) receiveInto(head, space []byte) (int, unix.Errno) {
	var n uintptr
	var errno unix.Errno
	if len(head) == 0 {
		n, _, errno = unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(c.fd), uintptr(unsafe.Pointer(unsafe.SliceData(space))), uintptr(len(space)), unix.MSG_DONTWAIT, 0, 0)
	} else {
		c.iov[0].Base = unsafe.SliceData(head)
		c.iov[0].SetLen(len(head))
		c.iov[1].Base = unsafe.SliceData(space)
		c.iov[1].SetLen(len(space))
		c.header = unix.Msghdr{Iov: &c.iov[0]}
		c.header.SetIovlen(2)
		n, _, errno = unix.RawSyscall(unix.SYS_RECVMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.header)), unix.MSG_DONTWAIT)
	}
	return int(n), errno
}

// send writes the first count entries of c.iov, as much as fits.
func (c *wire) send(count int) (int, unix.Errno) {
	c.header = unix.Msghdr{Iov: &c.iov[0]}
	c.header.SetIovlen(count)
	n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.header)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return int(n), errno
}
