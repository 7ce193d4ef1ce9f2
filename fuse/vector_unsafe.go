//go:build linux

package fuse

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is two pieces of memory for one system call. The call is a RawSyscall: the
// descriptor never waits, and the memory is in place.
type vector [2]unix.Iovec

func (v *vector) set(a, b []byte) (count uintptr) {
	v[0].Base = unsafe.SliceData(a)
	v[0].SetLen(len(a))
	if len(b) == 0 {
		return 1
	}
	v[1].Base = unsafe.SliceData(b)
	v[1].SetLen(len(b))
	return 2
}

// read reads into a, then b.
func (v *vector) read(fd int, a, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(v)), v.set(a, b))
	return int(n), errno
}

// write writes a, then b.
func (v *vector) write(fd int, a, b []byte) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(v)), v.set(a, b))
	return errno
}
