package pool

import (
	"bytes"
	"errors"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// TestFreeSpaceBecomesDirtyAhead writes to space that another volume has given up: few
// records of the journal make its regions dirty, what nobody wrote to is clean again
// without a write of checksums, and a crash at each of these points loses nothing.
func TestFreeSpaceBecomesDirtyAhead(t *testing.T) {
	const clusters = 10 * regionClusters
	disk := memory(47 << 20) // so that the second volume finds no other space
	g := newRig(t, 24, disk)
	p := g.open()
	fill := func(name string, blocks uint64) (wait func() []byte) {
		d := g.volume(name, clusters*clusterSize)
		c := devtest.NewClient(t, g.r, d, 1)
		for i := range blocks {
			c.Write(i*clusterSize, imageFill(clusterSize, byte(i)))
		}
		return func() []byte {
			b := c.Read(0, blocks*clusterSize)
			c.Close()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			return b
		}
	}
	dirty := func() (list []uint32) {
		p.sumsMu.Lock()
		defer p.sumsMu.Unlock()
		for i := range p.dirty {
			list = append(list, i)
		}
		return list
	}

	fill("old", clusters)()
	if _, err := p.DeleteVolume("old", true); err != nil {
		t.Fatal(err)
	}
	if err := p.Maintain(); err != nil {
		t.Fatal(err)
	}
	g.close() // forgets the checksums that are in memory
	p = g.open()
	if n := dirty(); len(n) > 0 {
		t.Fatalf("regions %v are dirty after a rest", n)
	}

	// The first cluster after the deletion may lie anywhere; from it on, 8 regions
	// become dirty at once, and nobody waits in the next 6 at least.
	disk.ResetStats()
	end := fill("new", 6*regionClusters)
	if n := disk.Stats().FUA; n > 4 {
		t.Errorf("%d records of the journal for the writes to 7 regions", n)
	}
	if n := len(dirty()); n < 7 {
		t.Errorf("%d regions are dirty", n)
	}
	if err := p.commitAll(); err != nil {
		t.Fatal(err)
	}
	dead := disk.Clone()
	dead.CrashLose()
	want := end()

	// Those without a write go back: the checksums of at most 7 regions are stored.
	before := len(dirty())
	disk.ResetStats()
	if err := p.cleanRegions(0); err != nil {
		t.Fatal(err)
	}
	if s := disk.Stats(); s.WriteBytes > 7*pairSize+s.FUA*pageSize || before <= 7 {
		t.Errorf("cleaning %d regions, of which 7 have data, wrote %d bytes", before, s.WriteBytes)
	}
	if err := p.commitAll(); err != nil {
		t.Fatal(err)
	}
	rested := disk.Clone()
	rested.CrashLose()
	g.close()

	for name, d := range map[string]*memdisk.Disk{"while dirty": dead, "when clean": rested, "closed": disk} {
		reopened(t, name, d, "new", func(c *devtest.Client) {
			if !bytes.Equal(c.Read(0, uint64(len(want))), want) {
				t.Errorf("%s: the data is not what was written", name)
			}
			c.Write(7*regionClusters*clusterSize, imageFill(clusterSize, 1)) // into a region that was dirty ahead
			c.Flush()
		})
	}
}

// reopened opens the pool on a disk, has use look at a volume of it, and checks it when
// it is closed and at rest; when says what the disk went through.
func reopened(t *testing.T, when string, d *memdisk.Disk, volume string, use func(c *devtest.Client)) {
	t.Helper()
	g := rigOn(t, d)
	g.open()
	v, err := g.pool.OpenVolume(volume)
	if err != nil {
		t.Fatal(when, err)
	}
	c := devtest.NewClient(t, g.r, v, 1)
	use(c)
	c.Close()
	if err := errors.Join(v.Close(), g.pool.Maintain()); err != nil {
		t.Error(when, err)
	}
	g.close()
	if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 {
		t.Errorf("%s: %+v", when, r.Findings)
	}
}

// TestRegionAskedForIsNotAhead heals a region that is dirty ahead: its checksums are
// stored though nobody wrote to it.
func TestRegionAskedForIsNotAhead(t *testing.T) {
	g := newRig(t, 24, memory(128<<20))
	p := g.open()
	d := g.volume("v", 32<<20)
	c := devtest.NewClient(t, g.r, d, 1)
	c.Write(0, imageFill(clusterSize, 1))
	c.Close()
	index, found := uint32(0), false
	p.sumsMu.Lock()
	for i, x := range p.dirty {
		if x.ahead {
			index, found = i, true
		}
	}
	p.sumsMu.Unlock()
	if !found {
		t.Fatal("no region became dirty ahead")
	}
	p.askDirty(index, nobody{})
	if err := p.commitAll(); err != nil {
		t.Fatal(err)
	}
	p.sumsMu.Lock()
	ahead := p.dirty[index].ahead
	p.sumsMu.Unlock()
	if ahead {
		t.Error("a region that somebody asked for is taken for one that nobody needs")
	}
	if err := errors.Join(d.Close(), p.Maintain()); err != nil {
		t.Error(err)
	}
	g.close()
	if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 {
		t.Errorf("%+v", r.Findings)
	}
}
