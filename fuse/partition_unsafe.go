//go:build linux

package fuse

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// removePartitions takes the partitions of a loop device away. The driver keeps those
// that `partx --add` made when it lets go of the file, and the next file would have them.
//
// Errors: ErrInUse, when a program has one open.
func removePartitions(number, fd int) error {
	loop := fmt.Sprintf("loop%d", number)
	found, err := filepath.Glob("/sys/block/" + loop + "/" + loop + "p*/partition")
	if err != nil {
		return fmt.Errorf("fuse: partitions of %s: %w", loopPath(number), err)
	}
	for _, path := range found {
		p, err := strconv.Atoi(strings.TrimSpace(text(path)))
		if err != nil {
			continue // gone meanwhile
		}
		partition := unix.BlkpgPartition{Pno: int32(p)}
		arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_DEL_PARTITION, Datalen: int32(unsafe.Sizeof(partition)), Data: (*byte)(unsafe.Pointer(&partition))}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKPG, uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0, unix.ENXIO: // ENXIO: somebody was faster
		case unix.EBUSY:
			return fmt.Errorf("%w: a program has partition %d of %s open", ErrInUse, p, loopPath(number))
		default:
			return fmt.Errorf("fuse: remove partition %d of %s: %w", p, loopPath(number), errno)
		}
	}
	return nil
}
