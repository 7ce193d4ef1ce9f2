package csi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// blockSize is the size of a block device in bytes.
func blockSize(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close() // read-only
	size, err := unixSize(f)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", path, err)
	}
	return size, nil
}

func unixSize(f *os.File) (uint64, error) {
	end, err := f.Seek(0, 2)
	return uint64(end), err
}

// isBusy says whether somebody has a block device for himself: a mount, mkfs, fsck.
func isBusy(path string) bool {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd) // read-only
	}
	return errors.Is(err, unix.EBUSY)
}

// growPatience is how long a device may take to have the size of its volume.
const growPatience = 10 * time.Second

// awaitSize waits until a device is at least as large as its volume. A loop device
// is told to look.
func awaitSize(ctx context.Context, path string, size uint64) error {
	ctx, cancel := context.WithTimeout(ctx, growPatience)
	defer cancel()
	for {
		if strings.HasPrefix(path, "/dev/loop") {
			if f, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
				_ = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0) // if it fails, the size stays, which is told below
				_ = f.Close()                                                // nothing was written
			}
		}
		now, err := blockSize(path)
		if err != nil {
			return err
		}
		if now >= size {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("device %s has %d bytes and its volume %d: it grows when it is attached the next time, so start the pod again", path, now, size)
		}
	}
}
