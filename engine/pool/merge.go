package pool

import (
	"errors"
	"fmt"
	"sort"

	"github.com/ashlar-storage/ashlar/datapath"
)

// mergeBatch is how many clusters are merged in one transaction. Those of a live
// volume are locked meanwhile, which its writers feel.
const mergeBatch = 32

// startMerging has hidden layers merged into their children, until there is none
// left that can be. mu may be held. With Config.Manual, Maintain does it.
func (p *Pool) startMerging() {
	if p.config.Manual {
		return
	}
	p.merging.Lock()
	defer p.merging.Unlock()
	p.merging.again = true
	if p.merging.running || p.config.ReadOnly {
		return
	}
	p.merging.running = p.jobs.start(func() { // ends with jobs.stop
		for {
			p.merging.Lock()
			if !p.merging.again {
				p.merging.running = false
				p.merging.Unlock()
				return
			}
			p.merging.again = false
			p.merging.Unlock()
			if err := p.mergeAll(); err != nil && !errors.Is(err, errClosing) && !errors.Is(err, ErrStopped) {
				p.log.Error("merge", "pool", p.name, "error", err)
			}
		}
	})
}

// mergeAll merges or removes every hidden layer that has less than two children.
func (p *Pool) mergeAll() error {
	p.mergeMu.Lock()
	defer p.mergeMu.Unlock()
	for {
		l, child := p.nextHidden()
		if l == nil {
			return nil
		}
		var err error
		if child == nil {
			err = p.removeHidden(l)
		} else {
			err = p.merge(l, child)
		}
		if errors.Is(err, errRemoved) {
			continue // with nothing that stands on l
		}
		if errors.Is(err, ErrNoSpace) {
			if !p.mergeWaits.Swap(true) {
				continue // space that came before this was said is not missed
			}
			l.job.note("the pool has no room for the map of the layer above: it goes on when something else is deleted, or the pool has grown")
			return nil
		}
		if err != nil {
			if errors.Is(err, errClosing) {
				return err // goes on when the pool is opened again
			}
			l.job.end(err)
			return fmt.Errorf("layer %d: %w", l.id, err)
		}
	}
}

// nextHidden finds a hidden layer to remove or merge, the oldest first.
func (p *Pool) nextHidden() (l, child *layer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var hidden []*layer
	for _, x := range p.layers {
		if x.rec.flags&layerHidden != 0 && x.children < 2 {
			hidden = append(hidden, x)
		}
	}
	if len(hidden) == 0 {
		return nil, nil
	}
	sort.Slice(hidden, func(i, j int) bool { return hidden[i].id < hidden[j].id })
	l = hidden[0]
	for _, x := range p.layers {
		if x.rec.parent == l.id {
			child = x
		}
	}
	if l.job == nil {
		l.job = p.jobs.begin(p, JobMerge, fmt.Sprintf("layer %d", l.id), uint64(l.owned.Load())<<clusterShift)
	}
	l.job.note("") // what kept it is gone
	return l, child
}

// removeHidden removes a layer that nothing stands on.
func (p *Pool) removeHidden(l *layer) error {
	p.mu.Lock()
	err := p.commitTxn(func(b []byte) []byte {
		p.dropPairs(l)
		return appendRecord(b, recordRemove, l.id)
	})
	if err == nil {
		p.removeLayer(l)
	}
	p.mu.Unlock()
	if err != nil {
		return err
	}
	p.freeLayer(l, l.job)
	return nil
}

// startFreeing gives back the clusters of a layer whose removal is durable.
func (p *Pool) startFreeing(l *layer, j *job) {
	if p.config.Manual {
		p.freeLayer(l, j)
		return
	}
	if !p.jobs.start(func() { p.freeLayer(l, j) }) { // ends by itself; memory only
		p.freeLayer(l, j)
	}
}

func (p *Pool) freeLayer(l *layer, j *job) {
	// A batch of a merge into l may be under way; the next one sees that l is gone.
	func() {
		p.batchMu.Lock() // only to wait for its holder
		defer p.batchMu.Unlock()
	}()
	var batch []uint32
	put := func() {
		p.alloc.mu.Lock()
		p.alloc.grace += uint64(len(batch))
		p.alloc.mu.Unlock()
		p.grace.Lock()
		p.grace.waiting = append(p.grace.waiting, graceBatch{p.epoch.Load(), batch})
		p.grace.Unlock()
		j.done.Add(uint64(len(batch)) << clusterShift)
		batch = nil
	}
	l.each(0, func(_ uint32, e entry) bool {
		if c := e.cluster(); c != noCluster {
			batch = append(batch, c)
			if len(batch) == 1<<16 {
				put()
			}
		}
		return true
	})
	put()
	p.reclaim()
	p.wakeKeeper()
	j.end(nil)
}

// errRemoved is how a merge ends when the layer it merges into was removed.
var errRemoved = errors.New("the layer above was removed")

// move is one cluster of a layer that goes into its child.
type move struct {
	v      uint32
	locked *volume
}

// merge moves what child needs of l into it, cluster by cluster, and then takes l
// out of the chain. Reads through child find the same at every moment, and after a
// crash at any: each step is one transaction.
func (p *Pool) merge(l, child *layer) error {
	var moves []move
	release := func() {
		for _, m := range moves {
			if m.locked != nil {
				m.locked.releaseWhole(m.v)
			}
		}
		moves = moves[:0]
	}
	flushBatch := func() error {
		defer release()
		return p.mergeClusters(l, child, moves)
	}
	// While blocks are locked, mu must not be waited for: who has it may wait for
	// changes that wait for those blocks.
	head := p.liveVolume(child)
	live := func() bool { return head != nil && head.head.Load() == child }
	for v := uint32(0); ; {
		if p.jobs.stopped.Load() {
			release()
			return errClosing
		}
		at, found := uint32(0), false
		l.each(v, func(x uint32, _ entry) bool {
			at, found = x, true
			return false
		})
		if !found || len(moves) >= mergeBatch {
			n := len(moves)
			if err := flushBatch(); err != nil {
				return err
			}
			l.job.done.Add(uint64(n) << clusterShift)
			if !found {
				break
			}
			continue
		}
		m := move{v: at}
		if vol := head; live() {
			if !vol.locks.try(at, wholeMask) {
				// What is locked must not wait for what is not.
				if err := flushBatch(); err != nil {
					return err
				}
				vol.locks.waitWhole(at)
			}
			m.locked = vol
			if !live() {
				// A snapshot was taken in between: the child is frozen now.
				vol.releaseWhole(at)
				continue
			}
		}
		moves = append(moves, m)
		v = at + 1
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if child.removed {
		return errRemoved
	}
	rec := child.rec
	rec.parent = l.rec.parent
	err := p.commitTxn(func(b []byte) []byte {
		child.rec = rec
		p.storeRecord(child)
		p.dropPairs(l)
		p.merges.Add(1)
		child.parent.Store(l.parent.Load())
		for _, x := range p.layers { // mu is held
			if c := x.chain.Load(); c.has(l) {
				x.chain.Store(c.without(l, x.rec.size))
			}
		}
		p.merges.Add(1)
		return appendRecord(appendLayerRecord(b, &rec), recordRemove, l.id)
	})
	if err != nil {
		return err
	}
	l.removed = true
	delete(p.layers, l.id) // the parent has as many children as before
	l.job.end(nil)
	return nil
}

// liveVolume is the volume whose head l is, nil when l is frozen.
func (p *Pool) liveVolume(l *layer) *volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.rec.flags&layerFrozen != 0 {
		return nil
	}
	return l.vol
}

// mergeClusters merges some clusters of l, whose places in child nobody else
// changes now.
func (p *Pool) mergeClusters(l, child *layer, moves []move) error {
	if len(moves) == 0 {
		return nil
	}
	type result struct {
		v      uint32
		from   entry // child's, before
		to     entry // child's, after
		freed  uint32
		gained bool // the child has a cluster more
		head   *volume
	}
	p.batchMu.Lock()
	defer p.batchMu.Unlock()
	p.applyMu.RLock()
	gone := child.gone
	p.applyMu.RUnlock()
	if gone {
		return errRemoved
	}
	for _, m := range moves {
		if child.pageIfRoom(m.v) == nil {
			return fmt.Errorf("a page of metadata: %w", ErrNoSpace)
		}
	}
	results := make([]result, 0, len(moves))
	for _, m := range moves {
		below, above := l.lookup(m.v), child.lookup(m.v)
		r := result{v: m.v, from: above, to: above, freed: noCluster, head: m.locked}
		missing := below.mask() &^ above.mask()
		if above.zero() {
			missing = 0
		}
		switch {
		case missing == 0:
			r.to = makeEntry(above.cluster(), above.mask(), above.zero() || below.zero())
			r.freed = below.cluster()
		case above.cluster() == noCluster:
			r.to, r.gained = below, true
		default:
			if err := p.copyBlocks(below.cluster(), above.cluster(), missing); err != nil {
				return err
			}
			r.to = makeEntry(above.cluster(), above.mask()|missing, below.zero())
			r.freed = below.cluster()
		}
		results = append(results, r)
	}
	err := p.commitTxn(func(b []byte) []byte {
		if gone = child.gone; gone {
			return b
		}
		p.merges.Add(1)
		for _, r := range results {
			page, old := child.page(r.v), l.page(r.v)
			i := r.v % mapEntries
			page.entries[i].Store(uint64(r.to))
			old.entries[i].Store(0)
			p.markStale(page)
			p.markStale(old)
			b = appendMapRecord(b, child.id, r.v, r.to)
			b = appendMapRecord(b, l.id, r.v, 0)
			if r.freed != noCluster {
				l.owned.Add(-1)
				p.free(r.freed)
			}
			if r.gained {
				l.owned.Add(-1)
				child.owned.Add(1)
				if r.head != nil {
					r.head.keepLess()
				}
			}
		}
		p.merges.Add(1)
		return b
	})
	if err == nil && gone {
		return errRemoved
	}
	return err
}

// copyBlocks copies blocks of a cluster into another that does not have them yet.
// A block that differs from its checksum is copied with it, so that it stays
// unproven.
func (p *Pool) copyBlocks(from, to, mask uint32) error {
	gFrom, iFrom, bFrom := p.region(from)
	gTo, iTo, bTo := p.region(to)
	if err := p.loadSums(iFrom); err != nil {
		return err
	}
	sums := gFrom.page.Load()
	for sums == nil { // dropped again
		if err := p.loadSums(iFrom); err != nil {
			return err
		}
		sums = gFrom.page.Load()
	}
	for gTo.enter()&regionIsDirty == 0 {
		w := make(flushWaiter, 1)
		p.askDirty(iTo, w)
		if err := <-w; err != nil {
			return err
		}
	}
	defer gTo.leave()
	buffer := alignedBytes(clusterSize)
	dFrom, aFrom := p.address(from)
	dTo, aTo := p.address(to)
	for b := uint32(0); b < clusterBlocks; {
		if mask&(1<<b) == 0 {
			b++
			continue
		}
		n := run(mask, b)
		data := buffer[:n*blockSize]
		if err := dFrom.read(data, aFrom+uint64(b)*blockSize); err != nil {
			return err
		}
		if err := dTo.start(datapath.OpWrite, 0, data, aTo+uint64(b)*blockSize).wait(); err != nil {
			return err
		}
		page := gTo.page.Load()
		for i := range n {
			page.sums[bTo+b+i].Store(sums.sums[bFrom+b+i].Load())
		}
		b += n
	}
	return nil
}
