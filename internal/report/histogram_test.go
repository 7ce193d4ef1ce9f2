package report

import (
	"encoding/json"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestQuantilesComeFromBuckets(t *testing.T) {
	h := histogramOf(&controlpb.Histogram{Count: 100, SumNs: 99*1000 + 50_000, LowerNs: []uint64{0, 48_000}, UpperNs: []uint64{1000, 52_000}, Counts: []uint64{99, 1}})
	for _, tt := range []struct {
		q        float64
		from, to time.Duration
	}{
		{0.5, 400, 600}, {0.99, 990, 1000}, {0.999, 48_000, 52_000}, {1, 52_000, 52_000}, {0, 0, 0}, {-1, 0, 0}, {2, 52_000, 52_000},
	} {
		if got := h.Quantile(tt.q); got < tt.from || got > tt.to {
			t.Errorf("quantile %v is %v, want %v to %v", tt.q, got, tt.from, tt.to)
		}
	}
	if got := h.Mean(); got != 1490 {
		t.Errorf("mean %v", got)
	}
	var none Histogram
	if none.Quantile(0.5) != 0 || none.Mean() != 0 {
		t.Error("an empty histogram has quantiles")
	}
	b, err := json.Marshal(took2(h))
	if err != nil || string(b) != `{"h":{"count":100,"mean_ns":1490,"p50_ns":505,"p99_ns":1000,"p999_ns":51600}}` {
		t.Errorf("%s, %v", b, err)
	}
}

func took2(h Histogram) any {
	return struct {
		H Histogram `json:"h"`
	}{h}
}

func TestHistogramsThatMakeNoSenseCountNothing(t *testing.T) {
	for name, p := range map[string]*controlpb.Histogram{
		"nil":            nil,
		"no buckets":     {Count: 7, SumNs: 9},
		"no bounds":      {Count: 7, Counts: []uint64{7}},
		"bounds swapped": {Count: 7, LowerNs: []uint64{9}, UpperNs: []uint64{3}, Counts: []uint64{7}},
	} {
		if h := histogramOf(p); h.Count != 0 || h.SumNS != 0 || h.Quantile(0.99) != 0 {
			t.Errorf("%s: %+v", name, h)
		}
	}
	h := histogramOf(&controlpb.Histogram{LowerNs: []uint64{5, 1, 8}, UpperNs: []uint64{6, 2, 9}, Counts: []uint64{1, 1, 1}})
	if h.Count != 2 {
		t.Errorf("a bucket out of order was counted: %+v", h)
	}
	if plus(math.MaxUint64, 1) != math.MaxUint64 || less(1, 2) != 0 {
		t.Error("counts wrap")
	}
}

// TestSubtractionUndoesAddition: what was counted later is what the difference holds.
func TestSubtractionUndoesAddition(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) Histogram {
			var h Histogram
			for i := range uint64(8) {
				if n := rapid.Uint64Range(0, 5).Draw(t, name); n > 0 {
					h.buckets = append(h.buckets, bucket{i * 10, i*10 + 9, n})
					h.Count += n
					h.SumNS += n * (i*10 + 5)
				}
			}
			return h
		}
		a, b := draw("a"), draw("b")
		sum := a.plus(b)
		if sum.Count != a.Count+b.Count || sum.SumNS != a.SumNS+b.SumNS {
			t.Fatalf("%+v + %+v is %+v", a, b, sum)
		}
		back := sum.minus(a)
		if back.Count != b.Count || back.SumNS != b.SumNS || len(back.buckets) != len(b.buckets) {
			t.Fatalf("%+v + %+v - the first is %+v", a, b, back)
		}
		last := time.Duration(0)
		for q := 0.0; q <= 1; q += 0.1 {
			if d := sum.Quantile(q); d < last {
				t.Fatalf("quantile %v is less than the one before", q)
			} else {
				last = d
			}
		}
	})
}

// FuzzHistogram: a daemon of another version may send anything.
func FuzzHistogram(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6}, []byte{9, 9, 9})
	f.Add([]byte{}, []byte{255, 0, 255})
	f.Fuzz(func(t *testing.T, one, other []byte) {
		read := func(b []byte) *controlpb.Histogram {
			p := &controlpb.Histogram{}
			for i, v := range b {
				n := uint64(v)
				if v > 250 {
					n = math.MaxUint64 - uint64(i)
				}
				switch i % 4 {
				case 0:
					p.LowerNs = append(p.LowerNs, n)
				case 1:
					p.UpperNs = append(p.UpperNs, n)
				case 2:
					p.Counts = append(p.Counts, n)
				default:
					p.SumNs += n
				}
			}
			return p
		}
		a, b := histogramOf(read(one)), histogramOf(read(other))
		for _, h := range []Histogram{a, b, a.plus(b), a.minus(b)} {
			if h.Quantile(0.99) < 0 || h.Mean() < 0 {
				t.Fatalf("negative: %+v", h)
			}
		}
	})
}
