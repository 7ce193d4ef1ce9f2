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
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

type controller struct {
	spec.UnimplementedControllerServer
	driver *Driver
}

// ControllerGetCapabilities implements spec.ControllerServer.
func (c *controller) ControllerGetCapabilities(context.Context, *spec.ControllerGetCapabilitiesRequest) (*spec.ControllerGetCapabilitiesResponse, error) {
	reply := &spec.ControllerGetCapabilitiesResponse{}
	for _, t := range []spec.ControllerServiceCapability_RPC_Type{
		spec.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		spec.ControllerServiceCapability_RPC_LIST_VOLUMES,
		spec.ControllerServiceCapability_RPC_GET_CAPACITY,
		spec.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		spec.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		spec.ControllerServiceCapability_RPC_CLONE_VOLUME,
		spec.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		spec.ControllerServiceCapability_RPC_GET_VOLUME,
		spec.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		spec.ControllerServiceCapability_RPC_MODIFY_VOLUME,
		spec.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		spec.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		spec.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	} {
		reply.Capabilities = append(reply.Capabilities, &spec.ControllerServiceCapability{
			Type: &spec.ControllerServiceCapability_Rpc{Rpc: &spec.ControllerServiceCapability_RPC{Type: t}}})
	}
	return reply, nil
}

// nameMax is what the specification gives a name.
const nameMax = 128

// checkName says what is wrong with a name that an orchestrator gives.
func checkName(name string) error {
	switch {
	case name == "":
		return missing("name")
	case len(name) > nameMax:
		return invalid("the name has %d bytes: must be at most %d", len(name), nameMax)
	}
	for _, r := range name {
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f {
			return invalid("the name %q has a control character", name)
		}
	}
	return nil
}

// topology is where the volumes of this node are.
func (d *Driver) topology() []*spec.Topology {
	return []*spec.Topology{{Segments: map[string]string{TopologyKey: d.config.NodeID}}}
}

// here says whether a topology may be this node.
func (d *Driver) here(t *spec.Topology) bool {
	node, ok := t.GetSegments()[TopologyKey]
	return !ok || node == d.config.NodeID
}

// checkTopology wants this node among those where a volume may be.
func (d *Driver) checkTopology(r *spec.TopologyRequirement) error {
	nodes := r.GetRequisite()
	if len(nodes) == 0 {
		nodes = r.GetPreferred()
	}
	if len(nodes) == 0 || slices.ContainsFunc(nodes, d.here) {
		return nil
	}
	var names []string
	for _, t := range nodes {
		names = append(names, t.GetSegments()[TopologyKey])
	}
	return status.Errorf(codes.ResourceExhausted, "the volume is wanted on %s, and this is the driver of node %s: use volumeBindingMode WaitForFirstConsumer and a provisioner on each node", strings.Join(names, ", "), d.config.NodeID)
}

// choosePool gives the pool of that name, or the only one.
func choosePool(ctx context.Context, c *control.Client, node, name string) (*controlpb.Pool, error) {
	l, err := c.Pools.List(ctx, &controlpb.ListPoolsRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range l.GetPools() {
		if p.GetName() == name {
			return p, nil
		}
		names = append(names, p.GetName())
	}
	switch {
	case len(names) == 0:
		return nil, status.Errorf(codes.ResourceExhausted, "node %s has no pool: make one with `ashlar pool create`", node)
	case name != "":
		return nil, status.Errorf(codes.ResourceExhausted, "node %s has no pool %s, but %s", node, name, strings.Join(names, ", "))
	case len(names) > 1:
		return nil, invalid("node %s has several pools: name one with the parameter pool: %s", node, strings.Join(names, ", "))
	case len(names[0]) > poolMax:
		return nil, invalid("pool %s: the names of pools for volumes have at most %d characters", names[0], poolMax)
	}
	return l.GetPools()[0], nil
}

// findName gives the volume of that name in any pool, nil if there is none.
func findName(ctx context.Context, c *control.Client, name string) (*controlpb.Volume, error) {
	l, err := c.Pools.List(ctx, &controlpb.ListPoolsRequest{})
	if err != nil {
		return nil, err
	}
	for _, p := range l.GetPools() {
		v, err := c.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: p.GetName(), Name: name})
		if err == nil {
			return v, nil
		}
		if !errors.Is(err, control.ErrNotFound) {
			return nil, err
		}
	}
	return nil, nil
}

// volume gives the volume of an id, which must be one of this node.
func (d *Driver) volume(ctx context.Context, id string) (*controlpb.Volume, error) {
	client, err := d.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	i, err := ParseVolumeID(id)
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "volume %q: not found: %v", id, err)
	}
	if !onNode(i.Node, d.config.NodeID) {
		return nil, foreign("volume "+id, i.Node, d.config.NodeID)
	}
	return client.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: i.Pool, Name: i.Volume})
}

func (d *Driver) volumeID(v *controlpb.Volume) string {
	return VolumeID{d.config.NodeID, v.GetPool(), v.GetName()}.String()
}

// message is a volume as the orchestrator knows it.
func (d *Driver) message(v *controlpb.Volume) *spec.Volume {
	m := &spec.Volume{VolumeId: d.volumeID(v), CapacityBytes: int64(usable(v)), AccessibleTopology: d.topology()}
	source := v.GetLabels()[labelSource]
	if _, err := ParseSnapshotID(source); err == nil {
		m.ContentSource = &spec.VolumeContentSource{Type: &spec.VolumeContentSource_Snapshot{
			Snapshot: &spec.VolumeContentSource_SnapshotSource{SnapshotId: source}}}
	} else if _, err := ParseVolumeID(source); err == nil {
		m.ContentSource = &spec.VolumeContentSource{Type: &spec.VolumeContentSource_Volume{
			Volume: &spec.VolumeContentSource_VolumeSource{VolumeId: source}}}
	}
	return m
}

// CreateVolume implements spec.ControllerServer.
func (c *controller) CreateVolume(ctx context.Context, r *spec.CreateVolumeRequest) (*spec.CreateVolumeResponse, error) {
	d := c.driver
	if err := checkName(r.GetName()); err != nil {
		return nil, err
	}
	fsType, mounted, err := checkCapabilities(r.GetVolumeCapabilities())
	if err != nil {
		return nil, err
	}
	p, err := parseParameters(r.GetParameters(), r.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	if fsType != "" && p.fsType != "" && fsType != p.fsType {
		return nil, invalid("the parameter fsType is %s, and the volume capability asks for %s", p.fsType, fsType)
	}
	if mounted && p.fsType == "" {
		p.fsType = fsType
	}
	var least uint64
	if mounted {
		least = filesystems[p.fsType] // 0 of the default
	}
	if err := d.checkTopology(r.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	name := nameOf(r.GetName(), volumeNameMax)
	client, unlock, err := d.locked(ctx, volumeKey(name))
	if err != nil {
		return nil, err
	}
	defer unlock()

	source := sourceID(r.GetVolumeContentSource())
	old, err := findName(ctx, client, name)
	if err != nil {
		return nil, err
	}
	if old != nil {
		if what := d.differs(old, r, &p, source); what != "" {
			return nil, status.Errorf(codes.AlreadyExists, "volume %s exists in pool %s, with %s", r.GetName(), old.GetPool(), what)
		}
		return d.created(old, r, &p), nil
	}
	v, err := c.make(ctx, client, name, source, least, r, &p)
	if err != nil {
		return nil, err
	}
	return d.created(v, r, &p), nil
}

func (d *Driver) created(v *controlpb.Volume, r *spec.CreateVolumeRequest, p *parameters) *spec.CreateVolumeResponse {
	m := d.message(v)
	m.VolumeContext = p.context()
	m.ContentSource = r.GetVolumeContentSource()
	return &spec.CreateVolumeResponse{Volume: m}
}

// differs says in what a volume is not what a request asks for; "" when it is.
func (d *Driver) differs(v *controlpb.Volume, r *spec.CreateVolumeRequest, p *parameters, source string) string {
	labels := v.GetLabels()
	switch {
	case labels[labelName] != r.GetName():
		return "another name, since the driver did not make it"
	case p.pool != "" && p.pool != v.GetPool():
		return "another pool than " + p.pool
	case !fits(usable(v), r.GetCapacityRange()):
		return "another size"
	case labels[labelSource] != source:
		return "another content source"
	case labels[labelParameters] != p.fingerprint():
		return "other parameters"
	}
	return ""
}

// sourceID is the id of the snapshot or volume to copy, "" for none.
func sourceID(s *spec.VolumeContentSource) string {
	if s.GetSnapshot() != nil {
		return s.GetSnapshot().GetSnapshotId()
	}
	return s.GetVolume().GetVolumeId()
}

// make makes the volume of a request, which is not there.
func (c *controller) make(ctx context.Context, client *control.Client, name, source string, least uint64, r *spec.CreateVolumeRequest, p *parameters) (*controlpb.Volume, error) {
	d := c.driver
	labels := maps.Clone(p.labels)
	labels[labelName], labels[labelParameters] = r.GetName(), p.fingerprint()
	if p.encrypted {
		labels[labelEncrypted] = "true"
	}
	if r.GetVolumeContentSource() != nil {
		labels[labelSource] = source
		return c.copy(ctx, client, name, least, r, p, labels)
	}
	labels[labelBlank] = "true"
	size, err := sizeOf(r.GetCapacityRange(), least)
	if err != nil {
		return nil, err
	}
	pool, err := choosePool(ctx, client, d.config.NodeID, p.pool)
	if err != nil {
		return nil, err
	}
	if pool.GetState() == controlpb.PoolState_POOL_STATE_ONLINE && pool.GetAvailableBytes() < sizeMin {
		return nil, status.Errorf(codes.ResourceExhausted, "volume %s: no space left (%s); grow the pool, add a device, or delete snapshots or volumes", r.GetName(), figures(pool))
	}
	v, err := client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{
		Pool: pool.GetName(), Name: name, SizeBytes: provisioned(size, p.encrypted), Thick: p.thick, Labels: labels, Limits: p.limits,
	})
	return v, spaceProblem(ctx, client, pool.GetName(), err)
}

// DeleteVolume implements spec.ControllerServer.
func (c *controller) DeleteVolume(ctx context.Context, r *spec.DeleteVolumeRequest) (*spec.DeleteVolumeResponse, error) {
	d := c.driver
	if r.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	id, err := ParseVolumeID(r.GetVolumeId())
	if err != nil {
		return &spec.DeleteVolumeResponse{}, nil // no volume ever had that id
	}
	if !onNode(id.Node, d.config.NodeID) {
		return nil, foreign("volume "+r.GetVolumeId(), id.Node, d.config.NodeID)
	}
	client, unlock, err := d.locked(ctx, volumeKey(id.Volume))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.dropClones(ctx, client, id.Pool, id.Volume); err != nil && !errors.Is(err, control.ErrNotFound) {
		return nil, err
	}
	_, err = client.Volumes.Delete(ctx, &controlpb.DeleteVolumeRequest{Pool: id.Pool, Name: id.Volume})
	if errors.Is(err, control.ErrNotFound) {
		if err := poolThere(ctx, client, id.Pool, "volume "+r.GetVolumeId(), id.Node, "PersistentVolume"); err != nil {
			return nil, err
		}
		return &spec.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &spec.DeleteVolumeResponse{}, nil
}

// poolThere refuses to call what is not found gone when its pool is not there: it comes
// back with the pool. object is what the orchestrator has of it.
func poolThere(ctx context.Context, c *control.Client, pool, what, node, object string) error {
	_, err := c.Pools.Get(ctx, &controlpb.GetPoolRequest{Name: pool})
	if errors.Is(err, control.ErrNotFound) {
		return status.Errorf(codes.FailedPrecondition, "%s: node %s does not have pool %s now, so it may exist: import the pool, or delete the %s by hand", what, node, pool, object)
	}
	return err
}

// ValidateVolumeCapabilities implements spec.ControllerServer.
func (c *controller) ValidateVolumeCapabilities(ctx context.Context, r *spec.ValidateVolumeCapabilitiesRequest) (*spec.ValidateVolumeCapabilitiesResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume id")
	case len(r.GetVolumeCapabilities()) == 0:
		return nil, missing("volume capabilities")
	}
	if _, err := c.driver.volume(ctx, r.GetVolumeId()); err != nil {
		return nil, err
	}
	_, _, err := checkCapabilities(r.GetVolumeCapabilities())
	if err == nil {
		_, err = parseParameters(r.GetParameters(), r.GetMutableParameters())
	}
	if err != nil {
		return &spec.ValidateVolumeCapabilitiesResponse{Message: status.Convert(err).Message()}, nil
	}
	return &spec.ValidateVolumeCapabilitiesResponse{Confirmed: &spec.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: r.GetVolumeContext(), VolumeCapabilities: r.GetVolumeCapabilities(),
		Parameters: r.GetParameters(), MutableParameters: r.GetMutableParameters(),
	}}, nil
}

// volumes lists what the driver made, by id.
func (d *Driver) volumes(ctx context.Context) ([]*controlpb.Volume, error) {
	client, err := d.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	l, err := client.Volumes.List(ctx, &controlpb.ListVolumesRequest{})
	if err != nil {
		return nil, err
	}
	list := slices.DeleteFunc(l.GetVolumes(), func(v *controlpb.Volume) bool { return v.GetLabels()[labelName] == "" })
	slices.SortFunc(list, func(a, b *controlpb.Volume) int { return strings.Compare(d.volumeID(a), d.volumeID(b)) })
	return list, nil
}

// page gives the items of a sorted list from a token on, and the token of the rest.
// A token is the id that the next page begins at or after, so that items may come
// and go between pages.
func page[T any](list []T, id func(T) string, parses func(string) bool, token string, entriesMax int32) ([]T, string, error) {
	if entriesMax < 0 {
		return nil, "", invalid("at most %d entries are wanted: must not be negative", entriesMax)
	}
	if token != "" {
		if !parses(token) {
			return nil, "", status.Errorf(codes.Aborted, "the starting token %q is none that the driver gave: begin again without", token)
		}
		at, _ := slices.BinarySearchFunc(list, token, func(item T, token string) int { return strings.Compare(id(item), token) })
		list = list[at:]
	}
	if entriesMax == 0 || len(list) <= int(entriesMax) {
		return list, "", nil
	}
	return list[:entriesMax], id(list[entriesMax]), nil
}

func isVolumeID(id string) bool   { _, err := ParseVolumeID(id); return err == nil }
func isSnapshotID(id string) bool { _, err := ParseSnapshotID(id); return err == nil }

// ListVolumes implements spec.ControllerServer.
func (c *controller) ListVolumes(ctx context.Context, r *spec.ListVolumesRequest) (*spec.ListVolumesResponse, error) {
	list, err := c.driver.volumes(ctx)
	if err != nil {
		return nil, err
	}
	list, next, err := page(list, c.driver.volumeID, isVolumeID, r.GetStartingToken(), r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	reply := &spec.ListVolumesResponse{NextToken: next}
	for _, v := range list {
		reply.Entries = append(reply.Entries, &spec.ListVolumesResponse_Entry{Volume: c.driver.message(v), Status: &spec.ListVolumesResponse_VolumeStatus{}})
	}
	return reply, nil
}

// ControllerGetVolume implements spec.ControllerServer.
func (c *controller) ControllerGetVolume(ctx context.Context, r *spec.ControllerGetVolumeRequest) (*spec.ControllerGetVolumeResponse, error) {
	if r.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	v, err := c.driver.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &spec.ControllerGetVolumeResponse{Volume: c.driver.message(v), Status: &spec.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

// GetCapacity implements spec.ControllerServer. A pool that does not exist here has
// none, so that the scheduler looks elsewhere.
func (c *controller) GetCapacity(ctx context.Context, r *spec.GetCapacityRequest) (*spec.GetCapacityResponse, error) {
	p, err := parseParameters(r.GetParameters(), nil)
	if err != nil {
		return nil, err
	}
	if t := r.GetAccessibleTopology(); t != nil && !c.driver.here(t) {
		return &spec.GetCapacityResponse{}, nil
	}
	if len(r.GetVolumeCapabilities()) > 0 {
		if _, _, err := checkCapabilities(r.GetVolumeCapabilities()); err != nil {
			return &spec.GetCapacityResponse{}, nil
		}
	}
	client, err := c.driver.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	pool, err := choosePool(ctx, client, c.driver.config.NodeID, p.pool)
	if err != nil {
		if code := status.Code(err); code == codes.ResourceExhausted || code == codes.InvalidArgument {
			return &spec.GetCapacityResponse{}, nil
		}
		return nil, err
	}
	return &spec.GetCapacityResponse{
		AvailableCapacity: int64(capacity(pool, p.thick)), MinimumVolumeSize: wrapperspb.Int64(sizeMin),
	}, nil
}

// capacity is how much volumes of a pool can still be promised: what is available,
// or for thin volumes, where the pool is told a bound, what is left of that.
func capacity(p *controlpb.Pool, thick bool) uint64 {
	if p.GetState() != controlpb.PoolState_POOL_STATE_ONLINE {
		return 0
	}
	if p.GetOverProvisionPercent() == 0 {
		return p.GetAvailableBytes()
	}
	bound := p.GetTotalBytes() / 100 * uint64(p.GetOverProvisionPercent())
	left := bound - min(bound, p.GetProvisionedBytes())
	if thick {
		return min(left, p.GetAvailableBytes())
	}
	return left
}

// ControllerExpandVolume implements spec.ControllerServer. A resizer is one for all
// nodes: a volume of another node is grown there, by NodeExpandVolume.
func (c *controller) ControllerExpandVolume(ctx context.Context, r *spec.ControllerExpandVolumeRequest) (*spec.ControllerExpandVolumeResponse, error) {
	d := c.driver
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume id")
	case r.GetCapacityRange() == nil:
		return nil, missing("capacity range")
	}
	if cp := r.GetVolumeCapability(); cp != nil {
		if err := checkCapability(cp); err != nil {
			return nil, err
		}
	}
	size, err := sizeOf(r.GetCapacityRange(), 0)
	if err != nil {
		return nil, err
	}
	id, err := ParseVolumeID(r.GetVolumeId())
	if err == nil && !onNode(id.Node, d.config.NodeID) {
		return &spec.ControllerExpandVolumeResponse{CapacityBytes: int64(size), NodeExpansionRequired: true}, nil
	}
	client, v, unlock, err := d.lockedVolume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if v, err = grow(ctx, client, v, size, r.GetCapacityRange()); err != nil {
		return nil, err
	}
	return &spec.ControllerExpandVolumeResponse{CapacityBytes: int64(usable(v)), NodeExpansionRequired: true}, nil
}

// grow makes a volume at least as large as size, as its user sees it. It never makes
// one smaller.
func grow(ctx context.Context, c *control.Client, v *controlpb.Volume, size uint64, r *spec.CapacityRange) (*controlpb.Volume, error) {
	now := usable(v)
	if limit := r.GetLimitBytes(); limit > 0 && now > uint64(limit) {
		return nil, outOfRange("volume %s has %d bytes, more than the %d allowed: volumes do not shrink", v.GetName(), now, limit)
	}
	if size <= now {
		return v, nil
	}
	grown, err := c.Volumes.Resize(ctx, &controlpb.ResizeVolumeRequest{
		Pool: v.GetPool(), Name: v.GetName(), SizeBytes: provisioned(size, v.GetLabels()[labelEncrypted] != ""),
	})
	return grown, spaceProblem(ctx, c, v.GetPool(), err)
}

// ControllerModifyVolume implements spec.ControllerServer. A resizer asks for volumes
// of all nodes: one of another node is not available here, and its own driver will do
// it; a final error would be taken for the end of the change.
func (c *controller) ControllerModifyVolume(ctx context.Context, r *spec.ControllerModifyVolumeRequest) (*spec.ControllerModifyVolumeResponse, error) {
	d := c.driver
	if r.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	if _, err := parseLimits(nil, r.GetMutableParameters()); err != nil {
		return nil, err
	}
	client, v, unlock, err := d.lockedVolume(ctx, r.GetVolumeId())
	if other := (*foreignError)(nil); errors.As(err, &other) {
		return nil, status.Error(codes.Unavailable, other.Error())
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	limits, err := parseLimits(v.GetLimits(), r.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	if _, err := client.Volumes.SetLimits(ctx, &controlpb.SetLimitsRequest{Pool: v.GetPool(), Name: v.GetName(), Limits: limits}); err != nil {
		return nil, err
	}
	return &spec.ControllerModifyVolumeResponse{}, nil
}
