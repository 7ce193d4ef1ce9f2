//go:build linux

package filedev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// blockSize64 is the size of a block device in bytes.
func blockSize64(fd int) (uint64, error) {
	var n uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n))); errno != 0 {
		return 0, errno
	}
	return n, nil
}

// blockDiscard discards a range of whole sectors of a block device. It may sleep.
func blockDiscard(fd int, offset, length uint64) unix.Errno {
	r := [2]uint64{offset, length}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r)))
	return errno
}

// fiemap is struct fiemap of linux/fiemap.h with room for one extent.
//
//	offset size
//	     0    8 start of the range asked for
//	     8    8 its length
//	    16    4 flags
//	    20    4 extents found
//	    24    4 extents there is room for
//	    28    4 reserved
//	    32    8 extent: offset in the file
//	    40    8 extent: offset on the device
//	    48    8 extent: length
//	    56   16 reserved
//	    72    4 extent: flags
//	    76   12 reserved
type fiemap struct {
	start, length                  uint64
	flags, mapped, count, reserved uint32
	extentStart                    uint64
	extentPhysical                 uint64
	extentLength                   uint64
	extentReserved                 [2]uint64
	extentFlags                    uint32
	extentReserved2                [3]uint32
}

var _ [88]struct{} = [unsafe.Sizeof(fiemap{})]struct{}{}

const fsIocFiemap = 0xc020660b // _IOWR('f', 11, struct fiemap), linux/fs.h

// firstMapped is the first range of a file, from offset on and within length,
// that has storage. It may sleep.
func firstMapped(fd int, offset, length uint64) (start, end uint64, found bool, errno unix.Errno) {
	m := fiemap{start: offset, length: length, count: 1}
	if _, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 || m.mapped == 0 {
		return 0, 0, false, errno
	}
	return m.extentStart, m.extentStart + m.extentLength, true, 0
}
