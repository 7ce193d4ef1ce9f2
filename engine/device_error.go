package engine

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// DeviceError says why a file or device cannot be one of a pool.
type DeviceError struct {
	Path   string
	Remedy string // an order, or "" where Err has it
	Err    error  // it names the path
}

func (e *DeviceError) Error() string { return e.Err.Error() }
func (e *DeviceError) Unwrap() error { return e.Err }

// deviceError is err with what helps; nil stays nil.
func deviceError(path string, err error) error {
	if err == nil {
		return nil
	}
	told := &DeviceError{Path: path, Err: err}
	info, statErr := os.Stat(path)
	_, dirErr := os.Stat(filepath.Dir(path))
	switch {
	case statErr == nil && !info.Mode().IsRegular() && info.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice:
		told.Remedy = "name a disk, a partition or a file"
	case errors.Is(dirErr, fs.ErrNotExist):
		told.Remedy = "mkdir -p " + filepath.Dir(path)
	}
	return told
}
