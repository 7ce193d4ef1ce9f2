package csi

import (
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

func TestDaemonAway(t *testing.T) {
	r := newRig(t, nil)
	v := r.create("v", gib, nil)
	r.daemon.stop()
	q := &spec.CreateVolumeRequest{Name: "w", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}}
	_, err := r.CreateVolume(t.Context(), q)
	want(t, "create", err, codes.Unavailable, "daemon")
	_, err = r.NodeStageVolume(t.Context(), &spec.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: "/x", VolumeCapability: blockCapability()})
	want(t, "stage", err, codes.Unavailable, "daemon")
	if p, err := r.Probe(t.Context(), &spec.ProbeRequest{}); err != nil || p.GetReady().GetValue() {
		t.Errorf("probe: %v, %v", p, err)
	}
	if h, err := r.NodeGetStorageHealth(t.Context(), &spec.NodeGetStorageHealthRequest{}); err != nil || len(h.GetBackendHealth()) != 1 || h.GetBackendHealth()[0].GetReason() != "DaemonAway" {
		t.Errorf("health: %v, %v", h, err)
	}
	if _, err := r.NodeGetInfo(t.Context(), &spec.NodeGetInfoRequest{}); err != nil {
		t.Errorf("info needs the daemon: %v", err)
	}
	r.daemon.start(t)
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		if _, err = r.CreateVolume(t.Context(), q); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the daemon is back, and not found: %v", err)
		}
	}
	if p, err := r.Probe(t.Context(), &spec.ProbeRequest{}); err != nil || !p.GetReady().GetValue() {
		t.Errorf("probe: %v, %v", p, err)
	}
}

func TestDriverStartsBeforeTheDaemon(t *testing.T) {
	r := newRig(t, nil)
	r.daemon.stop()
	r.restart()
	_, err := r.ListVolumes(t.Context(), &spec.ListVolumesRequest{})
	want(t, "list", err, codes.Unavailable, "daemon")
	r.daemon.start(t)
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		if _, err = r.ListVolumes(t.Context(), &spec.ListVolumesRequest{}); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		t.Error(err)
	}
}
