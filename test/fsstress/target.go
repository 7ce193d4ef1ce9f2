package main

// access is the way to the bytes of a target.
type access uint8

const (
	cached access = iota // through the page cache
	direct               // O_DIRECT
	mapped               // a shared mapping
)

// target is a file or a block device. One goroutine uses it. An operation that this
// kernel, file system or device lacks fails with errors.ErrUnsupported.
type target interface {
	// block tells whether it is a block device, whose size is fixed.
	block() bool
	// size returns its size in bytes.
	size() (int64, error)
	// read fills p from offset and returns how much there was, less at the end only.
	read(p []byte, offset int64, how access) (int, error)
	// write puts p at offset, all of it.
	write(p []byte, offset int64, how access) error
	resize(size int64) error
	// punch, zero and allocate are the modes of fallocate(2). Punch and zero leave the size,
	// as allocate does with keepSize.
	punch(offset, length int64) error
	zero(offset, length int64) error
	allocate(offset, length int64, keepSize bool) error
	// discard lets the device forget a range; it reads as before or as zeroes.
	discard(offset, length int64) error
	sync() error
	// forget drops the clean pages from memory, so that the next reads reach the device.
	forget() error
	reopen() error
	close() error
}
