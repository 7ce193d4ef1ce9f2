package csi

import (
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

func TestSnapshots(t *testing.T) {
	r := newRig(t, nil)
	v, w := r.create("v", gib, nil), r.create("w", gib, nil)
	q := &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId(), Parameters: map[string]string{"csi.storage.k8s.io/volumesnapshot/name": "x"}}
	s, err := r.CreateSnapshot(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	again, err := r.CreateSnapshot(t.Context(), q)
	if err != nil || again.String() != s.String() {
		t.Errorf("again: %v, %v", again, err)
	}
	_, err = r.CreateSnapshot(t.Context(), &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: w.GetVolumeId()})
	want(t, "another source", err, codes.AlreadyExists, v.GetVolumeId())
	c := r.create("c", gib, func(q *spec.CreateVolumeRequest) {
		q.VolumeContentSource = fromSnapshot(s.GetSnapshot().GetSnapshotId())
	})
	got, err := r.ControllerGetVolume(t.Context(), &spec.ControllerGetVolumeRequest{VolumeId: c.GetVolumeId()})
	if err != nil || got.GetVolume().GetContentSource().GetSnapshot().GetSnapshotId() != s.GetSnapshot().GetSnapshotId() {
		t.Errorf("%v, %v", got, err)
	}
	for range 2 {
		if _, err := r.DeleteSnapshot(t.Context(), &spec.DeleteSnapshotRequest{SnapshotId: s.GetSnapshot().GetSnapshotId()}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.DeleteSnapshot(t.Context(), &spec.DeleteSnapshotRequest{SnapshotId: "nonsense"}); err != nil {
		t.Error(err)
	}
}
