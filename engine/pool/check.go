package pool

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// CheckConfig says what to check, and what may be changed.
type CheckConfig struct {
	Disks   []Disk           // all disks of the pool, in any order; nobody else may use them
	Reactor *reactor.Reactor // carries the reads

	// Data also reads every block and compares it with its checksum.
	Data bool
	// Repair writes a copy that is damaged or old again from the good one. What it
	// does not change is reported as before.
	Repair bool
	// RecomputeSums makes checksums anew, from the blocks as they are, for regions
	// whose stored ones are lost in both copies. From then on a block that rotted
	// before counts as good: nothing can tell any more. Only with Repair.
	RecomputeSums bool

	// FindingsMax bounds the findings kept; the rest is only counted. 0: 10,000.
	FindingsMax int
	// Progress hears how far a phase has got; from one goroutine at a time. May be nil.
	Progress func(CheckProgress)
}

// CheckProgress is how far a check has got.
type CheckProgress struct {
	Pool        string
	Phase       CheckPhase
	Done, Total uint64 // bytes of this phase
}

// CheckPhase is a part of a check.
type CheckPhase string

// The phases, in order.
const (
	CheckMetadata  CheckPhase = "metadata"
	CheckJournal   CheckPhase = "journal"
	CheckChecksums CheckPhase = "checksums"
	CheckData      CheckPhase = "data"
	CheckRepair    CheckPhase = "repair"
)

// Severity says how bad a finding is.
type Severity string

// The severities.
const (
	SeverityNote    Severity = "note"    // as a crash leaves things; opening the pool settles it
	SeverityWarning Severity = "warning" // a copy is damaged and the other is good: nothing is lost
	SeverityError   Severity = "error"   // something is lost, or the pool cannot be trusted or opened
)

// FindingCode names a kind of finding. docs/internals/disk-format.md explains each.
type FindingCode string

// The kinds of findings.
const (
	FindUnclean        FindingCode = "unclean"
	FindSuperCopy      FindingCode = "superblock-copy"
	FindSuperOld       FindingCode = "superblock-old"
	FindGeometry       FindingCode = "geometry"
	FindZoneCopy       FindingCode = "zone-copy"
	FindZoneLost       FindingCode = "zone-lost"
	FindZoneContent    FindingCode = "zone-content"
	FindPageCopy       FindingCode = "page-copy"
	FindPageLost       FindingCode = "page-lost"
	FindPageContent    FindingCode = "page-content"
	FindJournalTorn    FindingCode = "journal-torn"
	FindJournalDamaged FindingCode = "journal-damaged"
	FindJournalRecord  FindingCode = "journal-record"
	FindLayerTwice     FindingCode = "layer-twice"
	FindLayerRecord    FindingCode = "layer-record"
	FindLayerParent    FindingCode = "layer-parent"
	FindLayerName      FindingCode = "layer-name"
	FindMapPlace       FindingCode = "map-place"
	FindMapTwice       FindingCode = "map-twice"
	FindEntryPastEnd   FindingCode = "entry-past-end"
	FindEntryCluster   FindingCode = "entry-cluster"
	FindEntryOwner     FindingCode = "entry-owner"
	FindRegionFresh    FindingCode = "region-fresh"
	FindSumsCopy       FindingCode = "sums-copy"
	FindSumsLost       FindingCode = "sums-lost"
	FindBlockDamaged   FindingCode = "block-damaged"
	FindBlockUnread    FindingCode = "block-unreadable"
	FindUnverified     FindingCode = "unverified"
)

// Where is a place on a device.
type Where struct {
	Device string `json:"device"`
	Offset uint64 `json:"offset"` // bytes
}

// Finding is one thing that is not as it should be.
type Finding struct {
	Severity Severity    `json:"severity"`
	Code     FindingCode `json:"code"`
	Where    Where       `json:"where"`
	What     string      `json:"what"`
	Remedy   string      `json:"remedy"` // what to do; "" when there is nothing to
	Repaired bool        `json:"repaired"`
}

// Report is what a check found.
type Report struct {
	Pool       string    `json:"pool"`
	UUID       uuid.UUID `json:"uuid"`
	Version    uint32    `json:"version"`
	Generation uint64    `json:"generation"`
	Clean      bool      `json:"closed_in_order"`
	// Complete is false when damage kept the check from going on to its end.
	Complete bool `json:"complete"`

	// Numbers of findings. Those repaired count both by their severity and here.
	Errors   int       `json:"errors"`
	Warnings int       `json:"warnings"`
	Notes    int       `json:"notes"`
	Repaired int       `json:"repaired"`
	Bad      int       `json:"bad"`              // errors and warnings that were not repaired
	Omitted  int       `json:"findings_omitted"` // counted, not kept
	Findings []Finding `json:"findings"`

	Devices      int `json:"devices"`
	Zones        int `json:"zones"`
	Volumes      int `json:"volumes"`
	Snapshots    int `json:"snapshots"`
	HiddenLayers int `json:"hidden_layers"`
	MapPages     int `json:"map_pages"`
	FreePairs    int `json:"free_metadata_pages"`

	JournalGroups  int `json:"journal_groups"`
	JournalRecords int `json:"journal_records"`

	FreshRegions int `json:"regions_fresh"`
	DirtyRegions int `json:"regions_dirty"`
	CleanRegions int `json:"regions_clean"`

	// Bytes. Total = Allocated + Metadata + Free, of clusters.
	Total     uint64 `json:"total_bytes"`
	Allocated uint64 `json:"allocated_bytes"`
	Metadata  uint64 `json:"metadata_bytes"`
	Free      uint64 `json:"free_bytes"`
	Mapped    uint64 `json:"mapped_bytes"` // of blocks in allocated clusters

	// Blocks read with Data: as their checksums say; different or unreadable; and
	// different in a region that was being written to when the pool was last used.
	VerifiedBlocks   uint64 `json:"verified_blocks"`
	DamagedBlocks    uint64 `json:"damaged_blocks"`
	UnverifiedBlocks uint64 `json:"unverified_blocks"`
}

// checker is one run of Check. It has its own model of the pool and shares with
// Open only the decoders of single structures.
type checker struct {
	config CheckConfig
	report *Report
	disks  []*disk // by index
	super  *superblock
	zones  []checkZone
	total  uint64 // clusters that exist
	layers map[uint32]*checkLayer
	pages  map[uint32][]*checkPage // by layer
	fixes  []fix
	next   uint32 // layer id

	mu sync.Mutex // guards report, fixes and progress while data is read
}

// checkZone is a zone as its page says.
type checkZone struct {
	disk   *disk
	start  uint64
	count  uint32 // clusters
	meta   []byte
	states []byte
	masks  []uint32 // blocks mapped, by cluster; nil while none is
	used   []uint64 // bits: clusters with an owner
}

type checkLayer struct {
	rec      layerRecord
	where    Where
	changes  map[uint32]checkChange // by cluster: what the journal says
	children int
}

type checkChange struct {
	e     entry
	where uint64 // bytes, on disk 0
}

type checkPage struct {
	where   Where
	index   uint32
	entries []entry // without those at the end that are empty
}

// fix is a write of a repair.
type fix struct {
	disk    *disk
	offset  uint64
	data    []byte
	finding int // index into report.Findings; -1: was omitted
	bad     bool
	region  *uint32 // checksums that have to be computed first
}

// Check examines a pool that nobody has open, completely: every invariant of the
// format. It writes nothing unless Repair is set, and then only what is a copy of
// something it has verified.
//
// Errors: as of Open where there is nothing to check, or a disk is missing. Damage
// is not an error but a finding.
func Check(c CheckConfig) (*Report, error) {
	if c.FindingsMax == 0 {
		c.FindingsMax = 10000
	}
	if c.RecomputeSums && !c.Repair {
		return nil, fmt.Errorf("checksums are recomputed only with a repair: %w", ErrInvalid)
	}
	k := &checker{config: c, report: &Report{Findings: []Finding{}}, layers: map[uint32]*checkLayer{}, pages: map[uint32][]*checkPage{}}
	err := withDisks(c.Reactor, c.Disks, func(disks []*disk) error {
		if err := k.labels(disks); err != nil {
			return err
		}
		if k.geometry() && k.readZones() {
			k.readMetadata()
			whole := k.readJournal()
			k.checkLayers()
			k.checkEntries()
			k.checkSums()
			if c.Data {
				k.checkData()
			}
			k.countSpace()
			k.report.Complete = whole
		}
		if c.Repair {
			return k.repair()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return k.report, nil
}

// find notes a finding and returns its index, -1 when it is not kept. mu is held
// while data is read.
func (k *checker) find(s Severity, code FindingCode, at Where, remedy, what string, args ...any) int {
	r := k.report
	switch s {
	case SeverityError:
		r.Errors++
	case SeverityWarning:
		r.Warnings++
	case SeverityNote:
		r.Notes++
	}
	if s != SeverityNote {
		r.Bad++
	}
	if len(r.Findings) >= k.config.FindingsMax {
		r.Omitted++
		return -1
	}
	r.Findings = append(r.Findings, Finding{Severity: s, Code: code, Where: at, What: fmt.Sprintf(what, args...), Remedy: remedy})
	return len(r.Findings) - 1
}

// copyFound notes that one copy of something is not as the other, and how to mend it.
func (k *checker) copyFound(code FindingCode, d *disk, offset uint64, good []byte, what string, args ...any) {
	severity, remedy := SeverityWarning, "--repair writes it again from the good copy"
	if !k.report.Clean {
		severity, remedy = SeverityNote, "a crash leaves this; opening the pool, or --repair, writes it again"
	}
	i := k.find(severity, code, Where{d.path, offset}, remedy, what, args...)
	k.fixes = append(k.fixes, fix{disk: d, offset: offset, data: bytes.Clone(good), finding: i, bad: severity != SeverityNote})
}

func (k *checker) progress(phase CheckPhase, done, total uint64) {
	if k.config.Progress != nil {
		k.config.Progress(CheckProgress{k.report.Pool, phase, done, total})
	}
}

// ---- superblocks ------------------------------------------------------------------

// checkLabel is the superblocks of one disk: two slots at its start, and copies of
// them at its end.
type checkLabel struct {
	disk   *disk
	newest *superblock
	slot   int       // of newest
	page   []byte    // newest as it lies there
	at     [4]uint64 // start slot 0, 1, end slot 0, 1
	pages  [4][]byte
	copies [4]*superblock // nil: not valid
	errs   [4]error
}

func (l *checkLabel) read(place int, at uint64) {
	b := alignedBytes(pairSize)
	err := l.disk.read(b, at)
	for i := range 2 {
		n := place + i
		l.at[n], l.pages[n], l.copies[n], l.errs[n] = at+uint64(i)*pageSize, b[i*pageSize:(i+1)*pageSize], nil, err
		if err != nil && l.disk.read(l.pages[n], l.at[n]) == nil {
			l.errs[n] = nil // only the other one is unreadable
		}
		if l.errs[n] == nil {
			l.copies[n], l.errs[n] = decodeSuperblock(l.pages[n])
		}
	}
}

func readCheckLabel(d *disk) (*checkLabel, error) {
	size := d.size() &^ (clusterSize - 1)
	if size < labelSize+trailerSize {
		return nil, fmt.Errorf("%s: %w", d.path, ErrNotPool)
	}
	l := &checkLabel{disk: d}
	l.read(0, 0)
	l.read(2, size-pairSize)
	l.choose()
	if l.newest == nil {
		err := ErrNotPool
		for _, e := range l.errs {
			if errors.Is(err, ErrNotPool) && !errors.Is(e, ErrNotPool) {
				err = e
			}
		}
		return nil, fmt.Errorf("%s: no valid superblock: %w", d.path, err)
	}
	// The device may have grown since: the copies are where it ended.
	if end := l.newest.members[l.newest.index].size; end != size && end <= size && end >= labelSize+trailerSize {
		l.read(2, end-pairSize)
		l.choose()
	}
	if err := unsupported(l.errs[:]); err != nil {
		return nil, fmt.Errorf("%s: %w", d.path, err)
	}
	return l, nil
}

func (l *checkLabel) choose() {
	for n, s := range l.copies {
		if s != nil && (l.newest == nil || s.generation > l.newest.generation) {
			l.newest, l.slot, l.page = s, n%2, l.pages[n]
		}
	}
}

// labels finds what pool it is, and compares all copies of the superblocks.
func (k *checker) labels(disks []*disk) error {
	if len(disks) == 0 {
		return fmt.Errorf("no disks were given: %w", ErrNotPool)
	}
	var all []*checkLabel
	for _, d := range disks {
		l, err := readCheckLabel(d)
		if err != nil {
			return err
		}
		all = append(all, l)
	}
	// Disk 0 decides; without it, whoever knows most says what is missing.
	first := all[0]
	for _, l := range all {
		if l.newest.pool != first.newest.pool {
			return fmt.Errorf("%s belongs to the pool %s (%s), %s to %s (%s): %w", l.disk.path, l.newest.name, l.newest.pool,
				first.disk.path, first.newest.name, first.newest.pool, ErrInvalid)
		}
	}
	best := first
	for _, l := range all {
		if l.newest.index == 0 || best.newest.index != 0 && l.newest.generation > best.newest.generation {
			best = l
		}
	}
	s := best.newest
	k.super, k.next = s, uint32(s.nextLayer)
	r := k.report
	r.Pool, r.UUID, r.Version, r.Generation, r.Clean, r.Devices = s.name, s.pool, s.version, s.generation, s.flags&superClean != 0, len(s.members)
	if s.rocompat&^knownROCompat != 0 && k.config.Repair {
		return fmt.Errorf("pool %s: uses features (%#x) that this program may only read: it cannot repair it: %w", s.name, s.rocompat, ErrUnsupported)
	}
	k.disks = make([]*disk, len(s.members))
	var members []*checkLabel
	for _, l := range all {
		i := l.newest.index
		switch {
		case int(i) >= len(s.members) || s.members[i].id != l.newest.disk:
			k.find(SeverityNote, FindSuperOld, Where{l.disk.path, l.at[l.slot]}, "add it to the pool again; it holds nothing",
				"the disk is no member: it was about to become one when power was lost")
			continue
		case k.disks[i] != nil:
			return fmt.Errorf("%s and %s are the same disk of the pool %s, one is a copy: %w", k.disks[i].path, l.disk.path, s.name, ErrInvalid)
		}
		k.disks[i], l.disk.index = l.disk, int(i)
		members = append(members, l)
	}
	missing := &MissingError{Pool: s.name}
	for i, m := range s.members {
		if k.disks[i] == nil {
			missing.Missing = append(missing.Missing, Member{Index: i, UUID: m.id, Size: m.size, Hint: m.hint})
		}
	}
	if len(missing.Missing) > 0 {
		return missing
	}
	if !r.Clean {
		k.find(SeverityNote, FindUnclean, Where{k.disks[0].path, 0}, "", "the pool was not closed in order: what follows may be from a crash")
	}
	for _, l := range members {
		k.compareCopies(l, s)
	}
	return nil
}

// compareCopies looks at the superblocks of a disk. Of the slot that was written
// last both copies must be the same; of the other a copy that is there must be
// whole.
func (k *checker) compareCopies(l *checkLabel, super *superblock) {
	place := []string{"at the start", "at the end"}
	other := 1 - l.slot
	for end := range 2 {
		if n := 2*end + l.slot; !bytes.Equal(l.pages[n], l.page) {
			k.copyFound(FindSuperCopy, l.disk, l.at[n], l.page, "the superblock %s %s", place[end], describeCopy(l, n))
		}
		n, twin := 2*end+other, 2*(1-end)+other
		if l.copies[n] != nil && l.copies[n].pool == super.pool && l.copies[n].disk == l.newest.disk || errors.Is(l.errs[n], ErrNotPool) {
			continue
		}
		good := l.page
		if l.copies[twin] != nil && l.copies[twin].pool == super.pool && l.copies[twin].disk == l.newest.disk {
			good = l.pages[twin]
		}
		k.copyFound(FindSuperCopy, l.disk, l.at[n], good, "the older superblock %s %s", place[end], describeCopy(l, n))
	}
	at := Where{l.disk.path, l.at[l.slot]}
	s := l.newest
	switch {
	case s == super || s.topology == super.topology && sameMembers(s, super):
	case s.topology > super.topology && !k.report.Clean:
		k.find(SeverityNote, FindSuperOld, at, "the next change of members settles it",
			"the superblock knows of a change of members or sizes that disk 0 does not: a crash cut it short")
	case s.generation > super.generation:
		k.find(SeverityError, FindSuperOld, at, "", "the superblock (generation %d) differs from the older one of disk 0 (generation %d) in members or segments: a write to disk 0 was lost", s.generation, super.generation)
	default:
		want := super.copy()
		want.index, want.disk = s.index, s.disk
		b := make([]byte, pageSize)
		want.encode(b)
		i := k.find(SeverityError, FindSuperOld, at, "--repair writes it again from that of disk 0",
			"the superblock (generation %d) differs from that of disk 0 (generation %d) in members or segments: a write to it was lost", s.generation, super.generation)
		end := super.members[s.index].size - pairSize
		for _, offset := range []uint64{uint64(other) * pageSize, end + uint64(other)*pageSize} {
			k.fixes = append(k.fixes, fix{disk: l.disk, offset: offset, data: b, finding: i, bad: offset > pairSize})
		}
	}
}

// sameMembers compares what superblocks of different disks have in common. Paths
// are kept by disk 0 only.
func sameMembers(a, b *superblock) bool {
	return slices.Equal(a.segments, b.segments) && slices.EqualFunc(a.members, b.members, func(x, y superMember) bool {
		return x.id == y.id && x.size == y.size && x.base == y.base
	})
}

func describeCopy(l *checkLabel, n int) string {
	var disk *DiskError
	switch s, err := l.copies[n], l.errs[n]; {
	case s != nil && s.pool != l.newest.pool:
		return "is that of another pool"
	case s != nil:
		return fmt.Sprintf("is of generation %d, the newest is %d", s.generation, l.newest.generation)
	case errors.As(err, &disk):
		return "cannot be read"
	case errors.Is(err, ErrNotPool):
		return "is not there"
	default:
		return fmt.Sprintf("is damaged (%v)", err)
	}
}

// geometry checks that what the superblock says fits the disks; false: there is no
// sense in going on.
func (k *checker) geometry() bool {
	s, good := k.super, true
	bad := func(d *disk, remedy, what string, args ...any) {
		k.find(SeverityError, FindGeometry, Where{d.path, 0}, remedy, what, args...)
		good = false
	}
	if err := validName("pool", s.name); err != nil {
		bad(k.disks[0], "", "%v", err)
	}
	for i, m := range s.members {
		d := k.disks[i]
		if d.size() < m.size {
			bad(d, "make the device as large as it was", "the device has %d bytes, the pool uses %d of it: what lay at its end is lost", d.size(), m.size)
		}
		if d.size() < m.size || m.size < labelSize+trailerSize {
			continue
		}
		if i == 0 && (s.journalOffset+s.journalLength > m.base || s.journalOffset+s.journalLength > m.size) {
			bad(d, "", "the journal (%d bytes at %d) reaches into the zones, which begin at %d", s.journalLength, s.journalOffset, m.base)
		}
		have, short := uint32(0), false
		for n, g := range s.segments {
			if g.disk != uint32(i) {
				continue
			}
			if g.first != have {
				bad(d, "", "segment %d begins with zone %d of the disk, where %d was to come: segments overlap, or leave something out", n, g.first, have)
			}
			if short {
				bad(d, "", "segment %d follows one whose last zone is short", n)
			}
			have, short = g.first+g.zones, g.last < s.zoneRegions
		}
	}
	return good
}

// ---- zones ------------------------------------------------------------------------

// place is something to read.
type place struct {
	disk   *disk
	offset uint64
}

// readAll reads size bytes at each place, some ahead, and gives them to take in
// order, which keeps nothing of b. What cannot be read is read again page by page; a
// page that cannot is zeros in b, and failed is set.
func readAll(places iter.Seq[place], size int, take func(i int, p place, b []byte, failed bool)) {
	type reading struct {
		p place
		c *call
		b []byte
	}
	var under []reading
	var spare [][]byte
	n := 0
	reap := func() {
		r := under[0]
		under = under[:copy(under, under[1:])]
		failed := r.c.wait() != nil
		if failed {
			for at := 0; at < size; at += pageSize {
				if r.p.disk.read(r.b[at:at+pageSize], r.p.offset+uint64(at)) != nil {
					clear(r.b[at : at+pageSize])
				}
			}
		}
		take(n, r.p, r.b, failed)
		spare = append(spare, r.b)
		n++
	}
	for p := range places {
		if len(under) == syncDepth/2 {
			reap()
		}
		if len(spare) == 0 {
			spare = append(spare, alignedBytes(size))
		}
		b := spare[len(spare)-1]
		spare = spare[:len(spare)-1]
		under = append(under, reading{p, p.disk.start(datapath.OpRead, 0, b, p.offset), b})
	}
	for len(under) > 0 {
		reap()
	}
}

// pair judges the two copies of a page: it returns the newer valid one, and notes
// when the other is not the same. ok is false when neither is valid.
func (k *checker) pair(code FindingCode, p place, b []byte, self uint64, what string) (page []byte, h pageHeader, ok bool) {
	page, h, _, ok = newestOfPair(b, k.super.pool, self)
	if !ok {
		return nil, h, false
	}
	for i := range uint64(2) {
		other := b[i*pageSize : (i+1)*pageSize]
		if bytes.Equal(other, page) {
			continue
		}
		state := "is damaged or cannot be read"
		if o, valid := openPage(other, k.super.pool, self); valid {
			state = fmt.Sprintf("is older (stamp %d, the other's is %d)", o.stamp, h.stamp)
			if o.stamp == h.stamp {
				state = "differs from the first, with the same stamp"
			}
		}
		k.copyFound(code, p.disk, p.offset+i*pageSize, page, "copy %d of %s %s", i+1, what, state)
	}
	return page, h, true
}

// readZones reads all zone pages; false: one is lost, and with it where metadata is.
func (k *checker) readZones() bool {
	s := k.super
	var places []place
	for _, g := range s.segments {
		for i := range g.zones {
			regions := s.zoneRegions
			if i == g.zones-1 {
				regions = g.last
			}
			start := s.members[g.disk].base + uint64(g.first+i)*s.zoneStride()
			k.zones = append(k.zones, checkZone{disk: k.disks[g.disk], start: start, count: regions * regionClusters,
				used: make([]uint64, (regions*regionClusters+63)/64)})
			k.total += uint64(regions) * regionClusters
			places = append(places, place{k.disks[g.disk], start})
		}
	}
	k.report.Zones = len(k.zones)
	good := true
	readAll(slices.Values(places), pairSize, func(i int, p place, b []byte, _ bool) {
		z := &k.zones[i]
		at := Where{p.disk.path, p.offset}
		page, h, ok := k.pair(FindZoneCopy, p, b, uint64(i), fmt.Sprintf("the page of zone %d", i))
		if !ok {
			k.find(SeverityError, FindZoneLost, at, "restore the pool's volumes from another copy",
				"both copies of the page of zone %d are damaged: where its metadata lies is not known, and the pool does not open", i)
			good = false
			return
		}
		if h.kind != pageZone {
			k.find(SeverityError, FindZoneContent, at, "restore the pool's volumes from another copy", "the page of zone %d is of kind %d", i, h.kind)
			good = false
			return
		}
		body := zoneBody(page)
		z.meta, z.states = bytes.Clone(body.meta), bytes.Clone(body.states)
		for n := range uint32(len(z.meta) * 8) {
			if body.isMeta(n) && n >= z.count {
				k.find(SeverityError, FindZoneContent, at, "", "zone %d has metadata in cluster %d, and has only %d clusters", i, n, z.count)
				good = false
			}
		}
		for n, state := range z.states {
			if uint32(state) > uint32(regionClean) || state != byte(regionFresh) && uint32(n)*regionClusters >= z.count {
				k.find(SeverityError, FindZoneContent, at, "", "region %d of zone %d has the state %d", n, i, state)
				z.states[n] = byte(regionDirty)
			}
		}
	})
	return good
}

func (z *checkZone) isMeta(i uint32) bool { return zonePage{meta: z.meta}.isMeta(i) }

// use marks a cluster; false: it has an owner already, or does not exist.
func (k *checker) use(c uint32) (exists, free bool) {
	zone, i := c/k.super.zoneClusters(), c%k.super.zoneClusters()
	if int(zone) >= len(k.zones) || i >= k.zones[zone].count {
		return false, false
	}
	z := &k.zones[zone]
	if z.used[i/64]&(1<<(i%64)) != 0 {
		return true, false
	}
	z.used[i/64] |= 1 << (i % 64)
	return true, true
}

// address is where a cluster that exists lies.
func (k *checker) address(c uint32) (*disk, uint64) {
	z := &k.zones[c/k.super.zoneClusters()]
	return z.disk, z.start + k.super.zoneHead() + uint64(c%k.super.zoneClusters())<<clusterShift
}

// ---- metadata ---------------------------------------------------------------------

// readMetadata reads every pair of every metadata cluster.
func (k *checker) readMetadata() {
	var clusters []uint32
	for i := range k.zones {
		for n := range k.zones[i].count {
			if k.zones[i].isMeta(n) {
				c := uint32(i)*k.super.zoneClusters() + n
				k.use(c)
				clusters = append(clusters, c)
			}
		}
	}
	k.report.Metadata = uint64(len(clusters)) << clusterShift
	readAll(func(yield func(place) bool) {
		for _, c := range clusters {
			if d, offset := k.address(c); !yield(place{d, offset}) {
				return
			}
		}
	}, clusterSize, func(i int, p place, b []byte, _ bool) {
		for n := range uint64(metaPairs) {
			at := place{p.disk, p.offset + n*pairSize}
			k.metadataPair(at, b[n*pairSize:(n+1)*pairSize], uint64(clusters[i])*metaPairs+n)
		}
		k.progress(CheckMetadata, uint64(i+1)<<clusterShift, k.report.Metadata)
	})
}

func (k *checker) metadataPair(p place, b []byte, self uint64) {
	at := Where{p.disk.path, p.offset}
	page, h, ok := k.pair(FindPageCopy, p, b, self, fmt.Sprintf("metadata page %d", self))
	if !ok {
		k.find(SeverityError, FindPageLost, at, "restore the volumes from another copy: which one is hit cannot be told",
			"both copies of metadata page %d are damaged: a part of a map, or a layer, is lost, and the pool does not open", self)
		return
	}
	body := page[pageHeaderSize:]
	switch h.kind {
	case pageFree:
		k.report.FreePairs++
	case pageLayer:
		r, err := decodeLayer(body)
		switch {
		case err != nil || uint64(r.id) != h.owner:
			k.find(SeverityError, FindLayerRecord, at, "", "the record of layer %d makes no sense", h.owner)
		case k.layers[r.id] != nil:
			k.find(SeverityError, FindLayerTwice, at, "", "layer %d is also at %d of %s", r.id, k.layers[r.id].where.Offset, k.layers[r.id].where.Device)
		default:
			k.layers[r.id] = &checkLayer{rec: r, where: at}
		}
	case pageMap:
		if h.owner == 0 || h.owner >= 1<<32 || h.index > volumeSizeMax/clusterSize/mapEntries {
			k.find(SeverityError, FindMapPlace, at, "", "a map page of layer %d has the index %d", h.owner, h.index)
			return
		}
		entries := make([]entry, mapEntries)
		last := 0
		for i := range entries {
			if entries[i] = entry(le.Uint64(body[8*i:])); entries[i] != 0 {
				last = i + 1
			}
		}
		k.pages[uint32(h.owner)] = append(k.pages[uint32(h.owner)], &checkPage{where: at, index: uint32(h.index), entries: slices.Clone(entries[:last])})
	default:
		k.find(SeverityError, FindPageContent, at, "", "metadata page %d is of an unknown kind %d", self, h.kind)
	}
}

// ---- journal ----------------------------------------------------------------------

// readJournal follows the chain of groups from the checkpoint and applies their
// records; false: it is damaged, so that what follows is not known.
func (k *checker) readJournal() bool {
	s, d := k.super, k.disks[0]
	blocks := s.journalLength / pageSize
	next, prev, epoch := s.checkpoint, s.checkpointCRC, uint32(0)
	address := func(lsn uint64) uint64 { return s.journalOffset + lsn%blocks*pageSize }
	buffer := alignedBytes(groupBlocksMax * pageSize)
	for next-s.checkpoint < blocks {
		rest := blocks - next%blocks
		at := Where{d.path, address(next)}
		h, body, err := k.readGroup(buffer, at.Offset, rest)
		if err != nil {
			k.find(SeverityError, FindJournalDamaged, at, "restore the pool's volumes from another copy", "the journal cannot be read at LSN %d: %v", next, err)
			return false
		}
		if body == nil || h.lsn != next || h.prev != prev || h.epoch < epoch || h.epoch > s.epoch {
			return k.judgeTail(next, at)
		}
		advance := uint64(h.blocks)
		if err := eachRecord(body, func(t recordType, b []byte) error {
			k.report.JournalRecords++
			if t != recordPad {
				return k.applyRecord(t, b, at.Offset)
			}
			if len(b) != 4 || uint64(le.Uint32(b)) != rest {
				return errors.New("its padding does not reach to the end of the ring")
			}
			advance = rest
			return nil
		}); err != nil {
			k.find(SeverityError, FindJournalRecord, at, "restore the pool's volumes from another copy", "the group at LSN %d, whose checksum is right, makes no sense: %v", next, err)
			return false
		}
		k.report.JournalGroups++
		prev, epoch = h.crc, h.epoch
		next += advance
	}
	return true
}

// readGroup reads the group at offset, which may take up rest blocks at most. body
// is nil when none is there whose checksum is right.
func (k *checker) readGroup(buffer []byte, offset, rest uint64) (h groupHeader, body []byte, err error) {
	d := k.disks[0]
	if err := d.read(buffer[:pageSize], offset); err != nil {
		return h, nil, err
	}
	h, ok := decodeGroupHeader(buffer[:pageSize], k.super.pool)
	if !ok || uint64(h.blocks) > rest {
		return h, nil, nil
	}
	group := buffer[:int(h.blocks)*pageSize]
	if h.blocks > 1 {
		if err := d.read(group[pageSize:], offset+pageSize); err != nil {
			return h, nil, err
		}
	}
	if checksum(group[8:]) != h.crc {
		return h, nil, nil
	}
	return h, group[groupHeaderSize : groupHeaderSize+h.length], nil
}

// judgeTail decides what the group at LSN bad is, which is not good: the end of the
// journal, a torn tail, or damage, if a later group proves that it had been written.
func (k *checker) judgeTail(bad uint64, at Where) bool {
	s, d := k.super, k.disks[0]
	blocks := s.journalLength / pageSize
	buffer := alignedBytes(groupBlocksMax * pageSize)
	proof, good, later := groupHeader{}, true, false
	readAll(func(yield func(place) bool) {
		for n := uint64(0); n < s.journalLength; n += clusterSize {
			if !yield(place{d, s.journalOffset + n}) {
				return
			}
		}
	}, clusterSize, func(_ int, p place, b []byte, _ bool) {
		for n := 0; n < clusterSize && good; n += pageSize {
			block := (p.offset + uint64(n) - s.journalOffset) / pageSize
			h, ok := decodeGroupHeader(b[n:n+pageSize], s.pool)
			run := h.epoch > s.epoch
			if !ok || block >= blocks || h.lsn%blocks != block || !run && (h.lsn <= bad || h.lsn-bad >= blocks || h.durable <= bad) {
				continue
			}
			if _, body, err := k.readGroup(buffer, s.journalOffset+block*pageSize, blocks-block); err == nil && body != nil {
				proof, good, later = h, false, run
			}
		}
		k.progress(CheckJournal, min(p.offset+clusterSize-s.journalOffset, s.journalLength), s.journalLength)
	})
	switch {
	case later:
		k.find(SeverityError, FindJournalDamaged, at, "restore the pool's volumes from another copy",
			"the group at LSN %d is of run %d of the pool, the superblock of run %d: the newest superblock is lost, and the pool does not open", proof.lsn, proof.epoch, s.epoch)
		return false
	case !good:
		k.find(SeverityError, FindJournalDamaged, at, "restore the pool's volumes from another copy",
			"the group at LSN %d is damaged, though a later one, at %d, shows that it had been written: changes are lost, and the pool does not open", bad, proof.lsn)
		return false
	}
	block := alignedBytes(pageSize)
	if err := d.read(block, at.Offset); err == nil && le.Uint32(block) == groupMagic && le.Uint64(block[16:]) == bad {
		k.find(SeverityNote, FindJournalTorn, at, "", "the group at LSN %d was being written when power was lost: it does not count", bad)
	}
	if k.report.Clean && k.report.JournalGroups > 0 {
		k.find(SeverityWarning, FindJournalRecord, at, "open the pool and close it", "the pool was closed in order, and yet its journal is not empty")
	}
	return true
}

func (k *checker) applyRecord(t recordType, b []byte, where uint64) error {
	bad := func(what string) error { return fmt.Errorf("a record of type %d %s", t, what) }
	switch t {
	case recordMap:
		if len(b) != 16 {
			return bad("has a wrong length")
		}
		if l, v := k.layers[le.Uint32(b)], le.Uint32(b[4:]); l != nil { // else: removed further on
			if uint64(v) >= clustersOf(l.rec.size) {
				return bad(fmt.Sprintf("speaks of cluster %d, which layer %d does not have", v, l.rec.id))
			}
			if l.changes == nil {
				l.changes = map[uint32]checkChange{}
			}
			l.changes[v] = checkChange{entry(le.Uint64(b[8:])), where}
		}
	case recordRegion:
		if len(b) != 8 {
			return bad("has a wrong length")
		}
		index, state, per := le.Uint32(b), le.Uint32(b[4:]), k.super.zoneRegions
		if int(index/per) >= len(k.zones) || index%per*regionClusters >= k.zones[index/per].count || state > uint32(regionClean) {
			return bad(fmt.Sprintf("gives region %d the state %d", index, state))
		}
		k.zones[index/per].states[index%per] = byte(state)
	case recordLayer:
		r, err := decodeLayer(b)
		if err != nil {
			return err
		}
		l := k.layers[r.id]
		if l == nil {
			l = &checkLayer{}
			k.layers[r.id] = l
		}
		l.rec, l.where = r, Where{k.disks[0].path, where}
		k.next = max(k.next, r.id+1)
	case recordRemove:
		if len(b) != 4 {
			return bad("has a wrong length")
		}
		delete(k.layers, le.Uint32(b))
	default:
		return bad("is not known")
	}
	return nil
}

// ---- layers and maps --------------------------------------------------------------

func (k *checker) sorted() []*checkLayer {
	var list []*checkLayer
	for _, id := range slices.Sorted(maps.Keys(k.layers)) {
		list = append(list, k.layers[id])
	}
	return list
}

// name is what people call a layer.
func (k *checker) name(l *checkLayer) string {
	r := &l.rec
	switch {
	case r.flags&layerHidden != 0:
		return fmt.Sprintf("layer %d (of a deleted snapshot)", r.id)
	case r.flags&layerFrozen == 0:
		return "volume " + r.name
	}
	for _, h := range k.layers {
		if h.rec.flags&layerFrozen == 0 && h.rec.volume == r.volume {
			return "snapshot " + h.rec.name + "@" + r.name
		}
	}
	return "snapshot " + r.name
}

// checkLayers judges the tree: each parent is there and frozen (that ids grow
// towards the leaves keeps cycles out), names are valid and unique, volumes have
// one head.
func (k *checker) checkLayers() {
	heads := map[uuid.UUID]*checkLayer{}
	names := map[string]*checkLayer{}
	layers := k.sorted()
	twice := func(key string, l *checkLayer) {
		if o := names[key]; o != nil {
			k.find(SeverityError, FindLayerName, l.where, "", "layers %d and %d have the same name, %q", o.rec.id, l.rec.id, l.rec.name)
			return
		}
		names[key] = l
	}
	for _, l := range layers {
		r := &l.rec
		if r.id >= k.next {
			k.find(SeverityError, FindLayerRecord, l.where, "", "layer %d has an id that was not given out yet (the next is %d)", r.id, k.next)
		}
		switch {
		case r.flags&layerFrozen == 0:
			k.report.Volumes++
			if o := heads[r.volume]; o != nil {
				k.find(SeverityError, FindLayerRecord, l.where, "", "layers %d and %d are both the head of one volume", o.rec.id, r.id)
			}
			heads[r.volume] = l
			if r.flags&layerHidden != 0 || r.uuid != r.volume || r.size == 0 {
				k.find(SeverityError, FindLayerRecord, l.where, "", "the record of the head %d contradicts itself (flags %#x)", r.id, r.flags)
			}
			if err := validName("volume", r.name); err != nil {
				k.find(SeverityError, FindLayerName, l.where, "", "layer %d: %v", r.id, err)
			}
			twice(r.name, l)
		case r.flags&layerHidden != 0:
			k.report.HiddenLayers++
			if r.name != "" {
				k.find(SeverityError, FindLayerName, l.where, "", "layer %d is hidden and yet named %q", r.id, r.name)
			}
		default:
			k.report.Snapshots++
			if err := validName("snapshot", r.name); err != nil {
				k.find(SeverityError, FindLayerName, l.where, "", "layer %d: %v", r.id, err)
			}
			twice(r.volume.String()+"@"+r.name, l)
		}
		if r.parent == 0 {
			continue
		}
		parent := k.layers[r.parent]
		switch {
		case parent == nil || parent.rec.flags&layerFrozen == 0:
			k.find(SeverityError, FindLayerParent, l.where, "", "%s stands on layer %d, which is not there or not frozen", k.name(l), r.parent)
			continue
		case parent.rec.size > r.size:
			k.find(SeverityError, FindLayerParent, l.where, "", "%s has %d bytes, and stands on one of %d", k.name(l), r.size, parent.rec.size)
		}
		parent.children++
	}
	for _, l := range layers {
		if l.rec.flags&(layerFrozen|layerHidden) == layerFrozen && heads[l.rec.volume] == nil {
			k.find(SeverityError, FindLayerRecord, l.where, "", "snapshot %s (layer %d) is of a volume that is not there", l.rec.name, l.rec.id)
		}
	}
}

// each calls f for every entry of l that is not empty, of the maps on the disk and
// of what the journal changes in them.
func (k *checker) each(l *checkLayer, f func(v uint32, e entry, at Where)) {
	for _, p := range k.pages[l.rec.id] {
		for i, e := range p.entries {
			v := p.index*mapEntries + uint32(i)
			if _, changed := l.changes[v]; e != 0 && !changed {
				f(v, e, p.where)
			}
		}
	}
	for _, v := range slices.Sorted(maps.Keys(l.changes)) {
		if c := l.changes[v]; c.e != 0 {
			f(v, c.e, Where{k.disks[0].path, c.where})
		}
	}
}

// checkEntries judges the maps: each page in its place and only once, each entry
// within its layer, each cluster there and with one owner.
func (k *checker) checkEntries() {
	const remedy = "copy what can be read from the volumes that are named, and delete them"
	doubles := map[uint32]bool{}
	for _, l := range k.sorted() {
		pages := k.pages[l.rec.id]
		slices.SortStableFunc(pages, func(a, b *checkPage) int { return int(a.index) - int(b.index) })
		k.report.MapPages += len(pages)
		for i, p := range pages {
			if uint64(p.index)*mapEntries >= clustersOf(l.rec.size) {
				k.find(SeverityError, FindMapPlace, p.where, "", "map page %d of %s is past its end", p.index, k.name(l))
			}
			if i > 0 && pages[i-1].index == p.index {
				k.find(SeverityError, FindMapTwice, p.where, "", "map page %d of %s is also at %d of %s", p.index, k.name(l), pages[i-1].where.Offset, pages[i-1].where.Device)
			}
		}
		clusters := clustersOf(l.rec.size)
		k.each(l, func(v uint32, e entry, at Where) {
			c := e.cluster()
			end := wholeMask
			if uint64(v) == clusters-1 && l.rec.size%clusterSize != 0 {
				end = maskOf(0, uint32(l.rec.size%clusterSize/blockSize))
			}
			switch {
			case uint64(v) >= clusters || e.mask()&^end != 0:
				k.find(SeverityError, FindEntryPastEnd, at, "", "cluster %d of %s, or blocks of it, are past the end (%d bytes)", v, k.name(l), l.rec.size)
				return
			case c == noCluster && e.mask() != 0:
				k.find(SeverityError, FindEntryCluster, at, remedy, "cluster %d of %s has blocks (%#x) and no place", v, k.name(l), e.mask())
				return
			case e.mask() == 0:
				return // of a write that never ended, or all discarded: it owns nothing
			}
			exists, free := k.use(c)
			switch {
			case !exists:
				k.find(SeverityError, FindEntryCluster, at, remedy, "cluster %d of %s lies in cluster %d of the pool, which does not exist", v, k.name(l), c)
				return
			case !free:
				doubles[c] = true
			default:
				k.report.Allocated += clusterSize
				k.report.Mapped += blocksIn(e.mask()) * blockSize
			}
			z := &k.zones[c/k.super.zoneClusters()]
			if z.masks == nil {
				z.masks = make([]uint32, z.count)
			}
			z.masks[c%k.super.zoneClusters()] |= e.mask()
		})
	}
	if len(doubles) == 0 {
		return
	}
	owners := k.owners(doubles)
	for _, c := range slices.Sorted(maps.Keys(doubles)) {
		d, offset := k.address(c)
		list := owners[c]
		if k.zones[c/k.super.zoneClusters()].isMeta(c % k.super.zoneClusters()) {
			list = append([]string{"the pool's metadata"}, list...)
		}
		k.find(SeverityError, FindEntryOwner, Where{d.path, offset}, remedy, "cluster %d has more than one owner: %s", c, joined(list))
	}
}

const ownersNamed = 8

func joined(list []string) string {
	more := ""
	if len(list) > ownersNamed {
		more = fmt.Sprintf(" and %d more", len(list)-ownersNamed)
		list = list[:ownersNamed]
	}
	s := ""
	for i, x := range list {
		if i > 0 {
			s += ", "
		}
		s += x
	}
	return s + more
}

// owners says which clusters of which layers the clusters are.
func (k *checker) owners(clusters map[uint32]bool) map[uint32][]string {
	all := map[uint32][]string{}
	for _, l := range k.sorted() {
		k.each(l, func(v uint32, e entry, _ Where) {
			if c := e.cluster(); e.mask() != 0 && clusters[c] {
				all[c] = append(all[c], fmt.Sprintf("%s at %d", k.name(l), uint64(v)<<clusterShift))
			}
		})
	}
	return all
}

// countSpace sums up. Allocated is counted already.
func (k *checker) countSpace() {
	r := k.report
	r.Total = k.total << clusterShift
	r.Free = r.Total - min(r.Total, r.Allocated+r.Metadata)
	for i := range k.zones {
		for n, state := range k.zones[i].states {
			switch {
			case uint32(n)*regionClusters >= k.zones[i].count:
			case state == byte(regionFresh):
				r.FreshRegions++
			case state == byte(regionDirty):
				r.DirtyRegions++
			default:
				r.CleanRegions++
			}
		}
	}
}

// ---- checksums --------------------------------------------------------------------

// mapped are the masks of a region's clusters; nil: nothing in its zone is mapped.
func (z *checkZone) mapped(region uint32) []uint32 {
	if z.masks == nil {
		return nil
	}
	return z.masks[region*regionClusters : (region+1)*regionClusters]
}

func anyBlock(masks []uint32) bool {
	return slices.ContainsFunc(masks, func(m uint32) bool { return m != 0 })
}

// regions are those of all zones that f wants.
func (k *checker) regions(f func(z *checkZone, state regionState) bool) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for i := range k.zones {
			z := &k.zones[i]
			for n := range z.count / regionClusters {
				if f(z, regionState(z.states[n])) && !yield(uint32(i)*k.super.zoneRegions+n) {
					return
				}
			}
		}
	}
}

func (k *checker) regionAt(index uint32) (z *checkZone, n uint32) {
	return &k.zones[index/k.super.zoneRegions], index % k.super.zoneRegions
}

// sumsPlace is where the pair of a region's checksums lies.
func (k *checker) sumsPlace(index uint32) place {
	z, n := k.regionAt(index)
	return place{z.disk, z.start + clusterSize + uint64(n)*pairSize}
}

// places gives the places of the checksums of regions, and keeps which they are.
func (k *checker) places(regions iter.Seq[uint32], list *[]uint32) iter.Seq[place] {
	return func(yield func(place) bool) {
		for i := range regions {
			*list = append(*list, i)
			if !yield(k.sumsPlace(i)) {
				return
			}
		}
	}
}

// checkSums judges the stored checksums of clean regions, and that fresh ones have
// nothing to prove.
func (k *checker) checkSums() {
	for index := range k.regions(func(_ *checkZone, s regionState) bool { return s == regionFresh }) {
		z, n := k.regionAt(index)
		if anyBlock(z.mapped(n)) {
			k.find(SeverityError, FindRegionFresh, Where{z.disk.path, k.sumsPlace(index).offset}, "copy what can be read from its volumes, and delete them",
				"region %d was never written to, as the journal has it, and yet has blocks of volumes: none of them can be proven", index)
		}
	}
	isClean := func(_ *checkZone, s regionState) bool { return s == regionClean }
	var total, done uint64
	for range k.regions(isClean) {
		total += pairSize
	}
	var list []uint32
	readAll(k.places(k.regions(isClean), &list), pairSize, func(i int, p place, b []byte, _ bool) {
		index := list[i]
		what := fmt.Sprintf("the checksums of region %d", index)
		_, h, ok := k.pair(FindSumsCopy, p, b, uint64(index), what)
		if !ok || h.kind != pageSums {
			k.sumsLost(index, p)
		}
		done += pairSize
		k.progress(CheckChecksums, done, total)
	})
}

func (k *checker) sumsLost(index uint32, p place) {
	z, n := k.regionAt(index)
	severity, remedy := SeverityError, "--repair --recompute-checksums makes them anew from the blocks as they are: rot that is there now is then never found; else each block reads as damaged until it is written again"
	what := "both copies of the checksums of region %d are damaged: none of its blocks can be proven"
	empty := !anyBlock(z.mapped(n))
	if empty {
		severity, remedy = SeverityWarning, "--repair makes them anew"
		what = "both copies of the checksums of region %d are damaged; it has no blocks, so nothing is lost"
	}
	i := k.find(severity, FindSumsLost, Where{p.disk.path, p.offset}, remedy, what, index)
	if empty || k.config.RecomputeSums {
		k.fixes = append(k.fixes, fix{disk: p.disk, offset: p.offset, finding: i, bad: true, region: &index})
	}
}

// ---- data -------------------------------------------------------------------------

// checkData reads every mapped block and compares it with its checksum; the disks
// at once.
func (k *checker) checkData() {
	var all sync.WaitGroup
	var done, unverified uint64
	total := k.report.Allocated
	damaged := map[uint32]uint32{}    // by cluster: blocks
	unreadable := map[uint32]uint32{} // by cluster: blocks
	for _, d := range k.disks {
		all.Go(func() {
			var list []uint32
			regions := k.regions(func(z *checkZone, s regionState) bool { return z.disk == d && z.masks != nil && s != regionFresh })
			readAll(k.places(regions, &list), pairSize, func(i int, _ place, b []byte, _ bool) {
				z, n := k.regionAt(list[i])
				masks := z.mapped(n)
				if !anyBlock(masks) {
					return
				}
				page, h, _, ok := newestOfPair(b, k.super.pool, uint64(list[i]))
				if !ok || h.kind != pageSums {
					page = nil // told of in checkSums, unless the region is dirty
				}
				k.checkRegion(list[i], masks, page, func(c, bad, unread uint32, count uint64) {
					k.mu.Lock()
					defer k.mu.Unlock()
					dirty := regionState(z.states[n]) == regionDirty
					if dirty {
						unverified += blocksIn(bad)
					} else if bad != 0 && page != nil {
						damaged[c] = bad
						k.report.DamagedBlocks += blocksIn(bad)
					}
					if unread != 0 {
						unreadable[c] = unread
						k.report.DamagedBlocks += blocksIn(unread)
					}
					k.report.VerifiedBlocks += count
					done += clusterSize
					k.progress(CheckData, done, total)
				})
			})
		})
	}
	all.Wait()
	k.report.UnverifiedBlocks = unverified
	if unverified > 0 {
		k.find(SeverityNote, FindUnverified, Where{k.disks[0].path, 0}, "opening the pool makes their checksums anew",
			"%d blocks differ from their stored checksums in regions that were being written to when the pool was last used: whether they are what was written last cannot be told", unverified)
	}
	k.tellBlocks(damaged, FindBlockDamaged, "differs from its checksum")
	k.tellBlocks(unreadable, FindBlockUnread, "cannot be read")
}

// checkRegion reads the mapped blocks of a region; page nil: there are no checksums.
func (k *checker) checkRegion(index uint32, masks []uint32, page []byte, tell func(c, bad, unread uint32, good uint64)) {
	first := index * regionClusters
	var clusters []uint32
	readAll(func(yield func(place) bool) {
		for i, m := range masks {
			if m != 0 {
				clusters = append(clusters, uint32(i))
				if d, offset := k.address(first + uint32(i)); !yield(place{d, offset}) {
					return
				}
			}
		}
	}, clusterSize, func(i int, p place, b []byte, failed bool) {
		c := clusters[i]
		var bad, unread uint32
		for n := range uint32(clusterBlocks) {
			if masks[c]&(1<<n) == 0 {
				continue
			}
			block := b[n*blockSize : (n+1)*blockSize]
			if failed && p.disk.read(block, p.offset+uint64(n)*blockSize) != nil {
				unread |= 1 << n
			} else if page == nil || checksum(block) != le.Uint32(page[pageHeaderSize+4*(c*clusterBlocks+n):]) {
				bad |= 1 << n
			}
		}
		tell(first+c, bad, unread, blocksIn(masks[c]&^(bad|unread)))
	})
}

// tellBlocks notes blocks, with whose they are.
func (k *checker) tellBlocks(blocks map[uint32]uint32, code FindingCode, what string) {
	if len(blocks) == 0 {
		return
	}
	clusters := map[uint32]bool{}
	for c := range blocks {
		clusters[c] = true
	}
	type owned struct {
		l *checkLayer
		v uint32
		m uint32
	}
	owners := map[uint32][]owned{}
	for _, l := range k.sorted() {
		k.each(l, func(v uint32, e entry, _ Where) {
			if c := e.cluster(); e.mask() != 0 && clusters[c] {
				owners[c] = append(owners[c], owned{l, v, e.mask()})
			}
		})
	}
	for _, c := range slices.Sorted(maps.Keys(blocks)) {
		d, offset := k.address(c)
		for b := range uint32(clusterBlocks) {
			if blocks[c]&(1<<b) == 0 {
				continue
			}
			for _, o := range owners[c] {
				if o.m&(1<<b) != 0 {
					k.find(SeverityError, code, Where{d.path, offset + uint64(b)*blockSize}, "write the block again, from another copy",
						"the block at %d of %s %s", uint64(o.v)<<clusterShift+uint64(b)*blockSize, k.name(o.l), what)
				}
			}
		}
	}
}

// ---- repair -----------------------------------------------------------------------

// repair makes the writes that were planned. Each is a copy of what was verified,
// or checksums that the operator asked for.
func (k *checker) repair() error {
	r := k.report
	for i, f := range k.fixes {
		var b []byte
		if f.region != nil {
			b = k.recompute(*f.region)
		} else {
			b = alignedBytes(len(f.data))
			copy(b, f.data)
		}
		if err := f.disk.write(b, f.offset, datapath.FlagFUA); err != nil {
			return fmt.Errorf("pool %s: repair: %w", k.super.name, err)
		}
		if f.bad {
			r.Bad--
		}
		if f.finding >= 0 {
			r.Findings[f.finding].Repaired = true
		}
		k.progress(CheckRepair, uint64(i+1)*pageSize, uint64(len(k.fixes))*pageSize)
	}
	r.Repaired = 0
	for _, f := range r.Findings {
		if f.Repaired {
			r.Repaired++
		}
	}
	return flushAll(k.disks)
}

// recompute makes the pair of a region's checksums from its blocks as they are. A
// block that cannot be read stays unproven.
func (k *checker) recompute(index uint32) []byte {
	z, n := k.regionAt(index)
	b := alignedBytes(pairSize)
	body := b[pageHeaderSize:pageSize]
	for i := range regionBlocks {
		le.PutUint32(body[4*i:], poison)
	}
	block := alignedBytes(blockSize)
	for c, mask := range z.mapped(n) {
		d, offset := k.address(index*regionClusters + uint32(c))
		for i := range uint32(clusterBlocks) {
			if mask&(1<<i) != 0 && d.read(block, offset+uint64(i)*blockSize) == nil {
				le.PutUint32(body[4*(uint32(c)*clusterBlocks+i):], checksum(block))
			}
		}
	}
	h := pageHeader{kind: pageSums, stamp: 1, self: uint64(index)}
	h.seal(b[:pageSize], k.super.pool)
	copy(b[pageSize:], b[:pageSize])
	return b
}
