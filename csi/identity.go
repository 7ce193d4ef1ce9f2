package csi

import (
	"context"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

type identity struct {
	spec.UnimplementedIdentityServer
	driver *Driver
}

// GetPluginInfo implements spec.IdentityServer.
func (i *identity) GetPluginInfo(context.Context, *spec.GetPluginInfoRequest) (*spec.GetPluginInfoResponse, error) {
	return &spec.GetPluginInfoResponse{Name: Name, VendorVersion: i.driver.config.Version}, nil
}

// GetPluginCapabilities implements spec.IdentityServer.
func (i *identity) GetPluginCapabilities(context.Context, *spec.GetPluginCapabilitiesRequest) (*spec.GetPluginCapabilitiesResponse, error) {
	services := []spec.PluginCapability_Service_Type{spec.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS}
	if i.driver.config.Mode != ModeNode {
		services = append(services,
			spec.PluginCapability_Service_CONTROLLER_SERVICE,
			spec.PluginCapability_Service_GROUP_CONTROLLER_SERVICE,
			spec.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE,
			spec.PluginCapability_Service_SNAPSHOT_ACCESSIBILITY_CONSTRAINTS)
	}
	reply := &spec.GetPluginCapabilitiesResponse{}
	for _, s := range services {
		reply.Capabilities = append(reply.Capabilities, &spec.PluginCapability{
			Type: &spec.PluginCapability_Service_{Service: &spec.PluginCapability_Service{Type: s}}})
	}
	reply.Capabilities = append(reply.Capabilities, &spec.PluginCapability{
		Type: &spec.PluginCapability_VolumeExpansion_{VolumeExpansion: &spec.PluginCapability_VolumeExpansion{Type: spec.PluginCapability_VolumeExpansion_ONLINE}}})
	return reply, nil
}

// Probe implements spec.IdentityServer. The driver is ready when the daemon
// answers; a driver that is not ready need not be started again.
func (i *identity) Probe(ctx context.Context, _ *spec.ProbeRequest) (*spec.ProbeResponse, error) {
	ready, _ := i.driver.Health(ctx)
	return &spec.ProbeResponse{Ready: wrapperspb.Bool(ready)}, nil
}

// Health says whether the daemon answers, and what is wrong with it in one or
// more lines.
func (d *Driver) Health(ctx context.Context) (ok bool, text string) {
	c, err := d.daemon.client(ctx)
	if err != nil {
		return false, err.Error()
	}
	h, err := c.Node.Health(ctx, &controlpb.HealthRequest{})
	if err != nil {
		return false, err.Error()
	}
	if h.GetState() == controlpb.HealthState_HEALTH_STATE_FAILED {
		text = "the daemon serves nothing"
		for _, reason := range h.GetReasons() {
			text += "\n" + reason
		}
		return true, text // it answers; which calls fail, they say
	}
	return true, "ok"
}
