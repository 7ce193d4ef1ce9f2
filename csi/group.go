package csi

import (
	"context"
	"errors"
	"slices"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// groupController takes snapshots of several volumes at one point. A group is its
// snapshots: they have its name, and the label of it.
type groupController struct {
	spec.UnimplementedGroupControllerServer
	driver *Driver
}

// GroupControllerGetCapabilities implements spec.GroupControllerServer.
func (g *groupController) GroupControllerGetCapabilities(context.Context, *spec.GroupControllerGetCapabilitiesRequest) (*spec.GroupControllerGetCapabilitiesResponse, error) {
	return &spec.GroupControllerGetCapabilitiesResponse{Capabilities: []*spec.GroupControllerServiceCapability{{
		Type: &spec.GroupControllerServiceCapability_Rpc{Rpc: &spec.GroupControllerServiceCapability_RPC{
			Type: spec.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}}}}}, nil
}

// members gives the snapshots of a group, by id.
func (g *groupController) members(ctx context.Context, c *control.Client, pool, name string) ([]*controlpb.Snapshot, error) {
	list, err := g.driver.snapshots(ctx, c, pool, "")
	return slices.DeleteFunc(list, func(s *controlpb.Snapshot) bool {
		return s.GetName() != name || s.GetLabels()[labelGroup] == ""
	}), err
}

// message is a group as the orchestrator knows it; there is at least one member.
func (g *groupController) message(ctx context.Context, c *control.Client, members []*controlpb.Snapshot) (*spec.VolumeGroupSnapshot, error) {
	isEncrypted, err := encrypted(ctx, c)
	if err != nil {
		return nil, err
	}
	m := &spec.VolumeGroupSnapshot{GroupSnapshotId: g.driver.groupID(members[0]), CreationTime: members[0].GetCreated(), ReadyToUse: true}
	for _, s := range members {
		m.Snapshots = append(m.Snapshots, g.driver.snapshotMessage(s, isEncrypted(s.GetPool(), s.GetVolume())))
	}
	return m, nil
}

// CreateVolumeGroupSnapshot implements spec.GroupControllerServer.
func (g *groupController) CreateVolumeGroupSnapshot(ctx context.Context, r *spec.CreateVolumeGroupSnapshotRequest) (*spec.CreateVolumeGroupSnapshotResponse, error) {
	d := g.driver
	if err := checkName(r.GetName()); err != nil {
		return nil, err
	}
	if len(r.GetSourceVolumeIds()) == 0 {
		return nil, missing("source volume ids")
	}
	if err := checkSnapshotParameters(r.GetParameters()); err != nil {
		return nil, err
	}
	name := nameOf(r.GetName(), snapshotNameMax)
	client, unlock, err := d.locked(ctx, snapshotKey(name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	want := slices.Compact(slices.Sorted(slices.Values(r.GetSourceVolumeIds())))
	list, err := d.snapshots(ctx, client, "", "")
	if err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(s *controlpb.Snapshot) bool { return s.GetName() != name })
	if len(list) > 0 {
		var have []string
		for _, s := range list {
			have = append(have, VolumeID{d.config.NodeID, s.GetPool(), s.GetVolume()}.String())
		}
		slices.Sort(have)
		if list[0].GetLabels()[labelGroup] == "" || !slices.Equal(have, want) {
			return nil, status.Errorf(codes.AlreadyExists, "snapshot %s exists, of volumes %q", r.GetName(), have)
		}
		m, err := g.message(ctx, client, list)
		return &spec.CreateVolumeGroupSnapshotResponse{GroupSnapshot: m}, err
	}
	request := &controlpb.CreateGroupRequest{Name: name, Labels: map[string]string{labelName: r.GetName(), labelGroup: r.GetName()}}
	for _, id := range want {
		v, err := d.volume(ctx, id)
		if err != nil {
			return nil, err
		}
		if request.Pool != "" && request.Pool != v.GetPool() {
			return nil, invalid("volume %s lies in pool %s and another in pool %s: a group snapshot is of volumes of one pool", id, v.GetPool(), request.Pool)
		}
		request.Pool = v.GetPool()
		request.Volumes = append(request.Volumes, v.GetName())
	}
	made, err := client.Snapshots.CreateGroup(ctx, request)
	if err != nil {
		return nil, spaceProblem(ctx, client, request.Pool, err)
	}
	m, err := g.message(ctx, client, made.GetSnapshots())
	return &spec.CreateVolumeGroupSnapshotResponse{GroupSnapshot: m}, err
}

// group gives the members of a group of this node, and wants every one of ids to be
// of it.
func (g *groupController) group(ctx context.Context, c *control.Client, id GroupID, ids []string) ([]*controlpb.Snapshot, error) {
	if !onNode(id.Node, g.driver.config.NodeID) {
		return nil, foreign("group snapshot "+id.String(), id.Node, g.driver.config.NodeID)
	}
	for _, s := range ids {
		i, err := ParseSnapshotID(s)
		if err != nil || i.Pool != id.Pool || i.Snapshot != id.Group || i.Node != id.Node && !onNode(i.Node, g.driver.config.NodeID) {
			return nil, invalid("snapshot %s does not belong to the group snapshot %s", s, id)
		}
	}
	return g.members(ctx, c, id.Pool, id.Group)
}

// DeleteVolumeGroupSnapshot implements spec.GroupControllerServer.
func (g *groupController) DeleteVolumeGroupSnapshot(ctx context.Context, r *spec.DeleteVolumeGroupSnapshotRequest) (*spec.DeleteVolumeGroupSnapshotResponse, error) {
	d := g.driver
	if r.GetGroupSnapshotId() == "" {
		return nil, missing("group snapshot id")
	}
	id, err := ParseGroupID(r.GetGroupSnapshotId())
	if err != nil {
		return &spec.DeleteVolumeGroupSnapshotResponse{}, nil // none ever had that id
	}
	client, unlock, err := d.locked(ctx, snapshotKey(id.Group))
	if err != nil {
		return nil, err
	}
	defer unlock()
	members, err := g.group(ctx, client, id, r.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	if len(members) == 0 {
		if err := poolThere(ctx, client, id.Pool, "group snapshot "+r.GetGroupSnapshotId(), id.Node, "VolumeGroupSnapshotContent"); err != nil {
			return nil, err
		}
	}
	var errs []error
	for _, s := range members {
		errs = append(errs, d.dropClone(ctx, client, s.GetPool(), s.GetVolume(), s.GetName()))
	}
	return &spec.DeleteVolumeGroupSnapshotResponse{}, errors.Join(errs...)
}

// GetVolumeGroupSnapshot implements spec.GroupControllerServer.
func (g *groupController) GetVolumeGroupSnapshot(ctx context.Context, r *spec.GetVolumeGroupSnapshotRequest) (*spec.GetVolumeGroupSnapshotResponse, error) {
	if r.GetGroupSnapshotId() == "" {
		return nil, missing("group snapshot id")
	}
	id, err := ParseGroupID(r.GetGroupSnapshotId())
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "group snapshot %q: not found: %v", r.GetGroupSnapshotId(), err)
	}
	client, err := g.driver.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	members, err := g.group(ctx, client, id, r.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	if len(members) == 0 {
		return nil, status.Errorf(codes.NotFound, "group snapshot %s: not found", id)
	}
	m, err := g.message(ctx, client, members)
	return &spec.GetVolumeGroupSnapshotResponse{GroupSnapshot: m}, err
}
