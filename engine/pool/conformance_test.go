package pool

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// poolDevice is a volume, or a snapshot, whose Close closes its pool, too.
type poolDevice struct {
	datapath.Device
	g     *rig
	disks []*memdisk.Disk
}

// crash loses power: the pool writes nothing more, its disks lose what is not durable,
// and it is opened anew, without a crash log.
func (d *poolDevice) crash(t *testing.T) *poolDevice {
	d.g.pool.fail(errKilled)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, disk := range d.disks {
		disk.CrashLose()
	}
	d.g.open()
	v, err := d.g.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	return &poolDevice{Device: v, g: d.g, disks: d.disks}
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
		ReadOnly: func(t *testing.T) datapath.Device {
			d := openPoolDevice(t, 16<<20, disks, prepare)
			_, err := d.g.pool.CreateSnapshot("v", "s", nil)
			if err == nil {
				err = d.Device.Close()
			}
			if err == nil {
				d.Device, err = d.g.pool.OpenSnapshot("v", "s")
			}
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		Crash: func(t *testing.T, d datapath.Device) datapath.Device { return d.(*poolDevice).crash(t) },
		Resize: func(d datapath.Device, size uint64) error {
			return d.(*poolDevice).g.pool.Resize("v", size)
		},
	})
}

func TestConformance(t *testing.T) { conform(t, 1, nil) }

func TestConformanceOnThreeDisks(t *testing.T) { conform(t, 3, nil) }
