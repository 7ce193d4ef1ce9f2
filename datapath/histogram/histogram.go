// Package histogram counts durations in buckets whose width grows with their
// value, so that one small array covers a nanosecond and an hour with the same
// relative error.
//
// Every power of two of nanoseconds is cut into 16 equal buckets: a quantile is
// right within 1/16 of its value. The buckets are the same everywhere, so that
// histograms can be added and subtracted.
package histogram

import (
	"fmt"
	"math/bits"
	"slices"
	"time"
)

const (
	subBits  = 4            // buckets a power of two, as a power of two: an error of 1/16
	subCount = 1 << subBits // buckets a power of two
	bitsMax  = 42           // the last bucket ends at 2^42 ns, 73 minutes, and takes everything longer

	// BucketCount is the number of buckets.
	BucketCount = (bitsMax - subBits + 1) * subCount
)

// index is the bucket of a duration. Bucket i takes (upper(i-1), upper(i)], so
// that a power of two is the last value of its bucket, as Prometheus' "le" wants.
func index(ns uint64) int {
	if ns == 0 {
		return 0
	}
	ns--
	if ns < subCount {
		return int(ns)
	}
	shift := bits.Len64(ns) - subBits - 1
	return min((shift+1)<<subBits+int(ns>>shift)-subCount, BucketCount-1)
}

// upper is the largest duration bucket i takes.
func upper(i int) uint64 {
	if i < subCount {
		return uint64(i) + 1
	}
	shift := i>>subBits - 1
	return uint64(i&(subCount-1)+subCount+1) << shift
}

// Histogram counts durations. The zero value is ready for use; it is a plain value
// of one owner.
type Histogram struct {
	Buckets [BucketCount]uint64
	Count   uint64
	Sum     time.Duration
	Max     time.Duration // longest; kept by Sub, which cannot know better
}

// Record counts one duration; a negative one counts as 0. It allocates nothing.
func (h *Histogram) Record(d time.Duration) {
	d = max(d, 0)
	h.Buckets[index(uint64(d))]++
	h.Count++
	h.Sum += d
	h.Max = max(h.Max, d)
}

// Bounds are those of bucket i in nanoseconds: it has the durations of at least
// low and less than high. The last one also has all that are longer.
func Bounds(i int) (low, high uint64) {
	if i > 0 {
		low = upper(i-1) + 1
	}
	return low, upper(i) + 1
}

// Add adds the content of o.
func (h *Histogram) Add(o *Histogram) {
	for i, n := range o.Buckets {
		h.Buckets[i] += n
	}
	h.Count += o.Count
	h.Sum += o.Sum
	h.Max = max(h.Max, o.Max)
}

// Sub leaves what was counted since o, an earlier state of the same histogram.
func (h *Histogram) Sub(o *Histogram) {
	for i, n := range o.Buckets {
		h.Buckets[i] -= n
	}
	h.Count -= o.Count
	h.Sum -= o.Sum
}

// Packed is a histogram in little memory: the buckets between the first and the last
// that are used. It does not change.
type Packed struct {
	first    int // bucket of buckets[0]
	buckets  []uint64
	count    uint64
	sum, max time.Duration
}

// Count is how many durations it has.
func (p *Packed) Count() uint64 { return p.count }

// Pack is what h has, for keeping.
func (h *Histogram) Pack() Packed {
	p := Packed{count: h.Count, sum: h.Sum, max: h.Max}
	if h.Count == 0 {
		return p
	}
	last := BucketCount - 1
	for h.Buckets[last] == 0 {
		last--
	}
	for h.Buckets[p.first] == 0 {
		p.first++
	}
	p.buckets = slices.Clone(h.Buckets[p.first : last+1])
	return p
}

// AddPacked adds the content of p.
func (h *Histogram) AddPacked(p *Packed) {
	for i, n := range p.buckets {
		h.Buckets[p.first+i] += n
	}
	h.Count += p.count
	h.Sum += p.sum
	h.Max = max(h.Max, p.max)
}

// Mean is the average duration, 0 when nothing was counted.
func (h *Histogram) Mean() time.Duration {
	if h.Count == 0 {
		return 0
	}
	return h.Sum / time.Duration(h.Count)
}

// Quantile is a duration that the fraction q of all durations does not exceed,
// estimated within a bucket by its share and never above Max. It is 0 when
// nothing was counted.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.Count == 0 {
		return 0
	}
	rank := min(max(q, 0), 1) * float64(h.Count)
	var below uint64
	for i, n := range h.Buckets {
		if n == 0 || float64(below+n) < rank {
			below += n
			continue
		}
		if i == BucketCount-1 {
			return h.Max
		}
		var low uint64
		if i > 0 {
			low = upper(i - 1)
		}
		share := (rank - float64(below)) / float64(n)
		return min(time.Duration(float64(low)+share*float64(upper(i)-low)), h.Max)
	}
	return h.Max
}

// AtMost is how many durations were not longer than d, rounded up to the end of
// d's bucket. It is exact for powers of two of nanoseconds.
func (h *Histogram) AtMost(d time.Duration) uint64 {
	if d < 0 {
		return 0
	}
	var count uint64
	for _, n := range h.Buckets[:index(uint64(d))+1] {
		count += n
	}
	return count
}

// Export is the histogram as Prometheus wants a histogram: how many durations
// were not longer than each bound, by the bound in seconds. The bounds are the
// powers of two of nanoseconds from low to high, rounded up, each factor (a power of
// two) times the one before; counts there are exact.
func (h *Histogram) Export(low, high time.Duration, factor uint64) map[float64]uint64 {
	out := make(map[float64]uint64)
	for bound := roundUp(low); ; bound *= factor {
		out[time.Duration(bound).Seconds()] = h.AtMost(time.Duration(bound))
		if bound >= uint64(max(high, 1)) || bound >= 1<<bitsMax {
			return out
		}
	}
}

func roundUp(d time.Duration) uint64 { return 1 << bits.Len64(uint64(max(d, 1))-1) }

// String is a line for people.
func (h *Histogram) String() string {
	return fmt.Sprintf("n=%d mean=%v p50=%v p99=%v p99.9=%v max=%v",
		h.Count, h.Mean(), h.Quantile(0.5), h.Quantile(0.99), h.Quantile(0.999), h.Max)
}
