package csi

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// node mounts volumes. What it does on the host it does to the end, even when the
// caller has gone: a mkfs that is cut leaves a half-made filesystem. A repeated call
// is told ABORTED until then.
type node struct {
	spec.UnimplementedNodeServer
	driver *Driver
}

// NodeGetCapabilities implements spec.NodeServer.
func (n *node) NodeGetCapabilities(context.Context, *spec.NodeGetCapabilitiesRequest) (*spec.NodeGetCapabilitiesResponse, error) {
	reply := &spec.NodeGetCapabilitiesResponse{}
	for _, t := range []spec.NodeServiceCapability_RPC_Type{
		spec.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		spec.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		spec.NodeServiceCapability_RPC_EXPAND_VOLUME,
		spec.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		spec.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		spec.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	} {
		reply.Capabilities = append(reply.Capabilities, &spec.NodeServiceCapability{
			Type: &spec.NodeServiceCapability_Rpc{Rpc: &spec.NodeServiceCapability_RPC{Type: t}}})
	}
	return reply, nil
}

// NodeGetInfo implements spec.NodeServer.
func (n *node) NodeGetInfo(context.Context, *spec.NodeGetInfoRequest) (*spec.NodeGetInfoResponse, error) {
	return &spec.NodeGetInfoResponse{NodeId: n.driver.config.NodeID, AccessibleTopology: n.driver.topology()[0]}, nil
}

// NodeStageVolume implements spec.NodeServer.
func (n *node) NodeStageVolume(ctx context.Context, r *spec.NodeStageVolumeRequest) (*spec.NodeStageVolumeResponse, error) {
	d := n.driver
	if err := needs("volume id", r.GetVolumeId(), "staging target path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	if err := absolute("staging target path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	if err := checkCapability(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	client, v, unlock, err := d.lockedVolume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if r.GetVolumeContext()[keyEncrypted] == "true" && v.GetLabels()[labelEncrypted] == "" {
		return nil, status.Errorf(codes.FailedPrecondition, "volume %s was not made encrypted: encrypted volumes are made by the driver", r.GetVolumeId())
	}
	s, err := d.newStaging(client, v, r)
	if err != nil {
		return nil, err
	}
	if err := s.stage(context.WithoutCancel(ctx)); err != nil {
		return nil, err
	}
	return &spec.NodeStageVolumeResponse{}, nil
}

// devices gives the numbers of what a volume is used through: the attached device,
// and the plain one of LUKS; the last is the one to mount. None: it is not attached.
func (d *Driver) devices(dev *controlpb.Device, pool, volume string) ([]device, error) {
	if dev.GetPath() == "" {
		return nil, nil
	}
	number, err := deviceNumber(dev.GetPath())
	if err != nil {
		return nil, err
	}
	list := []device{number}
	if l := d.node.luksOf(pool, volume); l.isOpen() {
		plain, err := deviceNumber(l.path())
		if err != nil {
			return nil, err
		}
		list = append(list, plain)
	}
	return list, nil
}

// attachedDevices is devices of a volume, however it is attached.
func (d *Driver) attachedDevices(ctx context.Context, c *control.Client, pool, volume string) ([]device, error) {
	dev, err := attached(ctx, c, pool, volume)
	if err != nil {
		return nil, err
	}
	return d.devices(dev, pool, volume)
}

// ownID reads the id of a volume of this node, which may be gone.
func (d *Driver) ownID(volume string) (VolumeID, error) {
	id, err := ParseVolumeID(volume)
	if err != nil || !onNode(id.Node, d.config.NodeID) {
		return VolumeID{}, status.Errorf(codes.NotFound, "volume %q: not found on node %s", volume, d.config.NodeID)
	}
	return id, nil
}

// NodeUnstageVolume implements spec.NodeServer.
func (n *node) NodeUnstageVolume(ctx context.Context, r *spec.NodeUnstageVolumeRequest) (*spec.NodeUnstageVolumeResponse, error) {
	d := n.driver
	if err := needs("volume id", r.GetVolumeId(), "staging target path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	id, err := d.ownID(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	client, unlock, err := d.locked(ctx, volumeKey(id.Volume))
	if err != nil {
		return nil, err
	}
	defer unlock()
	ctx = context.WithoutCancel(ctx)
	numbers, err := d.attachedDevices(ctx, client, id.Pool, id.Volume)
	if err != nil {
		return nil, err
	}
	used, err := d.node.mountsOf(numbers...)
	if err != nil {
		return nil, err
	}
	path := resolved(r.GetStagingTargetPath())
	for _, m := range used {
		if m.path != path && m.path != filepath.Join(path, stagedNode) {
			return nil, status.Errorf(codes.FailedPrecondition, "volume %s: in use, mounted at %s", r.GetVolumeId(), m.path)
		}
	}
	if err := d.unstage(ctx, client, id.Pool, id.Volume, r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	return &spec.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume implements spec.NodeServer.
func (n *node) NodePublishVolume(ctx context.Context, r *spec.NodePublishVolumeRequest) (*spec.NodePublishVolumeResponse, error) {
	d := n.driver
	if err := needs("volume id", r.GetVolumeId(), "target path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := absolute("target path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := checkCapability(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	if r.GetStagingTargetPath() == "" {
		return nil, status.Error(codes.FailedPrecondition, "the request has no staging target path: stage the volume first")
	}
	client, v, unlock, err := d.lockedVolume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	ctx = context.WithoutCancel(ctx)
	numbers, err := d.attachedDevices(ctx, client, v.GetPool(), v.GetName())
	if err != nil {
		return nil, err
	}
	return &spec.NodePublishVolumeResponse{}, n.publish(r, numbers)
}

// publish binds what is staged to the target path. The caller has the lock of the
// volume.
func (n *node) publish(r *spec.NodePublishVolumeRequest, numbers []device) error {
	h := n.driver.node
	block := r.GetVolumeCapability().GetBlock() != nil
	staged := r.GetStagingTargetPath()
	if block {
		staged = filepath.Join(staged, stagedNode)
	}
	from, err := h.mountAt(staged)
	if err != nil {
		return err
	}
	if from == nil || len(numbers) == 0 || from.device != numbers[len(numbers)-1] || from.block != block {
		return status.Errorf(codes.FailedPrecondition, "volume %s is not staged at %s: stage it first", r.GetVolumeId(), r.GetStagingTargetPath())
	}
	ro := r.GetReadonly() || readOnly(r.GetVolumeCapability())
	used, err := h.mountsOf(numbers...)
	if err != nil {
		return err
	}
	target := resolved(r.GetTargetPath())
	for _, m := range used {
		if m.path == target {
			if m.readOnly != ro && !block {
				return status.Errorf(codes.AlreadyExists, "target path %s: the volume is mounted there, with readonly=%t", target, m.readOnly)
			}
			return nil
		}
		if m.path != from.path && r.GetVolumeCapability().GetAccessMode().GetMode() == spec.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
			return status.Errorf(codes.FailedPrecondition, "volume %s has a single writer, and is mounted at %s", r.GetVolumeId(), m.path)
		}
	}
	if there, err := h.mountAt(target); err != nil || there != nil {
		if err != nil {
			return err
		}
		return status.Errorf(codes.AlreadyExists, "target path %s: something else is mounted there", target)
	}
	var options []string
	if ro {
		options = append(options, "ro")
	}
	if block {
		return h.bind(staged, r.GetTargetPath(), true, options)
	}
	return h.bind(staged, r.GetTargetPath(), false, append(options, r.GetVolumeCapability().GetMount().GetMountFlags()...))
}

// NodeUnpublishVolume implements spec.NodeServer. It needs nothing of the daemon.
func (n *node) NodeUnpublishVolume(_ context.Context, r *spec.NodeUnpublishVolumeRequest) (*spec.NodeUnpublishVolumeResponse, error) {
	d := n.driver
	if err := needs("volume id", r.GetVolumeId(), "target path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	id, err := d.ownID(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	unlock, err := d.locks.lock(volumeKey(id.Volume))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.node.unmount(r.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := remove(r.GetTargetPath()); err != nil {
		return nil, err
	}
	return &spec.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats implements spec.NodeServer.
func (n *node) NodeGetVolumeStats(ctx context.Context, r *spec.NodeGetVolumeStatsRequest) (*spec.NodeGetVolumeStatsResponse, error) {
	if err := needs("volume id", r.GetVolumeId(), "volume path", r.GetVolumePath()); err != nil {
		return nil, err
	}
	v, err := n.driver.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(r.GetVolumePath()); errors.Is(err, fs.ErrNotExist) {
		return nil, status.Errorf(codes.NotFound, "volume path %s: not found", r.GetVolumePath())
	}
	at, err := n.at(r.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if at.block {
		return &spec.NodeGetVolumeStatsResponse{Usage: []*spec.VolumeUsage{{Unit: spec.VolumeUsage_BYTES, Total: int64(usable(v))}}}, nil
	}
	var s unix.Statfs_t
	if err := unix.Statfs(r.GetVolumePath(), &s); err != nil {
		return nil, status.Errorf(codes.Internal, "volume path %s: %v", r.GetVolumePath(), err)
	}
	return &spec.NodeGetVolumeStatsResponse{Usage: []*spec.VolumeUsage{
		{Unit: spec.VolumeUsage_BYTES, Total: int64(s.Blocks) * int64(s.Bsize), Available: int64(s.Bavail) * int64(s.Bsize), Used: int64(s.Blocks-s.Bfree) * int64(s.Bsize)},
		{Unit: spec.VolumeUsage_INODES, Total: int64(s.Files), Available: int64(s.Ffree), Used: int64(s.Files - s.Ffree)},
	}}, nil
}

// at gives what is mounted at the path of a volume, also when that is the directory
// of a staged block volume.
func (n *node) at(path string) (*mounted, error) {
	for _, p := range []string{path, filepath.Join(path, stagedNode)} {
		m, err := n.driver.node.mountAt(p)
		if err != nil || m != nil {
			return m, err
		}
	}
	return nil, status.Errorf(codes.NotFound, "volume path %s: no volume is mounted there", path)
}

// NodeExpandVolume implements spec.NodeServer. It also grows the volume, if nobody
// has: its resizer may run on another node.
func (n *node) NodeExpandVolume(ctx context.Context, r *spec.NodeExpandVolumeRequest) (*spec.NodeExpandVolumeResponse, error) {
	d := n.driver
	if err := needs("volume id", r.GetVolumeId(), "volume path", r.GetVolumePath()); err != nil {
		return nil, err
	}
	if c := r.GetVolumeCapability(); c != nil {
		if err := checkCapability(c); err != nil {
			return nil, err
		}
	}
	client, v, unlock, err := d.lockedVolume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	at, err := n.at(r.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if r.GetCapacityRange() != nil {
		size, err := sizeOf(r.GetCapacityRange(), 0)
		if err != nil {
			return nil, err
		}
		if v, err = grow(ctx, client, v, size, r.GetCapacityRange()); err != nil {
			return nil, err
		}
	}
	ctx = context.WithoutCancel(ctx)
	dev, err := attached(ctx, client, v.GetPool(), v.GetName())
	if err != nil {
		return nil, err
	}
	if dev.GetPath() == "" {
		return nil, status.Errorf(codes.FailedPrecondition, "volume %s is not attached: stage it first", r.GetVolumeId())
	}
	if err := n.expand(ctx, client, v, dev, at, r.GetVolumePath()); err != nil {
		return nil, err
	}
	return &spec.NodeExpandVolumeResponse{CapacityBytes: int64(usable(v))}, nil
}

// expand has the device, LUKS and the filesystem follow the volume.
func (n *node) expand(ctx context.Context, c *control.Client, v *controlpb.Volume, dev *controlpb.Device, at *mounted, path string) error {
	h := n.driver.node
	if err := awaitSize(ctx, dev.GetPath(), v.GetSizeBytes()); err != nil {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	from := dev.GetPath()
	if l := h.luksOf(v.GetPool(), v.GetName()); l.isOpen() {
		if err := l.resize(ctx); err != nil {
			return err
		}
		from = l.path()
	}
	if at.block || at.readOnly {
		return nil
	}
	return spaceProblem(ctx, c, v.GetPool(), h.growMounted(from, path))
}
