package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const block = datapath.BlockSize

func write(offset uint64, blocks int) *datapath.Request {
	length := uint64(blocks) * block
	return &datapath.Request{Op: datapath.OpWrite, Offset: offset, Length: length, Buf: make([]byte, length)}
}

func read(offset uint64, blocks int) *datapath.Request {
	r := write(offset, blocks)
	r.Op = datapath.OpRead
	return r
}

func closeDevice(t *testing.T, d datapath.Device) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestStatsCountByOperation(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 2)
	below := fault(t, memory(t, memdev.Config{}), FaultConfig{Rules: []FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, After: 2}}})
	d := NewStats(below, StatsConfig{})
	defer closeDevice(t, d)
	a, b := devtest.NewClient(t, reactors[0], d, 8), devtest.NewClient(t, reactors[1], d, 8)
	a.Do(write(0, 1), write(block, 3))
	b.Do(write(0, 5), &datapath.Request{Op: datapath.OpFlush})
	b.Read(0, 2*block)
	b.Close() // its counts stay
	a.Read(0, block)
	s := d.Snapshot()
	for _, test := range []struct {
		op                   datapath.Op
		count, errors, bytes uint64
	}{
		{datapath.OpWrite, 3, 1, 4 * block},
		{datapath.OpRead, 2, 0, 3 * block},
		{datapath.OpFlush, 1, 0, 0},
		{datapath.OpDiscard, 0, 0, 0},
	} {
		got := s.Op(test.op)
		if got.Count != test.count || got.Errors != test.errors || got.Bytes != test.bytes || got.InFlight != 0 || got.Latency.Count != test.count {
			t.Errorf("%s: count %d, errors %d, bytes %d, in flight %d, latencies %d, want %d, %d, %d, 0, %d",
				test.op, got.Count, got.Errors, got.Bytes, got.InFlight, got.Latency.Count, test.count, test.errors, test.bytes, test.count)
		}
	}
	a.Close()
	if again := d.Snapshot(); again.Op(datapath.OpWrite).Count != 3 || again.Op(datapath.OpRead).Count != 2 {
		t.Error("counts went when the queues closed")
	}
}

func TestStatsMeasureAndShowWhatIsInFlight(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	hang := fault(t, memory(t, memdev.Config{}), FaultConfig{Rules: []FaultRule{{Action: FaultHang, Count: 3}}})
	d := NewStats(hang, StatsConfig{})
	defer closeDevice(t, d)
	c := devtest.NewClient(t, reactors[0], d, 8)
	wait := c.Start(read(0, 1), read(block, 1), write(0, 1), write(block, 1))
	for hang.Hanging() != 3 {
		time.Sleep(time.Millisecond)
	}
	// The fourth request may still be on its way out.
	for deadline := time.Now().Add(10 * time.Second); d.Snapshot().InFlight() != 3; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d in flight, want the 3 that hang", d.Snapshot().InFlight())
		}
	}
	time.Sleep(20 * time.Millisecond)
	hang.Release()
	wait()
	s := d.Snapshot()
	if q := s.Op(datapath.OpRead).Latency.Quantile(0.5); q < 20*time.Millisecond {
		t.Errorf("reads that hung for 20ms took %v", q)
	}
	if n := d.Snapshot().InFlight(); n != 0 {
		t.Errorf("%d in flight at rest", n)
	}
	c.Close()
}
