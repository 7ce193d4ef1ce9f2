package fuse_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse"
)

// TestRequestsAreTimedFromReadToAnswer: each request of a device that records stages is
// received and replied to.
func TestRequestsAreTimedFromReadToAnswer(t *testing.T) {
	require(t)
	timed := filter.NewStats(memory(t, memdev.Config{Size: 64 << 20}), filter.StatsConfig{})
	c := complete(t, fuse.Config{Device: timed, Loop: fuse.AnyLoop, Reactors: reactors(t, 1, reactor.EngineRing)})
	target, err := fuse.Start(within(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, target) })
	f := openDevice(t, target.Path())
	b := aligned(t, 64<<10)
	fd := int(f.Fd())
	for range 3 {
		if _, err := unix.Pwrite(fd, b, 8192); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pread(fd, b, 8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Fdatasync(fd); err != nil {
		t.Fatal(err)
	}
	all := timed.Snapshot()
	for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite, datapath.OpFlush} {
		o := all.Op(op)
		for _, stage := range []datapath.Stage{datapath.StageReceive, datapath.StageQueue, datapath.StageReply} {
			if h := o.Stages[stage]; h == nil || h.Count != o.Count || o.Count == 0 {
				t.Errorf("%v: %v is not in all of %d requests", op, stage, o.Count)
			}
		}
	}
}
