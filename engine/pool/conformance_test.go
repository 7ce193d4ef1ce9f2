package pool

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// poolDevice is a volume whose Close closes its pool, too.
type poolDevice struct {
	datapath.Device
	g     *rig
	disks []*memdisk.Disk
}

func (d *poolDevice) Close() error {
	if err := d.Device.Close(); err != nil {
		return err
	}
	return d.g.pool.Close()
}

func openPoolDevice(t *testing.T, size uint64, disks int, prepare func(g *rig)) *poolDevice {
	d := &poolDevice{}
	var devices []datapath.Device
	for range disks {
		m := memory(96 << 20)
		d.disks = append(d.disks, m)
		devices = append(devices, m)
	}
	d.g = newRig(t, 4, devices...)
	d.g.open()
	d.Device = d.g.volume("v", size)
	if prepare != nil {
		prepare(d.g)
	}
	return d
}

func conform(t *testing.T, disks int, prepare func(g *rig)) {
	devtest.Run(t, func(t *testing.T) datapath.Device {
		return openPoolDevice(t, 16<<20, disks, prepare)
	}, devtest.Options{
		DiscardZeroes: true,
		Resize: func(d datapath.Device, size uint64) error {
			return d.(*poolDevice).g.pool.Resize("v", size)
		},
	})
}

func TestConformance(t *testing.T) { conform(t, 1, nil) }

func TestConformanceOnThreeDisks(t *testing.T) { conform(t, 3, nil) }
