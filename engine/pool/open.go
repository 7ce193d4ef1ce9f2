package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
)

// Open opens a pool: finds its newest superblock, loads its maps, replays its
// journal and, unless read-only, begins a new epoch.
//
// Errors: *MissingError when a disk is missing; ErrCorrupt when a structure is
// damaged beyond its copies; ErrUnsupported for a newer format; ErrNotPool.
func Open(c Config) (*Pool, error) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.SumCacheBytes == 0 {
		c.SumCacheBytes = 64 << 20
	}
	if c.ScrubRate == 0 {
		c.ScrubRate = 64 << 20
	}
	p := &Pool{config: c, log: c.Log, start: time.Now(), r: c.Reactor, layers: map[uint32]*layer{}, volumes: map[string]*volume{},
		snapshots: map[uuid.UUID]*snapshotSet{}, dirty: map[uint32]*dirtyRegion{},
		kick: make(chan struct{}, 1), wake: make(chan struct{}, 1), stopping: make(chan struct{}),
		streamAsks: make(chan streamAsk, streamAsks), streamsEnd: make(chan struct{})}
	p.epoch.Store(2)
	p.scrub.keepEvery = scrubKeepEvery
	p.rebuilds.waiting = map[uint32][]waiter{}
	p.zones.Store(new([]*zone))
	if err := p.open(); err != nil {
		for _, d := range p.disks {
			if d != nil {
				err = errors.Join(err, d.close())
			}
		}
		if p.pending != nil {
			err = errors.Join(err, p.pending.close())
		}
		return nil, err
	}
	if !c.ReadOnly {
		p.stopped.Add(1)
		go p.runCommitter() // ends with stopping
		if !c.Manual {
			p.stopped.Add(1)
			go p.runKeeper() // ends with stopping
			p.streamsDone.Add(1)
			go p.runStreams() // ends with streamsEnd
		}
	}
	return p, nil
}

func (p *Pool) open() error {
	super, repaired, err := p.findDisks()
	if err != nil {
		return err
	}
	p.super, p.id, p.name, p.created = *super, super.pool, super.name, super.created
	if super.rocompat&^knownROCompat != 0 && !p.config.ReadOnly {
		return fmt.Errorf("pool %s: uses features (%#x) that this program may only read: open it read-only: %w", p.name, super.rocompat, ErrUnsupported)
	}
	if !p.config.ReadOnly {
		for _, d := range p.disks {
			if err := canPromise(d); err != nil {
				return fmt.Errorf("pool %s: %w", p.name, err)
			}
		}
	}
	disks := p.disks
	p.members.Store(&disks)
	p.zoneClusters = super.zoneClusters()
	p.addZones(super, super.segments)
	if err := p.loadZones(); err != nil {
		return err
	}
	if err := p.loadMaps(); err != nil {
		return err
	}
	p.nextLayer.Store(uint32(super.nextLayer))
	p.journal.disk, p.journal.offset, p.journal.blocks = p.disks[0], super.journalOffset, super.journalLength/pageSize
	pending, groups, err := p.journal.replay(p, super, p.replayRecord)
	if err != nil {
		return fmt.Errorf("pool %s: %w", p.name, err)
	}
	if err := p.replaceLost(); err != nil {
		return err
	}
	if err := p.dropOrphans(); err != nil {
		return err
	}
	pending = max(pending, super.pending)
	p.changes.Store(pending)
	p.settled.Store(pending)
	if err := p.buildTree(); err != nil {
		return fmt.Errorf("pool %s: %w", p.name, err)
	}
	kept := 0
	if p.config.CrashLog != "" {
		records, err := readPending(p.config.CrashLog, p, super.epoch, pending)
		if err != nil {
			return fmt.Errorf("pool %s: changes of the last run: %w", p.name, err)
		}
		kept = p.replayPending(records)
	}
	if err := p.countClusters(); err != nil {
		return fmt.Errorf("pool %s: %w", p.name, err)
	}
	p.loseMaps()
	p.buildCatalog()
	untrusted := p.distrust()
	if p.config.ReadOnly {
		return nil
	}
	if ahead := p.generationSeen; ahead > super.generation {
		// What is written now has to be newer on every disk. Of disk 0 the next slot stays the next.
		p.super.generation += (ahead - super.generation + 1) &^ 1
	}
	p.journal.epoch = super.epoch
	if kept > 0 {
		// The file of the last run counts until a new epoch begins; by then its changes
		// are in the journal, whose last group says so.
		if err := p.commitMaps(&commitWork{}); err != nil {
			return fmt.Errorf("pool %s: %w", p.name, err)
		}
	}
	p.journal.epoch++
	err = p.writeSuper(func(s *superblock) {
		s.epoch++
		s.flags = 0
		if p.staleLabels || repaired {
			s.topology++ // has the superblocks of all disks written
		}
		for i, d := range p.disks {
			s.members[i].hint = d.path
		}
	})
	if err != nil {
		return fmt.Errorf("pool %s: %w", p.name, err)
	}
	if p.pending, err = openPending(p.config.CrashLog, p, p.journal.epoch); err != nil {
		return fmt.Errorf("pool %s: %w", p.name, err)
	}
	if repaired {
		// The other one of the two places of each disk.
		if err := p.writeSuper(func(s *superblock) { s.topology++ }); err != nil {
			return fmt.Errorf("pool %s: %w", p.name, err)
		}
		p.event(Event{Kind: EventRepaired, Message: "a copy of a superblock was damaged; it has been written again"})
	}
	if super.flags&superClean == 0 {
		p.log.Info("pool recovered", "pool", p.name, "groups", groups, "pending", kept, "regions", untrusted)
	}
	return nil
}

// canPromise refuses a disk on which nothing could be made durable.
func canPromise(d *disk) error {
	i := d.dev.Info()
	switch {
	case i.ReadOnly:
		return fmt.Errorf("%s: is read-only: open the pool read-only: %w", d.path, ErrReadOnly)
	case !i.Has(datapath.FeatureFlush | datapath.FeatureFUA):
		return fmt.Errorf("%s: cannot flush, or write through its cache: %w", d.path, ErrNotSupported)
	}
	return nil
}

// findDisks sorts the disks into their places.
func (p *Pool) findDisks() (super *superblock, repaired bool, err error) {
	type found struct {
		d *disk
		s *superblock
	}
	var all []found
	var seen []*disk
	var unread []error // labels
	fail := func(err error) (*superblock, bool, error) {
		for _, d := range seen {
			err = errors.Join(err, d.close())
		}
		return nil, false, err
	}
	for i, d := range p.config.Disks {
		x, err := openDisk(p.r, d, i)
		if err != nil {
			return fail(err)
		}
		seen = append(seen, x)
		s, damaged, err := readLabel(x)
		if errors.Is(err, ErrCorrupt) && len(p.config.Disks) > 1 {
			unread = append(unread, err) // of a disk that was about to become a member, perhaps
			continue
		}
		if err != nil {
			return fail(err)
		}
		repaired = repaired || damaged
		p.staleLabels = p.staleLabels || damaged && s.index > 0
		all = append(all, found{x, s})
	}
	if len(all) == 0 && len(unread) > 0 {
		return fail(errors.Join(unread...))
	}
	if len(all) == 0 {
		return fail(fmt.Errorf("no disks were given: %w", ErrNotPool))
	}
	// Disk 0 decides; where it is missing, whoever knows most says what is missing.
	for _, f := range all {
		if f.s.pool != all[0].s.pool {
			return fail(fmt.Errorf("%s belongs to the pool %s (%s), %s to %s (%s): %w",
				f.d.path, f.s.name, f.s.pool, all[0].d.path, all[0].s.name, all[0].s.pool, ErrInvalid))
		}
		if super == nil || f.s.index == 0 || super.index != 0 && f.s.generation > super.generation {
			super = f.s
		}
	}
	p.disks = make([]*disk, len(super.members))
	for _, f := range all {
		i := int(f.s.index)
		if i >= len(super.members) || super.members[i].id != f.s.disk {
			continue // was about to become a member when power was lost
		}
		if p.disks[i] != nil {
			err := fmt.Errorf("%s and %s are the same disk of the pool %s, one is a copy: %w", p.disks[i].path, f.d.path, super.name, ErrInvalid)
			p.disks = nil
			return fail(err)
		}
		if size := super.members[i].size; f.d.size() < size {
			err := fmt.Errorf("%s: has %d bytes, the pool %s uses %d of it: the disk has become smaller, what lay at its end is lost: %w", f.d.path, f.d.size(), super.name, size, ErrCorrupt)
			p.disks = nil
			return fail(err)
		}
		f.d.index = i
		p.disks[i] = f.d
		if f.s.topology != super.topology { // a change of members was cut short
			p.staleLabels = true
			p.generationSeen = max(p.generationSeen, f.s.generation)
		}
	}
	missing := &MissingError{Pool: super.name}
	for i, m := range super.members {
		if p.disks[i] == nil {
			missing.Missing = append(missing.Missing, Member{Index: i, UUID: m.id, Size: m.size, Hint: m.hint})
		}
	}
	if len(missing.Missing) > 0 && len(unread) > 0 && !p.config.ReadOnly {
		p.disks = nil
		return fail(errors.Join(append(unread, missing)...))
	}
	var left []*disk
	for _, d := range seen {
		if d.index >= len(p.disks) || p.disks[d.index] != d {
			left = append(left, d)
		}
	}
	for _, d := range left {
		_ = d.close() // nothing was written to it
	}
	if len(missing.Missing) > 0 && (!p.config.ReadOnly || p.disks[0] == nil) {
		return nil, false, missing // Open closes those in p.disks
	}
	super = &superblock{}
	for _, f := range all {
		if f.s.index == 0 {
			super = f.s
		}
	}
	return super, repaired, nil
}

// addZones makes the zones of segments known, with all their clusters free.
func (p *Pool) addZones(s *superblock, segments []segment) {
	zones := append([]*zone(nil), *p.zones.Load()...)
	first := len(zones)
	disks := make([]int, 0, len(segments)) // of each new zone
	for _, g := range segments {
		for i := range g.zones {
			n := s.zoneRegions
			if i == g.zones-1 {
				n = g.last
			}
			start := s.members[g.disk].base + uint64(g.first+i)*s.zoneStride()
			z := &zone{disk: p.disks[g.disk], index: uint32(len(zones)), count: n * regionClusters, start: start, sums: start + clusterSize, data: start + s.zoneHead(),
				regions: make([]region, s.zoneRegions), states: make([]atomic.Uint32, s.zoneRegions)}
			z.meta.meta = make([]byte, zoneMetaBytes)
			zones = append(zones, z)
			disks = append(disks, int(g.disk))
		}
	}
	// Whoever gets a cluster looks for its zone.
	p.zones.Store(&zones)
	p.alloc.mu.Lock()
	for i, z := range zones[first:] {
		p.alloc.addZone(disks[i], p.zoneClusters, z.count)
	}
	p.alloc.mu.Unlock()
	p.setReserve(0)
	p.moreSpace()
}

// setReserve keeps 2 % of the clusters for metadata, less what metadata has. By now
// that has all that was taken for it, of which so many places for pages are new.
func (p *Pool) setReserve(places int64) {
	p.alloc.mu.Lock()
	defer p.alloc.mu.Unlock()
	p.alloc.owed.Add(-places)
	var total uint64
	for i := range p.alloc.zones {
		total += uint64(p.alloc.zones[i].count)
	}
	keep := max(total/50, 1)
	p.alloc.reserve, p.alloc.forming = keep-min(keep, uint64(p.metaCount.Load())), 0
}

// loadZones reads the zone pages.
func (p *Pool) loadZones() error {
	zones := *p.zones.Load()
	buffers := make([][]byte, len(zones))
	var b batch
	for i, z := range zones {
		if z.disk == nil {
			continue
		}
		buffers[i] = alignedBytes(pairSize)
		b.add(z.disk.start(datapath.OpRead, 0, buffers[i], z.start))
	}
	unread := b.wait() != nil
	for i, z := range zones {
		if z.disk == nil {
			continue
		}
		if unread {
			if err := z.disk.readPages(buffers[i], z.start); err != nil {
				return fmt.Errorf("pool %s: page of zone %d: %w", p.name, i, err)
			}
		}
		page, h, stale, ok := newestOfPair(buffers[i], p.id, uint64(i))
		if !ok || h.kind != pageZone {
			return fmt.Errorf("pool %s: %s: both copies of the page of zone %d, at %d, are damaged: %w", p.name, z.disk.path, i, z.start, ErrCorrupt)
		}
		body := zoneBody(page)
		copy(z.meta.meta, body.meta)
		for j := range z.states {
			z.states[j].Store(uint32(body.states[j]))
		}
		if stale {
			z.stale.Store(true)
			p.tellDamaged(z.disk, z.start, buffers[i], uint64(i))
		}
	}
	return nil
}

// loadMaps reads all metadata clusters: records of layers, and pages of their maps.
func (p *Pool) loadMaps() error {
	type waiting struct {
		c    *call
		b    []byte
		meta uint32
	}
	var maps []*mapPage
	owners := map[*mapPage]uint32{}
	take := func(w *waiting) error {
		if err := w.c.wait(); err != nil {
			d, at := p.address(w.meta)
			if d.readPages(w.b, at) != nil {
				return fmt.Errorf("pool %s: metadata: %w", p.name, err)
			}
		}
		for i := range uint64(metaPairs) {
			pair := uint64(w.meta)*metaPairs + i
			page, h, stale, ok := newestOfPair(w.b[i*pairSize:(i+1)*pairSize], p.id, pair)
			if !ok {
				d, at := p.pairAddress(int64(pair))
				return fmt.Errorf("pool %s: %s: both copies of the metadata page at %d are damaged: %w", p.name, d.path, at, ErrCorrupt)
			}
			if stale {
				d, at := p.pairAddress(int64(pair))
				p.tellDamaged(d, at, w.b[i*pairSize:(i+1)*pairSize], pair)
			}
			body := page[pageHeaderSize:]
			switch h.kind {
			case pageFree:
				if stale {
					p.removedPairs = append(p.removedPairs, removedPair{int64(pair), true}) // to be written again
					continue
				}
				p.addPair(pair)
			case pageLayer:
				r, err := decodeLayer(body)
				if err != nil || uint64(r.id) != h.owner {
					return fmt.Errorf("pool %s: layer %d: %w", p.name, h.owner, ErrCorrupt)
				}
				if p.layers[r.id] != nil {
					return fmt.Errorf("pool %s: layer %d is there twice: %w", p.name, r.id, ErrCorrupt)
				}
				l := newLayer(p, r)
				l.pair, l.stored = int64(pair), r
				p.layers[r.id] = l
				if stale {
					l.recChange = true
					p.staleLayers = append(p.staleLayers, l)
				}
			case pageMap:
				m := &mapPage{pageState: &pageState{index: uint32(h.index), pair: int64(pair), stale: stale}}
				if h.index > volumeSizeMax/clusterSize/mapEntries || h.owner >= 1<<32 {
					return fmt.Errorf("pool %s: map page %d of layer %d: %w", p.name, h.index, h.owner, ErrCorrupt)
				}
				for j := range m.entries {
					m.entries[j].Store(le.Uint64(body[8*j:]))
				}
				owners[m] = uint32(h.owner)
				maps = append(maps, m)
			default:
				return fmt.Errorf("pool %s: metadata page %d is of an unknown kind %d: %w", p.name, pair, h.kind, ErrCorrupt)
			}
		}
		return nil
	}
	var reading []*waiting
	var failed error
	reap := func() {
		w := reading[0]
		reading = reading[1:]
		if failed != nil {
			_ = w.c.wait() // failed already
			return
		}
		failed = take(w)
	}
	for _, z := range *p.zones.Load() {
		for i := range p.zoneClusters {
			if failed != nil || !z.meta.isMeta(i) {
				continue
			}
			c := z.index*p.zoneClusters + i
			if !p.alloc.use(c, p.zoneClusters) {
				failed = fmt.Errorf("pool %s: metadata cluster %d does not exist: %w", p.name, c, ErrCorrupt)
				break
			}
			p.metaCount.Add(1)
			if len(reading) >= syncDepth/2 {
				reap()
			}
			b := alignedBytes(clusterSize)
			reading = append(reading, &waiting{c: z.disk.start(datapath.OpRead, 0, b, z.data+uint64(i)<<clusterShift), b: b, meta: c})
		}
	}
	for len(reading) > 0 {
		reap()
	}
	if failed != nil {
		return failed
	}
	p.orphans = map[uint32][]*mapPage{}
	for _, m := range maps {
		p.orphans[owners[m]] = append(p.orphans[owners[m]], m)
	}
	for _, l := range p.layers {
		if err := p.adopt(l); err != nil {
			return err
		}
	}
	p.setReserve(0)
	return nil
}

// adopt gives a layer its map pages that were loaded. Those past its end stay
// orphans: the journal may have it grow. So do those of a layer that is not known
// yet: a crash in a checkpoint can leave its map pages without its record, which
// the journal has. They must not be given up, or they would be found a second time
// beside those the next checkpoint writes.
func (p *Pool) adopt(l *layer) error {
	table := *l.table.Load()
	p.orphans[l.id] = slices.DeleteFunc(p.orphans[l.id], func(m *mapPage) bool {
		if int(m.index) >= len(table) || table[m.index].Load() != nil {
			return false
		}
		m.layer = l
		table[m.index].Store(m)
		if m.stale {
			p.stale = append(p.stale, m)
		}
		return true
	})
	for _, m := range p.orphans[l.id] {
		if int(m.index) < len(table) {
			return fmt.Errorf("pool %s: map page %d of layer %d is there twice: %w", p.name, m.index, l.id, ErrCorrupt)
		}
	}
	return nil
}

// replaceLost makes layers in the place of those that others stand on and whose
// records lie on missing disks. What they are known to hold can be read; what else
// they may hold is lost (loseMaps). A volume or snapshot that nothing stands on cannot
// be told from the remains of one that was deleted, and is not there.
func (p *Pool) replaceLost() error {
	if !slices.Contains(p.disks, nil) {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(p.layers)) {
		l := p.layers[id]
		if parent := l.rec.parent; parent != 0 && p.layers[parent] == nil {
			lost := newLayer(p, layerRecord{id: parent, flags: layerFrozen | layerHidden, size: l.rec.size, volume: l.rec.volume})
			p.layers[parent] = lost
			if err := p.adopt(lost); err != nil {
				return err
			}
			p.log.Warn("the record of a layer lies on a missing disk", "pool", p.name, "layer", parent, "below", l.rec.name)
		}
	}
	return nil
}

// addPair notes a free pair; the pool is being opened.
func (p *Pool) addPair(pair uint64) {
	p.pairs = append(p.pairs, pair)
	p.alloc.owed.Add(-1)
}

// dropOrphans gives up the map pages of layers that are gone. The journal has been
// replayed.
func (p *Pool) dropOrphans() error {
	for id, pages := range p.orphans {
		for _, m := range pages {
			if p.layers[id] != nil {
				return fmt.Errorf("pool %s: map page %d of layer %d is past its end: %w", p.name, m.index, id, ErrCorrupt)
			}
			if m.stale { // its copies differ: both are written again, as free
				p.removedPairs = append(p.removedPairs, removedPair{m.pair, true})
			} else {
				p.addPair(uint64(m.pair))
			}
		}
	}
	p.orphans = nil
	return nil
}

// replayRecord applies one record of the journal to memory.
func (p *Pool) replayRecord(t recordType, b []byte) error {
	want := map[recordType]int{recordMap: 16, recordRegion: 8, recordRemove: 4}
	if n, ok := want[t]; ok && n != len(b) {
		return fmt.Errorf("a record of type %d has %d bytes: %w", t, len(b), ErrCorrupt)
	}
	switch t {
	case recordMap:
		l, v, e := p.layers[le.Uint32(b)], le.Uint32(b[4:]), entry(le.Uint64(b[8:]))
		if l == nil {
			return nil // removed further on
		}
		if uint64(v) >= clustersOf(l.rec.size) {
			return fmt.Errorf("cluster %d is past the end of layer %d: %w", v, l.id, ErrCorrupt)
		}
		page := l.page(v)
		page.entries[v%mapEntries].Store(uint64(e))
		p.markStale(page)
	case recordRegion:
		index, state := le.Uint32(b), le.Uint32(b[4:])
		zones := *p.zones.Load()
		per := p.zoneClusters / regionClusters
		if index/per >= uint32(len(zones)) || state > uint32(regionClean) {
			return fmt.Errorf("region %d, state %d: %w", index, state, ErrCorrupt)
		}
		z := zones[index/per]
		z.states[index%per].Store(state)
		z.stale.Store(true)
	case recordLayer:
		r, err := decodeLayer(b)
		if err != nil {
			return err
		}
		l := p.layers[r.id]
		if l == nil {
			l = newLayer(p, r)
			p.layers[r.id] = l
		}
		l.grow(r.size)
		if err := p.adopt(l); err != nil {
			return err
		}
		l.rec = r
		p.storeRecord(l)
		if r.id >= p.nextLayer.Load() {
			p.nextLayer.Store(r.id + 1)
		}
	case recordRemove:
		if l := p.layers[le.Uint32(b)]; l != nil {
			delete(p.layers, l.id)
			p.dropPairs(l)
		}
	default:
		return fmt.Errorf("a record is of an unknown type %d: %w", t, ErrCorrupt)
	}
	return nil
}

// storeRecord notes that a layer's record has changed: the next checkpoint writes
// it. applyMu is held for writing, or the pool is being opened.
func (p *Pool) storeRecord(l *layer) {
	l.stored = l.rec
	if !l.recChange {
		l.recChange = true
		p.staleLayers = append(p.staleLayers, l)
		if l.pair < 0 && !l.owed {
			l.owed = true
			p.alloc.owed.Add(1)
		}
	}
}

// dropPairs gives the pages of a removed layer up. As storeRecord.
func (p *Pool) dropPairs(l *layer) {
	l.gone = true
	if l.pair >= 0 {
		p.removedPairs = append(p.removedPairs, removedPair{l.pair, true})
	}
	if l.owed {
		l.owed = false
		p.alloc.owed.Add(-1)
	}
	l.pages(func(m *mapPage) bool {
		if m.pair >= 0 {
			p.removedPairs = append(p.removedPairs, removedPair{m.pair, m.stale}) // the copies of a stale one may differ
		} else {
			p.alloc.owed.Add(-1)
		}
		return true
	})
	l.unpay()
}

// buildTree ties layers to their parents, which are older.
func (p *Pool) buildTree() error {
	for _, id := range slices.Sorted(maps.Keys(p.layers)) {
		l := p.layers[id]
		if l.rec.parent == 0 {
			continue
		}
		parent := p.layers[l.rec.parent]
		if parent == nil || parent.rec.flags&layerFrozen == 0 {
			return fmt.Errorf("layer %d stands on layer %d, which is not there or not frozen: %w", l.id, l.rec.parent, ErrCorrupt)
		}
		l.setParent(parent)
		parent.children++
	}
	return nil
}

// countClusters derives the free map, and with it proves that each cluster has one
// owner.
func (p *Pool) countClusters() error {
	var bad error
	for _, l := range p.layers {
		clusters := clustersOf(l.rec.size)
		l.each(0, func(v uint32, e entry) bool {
			c := e.cluster()
			switch {
			case uint64(v) >= clusters:
				bad = fmt.Errorf("layer %d: cluster %d is past the end: %w", l.id, v, ErrCorrupt)
			case c == noCluster && e.mask() != 0:
				bad = fmt.Errorf("layer %d: cluster %d has blocks and no place: %w", l.id, v, ErrCorrupt)
			case c != noCluster && e.mask() == 0:
				// Allocated by a write that never ended.
				page := l.page(v)
				page.entries[v%mapEntries].Store(uint64(e & entryZero))
				p.markStale(page)
			case c != noCluster && !p.alloc.use(c, p.zoneClusters):
				bad = fmt.Errorf("layer %d: cluster %d lies in cluster %d of the pool, which does not exist or has another owner: %w", l.id, v, c, ErrCorrupt)
			case c != noCluster:
				l.owned.Add(1)
			}
			return bad == nil
		})
		if bad != nil {
			return bad
		}
	}
	return nil
}

// loseMaps makes unknown what is unknown without the disks that are missing: a page
// of a map that was not found may lie there. What it would say is taken to lie there,
// too, so that reads of it fail, and nobody takes it for a hole.
func (p *Pool) loseMaps() {
	zones := *p.zones.Load()
	i := slices.IndexFunc(zones, func(z *zone) bool { return z.disk == nil })
	if i < 0 {
		return
	}
	e := makeEntry(zones[i].index*p.zoneClusters, wholeMask, false)
	lost := &mapPage{pageState: &pageState{pair: -1}}
	for j := range lost.entries {
		lost.entries[j].Store(uint64(e))
	}
	for _, l := range p.layers {
		table := *l.table.Load()
		for j := range table {
			page := table[j].Load()
			if page == nil {
				table[j].Store(lost)
				continue
			}
			for k := range page.entries { // of one that only the journal knows, the rest is unknown
				if page.pair < 0 && page.entries[k].Load() == 0 {
					page.entries[k].Store(uint64(e))
				}
			}
		}
	}
}

// distrust marks the regions whose checksums may be old, after a crash.
func (p *Pool) distrust() (regions int) {
	for _, z := range *p.zones.Load() {
		per := uint32(len(z.regions))
		for i := range z.regions {
			if regionState(z.states[i].Load()) == regionDirty {
				z.regions[i].state.Or(regionUntrusted)
				p.dirty[z.index*per+uint32(i)] = &dirtyRegion{}
				regions++
			}
		}
	}
	return regions
}

// Close makes everything durable, stops the pool's goroutines and lets go of its
// disks, which their opener closes. All devices of the pool are closed before.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return fmt.Errorf("pool %s is closed already: %w", p.name, ErrStopped)
	}
	for _, v := range p.volumes {
		if v.opens > 0 {
			p.mu.Unlock()
			return fmt.Errorf("pool %s: volume %s is open: %w", p.name, v.name, ErrInUse)
		}
	}
	p.closed = true
	p.mu.Unlock()

	var errs []error
	if !p.config.ReadOnly {
		p.jobs.stop()
		p.jobs.wait() // they need the committer
		p.jobs.endAll(errClosing)
		p.endStreams() // what it makes dirty is made clean
		flags := superClean
		if p.failed() == nil {
			if err := p.settle(); err != nil {
				errs, flags = append(errs, err), 0
			}
		}
		close(p.stopping)
		p.stopped.Wait()
		if p.failed() == nil {
			p.checkpointMu.Lock()
			errs = append(errs, p.checkpointLocked(flags))
			p.checkpointMu.Unlock()
		}
		errs = append(errs, p.pending.close())
	}
	p.stopped.Wait() // of a read-only pool: what computes checksums
	for _, d := range p.disks {
		if d != nil {
			errs = append(errs, d.close())
		}
	}
	return errors.Join(errs...)
}

// Info describes the pool now.
func (p *Pool) Info() Info {
	p.mu.Lock()
	i := Info{Name: p.name, UUID: p.id, State: StateOnline, Created: time.Unix(0, p.created), Version: formatVersion, Volumes: len(p.volumes)}
	for _, s := range p.snapshots {
		i.Snapshots += len(s.byName)
	}
	for _, v := range p.volumes {
		i.Provisioned += v.size.Load()
	}
	p.mu.Unlock()
	switch err := p.failed(); {
	case err != nil:
		i.State, i.Reason = StateStopped, err.Error()
	case p.config.ReadOnly:
		i.State, i.Reason = StateReadOnly, "opened read-only"
	}
	p.checkpointMu.Lock()
	for n, m := range p.super.members {
		i.Members = append(i.Members, Member{Index: n, UUID: m.id, Size: m.size, Hint: m.hint})
	}
	p.checkpointMu.Unlock()
	a := &p.alloc
	a.mu.Lock()
	var total uint64
	for n := range a.zones {
		total += uint64(a.zones[n].count)
	}
	free := a.free + a.grace
	i.Total, i.Free = total<<clusterShift, free<<clusterShift
	i.Reserved, i.Reserve = a.reserved<<clusterShift, a.reserve<<clusterShift
	i.Available = (free - min(free, a.reserved+a.reserve)) << clusterShift
	a.mu.Unlock()
	i.Metadata = uint64(p.metaCount.Load()) << clusterShift
	i.Allocated = i.Total - i.Free - min(i.Metadata, i.Total-i.Free)
	p.sumsMu.Lock()
	i.DirtyRegions = len(p.dirty)
	p.sumsMu.Unlock()
	i.Journal = JournalInfo{Bytes: p.journal.capacity(), Used: p.journal.used(), Groups: p.journal.count.Load()}
	return i
}

// sortedVolumes are the volumes by name. mu is held.
func (p *Pool) sortedVolumes() []*volume {
	all := make([]*volume, 0, len(p.volumes))
	for _, v := range p.volumes {
		all = append(all, v)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].name < all[j].name })
	return all
}
