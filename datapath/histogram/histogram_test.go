package histogram

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
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
	var s Snapshot
	h.AddTo(&s)
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
	var before, after Snapshot
	h.AddTo(&before)
	h.Record(time.Millisecond)
	h.Record(-1)
	h.AddTo(&after)
	sum := before
	sum.Add(&after)
	if sum.Count != 4 || sum.Sum != 2*time.Microsecond+time.Millisecond {
		t.Errorf("sum has %d, %v", sum.Count, sum.Sum)
	}
	after.Sub(&before)
	if after.Count != 2 || after.Sum != time.Millisecond || after.AtMost(time.Microsecond) != 1 {
		t.Errorf("difference has %d, %v", after.Count, after.Sum)
	}
	var empty Snapshot
	if empty.Quantile(0.5) != 0 || empty.Mean() != 0 {
		t.Error("an empty snapshot has durations")
	}
}

func TestExportIsCumulativeAndExact(t *testing.T) {
	var h Histogram
	for _, d := range []time.Duration{1024, 1025, 2048, 4096, time.Hour * 2} {
		h.Record(d)
	}
	var s Snapshot
	h.AddTo(&s)
	got := s.Export(1000, 4096)
	want := map[float64]uint64{1024e-9: 1, 2048e-9: 3, 4096e-9: 4}
	if len(got) != len(want) {
		t.Fatalf("bounds %v, want %v", got, want)
	}
	for bound, n := range want {
		if got[time.Duration(math.Round(bound*1e9)).Seconds()] != n {
			t.Errorf("le %v: got %v, want %d", bound, got, n)
		}
	}
}

func TestReadersRunBesideTheWriter(t *testing.T) {
	var h Histogram
	const count = 20000
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range count {
			h.Record(time.Duration(i))
		}
	})
	var last uint64
	for last < count {
		var s Snapshot
		h.AddTo(&s)
		if s.Count < last {
			t.Fatalf("count went from %d to %d", last, s.Count)
		}
		last = s.Count
	}
	wg.Wait()
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
