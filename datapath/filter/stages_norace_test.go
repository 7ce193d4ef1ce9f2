//go:build !race

package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func TestTimingAllocatesNothing(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	d := NewStats(memory(t, memdev.Config{}), StatsConfig{Slow: NewSlowRequests(time.Nanosecond)}) // every request is slow; most are dropped
	defer closeDevice(t, d)
	s, err := newStream(r, d, 32)
	if err != nil {
		t.Fatal(err)
	}
	s.run(1000)
	// A run is a few messages to the reactor; requests add nothing to them.
	few := testing.AllocsPerRun(5, func() { s.run(100) })
	if many := testing.AllocsPerRun(5, func() { s.run(10_000) }); many > few+2 {
		t.Errorf("%v allocations for 10000 requests, %v for 100", many, few)
	}
	s.close()
}
