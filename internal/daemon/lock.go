package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// dirLock keeps a data directory to one process. The kernel lets go of it when the
// process ends, however it ends; the file stays.
type dirLock struct{ file *os.File }

// lockDir takes the lock of a data directory, which it makes when it is not there.
func lockDir(dir string) (*dirLock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("data directory %s: is in use by %s; stop that first, or choose another --data-dir", dir, holder(f))
		} else {
			err = fmt.Errorf("data directory: lock %s: %w", path, err)
		}
		_ = f.Close() // nothing done with it
		return nil, err
	}
	// For people, and for the message above; the lock itself is the kernel's.
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
		if err != nil {
			_ = f.Close() // the lock goes with it
			return nil, fmt.Errorf("data directory: %w", err)
		}
	}
	return &dirLock{f}, nil
}

// holder names the process that has the lock, as well as can be known.
func holder(f *os.File) string {
	b, _ := io.ReadAll(io.LimitReader(f, 32)) // empty: it has not written it yet
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return "another process"
	}
	command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(command) == 0 {
		return fmt.Sprintf("process %d", pid)
	}
	text := strings.TrimSpace(string(bytes.ReplaceAll(command, []byte{0}, []byte{' '})))
	return fmt.Sprintf("process %d (%.200s)", pid, text)
}

func (l *dirLock) unlock() { _ = l.file.Close() } // the lock goes with it
