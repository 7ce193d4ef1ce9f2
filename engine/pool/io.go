package pool

import (
	"errors"
	"fmt"

	"github.com/ncw/directio"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// syncDepth is how many requests of the pool's own may be under way on one disk:
// enough to load maps at the speed of the disk.
const syncDepth = 32

// disk is one device of a pool with a queue for the pool's own requests, which
// ordinary goroutines wait for. The data path has queues of its own.
type disk struct {
	path  string
	dev   datapath.Device
	index int

	r     *reactor.Reactor
	queue datapath.Queue // owned by r
	free  chan *call     // calls not under way
}

// size is how many bytes the device has now.
func (d *disk) size() uint64 { return d.dev.Info().Size }

// call is one request of a goroutine.
type call struct {
	d    *disk
	req  datapath.Request
	done chan datapath.Status
}

// RunTask implements [reactor.Task].
func (c *call) RunTask(*reactor.Reactor) { c.d.queue.Submit(&c.req) }

func openDisk(r *reactor.Reactor, d Disk, index int) (*disk, error) {
	x := &disk{path: d.Path, dev: d.Device, index: index, r: r, free: make(chan *call, syncDepth)}
	for i := range syncDepth {
		c := &call{d: x, done: make(chan datapath.Status, 1)}
		c.req.Tag = uint32(i)
		c.req.Done = func(r *datapath.Request) { c.done <- r.Status }
		x.free <- c
	}
	var err error
	if runErr := r.Run(func(r *reactor.Reactor) { x.queue, err = d.Device.OpenQueue(r, syncDepth) }); runErr != nil {
		return nil, runErr
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.Path, err)
	}
	return x, nil
}

// close waits for what is under way and gives the queue back.
func (d *disk) close() error {
	for range syncDepth {
		<-d.free
	}
	var err error
	if runErr := d.r.Run(func(*reactor.Reactor) { err = d.queue.Close() }); runErr != nil {
		return runErr
	}
	return err
}

// start begins a request; wait of the call returned ends it.
func (d *disk) start(op datapath.Op, flags datapath.Flags, b []byte, offset uint64) *call {
	c := <-d.free
	c.req.Op, c.req.Flags, c.req.Buf, c.req.Offset, c.req.Length = op, flags, b, offset, uint64(len(b))
	if !d.r.Post(c) {
		c.done <- datapath.StatusShutdown
	}
	return c
}

func (c *call) wait() error {
	status := <-c.done
	d, op, offset, length := c.d, c.req.Op, c.req.Offset, c.req.Length
	c.req.Buf = nil
	d.free <- c
	if status == datapath.StatusOK {
		return nil
	}
	return &DiskError{Path: d.path, Op: op.String(), Offset: offset, Length: length, Err: status.Err()}
}

// DiskError is a request that a device of a pool failed.
type DiskError struct {
	Path           string
	Op             string
	Offset, Length uint64 // bytes
	Err            error
}

// Error implements error.
func (e *DiskError) Error() string {
	return fmt.Sprintf("%s: %s of %d bytes at %d: %v", e.Path, e.Op, e.Length, e.Offset, e.Err)
}

// Unwrap is the reason.
func (e *DiskError) Unwrap() error { return e.Err }

func (d *disk) read(b []byte, offset uint64) error {
	if offset+uint64(len(b)) > d.size() {
		return &DiskError{Path: d.path, Op: "read", Offset: offset, Length: uint64(len(b)), Err: errors.New("past the end of the device")}
	}
	return d.start(datapath.OpRead, 0, b, offset).wait()
}

// readPages reads pages that each have a second copy. One that cannot be read is
// zeros in b, which no valid page is; an error means that none could be read.
func (d *disk) readPages(b []byte, offset uint64) error {
	err := d.read(b, offset)
	if err == nil {
		return nil
	}
	for i := 0; i < len(b); i += pageSize {
		page := b[i:][:pageSize]
		if d.read(page, offset+uint64(i)) == nil {
			err = nil
		} else {
			clear(page)
		}
	}
	return err
}

func (d *disk) write(b []byte, offset uint64, flags datapath.Flags) error {
	return d.start(datapath.OpWrite, flags, b, offset).wait()
}

func (d *disk) flush() error { return d.start(datapath.OpFlush, 0, nil, 0).wait() }

// flushAll flushes all disks together.
func flushAll(disks []*disk) error {
	var calls [membersMax]*call
	n := 0
	for _, d := range disks {
		if d != nil {
			calls[n] = d.start(datapath.OpFlush, 0, nil, 0)
			n++
		}
	}
	var first error
	for _, c := range calls[:n] {
		if err := c.wait(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// alignedBytes is memory for the pool's own requests.
func alignedBytes(n int) []byte { return directio.AlignedBlock(n) }

// batch runs many requests with at most syncDepth under way, and keeps the first
// error.
type batch struct {
	calls []*call
	first error
}

func (b *batch) add(c *call) {
	b.calls = append(b.calls, c)
	if len(b.calls) >= syncDepth/2 {
		b.reap(len(b.calls) / 2)
	}
}

func (b *batch) reap(n int) {
	for _, c := range b.calls[:n] {
		if err := c.wait(); err != nil && b.first == nil {
			b.first = err
		}
	}
	b.calls = b.calls[:copy(b.calls, b.calls[n:])]
}

func (b *batch) wait() error {
	b.reap(len(b.calls))
	return b.first
}
