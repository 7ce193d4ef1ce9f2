package report

import (
	"encoding/json"
	"math"
	"slices"
	"time"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// Histogram counts durations by bucket. The zero value is empty.
type Histogram struct {
	Count   uint64
	SumNS   uint64
	buckets []bucket // by their bounds; none is empty
}

// bucket counts durations of at least lower and at most upper nanoseconds.
type bucket struct{ lower, upper, count uint64 }

// histogramOf reads a histogram of the API. The count is that of the buckets, so that
// a quantile never looks for a request that is in none. Buckets out of order, of no
// width, or without a bound are left out.
func histogramOf(p *controlpb.Histogram) Histogram {
	n := min(len(p.GetLowerNs()), len(p.GetUpperNs()), len(p.GetCounts()))
	h := Histogram{SumNS: p.GetSumNs()}
	for i := range n {
		b := bucket{p.GetLowerNs()[i], p.GetUpperNs()[i], p.GetCounts()[i]}
		if b.count == 0 || b.upper < b.lower || len(h.buckets) > 0 && b.lower < h.buckets[len(h.buckets)-1].lower {
			continue
		}
		h.buckets = append(h.buckets, b)
		h.Count = plus(h.Count, b.count)
	}
	if h.Count == 0 {
		h.SumNS = 0
	}
	return h
}

// minus is what was counted since the earlier histogram o of the same source.
func (h Histogram) minus(o Histogram) Histogram {
	return h.with(o, less)
}

// plus is what both counted.
func (h Histogram) plus(o Histogram) Histogram { return h.with(o, plus) }

func (h Histogram) with(o Histogram, with func(a, b uint64) uint64) Histogram {
	r := Histogram{SumNS: with(h.SumNS, o.SumNS)}
	i, j := 0, 0
	add := func(b bucket, count uint64) {
		if b.count = count; count > 0 {
			r.buckets = append(r.buckets, b)
			r.Count = plus(r.Count, count)
		}
	}
	for i < len(h.buckets) || j < len(o.buckets) {
		switch {
		case j == len(o.buckets) || i < len(h.buckets) && h.buckets[i].lower < o.buckets[j].lower:
			add(h.buckets[i], with(h.buckets[i].count, 0))
			i++
		case i == len(h.buckets) || o.buckets[j].lower < h.buckets[i].lower:
			add(o.buckets[j], with(0, o.buckets[j].count))
			j++
		default:
			add(h.buckets[i], with(h.buckets[i].count, o.buckets[j].count))
			i, j = i+1, j+1
		}
	}
	if r.Count == 0 {
		r.SumNS = 0
	}
	return r
}

// Quantile is a duration that the part q of all durations does not exceed, estimated
// within its bucket; 0 when nothing was counted.
func (h Histogram) Quantile(q float64) time.Duration {
	rank := min(max(q, 0), 1) * float64(h.Count)
	var below uint64
	for i, b := range h.buckets {
		if float64(below+b.count) < rank && i < len(h.buckets)-1 {
			below += b.count
			continue
		}
		share := min(max((rank-float64(below))/float64(b.count), 0), 1)
		return nanoseconds(float64(b.lower) + share*float64(b.upper-b.lower))
	}
	return 0
}

// Mean is the average, 0 when nothing was counted.
func (h Histogram) Mean() time.Duration {
	if h.Count == 0 {
		return 0
	}
	return nanoseconds(float64(h.SumNS) / float64(h.Count))
}

// Quantiles are a histogram in a few figures.
type Quantiles struct {
	Count  uint64 `json:"count"`
	MeanNS int64  `json:"mean_ns"`
	P50NS  int64  `json:"p50_ns"`
	P99NS  int64  `json:"p99_ns"`
	P999NS int64  `json:"p999_ns"`
}

// Quantiles gives the figures that tables and JSON show.
func (h Histogram) Quantiles() Quantiles {
	return Quantiles{
		Count: h.Count, MeanNS: int64(h.Mean()),
		P50NS: int64(h.Quantile(0.5)), P99NS: int64(h.Quantile(0.99)), P999NS: int64(h.Quantile(0.999)),
	}
}

// MarshalJSON implements json.Marshaler: the figures, not the buckets.
func (h Histogram) MarshalJSON() ([]byte, error) { return json.Marshal(h.Quantiles()) }

func nanoseconds(v float64) time.Duration {
	return time.Duration(min(max(v, 0), math.MaxInt64/2))
}

// plus and less do not wrap: a counter that went back counts nothing.
func plus(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

func less(a, b uint64) uint64 {
	if a < b {
		return 0
	}
	return a - b
}

// sorted is the keys of a map in order.
func sorted[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
