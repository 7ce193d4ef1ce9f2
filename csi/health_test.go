package csi

import (
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestHealth(t *testing.T) {
	r := newRig(t, nil)
	v := r.create("v", gib, nil)
	reason := func() string {
		t.Helper()
		h, err := r.NodeGetVolumeHealth(t.Context(), &spec.NodeGetVolumeHealthRequest{VolumeId: v.GetVolumeId()})
		if err != nil {
			t.Fatal(err)
		}
		l, err := r.ControllerListVolumeHealth(t.Context(), &spec.ControllerListVolumeHealthRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if len(l.GetEntries()) != min(1, len(h.GetVolumeHealth().GetHealthStatuses())) {
			t.Errorf("%v is listed as %v", h, l)
		}
		text := ""
		for _, s := range h.GetVolumeHealth().GetHealthStatuses() {
			text += s.GetReason() + " "
		}
		return strings.TrimSpace(text)
	}
	p := r.daemon.pools["default"]
	for _, tt := range []struct {
		want  string
		state controlpb.PoolState
	}{
		{"", controlpb.PoolState_POOL_STATE_ONLINE}, {"PoolReadOnly", controlpb.PoolState_POOL_STATE_READ_ONLY},
		{"PoolStopped", controlpb.PoolState_POOL_STATE_STOPPED}, {"PoolUnavailable", controlpb.PoolState_POOL_STATE_UNAVAILABLE},
	} {
		p.State, p.Reason = tt.state, "for a test"
		if got := reason(); got != tt.want {
			t.Errorf("%v: %q", tt.state, got)
		}
	}
	p.State, p.AvailableBytes = controlpb.PoolState_POOL_STATE_ONLINE, gib
	if got := reason(); got != "PoolNearlyFull" {
		t.Errorf("nearly full: %q", got)
	}
	p.AvailableBytes = p.TotalBytes
	for state, want := range map[controlpb.DeviceState]string{controlpb.DeviceState_DEVICE_STATE_WAITING: "DeviceWaiting", controlpb.DeviceState_DEVICE_STATE_FAILED: "DeviceFailed"} {
		r.daemon.devices["default/v"] = &controlpb.Device{Path: "/dev/fake1", Pool: "default", Volume: "v", State: state}
		if got := reason(); got != want {
			t.Errorf("%v: %q", state, got)
		}
	}
	delete(r.daemon.devices, "default/v")
	_, err := r.ControllerListVolumeHealth(t.Context(), &spec.ControllerListVolumeHealthRequest{StartingToken: "x"})
	want(t, "a wrong token", err, codes.Aborted, "token")
}
