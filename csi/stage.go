package csi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/mount-utils"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// stagedNode is the file in the staging directory of a block volume that the
// device's node is bound to: a mount, so that the kernel remembers.
const stagedNode = "device"

// staging is a volume on its way to a staging path.
type staging struct {
	driver *Driver
	client *control.Client
	volume *controlpb.Volume
	path   string // the staging path

	block, readOnly bool
	fsType          string
	mountFlags      []string
	mkfsOptions     []string
	via             controlpb.Via
	passphrase      string
}

// newStaging reads a request.
func (d *Driver) newStaging(client *control.Client, v *controlpb.Volume, r *spec.NodeStageVolumeRequest) (*staging, error) {
	c, context := r.GetVolumeCapability(), r.GetVolumeContext()
	via, ok := vias[context[keyVia]]
	if !ok {
		return nil, invalid("volume context via %q: must be ublk, nbd or fuse", context[keyVia])
	}
	s := &staging{
		driver: d, client: client, volume: v, path: r.GetStagingTargetPath(), block: c.GetBlock() != nil, readOnly: readOnly(c),
		fsType: c.GetMount().GetFsType(), mountFlags: slices.Clone(c.GetMount().GetMountFlags()),
		mkfsOptions: strings.Fields(context[keyMkfsOptions]), via: via, passphrase: r.GetSecrets()[secretPassphrase],
	}
	if s.fsType == "" {
		s.fsType = context[keyFSType]
	}
	if s.fsType == "" {
		s.fsType = defaultFilesystem
	}
	if filesystems[s.fsType] == 0 {
		return nil, invalid("filesystem %q: must be ext4 or xfs", s.fsType)
	}
	if s.fsType == "xfs" {
		s.mountFlags = append(s.mountFlags, "nouuid") // a clone has the UUID of its source
	}
	if s.readOnly {
		s.mountFlags = append(s.mountFlags, "ro")
	}
	return s, nil
}

func (s *staging) encrypted() bool { return s.volume.GetLabels()[labelEncrypted] != "" }
func (s *staging) blank() bool     { return s.volume.GetLabels()[labelBlank] != "" }

// attached gives the device that a volume is attached as, nil when it is not.
func attached(ctx context.Context, c *control.Client, pool, volume string) (*controlpb.Device, error) {
	l, err := c.Devices.List(ctx, &controlpb.ListDevicesRequest{})
	if err != nil {
		return nil, err
	}
	for _, d := range l.GetDevices() {
		if d.GetPool() == pool && d.GetVolume() == volume && d.GetSnapshot() == "" {
			return d, nil
		}
	}
	return nil, nil
}

// stage brings the volume to the staging path. What it has begun and cannot finish,
// it takes back. The caller has the lock of the volume.
func (s *staging) stage(ctx context.Context) (err error) {
	d := s.driver
	dev, err := attached(ctx, s.client, s.volume.GetPool(), s.volume.GetName())
	if err != nil {
		return err
	}
	if s.volume, err = relabel(ctx, s.client, s.volume, map[string]string{labelStaged: "true"}); err != nil {
		return err
	}
	if dev.GetPath() == "" { // not attached, or not yet to the end
		defer func() {
			if err != nil {
				if undo := d.unstage(ctx, s.client, s.volume.GetPool(), s.volume.GetName(), s.path); undo != nil {
					d.log.Warn("a volume that could not be staged stays attached", "volume", s.volume.GetName(), "error", undo)
				}
			}
		}()
		dev, err = s.client.Devices.Attach(ctx, &controlpb.AttachRequest{Source: s.volume.GetPool() + "/" + s.volume.GetName(), Via: s.via})
		if err != nil {
			return err
		}
		d.log.Info("attached", "volume", s.volume.GetName(), "device", dev.GetPath(), "via", dev.GetVia(), "why", dev.GetWhy())
	}
	path := dev.GetPath()
	if s.encrypted() {
		l := d.node.luksOf(s.volume.GetPool(), s.volume.GetName())
		if err := l.open(ctx, path, s.passphrase, s.blank()); err != nil {
			return err
		}
		path = l.path()
	}
	number, err := deviceNumber(path)
	if err != nil {
		return err
	}
	at := s.path
	if s.block {
		at = filepath.Join(s.path, stagedNode)
	}
	now, err := d.node.mountAt(at)
	switch {
	case err != nil:
		return err
	case now != nil && now.device != number:
		return status.Errorf(codes.AlreadyExists, "staging path %s: another device is mounted there", s.path)
	case now != nil && !s.block && now.readOnly != s.readOnly:
		return status.Errorf(codes.AlreadyExists, "staging path %s: the volume is mounted there with other options", s.path)
	case now != nil:
	case s.block:
		err = d.node.bind(path, at, true, nil)
	default:
		err = s.mount(ctx, path)
	}
	if err != nil {
		return err
	}
	s.volume, err = relabel(ctx, s.client, s.volume, map[string]string{labelBlank: ""})
	return err
}

// mount mounts the filesystem of a device, which is made when there is none,
// checked, and grown when the device is larger.
func (s *staging) mount(ctx context.Context, path string) error {
	h := s.driver.node
	if err := os.MkdirAll(s.path, 0o750); err != nil {
		return err
	}
	try := func(mkfsOptions []string) error {
		return h.format.FormatAndMountSensitiveWithFormatOptions(path, s.path, s.fsType, s.mountFlags, nil, mkfsOptions)
	}
	options, err := s.formatOptions(ctx, path)
	if err != nil {
		return err
	}
	err = try(options)
	if err != nil && s.blank() && !s.readOnly {
		// A mkfs that was killed may leave something that looks like a filesystem.
		// Nobody ever had this volume mounted, so there is nothing to lose.
		if _, wipeErr := h.command(ctx, nil, "wipefs", "--all", path); wipeErr == nil {
			err = try(s.mkfsOptions)
		}
	}
	if err != nil {
		return s.mountProblem(ctx, path, err)
	}
	if s.readOnly {
		return nil
	}
	if _, err = h.grow.Resize(path, s.path); err == nil {
		return nil
	}
	// A mounted ext4 grows for a driver with CAP_SYS_RESOURCE only, one that is not
	// mounted for any. It wants to be checked before.
	if undo := h.unmount(s.path); undo != nil {
		return errors.Join(err, undo)
	}
	if s.fsType == "ext4" {
		if err = h.growUnmounted(ctx, path); err == nil {
			err = try(s.mkfsOptions)
		}
	}
	if err != nil {
		return s.mountProblem(ctx, path, fmt.Errorf("growing it: %w", err))
	}
	return nil
}

// mountProblem tells a full pool from a filesystem that cannot be mounted.
func (s *staging) mountProblem(ctx context.Context, path string, err error) error {
	text := fmt.Sprintf("%s on %s: %v", s.fsType, path, err)
	if p, poolErr := s.client.Pools.Get(ctx, &controlpb.GetPoolRequest{Name: s.volume.GetPool()}); poolErr == nil && p.GetAvailableBytes() < sizeMin {
		return status.Errorf(codes.ResourceExhausted, "%s (%s)", text, figures(p))
	}
	if isBusy(path) || strings.Contains(text, "already mounted") || strings.Contains(text, "is in use") { // it may have ended meanwhile
		return status.Errorf(codes.Aborted, "%s: a program that an earlier driver has begun is at work on it; repeat this call when that has ended (%s)", path, text)
	}
	var told mount.MountError
	if errors.As(err, &told) && (told.Type == mount.FilesystemMismatch || told.Type == mount.HasFilesystemErrors) {
		return status.Error(codes.FailedPrecondition, text)
	}
	return status.Error(codes.Internal, text)
}

// unstage takes a volume from its staging path ("": it has none) and detaches it.
// The volume may be gone. The caller has the lock of the volume.
func (d *Driver) unstage(ctx context.Context, c *control.Client, pool, volume, path string) error {
	if path != "" {
		at := filepath.Join(path, stagedNode)
		if err := d.node.unmount(at); err != nil {
			return err
		}
		if err := d.node.unmount(path); err != nil {
			return err
		}
		if s, err := os.Lstat(at); err == nil && s.Mode().IsRegular() && s.Size() == 0 {
			if err := remove(at); err != nil {
				return err
			}
		}
	}
	dev, err := attached(ctx, c, pool, volume)
	if err != nil {
		return err
	}
	if dev != nil {
		if err := d.node.luksOf(pool, volume).close(ctx); err != nil {
			return err
		}
		name := dev.GetPath()
		if name == "" { // one that was interrupted while it was attached or detached
			name = dev.GetSource()
		}
		_, err := c.Devices.Detach(ctx, &controlpb.DetachRequest{Name: name})
		switch {
		case errors.Is(err, control.ErrNotFound):
		case errors.Is(err, control.ErrInUse): // and mounted nowhere, as the caller has seen
			return status.Errorf(codes.Aborted, "volume %s: %v", volume, err)
		case err != nil:
			return err
		}
		d.log.Info("detached", "volume", volume, "device", dev.GetPath())
	}
	v, err := c.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: pool, Name: volume})
	if errors.Is(err, control.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = relabel(ctx, c, v, map[string]string{labelStaged: ""})
	return err
}
