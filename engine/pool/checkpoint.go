package pool

import (
	"fmt"
	"slices"

	"github.com/ashlar-storage/ashlar/datapath"
)

// checkpointBatch is how many pages are copied and written together, between two
// flushes.
const checkpointBatch = 256

// image is a page on its way to the disk.
type image struct {
	disk   *disk
	offset uint64 // of the pair
	data   []byte
}

// checkpoint writes every page that differs from the disk, so that the journal
// before it is not needed any more.
//
// Both copies of a pair are written, one after the other with a flush between
// them: a torn page leaves the other, and the journal since the last checkpoint
// brings either up to date. When all is durable the superblock says where the
// journal begins now. A page may hold changes the journal does not have yet; their
// data is flushed before the page is written.
func (p *Pool) checkpoint() error {
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	if err := p.failed(); err != nil {
		return err
	}
	if err := p.checkpointLocked(0); err != nil {
		p.fail(err)
		return err
	}
	return nil
}

func (p *Pool) checkpointLocked(flags uint64) error {
	p.applyMu.Lock()
	pages, layers, removed := p.stale, p.staleLayers, p.removedPairs
	p.stale, p.staleLayers, p.removedPairs = nil, nil, nil
	pages = slices.DeleteFunc(pages, func(page *mapPage) bool {
		page.stale = false
		return page.layer.gone
	})
	layers = slices.DeleteFunc(layers, func(l *layer) bool {
		l.recChange = false
		return l.gone
	})
	start, prev, pending, nextLayer := p.journal.next.Load(), p.journal.prev.Load(), p.settled.Load(), p.nextLayer.Load()
	p.applyMu.Unlock()

	stamp := p.super.generation + 1
	var batch []image
	write := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := p.writeImages(batch)
		batch = batch[:0]
		return err
	}
	add := func(pair int64, h pageHeader, fill func(b []byte)) error {
		d, offset := p.pairAddress(pair)
		b := alignedBytes(pageSize)
		p.applyMu.RLock()
		fill(b[pageHeaderSize:])
		p.applyMu.RUnlock()
		h.stamp, h.self = stamp, uint64(pair)
		h.seal(b, p.id)
		batch = append(batch, image{d, offset, b})
		if len(batch) >= checkpointBatch {
			return write()
		}
		return nil
	}
	for _, page := range pages {
		if page.pair < 0 {
			pair, err := p.takePair()
			if err != nil {
				return err
			}
			p.applyMu.Lock()
			gone := page.layer.gone
			if !gone {
				page.pair = pair
			}
			p.applyMu.Unlock()
			if gone { // since the beginning of the checkpoint
				p.pairs = append(p.pairs, uint64(pair))
				continue
			}
		}
		if err := add(page.pair, pageHeader{kind: pageMap, owner: uint64(page.layer.id), index: uint64(page.index)}, func(b []byte) {
			for i := range page.entries {
				le.PutUint64(b[8*i:], page.entries[i].Load())
			}
		}); err != nil {
			return err
		}
	}
	for _, l := range layers {
		if l.pair < 0 {
			pair, err := p.takePair()
			if err != nil {
				return err
			}
			p.applyMu.Lock()
			gone := l.gone
			if !gone {
				l.pair, l.owed = pair, false
			}
			p.applyMu.Unlock()
			if gone {
				p.pairs = append(p.pairs, uint64(pair))
				continue
			}
		}
		if err := add(l.pair, pageHeader{kind: pageLayer, owner: uint64(l.id)}, func(b []byte) {
			r := l.stored
			copy(b, r.append(nil))
		}); err != nil {
			return err
		}
	}
	for _, r := range removed {
		if r.record {
			if err := add(r.pair, pageHeader{kind: pageFree}, func([]byte) {}); err != nil {
				return err
			}
		}
	}
	for _, z := range *p.zones.Load() {
		if !z.stale.Swap(false) {
			continue
		}
		b := alignedBytes(pageSize)
		body := zoneBody(b)
		copy(body.meta, z.meta.meta)
		for i := range z.states {
			body.states[i] = byte(z.states[i].Load())
		}
		h := pageHeader{kind: pageZone, stamp: stamp, self: uint64(z.index)}
		h.seal(b, p.id)
		batch = append(batch, image{z.disk, z.start, b})
		if len(batch) >= checkpointBatch {
			if err := write(); err != nil {
				return err
			}
		}
	}
	if err := write(); err != nil {
		return err
	}
	if err := flushAll(p.disks); err != nil {
		return err
	}
	err := p.writeSuper(func(s *superblock) {
		s.checkpoint, s.checkpointCRC, s.pending, s.nextLayer, s.flags = start, prev, pending, uint64(nextLayer), flags
	})
	if err != nil {
		return err
	}
	p.journal.tail.Store(start)
	for _, r := range removed {
		p.pairs = append(p.pairs, uint64(r.pair))
	}
	p.alloc.owed.Add(-int64(len(removed)))
	return nil
}

// writeImages writes both copies of each page. What the pages speak of is made
// durable first.
func (p *Pool) writeImages(images []image) error {
	for _, place := range []uint64{0, pageSize} {
		if err := flushAll(p.disks); err != nil {
			return err
		}
		var b batch
		for _, i := range images {
			b.add(i.disk.start(datapath.OpWrite, 0, i.data, i.offset+place))
		}
		if err := b.wait(); err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
	}
	return nil
}

// pairAddress is where a pair of metadata pages lies.
func (p *Pool) pairAddress(pair int64) (*disk, uint64) {
	d, offset := p.address(uint32(pair / metaPairs))
	return d, offset + uint64(pair%metaPairs)*pairSize
}

// takePair finds a free pair for a page, making a metadata cluster if need be.
// Checkpointer.
func (p *Pool) takePair() (int64, error) {
	if len(p.pairs) == 0 {
		c, ok := p.alloc.take(claimMeta, p.zoneClusters)
		if !ok {
			return 0, fmt.Errorf("no cluster for metadata: %w", ErrNoSpace)
		}
		if err := p.formatMeta(c); err != nil {
			return 0, err
		}
		z := p.zoneOf(c)
		z.meta.setMeta(c % p.zoneClusters)
		z.stale.Store(true)
		p.metaCount.Add(1)
		p.setReserve(metaPairs)
		for i := metaPairs - 1; i >= 0; i-- {
			p.pairs = append(p.pairs, uint64(c)*metaPairs+uint64(i))
		}
	}
	n := len(p.pairs) - 1
	pair := p.pairs[n]
	p.pairs = p.pairs[:n]
	return int64(pair), nil
}

// formatMeta fills a metadata cluster with free pages, so that from now on a pair
// without a valid page is damage.
func (p *Pool) formatMeta(c uint32) error {
	d, offset := p.address(c)
	b := alignedBytes(clusterSize)
	for i := range metaPairs {
		h := pageHeader{kind: pageFree, self: uint64(c)*metaPairs + uint64(i)}
		at := b[i*pairSize:]
		h.seal(at[:pageSize], p.id)
		copy(at[pageSize:pairSize], at[:pageSize])
	}
	if err := d.write(b, offset, 0); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	return d.flush()
}

// writeSuper changes the superblock of every disk. Of each disk the copy that is
// older is overwritten, first at the start and then at the end. The one of disk 0
// decides; it is written last. checkpointMu is held.
func (p *Pool) writeSuper(change func(*superblock)) error {
	s := p.super
	s.members = append([]superMember(nil), s.members...)
	s.segments = append([]segment(nil), s.segments...)
	change(&s)
	s.generation++
	b := alignedBytes(pageSize)
	topology := len(s.members) != len(p.super.members) || len(s.segments) != len(p.super.segments) || s.topology != p.super.topology
	for i := len(p.disks) - 1; i >= 0; i-- {
		if i > 0 && !topology {
			continue // only disk 0 keeps what changes with every checkpoint
		}
		d := p.disks[i]
		s.index, s.disk = uint32(i), s.members[i].id
		s.encode(b)
		slot := s.generation % 2 * pageSize
		if i > 0 {
			slot = olderSlot(d, slot)
		}
		for _, at := range []uint64{slot, s.members[i].size - 2*pageSize + slot} {
			if err := d.write(b, at, datapath.FlagFUA); err != nil {
				return fmt.Errorf("superblock: %w", err)
			}
		}
	}
	p.super = s
	return nil
}

// olderSlot is where the older superblock of a disk that is not written with each
// generation lies, so that a torn write leaves the newer one. slot is the answer
// where neither is.
func olderSlot(d *disk, slot uint64) uint64 {
	b := alignedBytes(pairSize)
	if d.readPages(b, 0) != nil {
		return slot
	}
	first, err := decodeSuperblock(b[:pageSize])
	second, err2 := decodeSuperblock(b[pageSize:])
	switch {
	case err == nil && (err2 != nil || first.generation > second.generation):
		return pageSize
	case err2 == nil:
		return 0
	}
	return slot
}
