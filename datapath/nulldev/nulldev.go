// Package nulldev is the device that stores nothing: reads return zeros, writes
// are forgotten. It is the floor under every measurement, since what it costs is
// what the path above it costs.
//
// Like memdev it is an example for authors of devices: a request ends at the end
// of the turn in which it was submitted, on its reactor, never inside Submit.
package nulldev

import (
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Device is a device of a given size that keeps nothing.
type Device struct{ info datapath.Info }

// New makes a device of size bytes.
func New(size uint64) *Device {
	return &Device{info: datapath.Info{
		Description: "null",
		Size:        size,
		Features: datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureDiscard | datapath.FeatureWriteZeroes |
			datapath.FeatureFastZero | datapath.FeatureCache | datapath.FeatureExtents |
			datapath.FeatureMultiQueue | datapath.FeatureImmediate,
		MinIO:       1,
		PreferredIO: datapath.BlockSize,
		Contexts:    []string{datapath.ContextAllocation},
	}}
}

// Info implements [datapath.Device].
func (d *Device) Info() datapath.Info { return d.info }

// OpenQueue implements [datapath.Device].
func (d *Device) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	q := &queue{reactor: r}
	q.completions.Init(r, depth)
	return q, nil
}

// Close implements [datapath.Device].
func (d *Device) Close() error { return nil }

// queue answers in Submit and completes at the end of the turn.
type queue struct {
	reactor     *reactor.Reactor
	completions datapath.Completions
}

// Submit implements [datapath.Queue].
//
// Request.Zero stays false although the device is one hole: an export shall move
// the zeros as data, or nothing would be measured.
func (q *queue) Submit(r *datapath.Request) {
	r.MarkRecent(datapath.StageDevice, q.reactor)
	status := datapath.StatusOK
	switch r.Op {
	case datapath.OpRead:
		if r.Flags&datapath.FlagLend != 0 && r.Length <= uint64(len(zeros)) {
			r.Buf = zeros[:r.Length:r.Length]
		} else {
			clear(r.Buf)
		}
		r.Zero = false
	case datapath.OpExtents:
		status = q.extents(r)
	case datapath.OpWrite, datapath.OpFlush, datapath.OpDiscard, datapath.OpWriteZeroes, datapath.OpCache:
	default:
		status = datapath.StatusNotSupported
	}
	q.completions.Add(r, status)
}

func (q *queue) extents(r *datapath.Request) datapath.Status {
	if r.Context != datapath.ContextAllocation || r.Length == 0 || cap(r.Extents) == 0 {
		return datapath.StatusInvalid
	}
	r.Extents = append(r.Extents[:0], datapath.Extent{Length: r.Length, State: datapath.ExtentHole | datapath.ExtentZero})
	return datapath.StatusOK
}

// Close implements [datapath.Queue].
func (q *queue) Close() error { return nil }

// zeros are what reads lend: outside the Go heap, shared by all, never written.
var zeros = func() []byte {
	b, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil // reads clear their buffers instead
	}
	return b
}()
