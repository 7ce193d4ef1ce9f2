package csi

import (
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestFullPoolIsToldWithFigures(t *testing.T) {
	r := newRig(t, nil)
	r.daemon.pools["default"].AvailableBytes = 4096
	_, err := r.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}})
	want(t, "thin", err, codes.ResourceExhausted, "pool default: 4KiB of 100GiB available")
	r.daemon.pools["default"].OverProvisionPercent = 100
	if f := figures(r.daemon.pools["default"]); !strings.Contains(f, "at most 100%") {
		t.Error(f)
	}
	delete(r.daemon.pools, "default")
	_, err = r.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}})
	want(t, "no pool", err, codes.ResourceExhausted, "has no pool: make one")
	r.daemon.pool("a", gib)
	r.daemon.pool("b", gib)
	_, err = r.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}})
	want(t, "two pools", err, codes.InvalidArgument, "a, b")
	delete(r.daemon.pools, "a")
	delete(r.daemon.pools, "b")
	r.daemon.pool(strings.Repeat("p", poolMax+1), gib)
	_, err = r.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}})
	want(t, "a long name", err, codes.InvalidArgument, "at most 20")
}

func TestCapacity(t *testing.T) {
	r := newRig(t, nil)
	p := r.daemon.pools["default"]
	p.AvailableBytes, p.ProvisionedBytes = 10*gib, 150*gib
	get := func(q *spec.GetCapacityRequest) int64 {
		t.Helper()
		c, err := r.GetCapacity(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		return c.GetAvailableCapacity()
	}
	thick := &spec.GetCapacityRequest{Parameters: map[string]string{"thick": "true"}}
	if got := get(&spec.GetCapacityRequest{}); got != 10*gib {
		t.Errorf("thin: %d", got)
	}
	p.OverProvisionPercent = 200
	if got := get(&spec.GetCapacityRequest{}); got != 50*gib {
		t.Errorf("thin, with a bound: %d", got)
	}
	if got := get(thick); got != 10*gib {
		t.Errorf("thick, with a bound: %d", got)
	}
	many := mountCapability("")
	many.AccessMode.Mode = spec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	for name, q := range map[string]*spec.GetCapacityRequest{
		"elsewhere": {AccessibleTopology: &spec.Topology{Segments: map[string]string{TopologyKey: "node-2"}}},
		"no pool":   {Parameters: map[string]string{"pool": "none"}},
		"many":      {VolumeCapabilities: []*spec.VolumeCapability{many}},
	} {
		if got := get(q); got != 0 {
			t.Errorf("%s: %d", name, got)
		}
	}
	p.State = controlpb.PoolState_POOL_STATE_READ_ONLY
	if got := get(&spec.GetCapacityRequest{}); got != 0 {
		t.Errorf("read-only: %d", got)
	}
}
