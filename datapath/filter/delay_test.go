package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func TestDelayByOperation(t *testing.T) {
	for _, engine := range []reactor.EngineKind{reactor.EngineRing, reactor.EngineEpoll} {
		t.Run(string(engine), func(t *testing.T) {
			reactors := devtest.Reactors(t, engine, 1)
			d := NewDelay(memory(t, memdev.Config{}), DelayConfig{
				Latency: map[datapath.Op]Latency{datapath.OpWrite: {Fixed: 30 * time.Millisecond, Jitter: time.Millisecond}},
			})
			defer closeDevice(t, d)
			c := devtest.NewClient(t, reactors[0], d, 8)
			start := time.Now()
			c.Do(write(0, 1), write(block, 1), write(2*block, 1), write(3*block, 1))
			if took := time.Since(start); took < 30*time.Millisecond || took > 500*time.Millisecond {
				t.Errorf("four writes at once, delayed by 30ms, took %v", took)
			}
			start = time.Now()
			c.Read(0, block)
			if took := time.Since(start); took > 25*time.Millisecond {
				t.Logf("a read, not delayed, took %v", took) // a busy host
			}
			d.Set(datapath.OpWrite, Latency{})
			d.Set(datapath.OpFlush, Latency{Fixed: 20 * time.Millisecond})
			start = time.Now()
			c.Flush()
			if took := time.Since(start); took < 20*time.Millisecond {
				t.Errorf("a flush, delayed by 20ms, took %v", took)
			}
			c.Close()
		})
	}
}

func TestJitterReordersAsItsSeedSays(t *testing.T) {
	order := func(seed uint64) string {
		reactors := devtest.Reactors(t, reactor.EngineRing, 1)
		trace := NewTrace(memory(t, memdev.Config{}), 64)
		d := NewDelay(trace, DelayConfig{Latency: map[datapath.Op]Latency{datapath.OpWrite: {Jitter: 20 * time.Millisecond}}, Seed: seed})
		defer closeDevice(t, d)
		c := devtest.NewClient(t, reactors[0], d, 6)
		c.Do(write(0, 1), write(block, 1), write(2*block, 1), write(3*block, 1), write(4*block, 1), write(5*block, 1))
		c.Close()
		return trace.Golden()
	}
	const submitted = "write 0+4096\nwrite 4096+4096\nwrite 8192+4096\nwrite 12288+4096\nwrite 16384+4096\nwrite 20480+4096\n"
	first := order(3)
	if first == submitted {
		t.Error("jitter kept the order")
	}
	if again := order(3); again != first {
		t.Logf("orders of one seed differ, which a busy host can cause:\n%s\n%s", first, again)
	}
}
