package pool

import (
	"errors"

	"github.com/ashlar-storage/ashlar/datapath"
)

// advanceWrite begins the next piece of a write.
func (s *slot) advanceWrite() bool {
	q := s.q
	at := s.next
	v, b := uint32(at>>clusterShift), uint32(at%clusterSize/blockSize)
	c := q.takePiece(s)
	if c == nil {
		return false
	}
	c.v, c.first = v, b
	buf := s.r.Buf[at-s.r.Offset:]
	if from := at % blockSize; from != 0 || s.end-at < blockSize {
		n := min(blockSize-from, s.end-at)
		s.next += n
		c.patchBlock(buf[:n], int(from), int(n))
		return true
	}
	count := min((s.end-at)/blockSize, uint64(clusterBlocks-b))
	n := count * blockSize
	s.next += n
	c.count, c.buf, c.mask = uint32(count), buf[:n:n], maskOf(b, uint32(count))
	c.write()
	return true
}

// patchBlock begins a change of a part of a block: the block is read, changed and
// written, with other changes of it locked out. A nil part is zeros.
func (c *piece) patchBlock(part []byte, from, length int) {
	c.count, c.mask, c.part, c.from, c.length = 1, 1<<c.first, part, from, length
	c.patchLocked()
}

func (c *piece) patchLocked() {
	if !c.lock((*piece).patchLocked) || c.bounce == nil && !c.takeBounce((*piece).patchLocked) {
		return
	}
	c.buf = c.bounce
	cluster, _ := c.q.v.head.Load().locate(c.v, c.first, 1)
	if cluster == noCluster {
		clear(c.buf)
		c.patch()
		return
	}
	c.again = cluster
	d, offset := c.q.p.address(cluster)
	c.toDisk()
	c.submit(datapath.OpRead, 0, d, offset+uint64(c.first)*blockSize, c.buf, (*piece).patchRead)
}

func (c *piece) patchRead() {
	c.fromDisk(datapath.StageMetadata)
	if c.req.Status != datapath.StatusOK {
		c.cluster = c.again
		c.diskFailed("read")
		c.end(datapath.StatusIO)
		return
	}
	c.patchVerify()
}

func (c *piece) patchVerify() {
	p := c.q.p
	g, index, block := p.region(c.again)
	page := g.page.Load()
	if page == nil {
		if c.err != nil {
			c.end(datapath.StatusIO)
			return
		}
		if c.needSums(index, (*piece).patchVerify) {
			c.patchVerify()
		}
		return
	}
	if checksum(c.buf) != page.sums[block+c.first].Load() {
		if c.tries++; c.tries < 2 {
			c.patchLocked()
			return
		}
		d, offset := p.address(c.again)
		p.corrupt.Add(1)
		p.event(Event{Kind: EventCorrupt, Volume: c.q.v.name, Offset: uint64(c.v)<<clusterShift + uint64(c.first)*blockSize, Device: d.path,
			Address: offset + uint64(c.first)*blockSize, Message: "a block differs from its checksum, twice: a part of it cannot be changed; write the whole block"})
		c.end(datapath.StatusCorrupt)
		return
	}
	c.patch()
}

func (c *piece) patch() {
	if c.part == nil {
		clear(c.buf[c.from : c.from+c.length])
	} else {
		copy(c.buf[c.from:], c.part)
	}
	c.write()
}

// write locks the piece's blocks and finds their place.
func (c *piece) write() {
	if !c.lock((*piece).write) {
		return
	}
	c.place()
}

// place finds or allocates the cluster of the piece's blocks, which are locked.
func (c *piece) place() {
	q := c.q
	p, v := q.p, q.v
	l := v.head.Load()
	e := l.lookup(c.v)
	for ; e.cluster() == noCluster; e = l.lookup(c.v) {
		v.allocating.Add(1)
		n, thick, ok := v.allocate(l, c.v)
		coming := false
		if !ok {
			// What was freed may have become free just after the first look; asked for in
			// this order, it is not missed.
			coming = p.alloc.pendingSpace()
			n, thick, ok = v.allocate(l, c.v)
		}
		if !ok {
			others := v.allocating.Add(-1) > 0
			if e = l.lookup(c.v); e.cluster() != noCluster {
				break
			}
			if others { // which may be about to enter this cluster, or to give one back
				c.later((*piece).place)
				return
			}
			if c.spaced < spaceTries && coming {
				c.spaced++
				c.awaitSpace()
				return
			}
			p.toldFull(v)
			c.end(datapath.StatusNoSpace)
			return
		}
		if l.page(c.v).entries[c.v%mapEntries].CompareAndSwap(uint64(e), uint64(makeEntry(n, 0, e.zero()))) {
			v.allocating.Add(-1)
			e = makeEntry(n, 0, e.zero())
			l.owned.Add(1)
			break
		}
		v.unallocate(n, thick) // another piece was faster
		v.allocating.Add(-1)
	}
	c.cluster = e.cluster()
	c.inPlace = e.mask()&c.mask != 0
	c.region, c.index, c.block = p.region(c.cluster)
	c.err = nil
	c.enterRegion()
}

// spaceTries is how often a piece waits for space that was freed and that others
// may take first.
const spaceTries = 16

// awaitSpace waits until what was freed may be used again. The request has to be out
// of its epoch meanwhile, as far as it holds on to nothing: it would wait for itself.
func (c *piece) awaitSpace() {
	c.err = nil
	c.then = (*piece).spaceCame
	c.rest()
	c.q.p.askSpace(c)
}

func (c *piece) spaceCame() {
	switch {
	case errors.Is(c.err, errBusy):
		c.spaced = spaceTries
	case c.err != nil:
		c.end(datapath.StatusIO)
		return
	}
	c.place()
}

// enterRegion waits until the region of the piece's cluster is dirty.
func (c *piece) enterRegion() {
	if c.err != nil {
		c.end(datapath.StatusIO)
		return
	}
	if state := c.region.enter(); state&regionIsDirty != 0 {
		if state&regionNext != 0 {
			c.q.comesTo(c.region, c.index, true)
		}
		c.send()
		return
	}
	c.q.waitsIn(c.index, true)
	if !c.needSums(c.index, (*piece).enterRegion) {
		return
	}
	c.then = (*piece).enterRegion
	c.q.p.askDirty(c.index, c)
}

// send writes the blocks. The region is entered.
func (c *piece) send() {
	var flags datapath.Flags
	if c.s.r.Flags&datapath.FlagFUA != 0 {
		flags = datapath.FlagFUA
	}
	d, offset := c.q.p.address(c.cluster)
	c.toDisk()
	c.submit(datapath.OpWrite, flags, d, offset+uint64(c.first)*blockSize, c.buf, (*piece).sent)
}

func (c *piece) sent() {
	next := datapath.StageFinish
	if s := c.s; s.pieces > 1 || s.next < s.end {
		next = datapath.StageMetadata
	}
	c.fromDisk(next)
	p := c.q.p
	if c.req.Status != datapath.StatusOK {
		c.diskFailed("write")
		if c.inPlace {
			c.relearn()
			return
		}
		c.region.leave()
		c.end(datapath.StatusIO)
		return
	}
	page := c.region.page.Load()
	for i := range c.count {
		page.sums[c.block+c.first+i].Store(checksum(c.buf[i*blockSize:][:blockSize]))
	}
	// Only now can a read find the blocks here.
	l := c.q.v.head.Load()
	m := l.page(c.v)
	i := c.v % mapEntries
	for {
		e := entry(m.entries[i].Load())
		if e.mask()&c.mask == c.mask {
			break
		}
		if n := e | entry(c.mask); m.entries[i].CompareAndSwap(uint64(e), uint64(n)) {
			m.changed(i)
			if p.note(l.id, c.v, pendingSet, makeEntry(c.cluster, c.mask, e.zero())) {
				c.s.commit = true
			}
			break
		}
	}
	c.region.leave()
	c.end(datapath.StatusOK)
}

// relearn reads back the blocks of a write that failed: each of them is old, new
// or, on a disk that tears, something else, and from now on what it is. It is no
// part of the fast path.
func (c *piece) relearn() {
	d, offset := c.q.p.address(c.cluster)
	c.buf = alignedBytes(int(c.count) * blockSize)
	c.submit(datapath.OpRead, 0, d, offset+uint64(c.first)*blockSize, c.buf, (*piece).relearned)
}

func (c *piece) relearned() {
	if c.req.Status == datapath.StatusOK {
		page := c.region.page.Load()
		for i := range c.count {
			page.sums[c.block+c.first+i].Store(checksum(c.buf[i*blockSize:][:blockSize]))
		}
	}
	c.region.leave()
	c.end(datapath.StatusIO)
}

// allocate takes a cluster for cluster at of the volume, and makes the page of the
// map that will name it; thick says that it came out of the volume's reservation.
func (v *volume) allocate(head *layer, at uint32) (cluster uint32, thick, ok bool) {
	p := v.p
	if head.pageIfRoom(at) == nil {
		return 0, false, false
	}
	if v.reserved.Load() > 0 {
		if v.reserved.Add(-1) >= 0 {
			if cluster, ok = p.alloc.take(claimReserved, p.zoneClusters); ok {
				return cluster, true, true
			}
		}
		v.reserved.Add(1)
	}
	cluster, ok = p.alloc.take(claimData, p.zoneClusters)
	return cluster, false, ok
}

// unallocate gives a cluster back that nothing was written to.
func (v *volume) unallocate(cluster uint32, thick bool) {
	v.p.alloc.putNow(cluster, thick, v.p.zoneClusters)
	if thick {
		v.reserved.Add(1)
	}
}

// keepLess gives up the reservation of one cluster, which the head of a thick volume
// got in another way.
func (v *volume) keepLess() {
	if !v.thick.Load() || v.reserved.Load() <= 0 {
		return
	}
	if v.reserved.Add(-1) < 0 {
		v.reserved.Add(1)
		return
	}
	v.p.alloc.promise(-1, 0)
}

// pendingSpace reports whether a commit would free something.
func (a *allocator) pendingSpace() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.grace > 0
}

// advanceZero does the next part of a discard or a write of zeros.
func (s *slot) advanceZero() bool {
	q := s.q
	for budget := 0; s.next < s.end; budget++ {
		if budget == zeroBudget {
			if s.pieces == 0 {
				s.goOnLater()
			}
			return false
		}
		at := s.next
		v, b := uint32(at>>clusterShift), uint32(at%clusterSize/blockSize)
		head := q.v.head.Load()
		keep := s.r.Op == datapath.OpWriteZeroes && s.r.Flags&datapath.FlagNoUnmap != 0
		if !keep {
			if n := head.emptyRun(at, s.end); n > 0 {
				s.next += n
				continue
			}
		}
		if s.pieces > 0 {
			return false // one at a time; it goes on when that has ended
		}
		c := q.takePiece(s)
		c.v, c.first = v, b
		if from := at % blockSize; from != 0 || s.end-at < blockSize {
			n := min(blockSize-from, s.end-at)
			s.next += n
			c.patchBlock(nil, int(from), int(n))
			return true
		}
		count := min((s.end-at)/blockSize, uint64(clusterBlocks-b))
		s.next += count * blockSize
		c.count, c.mask = uint32(count), maskOf(b, uint32(count))
		c.buf = q.zeros[:count*blockSize]
		if keep {
			c.write()
		} else {
			c.zero()
		}
		if s.status != datapath.StatusOK {
			return false
		}
	}
	return true
}

// zeroBudget is how many steps a discard takes in one turn; each is a cluster, or
// an empty page of the map.
const zeroBudget = 256

// emptyRun is how many bytes from at on no layer has anything for, as far as that
// can be seen at once: pages that are not there, entries that are empty.
func (l *layer) emptyRun(at, end uint64) uint64 {
	v := uint32(at >> clusterShift)
	const pageBytes = mapEntries << clusterShift
	for p := l.p; ; {
		began := p.merges.Load()
		if began&1 != 0 {
			continue
		}
		stop := min(end, (at/pageBytes+1)*pageBytes)
		for x := l; x != nil; x = x.parent.Load() {
			table := *x.table.Load()
			i := int(v / mapEntries)
			if i >= len(table) || table[i].Load() == nil {
				continue
			}
			e := x.lookup(v)
			if e.mask() != 0 || e.cluster() != noCluster {
				stop = at
				break
			}
			stop = min(stop, uint64(v+1)<<clusterShift)
			if e.zero() {
				break
			}
		}
		if p.merges.Load() == began {
			return stop - at
		}
	}
}

// zero makes the piece's blocks read as zeros without storage, where the map can
// say so, and else writes zeros.
func (c *piece) zero() {
	if !c.lock((*piece).zero) {
		return
	}
	q := c.q
	p, v := q.p, q.v
	l := v.head.Load()
	parent := l.parent.Load()
	var below uint32 // blocks that would show through
	if parent != nil {
		below = parent.visible(c.v)
	}
	whole := c.mask == wholeMask
	if !whole && v.locks.widen(c.v, c.mask) {
		whole = true // nobody else is in the cluster: it may be given up
	}
	unwiden := func() {
		if whole && c.mask != wholeMask {
			q.tell(v.locks.release(c.v, ^c.mask))
		}
	}
	page := l.pageIfRoom(c.v)
	if page == nil {
		unwiden()
		c.end(datapath.StatusNoSpace)
		return
	}
	slot := &page.entries[c.v%mapEntries]
	for {
		e := entry(slot.Load())
		mask := e.mask() &^ c.mask
		zero := e.zero()
		if !zero && below&c.mask != 0 {
			// The parent must not show through: then nothing of it may, or the zeros
			// have to be written.
			if below&^c.mask&^e.mask() != 0 {
				unwiden()
				c.place()
				return
			}
			zero = true
		}
		n := makeEntry(e.cluster(), mask, zero)
		freed := mask == 0 && whole && e.cluster() != noCluster
		if freed {
			n = makeEntry(noCluster, 0, zero)
		}
		if n == e {
			break
		}
		if !slot.CompareAndSwap(uint64(e), uint64(n)) {
			continue
		}
		page.changed(c.v % mapEntries)
		kind, noted := pendingClear, makeEntry(noCluster, c.mask, zero)
		if freed {
			kind, noted = pendingRelease, makeEntry(e.cluster(), 0, zero)
		}
		if p.note(l.id, c.v, kind, noted) {
			c.s.commit = true
		}
		if freed {
			l.owned.Add(-1)
			v.freed(e.cluster())
		}
		break
	}
	unwiden()
	c.end(datapath.StatusOK)
}

// freed gives up a cluster of the head; a thick volume keeps the space.
func (v *volume) freed(cluster uint32) {
	if v.thick.Load() {
		v.p.alloc.mu.Lock()
		v.p.alloc.reserved++
		v.p.alloc.mu.Unlock()
		v.reserved.Add(1)
	}
	v.p.free(cluster)
}

// advanceOther serves flush, extents and what is not supported.
func (s *slot) advanceOther() bool {
	s.next = s.end
	if s.r.Op != datapath.OpFlush && s.r.Op != datapath.OpExtents {
		s.status = datapath.StatusNotSupported
	}
	return false
}

// flush makes every change durable that has completed. Where the journal has all
// changes of the maps, flushing the disks is enough.
func (s *slot) flush() {
	q, p := s.q, s.q.p
	if p.failure.Load() != nil {
		s.status = datapath.StatusIO
		s.finish()
		return
	}
	if p.config.ReadOnly || q.v.readOnly {
		s.finish()
		return
	}
	s.r.Mark(datapath.StageCommit, q.r)
	if s.unsettled() {
		s.waits = true
		p.askFlush(s)
		return
	}
	if s.flushed {
		s.finish()
		return
	}
	disks := *p.members.Load()
	if len(disks) > 1 {
		s.waits = true
		p.askFlush(s) // which flushes them together
		return
	}
	s.flushed = true
	q.takePiece(s).submit(datapath.OpFlush, 0, disks[0], 0, nil, (*piece).flushDone)
}

func (c *piece) flushDone() {
	if c.req.Status != datapath.StatusOK {
		c.q.p.fail(&DiskError{Path: (*c.q.p.members.Load())[0].path, Op: "flush", Err: c.req.Status.Err()})
		c.end(datapath.StatusIO)
		return
	}
	c.end(datapath.StatusOK)
}
