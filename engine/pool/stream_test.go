package pool

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// streamRig is a pool that was opened just now, with a volume that has data in the regions
// from 0 to 20 of one zone. Nothing of their checksums is in memory. What streams ask for
// is done when the test says so.
type streamRig struct {
	*rig
	t     *testing.T
	disk  *memdisk.Disk
	d     datapath.Device
	c     *devtest.Client
	first []uint64 // where the first cluster of each region is on the volume
}

func newStreamRig(t *testing.T) *streamRig {
	const regions = 20
	disk := memory(120 << 20)
	g := &streamRig{rig: newRig(t, 24, disk), t: t, disk: disk}
	g.open()
	d := g.volume("v", regions*regionClusters*clusterSize)
	c := devtest.NewClient(t, g.r, d, 1)
	for i := range uint64(regions * regionClusters) {
		c.Write(i*clusterSize, imageFill(blockSize, byte(i)))
	}
	c.Close()
	if err := errors.Join(d.Close(), g.pool.Maintain()); err != nil {
		t.Fatal(err)
	}
	g.close()
	p := g.open()
	var err error
	if g.d, err = p.OpenVolume("v"); err != nil {
		t.Fatal(err)
	}
	g.c = devtest.NewClient(t, g.r, g.d, 16)
	head := p.volumes["v"].head.Load()
	for v := uint32(0); v < regions*regionClusters; v++ {
		cluster, _ := head.locate(v, 0, 1)
		_, index, _ := p.region(cluster)
		if int(index) == len(g.first) {
			g.first = append(g.first, uint64(v)<<clusterShift)
		}
	}
	if len(g.first) < regions {
		t.Fatalf("the volume lies in %d regions", len(g.first))
	}
	disk.ResetStats()
	return g
}

func (g *streamRig) end() {
	g.t.Helper()
	g.c.Close()
	if err := errors.Join(g.d.Close(), g.pool.Maintain()); err != nil {
		g.t.Error(err)
	}
	g.close()
	if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 {
		g.t.Errorf("%+v", r.Findings)
	}
}

// serve does what was asked for, and returns it.
func (g *streamRig) serve() (asked []streamAsk) {
	g.t.Helper()
	memory := alignedBytes(streamGroup * pairSize)
	for len(g.pool.streamAsks) > 0 {
		a := <-g.pool.streamAsks
		g.pool.makeReady(a, memory)
		asked = append(asked, a)
	}
	if err := g.pool.commitAll(); err != nil {
		g.t.Fatal(err)
	}
	return asked
}

// ready are the regions whose checksums are in memory, and those that are dirty.
func (g *streamRig) ready() (loaded, dirty []uint32) {
	for i := range uint32(24) {
		r, _ := g.pool.regionAt(i)
		if r.page.Load() != nil {
			loaded = append(loaded, i)
		}
		if r.state.Load()&regionIsDirty != 0 {
			dirty = append(dirty, i)
		}
	}
	return loaded, dirty
}

func upTo(n uint32) (list []uint32) {
	for i := range n {
		list = append(list, i)
	}
	return list
}

// TestReadsOfAStreamFindTheirChecksums: behind the second region that a stream had to wait
// in, no read waits for checksums, which are read a group at a time.
func TestReadsOfAStreamFindTheirChecksums(t *testing.T) {
	g := newStreamRig(t)
	for region, want := range []struct {
		reads uint64 // of the disk for one of the volume
		asked []streamAsk
		ready uint32 // regions, then
	}{
		{2, nil, 1},
		{2, []streamAsk{{2, false}}, 8},
		{1, []streamAsk{{8, false}}, 16}, // the first that was made ready
		{1, nil, 16}, {1, nil, 16}, {1, nil, 16}, {1, nil, 16}, {1, nil, 16},
		{1, []streamAsk{{16, false}}, 20}, // the other regions of the zone were never written to
		{1, nil, 20}, {1, nil, 20},
	} {
		g.disk.ResetStats()
		if got := g.c.Read(g.first[region], blockSize); !bytes.Equal(got, imageFill(blockSize, byte(g.first[region]>>clusterShift))) {
			t.Errorf("region %d: not what was written", region)
		}
		if n := g.disk.Stats().Reads; n != want.reads {
			t.Errorf("region %d: %d reads, want %d", region, n, want.reads)
		}
		g.disk.ResetStats()
		if asked := g.serve(); !slices.Equal(asked, want.asked) {
			t.Errorf("region %d: asks for %v, want %v", region, asked, want.asked)
		} else if n := g.disk.Stats().Reads; n != uint64(len(asked)) {
			t.Errorf("region %d: %d reads to make regions ready", region, n)
		}
		if loaded, dirty := g.ready(); !slices.Equal(loaded, upTo(want.ready)) || len(dirty) > 0 {
			t.Errorf("region %d: ready are %v, dirty %v, want the first %d", region, loaded, dirty, want.ready)
		}
	}
	g.end()
}

// TestWritesOfAStreamFindTheirRegionsDirty: one record of the journal makes a group of
// regions dirty. A crash there loses nothing, and those that nobody wrote to are clean
// again without a write of checksums.
func TestWritesOfAStreamFindTheirRegionsDirty(t *testing.T) {
	g := newStreamRig(t)
	write := func(region int) (records uint64) {
		g.disk.ResetStats()
		g.c.Write(g.first[region], imageFill(blockSize, 0xee))
		return g.disk.Stats().FUA
	}
	for region, want := range []struct {
		records uint64
		asked   []streamAsk
		dirty   uint32
	}{
		{1, nil, 1},
		{1, []streamAsk{{2, true}}, 8},
		{0, []streamAsk{{8, true}}, 16},
		{0, nil, 16}, {0, nil, 16},
	} {
		if n := write(region); n != want.records {
			t.Errorf("region %d: %d records, want %d", region, n, want.records)
		}
		if asked := g.serve(); !slices.Equal(asked, want.asked) {
			t.Errorf("region %d: asks for %v, want %v", region, asked, want.asked)
		}
		if n := g.disk.Stats().FUA; len(want.asked) > 0 && n != want.records+1 {
			t.Errorf("region %d: %d records for a group", region, n-want.records)
		}
		if _, dirty := g.ready(); !slices.Equal(dirty, upTo(want.dirty)) {
			t.Errorf("region %d: dirty are %v, want the first %d", region, dirty, want.dirty)
		}
	}
	dead := g.disk.Clone()
	dead.CrashLose()

	g.disk.ResetStats()
	if err := g.pool.cleanRegions(0); err != nil {
		t.Fatal(err)
	}
	if s := g.disk.Stats(); s.WriteBytes > 5*pairSize+s.FUA*pageSize {
		t.Errorf("cleaning 16 regions, of which 5 were written to, wrote %d bytes", s.WriteBytes)
	}
	if err := g.pool.commitAll(); err != nil {
		t.Fatal(err)
	}
	rested := g.disk.Clone()
	rested.CrashLose()
	first := g.first
	g.end()

	for name, d := range map[string]*memdisk.Disk{"while dirty": dead, "when clean": rested, "closed": g.disk} {
		reopened(t, name, d, "v", func(c *devtest.Client) {
			for region, at := range first {
				want := imageFill(blockSize, byte(at>>clusterShift))
				if region < 5 {
					want = imageFill(blockSize, 0xee)
				}
				if got := c.Read(at, blockSize); !bytes.Equal(got, want) {
					t.Errorf("%s: region %d is not what was written", name, region)
				}
			}
		})
	}
}

// TestWhatIsNoStreamIsNotReadAhead reads backwards, and every other region, and twice.
func TestWhatIsNoStreamIsNotReadAhead(t *testing.T) {
	g := newStreamRig(t)
	for _, region := range []int{9, 8, 7, 0, 2, 4, 6, 0, 2} {
		g.c.Read(g.first[region], blockSize)
	}
	g.c.Write(g.first[12], imageFill(blockSize, 1))
	if n := len(g.pool.streamAsks); n > 0 {
		t.Errorf("%d groups are asked for, the first %v", n, <-g.pool.streamAsks)
	}
	g.end()
}

// TestReadsShareTheReadOfTheirChecksums: requests that wait for the same page do not read
// it each.
func TestReadsShareTheReadOfTheirChecksums(t *testing.T) {
	g := newStreamRig(t)
	var list []*datapath.Request
	for i := range 16 {
		list = append(list, &datapath.Request{Op: datapath.OpRead, Tag: uint32(i), Offset: g.first[3] + uint64(i)*clusterSize, Length: blockSize, Buf: alignedBytes(blockSize)})
	}
	g.c.Do(list...)
	for i, r := range list {
		if r.Status != datapath.StatusOK || !bytes.Equal(r.Buf, imageFill(blockSize, byte(r.Offset>>clusterShift))) {
			t.Errorf("request %d: %v, or not what was written", i, r.Status)
		}
	}
	if n := g.disk.Stats().Reads; n != 17 {
		t.Errorf("%d reads for 16 blocks and a page of checksums", n)
	}
	g.end()
}

// TestReadsThatShareAFailedReadOfTheirChecksums each hear of it.
func TestReadsThatShareAFailedReadOfTheirChecksums(t *testing.T) {
	g := newStreamRig(t)
	_, z := g.pool.regionAt(3)
	at := g.pool.sumsOffset(z, 3)
	g.disk.BadSector(at, pairSize)
	var list []*datapath.Request
	for i := range 4 {
		list = append(list, &datapath.Request{Op: datapath.OpRead, Tag: uint32(i), Offset: g.first[3] + uint64(i)*clusterSize, Length: blockSize, Buf: alignedBytes(blockSize)})
	}
	g.c.Do(list...)
	for i, r := range list {
		if r.Status != datapath.StatusIO {
			t.Errorf("request %d: %v", i, r.Status)
		}
	}
	// Of a group with the bad one in it the others are ready. Nothing is taken for lost:
	// the disk may come back.
	g.pool.askReady(1, true)
	g.serve()
	want := []uint32{1, 2, 4, 5, 6, 7}
	if loaded, dirty := g.ready(); !slices.Equal(loaded, want) || !slices.Equal(dirty, want) {
		t.Errorf("ready are %v, dirty %v", loaded, dirty)
	}
	sums := g.disk.Durable(at, pairSize)
	g.disk.Poke(at, sums) // whole again
	if got := g.c.Read(g.first[3], blockSize); !bytes.Equal(got, imageFill(blockSize, byte(g.first[3]>>clusterShift))) {
		t.Error("not what was written")
	}
	g.end()
}

// TestWriteThatMeetsItsRegionBecomingDirty is counted for a moment by a region that it
// finds clean. The version then says nothing: what is written soon must not be taken for
// what was there.
func TestWriteThatMeetsItsRegionBecomingDirty(t *testing.T) {
	g := newStreamRig(t)
	r, _ := g.pool.regionAt(10)
	for _, meets := range []bool{true, false} {
		if meets {
			r.state.Add(1 + regionVersion)
		}
		g.pool.askReady(10, true)
		g.serve()
		if meets {
			r.state.Add(^uint64(regionVersion))
		}
		g.pool.sumsMu.Lock()
		d := *g.pool.dirty[10]
		g.pool.sumsMu.Unlock()
		if d.ahead == meets {
			t.Errorf("the write is there %v: taken for untouched %v", meets, d.ahead)
		}
		if err := errors.Join(g.pool.Maintain(), g.pool.Maintain()); err != nil {
			t.Fatal(err)
		}
	}
	g.end()
}

// TestRegionsThatCannotBeMadeReady are left alone: beyond the last, never written to, left
// behind by a crash.
func TestRegionsThatCannotBeMadeReady(t *testing.T) {
	g := newStreamRig(t)
	r, _ := g.pool.regionAt(8)
	r.state.Or(regionUntrusted)
	for _, index := range []uint32{8, 22, 23, 24, 1 << 31} {
		g.pool.askReady(index, true)
	}
	g.serve()
	want := []uint32{9, 10, 11, 12, 13, 14, 15}
	if loaded, dirty := g.ready(); !slices.Equal(loaded, want) || !slices.Equal(dirty, want) {
		t.Errorf("ready are %v, dirty %v", loaded, dirty)
	}
	r.state.And(^uint64(regionUntrusted))
	for range streamAsks + 1 {
		g.pool.askReady(0, false) // one too many is dropped
	}
	if n := len(g.pool.streamAsks); n != streamAsks {
		t.Errorf("%d wait", n)
	}
	g.end()
}

// TestStreamsAreServed reads and writes a pool that serves them itself, and closes it with
// regions made ready that nobody came to.
func TestStreamsAreServed(t *testing.T) {
	g := newStreamRig(t)
	g.c.Close()
	if err := g.d.Close(); err != nil {
		t.Fatal(err)
	}
	g.close()
	g.config.Manual = false
	g.open()
	d, err := g.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	c := devtest.NewClient(t, g.r, d, 1)
	for region := range 3 {
		c.Write(g.first[region], imageFill(blockSize, 0xee))
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if loaded, _ := g.ready(); len(loaded) >= 8 { // and dirty, or so soon, or no more
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing is made ready")
		}
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	g.close()
	if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 || !r.Clean {
		t.Errorf("%+v", r)
	}
}
