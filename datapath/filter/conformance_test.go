package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func memory(t testing.TB, c memdev.Config) *memdev.Device {
	t.Helper()
	if c.Size == 0 {
		c.Size, c.SizeMax = 8<<20, 16<<20
	}
	d, err := memdev.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func fault(t testing.TB, below datapath.Device, c FaultConfig) *Fault {
	t.Helper()
	d, err := NewFault(below, c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	limits := Limits{RequestsPerSecond: 200_000, BytesPerSecond: 8 << 30, BurstRequests: 20}
	jitter := map[datapath.Op]Latency{
		datapath.OpRead: {Jitter: 50 * time.Microsecond}, datapath.OpWrite: {Fixed: 20 * time.Microsecond, Jitter: 50 * time.Microsecond},
	}
	ring, epoll := []reactor.EngineKind{reactor.EngineRing}, []reactor.EngineKind{reactor.EngineEpoll}
	for _, test := range []struct {
		name    string
		engines []reactor.EngineKind // a filter alone has nothing to do with the engine but its timers
		make    func(t *testing.T, below datapath.Device) datapath.Device
	}{
		{"stats", ring, func(_ *testing.T, below datapath.Device) datapath.Device { return NewStats(below, StatsConfig{}) }},
		{"limit", ring, func(_ *testing.T, below datapath.Device) datapath.Device { return NewLimit(below, limits) }},
		{"delay", epoll, func(_ *testing.T, below datapath.Device) datapath.Device {
			return NewDelay(below, DelayConfig{Latency: jitter, Seed: 1})
		}},
		{"fault", epoll, func(t *testing.T, below datapath.Device) datapath.Device { return fault(t, below, FaultConfig{}) }},
		{"trace", epoll, func(_ *testing.T, below datapath.Device) datapath.Device { return NewTrace(below, 64) }},
		{"all", nil, func(t *testing.T, below datapath.Device) datapath.Device {
			below = NewDelay(NewTrace(below, 64), DelayConfig{Latency: jitter, Seed: 1})
			return NewStats(fault(t, NewLimit(NewStats(NewTrace(below, 1000), StatsConfig{}), limits), FaultConfig{}), StatsConfig{})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if raceEnabled && test.name != "all" {
				t.Skip("with the race detector only the stack of all filters runs the suite")
			}
			devtest.Run(t, func(t *testing.T) datapath.Device {
				return test.make(t, memory(t, memdev.Config{}))
			}, devtest.Options{
				Engines:       test.engines,
				DiscardZeroes: true,
				ReadOnly: func(t *testing.T) datapath.Device {
					return test.make(t, memory(t, memdev.Config{Size: 8 << 20, ReadOnly: true}))
				},
				Resize: func(d datapath.Device, size uint64) error {
					for {
						below, ok := d.(interface{ Unwrap() datapath.Device })
						if !ok {
							return d.(*memdev.Device).Resize(size)
						}
						d = below.Unwrap()
					}
				},
			})
		})
	}
}
