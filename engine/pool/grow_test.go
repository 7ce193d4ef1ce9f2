package pool

import (
	"bytes"
	"errors"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
)

func TestGrowWhileVolumesAreOpen(t *testing.T) {
	m := memory(40 << 20)
	g := newRig(t, 4, m)
	g.open()
	d := g.volume("v", 80<<20)
	c := devtest.NewClient(t, g.r, d, 8)
	data := bytes.Repeat([]byte{7}, 1<<20)
	c.Write(0, data)
	before := g.pool.Info()
	if err := g.pool.Grow(); err != nil || g.pool.Info().Total != before.Total {
		t.Errorf("nothing to take: %v, %d bytes, were %d", err, g.pool.Info().Total, before.Total)
	}
	for _, size := range []uint64{44 << 20, 60 << 20, 200 << 20} {
		m.Truncate(size)
		if err := g.pool.Grow(); err != nil {
			t.Fatal(err)
		}
	}
	if after := g.pool.Info(); after.Total < before.Total+140<<20 {
		t.Errorf("%d bytes after, %d before", after.Total, before.Total)
	}
	for at := uint64(1 << 20); at < 80<<20; at += 1 << 20 {
		c.Write(at, data)
	}
	for range 2 {
		for at := uint64(0); at < 80<<20; at += 1 << 20 {
			if !bytes.Equal(c.Read(at, 1<<20), data) {
				t.Fatalf("differs at %d", at)
			}
		}
		c.Close()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		g.close()
		var err error
		if d, err = g.open().OpenVolume("v"); err != nil {
			t.Fatal(err)
		}
		c = devtest.NewClient(t, g.r, d, 8)
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	g.close()
}

func TestAddDisk(t *testing.T) {
	g := newRig(t, 4, memory(20<<20))
	g.open()
	d := g.volume("v", 64<<20)
	second := Disk{Path: "second", Device: memory(80 << 20)}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	foreign := memory(80 << 20)
	foreign.Poke(0, []byte("XFSB"))
	if err := g.pool.AddDisk(Disk{Path: "xfs", Device: foreign}); !errors.Is(err, ErrForeign) {
		t.Errorf("a disk with a file system: %v", err)
	}
	if err := g.pool.AddDisk(Disk{Path: "tiny", Device: memory(1 << 20)}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a tiny disk: %v", err)
	}
	if err := g.pool.AddDisk(second); err != nil {
		t.Fatal(err)
	}
	g.disks = append(g.disks, second)
	g.config.Disks = g.disks
	d, err := g.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	c := devtest.NewClient(t, g.r, d, 8)
	data := bytes.Repeat([]byte{9}, 64<<20)
	for at := 0; at < len(data); at += 1 << 20 {
		c.Write(uint64(at), data[at:at+1<<20])
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	g.close()
	g.config.Disks = []Disk{second, g.disks[0]} // in any order
	if d, err = g.open().OpenVolume("v"); err != nil {
		t.Fatal(err)
	}
	c = devtest.NewClient(t, g.r, d, 8)
	for at := 0; at < len(data); at += 1 << 20 {
		if !bytes.Equal(c.Read(uint64(at), 1<<20), data[at:at+1<<20]) {
			t.Fatalf("differs at %d", at)
		}
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	g.close()
}
