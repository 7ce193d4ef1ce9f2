//go:build unix

package harness

import (
	"errors"
	"os"
	"syscall"
)

// errLocked says that a process that lives has locked a directory.
var errLocked = errors.New("locked")

// lockFolder locks a directory until the file returned is closed, or its process ends,
// however that may be.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errLocked
		}
		return nil, &os.PathError{Op: "lock", Path: dir, Err: err}
	}
	return f, nil
}
