package pool

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
)

// layered is a volume v of many clusters whose only snapshot has been deleted and
// waits to be merged into its head.
func layered(t *testing.T, disk datapath.Device, clusters int) (g *rig, l, head *layer) {
	t.Helper()
	g = newRig(t, 4, disk)
	g.open()
	d := g.volume("v", uint64(clusters)*clusterSize)
	q, err := openPort(g.r, d, 8)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Repeat([]byte{7}, blockSize)
	write := func(block uint64) {
		for i := range uint64(clusters) {
			if s, err := q.one(datapath.OpWrite, 0, i*clusterSize+block*blockSize, b, blockSize); err != nil || s != datapath.StatusOK {
				t.Fatalf("write: %v %v", s, err)
			}
		}
	}
	write(0)
	if _, err := g.pool.CreateSnapshot("v", "s", nil); err != nil {
		t.Fatal(err)
	}
	write(1)
	if _, err := g.pool.DeleteSnapshot("v", "s"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(q.close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	l, head = g.pool.nextHidden()
	if l == nil || head == nil {
		t.Fatal("there is nothing to merge")
	}
	return g, l, head
}

// A snapshot holds Pool.mu while it waits for writes, which wait for blocks that a
// merge has locked: a merge must not wait for mu meanwhile.
func TestMergeDoesNotWaitForCatalogWithBlocksLocked(t *testing.T) {
	g, _, head := layered(t, memory(160<<20), 400)
	p := g.pool
	v := head.vol
	locked := func() bool {
		for i := range v.locks.words {
			if v.locks.words[i].Load() != 0 {
				return true
			}
		}
		return false
	}
	merged := make(chan error, 1)
	go func() { merged <- p.mergeAll() }()
	for over := false; !over && !t.Failed(); {
		p.mu.Lock()
		for end := time.Now().Add(5 * time.Second); locked(); {
			if time.Now().After(end) {
				t.Error("a merge waits for the catalog, with blocks locked")
				break
			}
		}
		p.mu.Unlock()
		select {
		case err := <-merged:
			over = true
			if err != nil {
				t.Error(err)
			}
		default:
		}
	}
	if !t.Failed() {
		g.close()
	}
}

// A volume is deleted, or reverted, while the layer below is merged into its head.
func TestMergeEndsWhenTheLayerAboveIsRemoved(t *testing.T) {
	for _, moved := range []bool{false, true} { // all clusters have been merged, the layer itself not
		g, l, head := layered(t, memory(24<<20), 20)
		p := g.pool
		if moved {
			var moves []move
			l.each(0, func(v uint32, _ entry) bool { moves = append(moves, move{v: v}); return true })
			if err := p.mergeClusters(l, head, moves); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := p.DeleteVolume("v", true); err != nil {
			t.Fatal(err)
		}
		if err := p.merge(l, head); !errors.Is(err, errRemoved) {
			t.Errorf("a merge into a layer that was removed: %v", err)
		}
		for range 2 {
			if err := p.Maintain(); err != nil {
				t.Fatal(err)
			}
		}
		if i := p.Info(); i.Allocated != 0 {
			t.Errorf("%d bytes are still allocated", i.Allocated)
		}
		g.close()
		if g.open(); len(g.pool.Volumes()) != 0 {
			t.Error("the volume is back")
		}
		g.close()
	}
}

// A volume is deleted between a checkpoint's choice of what to write and its writing
// the volume's record: the record must not outlive the volume.
func TestCheckpointForgetsLayersRemovedMeanwhile(t *testing.T) {
	f, err := filter.NewFault(memory(24<<20), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t, 2, f)
	g.open()
	p := g.pool
	if err := p.checkpoint(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.CreateVolume(VolumeSpec{Name: "v", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	p.pairs = nil // the checkpoint has to make a cluster of metadata first, which hangs
	if err := f.SetRules([]filter.FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, Count: 1, Action: filter.FaultHang}}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- p.checkpoint() }()
	for f.Hanging() == 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := p.DeleteVolume("v", false); err != nil {
		t.Fatal(err)
	}
	f.Release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	g.close()
	g.open()
	if n := len(g.pool.layers); n != 0 {
		t.Errorf("%d layers are back", n)
	}
	g.close()
}

// Whoever asks the committer when it has ended gets an answer.
func TestCommitterAnswersAfterItsEnd(t *testing.T) {
	g := newRig(t, 2, memory(24<<20))
	p := g.open()
	g.close()
	within(t, 5*time.Second, "a commit after Close", func() {
		if err := p.commitAll(); !errors.Is(err, ErrStopped) {
			t.Errorf("commit after Close: %v", err)
		}
		if err := p.commitTxn(func(b []byte) []byte { return b }); !errors.Is(err, ErrStopped) {
			t.Errorf("transaction after Close: %v", err)
		}
	})
}

// After a revert, newer snapshots are not in the volume's line: what has changed since
// them cannot be told.
func TestContextsAreThoseOfTheLine(t *testing.T) {
	g := newRig(t, 2, memory(24<<20))
	p := g.open()
	if _, err := p.CreateVolume(VolumeSpec{Name: "v", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"old", "new"} {
		if _, err := p.CreateSnapshot("v", name, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Revert("v", "old"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		d, err := g.pool.OpenVolume("v")
		if err != nil {
			t.Fatal(err)
		}
		c := d.Info().Contexts
		if !slices.Contains(c, datapath.ContextDirtyPrefix+"old") || slices.Contains(c, datapath.ContextDirtyPrefix+"new") {
			t.Errorf("contexts %q", c)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		g.close()
		g.open()
	}
	g.close()
}

// What a walk of a chain saw while entries moved up must not be remembered.
func TestChainsRememberNothingSeenDuringAMerge(t *testing.T) {
	p := &Pool{}
	var l *layer
	for i := range 6 {
		x := newLayer(p, layerRecord{id: uint32(i + 1), size: 1 << 20})
		if l != nil {
			x.setParent(l)
		}
		l = x
	}
	c := l.chain.Load()
	if c.hints == nil {
		t.Fatal("the chain is too short to remember anything")
	}
	c.layers[4].page(0).entries[0].Store(uint64(makeEntry(9, 1, false)))
	p.merges.Add(1) // the entry of layers[1] is on its way to layers[0]
	if first := c.from(0); first != 4 {
		t.Fatalf("found at %d", first)
	}
	c.layers[0].page(0).entries[0].Store(uint64(makeEntry(3, 1, false)))
	p.merges.Add(1)
	if first := c.from(0); first != 0 {
		t.Errorf("the merge is over, and the chain is looked at from %d on", first)
	}
}

// A page of checksums that cannot be had is no reason to fail others.
func TestOneUnreadableRegionDoesNotFailTheOthers(t *testing.T) {
	x := newPatient(t, 1)
	x.open()
	p := x.pool
	d := x.volume("w", 8<<20)
	q := x.port(d)
	x.must(q, datapath.OpWrite, 0, x.data[:clusterSize])
	if s, err := q.one(datapath.OpFlush, 0, 0, nil, 0); err != nil || s != datapath.StatusOK {
		t.Fatal(s, err)
	}
	index := uint32(0)
	for ; ; index++ { // a region with checksums that are not in memory
		g, z := p.regionAt(index)
		if regionState(z.states[index%uint32(len(z.regions))].Load()) == regionClean && g.page.CompareAndSwap(g.page.Load(), nil) {
			x.mem[0].BadSector(p.sumsOffset(z, index), pairSize)
			break
		}
	}
	w := make(flushWaiter, 1)
	p.request.Lock()
	p.request.regions = append(p.request.regions, regionWait{index, w})
	p.request.Unlock()
	if err := p.commitAll(); err != nil {
		t.Errorf("a flush failed with it: %v", err)
	}
	if err := <-w; err == nil {
		t.Error("the region became dirty without its checksums")
	}
	if err := p.failed(); err != nil {
		t.Error(err)
	}
	x.release(d, q)
	x.close()
}
