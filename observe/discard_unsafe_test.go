//go:build linux

package observe

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discard is BLKDISCARD, which takes the address of two numbers.
func discard(f *os.File, offset, length uint64) error {
	area := [2]uint64{offset, length}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&area))); errno != 0 {
		return errno
	}
	return nil
}
