package pool

import (
	"bytes"
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath"
)

// scrubMetadata reads both copies of what a pool keeps about itself: superblocks, zone
// pages, records of layers, pages of maps, checksums. A copy that is damaged is written
// again from the other, as an open would do, and told of; where both are, it is told as
// damage is. The journal is not looked at: it is read at open only, and soon replaced.
// pace is asked between two reads, with no lock held, and ends it with an error.
func (p *Pool) scrubMetadata(j *job, pace func(bytes uint64) error) error {
	if err := p.scrubSupers(); err != nil {
		return err
	}
	for _, z := range *p.zones.Load() {
		if err := pace(pairSize); err != nil {
			return err
		}
		if err := p.scrubPairs(j, z.disk, z.start, uint64(z.index), 1); err != nil {
			return err
		}
		for _, c := range p.metaClusters(z) {
			if err := pace(clusterSize); err != nil {
				return err
			}
			d, offset := p.address(c)
			if err := p.scrubPairs(j, d, offset, uint64(c)*metaPairs, metaPairs); err != nil {
				return err
			}
		}
		for i := range uint32(len(z.regions)) {
			if regionState(z.states[i].Load()) != regionClean {
				continue
			}
			if err := pace(pairSize); err != nil {
				return err
			}
			if err := p.scrubSums(j, z, z.index*uint32(len(z.regions))+i); err != nil {
				return err
			}
		}
	}
	return nil
}

// metaClusters are the clusters of a zone that hold metadata.
func (p *Pool) metaClusters(z *zone) (clusters []uint32) {
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	for i := range p.zoneClusters {
		if z.meta.isMeta(i) {
			clusters = append(clusters, z.index*p.zoneClusters+i)
		}
	}
	return clusters
}

// scrubPairs verifies count pairs of pages at offset of d, which are not written
// meanwhile: whoever writes them holds checkpointMu. What the good copy of a pair says
// is durable, and so it may be written over the damaged one at any time: a crash leaves
// that one damaged.
func (p *Pool) scrubPairs(j *job, d *disk, offset, self, count uint64) error {
	b := alignedBytes(int(count) * pairSize)
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	if err := p.failed(); err != nil {
		return err
	}
	if d.readPages(b, offset) != nil {
		clear(b)
	}
	for i := range count {
		pair, at := b[i*pairSize:][:pairSize], offset+i*pairSize
		good, _, _, ok := newestOfPair(pair, p.id, self+i)
		if !ok {
			j.found.Add(1)
			p.corrupt.Add(1)
			p.event(Event{Kind: EventCorrupt, Device: d.path, Address: at, Message: "both copies of a page of metadata are damaged or cannot be read: " +
				"the pool serves it from memory, and may not open again; copy its volumes while it is open"})
			continue
		}
		if !p.tellDamaged(d, at, pair, self+i) {
			continue
		}
		if _, ok := openPage(pair[:pageSize], p.id, self+i); ok {
			at += pageSize
		}
		if err := d.write(good, at, datapath.FlagFUA); err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
	}
	return nil
}

// scrubSums verifies the checksum pages of a region that is clean. A damaged copy makes
// the region dirty, and so both are written again.
func (p *Pool) scrubSums(j *job, z *zone, index uint32) error {
	b := alignedBytes(pairSize)
	g, _ := p.regionAt(index)
	p.cleanMu.Lock() // nobody writes the pair
	clean := regionState(z.states[index%uint32(len(z.regions))].Load()) == regionClean && g.state.Load()&(regionIsDirty|regionUntrusted) == 0
	if clean && z.disk.readPages(b, p.sumsOffset(z, index)) != nil {
		clear(b)
	}
	p.cleanMu.Unlock()
	if !clean {
		return nil
	}
	if _, _, _, ok := newestOfPair(b, p.id, uint64(index)); !ok {
		j.found.Add(1)
		p.corrupt.Add(1)
		p.event(Event{Kind: EventCorrupt, Device: z.disk.path, Address: p.sumsOffset(z, index),
			Message: fmt.Sprintf("both copies of the checksums of region %d are damaged or cannot be read: write its blocks again", index)})
		return nil
	}
	_, first := openPage(b[:pageSize], p.id, uint64(index))
	_, second := openPage(b[pageSize:], p.id, uint64(index))
	switch {
	case first && second:
	case g.page.Load() == nil:
		return p.loadSums(index) // heals what it reads
	default:
		p.healSums(z, index, b)
	}
	return nil
}

// isZero says that nothing was ever written to the page b begins with.
func isZero(b []byte) bool { return bytes.Count(b[:pageSize], []byte{0}) == pageSize }

// scrubSupers verifies the superblocks of all disks: of each slot the one at the start
// and the one at the end. Another disk than 0 may have only one yet.
func (p *Pool) scrubSupers() error {
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	if err := p.failed(); err != nil {
		return err
	}
	damaged := false
	start, end := alignedBytes(pairSize), alignedBytes(pairSize)
	for i, d := range p.disks {
		if d.readPages(start, 0) != nil || d.readPages(end, p.super.members[i].size-pairSize) != nil {
			damaged = true
			continue
		}
		for at := 0; at < pairSize; at += pageSize {
			a, errA := decodeSuperblock(start[at : at+pageSize])
			b, errB := decodeSuperblock(end[at : at+pageSize])
			absent := i > 0 && isZero(start[at:]) && isZero(end[at:])
			damaged = damaged || !absent && (errA != nil || errB != nil || a.generation != b.generation || a.disk != p.super.members[i].id)
		}
	}
	if !damaged {
		return nil
	}
	for range 2 { // each disk's slots
		if err := p.writeSuper(func(s *superblock) { s.topology++ }); err != nil {
			return err
		}
	}
	p.event(Event{Kind: EventRepaired, Message: "a copy of a superblock was damaged; it has been written again"})
	return nil
}
