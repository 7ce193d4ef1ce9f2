package datapath

import "fmt"

// Op is what a request asks of a device.
type Op uint8

// The operations. Which of them a device serves is in [Info.Features]; read and
// write (unless read-only) are always served.
const (
	OpRead        Op = iota // fill Buf from [Offset, Offset+Length)
	OpWrite                 // store Buf at [Offset, Offset+Length)
	OpFlush                 // make every completed write durable; Offset and Length are 0
	OpDiscard               // the range is no longer needed; its content becomes undefined until written
	OpWriteZeroes           // the range reads back as zeros
	OpCache                 // the range will be read soon; a hint
	OpExtents               // append the allocation map of the range to Extents
	OpCount                 // how many operations there are; not an operation
)

var opNames = [OpCount]string{"read", "write", "flush", "discard", "write-zeroes", "cache", "extents"}

// String names the operation as metrics and logs do.
func (o Op) String() string {
	if o >= OpCount {
		return fmt.Sprintf("op(%d)", uint8(o))
	}
	return opNames[o]
}

// Flags modify an operation.
type Flags uint16

const (
	// FlagFUA on a write, write-zeroes or discard: complete only when this
	// request's own effect is durable.
	FlagFUA Flags = 1 << iota
	// FlagNoUnmap on write-zeroes: keep the range provisioned, do not punch a hole.
	FlagNoUnmap
	// FlagFastZero on write-zeroes: fail with StatusNotSupported, without
	// change, unless zeroing is faster than writing zeros.
	FlagFastZero
	// FlagOneExtent on extents: append one extent, none longer than the range.
	FlagOneExtent
	// FlagLend on a read: instead of filling Buf the device may point Buf at
	// memory of its own that holds the data, which saves a copy. The memory stays
	// readable until the queue closes and may show writes that complete after the
	// read has. Whoever sets the flag passes the bytes to the kernel only, which
	// answers EFAULT where a file behind them has been cut off, and does not touch
	// them itself.
	FlagLend
)

// Extent is a run of a device with one state in one metadata context.
type Extent struct {
	Length uint64 // bytes, > 0
	State  uint64 // meaning by context; see the Context constants
}

// Metadata contexts a device can report by [OpExtents]. The names are those of
// the NBD protocol (doc/proto.md, "Metadata querying") and of QEMU
// (docs/interop/nbd.rst), so an export passes them through.
const (
	// ContextAllocation is "base:allocation". Every device that has
	// FeatureExtents serves it. State bits: ExtentHole, ExtentZero.
	ContextAllocation = "base:allocation"
	// ContextDepth is "qemu:allocation-depth": 0 unallocated, 1 in the top
	// layer, n in the layer n-1 below.
	ContextDepth = "qemu:allocation-depth"
	// ContextDirtyPrefix begins "qemu:dirty-bitmap:NAME". State bit 0: changed
	// since snapshot NAME.
	ContextDirtyPrefix = "qemu:dirty-bitmap:"
)

// State bits of [ContextAllocation].
const (
	ExtentHole uint64 = 1 << 0 // no storage is allocated
	ExtentZero uint64 = 1 << 1 // reads as zeros
)

// Request is one operation on a device.
//
// Ownership: the export that made it owns it; between Submit and Done it and
// Buf belong to the queue. Layers that pass a request down either hand on the
// same Request (restoring every field they changed before it completes) or use
// a Request of their own from an array made in OpenQueue.
type Request struct {
	Op     Op
	Flags  Flags
	Status Status // the result; valid inside and after Done

	// Zero is set by the device on a successful read when it knows that the
	// whole range is unallocated and reads as zeros. Buf is filled all the same.
	Zero bool

	// Tag is chosen by the submitter, below the queue's depth and unique among
	// its requests in flight. Layers use it as the index of their slot.
	Tag uint32

	Offset uint64 // bytes
	Length uint64 // bytes

	// Buf holds the data of a read or write; len(Buf) == Length. It is nil for
	// other operations, and where Fixed is set. Best taken from the reactor's arena (page-aligned and
	// registered with the kernel); any other memory works, by a slower path.
	Buf []byte

	// Fixed, where it is not 0, is 1 + the place of a buffer that a driver has registered
	// with the ring of this reactor and that holds the data instead of Buf, which is nil.
	// Nobody in this process can see such bytes: only a device that says so by
	// [FixedBuffers] is given them, and of its requests only those that suit. It may end one
	// with StatusNotSupported, having moved some of the bytes or none; the same request with
	// Buf is good then.
	Fixed uint16

	// Context names the metadata context of OpExtents.
	Context string
	// Extents receives the result of OpExtents: the device appends to
	// Extents[:0] and never beyond its capacity. The result may cover less than
	// the range (at least one extent); without FlagOneExtent the last extent may
	// end past it.
	Extents []Extent

	// Timing, where it is not nil, takes down where the time of the request goes;
	// see [Timing]. A layer that passes a request of its own down marks the stages of
	// the one it was given, and leaves Timing nil in its own or hands it on.
	Timing *Timing

	// Done is called once, on the reactor that submitted the request. It is set
	// when the Request is made, not per submission, so that nothing is allocated.
	Done func(*Request)
}

// Complete ends the request with status s. It is called by the layer that did
// the work, on the reactor that submitted the request, not inside Submit.
func (r *Request) Complete(s Status) {
	r.Status = s
	r.Done(r)
}

// DataBytes is how many bytes of data move with the request: none but with a read or
// write.
func (r *Request) DataBytes() uint64 {
	if r.Op == OpRead || r.Op == OpWrite {
		return r.Length
	}
	return 0
}

// Modifies reports whether the operation changes what a device stores.
func (r *Request) Modifies() bool {
	return r.Op == OpWrite || r.Op == OpDiscard || r.Op == OpWriteZeroes
}
