package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
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

// bottom is what the filters of d stand on.
func bottom(d datapath.Device) datapath.Device {
	for {
		below, ok := d.(interface{ Unwrap() datapath.Device })
		if !ok {
			return d
		}
		d = below.Unwrap()
	}
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
				Resize: func(d datapath.Device, size uint64) error { return bottom(d).(*memdev.Device).Resize(size) },
			})
			if test.name != "all" {
				return
			}
			// On a disk that loses power: what a flush or FUA promises reaches it through each of them.
			t.Run("loss of power", func(t *testing.T) {
				devtest.Run(t, func(t *testing.T) datapath.Device {
					return test.make(t, memdisk.New(memdisk.Config{Size: 8 << 20}))
				}, devtest.Options{
					Engines:       epoll,
					DiscardZeroes: true,
					Crash: func(t *testing.T, d datapath.Device) datapath.Device {
						disk := bottom(d).(*memdisk.Disk)
						if err := d.Close(); err != nil {
							t.Fatal(err)
						}
						disk.CrashLose()
						return test.make(t, disk)
					},
				})
			})
		})
	}
}
