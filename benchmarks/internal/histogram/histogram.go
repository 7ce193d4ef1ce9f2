// Package histogram counts latencies in fixed memory: buckets grow with the
// value, so the error of a percentile is a share of the value and not a number
// of nanoseconds. Recording neither allocates nor branches on the range.
package histogram

import (
	"math"
	"math/bits"
)

const (
	// subBits sets the resolution: 2^subBits buckets for each power of two, so
	// a bucket is at most 1/128 of its values wide and its middle is at most
	// 0.4 % away from any of them.
	subBits     = 7
	subCount    = 1 << subBits
	bucketCount = (64 - subBits + 1) * subCount // every uint64 has a bucket
)

// ErrorMax is the largest relative error of a percentile.
const ErrorMax = 1.0 / (2 * subCount)

// Histogram is a log-linear histogram of non-negative values, ready to use when
// zero. One goroutine owns it; Merge joins the histograms of several.
type Histogram struct {
	counts [bucketCount]uint64
	total  uint64
	sum    float64
	min    uint64 // valid when total > 0
	max    uint64
}

// bucketOf maps a value to its bucket: values below 2*subCount have buckets of
// their own, above that the leading subBits+1 bits choose.
func bucketOf(v uint64) int {
	shift := bits.Len64(v) - subBits - 1
	if shift <= 0 {
		return int(v)
	}
	return shift<<subBits + int(v>>uint(shift))
}

// bucketMiddle is the value reported for a bucket.
func bucketMiddle(index int) float64 {
	if index < 2*subCount {
		return float64(index)
	}
	shift := uint(index>>subBits) - 1
	lowest := uint64(index&(subCount-1)|subCount) << shift
	return float64(lowest) + float64(uint64(1)<<shift-1)/2
}

// Record counts one value.
func (h *Histogram) Record(v uint64) {
	h.counts[bucketOf(v)]++
	if h.total == 0 || v < h.min {
		h.min = v
	}
	if v > h.max {
		h.max = v
	}
	h.total++
	h.sum += float64(v)
}

// Merge adds the values of other.
func (h *Histogram) Merge(other *Histogram) {
	if other.total == 0 {
		return
	}
	for i, n := range other.counts {
		h.counts[i] += n
	}
	if h.total == 0 || other.min < h.min {
		h.min = other.min
	}
	h.max = max(h.max, other.max)
	h.total += other.total
	h.sum += other.sum
}

// Reset forgets every value.
func (h *Histogram) Reset() { *h = Histogram{} }

// Count is the number of values recorded.
func (h *Histogram) Count() uint64 { return h.total }

// Max is the largest value recorded, exact.
func (h *Histogram) Max() uint64 { return h.max }

// Min is the smallest value recorded, exact, and 0 when there is none.
func (h *Histogram) Min() uint64 { return h.min }

// Mean is the arithmetic mean, and 0 when nothing was recorded.
func (h *Histogram) Mean() float64 {
	if h.total == 0 {
		return 0
	}
	return h.sum / float64(h.total)
}

// Percentile is the smallest value that at least p percent of the values do not
// exceed, within ErrorMax; 0 when nothing was recorded.
func (h *Histogram) Percentile(p float64) float64 {
	if h.total == 0 {
		return 0
	}
	rank := uint64(math.Ceil(p / 100 * float64(h.total)))
	rank = min(max(rank, 1), h.total)
	var seen uint64
	for i, n := range h.counts {
		seen += n
		if seen >= rank {
			return min(max(bucketMiddle(i), float64(h.min)), float64(h.max))
		}
	}
	return float64(h.max)
}
