package pool

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// withDisks opens disks for the pool's own requests while f runs.
func withDisks(r *reactor.Reactor, disks []Disk, f func([]*disk) error) (err error) {
	var open []*disk
	defer func() {
		for _, d := range open {
			err = errors.Join(err, d.close())
		}
	}()
	for i, d := range disks {
		x, err := openDisk(r, d, i)
		if err != nil {
			return err
		}
		open = append(open, x)
	}
	return f(open)
}

// Format makes a pool of the disks and returns its id. It refuses disks that hold
// anything (ErrForeign) unless Force is set. The pool is durable when it returns;
// what it overwrote is lost.
func Format(c FormatConfig) (id uuid.UUID, err error) {
	if err := validName("pool", c.Name); err != nil {
		return id, err
	}
	if len(c.Disks) == 0 || len(c.Disks) > membersMax {
		return id, fmt.Errorf("pool %s: %d disks: must be 1 to %d: %w", c.Name, len(c.Disks), membersMax, ErrInvalid)
	}
	if c.ZoneRegions == 0 {
		c.ZoneRegions = zoneRegionsMax
	}
	if c.ZoneRegions < 1 || c.ZoneRegions > zoneRegionsMax {
		return id, fmt.Errorf("pool %s: %d regions a zone: must be 1 to %d: %w", c.Name, c.ZoneRegions, zoneRegionsMax, ErrInvalid)
	}
	err = withDisks(c.Reactor, c.Disks, func(disks []*disk) error {
		id, err = format(c, disks)
		return err
	})
	return id, err
}

func format(c FormatConfig, disks []*disk) (uuid.UUID, error) {
	s := superblock{version: formatVersion, pool: uuid.New(), created: time.Now().UnixNano(), journalOffset: labelSize,
		zoneRegions: uint32(c.ZoneRegions), nextLayer: 1, name: c.Name, flags: superClean, topology: 1}
	var total uint64
	for _, d := range disks {
		total += d.size()
	}
	s.journalLength = journalLength(total, c.JournalBytes)
	for i, d := range disks {
		if !c.Force {
			b := alignedBytes(foreignBytes)
			if d.size() >= foreignBytes {
				if err := d.read(b, 0); err != nil {
					return s.pool, err
				}
			}
			if what := foreign(b); what != "" {
				return s.pool, fmt.Errorf("%s: holds %s, which would be destroyed: %w (--force overwrites it)", d.path, what, ErrForeign)
			}
		}
		base := uint64(labelSize)
		if i == 0 {
			base += s.journalLength
		}
		if err := s.addMember(d, base); err != nil {
			return s.pool, fmt.Errorf("pool %s: %w", c.Name, err)
		}
	}
	for i, d := range disks {
		if err := eraseLabels(d, s.members[i].size); err != nil {
			return s.pool, err
		}
	}
	zone := uint64(0)
	for _, g := range s.segments {
		if err := formatZones(&s, disks[g.disk], g, zone); err != nil {
			return s.pool, err
		}
		zone += uint64(g.zones)
	}
	if err := flushAll(disks); err != nil {
		return s.pool, err
	}
	s.generation = 1
	return s.pool, writeLabels(&s, disks)
}

// journalLength is the length of the journal of a pool of total bytes.
func journalLength(total, asked uint64) uint64 {
	n := asked
	if n == 0 {
		n = min(max(total/1024, min(4<<20, total/64)), 256<<20)
	}
	return min(max(n, journalMin), journalMax) &^ (clusterSize - 1)
}

// addMember gives a disk its place and its zones.
func (s *superblock) addMember(d *disk, base uint64) error {
	size := d.size() &^ (clusterSize - 1)
	zones, last := s.fit(base, size)
	if zones == 0 {
		return fmt.Errorf("%s: %d bytes are too few: a pool's disk needs at least %d here: %w",
			d.path, d.size(), base+s.zoneHead()+regionClusters*clusterSize+trailerSize, ErrInvalid)
	}
	i := len(s.members)
	s.members = append(s.members, superMember{id: uuid.New(), size: size, base: base, hint: d.path})
	s.segments = append(s.segments, segment{disk: uint32(i), zones: zones, last: last})
	var all uint64
	for _, g := range s.segments {
		all += uint64(g.zones)
	}
	if all*uint64(s.zoneClusters()) > clustersMax {
		return fmt.Errorf("%s: a pool holds at most 256 TiB: %w", d.path, ErrInvalid)
	}
	return nil
}

// formatZones writes empty zone pages. zone is the pool's number of the first.
func formatZones(s *superblock, d *disk, g segment, zone uint64) error {
	var b batch
	for i := range uint64(g.zones) {
		page := alignedBytes(pairSize)
		h := pageHeader{kind: pageZone, self: zone + i}
		h.seal(page[:pageSize], s.pool)
		copy(page[pageSize:], page[:pageSize])
		b.add(d.start(datapath.OpWrite, 0, page, s.members[g.disk].base+(uint64(g.first)+i)*s.zoneStride()))
	}
	return b.wait()
}

// eraseLabels destroys whatever superblocks a disk of size bytes has.
func eraseLabels(d *disk, size uint64) error {
	b := alignedBytes(labelSize)
	if err := d.write(b, 0, 0); err != nil {
		return err
	}
	if err := d.write(b[:pairSize], size-pairSize, 0); err != nil {
		return err
	}
	return d.flush()
}

// writeLabels writes the first superblocks of new disks, disk 0 last.
func writeLabels(s *superblock, disks []*disk) error {
	b := alignedBytes(pageSize)
	for i := len(disks) - 1; i >= 0; i-- {
		s.index, s.disk = uint32(i), s.members[i].id
		s.encode(b)
		slot := s.generation % 2 * pageSize
		for _, at := range []uint64{slot, s.members[i].size - pairSize + slot} {
			if err := disks[i].write(b, at, datapath.FlagFUA); err != nil {
				return err
			}
		}
		if err := disks[i].flush(); err != nil {
			return err
		}
	}
	return nil
}

// readLabel finds the newest superblock of a disk. repaired says that a copy is
// damaged.
func readLabel(d *disk) (s *superblock, repaired bool, err error) {
	b := alignedBytes(pairSize)
	size := d.size() &^ (clusterSize - 1)
	if size < labelSize+trailerSize {
		return nil, false, fmt.Errorf("%s: %w", d.path, ErrNotPool)
	}
	var failures []error
	newest := 0 // copies of s
	look := func(at uint64) {
		if err := d.readPages(b, at); err != nil {
			failures = append(failures, err)
			return
		}
		for _, page := range [][]byte{b[:pageSize], b[pageSize:]} {
			x, err := decodeSuperblock(page)
			switch {
			case err == nil:
				if s == nil || x.generation > s.generation {
					s, newest = x, 0
				}
				if x.generation == s.generation {
					newest++
				}
			case !errors.Is(err, ErrNotPool):
				failures = append(failures, err)
			}
		}
	}
	look(0)
	look(size - pairSize)
	if s != nil {
		if end := s.members[s.index].size; end < size { // the disk has become larger since
			look(end - pairSize)
		}
	}
	if err := unsupported(failures); err != nil {
		return nil, false, fmt.Errorf("%s: %w", d.path, err)
	}
	if s != nil {
		if s.rocompat&^knownROCompat != 0 {
			return s, false, nil
		}
		return s, len(failures) > 0 || newest < 2, nil
	}
	if len(failures) > 0 {
		return nil, false, fmt.Errorf("%s: %w", d.path, errors.Join(failures...))
	}
	return nil, false, fmt.Errorf("%s: %w", d.path, ErrNotPool)
}

// unsupported is the error of errs, those of the superblocks of one disk, that says that
// one of them is of a newer format, or nil. That one is not damaged: those beside it,
// which this program could read, are older, and count no more.
func unsupported(errs []error) error {
	for _, err := range errs {
		if errors.Is(err, ErrUnsupported) {
			return err
		}
	}
	return nil
}

// Probe reads what pool a disk belongs to; ErrNotPool when none. r carries the
// reads.
func Probe(r *reactor.Reactor, d Disk) (l *Label, err error) {
	err = withDisks(r, []Disk{d}, func(disks []*disk) error {
		s, _, err := readLabel(disks[0])
		if err == nil {
			l = s.label()
		}
		return err
	})
	return l, err
}

// Erase destroys the labels of a disk, so that nothing finds a pool on it.
func Erase(r *reactor.Reactor, d Disk) error {
	return withDisks(r, []Disk{d}, func(disks []*disk) error {
		size := disks[0].size() &^ (clusterSize - 1)
		if size < labelSize+trailerSize {
			return fmt.Errorf("%s: %w", d.Path, ErrNotPool)
		}
		return eraseLabels(disks[0], size)
	})
}
