package csi

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func (d *Driver) snapshotID(s *controlpb.Snapshot) string {
	return SnapshotID{d.config.NodeID, s.GetPool(), s.GetVolume(), s.GetName()}.String()
}

func (d *Driver) groupID(s *controlpb.Snapshot) string {
	return GroupID{d.config.NodeID, s.GetPool(), s.GetName()}.String()
}

// snapshotMessage is a snapshot as the orchestrator knows it. It can be used as soon
// as it exists.
func (d *Driver) snapshotMessage(s *controlpb.Snapshot, encrypted bool) *spec.Snapshot {
	size := s.GetSizeBytes()
	if encrypted {
		size -= min(luksHeader, size)
	}
	m := &spec.Snapshot{
		SnapshotId: d.snapshotID(s), SourceVolumeId: VolumeID{d.config.NodeID, s.GetPool(), s.GetVolume()}.String(),
		SizeBytes: int64(size), CreationTime: s.GetCreated(), ReadyToUse: true, AccessibleTopology: d.topology(),
	}
	if s.GetLabels()[labelGroup] != "" {
		m.GroupSnapshotId = d.groupID(s)
	}
	return m
}

// snapshots lists what the orchestrator may see of a pool and volume ("": all), by
// id. A volume that is not there has none.
func (d *Driver) snapshots(ctx context.Context, c *control.Client, pool, volume string) ([]*controlpb.Snapshot, error) {
	l, err := c.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{Pool: pool, Volume: volume})
	if errors.Is(err, control.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	list := slices.DeleteFunc(l.GetSnapshots(), func(s *controlpb.Snapshot) bool { return s.GetLabels()[labelName] == "" })
	slices.SortFunc(list, func(a, b *controlpb.Snapshot) int { return strings.Compare(d.snapshotID(a), d.snapshotID(b)) })
	return list, nil
}

// snapshot gives the snapshot of an id, which must be one of this node. It may be
// one that the driver did not make.
func (d *Driver) snapshot(ctx context.Context, id string) (*controlpb.Snapshot, error) {
	client, err := d.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	i, err := ParseSnapshotID(id)
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "snapshot %q: not found: %v", id, err)
	}
	if !onNode(i.Node, d.config.NodeID) {
		return nil, foreign("snapshot "+id, i.Node, d.config.NodeID)
	}
	l, err := client.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{Pool: i.Pool, Volume: i.Volume})
	if err != nil && !errors.Is(err, control.ErrNotFound) {
		return nil, err
	}
	for _, s := range l.GetSnapshots() {
		if s.GetName() == i.Snapshot && s.GetLabels()[labelClone] == "" {
			return s, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "snapshot %s: not found", id)
}

// encrypted says whether volumes have LUKS, by pool and name.
func encrypted(ctx context.Context, c *control.Client) (func(pool, volume string) bool, error) {
	l, err := c.Volumes.List(ctx, &controlpb.ListVolumesRequest{Labels: map[string]string{labelEncrypted: "true"}})
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, v := range l.GetVolumes() {
		set[v.GetPool()+"/"+v.GetName()] = true
	}
	return func(pool, volume string) bool { return set[pool+"/"+volume] }, nil
}

// checkSnapshotParameters wants none but the orchestrator's.
func checkSnapshotParameters(given map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if !strings.HasPrefix(key, orchestratorPrefix) {
			return invalid("parameter %q is unknown; a snapshot takes none", key)
		}
	}
	return nil
}

// CreateSnapshot implements spec.ControllerServer.
func (c *controller) CreateSnapshot(ctx context.Context, r *spec.CreateSnapshotRequest) (*spec.CreateSnapshotResponse, error) {
	d := c.driver
	if err := checkName(r.GetName()); err != nil {
		return nil, err
	}
	if r.GetSourceVolumeId() == "" {
		return nil, missing("source volume id")
	}
	if err := checkSnapshotParameters(r.GetParameters()); err != nil {
		return nil, err
	}
	if err := d.checkTopology(r.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	name := nameOf(r.GetName(), snapshotNameMax)
	client, unlock, err := d.locked(ctx, snapshotKey(name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	list, err := d.snapshots(ctx, client, "", "")
	if err != nil {
		return nil, err
	}
	for _, s := range list {
		if s.GetName() != name {
			continue
		}
		m, err := d.described(ctx, client, s)
		if err != nil {
			return nil, err
		}
		if m.GetSourceVolumeId() != r.GetSourceVolumeId() || s.GetLabels()[labelGroup] != "" {
			return nil, status.Errorf(codes.AlreadyExists, "snapshot %s exists, of volume %s", r.GetName(), m.GetSourceVolumeId())
		}
		return &spec.CreateSnapshotResponse{Snapshot: m}, nil
	}
	v, err := d.volume(ctx, r.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	s, err := client.Snapshots.Create(ctx, &controlpb.CreateSnapshotRequest{
		Pool: v.GetPool(), Volume: v.GetName(), Name: name, Labels: map[string]string{labelName: r.GetName()},
	})
	if err != nil {
		return nil, spaceProblem(ctx, client, v.GetPool(), err)
	}
	return &spec.CreateSnapshotResponse{Snapshot: d.snapshotMessage(s, v.GetLabels()[labelEncrypted] != "")}, nil
}

// described is snapshotMessage of one snapshot.
func (d *Driver) described(ctx context.Context, c *control.Client, s *controlpb.Snapshot) (*spec.Snapshot, error) {
	v, err := c.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: s.GetPool(), Name: s.GetVolume()})
	if err != nil {
		return nil, err
	}
	return d.snapshotMessage(s, v.GetLabels()[labelEncrypted] != ""), nil
}

// DeleteSnapshot implements spec.ControllerServer.
func (c *controller) DeleteSnapshot(ctx context.Context, r *spec.DeleteSnapshotRequest) (*spec.DeleteSnapshotResponse, error) {
	d := c.driver
	if r.GetSnapshotId() == "" {
		return nil, missing("snapshot id")
	}
	id, err := ParseSnapshotID(r.GetSnapshotId())
	if err != nil {
		return &spec.DeleteSnapshotResponse{}, nil // no snapshot ever had that id
	}
	client, unlock, err := d.locked(ctx, snapshotKey(id.Snapshot))
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := d.snapshot(ctx, r.GetSnapshotId())
	if status.Code(err) == codes.NotFound {
		if err := poolThere(ctx, client, id.Pool, "snapshot "+r.GetSnapshotId(), id.Node, "VolumeSnapshotContent"); err != nil {
			return nil, err
		}
		return &spec.DeleteSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if group := s.GetLabels()[labelGroup]; group != "" {
		return nil, status.Errorf(codes.FailedPrecondition, "snapshot %s belongs to the group snapshot %s: delete that", r.GetSnapshotId(), group)
	}
	if err := d.dropClone(ctx, client, id.Pool, id.Volume, id.Snapshot); err != nil {
		return nil, err
	}
	return &spec.DeleteSnapshotResponse{}, nil
}

// ListSnapshots implements spec.ControllerServer.
func (c *controller) ListSnapshots(ctx context.Context, r *spec.ListSnapshotsRequest) (*spec.ListSnapshotsResponse, error) {
	d := c.driver
	client, err := d.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	if r.GetSnapshotId() != "" {
		s, err := d.snapshot(ctx, r.GetSnapshotId())
		if code := status.Code(err); err != nil && (code == codes.NotFound || code == codes.FailedPrecondition) {
			return &spec.ListSnapshotsResponse{}, nil
		}
		if err != nil {
			return nil, err
		}
		m, err := d.described(ctx, client, s)
		if err != nil {
			return nil, err
		}
		if r.GetSourceVolumeId() != "" && r.GetSourceVolumeId() != m.GetSourceVolumeId() {
			return &spec.ListSnapshotsResponse{}, nil
		}
		return &spec.ListSnapshotsResponse{Entries: []*spec.ListSnapshotsResponse_Entry{{Snapshot: m}}}, nil
	}
	var pool, volume string
	if r.GetSourceVolumeId() != "" {
		id, err := ParseVolumeID(r.GetSourceVolumeId())
		if err != nil || !onNode(id.Node, d.config.NodeID) {
			return &spec.ListSnapshotsResponse{}, nil
		}
		pool, volume = id.Pool, id.Volume
	}
	list, err := d.snapshots(ctx, client, pool, volume)
	if err != nil {
		return nil, err
	}
	list, next, err := page(list, d.snapshotID, isSnapshotID, r.GetStartingToken(), r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	isEncrypted, err := encrypted(ctx, client)
	if err != nil {
		return nil, err
	}
	reply := &spec.ListSnapshotsResponse{NextToken: next}
	for _, s := range list {
		reply.Entries = append(reply.Entries, &spec.ListSnapshotsResponse_Entry{Snapshot: d.snapshotMessage(s, isEncrypted(s.GetPool(), s.GetVolume()))})
	}
	return reply, nil
}

// GetSnapshot implements spec.ControllerServer.
func (c *controller) GetSnapshot(ctx context.Context, r *spec.GetSnapshotRequest) (*spec.GetSnapshotResponse, error) {
	if r.GetSnapshotId() == "" {
		return nil, missing("snapshot id")
	}
	client, err := c.driver.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	s, err := c.driver.snapshot(ctx, r.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	m, err := c.driver.described(ctx, client, s)
	if err != nil {
		return nil, err
	}
	return &spec.GetSnapshotResponse{Snapshot: m}, nil
}
