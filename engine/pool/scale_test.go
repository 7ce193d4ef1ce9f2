package pool

import (
	"runtime"
	"testing"
	"time"
)

// TestOpenOfAFullTiB opens a pool whose one volume maps a whole TiB, and measures
// what that takes. The entries are put into the map by hand; everything else is as
// it always is.
func TestOpenOfAFullTiB(t *testing.T) {
	if raceEnabled {
		t.Skip("skipped: millions of entries are slow under the race detector; the plain run has it")
	}
	const size = 1 << 40
	g := newRig(t, zoneRegionsMax, memory(size+size/16))
	p := g.open()
	begin := time.Now()
	if _, err := p.CreateVolume(VolumeSpec{Name: "v", Size: size}); err != nil {
		t.Fatal(err)
	}
	t.Logf("a thin volume of 1 TiB made in %v", time.Since(begin))
	l := p.volumes["v"].head.Load()
	for v := range uint32(clustersOf(size)) {
		c, ok := p.alloc.take(claimData, p.zoneClusters)
		if !ok {
			t.Fatal("no space")
		}
		page := l.page(v)
		page.entries[v%mapEntries].Store(uint64(makeEntry(c, wholeMask, false)))
		l.owned.Add(1)
		if v%mapEntries == 0 {
			p.applyMu.Lock()
			p.markStale(page)
			p.applyMu.Unlock()
		}
	}
	g.close()
	p, l, g.pool = nil, nil, nil
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begin = time.Now()
	p = g.open()
	took := time.Since(begin)
	runtime.GC()
	runtime.ReadMemStats(&after)
	heap := after.HeapAlloc - before.HeapAlloc
	t.Logf("opened in %v, %d MiB of memory", took, heap>>20)
	if heap > 80<<20 {
		t.Errorf("%d MiB of memory for the map of a TiB", heap>>20)
	}
	if took > 10*time.Second {
		t.Errorf("open took %v", took)
	}
	if i := p.Info(); i.Allocated != size {
		t.Errorf("%d bytes allocated", i.Allocated)
	}
	begin = time.Now()
	if _, err := p.DeleteVolume("v", false); err != nil {
		t.Fatal(err)
	}
	t.Logf("deleted in %v", time.Since(begin))
	if err := p.Maintain(); err != nil {
		t.Fatal(err)
	}
	if i := p.Info(); i.Allocated != 0 {
		t.Errorf("%d bytes still allocated", i.Allocated)
	}
	g.close()
}
