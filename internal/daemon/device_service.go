package daemon

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
)

// devicesService serves control.v1.Devices.
type devicesService struct {
	controlpb.UnimplementedDevicesServer
	*controller
}

// Bounds of what can be asked of a device.
const (
	deviceQueuesMax = 64
	deviceDepthMax  = 1024
)

// devicePatience bounds the making and removing of a device, whatever its client does:
// writing back what is cached takes its time.
const devicePatience = 2 * time.Minute

// whole is a context for work that is done to its end even when the client goes, since
// half a device is worse than a device: it ends with the daemon.
func (s *devicesService) whole(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, done := context.WithTimeout(context.WithoutCancel(ctx), devicePatience)
	ctx, cancel := s.until(ctx)
	return ctx, func() { cancel(); done() }
}

func (s *devicesService) Attach(ctx context.Context, r *controlpb.AttachRequest) (*controlpb.Device, error) {
	if r.GetQueues() > deviceQueuesMax {
		return nil, control.Errorf(control.ErrInvalid, "device", r.GetSource(), "%d queues: want at most %d", r.GetQueues(), deviceQueuesMax)
	}
	if r.GetDepth() > deviceDepthMax {
		return nil, control.Errorf(control.ErrInvalid, "device", r.GetSource(), "depth %d: want at most %d", r.GetDepth(), deviceDepthMax)
	}
	ctx, cancel := s.whole(ctx)
	defer cancel()
	a, err := s.devices.attach(ctx, r.GetSource(), r.GetVia(), deviceOptions{queues: int(r.GetQueues()), depth: int(r.GetDepth()), readOnly: r.GetReadOnly()})
	if err != nil {
		return nil, s.ending("device", r.GetSource(), err)
	}
	return s.devices.message(a), nil
}

func (s *devicesService) Detach(ctx context.Context, r *controlpb.DetachRequest) (*controlpb.DetachResponse, error) {
	ctx, cancel := s.whole(ctx)
	defer cancel()
	m, err := s.devices.detach(ctx, r.GetName(), r.GetForce())
	if err != nil {
		return nil, s.ending("device", r.GetName(), err)
	}
	return &controlpb.DetachResponse{Device: m}, nil
}

func (s *devicesService) List(ctx context.Context, _ *controlpb.ListDevicesRequest) (*controlpb.ListDevicesResponse, error) {
	reply := &controlpb.ListDevicesResponse{}
	for _, a := range s.devices.all() {
		reply.Devices = append(reply.Devices, s.devices.message(a))
	}
	left, err := s.devices.left(ctx)
	if err != nil {
		s.devices.log.Warn("the kernel's devices cannot all be listed", "error", err)
	}
	for _, l := range left {
		if !l.served {
			reply.Devices = append(reply.Devices, s.devices.leftMessage(l))
		}
	}
	reply.Support = s.devices.support()
	return reply, nil
}

// support says of each way whether it works here, and else why not.
func (d *devices) support() (list []*controlpb.ViaSupport) {
	for _, via := range d.order {
		support := &controlpb.ViaSupport{Via: via, Available: true}
		if err := d.ways[via].supported(); err != nil {
			support.Available, support.Reason = false, whyNot(err)
		} else if w, ok := d.ways[via].(interface{ remark() string }); ok {
			support.Reason = w.remark()
		}
		list = append(list, support)
	}
	return list
}

// message describes a device.
func (d *devices) message(a *attachedDevice) *controlpb.Device {
	m := &controlpb.Device{
		Path: a.path(), Via: a.via, Why: a.why, Source: a.source.name, ReadOnly: a.readOnly, Attached: stamp(a.since),
	}
	if n, ok := a.attachment.(interface{ note() string }); ok {
		m.Why = strings.TrimPrefix(m.Why+"; "+n.note(), "; ")
	}
	if x := a.source.exported; x != nil {
		m.Pool, m.Volume, m.Snapshot = x.pool, x.volume, x.snapshot
	}
	queues, depth := a.shape()
	m.Queues, m.Depth = uint32(queues), uint32(depth)
	m.State, m.Reason = a.state()
	d.mu.Lock()
	resized := a.resized
	d.mu.Unlock()
	if resized != nil && m.Reason == "" {
		m.Reason = "the volume has grown, and the device has not: " + resized.Error()
	}
	fill(m)
	return m
}

func (d *devices) leftMessage(l leftDevice) *controlpb.Device {
	m := &controlpb.Device{
		Path: l.path, Via: l.via, State: controlpb.DeviceState_DEVICE_STATE_WAITING, Reason: errNoSource.Error(),
		Source: d.links.sources()[l.path],
	}
	d.mu.Lock()
	if d.retrying {
		m.Reason = "it is not taken over yet, or " + m.GetReason()
	}
	d.mu.Unlock()
	fill(m)
	return m
}

// fill adds what the kernel knows of a device.
func fill(m *controlpb.Device) {
	b, err := blockdev.Kernel().Device(filepath.Base(m.GetPath()))
	if err != nil {
		return // on its way out
	}
	m.SizeBytes, m.Major, m.Minor, m.Mounts, m.Holders = b.Size, b.Major, b.Minor, b.Mounts, b.Holders
}
