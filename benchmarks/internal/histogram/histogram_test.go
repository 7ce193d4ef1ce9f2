package histogram

import (
	"math"
	"math/rand/v2"
	"sort"
	"testing"
)

func TestPercentilesStayWithinErrorMax(t *testing.T) {
	for _, c := range []struct {
		name string
		draw func(*rand.Rand) uint64
	}{
		{"uniform", func(r *rand.Rand) uint64 { return r.Uint64N(5_000_000) }},
		{"exponential", func(r *rand.Rand) uint64 { return uint64(r.ExpFloat64() * 40_000) }},
		{"tiny", func(r *rand.Rand) uint64 { return r.Uint64N(200) }},
		{"whole range", func(r *rand.Rand) uint64 { return r.Uint64() >> r.Uint64N(64) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			const seed = 7
			r := rand.New(rand.NewPCG(seed, seed))
			var h Histogram
			values := make([]uint64, 50_000)
			for i := range values {
				values[i] = c.draw(r)
				h.Record(values[i])
			}
			sort.Slice(values, func(i, j int) bool { return values[i] < values[j] })
			for _, p := range []float64{0.1, 1, 25, 50, 90, 99, 99.9, 99.99, 100} {
				rank := max(int(math.Ceil(p/100*float64(len(values)))), 1)
				want := float64(values[rank-1])
				if got := h.Percentile(p); math.Abs(got-want) > want*ErrorMax {
					t.Errorf("seed %d, p%v = %v, want %v within %.2f %%", seed, p, got, want, ErrorMax*100)
				}
			}
			if h.Min() != values[0] || h.Max() != values[len(values)-1] {
				t.Errorf("min, max = %d, %d, want %d, %d", h.Min(), h.Max(), values[0], values[len(values)-1])
			}
		})
	}
}

func TestEveryValueHasABucketThatContainsIt(t *testing.T) {
	last := -1
	for _, v := range []uint64{0, 1, 127, 128, 255, 256, 257, 511, 512, 1 << 20, 1<<20 + 1, 1 << 40, math.MaxUint64 - 1, math.MaxUint64} {
		i := bucketOf(v)
		if i < last || i >= bucketCount {
			t.Fatalf("bucket of %d is %d, after %d of %d", v, i, last, bucketCount)
		}
		last = i
		if d := math.Abs(bucketMiddle(i) - float64(v)); d > float64(v)*ErrorMax+1 {
			t.Errorf("bucket of %d reports %v", v, bucketMiddle(i))
		}
	}
}

func TestMergeEqualsRecordingTogether(t *testing.T) {
	var a, b, both Histogram
	for v := uint64(1); v < 100_000; v += 7 {
		both.Record(v)
		if v%2 == 0 {
			a.Record(v)
		} else {
			b.Record(v)
		}
	}
	a.Merge(&b)
	a.Merge(&Histogram{})
	if a.counts != both.counts || a.total != both.total || a.min != both.min || a.max != both.max {
		t.Error("merged histogram differs from one that saw every value")
	}
	a.Reset()
	if a.Count() != 0 || a.Percentile(50) != 0 || a.Mean() != 0 {
		t.Error("a reset histogram still reports values")
	}
}

func TestRecordDoesNotAllocate(t *testing.T) {
	h := new(Histogram)
	if n := testing.AllocsPerRun(1000, func() { h.Record(12345) }); n != 0 {
		t.Errorf("Record allocates %v times", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	h := new(Histogram)
	for i := range b.N {
		h.Record(uint64(i) * 97)
	}
}
