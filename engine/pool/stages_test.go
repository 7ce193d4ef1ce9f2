package pool

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/filter"
)

const stagePause = 20 * time.Millisecond

// stageOf is what the requests of an operation spent in a stage, and how many came
// there. The stages of all operations make up their latencies.
func stageOf(t *testing.T, d *filter.Stats, op datapath.Op, s datapath.Stage) (sum time.Duration, entered uint64) {
	t.Helper()
	o := d.Snapshot().Op(op)
	var all time.Duration
	for _, h := range o.Stages {
		if h != nil {
			all += h.Sum
		}
	}
	if all != o.Latency.Sum || o.Latency.Count != o.Count {
		t.Errorf("%s: %v in %d requests of %d, the stages together %v", op, o.Latency.Sum, o.Latency.Count, o.Count, all)
	}
	if h := o.Stages[s]; h != nil {
		return h.Sum, h.Count
	}
	return 0, 0
}

func TestStagesOfRequestsToAPool(t *testing.T) {
	slow := filter.NewDelay(memory(64<<20), filter.DelayConfig{})
	g := newRig(t, 4, slow)
	g.open()
	defer g.close()
	below := g.volume("v", 8<<20)
	d := filter.NewStats(datapath.Checked(below), filter.StatsConfig{})
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	c := devtest.NewClient(t, g.r, d, 8)
	defer c.Close()
	c.Write(0, make([]byte, 8192)) // makes the region dirty and the cluster mapped
	if sum, n := stageOf(t, d, datapath.OpWrite, datapath.StageDevice); n != 1 || sum == 0 {
		t.Errorf("the first write was at the device for %v", sum)
	}
	if _, n := stageOf(t, d, datapath.OpWrite, datapath.StageCommit); n != 0 {
		t.Error("a write without FUA was committed")
	}

	slow.Set(datapath.OpWrite, filter.Latency{Fixed: stagePause})
	c.Write(0, make([]byte, 8192))
	slow.Set(datapath.OpWrite, filter.Latency{})
	if sum, _ := stageOf(t, d, datapath.OpWrite, datapath.StageDevice); sum < stagePause {
		t.Errorf("writes to a slow disk were at the device for %v", sum)
	}
	if _, n := stageOf(t, d, datapath.OpWrite, datapath.StageFinish); n != 2 {
		t.Errorf("%d of 2 writes were finished", n)
	}

	slow.Set(datapath.OpRead, filter.Latency{Fixed: stagePause})
	c.Read(0, 4096)
	slow.Set(datapath.OpRead, filter.Latency{})
	if sum, _ := stageOf(t, d, datapath.OpRead, datapath.StageDevice); sum < stagePause {
		t.Errorf("a read of a slow disk was at the device for %v", sum)
	}
	if _, n := stageOf(t, d, datapath.OpRead, datapath.StageFinish); n != 1 {
		t.Error("a read was not verified")
	}
	c.Read(4<<20, 4096) // a hole
	if _, n := stageOf(t, d, datapath.OpRead, datapath.StageDevice); n != 1 {
		t.Errorf("%d reads came to the disk, of which one is of a hole", n)
	}

	slow.Set(datapath.OpFlush, filter.Latency{Fixed: stagePause})
	c.Flush()
	if sum, n := stageOf(t, d, datapath.OpFlush, datapath.StageCommit); n != 1 || sum < stagePause {
		t.Errorf("a flush was committed for %v", sum)
	}
	c.Do(&datapath.Request{Op: datapath.OpWrite, Flags: datapath.FlagFUA, Offset: 1 << 20, Length: 4096, Buf: make([]byte, 4096)})
	if sum, n := stageOf(t, d, datapath.OpWrite, datapath.StageCommit); n != 1 || sum < stagePause {
		t.Errorf("a write with FUA was committed for %v", sum)
	}
	slow.Set(datapath.OpFlush, filter.Latency{})

	// A change that waits for the end of a pause waits in the metadata.
	before, _ := stageOf(t, d, datapath.OpWrite, datapath.StageMetadata)
	v := below.(*device).v
	v.pause()
	wait := c.Start(&datapath.Request{Op: datapath.OpWrite, Length: 4096, Buf: make([]byte, 4096)})
	time.Sleep(stagePause)
	v.resume()
	wait()
	if sum, _ := stageOf(t, d, datapath.OpWrite, datapath.StageMetadata); sum-before < stagePause/2 {
		t.Errorf("a write that was held back was in the metadata for %v", sum-before)
	}

	// Pieces of one request: at the device while any of them is.
	c.Do(&datapath.Request{Op: datapath.OpWrite, Offset: 64 << 10, Length: 1 << 20, Buf: make([]byte, 1<<20)},
		&datapath.Request{Op: datapath.OpWrite, Offset: 100, Length: 300<<10 + 7, Buf: make([]byte, 300<<10+7)},
		&datapath.Request{Op: datapath.OpDiscard, Offset: 3<<20 + 11, Length: 1 << 20})
	c.Do(&datapath.Request{Op: datapath.OpRead, Offset: 1, Length: 1 << 20, Buf: make([]byte, 1<<20)})
	stageOf(t, d, datapath.OpWrite, datapath.StageDevice)
	stageOf(t, d, datapath.OpDiscard, datapath.StageDevice)
	if _, n := stageOf(t, d, datapath.OpRead, datapath.StageDevice); n != 2 {
		t.Errorf("%d of 2 reads came to the disk", n)
	}
}
