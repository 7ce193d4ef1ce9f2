package reactor

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// gapBuckets are powers of two of nanoseconds: bucket i counts turns that took
// [2^i, 2^(i+1)) ns. The last one takes the rest.
const gapBuckets = 32

// statistics are written by the reactor and read by anyone.
type statistics struct {
	thread      atomic.Int64
	turns       atomic.Uint64
	busy        atomic.Uint64
	spun        atomic.Uint64
	slept       atomic.Uint64
	sleeps      atomic.Uint64
	completions atomic.Uint64
	spinBudget  atomic.Int64 // nanoseconds, of the last rest
	service     atomic.Int64 // nanoseconds, as of the last rest
	gaps        [gapBuckets]atomic.Uint64
	gapMax      atomic.Int64
}

func (s *statistics) recordGap(ns int64) {
	s.gaps[min(bits.Len64(uint64(ns))-1, gapBuckets-1)].Add(1)
	if ns > s.gapMax.Load() {
		s.gapMax.Store(ns)
	}
}

// Stats is what a reactor has done since it started.
type Stats struct {
	Name        string
	Engine      EngineKind
	Thread      int           // kernel thread id
	Turns       uint64        // rounds of the loop
	Busy        time.Duration // in turns that found work
	Spun        time.Duration // looking for work
	Slept       time.Duration // asleep in the kernel
	Sleeps      uint64
	Completions uint64        // device operations ended
	GapMax      time.Duration // longest turn
	Gaps        [gapBuckets]uint64
	SpinBudget  time.Duration // in force now
	ServiceTime time.Duration // learned mean of the device
}

// Stats is a snapshot; its fields are read one after the other. Any goroutine.
func (r *Reactor) Stats() Stats {
	s := Stats{
		Name:        r.config.Name,
		Engine:      r.engine.kind(),
		Thread:      int(r.stats.thread.Load()),
		Turns:       r.stats.turns.Load(),
		Busy:        time.Duration(r.stats.busy.Load()),
		Spun:        time.Duration(r.stats.spun.Load()),
		Slept:       time.Duration(r.stats.slept.Load()),
		Sleeps:      r.stats.sleeps.Load(),
		Completions: r.stats.completions.Load(),
		GapMax:      time.Duration(r.stats.gapMax.Load()),
		SpinBudget:  time.Duration(r.stats.spinBudget.Load()),
		ServiceTime: time.Duration(r.stats.service.Load()),
	}
	for i := range s.Gaps {
		s.Gaps[i] = r.stats.gaps[i].Load()
	}
	return s
}
