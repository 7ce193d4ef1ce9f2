// Package histogram counts durations in buckets whose width grows with their
// value, so that one small array covers a nanosecond and an hour with the same
// relative error.
//
// Every power of two of nanoseconds is cut into 16 equal buckets: a quantile is
// right within 1/16 of its value. A [Histogram] is written by one owner and read
// by anyone; a [Snapshot] is a plain value to add, subtract and ask.
package histogram

import (
	"fmt"
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	subBits  = 4            // buckets a power of two, as a power of two: an error of 1/16
	subCount = 1 << subBits // buckets a power of two
	bitsMax  = 42           // the last bucket ends at 2^42 ns, 73 minutes, and takes everything longer

	// BucketCount is the number of buckets.
	BucketCount = (bitsMax - subBits + 1) * subCount
)

// Histogram counts durations. The zero value is ready for use. Record takes no
// lock and allocates nothing.
type Histogram struct {
	buckets [BucketCount]atomic.Uint64
	sum     atomic.Uint64 // nanoseconds
	max     atomic.Uint64 // nanoseconds
}

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

// Record counts one duration; a negative one counts as 0.
//
// Context: one goroutine at a time.
func (h *Histogram) Record(d time.Duration) {
	ns := uint64(max(d, 0))
	h.buckets[index(ns)].Add(1)
	h.sum.Add(ns)
	if ns > h.max.Load() {
		h.max.Store(ns)
	}
}

// AddTo adds what was counted so far to s. Any goroutine; counts that are being
// made meanwhile are in it or not.
func (h *Histogram) AddTo(s *Snapshot) {
	for i := range h.buckets {
		n := h.buckets[i].Load()
		s.Buckets[i] += n
		s.Count += n
	}
	s.Sum += time.Duration(h.sum.Load())
	s.Max = max(s.Max, time.Duration(h.max.Load()))
}

// Snapshot is the content of one or several histograms at a moment.
type Snapshot struct {
	Buckets [BucketCount]uint64
	Count   uint64
	Sum     time.Duration
	Max     time.Duration // longest; kept by Sub, which cannot know better
}

// Add adds the content of o.
func (s *Snapshot) Add(o *Snapshot) {
	for i, n := range o.Buckets {
		s.Buckets[i] += n
	}
	s.Count += o.Count
	s.Sum += o.Sum
	s.Max = max(s.Max, o.Max)
}

// Sub leaves what was counted since the earlier snapshot o of the same histograms.
func (s *Snapshot) Sub(o *Snapshot) {
	for i, n := range o.Buckets {
		s.Buckets[i] -= n
	}
	s.Count -= o.Count
	s.Sum -= o.Sum
}

// Mean is the average duration, 0 when nothing was counted.
func (s *Snapshot) Mean() time.Duration {
	if s.Count == 0 {
		return 0
	}
	return s.Sum / time.Duration(s.Count)
}

// Quantile is a duration that the fraction q of all durations does not exceed,
// estimated within a bucket by its share and never above Max. It is 0 when
// nothing was counted.
func (s *Snapshot) Quantile(q float64) time.Duration {
	if s.Count == 0 {
		return 0
	}
	rank := min(max(q, 0), 1) * float64(s.Count)
	var below uint64
	for i, n := range s.Buckets {
		if n == 0 || float64(below+n) < rank {
			below += n
			continue
		}
		if i == BucketCount-1 {
			return s.Max
		}
		var low uint64
		if i > 0 {
			low = upper(i - 1)
		}
		share := (rank - float64(below)) / float64(n)
		return min(time.Duration(float64(low)+share*float64(upper(i)-low)), s.Max)
	}
	return s.Max
}

// AtMost is how many durations were not longer than d, rounded up to the end of
// d's bucket. It is exact for powers of two of nanoseconds.
func (s *Snapshot) AtMost(d time.Duration) uint64 {
	if d < 0 {
		return 0
	}
	var count uint64
	for _, n := range s.Buckets[:index(uint64(d))+1] {
		count += n
	}
	return count
}

// Export is the snapshot as Prometheus wants a histogram: how many durations
// were not longer than each bound, by the bound in seconds. The bounds are the
// powers of two of nanoseconds from low to high, rounded up; counts there are
// exact.
func (s *Snapshot) Export(low, high time.Duration) map[float64]uint64 {
	out := make(map[float64]uint64)
	for bound := roundUp(low); ; bound *= 2 {
		out[time.Duration(bound).Seconds()] = s.AtMost(time.Duration(bound))
		if bound >= uint64(max(high, 1)) || bound >= 1<<bitsMax {
			return out
		}
	}
}

func roundUp(d time.Duration) uint64 { return 1 << bits.Len64(uint64(max(d, 1))-1) }

// String is a line for people.
func (s *Snapshot) String() string {
	return fmt.Sprintf("n=%d mean=%v p50=%v p99=%v p99.9=%v max=%v",
		s.Count, s.Mean(), s.Quantile(0.5), s.Quantile(0.99), s.Quantile(0.999), s.Max)
}
