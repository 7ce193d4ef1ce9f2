//go:build !linux

package doctor

import (
	"fmt"
	"os"
	"runtime"
)

// This is the host that the process runs on. Only Linux tells what is asked.
func This() *Host {
	unknown := func() error { return ErrUnknown }
	return &Host{
		Root: os.DirFS("/"), UID: os.Geteuid(),
		Release: func() (string, string, error) { return "", "", fmt.Errorf("%w: %s", ErrUnknown, runtime.GOOS) },
		Ring:    unknown, Ublk: unknown, NBD: unknown,
		Limit:      func(Resource) (uint64, uint64, error) { return 0, 0, ErrUnknown },
		Filesystem: func(string) (Filesystem, error) { return Filesystem{}, ErrUnknown },
		Direct:     func(string) error { return ErrUnknown },
		Reflink:    func(string) error { return ErrUnknown },
		Writable:   func(string) error { return ErrUnknown },
		ReadDisk:   func(string, []byte) error { return ErrUnknown },
		Listen:     func(string) error { return ErrUnknown },
		Daemon:     func(string) (string, error) { return "", ErrUnknown },
		Clock:      func() (bool, error) { return false, ErrUnknown },
		Foreign:    func([]byte) string { return "" },
	}
}
