// Package memdev is a device in memory: the smallest device that keeps what is
// written, and the example for authors of others.
//
// The way of a request: Submit does it at once (a copy to or from a [Store]) and
// the queue completes it at the end of the turn, on its reactor. Nothing waits,
// nothing is allocated on the Go heap, and a page gets its memory from the
// kernel when it is first written.
//
// It keeps the rules of datapath: a block is never torn between two requests in
// flight, zeroed and discarded ranges read as zeros, and since memory is as
// durable as it will ever be, FUA and flush have nothing left to do.
package memdev

import (
	"fmt"
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Config says what device to make.
type Config struct {
	Size     uint64 // bytes
	SizeMax  uint64 // bytes up to which Resize may grow it; Size when 0
	ReadOnly bool
	MinIO    uint32 // bytes, a power of two; 1 when 0

	// Store is the memory to use, so that it outlives the device or is looked at
	// by a test. The device makes its own, and closes it, when it is nil.
	Store *Store
}

// Device is a device in memory.
type Device struct {
	info  datapath.Info // immutable but for the size, which is in size
	store *Store        // immutable
	own   bool          // the store is closed with the device

	size atomic.Uint64
}

// New makes a device.
func New(c Config) (*Device, error) {
	c.SizeMax = max(c.SizeMax, c.Size)
	c.MinIO = max(c.MinIO, 1)
	if c.MinIO&(c.MinIO-1) != 0 || c.MinIO > datapath.BlockSize {
		return nil, fmt.Errorf("memdev: smallest I/O of %d bytes: must be a power of two up to %d", c.MinIO, datapath.BlockSize)
	}
	d := &Device{store: c.Store, own: c.Store == nil}
	if d.own {
		var err error
		if d.store, err = NewStore(c.SizeMax); err != nil {
			return nil, err
		}
	}
	if c.SizeMax > d.store.Size() {
		return nil, fmt.Errorf("memdev: device of %d bytes on a store of %d", c.SizeMax, d.store.Size())
	}
	d.info = datapath.Info{
		Description: "memory",
		Features: datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureDiscard | datapath.FeatureWriteZeroes |
			datapath.FeatureFastZero | datapath.FeatureExtents | datapath.FeatureMultiQueue | datapath.FeatureImmediate,
		ReadOnly:    c.ReadOnly,
		MinIO:       c.MinIO,
		PreferredIO: datapath.BlockSize,
		Contexts:    []string{datapath.ContextAllocation},
	}
	d.size.Store(c.Size)
	return d, nil
}

// Store is the memory behind the device.
func (d *Device) Store() *Store { return d.store }

// Info implements [datapath.Device].
func (d *Device) Info() datapath.Info {
	info := d.info
	info.Size = d.size.Load()
	return info
}

// Resize changes the size. What lies past a smaller size is lost; requests to it
// have ended before.
func (d *Device) Resize(size uint64) error {
	if size == 0 || size > d.store.Size() {
		return fmt.Errorf("memdev: resize to %d bytes: must be between 1 and %d", size, d.store.Size())
	}
	if old := d.size.Swap(size); size < old {
		d.store.Zero(size, old-size, false)
	}
	return nil
}

// OpenQueue implements [datapath.Device].
func (d *Device) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	q := &queue{reactor: r, store: d.store}
	q.completions.Init(r, depth)
	return q, nil
}

// Close implements [datapath.Device].
func (d *Device) Close() error {
	if d.own {
		return d.store.Close()
	}
	return nil
}

// queue does requests in Submit and completes them at the end of the turn.
type queue struct {
	reactor     *reactor.Reactor
	store       *Store
	completions datapath.Completions
}

// Submit implements [datapath.Queue].
func (q *queue) Submit(r *datapath.Request) {
	r.MarkRecent(datapath.StageDevice, q.reactor)
	status := datapath.StatusOK
	switch r.Op {
	case datapath.OpRead:
		r.Zero = q.store.Read(r.Buf, r.Offset)
	case datapath.OpWrite:
		q.store.Write(r.Buf, r.Offset)
	case datapath.OpFlush:
	case datapath.OpDiscard:
		q.store.Zero(r.Offset, r.Length, false)
	case datapath.OpWriteZeroes:
		q.store.Zero(r.Offset, r.Length, r.Flags&datapath.FlagNoUnmap != 0)
	case datapath.OpExtents:
		status = q.extents(r)
	default:
		status = datapath.StatusNotSupported
	}
	q.completions.Add(r, status)
}

func (q *queue) extents(r *datapath.Request) datapath.Status {
	if r.Context != datapath.ContextAllocation || r.Length == 0 || cap(r.Extents) == 0 {
		return datapath.StatusInvalid
	}
	r.Extents = r.Extents[:0]
	offset, length := r.Offset, r.Length
	for length > 0 && len(r.Extents) < cap(r.Extents) {
		n, allocated := q.store.Run(offset, length)
		e := datapath.Extent{Length: n}
		if !allocated {
			e.State = datapath.ExtentHole | datapath.ExtentZero
		}
		r.Extents = append(r.Extents, e)
		if r.Flags&datapath.FlagOneExtent != 0 {
			break
		}
		offset, length = offset+n, length-n
	}
	return datapath.StatusOK
}

// Close implements [datapath.Queue].
func (q *queue) Close() error { return nil }
