package observe

import (
	"testing"
	"time"
)

func TestBucketsCoverAllDurationsOnce(t *testing.T) {
	var lower time.Duration
	for i := range BucketCount {
		upper := Upper(i)
		if upper <= lower {
			t.Fatalf("bucket %d ends at %d, the one before at %d", i, upper, lower)
		}
		for _, ns := range []time.Duration{lower + 1, upper} {
			if got := bucket(uint64(ns)); got != i {
				t.Errorf("%d ns are in bucket %d, want %d", ns, got, i)
			}
		}
		if width := upper - lower; lower >= 1024 && width*8 > lower {
			t.Errorf("bucket %d is %d ns wide above %d", i, width, lower)
		}
		lower = upper
	}
	if got := Upper(BucketCount - 1); got != 1<<35 {
		t.Errorf("the last bucket ends at %d", got)
	}
	for _, ns := range []uint64{1<<35 + 1, 1 << 62, ^uint64(0)} {
		if got := bucket(ns); got != BucketCount-1 {
			t.Errorf("%d ns are in bucket %d", ns, got)
		}
	}
	if bucket(0) != 0 {
		t.Error("0 ns are not in the first bucket")
	}
}

func TestHistogramAnswers(t *testing.T) {
	var h Histogram
	if h.Quantile(0.5) != 0 || h.Count() != 0 || h.AtMost(time.Hour) != 0 {
		t.Error("an empty histogram has something in it")
	}
	for ns := uint64(1); ns <= 4096; ns++ {
		h.Counts[bucket(ns)]++
		h.Sum += ns
	}
	for _, tt := range []struct {
		q    float64
		want time.Duration
	}{{0, 0}, {0.25, 1024}, {0.5, 2048}, {1, 4096}, {2, 4096}} {
		if got := h.Quantile(tt.q); got < tt.want-tt.want/8 || got > tt.want+tt.want/8 {
			t.Errorf("quantile %v is %d, want about %d", tt.q, got, tt.want)
		}
	}
	for _, d := range []time.Duration{128, 1024, 2048, 4096} {
		if got := h.AtMost(d); got != uint64(d) {
			t.Errorf("%d were at most %d", got, d)
		}
	}
	if h.AtMost(-1) != 0 || h.AtMost(time.Hour) != 4096 {
		t.Error("bounds")
	}
	earlier := h
	h.Add(&earlier)
	if h.Count() != 8192 || h.Sum != 2*earlier.Sum {
		t.Errorf("added: %d, %d", h.Count(), h.Sum)
	}
	h.Sub(&earlier)
	if h != earlier {
		t.Error("what was added was not what was taken away")
	}
	var long Histogram
	long.Counts[BucketCount-1] = 1
	if long.Quantile(1) != 1<<35 || long.Quantile(0.5) < 1<<34 {
		t.Errorf("%v", long.Quantile(0.5))
	}
}
