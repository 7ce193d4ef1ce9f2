//go:build linux

package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discardRange has the block device f discard a range of bytes.
func discardRange(f *os.File, offset, length int64) error {
	bounds := [2]uint64{uint64(offset), uint64(length)} // as BLKDISCARD of linux/fs.h takes it
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&bounds)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR: // the Go runtime interrupts its threads
		default:
			return os.NewSyscallError("BLKDISCARD", errno)
		}
	}
}
