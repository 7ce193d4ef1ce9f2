package csi

import (
	"fmt"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/ashlar-storage/ashlar/control"
)

// TestErrorsOfTheDaemonKeepTheirMeaning provokes every error return of the
// controller that passes on what the daemon said.
func TestErrorsOfTheDaemonKeepTheirMeaning(t *testing.T) {
	r := newRig(t, nil)
	ctx := t.Context()
	v := r.create("v", gib, nil)
	s, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId()})
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{v.GetVolumeId()}})
	if err != nil {
		t.Fatal(err)
	}
	id, sid, gid := v.GetVolumeId(), s.GetSnapshot().GetSnapshotId(), g.GetGroupSnapshot().GetGroupSnapshotId()
	create := func(change func(*spec.CreateVolumeRequest)) func() error {
		return func() error {
			q := &spec.CreateVolumeRequest{Name: "new", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}}
			change(q)
			_, err := r.CreateVolume(ctx, q)
			return err
		}
	}
	for _, tt := range []struct {
		method string
		call   func() error
	}{
		{"Pools/List", create(func(*spec.CreateVolumeRequest) {})},
		{"Volumes/Get", create(func(*spec.CreateVolumeRequest) {})},
		{"Volumes/Create", create(func(*spec.CreateVolumeRequest) {})},
		{"Volumes/Clone", create(func(q *spec.CreateVolumeRequest) { q.VolumeContentSource = fromSnapshot(sid) })},
		{"Snapshots/List", create(func(q *spec.CreateVolumeRequest) { q.VolumeContentSource = fromSnapshot(sid) })},
		{"Snapshots/Create", create(func(q *spec.CreateVolumeRequest) { q.VolumeContentSource = fromVolume(id) })},
		{"Snapshots/List", func() error { _, err := r.DeleteVolume(ctx, &spec.DeleteVolumeRequest{VolumeId: id}); return err }},
		{"Volumes/Delete", func() error { _, err := r.DeleteVolume(ctx, &spec.DeleteVolumeRequest{VolumeId: id}); return err }},
		{"Volumes/Get", func() error {
			_, err := r.ControllerGetVolume(ctx, &spec.ControllerGetVolumeRequest{VolumeId: id})
			return err
		}},
		{"Volumes/Get", func() error {
			_, err := r.ValidateVolumeCapabilities(ctx, &spec.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}})
			return err
		}},
		{"Volumes/List", func() error { _, err := r.ListVolumes(ctx, &spec.ListVolumesRequest{}); return err }},
		{"Pools/List", func() error { _, err := r.GetCapacity(ctx, &spec.GetCapacityRequest{}); return err }},
		{"Volumes/Resize", func() error {
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &spec.CapacityRange{RequiredBytes: 2 * gib}})
			return err
		}},
		{"Volumes/SetLimits", func() error {
			_, err := r.ControllerModifyVolume(ctx, &spec.ControllerModifyVolumeRequest{VolumeId: id})
			return err
		}},
		{"Snapshots/List", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "t", SourceVolumeId: id})
			return err
		}},
		{"Snapshots/Create", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "t", SourceVolumeId: id})
			return err
		}},
		{"Volumes/Get", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
			return err
		}},
		{"Snapshots/List", func() error {
			_, err := r.DeleteSnapshot(ctx, &spec.DeleteSnapshotRequest{SnapshotId: sid})
			return err
		}},
		{"Snapshots/Delete", func() error {
			_, err := r.DeleteSnapshot(ctx, &spec.DeleteSnapshotRequest{SnapshotId: sid})
			return err
		}},
		{"Snapshots/List", func() error { _, err := r.ListSnapshots(ctx, &spec.ListSnapshotsRequest{}); return err }},
		{"Snapshots/List", func() error { _, err := r.ListSnapshots(ctx, &spec.ListSnapshotsRequest{SnapshotId: sid}); return err }},
		{"Volumes/List", func() error { _, err := r.ListSnapshots(ctx, &spec.ListSnapshotsRequest{}); return err }},
		{"Volumes/Get", func() error { _, err := r.ListSnapshots(ctx, &spec.ListSnapshotsRequest{SnapshotId: sid}); return err }},
		{"Snapshots/List", func() error { _, err := r.GetSnapshot(ctx, &spec.GetSnapshotRequest{SnapshotId: sid}); return err }},
		{"Volumes/Get", func() error { _, err := r.GetSnapshot(ctx, &spec.GetSnapshotRequest{SnapshotId: sid}); return err }},
		{"Snapshots/CreateGroup", func() error {
			_, err := r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{Name: "h", SourceVolumeIds: []string{id}})
			return err
		}},
		{"Snapshots/List", func() error {
			_, err := r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{Name: "h", SourceVolumeIds: []string{id}})
			return err
		}},
		{"Volumes/List", func() error {
			_, err := r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{id}})
			return err
		}},
		{"Snapshots/List", func() error {
			_, err := r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{GroupSnapshotId: gid})
			return err
		}},
		{"Volumes/List", func() error {
			_, err := r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{GroupSnapshotId: gid})
			return err
		}},
		{"Snapshots/List", func() error {
			_, err := r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: gid})
			return err
		}},
		{"Snapshots/Delete", func() error {
			_, err := r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: gid})
			return err
		}},
		{"Pools/List", func() error {
			_, err := r.ControllerGetVolumeHealth(ctx, &spec.ControllerGetVolumeHealthRequest{VolumeId: id})
			return err
		}},
		{"Devices/List", func() error {
			_, err := r.ControllerListVolumeHealth(ctx, &spec.ControllerListVolumeHealthRequest{})
			return err
		}},
		{"Volumes/List", func() error {
			_, err := r.ControllerListVolumeHealth(ctx, &spec.ControllerListVolumeHealthRequest{})
			return err
		}},
		{"Node/Health", func() error { _, err := r.NodeGetStorageHealth(ctx, &spec.NodeGetStorageHealthRequest{}); return err }},
		{"Volumes/Changes", func() error {
			stream, err := r.GetMetadataAllocated(ctx, &spec.GetMetadataAllocatedRequest{SnapshotId: sid})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}},
		{"Devices/List", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: "/x", VolumeCapability: blockCapability()})
			return err
		}},
		{"Volumes/SetLabels", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: "/x", VolumeCapability: blockCapability()})
			return err
		}},
		{"Devices/Attach", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: "/x", VolumeCapability: blockCapability()})
			return err
		}},
		{"Devices/List", func() error {
			_, err := r.NodeUnstageVolume(ctx, &spec.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: "/x"})
			return err
		}},
		{"Devices/List", func() error {
			_, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: "/x", TargetPath: "/y", VolumeCapability: blockCapability()})
			return err
		}},
		{"Volumes/Get", func() error {
			_, err := r.NodeGetVolumeStats(ctx, &spec.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: "/x"})
			return err
		}},
		{"Volumes/Get", func() error {
			_, err := r.NodeExpandVolume(ctx, &spec.NodeExpandVolumeRequest{VolumeId: id, VolumePath: "/x"})
			return err
		}},
	} {
		r.daemon.fail(tt.method, control.Errorf(control.ErrCorrupt, "pool", "default", "pool default: damaged"))
		want(t, tt.method, tt.call(), codes.DataLoss, "damaged")
		r.daemon.fail(tt.method, nil)
	}
	for reason, code := range map[control.Reason]codes.Code{
		control.ErrUnavailable: codes.Unavailable, control.ErrReadOnly: codes.FailedPrecondition, control.ErrNoSpace: codes.ResourceExhausted,
		control.ErrOverProvisioned: codes.ResourceExhausted, control.ErrIO: codes.Internal, control.ErrNotSupported: codes.Unimplemented,
	} {
		r.daemon.fail("Volumes/Create", control.Errorf(reason, "pool", "default", ""))
		want(t, fmt.Sprint(reason), create(func(*spec.CreateVolumeRequest) {})(), code, "default")
		r.daemon.fail("Volumes/Create", nil)
	}
	// The pool that is full cannot say how full it is.
	r.daemon.fail("Volumes/Create", control.Errorf(control.ErrNoSpace, "pool", "default", ""))
	r.daemon.fail("Pools/Get", control.Errorf(control.ErrIO, "pool", "default", ""))
	want(t, "no figures", create(func(*spec.CreateVolumeRequest) {})(), codes.ResourceExhausted, "no space left")
	if n := len(r.daemon.volumes); n != 1 {
		t.Errorf("%d volumes, of 1", n)
	}
}
