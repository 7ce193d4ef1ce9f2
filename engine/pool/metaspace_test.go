package pool

import (
	"errors"
	"fmt"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
)

// change does one request of a volume and tells its status.
func (g *rig) change(d datapath.Device, op datapath.Op, flags datapath.Flags, offset, length uint64) datapath.Status {
	g.Helper()
	q, err := openPort(g.r, d, 4)
	if err != nil {
		g.Fatal(err)
	}
	var data []byte
	if op == datapath.OpWrite {
		data = make([]byte, length)
	}
	s, err := q.one(op, flags, offset, data, length)
	if err != nil {
		g.Fatal(err)
	}
	if err := q.close(); err != nil {
		g.Fatal(err)
	}
	return s
}

func (g *rig) must(d datapath.Device, op datapath.Op, flags datapath.Flags, offset, length uint64) {
	g.Helper()
	if s := g.change(d, op, flags, offset, length); s != datapath.StatusOK {
		g.Fatalf("%s of %d bytes at %d: %v; %+v", op, length, offset, s, g.pool.Info())
	}
}

// usePairs makes volumes until all places for pages of metadata are taken, and the
// pool's reserve with them.
func (g *rig) usePairs() {
	g.Helper()
	p := g.pool
	for i := range 8 * metaPairs {
		if i > 0 && len(p.pairs) == 0 && p.Info().Reserve == 0 {
			break
		}
		if _, err := p.CreateVolume(VolumeSpec{Name: fmt.Sprintf("small%d", i), Size: blockSize}); err != nil {
			g.Fatal(err)
		}
		if err := p.checkpoint(); err != nil {
			g.Fatal(err)
		}
	}
	if i := p.Info(); len(p.pairs) != 0 || i.Reserve != 0 {
		g.Fatalf("%d pairs are free, and %d bytes are kept", len(p.pairs), i.Reserve)
	}
}

// thickest makes the largest thick volume there is room for.
func (g *rig) thickest() datapath.Device {
	g.Helper()
	for size := g.pool.Info().Free; ; size -= clusterSize {
		_, err := g.pool.CreateVolume(VolumeSpec{Name: "thick", Size: size, Thick: true})
		if err == nil {
			break
		}
		if !errors.Is(err, ErrNoSpace) {
			g.Fatal(err)
		}
	}
	d, err := g.pool.OpenVolume("thick")
	if err != nil {
		g.Fatal(err)
	}
	return d
}

// TestThickVolumeHasRoomForItsMap: of a pool whose space it has reserved whole, all of
// it can be written, zeroed, written again behind a snapshot's back, and the metadata
// finds its place, whatever the order and however often the pool is opened.
func TestThickVolumeHasRoomForItsMap(t *testing.T) {
	for _, first := range []datapath.Op{datapath.OpWrite, datapath.OpWriteZeroes, datapath.OpDiscard} {
		for _, reopen := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", first, reopen), func(t *testing.T) {
				g := newRig(t, 2, memory(24<<20))
				p := g.open()
				g.usePairs()
				d := g.thickest()
				if reopen {
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					g.close()
					p = g.open()
					var err error
					if d, err = p.OpenVolume("thick"); err != nil {
						t.Fatal(err)
					}
				}
				size := d.Info().Size
				g.must(d, first, 0, size-clusterSize+512, 1024)
				g.must(d, datapath.OpWriteZeroes, datapath.FlagNoUnmap, size-clusterSize+512, 1024)
				for at := uint64(0); at < size; at += 1 << 20 {
					g.must(d, datapath.OpWrite, 0, at, min(1<<20, size-at))
				}
				for range 2 {
					if err := p.checkpoint(); err != nil {
						t.Fatal(err)
					}
				}
				if i := p.Info(); i.Reserved != 0 {
					t.Errorf("all is written, and there are reserved: %+v", i)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				if _, err := p.DeleteVolume("thick", false); err != nil {
					t.Fatal(err)
				}
				g.close()
				p = g.open()
				if owed := p.alloc.owed.Load(); owed != -int64(len(p.pairs)) {
					t.Errorf("the volume is gone, %d places are free, and %d pages are owed", len(p.pairs), owed)
				}
				g.close()
			})
		}
	}
}

// TestOwedPagesAgreeAcrossOpening: what is owed is the same before a pool is closed
// and after it was opened, through everything that makes and removes pages.
func TestOwedPagesAgreeAcrossOpening(t *testing.T) {
	g := newRig(t, 2, memory(64<<20))
	p := g.open()
	agree := func(when string) {
		t.Helper()
		count := func() int64 {
			if err := p.commitAll(); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second has what the first gave back
				if err := p.checkpoint(); err != nil {
					t.Fatal(err)
				}
			}
			return p.alloc.owed.Load() + int64(len(p.pairs))
		}
		before, reserved := count(), p.Info().Reserved
		g.close()
		p = g.open()
		if after, now := count(), p.Info().Reserved; before != after || reserved != now {
			t.Errorf("%s: %d pages are owed and %d bytes reserved, after opening %d and %d", when, before, reserved, after, now)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	with := func(name string, f func(d datapath.Device)) {
		t.Helper()
		d, err := p.OpenVolume(name)
		do(err)
		f(d)
		do(d.Close())
	}
	_, err := p.CreateVolume(VolumeSpec{Name: "v", Size: 8 << 20, Thick: true})
	do(err)
	agree("a thick volume")
	with("v", func(d datapath.Device) { g.must(d, datapath.OpWrite, 0, 0, 1<<20) })
	agree("written to")
	_, err = p.CreateSnapshot("v", "s1", nil)
	do(err)
	agree("a snapshot")
	do(p.Resize("v", 10<<20))
	agree("grown")
	with("v", func(d datapath.Device) { g.must(d, datapath.OpWrite, 0, 9<<20, 1<<20) })
	_, err = p.CreateSnapshot("v", "s2", nil)
	do(err)
	_, err = p.Clone("v", "s1", VolumeSpec{Name: "c", Thick: true, Size: 12 << 20})
	do(err)
	agree("a thick clone")
	do(p.Revert("v", "s1"))
	agree("reverted")
	_, err = p.DeleteVolume("c", true)
	do(err)
	_, err = p.DeleteSnapshot("v", "s2")
	do(err)
	do(p.Maintain())
	agree("the second snapshot deleted")
	_, err = p.DeleteSnapshot("v", "s1") // merged into the head
	do(err)
	do(p.Maintain())
	agree("the first snapshot deleted")
	if i := p.Info(); i.Reserved+i.Allocated != 10<<20 {
		t.Errorf("a thick volume of 10 MiB and nothing else: %+v", i)
	}
	_, err = p.DeleteVolume("v", true)
	do(err)
	do(p.Maintain())
	agree("all is gone")
	if n := p.alloc.owed.Load(); n != -int64(len(p.pairs)) {
		t.Errorf("nothing is there, and %d pages are owed beside %d places", n, len(p.pairs))
	}
	g.close()
}

// TestFullPoolMakesNoPageWithoutRoom: where a checkpoint would find no place for one
// page more, writes, snapshots, clones, reverting and merging say so or wait, and the
// pool stays in service.
func TestFullPoolMakesNoPageWithoutRoom(t *testing.T) {
	g := newRig(t, 2, memory(24<<20))
	p := g.open()
	const far = mapEntries << clusterShift // another page of the map
	d := g.volume("v", 3*far)
	g.must(d, datapath.OpWrite, 0, 0, blockSize)
	if _, err := p.CreateSnapshot("v", "s", nil); err != nil {
		t.Fatal(err)
	}
	g.must(d, datapath.OpWrite, 0, far, blockSize) // the page of the start stays with the snapshot
	g.usePairs()
	e := g.volume("filler", 64<<20)
	for at := uint64(0); g.change(e, datapath.OpWrite, 0, at, blockSize) == datapath.StatusOK; at += clusterSize {
	}
	// What data may not have, metadata may.
	for n := 0; ; n++ {
		if _, err := p.CreateVolume(VolumeSpec{Name: fmt.Sprintf("last%d", n), Size: blockSize}); errors.Is(err, ErrNoSpace) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if s := g.change(d, datapath.OpWrite, 0, 2*far, blockSize); s != datapath.StatusNoSpace {
		t.Errorf("a write to a page that is not there: %v", s)
	}
	if _, err := p.CreateSnapshot("v", "s2", nil); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a snapshot: %v", err)
	}
	if _, err := p.Clone("v", "s", VolumeSpec{Name: "c"}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a clone: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Revert("v", "s"); !errors.Is(err, ErrNoSpace) {
		t.Errorf("reverting: %v", err)
	}
	j, err := p.DeleteSnapshot("v", "s")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Maintain(); err != nil {
		t.Fatal(err)
	}
	job := func() Job {
		for _, x := range p.Jobs() {
			if x.ID == j.ID {
				return x
			}
		}
		t.Fatal("the job is gone")
		return Job{}
	}
	if x := job(); x.Note == "" || !x.Ended.IsZero() || x.Err != "" {
		t.Errorf("merging: %+v", x)
	}
	if err := p.checkpoint(); err != nil {
		t.Fatalf("the pool is full, and out of service: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.DeleteVolume("filler", false); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Maintain(); err != nil {
			t.Fatal(err)
		}
	}
	if x := job(); x.Ended.IsZero() || x.Err != "" {
		t.Errorf("there is room, and merging has not gone on: %+v", x)
	}
	g.close()
}
