package pool

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// padded is b as a page.
func padded(b []byte, size int) []byte {
	page := make([]byte, size)
	copy(page, b)
	return page
}

func FuzzSuperblock(f *testing.F) {
	s := superblock{version: 1, name: "p", zoneRegions: 2, journalOffset: labelSize, journalLength: journalMin, nextLayer: 3, generation: 9,
		members:  []superMember{{id: uuid.UUID{1}, size: 64 << 20, base: 1 << 20, hint: "/dev/a"}, {id: uuid.UUID{2}, size: 32 << 20, base: labelSize}},
		segments: []segment{{disk: 0, zones: 2, last: 1}, {disk: 1, zones: 1, last: 2}}}
	b := make([]byte, pageSize)
	s.encode(b)
	f.Add(b)
	f.Add([]byte(superMagic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		page := padded(b, pageSize)
		if _, err := decodeSuperblock(page); err != nil && !errors.Is(err, ErrNotPool) && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
			t.Fatal(err)
		}
		le.PutUint32(page[4092:], checksum(page[:4092]))
		s, err := decodeSuperblock(page)
		if err != nil {
			return
		}
		for _, m := range s.members {
			s.fit(m.base, m.size)
		}
		again := make([]byte, pageSize)
		s.encode(again)
		x, err := decodeSuperblock(again)
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		if x.label().Name != s.name || len(x.segments) != len(s.segments) || x.topology != s.topology {
			t.Fatal("encoded and decoded, it differs")
		}
	})
}

func FuzzPage(f *testing.F) {
	id := uuid.UUID{7}
	pair := make([]byte, pairSize)
	for i, stamp := range []uint64{4, 5} {
		h := pageHeader{kind: pageMap, stamp: stamp, self: 3, owner: 1}
		h.seal(pair[i*pageSize:][:pageSize], id)
	}
	f.Add(pair, false, true)
	f.Add(pair[:pageSize], true, false)
	f.Fuzz(func(t *testing.T, b []byte, first, second bool) {
		b = padded(b, pairSize)
		for i, seal := range []bool{first, second} {
			if page := b[i*pageSize:][:pageSize]; seal {
				copy(page[40:], id[:])
				le.PutUint32(page[60:], pageChecksum(page))
			}
		}
		page, h, stale, ok := newestOfPair(b, id, 3)
		ha, oka := openPage(b[:pageSize], id, 3)
		hb, okb := openPage(b[pageSize:], id, 3)
		switch {
		case ok != (oka || okb), ok && !stale && !(oka && okb && ha.stamp == hb.stamp), oka && ok && h.stamp < ha.stamp, okb && ok && h.stamp < hb.stamp:
			t.Fatalf("%v %v of %v %v, %v %v", h, ok, ha, oka, hb, okb)
		}
		if !ok {
			return
		}
		z := zoneBody(page)
		for i := range uint32(zoneRegionsMax * regionClusters) {
			z.isMeta(i)
		}
	})
}

func FuzzLayer(f *testing.F) {
	r := layerRecord{id: 5, parent: 2, flags: layerFrozen, size: 1 << 30, name: "daily", labels: map[string]string{"a": "b", "": "c"}}
	f.Add(r.append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeLayer(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		x, err := decodeLayer(r.append(nil))
		if err != nil || x.id != r.id || x.parent != r.parent || x.size != r.size || x.name != r.name || len(x.labels) != len(r.labels) {
			t.Fatalf("encoded and decoded, it differs: %+v, %+v, %v", r, x, err)
		}
	})
}

func FuzzRecords(f *testing.F) {
	r := layerRecord{id: 1, size: 4 << 20, name: "v"}
	b := appendLayerRecord(nil, &r)
	b = appendMapRecord(b, 1, 3, makeEntry(9, 0xff, true))
	b = appendRecord(b, recordRegion, 1, uint32(regionDirty))
	f.Add(b)
	f.Add(appendRecord(b, recordRemove, 1))
	f.Add(appendRecord(nil, recordPad, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &Pool{layers: map[uint32]*layer{}, orphans: map[uint32][]*mapPage{}, zoneClusters: 2 * regionClusters}
		s := superblock{zoneRegions: 2, members: make([]superMember, 1), segments: []segment{{zones: 2, last: 2}}}
		p.disks = make([]*disk, 1)
		p.zones.Store(new([]*zone))
		p.addZones(&s, s.segments)
		if err := eachRecord(b, p.replayRecord); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		if len(p.layers) > len(b) {
			t.Fatalf("%d layers from %d bytes", len(p.layers), len(b))
		}
		if p.dropOrphans() != nil || p.buildTree() != nil {
			return
		}
		if err := p.countClusters(); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

// damagedPool is an image of a pool that lost power, with a journal to replay, and
// where its metadata lies. Of its last group only the existence of a snapshot depends.
func damagedPool(t testing.TB) (*patient, []uint64) {
	x := newPatient(t, 1)
	l := x.places()
	var pages []uint64
	pages = append(pages, l.supers...)
	for _, list := range [][]uint64{l.zones, l.sums, l.maps, l.layers} {
		for _, at := range list {
			pages = append(pages, at, at+pageSize)
		}
	}
	x.open()
	first := x.pool.journal.next.Load()
	d, err := x.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	q := x.port(d)
	for i := range 3 {
		at := i * 3 * clusterSize
		b := bytes.Repeat([]byte{byte(0x90 + i)}, 3*blockSize)
		x.must(q, datapath.OpWrite, uint64(at), b)
		copy(x.data[at:], b)
		if s, err := q.one(datapath.OpWriteZeroes, datapath.FlagFUA, uint64(at+clusterSize), nil, clusterSize); err != nil || s != datapath.StatusOK {
			t.Fatal(s, err)
		}
		clear(x.data[at+clusterSize:][:clusterSize])
	}
	if _, err := x.pool.CreateSnapshot("v", "last", nil); err != nil {
		t.Fatal(err)
	}
	for lsn := first; lsn <= x.pool.journal.next.Load(); lsn++ {
		pages = append(pages, l.journal+lsn%x.pool.journal.blocks*pageSize)
	}
	x.release(d, q)
	x.pool.fail(errors.New("killed by the test"))
	if err := x.pool.Close(); err != nil {
		t.Fatal(err)
	}
	x.mem[0].CrashLose()
	return x, pages
}

// FuzzOpenDamaged changes bytes in the metadata of a pool: four bytes of input say
// which page, where in it, and by what. With seal the pages get a good checksum
// again, so that what is in them is taken seriously; then only panics, hangs and
// huge allocations are failures.
func FuzzOpenDamaged(f *testing.F) {
	base, pages := damagedPool(f)
	for i := range pages {
		f.Add([]byte{byte(i), 0, 8, 1}, false)
		f.Add([]byte{byte(i), 0, 64, 1, byte(i), 0, 70, 0x80}, true)
	}
	f.Add([]byte{0, 0, 0, 1, 2, 0, 0, 1}, false)
	f.Add([]byte{1, 0, 40, 1, 3, 0, 40, 1}, false)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		m := base.mem[0].Clone()
		touched := map[uint64]bool{}
		for n := 0; len(b) >= 4 && n < 64; b, n = b[4:], n+1 {
			at := pages[int(b[0])%len(pages)]
			offset := at + uint64(b[1]%16)<<8 + uint64(b[2])
			m.Poke(offset, []byte{m.Bytes(offset, 1)[0] ^ b[3]})
			touched[at] = true
		}
		for at := range touched {
			if seal {
				sealAgain(m, at)
			}
		}
		x := &patient{rig: &rig{TB: t, r: base.r}, mem: []*memdisk.Disk{m}, data: base.data, sealed: base.sealed}
		x.config = Config{Disks: []Disk{{Path: "mem0", Device: m}}, Reactor: x.r, Manual: true, Log: quiet()}
		if seal {
			x.doubts = [][2]int{{0, len(x.data)}}
		}
		done := make(chan struct{})
		go func() {
			select {
			case <-done:
			case <-time.After(time.Minute):
				panic("a damaged pool hangs")
			}
		}()
		defer close(done)
		if err := x.tryOpen(); err != nil {
			return
		}
		if !seal {
			x.reads()
		} else {
			x.readsAnything()
		}
		_ = x.pool.Close() // of a damaged pool
	})
}

// sealAgain makes the checksum of the page at a place good, whatever it is.
func sealAgain(m *memdisk.Disk, at uint64) {
	b := m.Bytes(at, pageSize)
	switch {
	case string(b[:8]) == superMagic:
		le.PutUint32(b[4092:], checksum(b[:4092]))
	case le.Uint32(b) == pageMagic:
		le.PutUint32(b[60:], pageChecksum(b))
	case le.Uint32(b) == groupMagic:
		n := uint64(max(min(le.Uint32(b[12:]), groupBlocksMax), 1)) * pageSize
		b = m.Bytes(at, n)
		le.PutUint32(b[4:], checksum(b[8:]))
	}
	m.Poke(at, b)
}

// readsAnything reads the first bytes of all volumes, writes to them, and has the pool
// work on itself.
func (x *patient) readsAnything() {
	for _, i := range x.pool.Volumes() {
		d, err := x.pool.OpenVolume(i.Name)
		if err != nil {
			continue
		}
		q := x.port(d)
		n := min(i.Size, 1<<20)
		for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite} {
			if n > 0 {
				if _, err := q.one(op, 0, 0, make([]byte, n), n); err != nil {
					x.Fatal(err)
				}
			}
		}
		x.release(d, q)
		_, _ = x.pool.Map(i.Name) // is not to fall over
	}
	_ = x.pool.Maintain() // may fail
}
