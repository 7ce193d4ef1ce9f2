package csi

import (
	"context"
	"errors"

	spec "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// conditions says what is wrong with volumes, by what the daemon tells of pools and
// devices.
type conditions struct {
	pools   map[string]*controlpb.Pool
	devices []*controlpb.Device
}

func (d *Driver) conditions(ctx context.Context) (*conditions, error) {
	client, err := d.daemon.client(ctx)
	if err != nil {
		return nil, err
	}
	l, err := client.Pools.List(ctx, &controlpb.ListPoolsRequest{})
	if err != nil {
		return nil, err
	}
	k := &conditions{pools: map[string]*controlpb.Pool{}}
	for _, p := range l.GetPools() {
		k.pools[p.GetName()] = p
	}
	devices, err := client.Devices.List(ctx, &controlpb.ListDevicesRequest{})
	if err != nil && !errors.Is(err, control.ErrNotSupported) {
		return nil, err
	}
	k.devices = devices.GetDevices()
	return k, nil
}

// spaceLow is when a pool is said to be nearly full: below 1/20 of it is available.
const spaceLow = 20

// of gives what is wrong with a volume; nothing for one that is well.
func (k *conditions) of(v *controlpb.Volume) []*spec.VolumeHealth_VolumeHealthEntry {
	var list []*spec.VolumeHealth_VolumeHealthEntry
	add := func(status spec.VolumeHealthErrorType, reason, message string) {
		list = append(list, &spec.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: message})
	}
	p := k.pools[v.GetPool()]
	about := "pool " + v.GetPool()
	if p.GetReason() != "" {
		about += ": " + p.GetReason()
	}
	switch p.GetState() {
	case controlpb.PoolState_POOL_STATE_ONLINE:
		if p.GetAvailableBytes() < p.GetTotalBytes()/spaceLow {
			add(spec.VolumeHealthErrorType_DEGRADED, "PoolNearlyFull", figures(p))
		}
	case controlpb.PoolState_POOL_STATE_READ_ONLY:
		add(spec.VolumeHealthErrorType_DEGRADED, "PoolReadOnly", about)
	case controlpb.PoolState_POOL_STATE_STOPPED:
		add(spec.VolumeHealthErrorType_INACCESSIBLE, "PoolStopped", about)
	default:
		add(spec.VolumeHealthErrorType_INACCESSIBLE, "PoolUnavailable", about)
	}
	for _, dev := range k.devices {
		if dev.GetPool() != v.GetPool() || dev.GetVolume() != v.GetName() || dev.GetSnapshot() != "" {
			continue
		}
		switch dev.GetState() {
		case controlpb.DeviceState_DEVICE_STATE_WAITING:
			add(spec.VolumeHealthErrorType_INACCESSIBLE, "DeviceWaiting", dev.GetPath()+": "+dev.GetReason())
		case controlpb.DeviceState_DEVICE_STATE_FAILED:
			add(spec.VolumeHealthErrorType_INACCESSIBLE, "DeviceFailed", dev.GetPath()+": "+dev.GetReason())
		}
	}
	return list
}

// health is what is wrong with one volume.
func (d *Driver) health(ctx context.Context, id string) (*spec.VolumeHealth, error) {
	if id == "" {
		return nil, missing("volume id")
	}
	v, err := d.volume(ctx, id)
	if err != nil {
		return nil, err
	}
	k, err := d.conditions(ctx)
	if err != nil {
		return nil, err
	}
	return &spec.VolumeHealth{VolumeId: id, HealthStatuses: k.of(v)}, nil
}

// ControllerGetVolumeHealth implements spec.ControllerServer.
func (c *controller) ControllerGetVolumeHealth(ctx context.Context, r *spec.ControllerGetVolumeHealthRequest) (*spec.ControllerGetVolumeHealthResponse, error) {
	h, err := c.driver.health(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &spec.ControllerGetVolumeHealthResponse{VolumeHealth: h}, nil
}

// ControllerListVolumeHealth implements spec.ControllerServer.
func (c *controller) ControllerListVolumeHealth(ctx context.Context, r *spec.ControllerListVolumeHealthRequest) (*spec.ControllerListVolumeHealthResponse, error) {
	volumes, err := c.driver.volumes(ctx)
	if err != nil {
		return nil, err
	}
	k, err := c.driver.conditions(ctx)
	if err != nil {
		return nil, err
	}
	var ill []*spec.VolumeHealth
	for _, v := range volumes {
		if list := k.of(v); len(list) > 0 {
			ill = append(ill, &spec.VolumeHealth{VolumeId: c.driver.volumeID(v), HealthStatuses: list})
		}
	}
	ill, next, err := page(ill, (*spec.VolumeHealth).GetVolumeId, isVolumeID, r.GetStartingToken(), r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	return &spec.ControllerListVolumeHealthResponse{Entries: ill, NextToken: next}, nil
}

// NodeGetVolumeHealth implements spec.NodeServer.
func (n *node) NodeGetVolumeHealth(ctx context.Context, r *spec.NodeGetVolumeHealthRequest) (*spec.NodeGetVolumeHealthResponse, error) {
	h, err := n.driver.health(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &spec.NodeGetVolumeHealthResponse{VolumeHealth: h}, nil
}

// NodeGetStorageHealth implements spec.NodeServer. A daemon that does not answer is
// an answer here.
func (n *node) NodeGetStorageHealth(ctx context.Context, _ *spec.NodeGetStorageHealthRequest) (*spec.NodeGetStorageHealthResponse, error) {
	reply := &spec.NodeGetStorageHealthResponse{}
	add := func(status spec.StorageHealthErrorType, reason, message string) {
		reply.BackendHealth = append(reply.BackendHealth, &spec.NodeGetStorageHealthResponse_StorageBackendHealth{Status: status, Reason: reason, Message: message})
	}
	client, err := n.driver.daemon.client(ctx)
	var h *controlpb.HealthResponse
	if err == nil {
		h, err = client.Node.Health(ctx, &controlpb.HealthRequest{})
	}
	switch {
	case errors.Is(err, control.ErrUnavailable):
		add(spec.StorageHealthErrorType_STORAGE_UNREACHABLE, "DaemonAway", err.Error())
	case err != nil:
		return nil, err
	case h.GetState() == controlpb.HealthState_HEALTH_STATE_FAILED:
		add(spec.StorageHealthErrorType_STORAGE_UNREACHABLE, "PoolsUnavailable", joined(h.GetReasons()))
	case h.GetState() == controlpb.HealthState_HEALTH_STATE_DEGRADED:
		add(spec.StorageHealthErrorType_STORAGE_DEGRADED, "PoolsDegraded", joined(h.GetReasons()))
	}
	return reply, nil
}
