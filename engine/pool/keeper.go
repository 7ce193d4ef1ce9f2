package pool

import (
	"fmt"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

const (
	keeperTick = 500 * time.Millisecond
	// cleanAfter is how long a region is left dirty after its last write: one that is
	// written again soon saves two writes of the journal and one of checksums.
	cleanAfter = 5 * time.Second
	// settleAfter is how long a change waits for a flush before it is made durable
	// anyway.
	settleAfter = time.Second
	// checkpointAfter is how long pages wait for a checkpoint when the journal has
	// room.
	checkpointAfter = 30 * time.Second
	// settleRounds bounds settle, which needs a round or two when nobody writes, and
	// more to rebuild what a crash left behind.
	settleRounds = 1000
	// cleanBatch is how many regions are cleaned between two flushes.
	cleanBatch = 64
)

// dirtyRegion is what the keeper remembers of a region that is dirty. Guarded by
// sumsMu.
type dirtyRegion struct {
	seen  uint64 // its state, when last looked at
	since time.Time
	// ahead: it has no data, and is dirty only because one before it was written to;
	// before is what it was, version the region's at that time.
	ahead   bool
	before  regionState
	version uint64
}

// wakeKeeper tells the keeper that there is something to look after. Any thread.
func (p *Pool) wakeKeeper() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// runKeeper looks after what needs no hurry: it makes changes durable that nobody
// flushes, cleans regions, writes checkpoints, drops checksums, and computes those
// that a crash left behind. It sleeps without a timer while there is nothing. It
// ends with stopping.
func (p *Pool) runKeeper() {
	defer p.stopped.Done()
	p.startMerging()
	for p.hasWork() {
		if !p.tick(false) {
			return
		}
	}
	for {
		select {
		case <-p.stopping:
			return
		case <-p.wake:
		}
		for p.hasWork() {
			if !p.tick(false) {
				return
			}
		}
	}
}

// hasWork reports whether anything is left to look after.
func (p *Pool) hasWork() bool {
	if p.failed() != nil {
		return p.rebuildAsked()
	}
	p.sumsMu.Lock()
	dirty := len(p.dirty)
	p.sumsMu.Unlock()
	p.grace.Lock()
	grace := len(p.grace.waiting)
	p.grace.Unlock()
	p.freed.Lock()
	freed := len(p.freed.clusters)
	p.freed.Unlock()
	return dirty+grace+freed > 0 || p.changes.Load() != p.settled.Load() || p.rebuildAsked() || p.journal.used() > 0 || p.sumsOver() > 0
}

// tick waits a moment and then does what is due; false: the pool is stopping.
func (p *Pool) tick(now bool) bool {
	timer := time.NewTimer(keeperTick)
	defer timer.Stop()
	for wait := !now; wait; {
		select {
		case <-p.stopping:
			return false
		case <-timer.C:
			wait = false
		case <-p.wake:
			if p.rebuildAsked() || p.journal.used() > p.journal.capacity()/2 {
				wait = false
			}
		}
	}
	if err := p.serveRebuilds(); err != nil {
		p.log.Error("checksums after a crash", "pool", p.name, "error", err)
	}
	if p.failed() != nil {
		return true
	}
	if p.changes.Load() != p.settled.Load() || p.freedSome() {
		if p.unsettledSince.IsZero() {
			p.unsettledSince = time.Now()
		}
		if time.Since(p.unsettledSince) >= settleAfter {
			p.unsettledSince = time.Time{}
			if err := p.commitAll(); err != nil {
				return true
			}
		}
	} else {
		p.unsettledSince = time.Time{}
	}
	p.reclaim()
	p.watchSpace()
	if err := p.cleanRegions(cleanAfter); err != nil {
		p.fail(err)
		return true
	}
	if used := p.journal.used(); used > p.journal.capacity()/2 || used > 0 && time.Since(p.checkpointed) > checkpointAfter {
		p.checkpointed = time.Now()
		if err := p.checkpoint(); err != nil {
			return true
		}
	}
	p.dropSums()
	return true
}

func (p *Pool) freedSome() bool {
	p.freed.Lock()
	defer p.freed.Unlock()
	return len(p.freed.clusters) > 0
}

// cleanRegions makes regions clean that were not written to for some time: their
// checksums are stored, all disks flushed, and the journal told.
func (p *Pool) cleanRegions(after time.Duration) error {
	p.cleanMu.Lock()
	defer p.cleanMu.Unlock()
	now := time.Now()
	type candidate struct {
		index  uint32
		seen   uint64
		sums   *sumPage
		unused bool        // it is as it was before
		before regionState // then
	}
	var batch []candidate
	p.sumsMu.Lock()
	for index, d := range p.dirty {
		g, _ := p.regionAt(index)
		s := g.state.Load() &^ uint64(regionUsed)
		if s&regionUntrusted != 0 {
			continue
		}
		if s != d.seen || d.since.IsZero() {
			d.seen, d.since = s, now
			if after > 0 {
				continue
			}
		}
		if s&regionWriters != 0 || now.Sub(d.since) < after {
			continue
		}
		batch = append(batch, candidate{index, g.state.Load(), g.page.Load(), d.ahead && g.version() == d.version, d.before})
		if len(batch) == cleanBatch && after > 0 {
			break
		}
	}
	p.sumsMu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	var writes []*call
	for _, c := range batch {
		_, z := p.regionAt(c.index)
		if z.disk == nil || c.unused {
			continue
		}
		b := alignedBytes(pairSize)
		c.sums.stamp++
		p.encodeSums(b, c.index, c.sums, c.sums.stamp)
		writes = append(writes, z.disk.start(datapath.OpWrite, 0, b, p.sumsOffset(z, c.index)))
		if len(writes) == syncDepth/2 {
			if err := waitAll(&writes); err != nil {
				return err
			}
		}
	}
	if err := waitAll(&writes); err != nil {
		return err
	}
	p.applyMu.RLock()
	disks := p.disks // AddDisk replaces it
	p.applyMu.RUnlock()
	if err := flushAll(disks); err != nil {
		return err
	}
	var cleaned, unused []uint32
	p.sumsMu.Lock()
	for _, c := range batch {
		g, _ := p.regionAt(c.index)
		// The bit of use may have changed; nothing else may.
		for _, seen := range []uint64{c.seen &^ uint64(regionUsed), c.seen | regionUsed} {
			if g.clean(seen) {
				delete(p.dirty, c.index)
				if c.unused && c.before == regionFresh {
					unused = append(unused, c.index)
				} else {
					cleaned = append(cleaned, c.index)
				}
				break
			}
		}
	}
	p.sumsMu.Unlock()
	if len(cleaned)+len(unused) > 0 {
		p.request.Lock()
		p.request.cleans = append(p.request.cleans, cleaned...)
		p.request.unused = append(p.request.unused, unused...)
		p.request.Unlock()
		p.kickCommitter()
	}
	return nil
}

func waitAll(calls *[]*call) (first error) {
	for _, c := range *calls {
		if err := c.wait(); err != nil && first == nil {
			first = err
		}
	}
	*calls = (*calls)[:0]
	return first
}

// sumsOver is how many pages of checksums are in memory beyond the bound.
func (p *Pool) sumsOver() int64 {
	return p.sumPages.Load() - p.config.SumCacheBytes/pageSize
}

// dropSums lets go of checksums that were not used since it last looked.
func (p *Pool) dropSums() {
	over := p.sumsOver()
	if over <= 0 {
		return
	}
	p.sumsMu.Lock()
	defer p.sumsMu.Unlock()
	zones := *p.zones.Load()
	total := uint32(len(zones)) * (p.zoneClusters / regionClusters)
	for range 2 * total {
		p.hand = (p.hand + 1) % total
		g, _ := p.regionAt(p.hand)
		if g.page.Load() == nil {
			continue
		}
		if g.state.Load()&regionUsed != 0 {
			g.state.And(^uint64(regionUsed))
			continue
		}
		if g.drop() {
			p.sumPages.Add(-1)
			if over--; over <= 0 {
				return
			}
		}
	}
}

// askRebuild wakes w when the checksums of a region that a crash left behind have
// been computed. Any thread.
func (p *Pool) askRebuild(index uint32, w waiter) {
	p.rebuilds.Lock()
	p.rebuilds.waiting[index] = append(p.rebuilds.waiting[index], w)
	p.rebuilds.Unlock()
	if p.config.Manual || p.config.ReadOnly {
		p.stopped.Add(1)
		go func() { // ends by itself
			defer p.stopped.Done()
			_ = p.serveRebuilds() // w hears of errors
		}()
		return
	}
	p.wakeKeeper()
}

func (p *Pool) rebuildAsked() bool {
	p.rebuilds.Lock()
	defer p.rebuilds.Unlock()
	return len(p.rebuilds.waiting) > 0
}

// serveRebuilds computes what was asked for, and then one batch of the rest.
func (p *Pool) serveRebuilds() error {
	var first error
	for {
		p.rebuilds.Lock()
		index, waiting := uint32(0), []waiter(nil)
		for i, w := range p.rebuilds.waiting {
			index, waiting = i, w
			break
		}
		delete(p.rebuilds.waiting, index)
		p.rebuilds.Unlock()
		if waiting == nil {
			break
		}
		err := p.rebuildSums(index)
		if first == nil {
			first = err
		}
		for _, w := range waiting {
			w.wake(err)
		}
	}
	end := time.Now().Add(keeperTick / 2)
	for time.Now().Before(end) && !p.rebuildAsked() {
		p.sumsMu.Lock()
		next, found := uint32(0), false
		for i := range p.dirty {
			if g, _ := p.regionAt(i); g.state.Load()&regionUntrusted != 0 {
				next, found = i, true
				break
			}
		}
		p.sumsMu.Unlock()
		if !found {
			break
		}
		if err := p.rebuildSums(next); err != nil {
			return err
		}
	}
	return first
}

// rebuildSums computes the checksums of a region that was dirty when the pool was
// last used: its data is what it is. Nobody writes to the region until its page is
// there. A block that cannot be read keeps what was stored for it.
func (p *Pool) rebuildSums(index uint32) error {
	p.rebuildMu.Lock()
	defer p.rebuildMu.Unlock()
	g, z := p.regionAt(index)
	if g.state.Load()&regionUntrusted == 0 {
		return nil
	}
	if z.disk == nil {
		return fmt.Errorf("region %d: its disk is missing", index)
	}
	b := alignedBytes(pairSize)
	lost := z.disk.readPages(b, p.sumsOffset(z, index)) // is no harm as long as all data can be read
	page, ok := p.decodeSums(b, index)
	if !ok {
		page = &sumPage{}
		for i := range page.sums {
			page.sums[i].Store(poison)
		}
	}
	data := alignedBytes(clusterSize)
	first := index * regionClusters
	for i := range uint32(regionClusters) {
		if !p.alloc.used(first+i, p.zoneClusters) {
			continue
		}
		d, offset := p.address(first + i)
		if d.read(data, offset) == nil {
			for j := range uint32(clusterBlocks) {
				page.sums[i*clusterBlocks+j].Store(checksum(data[j*blockSize:][:blockSize]))
			}
			continue
		}
		for j := range uint32(clusterBlocks) {
			block := data[:blockSize]
			if d.read(block, offset+uint64(j)*blockSize) == nil {
				page.sums[i*clusterBlocks+j].Store(checksum(block))
			} else if lost != nil {
				return lost // the disk may come back
			}
		}
	}
	p.sumsMu.Lock()
	defer p.sumsMu.Unlock()
	if g.page.CompareAndSwap(nil, page) {
		p.sumPages.Add(1)
	}
	// The journal has it as dirty.
	g.state.Or(regionIsDirty)
	g.state.And(^uint64(regionUntrusted))
	return nil
}

// settle makes everything durable and clean, for a close in order.
// It gives up after some rounds on regions that others go on writing to.
func (p *Pool) settle() error {
	for round := 0; ; round++ {
		unknown := p.serveRebuilds()
		if err := p.commitAll(); err != nil {
			return err
		}
		if unknown != nil || round == settleRounds {
			return unknown
		}
		p.sumsMu.Lock()
		left := len(p.dirty)
		p.sumsMu.Unlock()
		if left == 0 {
			return nil
		}
		if err := p.cleanRegions(0); err != nil {
			return err
		}
	}
}

// Maintain does at once what the background would do in time: merges, frees,
// cleans regions, writes a checkpoint. For tests, with Config.Manual.
func (p *Pool) Maintain() error {
	if err := p.writable(); err != nil {
		return err
	}
	if err := p.mergeAll(); err != nil {
		return err
	}
	if err := p.settle(); err != nil {
		return err
	}
	if err := p.commitAll(); err != nil { // frees what the merge gave up
		return err
	}
	for range 3 {
		p.reclaim()
	}
	if err := p.checkpoint(); err != nil {
		return err
	}
	p.dropSums()
	return nil
}

// spaceLevels are the percentages of use that an operator hears of.
var spaceLevels = []int32{80, 90, 95}

// watchSpace tells of a threshold that was passed.
func (p *Pool) watchSpace() {
	// Not from Info, which takes mu: who has that may wait for the keeper.
	total, free := p.alloc.space()
	if total == 0 {
		return
	}
	used := int32((total - free) * 100 / total)
	level := int32(0)
	for _, l := range spaceLevels {
		if used >= l {
			level = l
		}
	}
	if old := p.spaceLevel.Swap(level); level > old {
		p.event(Event{Kind: EventSpaceLow, Message: fmt.Sprintf("pool %s is %d %% full: %d of %d bytes are left; grow it, or delete snapshots or volumes", p.name, used, free, total)})
	}
}

// toldFull tells, at most once a minute, that a write found no space.
func (p *Pool) toldFull(v *volume) {
	now := time.Now().Unix()
	if last := v.toldFull.Load(); now-last >= 60 && v.toldFull.CompareAndSwap(last, now) {
		go p.event(Event{Kind: EventFull, Volume: v.name, Message: fmt.Sprintf("a write to %s found no space in pool %s", v.name, p.name)})
	}
}
