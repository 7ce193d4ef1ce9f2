package nbd

import "slices"

// clientSpansMax bounds the pieces a read may be in at once: a 32 MiB read in
// pieces of 4 KiB, in the worst order.
const clientSpansMax = 4096

type clientSpan struct{ start, end uint64 }

// clientCoverage is which bytes of a read have arrived: disjoint spans in
// ascending order, joined where they touch. Chunks in ascending order, which
// servers send, keep it at one span.
type clientCoverage struct{ spans []clientSpan }

const clientSpansKept = 64 // memory a slot keeps for its next request

func (v *clientCoverage) reset() {
	if cap(v.spans) > clientSpansKept {
		v.spans = nil
	}
	v.spans = v.spans[:0]
}

// add notes that [start, end) arrived. It reports false when part of it had
// arrived before, or when there are too many spans.
func (v *clientCoverage) add(start, end uint64) bool {
	n := len(v.spans)
	if n == 0 || start > v.spans[n-1].end { // the next at the far end
		if n == clientSpansMax {
			return false
		}
		v.spans = append(v.spans, clientSpan{start, end})
		return true
	}
	if start == v.spans[n-1].end {
		v.spans[n-1].end = end
		return true
	}
	// The first span that ends at start or behind it.
	i, _ := slices.BinarySearchFunc(v.spans, start, func(s clientSpan, start uint64) int {
		if s.end < start {
			return -1
		}
		return 1
	})
	joinsLeft := v.spans[i].end == start
	right := i
	if joinsLeft {
		right++
	}
	if right < n && v.spans[right].start < end {
		return false
	}
	joinsRight := right < n && v.spans[right].start == end
	switch {
	case joinsLeft && joinsRight:
		v.spans[i].end = v.spans[right].end
		v.spans = slices.Delete(v.spans, right, right+1)
	case joinsLeft:
		v.spans[i].end = end
	case joinsRight:
		v.spans[right].start = start
	case n == clientSpansMax:
		return false
	default:
		v.spans = slices.Insert(v.spans, i, clientSpan{start, end})
	}
	return true
}

// complete reports whether exactly [start, end) has arrived.
func (v *clientCoverage) complete(start, end uint64) bool {
	if start == end {
		return len(v.spans) == 0
	}
	return len(v.spans) == 1 && v.spans[0] == clientSpan{start, end}
}
