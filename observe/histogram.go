package observe

import (
	"math/bits"
	"time"
)

const (
	unitBits = 7 // the narrowest buckets are 128 ns wide
	subBits  = 3 // above 1024 ns, buckets a power of two, as a power of two

	// BucketCount is the number of buckets of a histogram. The last one ends at
	// 2^35 ns, 34 seconds, and takes everything longer.
	BucketCount = 208
)

// Histogram counts durations. Bucket i takes those above Upper(i-1) up to Upper(i),
// so that a power of two of nanoseconds is the last value of its bucket. The table is
// that of observe/bpf/histogram.h. The zero value is empty.
type Histogram struct {
	Sum    uint64 // nanoseconds
	Counts [BucketCount]uint64
}

// Upper is the largest duration that bucket i takes; the last one takes longer ones too.
func Upper(i int) time.Duration {
	if i < 1<<subBits {
		return time.Duration(i+1) << unitBits
	}
	shift := i>>subBits - 1
	return time.Duration(i&(1<<subBits-1)+1<<subBits+1) << (shift + unitBits)
}

// bucket is the bucket of a duration: the programs' own arithmetic.
func bucket(ns uint64) int {
	if ns > 0 {
		ns--
	}
	v := ns >> unitBits
	if v < 1<<subBits {
		return int(v)
	}
	shift := bits.Len64(v) - 1 - subBits
	return min(shift<<subBits+int(v>>shift), BucketCount-1)
}

// Count is how many durations were counted.
func (h *Histogram) Count() uint64 {
	var n uint64
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// addRaw adds what a program counted.
func (h *Histogram) addRaw(sum uint64, counts *[BucketCount]uint64) {
	h.Sum += sum
	for i, c := range counts {
		h.Counts[i] += c
	}
}

// Add adds what o counted.
func (h *Histogram) Add(o *Histogram) {
	h.Sum += o.Sum
	for i, c := range o.Counts {
		h.Counts[i] += c
	}
}

// Sub leaves what was counted since o, an earlier state of the same histogram.
func (h *Histogram) Sub(o *Histogram) {
	h.Sum -= o.Sum
	for i, c := range o.Counts {
		h.Counts[i] -= c
	}
}

// Quantile is a duration that the part q of all durations does not exceed, estimated
// within its bucket; 0 when nothing was counted.
func (h *Histogram) Quantile(q float64) time.Duration {
	count := h.Count()
	if count == 0 {
		return 0
	}
	rank := min(max(q, 0), 1) * float64(count)
	var below uint64
	for i, c := range h.Counts {
		if c == 0 || float64(below+c) < rank {
			below += c
			continue
		}
		var lower time.Duration
		if i > 0 {
			lower = Upper(i - 1)
		}
		return lower + time.Duration((rank-float64(below))/float64(c)*float64(Upper(i)-lower))
	}
	return Upper(BucketCount - 1)
}

// AtMost is how many durations were not longer than d, rounded up to the end of d's
// bucket. It is exact for powers of two of nanoseconds from 128 ns on.
func (h *Histogram) AtMost(d time.Duration) uint64 {
	if d < 0 {
		return 0
	}
	var n uint64
	for _, c := range h.Counts[:bucket(uint64(d))+1] {
		n += c
	}
	return n
}
