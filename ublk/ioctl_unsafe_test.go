//go:build linux

package ublk_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const blkZeroOut = 0x127f // _IO(0x12, 127), linux/fs.h

// blockIoctl gives a range to a block device.
func blockIoctl(fd int, request uint, r *[2]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(r))); errno != 0 {
		return errno
	}
	return nil
}
