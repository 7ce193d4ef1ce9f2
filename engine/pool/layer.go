package pool

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// layer is the difference between a volume and what it was: which clusters were
// written since its parent was frozen. Reading a volume means asking its head,
// then the parent for what the head does not hold, and so on.
type layer struct {
	p  *Pool  // immutable
	id uint32 // immutable

	parent atomic.Pointer[layer]
	chain  atomic.Pointer[chain]                     // parent and those below it
	table  atomic.Pointer[[]atomic.Pointer[mapPage]] // grows under mu

	mu   sync.Mutex // guards the making of pages and growth of the table
	paid bool       // all pages of the map count in allocator.owed: the head of a thick volume; guarded by mu

	owned atomic.Int64 // clusters in its entries

	// Guarded by Pool.mu.
	rec      layerRecord
	children int
	vol      *volume // of a head
	removed  bool
	job      *job // of a snapshot being deleted

	// pair is where its record lies, -1: nowhere yet. Owned by the checkpointer.
	pair      int64
	recChange bool        // the record differs from the one on disk; guarded by Pool.applyMu
	gone      bool        // removed; guarded by Pool.applyMu
	owed      bool        // counts in allocator.owed; guarded by Pool.applyMu
	stored    layerRecord // the record as the journal has it; guarded by Pool.applyMu
}

// mapPage is 504 entries of a layer's map: in memory, and as a page of metadata. It
// is as large as a page, so that the memory of a map is what its format says.
type mapPage struct {
	entries [mapEntries]atomic.Uint64
	*pageState
}

// pageState is what reads do not need of a page.
type pageState struct {
	// dirty marks entries the journal does not have yet.
	dirty  [(mapEntries + 63) / 64]atomic.Uint64
	queued atomic.Bool // in Pool.changed
	next   *mapPage    // in Pool.changed

	layer *layer // immutable
	index uint32 // immutable

	pair  int64 // where it lies, -1: nowhere yet; changes with Pool.applyMu
	stale bool  // differs from the copy on disk; guarded by Pool.applyMu
}

func newLayer(p *Pool, r layerRecord) *layer {
	l := &layer{p: p, id: r.id, rec: r, pair: -1}
	table := make([]atomic.Pointer[mapPage], mapPages(r.size))
	l.table.Store(&table)
	l.chain.Store(&chain{})
	return l
}

// mapPages is how many pages the map of size bytes has.
func mapPages(size uint64) int {
	return int((clustersOf(size) + mapEntries - 1) / mapEntries)
}

// clustersOf is how many clusters size bytes take up.
func clustersOf(size uint64) uint64 { return (size + clusterSize - 1) >> clusterShift }

// grow makes room for a larger map.
func (l *layer) grow(size uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := *l.table.Load()
	if mapPages(size) <= len(old) {
		return
	}
	table := make([]atomic.Pointer[mapPage], mapPages(size))
	for i := range old {
		table[i].Store(old[i].Load())
	}
	l.table.Store(&table)
}

// lookup is the entry of a cluster of the volume.
func (l *layer) lookup(v uint32) entry {
	table := *l.table.Load()
	i := v / mapEntries
	if int(i) >= len(table) {
		return 0 // the volume has grown since the layer was frozen
	}
	p := table[i].Load()
	if p == nil {
		return 0
	}
	return entry(p.entries[v%mapEntries].Load())
}

// page is the page of a cluster, made if need be. It is there already, or the pool
// is being opened.
func (l *layer) page(v uint32) *mapPage { return l.makePage(v, true) }

// pageIfRoom is the page of a cluster, made if need be; nil: a checkpoint would find
// no place for it.
func (l *layer) pageIfRoom(v uint32) *mapPage { return l.makePage(v, false) }

func (l *layer) makePage(v uint32, always bool) *mapPage {
	i := v / mapEntries
	if p := (*l.table.Load())[i].Load(); p != nil {
		return p
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	slot := &(*l.table.Load())[i]
	if p := slot.Load(); p != nil {
		return p
	}
	switch {
	case l.paid:
	case always:
		l.p.alloc.owed.Add(1)
	case !l.p.alloc.owe(1):
		return nil
	}
	p := &mapPage{pageState: &pageState{layer: l, index: i, pair: -1}}
	slot.Store(p)
	return p
}

// pay makes the pages that the map does not have yet paid for, and says how many
// they are; the caller counts them. unpay takes that back, and does count.
func (l *layer) pay() (missing int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paid = true
	return l.missing()
}

func (l *layer) unpay() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paid {
		l.paid = false
		l.p.alloc.owed.Add(-l.missing())
	}
}

// missing is how many pages the map does not have. mu is held.
func (l *layer) missing() (n int64) {
	table := *l.table.Load()
	for i := range table {
		if table[i].Load() == nil {
			n++
		}
	}
	return n
}

// pages calls f for every page that exists.
func (l *layer) pages(f func(*mapPage) bool) {
	table := *l.table.Load()
	for i := range table {
		if p := table[i].Load(); p != nil && !f(p) {
			return
		}
	}
}

// each calls f for every entry that is not empty, in order, from cluster v on.
func (l *layer) each(v uint32, f func(v uint32, e entry) bool) {
	table := *l.table.Load()
	for i := int(v / mapEntries); i < len(table); i++ {
		p := table[i].Load()
		if p == nil {
			continue
		}
		first := uint32(0)
		if i == int(v/mapEntries) {
			first = v % mapEntries
		}
		for j := first; j < mapEntries; j++ {
			if e := entry(p.entries[j].Load()); e != 0 && !f(uint32(i)*mapEntries+j, e) {
				return
			}
		}
	}
}

// changed notes that the journal has to hear of an entry. The new entry is in place.
func (p *mapPage) changed(i uint32) {
	p.dirty[i/64].Or(1 << (i % 64))
	if !p.queued.Load() && p.queued.CompareAndSwap(false, true) {
		pool := p.layer.p
		for {
			head := pool.changed.Load()
			p.next = head
			if pool.changed.CompareAndSwap(head, p) {
				return
			}
		}
	}
}

// visible says which blocks of cluster v any layer from l down has data for.
func (l *layer) visible(v uint32) uint32 {
	p := l.p
	for {
		began := p.merges.Load()
		if began&1 != 0 {
			continue
		}
		e := l.lookup(v)
		mask := e.mask()
		if !e.zero() {
			c := l.chain.Load()
			for _, x := range c.layers[min(c.from(v), len(c.layers)):] {
				e := x.lookup(v)
				mask |= e.mask()
				if e.zero() || mask == wholeMask {
					break
				}
			}
		}
		if p.merges.Load() == began {
			return mask
		}
	}
}

// run is the length of the first run of set bits in mask at or after bit first.
func run(mask, first uint32) uint32 {
	return uint32(bits.TrailingZeros32(^(mask >> first)))
}

// maskOf is count bits from first on.
func maskOf(first, count uint32) uint32 {
	return uint32(uint64(1)<<count-1) << first
}

// locate finds where block b of cluster v lies, and how many blocks from it on, at
// most n and within the cluster, follow it there. cluster is noCluster where they
// read as zeros.
func (l *layer) locate(v, b, n uint32) (cluster, count uint32) {
	parent := l.parent.Load() // before the entry: it goes when the last entry below has moved up
	e := l.lookup(v)
	if e.mask()&(1<<b) != 0 {
		return e.cluster(), min(n, run(e.mask(), b))
	}
	if parent == nil || e.zero() {
		return noCluster, min(n, run(^e.mask(), b))
	}
	return l.locateBelow(v, b, n)
}

func (l *layer) locateBelow(v, b, n uint32) (cluster, count uint32) {
	p := l.p
	for {
		began := p.merges.Load()
		if began&1 != 0 {
			continue // a batch of entries is being stored, which takes microseconds
		}
		cluster, count = noCluster, 0
		e := l.lookup(v)
		covered := e.mask() // blocks that layers above have
		switch {
		case covered&(1<<b) != 0:
			cluster, count = e.cluster(), min(n, run(covered, b))
		case !e.zero():
			c := l.chain.Load()
			for _, x := range c.layers[min(c.from(v), len(c.layers)):] {
				e := x.lookup(v)
				m := e.mask()
				if m&(1<<b) != 0 {
					cluster, count = e.cluster(), min(n, run(m&^covered, b))
					break
				}
				covered |= m
				if e.zero() {
					break
				}
			}
		}
		if count == 0 {
			count = min(n, run(^covered, b))
		}
		if p.merges.Load() == began {
			return cluster, count
		}
	}
}
