package pool

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
)

// A pool that is closed right after it was opened must not begin to merge behind the
// back of who closes it. The race detector tells of a keeper that decides to while Close
// waits.
func TestClosedAsSoonAsOpen(t *testing.T) {
	x := newRig(t, 16, memory(256<<20))
	x.open()
	d := x.volume("v", 32*clusterSize)
	c := devtest.NewClient(t, x.r, d, 8)
	for n := range 20 { // each with layers to merge, as a Manual pool leaves them
		for i := range uint64(32) {
			c.Write(i*clusterSize, bytes.Repeat([]byte{byte(n)}, blockSize))
		}
		if _, err := x.pool.CreateSnapshot("v", fmt.Sprint(n), nil); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 20 {
		if _, err := x.pool.DeleteSnapshot("v", fmt.Sprint(n)); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	x.close()
	x.config.Manual = false
	for range 50 {
		x.open()
		x.close()
	}
}

func TestNoJobBeginsAfterClose(t *testing.T) {
	x := newRig(t, 2, memory(16<<20))
	p := x.open()
	x.close()
	j, err := p.Scrub(0)
	if !errors.Is(err, ErrStopped) || !errors.Is(err, errClosing) {
		t.Errorf("a scrub of a closed pool: %v", err)
	}
	if j.Ended.IsZero() || j.Err == "" {
		t.Errorf("the job of a scrub that was refused goes on: %+v", j)
	}
	if p.jobs.start(func() { t.Error("a job began after Close") }) {
		t.Error("a job could begin after Close")
	}
}
