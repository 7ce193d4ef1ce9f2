package csi

import (
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

func TestGroupSnapshots(t *testing.T) {
	r := newRig(t, nil)
	r.daemon.pool("other", gib)
	ctx := t.Context()
	pool := func(q *spec.CreateVolumeRequest) { q.Parameters = map[string]string{"pool": "default"} }
	a, b := r.create("a", gib, pool).GetVolumeId(), r.create("b", gib, pool).GetVolumeId()
	far := r.create("far", mib, func(q *spec.CreateVolumeRequest) { q.Parameters = map[string]string{"pool": "other"} }).GetVolumeId()
	create := func(ids ...string) (*spec.VolumeGroupSnapshot, error) {
		g, err := r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: ids})
		return g.GetGroupSnapshot(), err
	}
	for _, tt := range []struct {
		name string
		ids  []string
		code codes.Code
		text string
	}{
		{"none", nil, codes.InvalidArgument, "source volume ids"},
		{"one that is gone", []string{a, "v1/node-1/default/gone"}, codes.NotFound, "gone"},
		{"another node's", []string{a, "v1/node-2/default/x"}, codes.FailedPrecondition, "node-2"},
		{"two pools", []string{a, far}, codes.InvalidArgument, "one pool"},
	} {
		_, err := create(tt.ids...)
		want(t, tt.name, err, tt.code, tt.text)
	}
	_, err := r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{SourceVolumeIds: []string{a}})
	want(t, "no name", err, codes.InvalidArgument, "name")
	_, err = r.CreateVolumeGroupSnapshot(ctx, &spec.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{a}, Parameters: map[string]string{"x": "y"}})
	want(t, "a parameter", err, codes.InvalidArgument, "takes none")
	g, err := create(a, b)
	if err != nil || len(g.GetSnapshots()) != 2 || !g.GetReadyToUse() {
		t.Fatalf("%v, %v", g, err)
	}
	if again, err := create(b, a); err != nil || again.GetGroupSnapshotId() != g.GetGroupSnapshotId() || len(again.GetSnapshots()) != 2 {
		t.Errorf("again: %v, %v", again, err)
	}
	_, err = create(a)
	want(t, "other volumes", err, codes.AlreadyExists, "exists")
	_, err = r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "g", SourceVolumeId: a})
	want(t, "a snapshot of the group's name", err, codes.AlreadyExists, "exists")
	var ids []string
	for _, s := range g.GetSnapshots() {
		ids = append(ids, s.GetSnapshotId())
		if s.GetGroupSnapshotId() != g.GetGroupSnapshotId() {
			t.Errorf("%v", s)
		}
	}
	_, err = r.DeleteSnapshot(ctx, &spec.DeleteSnapshotRequest{SnapshotId: ids[0]})
	want(t, "delete of a member", err, codes.FailedPrecondition, "belongs to")
	got, err := r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: ids})
	if err != nil || len(got.GetGroupSnapshot().GetSnapshots()) != 2 {
		t.Errorf("%v, %v", got, err)
	}
	_, err = r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{})
	want(t, "get nothing", err, codes.InvalidArgument, "group snapshot id")
	_, err = r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{GroupSnapshotId: "nonsense"})
	want(t, "get nonsense", err, codes.NotFound, "nonsense")
	_, err = r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{GroupSnapshotId: "g1/node-2/default/g"})
	want(t, "get another node's", err, codes.FailedPrecondition, "node-2")
	_, err = r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{})
	want(t, "delete nothing", err, codes.InvalidArgument, "group snapshot id")
	_, err = r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: []string{"s1/node-1/default/a/x"}})
	want(t, "delete with a wrong member", err, codes.InvalidArgument, "does not belong")
	for range 2 {
		if _, err := r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: ids}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: "nonsense"}); err != nil {
		t.Error(err)
	}
	_, err = r.GetVolumeGroupSnapshot(ctx, &spec.GetVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId()})
	want(t, "get what is deleted", err, codes.NotFound, "not found")
}
