package pool

import (
	"math/bits"
	"sort"
	"strings"

	"github.com/ashlar-storage/ashlar/datapath"
)

// blocksIn counts the blocks of a mask.
func blocksIn(mask uint32) uint64 { return uint64(bits.OnesCount32(mask)) }

// namedLayer is a snapshot of a volume, where reactors may look it up.
type namedLayer struct {
	name string
	l    *layer
}

// renameLayers renews what reactors know of the volume's snapshots: each is a
// metadata context, beside allocation and depth. Pool.mu is held.
func (v *volume) renameLayers() {
	var named []namedLayer
	if set := v.p.snapshots[v.id]; set != nil && !v.readOnly {
		head := v.head.Load()
		for name, l := range set.byName {
			if head.standsOn(l) { // not, when the volume was reverted to an older one
				named = append(named, namedLayer{name, l})
			}
		}
	}
	sort.Slice(named, func(i, j int) bool { return named[i].l.id < named[j].l.id })
	v.named.Store(&named)
	contexts := []string{datapath.ContextAllocation, datapath.ContextDepth}
	for _, n := range named {
		contexts = append(contexts, datapath.ContextDirtyPrefix+n.name)
	}
	v.contexts.Store(&contexts)
}

// extentsBudget is how many clusters or empty pages one request looks at; the
// client asks again for the rest.
const extentsBudget = 4096

// extents answers OpExtents from the map.
func (s *slot) extents() datapath.Status {
	q, r := s.q, s.r
	if r.Length == 0 || cap(r.Extents) == 0 {
		return datapath.StatusInvalid
	}
	head := q.v.head.Load()
	var from *layer
	kind := r.Context
	if name, ok := strings.CutPrefix(r.Context, datapath.ContextDirtyPrefix); ok {
		kind = datapath.ContextDirtyPrefix
		for _, n := range *q.v.named.Load() {
			if n.name == name {
				from = n.l
			}
		}
		if from == nil || !head.standsOn(from) {
			return datapath.StatusInvalid
		}
	}
	r.Extents = r.Extents[:0]
	end := r.Offset + r.Length
	size := max(q.v.size.Load(), end)
	at := r.Offset
	for budget := 0; at < end && budget < extentsBudget; budget++ {
		var n, state uint64
		switch kind {
		case datapath.ContextAllocation:
			var depth int
			n, depth = head.depthRun(at, size)
			if depth == 0 {
				state = datapath.ExtentHole | datapath.ExtentZero
			}
		case datapath.ContextDepth:
			var depth int
			n, depth = head.depthRun(at, size)
			state = uint64(depth)
		case datapath.ContextDirtyPrefix:
			start := at &^ (blockSize - 1)
			length, changed, _ := head.changedRun(start, size, from)
			n = length - (at - start)
			if changed {
				state = 1
			}
		default:
			return datapath.StatusInvalid
		}
		if k := len(r.Extents) - 1; k >= 0 && r.Extents[k].State == state {
			r.Extents[k].Length += n
		} else {
			if len(r.Extents) == cap(r.Extents) || len(r.Extents) == 1 && r.Flags&datapath.FlagOneExtent != 0 {
				break
			}
			r.Extents = append(r.Extents, datapath.Extent{Length: n, State: state})
		}
		at += n
	}
	if r.Flags&datapath.FlagOneExtent != 0 {
		r.Extents[0].Length = min(r.Extents[0].Length, r.Length)
	}
	return datapath.StatusOK
}

// depthRun says in which layer the block at offset is, 1 for l itself and 0 for
// none, and how far that goes at least.
func (l *layer) depthRun(offset, size uint64) (n uint64, depth int) {
	if n = l.emptyRun(offset, size); n > 0 {
		return n, 0
	}
	p := l.p
	v, b := uint32(offset>>clusterShift), uint32(offset%clusterSize/blockSize)
	rest := clusterSize - offset%clusterSize
	for {
		began := p.merges.Load()
		if began&1 != 0 {
			continue
		}
		var covered, same uint32
		depth = 0
		i := 0
		for x := l; x != nil; x = x.parent.Load() {
			i++
			e := x.lookup(v)
			if e.mask()&(1<<b) != 0 {
				depth, same = i, e.mask()&^covered
				break
			}
			covered |= e.mask()
			if e.zero() {
				break
			}
		}
		if depth == 0 {
			same = ^covered
		}
		if p.merges.Load() == began {
			return min(uint64(run(same, b))*blockSize-offset%blockSize, rest, size-offset), depth
		}
	}
}
