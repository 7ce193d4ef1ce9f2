package harness

import (
	"sort"
	"sync"
	"time"
)

// samplePeriod is short against a window of a second and long against the cost
// of a sample, which reads some twenty files in /proc: below 0.5 % of a CPU.
const samplePeriod = 50 * time.Millisecond

// sample is the CPU time of one process tree at one moment.
type sample struct {
	at       time.Time
	seconds  float64
	resident uint64
}

// sampler follows a process tree, or the kernel's workers.
type sampler struct {
	use  func() (cpuSeconds float64, residentBytes uint64) // nil: nothing to follow
	quit chan struct{}
	done sync.WaitGroup

	mu      sync.Mutex // held over use, too
	samples []sample
}

// startSampler follows pid until Stop; pid 0 yields no samples.
func startSampler(pid int) *sampler {
	if pid == 0 {
		return new(sampler)
	}
	return startUse(func() (float64, uint64) { return treeUse(pid) }, samplePeriod)
}

// startUse asks use every period until Stop.
func startUse(use func() (float64, uint64), period time.Duration) *sampler {
	s := &sampler{use: use, quit: make(chan struct{})}
	s.done.Add(1)
	go func() { // ends when quit closes
		defer s.done.Done()
		ticker := time.NewTicker(period)
		defer ticker.Stop()
		for {
			s.take()
			select {
			case <-ticker.C:
			case <-s.quit:
				return
			}
		}
	}()
	return s
}

func (s *sampler) take() {
	if s.use == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := time.Now()
	seconds, resident := s.use()
	// The last sample of an ended tree would go back to 0.
	if n := len(s.samples); n > 0 && seconds < s.samples[n-1].seconds {
		return
	}
	s.samples = append(s.samples, sample{at: before.Add(time.Since(before) / 2), seconds: seconds, resident: resident})
}

// Stop ends the sampling.
func (s *sampler) Stop() {
	if s.use != nil {
		close(s.quit)
		s.done.Wait()
	}
}

// Rate is the CPU time used per second between from and to, read between
// samples, and the largest resident memory seen. Where the samples end earlier
// than the window so does the rate; ok is false when they cover less than half.
func (s *sampler) Rate(from, to time.Time) (rate float64, resident uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.samples {
		resident = max(resident, x.resident)
	}
	if len(s.samples) < 2 || from.IsZero() || !to.After(from) {
		return 0, resident, false
	}
	window := to.Sub(from)
	if first := s.samples[0].at; from.Before(first) {
		from = first
	}
	if last := s.samples[len(s.samples)-1].at; to.After(last) {
		to = last
	}
	if covered := to.Sub(from); covered <= 0 || covered < window/2 {
		return 0, resident, false
	}
	return (s.secondsLocked(to) - s.secondsLocked(from)) / to.Sub(from).Seconds(), resident, true
}

// secondsLocked reads the CPU time at a moment the samples cover.
func (s *sampler) secondsLocked(at time.Time) float64 {
	i := sort.Search(len(s.samples), func(i int) bool { return !s.samples[i].at.Before(at) })
	if i == 0 || i == len(s.samples) {
		return s.samples[min(i, len(s.samples)-1)].seconds
	}
	a, b := s.samples[i-1], s.samples[i]
	part := at.Sub(a.at).Seconds() / b.at.Sub(a.at).Seconds()
	return a.seconds + (b.seconds-a.seconds)*part
}
