package filter

import (
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

// slowWaiting is how many slow requests wait for their reader at most; when a disk
// hangs, all requests in flight end together.
const slowWaiting = 256

// SlowRequest is a request that took long.
type SlowRequest struct {
	Name           string // of the device
	Op             datapath.Op
	Status         datapath.Status
	Offset, Length uint64 // bytes
	Ended          time.Time
	Total          time.Duration
	timing         datapath.Timing
}

// StageTime is what a request spent in a stage.
type StageTime struct {
	Stage datapath.Stage
	Time  time.Duration
}

// Stages are those the request came to, in the order of the way.
func (r *SlowRequest) Stages() []StageTime { return stages(&r.timing) }

// SlowRequests takes requests that took at least a threshold, from any reactor, and
// hands them to one reader. What the reader does not take in time is dropped, and
// counted.
type SlowRequests struct {
	threshold time.Duration
	waiting   chan SlowRequest
	dropped   atomic.Uint64
}

// NewSlowRequests takes requests of at least threshold.
func NewSlowRequests(threshold time.Duration) *SlowRequests {
	return &SlowRequests{threshold: threshold, waiting: make(chan SlowRequest, slowWaiting)}
}

// add takes a request, or drops it. Reactor; nothing is allocated.
func (s *SlowRequests) add(name string, t *datapath.Timing) {
	select {
	case s.waiting <- SlowRequest{
		Name: name, Op: t.Op, Status: t.Status, Offset: t.Offset, Length: t.Length,
		Ended: time.Now(), Total: time.Duration(t.Total()), timing: *t,
	}:
	default:
		s.dropped.Add(1)
	}
}

// Waiting is where the reader takes them. It is never closed.
func (s *SlowRequests) Waiting() <-chan SlowRequest { return s.waiting }

// Dropped is how many were dropped. Any goroutine.
func (s *SlowRequests) Dropped() uint64 { return s.dropped.Load() }
