package pool

import "sync/atomic"

// chain is the layers below a layer, from its parent down. Where there are many,
// it remembers for each cluster which of them is the uppermost that has something
// there, so that a long chain of snapshots is walked once for a cluster and not
// with every read.
//
// A chain does not change; a layer gets a new one when a layer is taken out. An
// entry of a layer below can move up while clusters are merged. Then the place
// remembered has nothing any more, and the chain is walked again.
type chain struct {
	layers []*layer                   // immutable
	hints  []atomic.Pointer[hintPage] // by page of the map; nil for short chains
}

// hintPage remembers, for the clusters of a page of the map: 0 nothing yet; 1 + the
// index of the uppermost layer that has an entry; more than there are layers: none
// has.
type hintPage [mapEntries]atomic.Uint32

// chainShort is the length up to which walking is cheaper than remembering.
const chainShort = 3

// newChain is the chain of a layer of size bytes that stands on parent.
func newChain(parent *layer, size uint64) *chain {
	c := &chain{}
	if parent != nil {
		c.layers = append([]*layer{parent}, parent.chain.Load().layers...)
	}
	c.remember(size)
	return c
}

func (c *chain) remember(size uint64) {
	if len(c.layers) > chainShort {
		c.hints = make([]atomic.Pointer[hintPage], mapPages(size))
	}
}

// without is c with a layer taken out.
func (c *chain) without(l *layer, size uint64) *chain {
	n := &chain{}
	for _, x := range c.layers {
		if x != l {
			n.layers = append(n.layers, x)
		}
	}
	n.remember(size)
	return n
}

// has reports whether l is in the chain.
func (c *chain) has(l *layer) bool {
	for _, x := range c.layers {
		if x == l {
			return true
		}
	}
	return false
}

// from is where to begin looking for cluster v. It may allocate, once for 63 MiB of
// a volume.
func (c *chain) from(v uint32) (first int) {
	if c.hints == nil || int(v/mapEntries) >= len(c.hints) {
		return 0
	}
	slot := &c.hints[v/mapEntries]
	page := slot.Load()
	if page == nil {
		page = new(hintPage)
		if !slot.CompareAndSwap(nil, page) {
			page = slot.Load()
		}
	}
	hint := &page[v%mapEntries]
	if h := int(hint.Load()); h > 0 && (h > len(c.layers) || c.layers[h-1].lookup(v) != 0) {
		return h - 1
	}
	// What was seen while entries moved up is no truth to remember: the one above may
	// have been looked at before, and the one below after.
	p := c.layers[0].p
	began := p.merges.Load()
	for first < len(c.layers) && c.layers[first].lookup(v) == 0 {
		first++
	}
	if began&1 == 0 && p.merges.Load() == began {
		hint.Store(uint32(first + 1))
	}
	return first
}

// setParent puts l onto parent. l is not in use yet, or merges is odd.
func (l *layer) setParent(parent *layer) {
	l.parent.Store(parent)
	l.chain.Store(newChain(parent, l.rec.size))
}
