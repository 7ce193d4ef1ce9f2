package datapath

// Validate says how a device described by i must answer r before looking at
// it: StatusOK when the request is well formed. Exports call it once per client
// request, so that no store has to repeat it.
//
// The rules are those of the NBD protocol, "Error values": a change past the end
// is ENOSPC, any other access past the end is EINVAL. Offset and Length are
// compared without adding them, so nothing overflows.
func Validate(i *Info, r *Request) Status {
	if r.Op == OpFlush {
		return StatusOK
	}
	if r.Modifies() && i.ReadOnly {
		return StatusReadOnly
	}
	if r.Offset > i.Size || r.Length > i.Size-r.Offset {
		if r.Modifies() && r.Op != OpDiscard {
			return StatusNoSpace
		}
		return StatusInvalid
	}
	if m := uint64(i.MinIO); m > 1 && (r.Offset%m != 0 || r.Length%m != 0) {
		return StatusInvalid
	}
	return StatusOK
}

// PieceLength is the length of the first piece of the range [offset,
// offset+length) when it is cut at multiples of boundary (a power of two).
func PieceLength(offset, length, boundary uint64) uint64 {
	return min(length, boundary-offset&(boundary-1))
}
