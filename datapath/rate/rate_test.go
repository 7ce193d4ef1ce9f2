package rate

import (
	"testing"
	"time"
)

// TestBucketKeepsItsRate drives the decision itself, with a clock of its own.
func TestBucketKeepsItsRate(t *testing.T) {
	for _, test := range []struct {
		name              string
		rate, burst, each uint64
		first             uint64
		late              int64 // nanoseconds by which every turn is taken late
	}{
		{"requests, burst of one", 1000, 1, 1, 1, 0},
		{"requests, burst of ten", 1000, 10, 1, 1, 0},
		{"late timers are made up for", 10000, 50, 1, 1, 900_000},
		{"bytes", 1 << 20, 64 << 10, 4096, 0, 0},
		{"requests larger than the burst", 1 << 20, 4096, 1 << 18, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			var b bucket
			b.init(test.rate, test.burst, test.first)
			now, tokens := int64(0), uint64(0)
			const span = int64(20 * time.Second)
			for now < span {
				turn := b.take(now, test.each)
				tokens += test.each
				if turn > now {
					now = turn + test.late
				}
			}
			want := test.rate*uint64(span/int64(time.Second)) + test.burst
			if tokens < want*99/100 || tokens > want+want/100+2*test.each {
				t.Errorf("%d tokens in %v, want %d", tokens, time.Duration(span), want)
			}
		})
	}
}

func TestIdleBucketSavesNoMoreThanItsBurst(t *testing.T) {
	var b bucket
	b.init(1000, 5, 1)
	now := int64(time.Hour)
	at := 0
	for b.take(now, 1) <= now {
		at++
	}
	if at != 5 {
		t.Errorf("%d requests at once after an hour, want 5", at)
	}
}

func TestNoLimitsAreNoTurns(t *testing.T) {
	if New(Limits{BurstRequests: 5}) != nil {
		t.Error("something holds requests back to no rate")
	}
	turns := New(Limits{BytesPerSecond: 1000, BurstBytes: 1})
	if at := turns.Next(0, 0); at != 0 {
		t.Errorf("a request without bytes waits until %d", at)
	}
}
