package csi

import (
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
)

func TestClones(t *testing.T) {
	r := newRig(t, nil)
	v := r.create("v", gib, nil)
	clone := func(q *spec.CreateVolumeRequest) {
		q.VolumeContentSource = fromVolume(v.GetVolumeId())
		q.CapacityRange = &spec.CapacityRange{RequiredBytes: 2 * gib}
	}
	for range 2 {
		if c := r.create("c", gib, clone); c.GetCapacityBytes() != 2*gib || c.GetContentSource().GetVolume().GetVolumeId() != v.GetVolumeId() {
			t.Errorf("%v", c)
		}
	}
	if n := len(r.daemon.snapshots["default/v"]); n != 0 {
		t.Errorf("%d snapshots are left", n)
	}
	l, err := r.ListVolumes(t.Context(), &spec.ListVolumesRequest{})
	if err != nil || l.GetEntries()[0].GetVolume().GetContentSource().GetVolume().GetVolumeId() != v.GetVolumeId() {
		t.Errorf("%v, %v", l, err)
	}
	// The driver is killed between the snapshot and the clone: a clone that failed is
	// no better. Nobody sees the snapshot, and the next driver deletes it.
	r.daemon.fail("Snapshots/Delete", control.Errorf(control.ErrIO, "volume", "v", ""))
	r.create("d", gib, clone)
	r.daemon.fail("Snapshots/Delete", nil)
	if n := len(r.daemon.snapshots["default/v"]); n != 1 {
		t.Fatalf("%d snapshots are left", n)
	}
	list, err := r.ListSnapshots(t.Context(), &spec.ListSnapshotsRequest{})
	if err != nil || len(list.GetEntries()) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	hidden := SnapshotID{"node-1", "default", "v", cloneSnapshot("d")}.String()
	if _, err := r.GetSnapshot(t.Context(), &spec.GetSnapshotRequest{SnapshotId: hidden}); status.Code(err) != codes.NotFound {
		t.Errorf("%v", err)
	}
	r.restart()
	for deadline := time.Now().Add(wait); ; time.Sleep(10 * time.Millisecond) {
		r.daemon.mu.Lock()
		n := len(r.daemon.snapshots["default/v"])
		r.daemon.mu.Unlock()
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the snapshot of the clone stays")
		}
	}
	// One that is still there does not keep its volume.
	if _, err := r.daemon.take("default", "v", cloneSnapshot("e"), map[string]string{labelClone: "e"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.DeleteVolume(t.Context(), &spec.DeleteVolumeRequest{VolumeId: v.GetVolumeId()}); err != nil {
		t.Error(err)
	}
}
