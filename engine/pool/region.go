package pool

import "sync/atomic"

// region is 31 clusters of a disk that share a page of checksums and a bit of the
// intent log. Its state is one word, so that a write enters and leaves it without
// a lock.
//
// A write may be sent to the disk only while the region is dirty, and dirty means
// that the journal says so durably: after a crash its checksums are computed from
// the data. It becomes clean when its checksums have been stored and no write was
// under way or has happened since.
type region struct {
	state atomic.Uint64
	page  atomic.Pointer[sumPage]
}

// The state of a region.
const (
	regionWriters   = 1<<24 - 1 // writes under way
	regionIsDirty   = 1 << 24   // durably; implies that page is there
	regionUntrusted = 1 << 25   // after a crash: checksums must be computed before use
	regionUsed      = 1 << 26   // since the cache last looked
	regionNext      = 1 << 27   // the first of a group made ready for a stream: who comes to it asks for the next group
	regionVersion   = 1 << 32   // one a write
)

// sumPage holds the checksums of a region's blocks in memory. The garbage
// collector keeps it for readers that still look at one that was dropped.
type sumPage struct {
	sums  [regionBlocks]atomic.Uint32
	stamp uint64 // of the copies on disk; owned by the cleaner
}

// poison is the checksum of blocks whose stored checksum was destroyed: no block
// is proven by it, and a write replaces it.
const poison = 0x5bad5bad

// enter begins a write and returns the state; without regionIsDirty in it nothing was
// begun.
func (g *region) enter() (state uint64) {
	if state = g.state.Add(1 + regionVersion); state&regionIsDirty == 0 {
		g.state.Add(^uint64(regionVersion)) // minus what was added
	}
	return state
}

// leave ends a write whose checksum is in the page.
func (g *region) leave() { g.state.Add(^uint64(0)) }

// version changes with every write that begins.
func (g *region) version() uint64 { return g.state.Load() / regionVersion }

// touch marks the region as in use for the cache.
func (g *region) touch() {
	if g.state.Load()&regionUsed == 0 {
		g.state.Or(regionUsed)
	}
}

// takeNext reports whether the region was made ready for a stream and nobody has come to it
// since.
func (g *region) takeNext() bool { return g.state.And(^uint64(regionNext))&regionNext != 0 }

// clean makes a dirty region clean if nothing has happened since the state was
// seen.
func (g *region) clean(seen uint64) bool {
	return seen&regionWriters == 0 && g.state.CompareAndSwap(seen, seen&^uint64(regionIsDirty))
}

// drop lets go of the page of a clean region that nobody writes to. Pool.sumsMu is
// held, as it is where a region becomes dirty.
func (g *region) drop() bool {
	s := g.state.Load()
	if s&(regionWriters|regionIsDirty) != 0 {
		return false
	}
	return g.page.Swap(nil) != nil
}

// decodeSums fills a page from the newest copy on disk; ok is false when both are
// damaged or there is none.
func (p *Pool) decodeSums(b []byte, g uint32) (*sumPage, bool) {
	page, h, _, ok := newestOfPair(b, p.id, uint64(g))
	if !ok || h.kind != pageSums {
		return nil, false
	}
	s := &sumPage{stamp: h.stamp}
	for i := range s.sums {
		s.sums[i].Store(le.Uint32(page[pageHeaderSize+4*i:]))
	}
	return s, true
}

// encodeSums writes both copies of a region's page to b.
func (p *Pool) encodeSums(b []byte, g uint32, s *sumPage, stamp uint64) {
	body := b[pageHeaderSize:pageSize]
	for i := range s.sums {
		le.PutUint32(body[4*i:], s.sums[i].Load())
	}
	clear(body[4*regionBlocks:])
	h := pageHeader{kind: pageSums, stamp: stamp, self: uint64(g)}
	h.seal(b[:pageSize], p.id)
	copy(b[pageSize:pairSize], b[:pageSize])
}
