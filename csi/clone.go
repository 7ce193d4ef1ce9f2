package csi

import (
	"context"
	"errors"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// copy makes a volume that begins as a snapshot or as another volume.
func (c *controller) copy(ctx context.Context, client *control.Client, name string, least uint64, r *spec.CreateVolumeRequest, p *parameters, labels map[string]string) (*controlpb.Volume, error) {
	d := c.driver
	request := &controlpb.CloneVolumeRequest{Name: name, Thick: p.thick, Labels: labels, Limits: p.limits}
	var size uint64 // of the source
	var of VolumeID // the volume that is copied, or that the snapshot is of
	switch {
	case r.GetVolumeContentSource().GetSnapshot() != nil:
		s, err := d.snapshot(ctx, r.GetVolumeContentSource().GetSnapshot().GetSnapshotId())
		if err != nil {
			return nil, elsewhere(err)
		}
		size, of = s.GetSizeBytes(), VolumeID{d.config.NodeID, s.GetPool(), s.GetVolume()}
		request.SourceSnapshot = s.GetName()
	case r.GetVolumeContentSource().GetVolume() != nil:
		v, err := d.volume(ctx, r.GetVolumeContentSource().GetVolume().GetVolumeId())
		if err != nil {
			return nil, elsewhere(err)
		}
		size, of = v.GetSizeBytes(), VolumeID{d.config.NodeID, v.GetPool(), v.GetName()}
	default:
		return nil, invalid("the volume content source is neither a snapshot nor a volume")
	}
	request.Pool, request.SourceVolume = of.Pool, of.Volume
	if p.pool != "" && p.pool != of.Pool {
		return nil, invalid("the source lies in pool %s: a copy cannot be made in pool %s", of.Pool, p.pool)
	}
	origin, err := client.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: of.Pool, Name: of.Volume})
	if err != nil {
		return nil, err
	}
	if encrypted := origin.GetLabels()[labelEncrypted] != ""; encrypted != p.encrypted {
		return nil, invalid("the source has encrypted=%t, and so must its copies", encrypted)
	}
	if p.encrypted {
		size -= min(luksHeader, size)
	}
	if r.GetCapacityRange() == nil {
		r.CapacityRange = &spec.CapacityRange{RequiredBytes: int64(size)}
	}
	want, err := sizeOf(r.GetCapacityRange(), least)
	if err != nil {
		return nil, err
	}
	if want < size {
		return nil, outOfRange("%d bytes are asked for, and the source has %d", want, size)
	}
	request.SizeBytes = provisioned(want, p.encrypted)
	if request.GetSourceSnapshot() == "" {
		request.SourceSnapshot = cloneSnapshot(name)
		_, err := client.Snapshots.Create(ctx, &controlpb.CreateSnapshotRequest{
			Pool: of.Pool, Volume: of.Volume, Name: request.GetSourceSnapshot(), Labels: map[string]string{labelClone: name},
		})
		if err != nil && !errors.Is(err, control.ErrExists) {
			return nil, spaceProblem(ctx, client, of.Pool, err)
		}
		defer func() { // a driver that is killed before does it when it starts
			ctx := context.WithoutCancel(ctx)
			if err := d.dropClone(ctx, client, of.Pool, of.Volume, request.GetSourceSnapshot()); err != nil {
				d.log.Warn("snapshot for a clone stays until the driver starts again", "volume", of.Volume, "snapshot", request.GetSourceSnapshot(), "error", err)
			}
		}()
	}
	v, err := client.Volumes.Clone(ctx, request)
	if errors.Is(err, control.ErrNotFound) {
		return nil, status.Errorf(codes.NotFound, "%v", err)
	}
	return v, spaceProblem(ctx, client, of.Pool, err)
}

// cloneSnapshot is the name of the snapshot that a volume is cloned from.
func cloneSnapshot(volume string) string { return "clone-" + digest(volume, hashedName) }

// dropClone deletes a snapshot that was made to clone a volume. What was made of it
// keeps its blocks.
func (d *Driver) dropClone(ctx context.Context, c *control.Client, pool, volume, snapshot string) error {
	_, err := c.Snapshots.Delete(ctx, &controlpb.DeleteSnapshotRequest{Pool: pool, Volume: volume, Name: snapshot})
	if errors.Is(err, control.ErrNotFound) {
		return nil
	}
	return err
}

// dropClones deletes the snapshots that clones left which were interrupted: of one
// volume, or of all when volume is "".
func (d *Driver) dropClones(ctx context.Context, c *control.Client, pool, volume string) error {
	l, err := c.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{Pool: pool, Volume: volume})
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range l.GetSnapshots() {
		clone := s.GetLabels()[labelClone]
		if clone == "" {
			continue
		}
		unlock, err := d.locks.lock(volumeKey(clone))
		if err != nil {
			continue // that clone is being made, and will do it
		}
		errs = append(errs, d.dropClone(ctx, c, s.GetPool(), s.GetVolume(), s.GetName()))
		unlock()
	}
	return errors.Join(errs...)
}
