package pool

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/internal/crc32c"
)

// The numbers of the format. docs/internals/disk-format.md has the tables.
const (
	formatVersion = 1 // 1: the first

	blockSize     = datapath.BlockSize
	clusterShift  = 17
	clusterSize   = 1 << clusterShift       // 128 KiB
	clusterBlocks = clusterSize / blockSize // 32: one bit each in a map entry

	pageSize       = 4096
	pageHeaderSize = 64
	pairSize       = 2 * pageSize

	mapEntries = (pageSize - pageHeaderSize) / 8 // 504 clusters, 63 MiB of a volume

	// A region is what one page of checksums covers, and one bit of the intent log.
	regionClusters = 31
	regionBlocks   = regionClusters * clusterBlocks // 992

	zoneRegionsMax  = 256
	metaPairs       = clusterSize / pairSize // 16 pairs of pages in a metadata cluster
	labelSize       = clusterSize            // at the start of each disk: the superblocks
	trailerSize     = clusterSize            // at its end: their copies
	journalMin      = 256 << 10
	journalMax      = 1 << 30
	membersMax      = 16
	segmentsMax     = 96
	nameMax         = 62
	hintMax         = 88
	clustersMax     = 1<<31 - 2
	layerRecordMax  = pageSize - pageHeaderSize
	groupHeaderSize = 64
	groupBlocksMax  = 256 // 1 MiB
)

const (
	superMagic = "ASHLARPL"
	pageMagic  = 0x47504d41 // "AMPG"
	groupMagic = 0x47524a41 // "AJRG"
)

// Feature bits this code knows.
const (
	knownIncompat uint64 = 0
	knownROCompat uint64 = 0
)

var le = binary.LittleEndian

func checksum(b []byte) uint32 { return crc32c.Checksum(b) }

// superblock is what begins and ends each disk of a pool.
//
//	offset size
//	     0    8  magic "ASHLARPL"
//	     8    4  version
//	    16    8  incompatible features: unknown bits refuse
//	    24    8  read-only compatible features: unknown bits refuse all but a read-only open
//	    32    8  compatible features
//	    40    8  generation: the highest valid one counts
//	    48   16  pool
//	    64   16  disk
//	    80    4  index of the disk
//	    84    4  number of disks
//	    88    8  created, nanoseconds since 1970
//	    96    8  journal: offset on disk 0
//	   104    8  journal: length
//	   112    4  regions a zone
//	   116    4  cluster shift (17)
//	   120    8  checkpoint: LSN at which replay begins
//	   128    4  checkpoint: checksum of the group before it
//	   132    4  epoch: number of times the pool was opened for writing
//	   136    8  next layer id
//	   144    8  flags: 1 closed in order
//	   152    8  scrub: layer
//	   160    8  scrub: cluster of that layer
//	   168    4  number of segments
//	   172    4  length of the name
//	   176   62  name
//	   240    8  change number up to which the maps were durable at the checkpoint
//	   248    8  topology: grows with every change of members or segments
//	   256  128  each of 16 members: id 16, size 8, first zone's offset 8, length of hint 4, hint 88
//	  2304   16  each of 96 segments: disk 4, first zone on it 4, zones 4, regions of the last zone 4
//	  4092    4  CRC32C of bytes 0-4091
type superblock struct {
	version                      uint32
	incompat, rocompat, compat   uint64
	generation                   uint64
	pool, disk                   uuid.UUID
	index                        uint32
	created                      int64
	journalOffset, journalLength uint64
	zoneRegions                  uint32
	checkpoint                   uint64
	checkpointCRC                uint32
	epoch                        uint32
	nextLayer                    uint64
	flags                        uint64
	scrubLayer, scrubCluster     uint64
	name                         string
	pending                      uint64
	topology                     uint64
	members                      []superMember
	segments                     []segment
}

const superClean uint64 = 1

type superMember struct {
	id   uuid.UUID
	size uint64 // bytes
	base uint64 // where its first zone begins
	hint string
}

// segment is a run of zones on one disk; segments in order make up the pool.
type segment struct {
	disk  uint32
	first uint32 // zone on that disk
	zones uint32
	last  uint32 // regions of the last zone
}

func (s *superblock) encode(b []byte) {
	clear(b)
	copy(b, superMagic)
	le.PutUint32(b[8:], s.version)
	le.PutUint64(b[16:], s.incompat)
	le.PutUint64(b[24:], s.rocompat)
	le.PutUint64(b[32:], s.compat)
	le.PutUint64(b[40:], s.generation)
	copy(b[48:], s.pool[:])
	copy(b[64:], s.disk[:])
	le.PutUint32(b[80:], s.index)
	le.PutUint32(b[84:], uint32(len(s.members)))
	le.PutUint64(b[88:], uint64(s.created))
	le.PutUint64(b[96:], s.journalOffset)
	le.PutUint64(b[104:], s.journalLength)
	le.PutUint32(b[112:], s.zoneRegions)
	le.PutUint32(b[116:], clusterShift)
	le.PutUint64(b[120:], s.checkpoint)
	le.PutUint32(b[128:], s.checkpointCRC)
	le.PutUint32(b[132:], s.epoch)
	le.PutUint64(b[136:], s.nextLayer)
	le.PutUint64(b[144:], s.flags)
	le.PutUint64(b[152:], s.scrubLayer)
	le.PutUint64(b[160:], s.scrubCluster)
	le.PutUint32(b[168:], uint32(len(s.segments)))
	le.PutUint32(b[172:], uint32(copy(b[176:176+nameMax], s.name)))
	le.PutUint64(b[240:], s.pending)
	le.PutUint64(b[248:], s.topology)
	for i, m := range s.members {
		e := b[256+128*i:]
		copy(e, m.id[:])
		le.PutUint64(e[16:], m.size)
		le.PutUint64(e[24:], m.base)
		hint := m.hint
		if len(hint) > hintMax {
			hint = hint[len(hint)-hintMax:]
		}
		le.PutUint32(e[32:], uint32(copy(e[36:36+hintMax], hint)))
	}
	for i, g := range s.segments {
		e := b[2304+16*i:]
		le.PutUint32(e, g.disk)
		le.PutUint32(e[4:], g.first)
		le.PutUint32(e[8:], g.zones)
		le.PutUint32(e[12:], g.last)
	}
	le.PutUint32(b[4092:], checksum(b[:4092]))
}

// decodeSuperblock reads a superblock and checks everything that can be checked
// without the disk. ErrNotPool: the magic is missing; ErrCorrupt: it is there.
func decodeSuperblock(b []byte) (*superblock, error) {
	if string(b[:8]) != superMagic {
		return nil, ErrNotPool
	}
	if checksum(b[:4092]) != le.Uint32(b[4092:]) {
		return nil, fmt.Errorf("superblock: checksum: %w", ErrCorrupt)
	}
	s := &superblock{
		version: le.Uint32(b[8:]), incompat: le.Uint64(b[16:]), rocompat: le.Uint64(b[24:]), compat: le.Uint64(b[32:]),
		generation: le.Uint64(b[40:]), pool: uuid.UUID(b[48:64]), disk: uuid.UUID(b[64:80]), index: le.Uint32(b[80:]),
		created: int64(le.Uint64(b[88:])), journalOffset: le.Uint64(b[96:]), journalLength: le.Uint64(b[104:]),
		zoneRegions: le.Uint32(b[112:]), checkpoint: le.Uint64(b[120:]), checkpointCRC: le.Uint32(b[128:]),
		epoch: le.Uint32(b[132:]), nextLayer: le.Uint64(b[136:]), flags: le.Uint64(b[144:]),
		scrubLayer: le.Uint64(b[152:]), scrubCluster: le.Uint64(b[160:]), pending: le.Uint64(b[240:]), topology: le.Uint64(b[248:]),
	}
	if s.version == 0 || s.version > formatVersion {
		return nil, fmt.Errorf("format version %d (this program reads up to %d): %w", s.version, formatVersion, ErrUnsupported)
	}
	if bits := s.incompat &^ knownIncompat; bits != 0 {
		return nil, fmt.Errorf("the pool uses features this program does not know (%#x): %w", bits, ErrUnsupported)
	}
	members, segments, name := le.Uint32(b[84:]), le.Uint32(b[168:]), le.Uint32(b[172:])
	switch {
	case members == 0 || members > membersMax, segments == 0 || segments > segmentsMax, name > nameMax,
		s.index >= members, le.Uint32(b[116:]) != clusterShift, s.zoneRegions == 0 || s.zoneRegions > zoneRegionsMax,
		s.journalLength%pageSize != 0 || s.journalLength < journalMin || s.journalLength > journalMax,
		s.journalOffset != labelSize, s.nextLayer > 1<<32-1:
		return nil, fmt.Errorf("superblock: a field is out of range: %w", ErrCorrupt)
	}
	s.name = string(b[176 : 176+name])
	for i := range members {
		e := b[256+128*i:]
		m := superMember{id: uuid.UUID(e[:16]), size: le.Uint64(e[16:]), base: le.Uint64(e[24:])}
		n := le.Uint32(e[32:])
		if n > hintMax || m.size%clusterSize != 0 || m.base%clusterSize != 0 || m.base < labelSize || m.base > m.size {
			return nil, fmt.Errorf("superblock: member %d is out of range: %w", i, ErrCorrupt)
		}
		m.hint = string(e[36 : 36+n])
		s.members = append(s.members, m)
	}
	var zones uint64
	for i := range segments {
		e := b[2304+16*i:]
		g := segment{disk: le.Uint32(e), first: le.Uint32(e[4:]), zones: le.Uint32(e[8:]), last: le.Uint32(e[12:])}
		if g.disk >= members || g.zones == 0 || g.last == 0 || g.last > s.zoneRegions ||
			s.zoneEnd(g) > s.members[g.disk].size-trailerSize {
			return nil, fmt.Errorf("superblock: segment %d is out of range: %w", i, ErrCorrupt)
		}
		zones += uint64(g.zones)
		s.segments = append(s.segments, g)
	}
	if zones*uint64(s.zoneClusters()) > clustersMax {
		return nil, fmt.Errorf("superblock: %d zones are too many: %w", zones, ErrCorrupt)
	}
	return s, nil
}

// zoneClusters is the number of cluster numbers a zone takes up.
func (s *superblock) zoneClusters() uint32 { return s.zoneRegions * regionClusters }

// zoneHead is what a zone holds before its clusters: a pair of zone pages in a
// cluster of its own, then the checksum pages.
func (s *superblock) zoneHead() uint64 {
	return clusterSize + (uint64(s.zoneRegions)*pairSize+clusterSize-1)&^(clusterSize-1)
}

// zoneStride is the distance from zone to zone.
func (s *superblock) zoneStride() uint64 {
	return s.zoneHead() + uint64(s.zoneClusters())*clusterSize
}

// zoneEnd is where the last zone of g ends on its disk.
func (s *superblock) zoneEnd(g segment) uint64 {
	last := uint64(g.first) + uint64(g.zones) - 1
	if last > 1<<31 { // bounds the product below
		return 1 << 63
	}
	return s.members[g.disk].base + last*s.zoneStride() + s.zoneHead() + uint64(g.last)*regionClusters*clusterSize
}

// fit says how many zones lie in size bytes of a disk behind base, and how many
// regions the last of them has.
func (s *superblock) fit(base, size uint64) (zones, last uint32) {
	if size < base+trailerSize {
		return 0, 0
	}
	room := size - trailerSize - base
	full := room / s.zoneStride()
	rest := room % s.zoneStride()
	zones, last = uint32(min(full, 1<<31)), s.zoneRegions
	if rest > s.zoneHead() {
		if n := uint32((rest - s.zoneHead()) / (regionClusters * clusterSize)); n > 0 {
			return zones + 1, n
		}
	}
	return zones, last
}

func (s *superblock) label() *Label {
	l := &Label{Pool: s.pool, Name: s.name, Device: s.disk, Index: int(s.index), Generation: s.generation,
		Version: s.version, Created: time.Unix(0, s.created)}
	for i, m := range s.members {
		l.Members = append(l.Members, Member{Index: i, UUID: m.id, Size: m.size, Hint: m.hint})
	}
	return l
}

// pageType is what a page of metadata holds.
type pageType uint32

const (
	pageFree  pageType = 0 // a pair that holds nothing
	pageMap   pageType = 1 // entries of a layer's map
	pageLayer pageType = 2 // the record of a layer
	pageZone  pageType = 3 // metadata clusters and regions of a zone
	pageSums  pageType = 4 // checksums of a region
)

// pageHeader begins each page.
//
//	offset size
//	     0    4  magic "AMPG"
//	     4    4  type
//	     8    8  stamp: of a pair, the higher is the newer
//	    16    8  self: pair number, zone or region
//	    24    8  owner: layer, or 0
//	    32    8  index: of a map page in its layer
//	    40   16  pool
//	    60    4  CRC32C of bytes 0-59 and 64-4095
type pageHeader struct {
	kind         pageType
	stamp        uint64
	self         uint64
	owner, index uint64
}

func pageChecksum(b []byte) uint32 {
	return crc32c.Update(checksum(b[:60]), b[pageHeaderSize:pageSize])
}

// seal writes the header of the page b, whose body is there.
func (h *pageHeader) seal(b []byte, pool uuid.UUID) {
	clear(b[:pageHeaderSize])
	le.PutUint32(b, pageMagic)
	le.PutUint32(b[4:], uint32(h.kind))
	le.PutUint64(b[8:], h.stamp)
	le.PutUint64(b[16:], h.self)
	le.PutUint64(b[24:], h.owner)
	le.PutUint64(b[32:], h.index)
	copy(b[40:], pool[:])
	le.PutUint32(b[60:], pageChecksum(b))
}

// openPage checks the page b and returns its header.
func openPage(b []byte, pool uuid.UUID, self uint64) (h pageHeader, ok bool) {
	if le.Uint32(b) != pageMagic || uuid.UUID(b[40:56]) != pool || le.Uint64(b[16:]) != self || le.Uint32(b[60:]) != pageChecksum(b) {
		return h, false
	}
	return pageHeader{kind: pageType(le.Uint32(b[4:])), stamp: le.Uint64(b[8:]), self: self, owner: le.Uint64(b[24:]), index: le.Uint64(b[32:])}, true
}

// newestOfPair picks the newer valid page of a pair of self; stale says that the
// other copy is damaged or older and should be written again.
func newestOfPair(b []byte, pool uuid.UUID, self uint64) (page []byte, h pageHeader, stale, ok bool) {
	ha, oka := openPage(b[:pageSize], pool, self)
	hb, okb := openPage(b[pageSize:pairSize], pool, self)
	switch {
	case oka && (!okb || ha.stamp >= hb.stamp):
		return b[:pageSize], ha, !okb || ha.stamp != hb.stamp, true
	case okb:
		return b[pageSize:pairSize], hb, true, true
	}
	return nil, h, false, false
}

// entry is one cluster of a layer's map.
//
//	bits 63     the blocks whose bit is clear read as zeros, not as the parent has them
//	bits 32-62  1 + number of the cluster that holds the blocks; 0: none
//	bits 0-31   which blocks it holds
type entry uint64

const (
	entryZero   entry = 1 << 63
	noCluster         = ^uint32(0)
	wholeMask         = ^uint32(0)
	entryNumber       = 1<<31 - 1
)

func makeEntry(cluster, mask uint32, zero bool) entry {
	e := entry(mask)
	if cluster != noCluster {
		e |= entry(cluster+1) << 32
	}
	if zero {
		e |= entryZero
	}
	return e
}

func (e entry) mask() uint32 { return uint32(e) }
func (e entry) zero() bool   { return e&entryZero != 0 }
func (e entry) cluster() uint32 {
	return uint32(e>>32)&entryNumber - 1 // noCluster when 0
}

// Layer flags.
const (
	layerFrozen uint32 = 1 << iota // never written again
	layerThick                     // of a head: its space is reserved
	layerHidden                    // frozen, without a name: it waits for its children
	layerKnown  = layerFrozen | layerThick | layerHidden
)

// layerRecord is a layer as it is stored, in a page of its own and in the journal.
//
//	offset size
//	     0    4  id
//	     4    4  parent, 0 for none
//	     8    4  flags
//	    16    8  size in bytes
//	    24    8  created, nanoseconds since 1970
//	    32   16  id of the volume (head) or of the snapshot
//	    48   16  id of the volume it belongs to
//	    64    2  length of the name
//	    66    2  length of the labels
//	    68       name, labels (each: length 2, key, length 2, value)
type layerRecord struct {
	id, parent uint32
	flags      uint32
	size       uint64
	created    int64
	uuid       uuid.UUID
	volume     uuid.UUID
	name       string
	labels     map[string]string
}

func (r *layerRecord) append(b []byte) []byte {
	b = le.AppendUint32(b, r.id)
	b = le.AppendUint32(b, r.parent)
	b = le.AppendUint32(b, r.flags)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, r.size)
	b = le.AppendUint64(b, uint64(r.created))
	b = append(b, r.uuid[:]...)
	b = append(b, r.volume[:]...)
	b = le.AppendUint16(b, uint16(len(r.name)))
	labels := appendLabels(nil, r.labels)
	b = le.AppendUint16(b, uint16(len(labels)))
	b = append(b, r.name...)
	return append(b, labels...)
}

func appendLabels(b []byte, labels map[string]string) []byte {
	keys := make([]string, 0, len(labels))
	for k := range labels {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		b = le.AppendUint16(b, uint16(len(k)))
		b = append(b, k...)
		b = le.AppendUint16(b, uint16(len(labels[k])))
		b = append(b, labels[k]...)
	}
	return b
}

func decodeLayer(b []byte) (layerRecord, error) {
	bad := fmt.Errorf("layer record: %w", ErrCorrupt)
	if len(b) < 68 {
		return layerRecord{}, bad
	}
	r := layerRecord{id: le.Uint32(b), parent: le.Uint32(b[4:]), flags: le.Uint32(b[8:]), size: le.Uint64(b[16:]),
		created: int64(le.Uint64(b[24:])), uuid: uuid.UUID(b[32:48]), volume: uuid.UUID(b[48:64])}
	name, labels := int(le.Uint16(b[64:])), int(le.Uint16(b[66:]))
	b = b[68:]
	if name+labels > len(b) || r.id == 0 || r.parent >= r.id || r.flags&^layerKnown != 0 || r.size%blockSize != 0 || r.size > volumeSizeMax {
		return layerRecord{}, bad
	}
	r.name, b = string(b[:name]), b[name:name+labels]
	next := func() (string, bool) {
		if len(b) < 2 || len(b)-2 < int(le.Uint16(b)) {
			return "", false
		}
		n := int(le.Uint16(b))
		s := string(b[2 : 2+n])
		b = b[2+n:]
		return s, true
	}
	for len(b) > 0 {
		k, ok := next()
		v, ok2 := next()
		if !ok || !ok2 {
			return layerRecord{}, bad
		}
		if r.labels == nil {
			r.labels = map[string]string{}
		}
		r.labels[k] = v
	}
	return r, nil
}

// volumeSizeMax bounds volumes so that a cluster of one always has a 32-bit
// number, and NBD's signed 64-bit sizes are far away.
const volumeSizeMax = 1 << 48

// recordType is what a record of the journal says.
type recordType uint8

const (
	recordEnd    recordType = 0 // the rest of the group is padding
	recordMap    recordType = 1 // layer 4, cluster of the volume 4, entry 8
	recordRegion recordType = 2 // region 4, state 4
	recordLayer  recordType = 3 // a layerRecord
	recordRemove recordType = 4 // layer 4
	recordPad    recordType = 5 // the group only fills the journal up to its end
)

// Each record begins with: type 1, zero 1, length of what follows 2.
const recordHeader = 4

func appendRecord(b []byte, t recordType, payload ...uint32) []byte {
	b = append(b, byte(t), 0)
	b = le.AppendUint16(b, uint16(4*len(payload)))
	for _, p := range payload {
		b = le.AppendUint32(b, p)
	}
	return b
}

func appendMapRecord(b []byte, layer, cluster uint32, e entry) []byte {
	return appendRecord(b, recordMap, layer, cluster, uint32(e), uint32(e>>32))
}

func appendLayerRecord(b []byte, r *layerRecord) []byte {
	at := len(b)
	b = append(b, byte(recordLayer), 0, 0, 0)
	b = r.append(b)
	le.PutUint16(b[at+2:], uint16(len(b)-at-recordHeader))
	return b
}

// eachRecord calls f for the records of a group's body, whose checksum held.
func eachRecord(b []byte, f func(recordType, []byte) error) error {
	for len(b) >= recordHeader && recordType(b[0]) != recordEnd {
		t, n := recordType(b[0]), int(le.Uint16(b[2:]))
		if n > len(b)-recordHeader {
			return fmt.Errorf("a record is cut off: %w", ErrCorrupt)
		}
		if err := f(t, b[recordHeader:recordHeader+n]); err != nil {
			return err
		}
		b = b[recordHeader+n:]
	}
	return nil
}

// groupHeader begins each group of the journal; its records follow at once.
//
//	offset size
//	     0    4  magic "AJRG"
//	     4    4  CRC32C of bytes 8 to the end of the group
//	     8    4  epoch
//	    12    4  blocks of 4096 the group takes up
//	    16    8  LSN: number of its first block, counted since the pool was made
//	    24    8  durable: the LSN below which everything was durable when it was written
//	    32    8  pending: change number up to which it holds the maps
//	    40   16  pool
//	    56    4  CRC of the group before
//	    60    4  bytes of records
type groupHeader struct {
	crc     uint32
	epoch   uint32
	blocks  uint32
	lsn     uint64
	durable uint64
	pending uint64
	prev    uint32
	length  uint32
}

// seal writes the header of the group b, which is whole blocks long.
func (h *groupHeader) seal(b []byte, pool uuid.UUID) {
	h.blocks = uint32(len(b) / pageSize)
	le.PutUint32(b, groupMagic)
	le.PutUint32(b[8:], h.epoch)
	le.PutUint32(b[12:], h.blocks)
	le.PutUint64(b[16:], h.lsn)
	le.PutUint64(b[24:], h.durable)
	le.PutUint64(b[32:], h.pending)
	copy(b[40:], pool[:])
	le.PutUint32(b[56:], h.prev)
	le.PutUint32(b[60:], h.length)
	h.crc = checksum(b[8:])
	le.PutUint32(b[4:], h.crc)
}

// decodeGroupHeader reads what can be read without the rest of the group.
func decodeGroupHeader(b []byte, pool uuid.UUID) (h groupHeader, ok bool) {
	if le.Uint32(b) != groupMagic || uuid.UUID(b[40:56]) != pool {
		return h, false
	}
	h = groupHeader{crc: le.Uint32(b[4:]), epoch: le.Uint32(b[8:]), blocks: le.Uint32(b[12:]), lsn: le.Uint64(b[16:]),
		durable: le.Uint64(b[24:]), pending: le.Uint64(b[32:]), prev: le.Uint32(b[56:]), length: le.Uint32(b[60:])}
	return h, h.blocks > 0 && h.blocks <= groupBlocksMax && h.length <= h.blocks*pageSize-groupHeaderSize
}

// Region states, as recorded.
type regionState uint32

const (
	regionFresh regionState = 0 // no checksum was ever stored; no block is mapped
	regionDirty regionState = 1 // its stored checksums may be old
	regionClean regionState = 2 // its stored checksums are those of its blocks
)

// zonePage is the body of a zone's page.
//
//	offset size
//	    64  992  a bit each cluster: it holds pages of metadata
//	  1056  256  a byte each region: its state
type zonePage struct {
	meta   []byte // zoneRegionsMax*regionClusters bits
	states []byte
}

const (
	zoneMetaOffset   = pageHeaderSize
	zoneMetaBytes    = zoneRegionsMax * regionClusters / 8
	zoneStatesOffset = zoneMetaOffset + zoneMetaBytes
)

func zoneBody(b []byte) zonePage {
	return zonePage{meta: b[zoneMetaOffset:zoneStatesOffset], states: b[zoneStatesOffset : zoneStatesOffset+zoneRegionsMax]}
}

func (z zonePage) isMeta(i uint32) bool { return z.meta[i/8]&(1<<(i%8)) != 0 }
func (z zonePage) setMeta(i uint32)     { z.meta[i/8] |= 1 << (i % 8) }

// validName reports whether name can be a volume's, snapshot's or pool's.
func validName(what, name string) error {
	ok := func(r byte, first bool) bool {
		alpha := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return alpha || !first && (r == '-' || r == '_' || r == '.')
	}
	if name == "" || len(name) > nameMax || !ok(name[0], true) || slices.ContainsFunc([]byte(name), func(r byte) bool { return !ok(r, false) }) {
		return fmt.Errorf("%s name %q: must be 1 to %d of a-z A-Z 0-9 - _ . and begin with a letter or digit: %w", what, name, nameMax, ErrInvalid)
	}
	return nil
}
