package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// completed submits reads of the given blocks for a while on every client, each at
// full depth, and returns how many ended on each.
func completed(clients []*devtest.Client, depth, blocks int, d time.Duration) []int {
	counts := make([]int, len(clients))
	done := make(chan struct{})
	for i, c := range clients {
		go func() { // ends after d
			defer func() { done <- struct{}{} }()
			for end := time.Now().Add(d); time.Now().Before(end); {
				var batch []*datapath.Request
				for range depth {
					batch = append(batch, read(0, blocks))
				}
				c.Do(batch...)
				counts[i] += depth
			}
		}()
	}
	for range clients {
		<-done
	}
	return counts
}

func total(counts []int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

func TestLimitHoldsOverAllQueuesAndIsFair(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 2)
	d := NewLimit(memory(t, memdev.Config{}), Limits{RequestsPerSecond: 2000, BurstRequests: 20})
	defer closeDevice(t, d)
	clients := []*devtest.Client{devtest.NewClient(t, reactors[0], d, 4), devtest.NewClient(t, reactors[1], d, 4), devtest.NewClient(t, reactors[1], d, 4)}
	start := time.Now()
	counts := completed(clients, 4, 1, 600*time.Millisecond)
	most := time.Since(start).Seconds()*2000 + 20
	if n := total(counts); float64(n) > most*1.02+12 || float64(n) < most*0.1 { // a busy host does less
		t.Errorf("%d requests, at most %.0f allowed", n, most)
	}
	for i, n := range counts {
		if n < total(counts)/12 {
			t.Errorf("queue %d of 3 got %d of %d requests", i, n, total(counts))
		}
	}
	if d.Waited() == 0 {
		t.Error("nothing waited")
	}
	for _, c := range clients {
		c.Close()
	}
}

func TestLimitOfBytes(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	d := NewLimit(memory(t, memdev.Config{}), Limits{BytesPerSecond: 16 << 20, BurstBytes: 64 << 10})
	defer closeDevice(t, d)
	c := devtest.NewClient(t, reactors[0], d, 4)
	start := time.Now()
	n := total(completed([]*devtest.Client{c}, 4, 16, 400*time.Millisecond))
	if got, most := float64(n*16*block), time.Since(start).Seconds()*(16<<20)+64<<10; got > most*1.02+5*64<<10 || got < most*0.1 {
		t.Errorf("%.0f bytes, at most %.0f allowed", got, most)
	}
	c.Close()
}

func TestFlushIsNotLimited(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	d := NewLimit(memory(t, memdev.Config{}), Limits{RequestsPerSecond: 1, BurstRequests: 1})
	defer closeDevice(t, d)
	c, other := devtest.NewClient(t, reactors[0], d, 4), devtest.NewClient(t, reactors[0], d, 4)
	c.Write(0, make([]byte, block)) // the burst
	wait := c.Start(write(0, 1), write(block, 1), write(2*block, 1))
	start := time.Now()
	for range 10 {
		other.Flush()
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("ten flushes behind a limit took %v", took)
	}
	start = time.Now()
	d.SetLimits(Limits{})
	wait()
	if took := time.Since(start); took > 1900*time.Millisecond {
		t.Errorf("requests waited on for %v after the limit was lifted", took)
	}
	c.Close()
	other.Close()
}

func TestLimitsChangeUnderLoad(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	d := NewLimit(memory(t, memdev.Config{}), Limits{BytesPerSecond: 1})
	defer closeDevice(t, d)
	c := devtest.NewClient(t, reactors[0], d, 8)
	c.Write(0, make([]byte, block)) // a debt of an hour
	wait := c.Start(write(0, 1), write(0, 2), write(0, 3), read(0, 4))
	d.SetLimits(Limits{RequestsPerSecond: 2, BytesPerSecond: 1})
	d.SetLimits(Limits{RequestsPerSecond: 5000, BytesPerSecond: 1 << 30})
	if got := d.Limits().RequestsPerSecond; got != 5000 {
		t.Errorf("limits say %d requests", got)
	}
	wait()
	c.Close()
}
