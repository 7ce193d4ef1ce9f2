// Package rate says when something may go on that is held to a rate.
//
// A Turns is drawn from by any number of threads without a lock. It keeps no queue
// and no clock: who has a turn in the future waits in a [Line] of its own thread, which
// asks for the turn of the first that waits only, so that those who draw take turns,
// however much each has waiting.
package rate

import (
	"math"
	"sync/atomic"
	"time"
)

// Limits are rates. 0 is no limit.
type Limits struct {
	RequestsPerSecond uint64
	BytesPerSecond    uint64

	// What may go on at once after a pause before the rate holds. It has to cover
	// what comes while a timer is late. A tenth of a second's worth when 0, and at
	// least one request.
	BurstRequests uint64
	BurstBytes    uint64
}

// Turns gives out turns.
type Turns struct{ requests, bytes bucket }

// New makes what gives out turns within limits; nil where there are none.
func New(l Limits) *Turns {
	if l.RequestsPerSecond == 0 && l.BytesPerSecond == 0 {
		return nil
	}
	t := &Turns{}
	t.requests.init(l.RequestsPerSecond, l.BurstRequests, 1)
	t.bytes.init(l.BytesPerSecond, l.BurstBytes, 0)
	return t
}

// Next is the time from which a request of the given bytes may go on; it is charged
// for. Times are nanoseconds by one clock that all who draw share. A request larger
// than the burst goes on when its turn comes, and those after it wait for that.
func (t *Turns) Next(now int64, bytes uint64) int64 {
	return max(t.requests.take(now, 1), t.bytes.take(now, bytes))
}

// bucket is a token bucket kept as one number: the time at which it will be full
// again. What is taken moves that time ahead; something may be taken as long as
// it is not further ahead than the burst.
type bucket struct {
	cost  float64 // nanoseconds a token; 0: no limit; immutable
	burst int64   // nanoseconds; immutable

	full atomic.Int64 // nanoseconds on the clock of those who draw
}

const costMax = 1 << 50 // nanoseconds, 13 days: keeps sums of a few thousand queues in range

func (b *bucket) init(rate, burst, first uint64) {
	if rate == 0 {
		return
	}
	b.cost = float64(time.Second) / float64(rate)
	if burst == 0 {
		burst = max(rate/10, 1)
	}
	b.burst = int64(math.Min(b.cost*float64(burst-min(first, burst)), costMax))
}

// take removes tokens and returns the time from which their owner may go on.
func (b *bucket) take(now int64, tokens uint64) int64 {
	if b.cost == 0 || tokens == 0 {
		return now
	}
	cost := int64(math.Min(b.cost*float64(tokens), costMax))
	for {
		full := b.full.Load()
		from := max(full, now)
		if b.full.CompareAndSwap(full, from+cost) {
			return from - b.burst
		}
	}
}
