package pool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// checkDisks checks the disks of a rig whose pool is closed.
func (g *rig) checkDisks(c CheckConfig) *Report {
	g.Helper()
	c.Disks, c.Reactor = g.disks, g.r
	r, err := Check(c)
	if err != nil {
		g.Fatal(err)
	}
	return r
}

// codes are the findings that count, in order and once each.
func codes(r *Report) string {
	var list []string
	for _, f := range r.Findings {
		if f.Code != FindUnclean {
			list = append(list, string(f.Code))
		}
	}
	slices.Sort(list)
	return strings.Join(slices.Compact(list), " ")
}

// rigOn is a rig on a disk that holds a pool.
func rigOn(t testing.TB, d *memdisk.Disk) *rig {
	g := &rig{TB: t, r: devtest.Reactors(t, reactor.EngineAuto, 1)[0], disks: []Disk{{"mem0", d}}}
	g.config = Config{Disks: g.disks, Reactor: g.r, Manual: true, Log: quiet()}
	return g
}

func TestCheckFindsNothingInAGoodPool(t *testing.T) {
	disks := []*memdisk.Disk{memory(24 << 20), memory(16 << 20)}
	g := newRig(t, 2, disks[0], disks[1])
	if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 || !r.Clean || !r.Complete {
		t.Errorf("a fresh pool: %+v", r)
	}
	g.open()
	s := newStory(t, g)
	s.settled()
	g.close()
	before := []byte(string(disks[0].Bytes(0, 24<<20)) + string(disks[1].Bytes(0, 16<<20)))
	r := g.checkDisks(CheckConfig{Data: true, Repair: true, RecomputeSums: true})
	if len(r.Findings) > 0 || !r.Clean || !r.Complete {
		t.Errorf("after some work: %+v", r)
	}
	if !bytes.Equal(before, []byte(string(disks[0].Bytes(0, 24<<20))+string(disks[1].Bytes(0, 16<<20)))) {
		t.Error("it has changed what was good")
	}
	if r.Volumes != 4 || r.Snapshots != 1 || r.HiddenLayers != 1 || r.VerifiedBlocks*blockSize != r.Mapped || r.Mapped == 0 || r.UnverifiedBlocks > 0 {
		t.Errorf("counted %+v", r)
	}
	g.open()
	i := g.pool.Info()
	if i.Total != r.Total || i.Allocated != r.Allocated || i.Metadata != r.Metadata || i.Free != r.Free {
		t.Errorf("space: the pool says %+v, the check %+v", i, r)
	}
	g.close()
}

func TestCheckAfterACrash(t *testing.T) {
	disk := memory(imageSize)
	g := newRig(t, 2, disk)
	g.open()
	s := newStory(t, g)
	s.settled()
	s.unsettled()
	for seed := range uint64(20) {
		c := disk.Clone()
		c.Crash(seed)
		x := rigOn(t, c)
		r := x.checkDisks(CheckConfig{Data: true})
		if r.Bad > 0 || !r.Complete || r.Clean || r.DirtyRegions == 0 {
			t.Errorf("seed %d: %+v", seed, r)
		}
		x.open()
		x.close()
		if r := x.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 {
			t.Errorf("seed %d, opened and closed: %+v", seed, r)
		}
	}
	g.close()
}

// anatomy says where the structures of a pool on one disk lie.
type anatomy struct {
	s      *superblock
	r      *Report
	pages  map[pageType][]uint64 // offsets of pairs in metadata clusters
	region uint64                // of the checksums of a clean region with blocks
	empty  uint64                // and of one without, 0 when there is none
	block  uint64                // of a mapped block of a clean region
	dirty  uint64                // of one of a dirty region
	copied uint64                // of the map page of the volume copy
	group  []uint64              // of the journal, that count
}

func dissect(t *testing.T, d *memdisk.Disk) *anatomy {
	t.Helper()
	a := &anatomy{pages: map[pageType][]uint64{}}
	g := rigOn(t, d)
	k := &checker{config: CheckConfig{FindingsMax: 10}, report: &Report{}, layers: map[uint32]*checkLayer{}, pages: map[uint32][]*checkPage{}}
	if err := withDisks(g.r, g.disks, func(disks []*disk) error {
		if err := k.labels(disks); err != nil {
			return err
		}
		if !k.geometry() || !k.readZones() {
			return errors.New("damaged")
		}
		k.readMetadata()
		next := k.super.checkpoint
		for {
			at := k.super.journalOffset + next%(k.super.journalLength/pageSize)*pageSize
			h, ok := decodeGroupHeader(d.Bytes(at, pageSize), k.super.pool)
			if !ok || h.lsn != next {
				break
			}
			a.group = append(a.group, at)
			next += uint64(h.blocks)
		}
		k.readJournal()
		k.checkLayers()
		k.checkEntries()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	a.s, a.r = k.super, k.report
	for _, l := range k.layers {
		if l.rec.name == "copy" {
			for _, p := range k.pages[l.rec.id] {
				a.copied = p.where.Offset
			}
		}
	}
	for i := range k.zones {
		z := &k.zones[i]
		for n := range z.count {
			if !z.isMeta(n) {
				continue
			}
			_, at := k.address(uint32(i)*k.super.zoneClusters() + n)
			for p := range uint64(metaPairs) {
				kind := pageType(le.Uint32(d.Bytes(at+p*pairSize, pageSize)[4:]))
				a.pages[kind] = append(a.pages[kind], at+p*pairSize)
			}
		}
		for n := range z.count / regionClusters {
			sums := k.sumsPlace(uint32(i)*k.super.zoneRegions + n).offset
			mapped := anyBlock(z.mapped(n))
			for c, m := range z.mapped(n) {
				for b := range uint64(clusterBlocks) {
					if m&(1<<b) == 0 {
						continue
					}
					_, block := k.address(uint32(i)*k.super.zoneClusters() + n*regionClusters + uint32(c))
					if regionState(z.states[n]) == regionDirty {
						a.dirty = block + b*blockSize
					} else {
						a.region, a.block = sums, block+b*blockSize
					}
				}
			}
			if regionState(z.states[n]) == regionClean && !mapped {
				a.empty = sums
			}
		}
	}
	return a
}

// reseal makes the checksum of a page right that was changed by hand.
func reseal(d *memdisk.Disk, at uint64, change func(b []byte)) {
	for _, copyAt := range []uint64{at, at + pageSize} {
		b := d.Bytes(copyAt, pageSize)
		change(b)
		le.PutUint32(b[60:], pageChecksum(b))
		d.Poke(copyAt, b)
	}
}

// resealSuper changes every valid superblock.
func resealSuper(d *memdisk.Disk, change func(b []byte)) {
	end := d.Info().Size - pairSize
	for _, at := range []uint64{0, pageSize, end, end + pageSize} {
		b := d.Bytes(at, pageSize)
		if _, err := decodeSuperblock(b); err == nil {
			change(b)
			le.PutUint32(b[4092:], checksum(b[:4092]))
			d.Poke(at, b)
		}
	}
}

// resealGroup changes the records of a group. The next one does not fit to it then.
func resealGroup(d *memdisk.Disk, at uint64, change func(records []byte)) {
	h := d.Bytes(at, pageSize)
	b := d.Bytes(at, uint64(le.Uint32(h[12:]))*pageSize)
	change(b[groupHeaderSize:])
	le.PutUint32(b[4:], checksum(b[8:]))
	d.Poke(at, b)
}

func TestCheckFindsDamage(t *testing.T) {
	clean, crashed := makeImage(t, false), makeImage(t, true)
	const rot = 100 // flips bits of a page
	tests := []struct {
		name    string
		crashed bool
		damage  func(d *memdisk.Disk, a *anatomy)
		data    bool
		want    string // findings
		bad     int
		remedy  string // "repair", "recompute" or "" when there is none
		blocks  uint64 // damaged
	}{
		{name: "a superblock", damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.s.generation%2*pageSize, rot, 1) },
			want: "superblock-copy", bad: 1, remedy: "repair"},
		{name: "all superblocks at the start", damage: func(d *memdisk.Disk, _ *anatomy) { d.Poke(0, make([]byte, labelSize)) },
			want: "superblock-copy", bad: 1, remedy: "repair"},
		{name: "the trailer", damage: func(d *memdisk.Disk, _ *anatomy) {
			d.Corrupt(imageSize-pairSize+16, rot, 1)
			d.Corrupt(imageSize-pageSize+16, rot, 1)
		},
			want: "superblock-copy", bad: 2, remedy: "repair"},
		{name: "an unreadable superblock", damage: func(d *memdisk.Disk, _ *anatomy) { d.BadSector(0, 512) },
			want: "superblock-copy", bad: 1, remedy: "repair"},
		{name: "a segment that leaves a zone out", damage: func(d *memdisk.Disk, _ *anatomy) {
			resealSuper(d, func(b []byte) { le.PutUint32(b[2304+4:], 1); le.PutUint32(b[2304+8:], 1) })
		}, want: "geometry", bad: 1},
		{name: "a journal in the zones", damage: func(d *memdisk.Disk, _ *anatomy) {
			resealSuper(d, func(b []byte) { le.PutUint64(b[104:], 1<<20) })
		}, want: "geometry", bad: 1},
		{name: "a copy of a zone page", damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.s.members[0].base, rot, 1) },
			want: "zone-copy", bad: 1, remedy: "repair"},
		{name: "a zone page", damage: func(d *memdisk.Disk, a *anatomy) {
			d.Corrupt(a.s.members[0].base, rot, 1)
			d.Corrupt(a.s.members[0].base+pageSize, rot, 1)
		},
			want: "zone-lost", bad: 1},
		{name: "a state that is none", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.s.members[0].base, func(b []byte) { zoneBody(b).states[0] = 9 })
		}, want: "zone-content", bad: 1},
		{name: "a region that was never written to", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.s.members[0].base, func(b []byte) { zoneBody(b).states[0] = 0 })
		}, want: "region-fresh", bad: 1},
		{name: "a copy of a map page", damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.pages[pageMap][0]+pageSize, rot, 1) },
			want: "page-copy", bad: 1, remedy: "repair"},
		{name: "an unreadable copy of a layer", damage: func(d *memdisk.Disk, a *anatomy) { d.BadSector(a.pages[pageLayer][0], 512) },
			want: "page-copy", bad: 1, remedy: "repair"},
		{name: "a map page", damage: func(d *memdisk.Disk, a *anatomy) {
			d.Corrupt(a.pages[pageMap][0], pairSize, 1)
			d.Poke(a.pages[pageMap][0], make([]byte, pairSize))
		},
			want: "page-lost", bad: 1},
		{name: "a map page twice", damage: func(d *memdisk.Disk, a *anatomy) {
			from, to := a.copied, a.pages[pageFree][0]
			body := d.Bytes(from, pageSize)
			reseal(d, to, func(b []byte) {
				self := le.Uint64(b[16:])
				copy(b, body)
				le.PutUint64(b[16:], self)
			})
		}, want: "entry-owner map-twice", bad: 3},
		{name: "a map page past the end", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.copied, func(b []byte) { le.PutUint64(b[32:], 9) })
		}, want: "entry-past-end map-place", bad: 3},
		{name: "a page of no kind", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.pages[pageFree][0], func(b []byte) { le.PutUint32(b[4:], 77) })
		}, want: "page-content", bad: 1},
		{name: "an entry past the end", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.copied, func(b []byte) { le.PutUint64(b[pageHeaderSize+8*400:], uint64(makeEntry(500, 1, false))) })
		}, want: "entry-past-end", bad: 1},
		{name: "an entry in no cluster", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.copied, func(b []byte) { le.PutUint64(b[pageHeaderSize+8*5:], uint64(makeEntry(1<<30, 1, false))) })
		}, want: "entry-cluster", bad: 1},
		{name: "blocks without a cluster", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.copied, func(b []byte) { le.PutUint64(b[pageHeaderSize+8*5:], uint64(makeEntry(noCluster, 1, false))) })
		}, want: "entry-cluster", bad: 1},
		{name: "two owners", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.copied, func(b []byte) { copy(b[pageHeaderSize+8*5:][:8], b[pageHeaderSize+8:]) })
		}, want: "entry-owner", bad: 1},
		{name: "a layer without its parent", damage: func(d *memdisk.Disk, a *anatomy) {
			for _, at := range a.pages[pageLayer] {
				if le.Uint32(d.Bytes(at, pageSize)[pageHeaderSize+4:]) != 0 {
					reseal(d, at, func(b []byte) { le.PutUint32(b[pageHeaderSize+4:], 3) })
				}
			}
		}, want: "layer-parent", bad: 3},
		{name: "a layer twice", damage: func(d *memdisk.Disk, a *anatomy) {
			body := d.Bytes(a.pages[pageLayer][0], pageSize)
			reseal(d, a.pages[pageFree][0], func(b []byte) {
				self := le.Uint64(b[16:])
				copy(b, body)
				le.PutUint64(b[16:], self)
			})
		}, want: "layer-twice", bad: 1},
		{name: "a record of nonsense", damage: func(d *memdisk.Disk, a *anatomy) {
			reseal(d, a.pages[pageLayer][0], func(b []byte) { le.PutUint64(b[pageHeaderSize+16:], 1) })
		}, want: "layer-parent layer-record", bad: 3},
		{name: "two names alike", damage: func(d *memdisk.Disk, a *anatomy) {
			for _, at := range a.pages[pageLayer] {
				if b := d.Bytes(at, pageSize); string(b[pageHeaderSize+68:][:5]) == "empty" {
					reseal(d, at, func(b []byte) { copy(b[pageHeaderSize+68:], "thick") })
				}
			}
		}, want: "layer-name", bad: 1},
		{name: "a bad name", damage: func(d *memdisk.Disk, a *anatomy) {
			for _, at := range a.pages[pageLayer] {
				if b := d.Bytes(at, pageSize); string(b[pageHeaderSize+68:][:5]) == "empty" {
					reseal(d, at, func(b []byte) { copy(b[pageHeaderSize+68:], "em/ty") })
				}
			}
		}, want: "layer-name", bad: 1},
		{name: "a copy of checksums", damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.region+pageSize, rot, 1) },
			want: "sums-copy", bad: 1, remedy: "repair"},
		{name: "checksums", damage: func(d *memdisk.Disk, a *anatomy) { d.Poke(a.region, make([]byte, pairSize)) }, data: true,
			want: "sums-lost", bad: 1, remedy: "recompute"},
		{name: "a block", damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.block, blockSize, 1) }, data: true,
			want: "block-damaged", bad: 1, blocks: 1},
		{name: "an unreadable block", damage: func(d *memdisk.Disk, a *anatomy) { d.BadSector(a.block+512, 512) }, data: true,
			want: "block-unreadable", bad: 1, blocks: 1},
		{name: "a block that nobody reads", damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.block, blockSize, 1) }},

		{name: "the last group", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.group[len(a.group)-1]+1024, 2048, 1) },
			want: "journal-torn", bad: 0},
		{name: "a group in the middle", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.group[1]+1024, 2048, 1) },
			want: "journal-damaged", bad: 1},
		{name: "a record of no kind", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) {
			resealGroup(d, a.group[1], func(records []byte) { records[0] = 99 })
		}, want: "journal-record", bad: 1},
		{name: "a record past the end of its layer", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) {
			for changed, i := false, 0; !changed; i++ {
				resealGroup(d, a.group[i], func(records []byte) {
					_ = eachRecord(records, func(t recordType, b []byte) error { // never fails
						if t == recordMap {
							le.PutUint32(b[4:], 1<<30)
							changed = true
						}
						return nil
					})
				})
			}
		}, want: "journal-record", bad: 1},
		{name: "a group that cannot be read", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) { d.BadSector(a.group[1], 512) },
			want: "journal-damaged", bad: 1},
		{name: "an old copy of a zone page", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) {
			at := a.s.members[0].base
			b := d.Bytes(at, pageSize)
			le.PutUint64(b[8:], le.Uint64(b[8:])+1)
			le.PutUint32(b[60:], pageChecksum(b))
			d.Poke(at, b)
		}, want: "zone-copy", bad: 0, remedy: "repair"},
		{name: "a block of a dirty region", crashed: true, damage: func(d *memdisk.Disk, a *anatomy) { d.Corrupt(a.dirty, blockSize, 1) }, data: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := clean.Clone()
			if tt.crashed {
				d = crashed.Clone()
			}
			g := rigOn(t, d)
			tt.damage(d, dissect(t, d))
			r := g.checkDisks(CheckConfig{Data: tt.data})
			got := strings.TrimSpace(strings.ReplaceAll(codes(r), string(FindUnverified), ""))
			if got != tt.want || r.Bad != tt.bad || r.DamagedBlocks != tt.blocks {
				t.Errorf("found %q, %d bad, %d blocks; want %q, %d, %d", got, r.Bad, r.DamagedBlocks, tt.want, tt.bad, tt.blocks)
				for _, f := range r.Findings {
					t.Logf("%+v", f)
				}
			}
			if b, err := json.Marshal(r); err != nil || !bytes.Contains(b, []byte(`"findings":[`)) {
				t.Errorf("as JSON: %v", err)
			}
			if tt.remedy == "recompute" {
				if r := g.checkDisks(CheckConfig{Repair: true}); r.Bad != tt.bad || r.Repaired > 0 {
					t.Errorf("a repair has recomputed checksums unasked: %+v", r)
				}
			}
			if r := g.checkDisks(CheckConfig{Repair: true, RecomputeSums: tt.remedy == "recompute"}); (r.Repaired > 0) != (tt.remedy != "") || tt.remedy != "" && r.Bad != 0 {
				t.Errorf("repaired %d, %d are bad still", r.Repaired, r.Bad)
			}
			if tt.remedy == "" {
				return
			}
			if r := g.checkDisks(CheckConfig{Data: true}); r.Bad > 0 || !strings.HasPrefix(string(FindUnverified), codes(r)) {
				t.Errorf("after the repair: %q", codes(r))
			}
			want := newStory(t, nil)
			want.settled()
			if tt.crashed {
				want.unsettled()
			}
			g.open()
			want.verify(g)
			g.close()
		})
	}
}

// TestCheckMissesASuperblock wants it noticed that the superblocks of a run are
// lost, by what that run has left in the journal.
func TestCheckMissesASuperblock(t *testing.T) {
	d := makeImage(t, false)
	g := rigOn(t, d)
	g.open()
	newStory(t, g).on("data", func(c *devtest.Client) {
		c.Write(0, imageFill(4096, 1))
		c.Flush()
	})
	image := d.Clone()
	image.CrashLose()
	g.close()
	slot := dissect(t, image).s.generation % 2 * pageSize
	image.Poke(slot, make([]byte, pageSize))
	image.Poke(imageSize-pairSize+slot, make([]byte, pageSize))
	if r := rigOn(t, image).checkDisks(CheckConfig{}); codes(r) != "journal-damaged" || r.Bad != 1 || r.Complete {
		t.Errorf("%+v", r)
	}
}

// TestCheckNamesWhatIsHit wants the volume and the place of each damaged block.
func TestCheckNamesWhatIsHit(t *testing.T) {
	d := makeImage(t, false)
	a := dissect(t, d)
	d.Corrupt(a.block, blockSize, 1)
	g := rigOn(t, d)
	r := g.checkDisks(CheckConfig{Data: true})
	if len(r.Findings) != 1 {
		t.Fatalf("%+v", r)
	}
	f := r.Findings[0]
	if f.Where.Device != "mem0" || f.Where.Offset != a.block || f.Severity != SeverityError || !strings.Contains(f.What, "the block at ") || f.Remedy == "" {
		t.Errorf("%+v", f)
	}
}

func TestCheckOfSeveralDisks(t *testing.T) {
	disks := []*memdisk.Disk{memory(16 << 20), memory(16 << 20), memory(16 << 20)}
	g := newRig(t, 2, disks[0], disks[1], disks[2])
	g.open()
	newStory(t, g).settled()
	g.close()
	other := newRig(t, 2, memory(16<<20))

	config := CheckConfig{Reactor: g.r, Disks: g.disks[:2]}
	var missing *MissingError
	if _, err := Check(config); !errors.As(err, &missing) || len(missing.Missing) != 1 || missing.Missing[0].Index != 2 {
		t.Errorf("a disk is missing: %v", err)
	}
	config.Disks = append(slices.Clone(g.disks), other.disks[0])
	if _, err := Check(config); !errors.Is(err, ErrInvalid) {
		t.Errorf("a disk of another pool: %v", err)
	}
	config.Disks = append(slices.Clone(g.disks), Disk{"twin", disks[1].Clone()})
	if _, err := Check(config); !errors.Is(err, ErrInvalid) {
		t.Errorf("a copy of a disk: %v", err)
	}
	config.Disks = []Disk{{"empty", memory(16 << 20)}}
	if _, err := Check(config); !errors.Is(err, ErrNotPool) {
		t.Errorf("no pool: %v", err)
	}
	if _, err := Check(CheckConfig{Reactor: g.r}); !errors.Is(err, ErrNotPool) {
		t.Errorf("no disks: %v", err)
	}
	if _, err := Check(CheckConfig{Reactor: g.r, Disks: g.disks, RecomputeSums: true}); !errors.Is(err, ErrInvalid) {
		t.Errorf("recompute without repair: %v", err)
	}

	// A lost write of a superblock: disk 2 knows another disk 1 than disk 0.
	resealSuper(disks[2], func(b []byte) { le.PutUint64(b[248:], 0); le.PutUint64(b[256+128:], 1) })
	if r := g.checkDisks(CheckConfig{}); codes(r) != "superblock-old" || r.Bad != 1 {
		t.Errorf("%+v", r)
	}
	if r := g.checkDisks(CheckConfig{Repair: true}); r.Repaired != 1 || r.Bad != 0 {
		t.Errorf("%+v", r)
	}
	if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 {
		t.Errorf("%+v", r)
	}

	disks[1].Truncate(8 << 20)
	if r := g.checkDisks(CheckConfig{}); r.Complete || r.Bad == 0 {
		t.Errorf("a disk that has become smaller: %+v", r)
	}
}

// TestCheckOfADiskThatWasAboutToJoin loses power after the label of a new disk was
// written, and before that of disk 0.
func TestCheckOfADiskThatWasAboutToJoin(t *testing.T) {
	disk, added := memory(16<<20), memory(16<<20)
	g := newRig(t, 2, disk)
	before := disk.Clone()
	g.open()
	if err := g.pool.AddDisk(Disk{"new", added}); err != nil {
		t.Fatal(err)
	}
	g.close()
	g.disks = []Disk{{"mem0", before}, {"new", added}}
	if r := g.checkDisks(CheckConfig{}); codes(r) != "superblock-old" || r.Notes != 1 || r.Bad != 0 || r.Devices != 1 || !r.Complete {
		t.Errorf("%+v", r)
	}
}

// TestCheckKeepsSoMany wants findings beyond the bound counted.
func TestCheckKeepsSoMany(t *testing.T) {
	d := makeImage(t, false)
	a := dissect(t, d)
	reseal(d, a.copied, func(b []byte) {
		for i := range 300 {
			le.PutUint64(b[pageHeaderSize+8*(100+i):], uint64(makeEntry(5, 1, false)))
		}
	})
	r := rigOn(t, d).checkDisks(CheckConfig{FindingsMax: 10})
	if len(r.Findings) != 10 || r.Errors != 300 || r.Omitted != 290 || r.Bad != 300 {
		t.Errorf("%d findings, %d errors, %d omitted", len(r.Findings), r.Errors, r.Omitted)
	}
}

// TestCheckTellsItsProgress wants each phase to reach its end.
func TestCheckTellsItsProgress(t *testing.T) {
	var phases []string
	last := map[CheckPhase]CheckProgress{}
	rigOn(t, makeImage(t, false)).checkDisks(CheckConfig{Data: true, Progress: func(p CheckProgress) {
		if len(phases) == 0 || phases[len(phases)-1] != string(p.Phase) {
			phases = append(phases, string(p.Phase))
		}
		if p.Done < last[p.Phase].Done || p.Pool != "p" {
			t.Errorf("from %+v to %+v", last[p.Phase], p)
		}
		last[p.Phase] = p
	}})
	if got := fmt.Sprint(phases); got != "[metadata journal checksums data]" {
		t.Errorf("phases %s", got)
	}
	for _, p := range last {
		if p.Done != p.Total || p.Total == 0 {
			t.Errorf("ended at %+v", p)
		}
	}
}

// FuzzCheck changes bytes of a good pool, makes checksums right where it is told to,
// and wants both Check and Open to come to an end.
//
// The input is groups of six bytes: which structure, 2 bytes offset in it, mask to
// flip, whether to seal, and what to do with the copy.
func FuzzCheck(f *testing.F) {
	images := []*memdisk.Disk{loadImage(f, imageV1), loadImage(f, imageV1Crashed)}
	r := devtest.Reactors(f, reactor.EngineAuto, 1)[0]
	f.Add([]byte{0, 0, 100, 1, 1, 0})
	f.Add([]byte{1, 0, 104, 0x40, 1, 1})
	f.Add([]byte{2, 0, 80, 0xff, 1, 1, 3, 1, 0, 7, 1, 1})
	f.Add([]byte{8, 0, 70, 4, 1, 1, 40, 0, 12, 2, 1, 0})
	f.Add([]byte{60, 0, 64, 0xff, 0, 1, 61, 4, 12, 2, 1, 0})
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 || len(input) > 120 {
			return
		}
		d := images[input[0]&1].Clone()
		s, err := decodeSuperblock(d.Bytes(0, pageSize))
		if err != nil {
			if s, err = decodeSuperblock(d.Bytes(pageSize, pageSize)); err != nil {
				t.Fatal(err)
			}
		}
		for len(input) >= 6 {
			which, offset, mask, seal, both := input[0]>>1, uint64(input[1])<<8|uint64(input[2]), input[3], input[4]&1 != 0, input[5]&1 != 0
			input = input[6:]
			places := fuzzPlaces(s, uint64(which))
			if !both {
				places = places[:1]
			}
			for _, at := range places {
				b := d.Bytes(at, pageSize)
				b[offset%pageSize] ^= mask
				if seal {
					switch {
					case string(b[:8]) == superMagic:
						le.PutUint32(b[4092:], checksum(b[:4092]))
					case le.Uint32(b) == pageMagic:
						le.PutUint32(b[60:], pageChecksum(b))
					case le.Uint32(b) == groupMagic:
						if n := uint64(le.Uint32(b[12:])); n > 0 && n <= groupBlocksMax && at+n*pageSize <= imageSize {
							g := d.Bytes(at, n*pageSize)
							copy(g, b)
							le.PutUint32(b[4:], checksum(g[8:]))
						}
					}
				}
				d.Poke(at, b)
			}
		}
		disks := []Disk{{"mem0", d}}
		if report, err := Check(CheckConfig{Disks: disks, Reactor: r, Data: true, Repair: true, RecomputeSums: true}); err == nil && report.Bad == 0 {
			again, err := Check(CheckConfig{Disks: disks, Reactor: r, Data: true})
			if err != nil || again.Bad > 0 {
				t.Errorf("after a repair: %v, %+v", err, again)
			}
		}
		p, err := Open(Config{Disks: disks, Reactor: r, Manual: true, ReadOnly: true, Log: quiet()})
		if err == nil {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// fuzzPlaces are the copies of a structure.
func fuzzPlaces(s *superblock, which uint64) []uint64 {
	base := s.members[0].base
	switch {
	case which == 0:
		return []uint64{0, pageSize, imageSize - pairSize, imageSize - pageSize}
	case which < 4: // a zone page
		at := base + (which-1)%2*s.zoneStride()
		return []uint64{at, at + pageSize}
	case which < 6: // checksums
		at := base + clusterSize + (which-4)*pairSize
		return []uint64{at, at + pageSize}
	case which < 26: // a group of the journal
		return []uint64{s.journalOffset + (s.checkpoint+which-6)%(s.journalLength/pageSize)*pageSize}
	default: // metadata, and data
		at := base + s.zoneHead() + (which-26)*pairSize
		return []uint64{at, at + pageSize}
	}
}
