package pool

import (
	"errors"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// copies are where the first or second copies of all structures lie on disk 0 of an
// open pool, by what they are.
func (x *patient) copies(l places, round uint64) map[string][]uint64 {
	pairs := func(list []uint64) (copies []uint64) {
		for _, at := range list {
			copies = append(copies, at+round*pageSize)
		}
		return copies
	}
	return map[string][]uint64{
		"superblock": l.supers[2*round : 2*round+2], "zone page": pairs(l.zones), "map page": pairs(l.maps), "layer": pairs(l.layers), "checksums": pairs(l.sums),
	}
}

// TestScrubMendsMetadata damages one copy of each structure under an open pool. A scrub
// tells of it and writes it again: the next one finds nothing, and the pool opens when
// the other copy is damaged after that.
func TestScrubMendsMetadata(t *testing.T) {
	for name, harm := range harms {
		t.Run(name, func(t *testing.T) {
			x := newPatient(t, 1)
			l := x.places()
			x.open()
			if n := x.reads(); n > 0 { // so that checksums are in memory
				t.Fatal(n)
			}
			for round := range uint64(2) {
				for what, list := range x.copies(l, round) {
					for _, at := range list {
						harm(x.mem[0], at)
					}
					for again := range 2 {
						x.events = nil
						if j := x.ended(x.scrub(1 << 40)); j.Err != "" || j.Found != 0 {
							t.Fatalf("%s: %+v", what, j)
						}
						if n := x.told(EventRepaired); (n > 0) != (again == 0) {
							t.Errorf("%s, copy %d, scrub %d: told %d times: %+v", what, round, again, n, x.events)
						}
						if err := x.pool.Maintain(); err != nil { // stores checksums
							t.Fatal(err)
						}
					}
					image := x.mem[0].Clone()
					image.CrashLose()
					for _, at := range x.copies(l, 1-round)[what] {
						harm(image, at)
					}
					y := &patient{rig: &rig{TB: t, r: x.r, config: x.config}, data: x.data, sealed: x.sealed}
					y.config.Disks = []Disk{{Path: "mem0", Device: image}}
					y.config.Event = nil
					if err := y.tryOpen(); err != nil {
						t.Fatalf("%s, the other copy damaged: %v", what, err)
					}
					if n := y.reads(); n > 0 {
						t.Errorf("%s, the other copy damaged: %d blocks cannot be read", what, n)
					}
					y.close()
				}
			}
			x.close()
		})
	}
}

// TestScrubMendsSuperblocksOfEveryDisk: of a disk, too, that has one slot only.
func TestScrubMendsSuperblocksOfEveryDisk(t *testing.T) {
	x := newPatient(t, 2)
	x.open()
	size := x.pool.super.members[1].size
	slot := uint64(0)
	if isZero(x.mem[1].Bytes(0, pageSize)) {
		slot = pageSize
	}
	for _, at := range []uint64{slot, size - pairSize + slot} {
		x.mem[1].Corrupt(at, pageSize, at)
		for again := range 2 {
			x.events = nil
			if j := x.ended(x.scrub(1 << 40)); j.Err != "" || (x.told(EventRepaired) == 1) != (again == 0) {
				t.Errorf("at %d: %+v, %+v", at, j, x.events)
			}
		}
	}
	x.close()
	for _, at := range []uint64{0, pageSize} { // what the first mending has made
		x.mem[1].Corrupt(at, pageSize, at)
	}
	x.open()
	x.close()
}

// TestScrubTellsOfWhatItCannotMend: both copies are damaged, or cannot be written.
func TestScrubTellsOfWhatItCannotMend(t *testing.T) {
	for name, harm := range harms {
		t.Run(name, func(t *testing.T) {
			x := newPatient(t, 1)
			l := x.places()
			x.open()
			if n := x.reads(); n > 0 {
				t.Fatal(n)
			}
			for what, at := range map[string]uint64{"zone page": l.zones[0], "map page": l.maps[0], "layer": l.layers[0], "checksums": l.sums[0]} {
				image := x.mem[0].Bytes(at, pairSize)
				harm(x.mem[0], at)
				harm(x.mem[0], at+pageSize)
				x.events = nil
				if j := x.ended(x.scrub(1 << 40)); j.Err != "" || j.Found != 1 || x.told(EventCorrupt) != 1 || x.told(EventRepaired) != 0 {
					t.Errorf("%s: %+v, %+v", what, j, x.events)
				}
				if n := x.reads(); n > 0 {
					t.Errorf("%s: %d blocks cannot be read, though it is in memory", what, n)
				}
				x.restore(at, image)
			}
			x.close()
		})
	}
	for what, list := range map[string]func(l places) uint64{"map page": func(l places) uint64 { return l.maps[0] }, "superblock": func(l places) uint64 { return l.supers[0] }} {
		x := newPatient(t, 1)
		l := x.places()
		x.open()
		x.mem[0].Corrupt(list(l), pageSize, 1)
		if err := x.faults[0].SetRules([]filter.FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, Count: 1}}); err != nil {
			t.Fatal(err)
		}
		if j := x.ended(x.scrub(1 << 40)); j.Err == "" || j.Stopped {
			t.Errorf("%s that cannot be written: %+v", what, j)
		}
		x.close()
		x.open()
		if n := x.reads(); n > 0 {
			t.Errorf("%s: %d blocks cannot be read", what, n)
		}
		x.close()
	}
	x := newPatient(t, 1)
	x.open()
	x.pool.fail(errKilled)
	if err := x.pool.scrubMetadata(nil, nil); !errors.Is(err, ErrStopped) {
		t.Errorf("superblocks of a pool that has stopped: %v", err)
	}
	if err := x.pool.scrubPairs(nil, nil, 0, 0, 1); !errors.Is(err, ErrStopped) {
		t.Errorf("pages of a pool that has stopped: %v", err)
	}
	x.close()
}

// restore puts back what was at a place of disk 0.
func (x *patient) restore(at uint64, b []byte) {
	for i := uint64(0); i < uint64(len(b)); i += pageSize {
		x.mem[0].Poke(at+i, b[i:i+pageSize])
	}
}

// TestPowerLossWhileAScrubMends: whatever is kept of its writes, the pool opens and
// holds everything.
func TestPowerLossWhileAScrubMends(t *testing.T) {
	images := 0
	for round := range uint64(2) {
		if raceEnabled && round > 0 {
			break
		}
		x := newPatient(t, 1)
		l := x.places()
		x.open()
		for _, list := range x.copies(l, round) {
			for _, at := range list {
				x.mem[0].Corrupt(at, pageSize, at)
			}
		}
		disk := x.mem[0].StartTrace()
		j := x.ended(x.scrub(1 << 40))
		if err := x.pool.Maintain(); err != nil || j.Err != "" || x.told(EventRepaired) < 5 {
			t.Fatalf("%+v, %+v, %v", j, x.events, err)
		}
		trace := x.mem[0].StopTrace()
		for image := range disk.Images(trace, memdisk.ImageOptions{Seed: 1, Subsets: 1, Each: 1, Random: -1, Torn: 1, Masks: -1}) {
			images++
			y := &patient{rig: &rig{TB: t, r: x.r, config: x.config}, data: x.data, sealed: x.sealed}
			y.config.Disks = []Disk{{Path: "mem0", Device: image.Disk()}}
			y.config.Event = nil
			if err := y.tryOpen(); err != nil {
				t.Fatalf("%s: %v\n%s", image, err, memdisk.Script(trace))
			}
			if n := y.reads(); n > 0 {
				t.Fatalf("%s: %d blocks cannot be read", image, n)
			}
			y.close()
		}
		x.close()
	}
	t.Logf("%d images", images)
}
