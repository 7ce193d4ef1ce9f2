//go:build linux

package fuse_test

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// blockIoctl discards or zeroes a range of a block device.
func blockIoctl(f *os.File, request uintptr, offset, length uint64) error {
	argument := [2]uint64{offset, length}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&argument))); errno != 0 {
		return errno
	}
	return nil
}
