package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Pool is an open pool. Its methods may be called from any goroutine but a
// reactor's.
//
// Lock order: mu, checkpointMu, sumsMu, applyMu, captureMu, the rest.
type Pool struct {
	id      uuid.UUID
	name    string
	created int64
	start   time.Time // origin of the clock of turns
	config  Config
	log     *slog.Logger
	r       *reactor.Reactor
	disks   []*disk                 // by index; nil: missing; replaced with checkpointMu and applyMu
	members atomic.Pointer[[]*disk] // disks as queues see them: a disk is in here before anything lies on it

	zoneClusters uint32 // immutable
	zones        atomic.Pointer[[]*zone]
	alloc        allocator

	mu        sync.Mutex
	layers    map[uint32]*layer          // guarded by mu
	volumes   map[string]*volume         // by name; guarded by mu
	snapshots map[uuid.UUID]*snapshotSet // by volume; guarded by mu
	closed    bool                       // guarded by mu

	// applyMu is held for writing from the moment a transaction changes memory until
	// its group is durable, and for reading while a page is copied for the disk: what
	// a page holds is never ahead of the journal.
	applyMu sync.RWMutex
	// captureMu is held while maps are captured, which is a matter of memory only.
	// Whoever holds it may put a new head onto a layer and leave in freezes what makes
	// the records of that. They come after those of every change captured before, so
	// that a snapshot is never there without what was written before it, and before
	// those of the new head.
	captureMu sync.Mutex
	freezes   []freeze
	// Guarded by applyMu: what differs from the disk.
	stale        []*mapPage
	staleLayers  []*layer
	removedPairs []removedPair
	nextLayer    atomic.Uint32 // id of the next layer; changed in transactions

	// Used while the pool is opened.
	orphans        map[uint32][]*mapPage // map pages whose layer is not known yet
	staleLabels    bool                  // superblocks of other disks than 0 are damaged, or differ from its
	generationSeen uint64                // the highest of those that differ

	changed atomic.Pointer[mapPage] // stack of pages with entries the journal does not have
	changes atomic.Uint64           // numbers every change of a map
	settled atomic.Uint64           // changes up to this one are durable
	merges  atomic.Uint64           // odd while several layers change together
	pending *pendingLog             // changes not yet durable, kept over the death of the process

	request struct {
		sync.Mutex
		commitWork
		ended bool // the committer answers nobody any more
	}
	awaiting []spaceWait // owned by the committer
	kick     chan struct{}

	streamAsks  chan streamAsk // what streams come to next
	streamsEnd  chan struct{}  // closed to end who serves that
	streamsDone sync.WaitGroup

	journal journal

	freed struct { // by discards and merges; the record that frees them is not durable yet
		sync.Mutex
		clusters []uint32
	}
	grace    graceList
	epoch    atomic.Uint64
	queuesMu sync.Mutex
	queues   []*queue

	sumsMu   sync.Mutex // guards dropping pages and making regions dirty, and what follows
	dirty    map[uint32]*dirtyRegion
	sumPages atomic.Int64

	pairs        []uint64 // free pairs of metadata pages; owned by the checkpointer
	metaCount    atomic.Int64
	checkpointMu sync.Mutex
	super        superblock // as last written; guarded by checkpointMu

	stopping chan struct{}
	stopped  sync.WaitGroup
	failure  atomic.Pointer[error]
	wake     chan struct{} // the keeper has something to do
	rebuilds struct {
		sync.Mutex
		waiting map[uint32][]waiter
	}

	jobs       jobList
	scrub      scrubState
	mergeWaits atomic.Bool // a merge found no room for a page of metadata
	merging    struct {
		sync.Mutex
		running, again bool
	}
	mergeMu    sync.Mutex   // one merge at a time; outermost
	batchMu    sync.Mutex   // held while clusters of a batch are merged; under mu
	cleanMu    sync.Mutex   // one cleaner at a time: older checksums must not follow newer ones
	spaceLevel atomic.Int32 // percent threshold last told
	corrupt    atomic.Uint64
	rebuildMu  sync.Mutex

	// Owned by the keeper.
	hand           uint32 // region the cache looks at next
	unsettledSince time.Time
	checkpointed   time.Time
}

// removedPair is where a page of a layer that is gone still lies. The page of its
// record has to go, too; map pages of an unknown layer mean nothing, and go when
// their copies differ.
type removedPair struct {
	pair   int64
	record bool
}

// zone is about 1 GiB of a disk.
type zone struct {
	disk    *disk
	index   uint32
	start   uint64 // bytes, on the disk: the pair of zone pages
	sums    uint64 // bytes: the pairs of checksum pages
	data    uint64 // bytes: the clusters
	count   uint32 // clusters that exist; guarded by sumsMu
	regions []region
	states  []atomic.Uint32 // regionState of each, as the journal has it; written by the committer

	// Owned by the checkpointer.
	meta  zonePage // which clusters hold metadata
	stale atomic.Bool
}

// waiter is told when something it waits for has ended. Called on a goroutine.
type waiter interface{ wake(err error) }

func (p *Pool) zoneOf(cluster uint32) *zone { return (*p.zones.Load())[cluster/p.zoneClusters] }

// address is where a cluster lies.
func (p *Pool) address(cluster uint32) (*disk, uint64) {
	z := p.zoneOf(cluster)
	return z.disk, z.data + uint64(cluster%p.zoneClusters)<<clusterShift
}

// region is the region of a cluster; block is the number of the cluster's first
// block in it.
func (p *Pool) region(cluster uint32) (g *region, index, block uint32) {
	z := p.zoneOf(cluster)
	i := cluster % p.zoneClusters
	return &z.regions[i/regionClusters], cluster / regionClusters, i % regionClusters * clusterBlocks
}

// regionAt is the region of a number.
func (p *Pool) regionAt(index uint32) (g *region, z *zone) {
	per := p.zoneClusters / regionClusters
	z = (*p.zones.Load())[index/per]
	return &z.regions[index%per], z
}

// sumsOffset is where the pair of a region's checksum pages lies on its zone's disk.
func (p *Pool) sumsOffset(z *zone, index uint32) uint64 {
	return z.sums + uint64(index%(p.zoneClusters/regionClusters))*pairSize
}

// fail stops the pool: nothing is changed any more until it is opened anew.
func (p *Pool) fail(err error) {
	if !p.failure.CompareAndSwap(nil, &err) {
		return
	}
	p.log.Error("pool stopped", "pool", p.name, "error", err)
	p.event(Event{Kind: EventStopped, Message: fmt.Sprintf("pool %s takes no more changes: %v; close it and open it again", p.name, err)})
}

// failed is the reason the pool has stopped, or nil.
func (p *Pool) failed() error {
	if e := p.failure.Load(); e != nil {
		return fmt.Errorf("pool %s: %w: %w", p.name, ErrStopped, *e)
	}
	return nil
}

// writable says why nothing may be changed, or nil.
func (p *Pool) writable() error {
	if p.config.ReadOnly {
		return fmt.Errorf("pool %s: %w", p.name, ErrReadOnly)
	}
	return p.failed()
}

func (p *Pool) event(e Event) {
	if p.config.Event == nil {
		return
	}
	e.Time, e.Pool = time.Now(), p.name
	p.config.Event(e)
}

// free gives clusters up. They are used again when the change that frees them is
// durable, which changed has been told of before, and nobody reads them any more.
func (p *Pool) free(clusters ...uint32) {
	p.freed.Lock()
	p.freed.clusters = append(p.freed.clusters, clusters...)
	p.freed.Unlock()
	p.alloc.mu.Lock()
	p.alloc.grace += uint64(len(clusters))
	p.alloc.mu.Unlock()
	p.wakeKeeper()
}

// graceList holds clusters whose freeing is durable until no request that could
// still touch them is under way.
type graceList struct {
	sync.Mutex
	waiting []graceBatch
}

type graceBatch struct {
	epoch    uint64
	clusters []uint32
}

// reclaim moves the epoch on if every request of the epoch before has ended, and
// returns clusters to the allocator that two epochs have passed over. It reports
// whether some are left.
func (p *Pool) reclaim() (left bool) {
	p.grace.Lock()
	defer p.grace.Unlock()
	for range 3 {
		if len(p.grace.waiting) == 0 {
			return false
		}
		now := p.epoch.Load()
		p.queuesMu.Lock()
		busy := false
		for _, q := range p.queues {
			busy = busy || q.active[(now+1)&1].Load() != 0
		}
		p.queuesMu.Unlock()
		if busy {
			return true
		}
		now++
		p.epoch.Store(now)
		for len(p.grace.waiting) > 0 && p.grace.waiting[0].epoch+2 <= now {
			batch := p.grace.waiting[0].clusters
			p.grace.waiting = p.grace.waiting[1:]
			p.alloc.put(batch, p.zoneClusters)
			p.alloc.mu.Lock()
			p.alloc.grace -= uint64(len(batch))
			p.alloc.mu.Unlock()
			p.moreSpace()
		}
	}
	return len(p.grace.waiting) > 0
}

// moreSpace lets a merge go on that waits for space.
func (p *Pool) moreSpace() {
	if p.mergeWaits.Swap(false) {
		p.startMerging()
	}
}

// addQueue makes q known; removeQueue forgets it, with nothing under way.
func (p *Pool) addQueue(q *queue) {
	p.queuesMu.Lock()
	defer p.queuesMu.Unlock()
	p.queues = append(p.queues, q)
}

func (p *Pool) removeQueue(q *queue) {
	p.queuesMu.Lock()
	defer p.queuesMu.Unlock()
	for i, x := range p.queues {
		if x == q {
			p.queues = append(p.queues[:i], p.queues[i+1:]...)
			return
		}
	}
}

// loadSums brings the checksums of a region into memory, computing them where a
// crash has left them behind. Any ordinary goroutine; sumsMu is not held.
func (p *Pool) loadSums(index uint32) error {
	g, z := p.regionAt(index)
	if g.state.Load()&regionUntrusted != 0 {
		return p.rebuildSums(index)
	}
	if g.page.Load() != nil {
		return nil
	}
	if z.disk == nil {
		return errors.New("the disk is missing")
	}
	b := alignedBytes(pairSize)
	for g.page.Load() == nil && !p.installFresh(g, z, index) {
		seen := g.version()
		if err := z.disk.readPages(b, p.sumsOffset(z, index)); err != nil {
			return err
		}
		p.installSums(g, z, index, b, seen)
	}
	return nil
}

// installFresh gives a region that nothing was ever stored for its first page,
// without a look at the disk. Any thread.
func (p *Pool) installFresh(g *region, z *zone, index uint32) bool {
	seen := g.version()
	if regionState(z.states[index%uint32(len(z.regions))].Load()) != regionFresh || g.state.Load()&regionUntrusted != 0 || g.version() != seen {
		return false
	}
	if g.page.CompareAndSwap(nil, &sumPage{}) {
		p.sumPages.Add(1)
	}
	return true
}

// installEmpty gives a clean region without data a page, without a look at the one on
// disk: no checksum in it is of any block. The page is stored, when it is, as a newer one
// than that: each of those before was told to the journal, and so had a number below the
// journal's. Committer, with sumsMu held.
func (p *Pool) installEmpty(g *region) {
	if g.page.Load() == nil && g.page.CompareAndSwap(nil, &sumPage{stamp: p.journal.next.Load()}) {
		p.sumPages.Add(1)
	}
}

// installSums makes the page read into b that of the region, unless another was
// faster. seen is the region's version before the read: where it was written since,
// nothing is installed, and the caller reads again. Any thread.
func (p *Pool) installSums(g *region, z *zone, index uint32, b []byte, seen uint64) {
	page, ok := p.decodeSums(b, index)
	lost := !ok && regionState(z.states[index%uint32(len(z.regions))].Load()) != regionFresh
	if !ok {
		page = &sumPage{}
	}
	if lost {
		for i := range page.sums {
			page.sums[i].Store(poison)
		}
	}
	// Where another was faster, the region may have become dirty since, and what was
	// read here means nothing.
	if g.version() != seen || !g.page.CompareAndSwap(nil, page) {
		return
	}
	p.sumPages.Add(1)
	if ok {
		p.healSums(z, index, b)
	}
	if lost {
		p.event(Event{Kind: EventCorrupt, Device: z.disk.path, Address: p.sumsOffset(z, index),
			Message: fmt.Sprintf("both copies of the checksums of region %d are damaged: its blocks cannot be proven until they are written again", index)})
	}
}

// healSums has a pair of checksum pages written again of which one copy is damaged:
// the region becomes dirty, and is cleaned like any other. Any thread.
func (p *Pool) healSums(z *zone, index uint32, b []byte) {
	if p.tellDamaged(z.disk, p.sumsOffset(z, index), b, uint64(index)) && p.writable() == nil {
		p.askDirty(index, nobody{})
	}
}

// nobody waits for nothing.
type nobody struct{}

func (nobody) wake(error) {}

// tellDamaged reports whether one copy of the pair b of pages, which lies at offset of
// d, is damaged, and tells of it.
func (p *Pool) tellDamaged(d *disk, offset uint64, b []byte, self uint64) (damaged bool) {
	for i := range uint64(2) {
		if _, ok := openPage(b[i*pageSize:][:pageSize], p.id, self); !ok {
			damaged = true
			p.event(Event{Kind: EventRepaired, Device: d.path, Address: offset + i*pageSize,
				Message: "one copy of a page of metadata was damaged; it was read from the other, and is written again"})
		}
	}
	return damaged
}
