package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// kernelTarget is a file or block device of this kernel.
type kernelTarget struct {
	path    string
	device  bool
	f       *os.File
	direct  *os.File // nil when there is no O_DIRECT
	aligned []byte   // for direct I/O; outside the heap, on a page
}

// openTarget opens path, and makes a file when there is none. The target takes direct
// I/O of at most lengthMax bytes.
func openTarget(path string, lengthMax int64) (target, error) {
	t := &kernelTarget{path: path}
	if err := t.open(os.O_CREATE); err != nil {
		return nil, err
	}
	info, err := t.f.Stat()
	if err == nil && !info.Mode().IsRegular() && info.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		err = fmt.Errorf("%s is neither a file nor a block device", path)
	}
	if err == nil {
		t.device = info.Mode()&os.ModeDevice != 0
		t.aligned, err = unix.Mmap(-1, 0, int(lengthMax+align), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	}
	if err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

func (t *kernelTarget) open(flags int) error {
	var err error
	if t.f, err = os.OpenFile(t.path, os.O_RDWR|flags, 0o600); err != nil {
		return err
	}
	t.direct, err = os.OpenFile(t.path, os.O_RDWR|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) { // some file systems in memory
		return nil
	}
	if err != nil {
		return errors.Join(err, t.f.Close())
	}
	return nil
}

func (t *kernelTarget) block() bool { return t.device }

func (t *kernelTarget) size() (int64, error) { return t.f.Seek(0, io.SeekEnd) }

func (t *kernelTarget) read(p []byte, offset int64, how access) (int, error) {
	n, err := 0, error(nil)
	switch how {
	case direct:
		if t.direct == nil {
			return 0, errors.ErrUnsupported
		}
		n, err = t.direct.ReadAt(t.aligned[:len(p)], offset)
		copy(p, t.aligned[:n])
	case mapped:
		err = t.mapped(offset, len(p), func(memory []byte) { n = copy(p, memory) })
	default:
		n, err = t.f.ReadAt(p, offset)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (t *kernelTarget) write(p []byte, offset int64, how access) error {
	switch how {
	case direct:
		if t.direct == nil {
			return errors.ErrUnsupported
		}
		_, err := t.direct.WriteAt(t.aligned[:copy(t.aligned, p)], offset)
		return err
	case mapped:
		return t.mapped(offset, len(p), func(memory []byte) { copy(memory, p) })
	}
	_, err := t.f.WriteAt(p, offset)
	return err
}

// mapped calls use with length bytes of the file at offset. A page that cannot be
// read or written is an error, not the end of the process.
func (t *kernelTarget) mapped(offset int64, length int, use func([]byte)) (err error) {
	page := int64(os.Getpagesize())
	start := offset / page * page
	memory, err := unix.Mmap(int(t.f.Fd()), start, int(offset-start)+length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("mapped memory: %v", fault)
		}
		err = errors.Join(err, unix.Munmap(memory))
	}()
	use(memory[offset-start:])
	return nil
}

func (t *kernelTarget) resize(size int64) error { return t.f.Truncate(size) }

func (t *kernelTarget) punch(offset, length int64) error {
	return t.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
}

func (t *kernelTarget) zero(offset, length int64) error {
	return t.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
}

func (t *kernelTarget) allocate(offset, length int64, keepSize bool) error {
	mode := uint32(0)
	if keepSize {
		mode = unix.FALLOC_FL_KEEP_SIZE
	}
	return t.fallocate(mode, offset, length)
}

func (t *kernelTarget) fallocate(mode uint32, offset, length int64) error {
	for {
		err := unix.Fallocate(int(t.f.Fd()), mode, offset, length)
		if err != unix.EINTR { // the Go runtime interrupts its threads
			return os.NewSyscallError("fallocate", err)
		}
	}
}

func (t *kernelTarget) discard(offset, length int64) error {
	if !t.device {
		return errors.ErrUnsupported
	}
	return discardRange(t.f, offset, length)
}

func (t *kernelTarget) sync() error { return t.f.Sync() }

func (t *kernelTarget) forget() error {
	if err := t.f.Sync(); err != nil {
		return err
	}
	return os.NewSyscallError("fadvise", unix.Fadvise(int(t.f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

func (t *kernelTarget) reopen() error {
	if err := t.closeFiles(); err != nil {
		return err
	}
	return t.open(0)
}

func (t *kernelTarget) closeFiles() error {
	err := t.f.Close()
	if t.direct != nil {
		err = errors.Join(err, t.direct.Close())
	}
	t.direct = nil
	return err
}

func (t *kernelTarget) close() error {
	err := t.closeFiles()
	if t.aligned != nil {
		err = errors.Join(err, unix.Munmap(t.aligned))
	}
	return err
}
