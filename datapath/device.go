package datapath

import (
	"errors"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// BlockSize is the logical block of every store, in bytes. Smaller or unaligned
// requests are served by read-modify-write inside the store.
const BlockSize = 4096

// Features are what a device can do beyond reading and writing.
type Features uint32

// The features.
const (
	FeatureFlush       Features = 1 << iota // OpFlush
	FeatureFUA                              // FlagFUA
	FeatureDiscard                          // OpDiscard
	FeatureWriteZeroes                      // OpWriteZeroes
	FeatureFastZero                         // FlagFastZero is honoured
	FeatureCache                            // OpCache does something
	FeatureExtents                          // OpExtents, at least ContextAllocation
	FeatureMultiQueue                       // a flush on one queue covers all queues
	FeatureRotational                       // seeks are slow
	// FeatureImmediate: a write has taken its data when Submit returns, though it
	// completes later, so that Buf may be reused at once. A layer that keeps
	// requests waiting does not pass it on.
	FeatureImmediate
	// FeatureTimed: requests that carry a [Timing] are recorded, stage by stage.
	FeatureTimed
)

// Info describes a device. It is immutable between resizes.
type Info struct {
	Description string   // one line for people: what is behind the device
	Size        uint64   // bytes
	Features    Features // what the device can do
	ReadOnly    bool     // writes, discards and write-zeroes end with StatusReadOnly

	MinIO       uint32 // bytes; every offset and length must be a multiple (1: any)
	PreferredIO uint32 // bytes; power of two; aligned requests of this size cost least
	MaxIO       uint32 // bytes; largest read or write, 0 for no limit below 4 GiB

	// Contexts are the metadata contexts OpExtents serves now.
	Contexts []string
}

// Has reports whether every feature in f is present.
func (i *Info) Has(f Features) bool { return i.Features&f == f }

// Device is what an export serves. Safe for use from any goroutine.
type Device interface {
	// Info describes the device as it is now.
	Info() Info

	// OpenQueue makes reactor r's path into the device and reserves everything
	// that depth requests in flight need, in this layer and all below.
	//
	// Context: on r's own goroutine. It may be called several times per reactor.
	OpenQueue(r *reactor.Reactor, depth int) (Queue, error)

	// Close releases the device. All its queues are closed before.
	Close() error
}

// FixedBuffers is implemented by a device that takes requests whose data is in memory of
// the kernel's own ([Request.Fixed]). It is no feature of [Info], so that a layer which
// knows nothing of it does not pass it on.
type FixedBuffers interface {
	// FixedBuffers returns the bytes that offset and length of such a request must be
	// multiples of, or why the device does not take them.
	FixedBuffers() (align int, err error)
}

// FixedBuffersOf asks d for [FixedBuffers].
func FixedBuffersOf(d Device) (align int, err error) {
	if f, ok := d.(FixedBuffers); ok {
		return f.FixedBuffers()
	}
	return 0, errSeesBytes
}

var errSeesBytes = errors.New("the device works on the bytes, or a layer above it does")

// Queue is one reactor's path into a [Device]. It is used on that reactor only.
type Queue interface {
	// Submit hands r to the queue. It never blocks and returns nothing.
	//
	// Ownership: r and r.Buf belong to the queue until r.Done runs.
	// Completion: r.Done runs exactly once, on this reactor, never inside Submit.
	// Durability: StatusOK on a write means visible; durable needs OpFlush or FlagFUA.
	// Bounds: at most depth requests are in flight; offset and length lie inside
	// the device and are multiples of MinIO, which the caller has checked with
	// [Validate].
	Submit(r *Request)

	// Close releases what OpenQueue reserved. It is called after the last
	// completion.
	Close() error
}
