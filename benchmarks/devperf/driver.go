package main

import (
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/internal/load"
)

// target is what a load runs on.
type target interface {
	Size() uint64                                      // bytes
	Open(p load.Pattern, jobIndex int) (driver, error) // one per job
	Close() error                                      // after all drivers
}

// driver carries the requests of one job.
type driver interface {
	// Run keeps the pattern's depth in flight until s.end, then waits for what
	// is in flight. Only completions between s.begin and s.end are recorded.
	Run(g *load.Generator, m *load.Meter, s schedule) error
	Close() error
}

// schedule is the time table of a run, the same for each job.
type schedule struct {
	begin time.Time // ramp until here
	end   time.Time
}

const (
	replyMax = 10 * time.Second // a device that answers nothing for so long is taken for hung
	wakeUp   = time.Second      // how often a waiting job looks at the clock
)
