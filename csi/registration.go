package csi

import (
	"context"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registrar tells the kubelet, which finds its socket, about the driver.
type registrar struct {
	registration.UnimplementedRegistrationServer
	driver   *Driver
	endpoint string // path of the driver's socket as the kubelet sees it
}

func (d *Driver) registration(path string) *registrar {
	if d.config.KubeletEndpoint != "" {
		path = d.config.KubeletEndpoint
	}
	return &registrar{driver: d, endpoint: path}
}

func (r *registrar) register(s *grpc.Server) { registration.RegisterRegistrationServer(s, r) }

// GetInfo implements registration.RegistrationServer. The version is that of the
// protocol between kubelet and driver, which is older than the specification's.
func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: Name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus implements registration.RegistrationServer.
func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.driver.log.Info("registered with the kubelet", "endpoint", r.endpoint)
	} else {
		r.driver.log.Error("the kubelet refused the driver", "endpoint", r.endpoint, "error", s.GetError())
	}
	return &registration.RegistrationStatusResponse{}, nil
}
