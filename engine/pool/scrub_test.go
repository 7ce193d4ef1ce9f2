package pool

import (
	"errors"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// scrubTotal is what scrubRig has: 12 clusters of a snapshot, and many of its volume.
const scrubTotal = 64 << clusterShift

// scrubRig is a pool with clusters of data, one block in each.
// first and last are where blocks lie that a scrub sees first and last.
func scrubRig(t *testing.T) (g *rig, m *memdisk.Disk, first, last uint64) {
	m = memory(24 << 20)
	g = newRig(t, 2, m)
	p := g.open()
	d := g.volume("v", scrubTotal)
	q, err := openPort(g.r, d, 4)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(scrubTotal >> clusterShift) {
		if i == 12 {
			if _, err := p.CreateSnapshot("v", "s", nil); err != nil {
				t.Fatal(err)
			}
		}
		if s, err := q.one(datapath.OpWrite, datapath.FlagFUA, i*clusterSize, make([]byte, blockSize), blockSize); err != nil || s != datapath.StatusOK {
			t.Fatal(s, err)
		}
	}
	if err := errors.Join(q.close(), d.Close(), p.Maintain()); err != nil {
		t.Fatal(err)
	}
	_, first = p.address(p.volumes["v"].head.Load().parent.Load().lookup(0).cluster())
	_, last = p.address(p.volumes["v"].head.Load().lookup(scrubTotal>>clusterShift - 1).cluster())
	return g, m, first, last
}

// ended waits for the end of a scrub.
func (g *rig) ended(j Job) Job {
	g.Helper()
	j, err := g.pool.WaitJob(g.Context(), j.ID)
	if err != nil {
		g.Fatal(err)
	}
	return j
}

func (g *rig) scrub(rate uint64) Job {
	g.Helper()
	j, err := g.pool.Scrub(rate)
	if err != nil {
		g.Fatal(err)
	}
	return j
}

// scrubbed waits until the scrub that runs has done so many clusters.
func (g *rig) scrubbed(t *testing.T, clusters uint64) {
	g.Helper()
	within(t, time.Minute, "a part of a scrub", func() {
		for {
			jobs := g.pool.Jobs()
			if j := jobs[len(jobs)-1]; j.Done >= clusters<<clusterShift || !j.Ended.IsZero() {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// slow has a scrub look at 8 clusters a second: it takes seconds from where a test
// stops it to its end.
const slow = 8 << clusterShift

// TestScrubGoesOnWhereItWasStopped: with what it had done, over reopening, and then
// from the beginning again.
func TestScrubGoesOnWhereItWasStopped(t *testing.T) {
	for name, reopen := range map[string]func(g *rig){
		"stopped":          func(*rig) {},
		"stopped, reopens": func(g *rig) { g.close(); g.open() },
		"closed":           nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g, m, first, last := scrubRig(t)
			if j := g.ended(g.scrub(1 << 40)); j.Err != "" || j.Stopped || j.Done != scrubTotal || j.Total != scrubTotal || j.Found != 0 {
				t.Fatalf("a whole one: %+v", j)
			}
			if err := g.pool.StopScrub(); !errors.Is(err, ErrNotFound) {
				t.Errorf("stop without one: %v", err)
			}
			began := g.scrub(slow)
			if began.Done > scrubTotal/4 || began.Total != scrubTotal {
				t.Errorf("begins with %+v", began)
			}
			if again, err := g.pool.Scrub(0); !errors.Is(err, ErrInUse) || again.ID != began.ID {
				t.Errorf("a second one: %+v, %v", again, err)
			}
			g.scrubbed(t, 14) // in the second layer
			if reopen == nil {
				p := g.pool
				g.close()
				jobs := p.Jobs()
				if j := jobs[len(jobs)-1]; !j.Stopped || j.Err != "" || j.Ended.IsZero() {
					t.Errorf("closed: %+v", j)
				}
				g.open()
			} else {
				if err := g.pool.StopScrub(); err != nil {
					t.Fatal(err)
				}
				j := g.ended(began)
				if !j.Stopped || j.Err != "" || j.Done < 14<<clusterShift || j.Done >= scrubTotal {
					t.Errorf("stopped: %+v", j)
				}
				reopen(g)
			}
			m.Corrupt(first, blockSize, 1)
			m.Corrupt(last, blockSize, 2)
			j := g.scrub(1 << 40)
			if j.Done < 14<<clusterShift || j.Total != scrubTotal {
				t.Errorf("goes on with %+v", j)
			}
			if j = g.ended(j); j.Found != 1 || j.Stopped || j.Err != "" || j.Done != scrubTotal {
				t.Errorf("the rest: %+v, want one damaged block", j)
			}
			if j = g.ended(g.scrub(1 << 40)); j.Found != 2 {
				t.Errorf("from the beginning: %+v, want two damaged blocks", j)
			}
			g.close()
		})
	}
}

// TestScrubKeepsItsPlaceOverDeath: what is written down now and then counts, and a pool
// that has stopped writes nothing.
func TestScrubKeepsItsPlaceOverDeath(t *testing.T) {
	g, m, first, last := scrubRig(t)
	g.pool.scrub.keepEvery = time.Nanosecond
	g.scrub(slow)
	g.scrubbed(t, 14)
	image := m.Clone()
	image.CrashLose()
	g.pool.fail(errors.New("for a test"))
	writes := m.Stats().Writes
	jobs := g.pool.Jobs()
	if j := g.ended(jobs[len(jobs)-1]); j.Err == "" || j.Stopped {
		t.Errorf("of a pool that has stopped: %+v", j)
	}
	if err := g.pool.keepScrub(scrubPlace{}); !errors.Is(err, ErrStopped) {
		t.Errorf("place kept in a pool that has stopped: %v", err)
	}
	if n := m.Stats().Writes; n > writes+2 { // a place may have been on its way
		t.Errorf("%d writes of a pool that has stopped", n-writes)
	}
	if err := g.pool.Close(); err != nil {
		t.Error(err)
	}
	image.Corrupt(first, blockSize, 1)
	image.Corrupt(last, blockSize, 2)
	g.disks[0].Device = image
	g.config.Disks = g.disks
	g.open()
	j := g.scrub(1 << 40)
	if j.Done < 13<<clusterShift {
		t.Errorf("goes on with %+v", j)
	}
	if j = g.ended(j); j.Found != 1 {
		t.Errorf("the rest: %+v, want one damaged block", j)
	}
	g.close()
}

// TestScrubOfWhatIsGone: the layer a scrub was stopped in may not be there any more.
func TestScrubOfWhatIsGone(t *testing.T) {
	g, _, _, _ := scrubRig(t)
	if err := g.pool.keepScrub(scrubPlace{layer: 1 << 20, cluster: 7}); err != nil {
		t.Fatal(err)
	}
	if j := g.ended(g.scrub(1 << 40)); j.Err != "" || j.Stopped || j.Done != j.Total {
		t.Errorf("%+v", j)
	}
	if before, total := g.pool.scrubSizes(scrubPlace{}); before != 0 || total != scrubTotal {
		t.Errorf("the next one begins at %d of %d", before, total)
	}
	if g.pool.super.scrubLayer != 0 || g.pool.super.scrubCluster != 0 {
		t.Error("the next one does not begin at the beginning")
	}
	// Stopped behind all layers, it goes on with metadata.
	if err := g.pool.keepScrub(scrubPlace{layer: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	j := g.scrub(1)
	if err := g.pool.StopScrub(); err != nil {
		t.Fatal(err)
	}
	if j = g.ended(j); !j.Stopped || g.pool.super.scrubLayer != 1<<20 {
		t.Errorf("stopped in metadata: %+v, and goes on at layer %d", j, g.pool.super.scrubLayer)
	}
	g.close()
}
