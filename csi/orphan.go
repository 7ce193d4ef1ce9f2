package csi

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// cleanPause is between two attempts to clean while the daemon is away.
const cleanPause = 2 * time.Second

// clean takes away, once, what an earlier driver has left that nobody will ask for:
// snapshots of clones, and devices of volumes that were staged and are mounted
// nowhere. It waits for the daemon, until ctx ends.
func (d *Driver) clean(ctx context.Context) {
	for {
		err := d.cleanNow(ctx)
		switch {
		case err == nil:
			return
		case ctx.Err() != nil:
			return
		case errors.Is(err, control.ErrNotSupported):
			d.log.Warn("what an earlier driver left is not looked for", "error", err)
			return
		case !errors.Is(err, control.ErrUnavailable):
			d.log.Warn("what an earlier driver left cannot be taken away; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(cleanPause):
		}
	}
}

func (d *Driver) cleanNow(ctx context.Context) error {
	c, err := d.daemon.client(ctx)
	if err != nil {
		return err
	}
	var errs []error
	if d.config.Mode != ModeNode {
		errs = append(errs, d.dropClones(ctx, c, "", ""))
	}
	if d.config.Mode != ModeController {
		errs = append(errs, d.dropDevices(ctx, c))
	}
	return errors.Join(errs...)
}

// dropDevices detaches what was staged and is mounted nowhere, and what is mounted
// for the kubelet from a volume that does not exist.
func (d *Driver) dropDevices(ctx context.Context, c *control.Client) error {
	l, err := c.Devices.List(ctx, &controlpb.ListDevicesRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, dev := range l.GetDevices() {
		if dev.GetVolume() == "" || dev.GetSnapshot() != "" {
			continue
		}
		unlock, err := d.locks.lock(volumeKey(dev.GetVolume()))
		if err != nil {
			continue // somebody wants it
		}
		errs = append(errs, d.dropDevice(ctx, c, dev))
		unlock()
	}
	return errors.Join(errs...)
}

// dropDevice does it for one; the caller has the lock of the volume.
func (d *Driver) dropDevice(ctx context.Context, c *control.Client, dev *controlpb.Device) error {
	pool, volume := dev.GetPool(), dev.GetVolume()
	v, err := c.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: pool, Name: volume})
	gone := errors.Is(err, control.ErrNotFound)
	if err != nil && !gone {
		return err
	}
	if !gone && v.GetLabels()[labelStaged] == "" {
		return nil // somebody else attached it
	}
	numbers, err := d.devices(dev, pool, volume)
	if err != nil {
		return err
	}
	used, err := d.node.mountsOf(numbers...)
	if err != nil {
		return err
	}
	left := 0
	for _, m := range used {
		if !gone || !under(m.path, d.config.KubeletDir) {
			left++
			continue
		}
		d.log.Warn("unmounting what is left of a volume that does not exist", "path", m.path, "volume", volume)
		if err := d.node.unmount(m.path); err != nil {
			return err
		}
	}
	if left > 0 {
		return nil
	}
	d.log.Info("detaching a volume that was staged and is mounted nowhere", "volume", volume, "device", dev.GetPath())
	err = d.unstage(ctx, c, pool, volume, "")
	if status.Code(err) == codes.Aborted {
		d.log.Warn("a volume that is mounted nowhere stays attached", "volume", volume, "error", err)
		return nil
	}
	return err
}
