package pool

import (
	"errors"
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Grow takes into use what the disks have become larger by: the last zone of a
// disk is completed, and zones follow. It is durable when it returns; volumes go
// on meanwhile.
func (p *Pool) Grow() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.writable(); err != nil {
		return err
	}
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	s := p.super.copy()
	var added []segment
	for i, d := range p.disks {
		if m, ok := d.dev.(interface{ Measure() error }); ok {
			if err := m.Measure(); err != nil {
				return fmt.Errorf("pool %s: %w", p.name, err)
			}
		}
		m := &s.members[i]
		size := d.size() &^ (clusterSize - 1)
		if size <= m.size {
			continue
		}
		m.size = size
		zones, last := s.fit(m.base, size)
		var have uint32
		for k := range s.segments {
			if g := &s.segments[k]; g.disk == uint32(i) {
				have = g.first + g.zones
				// Only the last zone of a disk may be short.
				if have < zones {
					g.last = s.zoneRegions
				} else if have == zones {
					g.last = max(g.last, last)
				}
			}
		}
		if zones > have {
			added = append(added, segment{disk: uint32(i), first: have, zones: zones - have, last: last})
		}
	}
	return p.extend(&s, added)
}

// AddDisk makes d part of the pool; it must hold nothing (ErrForeign). d belongs to
// the pool until that is closed, and its opener closes it after. Volumes go on
// meanwhile.
//
// Every queue has a queue of the new disk, and every flush covers it, before the
// superblocks speak of it; and they do before a cluster on it is given to anybody.
func (p *Pool) AddDisk(d Disk) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.writable(); err != nil {
		return err
	}
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	s := p.super.copy()
	if len(s.members) == membersMax {
		return fmt.Errorf("pool %s: has %d disks, which is the most a pool can have: %w", p.name, membersMax, ErrInvalid)
	}
	x, err := openDisk(p.r, d, len(s.members))
	if err != nil {
		return err
	}
	err = func() error {
		if err := canPromise(x); err != nil {
			return err
		}
		b := alignedBytes(foreignBytes)
		if x.size() >= foreignBytes {
			if err := x.read(b, 0); err != nil {
				return err
			}
		}
		if what := foreign(b); what != "" {
			return fmt.Errorf("%s: holds %s, which would be destroyed: %w", d.Path, what, ErrForeign)
		}
		segments := len(s.segments)
		if err := s.addMember(x, labelSize); err != nil {
			return fmt.Errorf("pool %s: %w", p.name, err)
		}
		added := s.segments[segments]
		s.segments = s.segments[:segments]
		if err := eraseLabels(x, s.members[x.index].size); err != nil {
			return err
		}
		before := p.disks
		all := append(before[:len(before):len(before)], x)
		if err := p.setMembers(all); err != nil {
			return errors.Join(err, p.setMembers(before))
		}
		if err := p.extend(&s, []segment{added}); err != nil {
			return errors.Join(err, p.setMembers(before))
		}
		return nil
	}()
	if err != nil {
		p.cleanMu.Lock() // who is at work flushes x still
		defer p.cleanMu.Unlock()
		return errors.Join(err, x.close())
	}
	return nil
}

// setMembers changes which disks there are: for all who flush, and for every queue.
// checkpointMu is held; nothing lies on a disk that comes or goes.
func (p *Pool) setMembers(disks []*disk) error {
	p.applyMu.Lock() // the committer and others flush all disks
	p.disks = disks
	p.applyMu.Unlock()
	p.members.Store(&disks)
	p.queuesMu.Lock()
	queues := append([]*queue(nil), p.queues...)
	p.queuesMu.Unlock()
	var errs []error
	for _, q := range queues {
		var err error
		if q.r.Run(func(*reactor.Reactor) {
			if !q.closed {
				err = errors.Join(q.closeDisks(), q.openDisks())
			}
		}) == nil { // else the reactor has stopped, and with it the queue
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *superblock) copy() superblock {
	c := *s
	c.members = append([]superMember(nil), s.members...)
	c.segments = append([]segment(nil), s.segments...)
	return c
}

// extend makes new zones, tells the superblocks, and then uses them. checkpointMu
// is held.
func (p *Pool) extend(s *superblock, added []segment) error {
	zone := uint64(len(*p.zones.Load()))
	for _, g := range added {
		if len(s.segments) == segmentsMax {
			return fmt.Errorf("pool %s: has grown %d times, which is the most a pool can: %w", p.name, segmentsMax, ErrInvalid)
		}
		if (zone+uint64(g.zones))*uint64(s.zoneClusters()) > clustersMax {
			return fmt.Errorf("pool %s: a pool holds at most 256 TiB: %w", p.name, ErrInvalid)
		}
		if err := formatZones(s, p.disks[g.disk], g, zone); err != nil {
			return err
		}
		zone += uint64(g.zones)
		s.segments = append(s.segments, g)
	}
	if err := flushAll(p.disks); err != nil {
		return err
	}
	old := p.super.segments
	if err := p.writeSuper(func(x *superblock) {
		x.members, x.segments = s.members, s.segments
		x.topology++
	}); err != nil {
		p.fail(err)
		return err
	}
	// Short zones that were completed.
	zones := *p.zones.Load()
	first := 0
	for i, g := range old {
		if last := s.segments[i].last; last > g.last {
			p.sumsMu.Lock()
			zones[first+int(g.zones)-1].count = last * regionClusters
			p.sumsMu.Unlock()
			p.alloc.mu.Lock()
			p.alloc.extendZone(first+int(g.zones)-1, last*regionClusters)
			p.alloc.mu.Unlock()
		}
		first += int(g.zones)
	}
	if first != len(zones) {
		return fmt.Errorf("pool %s: %d zones, the superblock knows %d: %w", p.name, len(zones), first, ErrCorrupt)
	}
	p.addZones(s, added)
	return nil
}
