package testenv

import (
	"errors"

	"golang.org/x/sys/unix"
)

// probeIOURing asks for a ring with no parameter block. A kernel that would give
// one gets as far as reading the block and answers EFAULT; one that would not
// answers before that, with ENOSYS or EPERM.
func probeIOURing() error {
	_, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	if errno == unix.EFAULT {
		return nil
	}
	return errors.New(errno.Error())
}
