package reactor

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

// gapBuckets are powers of two of nanoseconds: bucket i counts turns that took
// [2^i, 2^(i+1)) ns. The last one takes the rest.
const gapBuckets = 32

// statistics are written by the reactor and read by anyone.
type statistics struct {
	thread      atomic.Int64
	used        atomic.Int64 // nanoseconds of CPU time the thread had used before it was the reactor's
	turns       atomic.Uint64
	busy        atomic.Uint64
	spun        atomic.Uint64
	slept       atomic.Uint64
	sleeps      atomic.Uint64
	completions atomic.Uint64
	enters      atomic.Uint64
	spinBudget  atomic.Int64 // nanoseconds, of the last rest
	service     atomic.Int64 // nanoseconds, as of the last rest
	gaps        [gapBuckets]atomic.Uint64
	gapMax      atomic.Int64

	// sleepSince is the beginning of the sleep under way, in nanoseconds; 0: none. It
	// belongs to slept and sleeps: while the three change, sleepChange is odd.
	sleepSince  atomic.Int64
	sleepChange atomic.Uint64

	mu     sync.Mutex    // of readers
	kernel time.Duration // of the CPU time, what was used in calls that count as sleep; never less
	slack  time.Duration // the most that was reported as slept; never less
}

// split moves the work that the kernel did for the thread inside a call that waits
// (submitting, completing) from sleep to busy: the thread's CPU time tells how much it
// is. Neither goes back from one reading to the next.
func (s *statistics) split(busy, spun, slept time.Duration) (time.Duration, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if thread := int(s.thread.Load()); thread == 0 { // it has not begun
		return busy, slept
	} else if cpu, err := threadCPU(thread); err == nil {
		s.kernel = max(s.kernel, cpu-time.Duration(s.used.Load())-busy-spun)
	}
	inside := min(s.kernel, slept)
	s.slack = max(s.slack, slept-inside)
	return busy + inside, s.slack
}

// sleepBegins and sleepEnds are called by the reactor. The clock is read while readers
// wait, so that none of them has seen more.
func (s *statistics) sleepBegins(now int64) {
	s.sleepChange.Add(1)
	s.sleepSince.Store(now)
	s.sleepChange.Add(1)
}

func (s *statistics) sleepEnds(clock func() int64) (now int64) {
	s.sleepChange.Add(1)
	now = clock()
	s.slept.Add(uint64(now - s.sleepSince.Load()))
	s.sleepSince.Store(0)
	s.sleeps.Add(1)
	s.sleepChange.Add(1)
	return now
}

// sleep is how long the reactor has slept by now, in all, and how often. A sleep under
// way counts as far as it has come: one may take days.
func (s *statistics) sleep(now func() int64) (slept time.Duration, sleeps uint64) {
	for {
		before := s.sleepChange.Load()
		if since := s.sleepSince.Load(); since != 0 {
			slept = time.Duration(max(now()-since, 0))
		} else {
			slept = 0
		}
		slept += time.Duration(s.slept.Load())
		sleeps = s.sleeps.Load()
		if before&1 == 0 && s.sleepChange.Load() == before {
			return slept, sleeps
		}
	}
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
	Busy        time.Duration // in turns that found work, and at work in the kernel
	Spun        time.Duration // looking for work
	Slept       time.Duration // asleep in the kernel
	Sleeps      uint64
	Completions uint64        // device operations ended
	Enters      uint64        // system calls to submit, to look for what has completed, or to wait
	GapMax      time.Duration // longest turn
	Gaps        [gapBuckets]uint64
	SpinBudget  time.Duration // in force now
	ServiceTime time.Duration // mean of the device: observed, else learned
}

// Stats is a snapshot; its fields are read one after the other. Any goroutine.
func (r *Reactor) Stats() Stats {
	slept, sleeps := r.stats.sleep(r.clock)
	s := Stats{
		Name:        r.config.Name,
		Engine:      r.engine.kind(),
		Thread:      int(r.stats.thread.Load()),
		Turns:       r.stats.turns.Load(),
		Busy:        time.Duration(r.stats.busy.Load()),
		Spun:        time.Duration(r.stats.spun.Load()),
		Slept:       slept,
		Sleeps:      sleeps,
		Completions: r.stats.completions.Load(),
		Enters:      r.stats.enters.Load(),
		GapMax:      time.Duration(r.stats.gapMax.Load()),
		SpinBudget:  time.Duration(r.stats.spinBudget.Load()),
		ServiceTime: time.Duration(r.stats.service.Load()),
	}
	s.Busy, s.Slept = r.stats.split(s.Busy, s.Spun, s.Slept)
	for i := range s.Gaps {
		s.Gaps[i] = r.stats.gaps[i].Load()
	}
	return s
}
