package pool

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// rig is a pool on disks in memory.
type rig struct {
	testing.TB
	r      *reactor.Reactor
	disks  []Disk
	config Config
	pool   *Pool
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// newRig formats a pool of the disks; zones are small.
func newRig(t testing.TB, zoneRegions int, disks ...datapath.Device) *rig {
	t.Helper()
	g := &rig{TB: t, r: devtest.Reactors(t, reactor.EngineAuto, 1)[0]}
	for i, d := range disks {
		g.disks = append(g.disks, Disk{Path: fmt.Sprintf("mem%d", i), Device: d})
	}
	if _, err := Format(FormatConfig{Name: "p", Disks: g.disks, Reactor: g.r, JournalBytes: 512 << 10, ZoneRegions: zoneRegions}); err != nil {
		t.Fatal(err)
	}
	g.config = Config{Disks: g.disks, Reactor: g.r, Manual: true, Log: quiet()}
	return g
}

func (g *rig) open() *Pool {
	g.Helper()
	p, err := Open(g.config)
	if err != nil {
		g.Fatal(err)
	}
	g.pool = p
	return p
}

func (g *rig) close() {
	g.Helper()
	if err := g.pool.Close(); err != nil {
		g.Fatal(err)
	}
}

func memory(size uint64) *memdisk.Disk { return memdisk.New(memdisk.Config{Size: size}) }

// volume makes and opens a volume.
func (g *rig) volume(name string, size uint64) datapath.Device {
	g.Helper()
	if _, err := g.pool.CreateVolume(VolumeSpec{Name: name, Size: size}); err != nil {
		g.Fatal(err)
	}
	d, err := g.pool.OpenVolume(name)
	if err != nil {
		g.Fatal(err)
	}
	return d
}
