package memdisk

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/datapath"
)

func TestCorruptFlipsBitsSilently(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 8), 0))
	g.must(flush())
	g.must(write(0, letters('b', 2), 0))
	for seed := range uint64(50) {
		c := d.Clone()
		c.Corrupt(sector/2, 3*sector, seed)
		flips := func(got, want []byte) (n int) {
			for i := range got {
				if got[i] != want[i] {
					n++
					if i < sector/2 || i >= sector/2+3*sector {
						t.Errorf("seed %d: byte %d changed", seed, i)
					}
				}
			}
			return n
		}
		seen := flips(c.Bytes(0, 8*sector), d.Bytes(0, 8*sector))
		if seen < 1 || seen > 8 {
			t.Errorf("seed %d: %d bytes differ to a reader", seed, seen)
		}
		c.CrashLose()
		if kept := flips(c.Bytes(0, 8*sector), d.Durable(0, 8*sector)); kept != seen {
			t.Errorf("seed %d: %d bytes differ to a reader, %d on the medium", seed, seen, kept)
		}
	}
	one, two := d.Clone(), d.Clone()
	one.Corrupt(0, 1024, 3)
	two.Corrupt(0, 1024, 3)
	if !bytes.Equal(one.Bytes(0, 1024), two.Bytes(0, 1024)) {
		t.Error("one seed, two ways to rot")
	}
	d.Corrupt(0, 1, 1)
	g.must(write(0, letters('c', 1), 0))
	g.must(flush())
	if got := text(t, d.Durable(0, sector)); got != "c" {
		t.Errorf("a new write did not heal: %s", got)
	}
}

func TestBadSectorsFailReadsUntilWritten(t *testing.T) {
	g := newRig(t, Config{Size: 64*sector + 100, AnyIO: true})
	d := g.Disk(0)
	d.BadSector(sector+5, sector)  // sectors 1 and 2
	d.BadSector(64*sector, 100)    // the last, a part of one
	d.BadSector(10*sector, sector) // zeroed later
	d.BadSector(20*sector, sector) // discarded later
	d.BadSector(30*sector, sector) // its write is lost
	g.want(read(0, sector), datapath.StatusOK)
	g.want(read(0, sector+1), datapath.StatusIO)
	g.want(read(3*sector-1, 1), datapath.StatusIO)
	g.want(read(3*sector, sector), datapath.StatusOK)
	g.want(read(64*sector+99, 1), datapath.StatusIO)
	g.must(write(sector, letters('a', 1)[:sector-1], 0)) // not all of it
	g.want(read(sector, 1), datapath.StatusIO)
	if d.Clone().bad == nil {
		t.Error("a clone can read everything")
	}
	g.must(write(sector, letters('a', 1), 0), write(64*sector, letters('b', 1)[:100], 0), zero(10*sector, sector, 0),
		&datapath.Request{Op: datapath.OpDiscard, Offset: 20 * sector, Length: sector})
	for _, s := range []uint64{1, 10, 20} {
		g.want(read(s*sector, sector), datapath.StatusOK)
	}
	g.want(read(64*sector, 100), datapath.StatusOK)
	g.want(read(2*sector, sector), datapath.StatusIO)
	d.LoseWrite(func(e Event) bool { return true })
	g.must(write(30*sector, letters('x', 1), 0))
	g.want(read(30*sector, sector), datapath.StatusIO)
}

func TestLostWritesAreAcknowledged(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	d.LoseWrite(func(e Event) bool { return e.FUA || e.Op == datapath.OpDiscard })
	g.must(write(0, letters('a', 2), 0), write(0, letters('b', 1), datapath.FlagFUA), &datapath.Request{Op: datapath.OpDiscard, Length: 2 * sector})
	d.LoseWrite(nil)
	g.must(write(2*sector, letters('c', 1), datapath.FlagFUA))
	g.must(flush())
	if seen, kept := text(t, d.Bytes(0, 3*sector)), text(t, d.Durable(0, 3*sector)); seen != "aac" || kept != "aac" {
		t.Errorf("seen %s, kept %s", seen, kept)
	}
}

func TestMisdirectedWriteGoesElsewhere(t *testing.T) {
	g := newRig(t, Config{Size: 16 * sector})
	d := g.Disk(0)
	d.Misdirect(8*sector, nil)
	g.must(write(0, letters('a', 2), 0), write(0, letters('b', 1), 0))
	d.Misdirect(15*sector, func(e Event) bool { return e.Length == 4*sector }) // would pass the end
	g.must(write(4*sector, letters('c', 1), 0), write(4*sector, letters('d', 4), datapath.FlagFUA))
	g.must(flush())
	if got := text(t, d.Durable(0, 16*sector)); got != "b...c...aa..dddd" {
		t.Errorf("%s", got)
	}
}

func TestVanishedDiskFailsEverything(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 1), 0))
	d.Vanish()
	for _, r := range []*datapath.Request{read(0, sector), write(0, letters('b', 1), 0), flush(), zero(0, sector, 0)} {
		g.want(r, datapath.StatusIO)
	}
	if d.Clone().Clone().vanished != true || d.Stats().Failed != 4 {
		t.Error("a clone of a vanished disk is there, or requests were not counted")
	}
	d.Return()
	if got := text(t, g.clients[0].Read(0, sector)); got != "a" {
		t.Errorf("after its return: %s", got)
	}
}

func TestReadOnlyDiskRefusesChanges(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	d.ReadOnly(true)
	if !d.Info().ReadOnly {
		t.Error("Info does not say so")
	}
	g.want(write(0, letters('b', 1), 0), datapath.StatusReadOnly)
	g.want(zero(0, sector, 0), datapath.StatusReadOnly)
	g.want(read(0, sector), datapath.StatusOK)
	g.want(flush(), datapath.StatusOK)
	d.ReadOnly(false)
	g.want(write(0, letters('b', 1), 0), datapath.StatusOK)
}

func TestTruncatedDiskIsShorter(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 64), 0))
	g.must(flush())
	g.must(write(8*sector, letters('b', 8), 0))
	d.Truncate(12 * sector)
	if d.Info().Size != 12*sector {
		t.Errorf("size %d", d.Info().Size)
	}
	g.want(read(11*sector, 2*sector), datapath.StatusIO)
	g.want(write(12*sector, letters('x', 1), 0), datapath.StatusIO)
	g.want(read(11*sector, sector), datapath.StatusOK)
	d.Truncate(32 * sector)
	g.close()
	for seed := range uint64(20) {
		c := d.Clone()
		c.Crash(seed)
		if got := text(t, c.Bytes(12*sector, 20*sector)); got != "...................." {
			t.Fatalf("seed %d: past the old end: %s", seed, got)
		}
	}
	g.open()
	g.must(flush())
	if got := text(t, d.Durable(0, 20*sector)); got != "aaaaaaaabbbb........" {
		t.Errorf("durable: %s", got)
	}
}

func TestDiscardMayDoNothing(t *testing.T) {
	g := newRig(t, Config{Size: 16 * sector, DiscardKeeps: true})
	d := g.Disk(0)
	base := d.StartTrace()
	g.must(write(0, letters('a', 2), datapath.FlagFUA))
	g.must(&datapath.Request{Op: datapath.OpDiscard, Length: sector, Flags: datapath.FlagFUA})
	d.Mark("")
	if got := text(t, d.Bytes(0, 2*sector)); got != "aa" {
		t.Errorf("%s", got)
	}
	for im := range base.Images(d.Trace(), ImageOptions{Only: func(c Cut) bool { return c.Mark == 1 }}) {
		if got := text(t, im.Disk().Bytes(0, 2*sector)); got != "aa" {
			t.Errorf("%s: %s", im, got)
		}
	}
}

func TestMisalignedRequestsAreInvalid(t *testing.T) {
	g := newRig(t, Config{Size: 16 * sector})
	g.want(read(1, sector), datapath.StatusInvalid)
	g.want(write(0, make([]byte, 100), 0), datapath.StatusInvalid)
	g.want(&datapath.Request{Op: datapath.OpExtents, Length: sector}, datapath.StatusNotSupported)
}

func TestMisuseStopsTheTest(t *testing.T) {
	g := newRig(t, Config{Size: 16 * sector})
	d := g.Disk(0)
	for name, misuse := range map[string]func(){
		"crash with an open queue": func() { d.Crash(1) },
		"no size":                  func() { New(Config{}) },
		"odd sector":               func() { New(Config{Size: 1, Sector: 100}) },
		"past the end":             func() { d.Bytes(16*sector, 1) },
		"corrupt nothing":          func() { d.Corrupt(0, 0, 1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: nothing happened", name)
				}
			}()
			misuse()
		}()
	}
}

func TestTearsAreWholeSectors(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &change{offset: rapid.Uint64Range(0, 5000).Draw(t, "offset"), length: rapid.Uint64Range(1, 9000).Draw(t, "length")}
		count := sectorCount(c, sector)
		n := rapid.Uint64Range(0, count).Draw(t, "n")
		if n == 0 || n == count {
			return
		}
		p, s := prefix(c, sector, n), suffix(c, sector, count-n)
		if p[0].from != c.offset || p[0].to != s[0].from || s[0].to != c.offset+c.length || p[0].to%sector != 0 {
			t.Fatalf("%d of %d sectors: %v, the others %v", n, count, p, s)
		}
		cut := without([]span{c.span()}, span{p[0].from, p[0].to})
		if len(cut) != 1 || cut[0] != s[0] {
			t.Fatalf("%v without %v: %v", c.span(), p, cut)
		}
	})
}
