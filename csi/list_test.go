package csi

import (
	"fmt"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestListsInPages(t *testing.T) {
	r := newRig(t, nil)
	for i := range 7 {
		v := r.create(fmt.Sprintf("v%d", i), gib, nil)
		if _, err := r.CreateSnapshot(t.Context(), &spec.CreateSnapshotRequest{Name: fmt.Sprintf("s%d", i), SourceVolumeId: v.GetVolumeId()}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.daemon.create(&controlpb.Volume{Pool: "default", Name: "operators", SizeBytes: gib}); err != nil {
		t.Fatal(err)
	}
	var volumes, snapshots []string
	for token := ""; ; {
		l, err := r.ListVolumes(t.Context(), &spec.ListVolumesRequest{MaxEntries: 3, StartingToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range l.GetEntries() {
			volumes = append(volumes, e.GetVolume().GetVolumeId())
		}
		if token == "" { // what a token names may go meanwhile
			delete(r.daemon.snapshots, "default/v3")
			delete(r.daemon.volumes, "default/v3")
		}
		if token = l.GetNextToken(); token == "" {
			break
		}
	}
	for token := ""; ; {
		l, err := r.ListSnapshots(t.Context(), &spec.ListSnapshotsRequest{MaxEntries: 2, StartingToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range l.GetEntries() {
			snapshots = append(snapshots, e.GetSnapshot().GetSnapshotId())
		}
		if token = l.GetNextToken(); token == "" {
			break
		}
	}
	if len(volumes) != 6 || len(snapshots) != 6 {
		t.Errorf("volumes %v, snapshots %v", volumes, snapshots)
	}
	one, err := r.ListSnapshots(t.Context(), &spec.ListSnapshotsRequest{SourceVolumeId: volumes[0]})
	if err != nil || len(one.GetEntries()) != 1 {
		t.Errorf("of one volume: %v, %v", one, err)
	}
	for name, q := range map[string]*spec.ListSnapshotsRequest{
		"no volume": {SourceVolumeId: "nonsense"}, "no snapshot": {SnapshotId: "nonsense"},
		"another node's": {SnapshotId: "s1/node-2/p/v/s"}, "both": {SnapshotId: snapshots[0], SourceVolumeId: volumes[1]},
		"a volume that is gone": {SourceVolumeId: "v1/node-1/default/gone"},
	} {
		if l, err := r.ListSnapshots(t.Context(), q); err != nil || len(l.GetEntries()) > 0 {
			t.Errorf("%s: %v, %v", name, l, err)
		}
	}
}
