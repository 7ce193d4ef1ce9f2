package histogram

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestBucketsAreContiguousAndHoldTheirBounds(t *testing.T) {
	for i := range BucketCount {
		if got := index(upper(i)); got != i {
			t.Fatalf("upper bound %d of bucket %d falls into %d", upper(i), i, got)
		}
		if i < BucketCount-1 {
			if got := index(upper(i) + 1); got != i+1 {
				t.Fatalf("%d, one past bucket %d, falls into %d", upper(i)+1, i, got)
			}
		}
	}
	if index(0) != 0 || index(1) != 0 || index(math.MaxUint64) != BucketCount-1 {
		t.Error("ends are wrong")
	}
	if upper(BucketCount-1) != 1<<bitsMax {
		t.Errorf("the last bucket ends at %d, want 2^%d", upper(BucketCount-1), bitsMax)
	}
}

func TestBucketErrorIsBelowOneSixteenth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ns := rapid.Uint64Range(1, 1<<bitsMax).Draw(t, "ns")
		u := upper(index(ns))
		if u < ns || float64(u-ns) > float64(ns)/subCount {
			t.Fatalf("%d counts as up to %d", ns, u)
		}
	})
}

func TestQuantilesAgreeWithSorting(t *testing.T) {
	const seed = 7
	rng := rand.New(rand.NewPCG(seed, 0))
	var h Histogram
	var all []time.Duration
	for range 20000 {
		d := time.Duration(math.Exp(rng.NormFloat64()*1.5 + 11)) // around 60 µs, long tail
		all = append(all, d)
		h.Record(d)
	}
	slices.Sort(all)
	s := h
	for _, q := range []float64{0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1} {
		want := all[min(int(q*float64(len(all))), len(all)-1)]
		got := s.Quantile(q)
		if math.Abs(float64(got-want)) > float64(want)/subCount+1 {
			t.Errorf("seed %d: quantile %v is %v, want %v", seed, q, got, want)
		}
	}
	if s.Max != all[len(all)-1] || s.Count != uint64(len(all)) {
		t.Errorf("max %v count %d, want %v %d", s.Max, s.Count, all[len(all)-1], len(all))
	}
}

func TestSnapshotsAddAndSubtract(t *testing.T) {
	var h Histogram
	h.Record(time.Microsecond)
	before := h
	h.Record(time.Millisecond)
	h.Record(-1)
	after := h
	sum := before
	sum.Add(&after)
	if sum.Count != 4 || sum.Sum != 2*time.Microsecond+time.Millisecond {
		t.Errorf("sum has %d, %v", sum.Count, sum.Sum)
	}
	after.Sub(&before)
	if after.Count != 2 || after.Sum != time.Millisecond || after.AtMost(time.Microsecond) != 1 {
		t.Errorf("difference has %d, %v", after.Count, after.Sum)
	}
	var empty Histogram
	if empty.Quantile(0.5) != 0 || empty.Mean() != 0 {
		t.Error("an empty histogram has durations")
	}
}

func TestExportIsCumulativeAndExact(t *testing.T) {
	var h Histogram
	for _, d := range []time.Duration{1024, 1025, 2048, 4096, time.Hour * 2} {
		h.Record(d)
	}
	s := h
	got := s.Export(1000, 4096, 2)
	want := map[float64]uint64{1024e-9: 1, 2048e-9: 3, 4096e-9: 4}
	if coarse := s.Export(1000, 4096, 4); len(coarse) != 2 {
		t.Errorf("every second bound: %v", coarse)
	}
	if len(got) != len(want) {
		t.Fatalf("bounds %v, want %v", got, want)
	}
	for bound, n := range want {
		if got[time.Duration(math.Round(bound*1e9)).Seconds()] != n {
			t.Errorf("le %v: got %v, want %d", bound, got, n)
		}
	}
}

func TestBoundsAreContiguousAndHoldWhatIsRecorded(t *testing.T) {
	next := uint64(0)
	for i := range BucketCount {
		low, high := Bounds(i)
		if low != next || high <= low {
			t.Fatalf("bucket %d is [%d, %d), want it to begin at %d", i, low, high, next)
		}
		if index(low) != i || index(high-1) != i {
			t.Fatalf("bucket %d is [%d, %d), whose ends fall into %d and %d", i, low, high, index(low), index(high-1))
		}
		next = high
	}
}

func TestPackedHistogramsHaveTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h, sum Histogram
		for _, ns := range rapid.SliceOf(rapid.Int64Range(-1, 1<<43)).Draw(t, "ns") {
			h.Record(time.Duration(ns))
		}
		p := h.Pack()
		sum.AddPacked(&p)
		if sum != h || p.Count() != h.Count {
			t.Fatalf("packed and unpacked: %v, before: %v", sum.String(), h.String())
		}
		sum.AddPacked(&p)
		twice := h
		twice.Add(&h)
		if sum != twice {
			t.Fatalf("added twice: %v, want %v", sum.String(), twice.String())
		}
	})
}

func TestRecordAllocatesNothing(t *testing.T) {
	var h Histogram
	if n := testing.AllocsPerRun(1000, func() { h.Record(12345) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	var h Histogram
	for b.Loop() {
		h.Record(54321)
	}
}
