package pool

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// keptWhole are images of every set of changes a crash may keep, none torn.
var keptWhole = memdisk.ImageOptions{Subsets: 6, Random: -1, Torn: -1}

// TestACrashInACheckpointAndInTheNext opens what two crashes leave: the first one
// cuts short a checkpoint that writes the first pages of a new layer, the second
// one the checkpoint after the recovery, which may find other places for them. Then
// the same with a volume that has grown past its last map page.
func TestACrashInACheckpointAndInTheNext(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(s *story)
	}{
		{"of a new layer", func(s *story) {
			s.create(VolumeSpec{Name: "v", Size: 200 << 20})
		}},
		{"of a layer that has grown", func(s *story) {
			s.create(VolumeSpec{Name: "v", Size: 4 << 20})
			s.maintain()
			s.resize("v", 200<<20)
			s.contents["v"] = s.contents["v"][:200<<20]
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk := memory(16 << 20)
			g := newRig(t, 1, disk)
			g.open()
			s := newStory(t, g)
			tt.prepare(s)
			const pageBytes = mapEntries << clusterShift
			for i := range 3 {
				s.on("v", func(c *devtest.Client) { c.Write(uint64(i)*pageBytes, imageFill(4096, byte(i))) })
			}
			s.flush("v")
			r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
			base := disk.StartTrace()
			if err := g.pool.checkpoint(); err != nil {
				t.Fatal(err)
			}
			images := 0
			open := func(image *memdisk.Disk, what ...any) *Pool {
				p, err := Open(Config{Disks: []Disk{{"mem0", image}}, Reactor: r, Manual: true, Log: quiet()})
				if err != nil {
					t.Fatal(append(what, err)...)
				}
				images++
				return p
			}
			for first := range base.Images(disk.StopTrace(), keptWhole) {
				again := first.Disk()
				p := open(again, first)
				second := again.StartTrace()
				if err := p.checkpoint(); err != nil {
					t.Fatal(err)
				}
				trace := again.StopTrace()
				if err := p.Close(); err != nil {
					t.Fatal(err)
				}
				if first.Cut.Index%8 != 0 { // some are enough: one of them found each bug
					continue
				}
				for image := range second.Images(trace, keptWhole) {
					d := image.Disk()
					p := open(d, first, image)
					if err := p.Close(); err != nil {
						t.Fatal(err)
					}
					if report, err := Check(CheckConfig{Disks: []Disk{{"mem0", d}}, Reactor: r, Data: true}); err != nil || len(report.Findings) > 0 {
						t.Fatal(first, image, err, report)
					}
				}
			}
			t.Log(images, "images")
			g.close()
		})
	}
}

// TestAGrownDiskKeepsItsLabel loses power while the label of a second disk is
// written to a place that has just come to be, and to its start.
func TestAGrownDiskKeepsItsLabel(t *testing.T) {
	group := memdisk.NewGroup(memdisk.Config{Size: 16 << 20}, memdisk.Config{Size: 16 << 20})
	g := newRig(t, 1, group.Disk(0), group.Disk(1))
	for range 2 { // of both parities
		g.open()
		base := group.StartTrace()
		group.Disk(1).Truncate(group.Disk(1).Info().Size + 8<<20)
		if err := g.pool.Grow(); err != nil {
			t.Fatal(err)
		}
		n := 0
		for image := range base.Images(group.StopTrace(), memdisk.ImageOptions{}) {
			disks := []Disk{{"mem0", image.Group().Disk(0)}, {"mem1", image.Group().Disk(1)}}
			for i, d := range image.Group().Disks() {
				disks[i].Device = d
			}
			p, err := Open(Config{Disks: disks, Reactor: g.r, Manual: true, Log: quiet()})
			if err != nil {
				t.Fatal(image, err)
			}
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			if report, err := Check(CheckConfig{Disks: disks, Reactor: g.r}); err != nil || report.Bad > 0 {
				t.Fatal(image, err, report)
			}
			n++
		}
		t.Log(n, "images")
		g.close()
		g.open() // one generation more
		g.close()
	}
}
