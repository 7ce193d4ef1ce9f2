package daemon

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/engine"
)

func TestServeLimitsVolumes(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		ctx := t.Context()
		request := &controlpb.CreateVolumeRequest{Name: "data", SizeBytes: 4 * mib, Limits: &controlpb.Limits{Iops: 7}}
		if v, err := n.client.Volumes.Create(ctx, request); err != nil || v.GetLimits().GetIops() != 7 {
			t.Fatalf("%v, %v", v, err)
		}
		var told *control.Error
		if _, err := n.client.Volumes.Create(ctx, request); !errors.As(err, &told) || !told.SameSpec {
			t.Errorf("the same again: %v", err)
		}
		request.Limits = nil
		if _, err := n.client.Volumes.Create(ctx, request); !errors.As(err, &told) || told.SameSpec {
			t.Errorf("the same without limits: %v", err)
		}
		limits := &controlpb.Limits{Iops: 100, BandwidthBytes: 8 * mib}
		if v, err := n.client.Volumes.SetLimits(ctx, &controlpb.SetLimitsRequest{Pool: "default", Name: "data", Limits: limits}); err != nil || !proto.Equal(v.GetLimits(), limits) {
			t.Errorf("%v, %v", v, err)
		}
		if v, err := n.client.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Name: "data"}); err != nil || !proto.Equal(v.GetLimits(), limits) {
			t.Errorf("%v, %v", v, err)
		}
		if l, err := n.client.Volumes.List(ctx, &controlpb.ListVolumesRequest{}); err != nil || len(l.GetVolumes()) != 1 || !proto.Equal(l.GetVolumes()[0].GetLimits(), limits) {
			t.Errorf("%v, %v", l, err)
		}
		if _, err := n.client.Volumes.SetLimits(ctx, &controlpb.SetLimitsRequest{Name: "none"}); !errors.Is(err, control.ErrNotFound) {
			t.Error(err)
		}
		if v, err := n.client.Volumes.SetLimits(ctx, &controlpb.SetLimitsRequest{Name: "data"}); err != nil || v.GetLimits() != nil {
			t.Errorf("%v, %v", v, err)
		}
		if layout != nil {
			return
		}
		_, err := n.client.Volumes.SetLimits(ctx, &controlpb.SetLimitsRequest{Name: "data", Limits: &controlpb.Limits{BandwidthBytes: 1}})
		if !errors.Is(err, control.ErrInvalid) || !strings.Contains(err.Error(), "4096") {
			t.Error(err)
		}
		// Under a client, and over a restart.
		if _, err := n.client.Volumes.SetLimits(ctx, &controlpb.SetLimitsRequest{Name: "data", Limits: &controlpb.Limits{Iops: 50}}); err != nil {
			t.Fatal(err)
		}
		for _, when := range []string{"at once", "after a restart"} {
			c := n.dial("data")
			began := time.Now()
			for range 30 {
				if err := c.Write(ctx, make([]byte, 4096), 0, 0); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(began); took < 400*time.Millisecond {
				t.Errorf("%s: 30 requests at 50 a second took %v", when, took)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			n.closedVolumes()
			n.stop()
			n.start()
		}
	})
}

func TestServeKeepsGroupsOfVolumes(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		ctx := t.Context()
		n.volume("a", mib)
		n.volume("b", 2*mib)
		request := &controlpb.CreateGroupRequest{Name: "s", Volumes: []string{"b", "a"}, Labels: map[string]string{"k": "l"}}
		r, err := n.client.Snapshots.CreateGroup(ctx, request)
		if err != nil || len(r.GetSnapshots()) != 2 || r.GetSnapshots()[0].GetVolume() != "b" || r.GetSnapshots()[1].GetLabels()["k"] != "l" {
			t.Fatalf("%v, %v", r, err)
		}
		var told *control.Error
		if _, err := n.client.Snapshots.CreateGroup(ctx, request); !errors.As(err, &told) || told.Reason != control.ErrExists || !told.SameSpec {
			t.Errorf("the same again: %v", err)
		}
		n.volume("c", mib)
		for _, test := range []struct {
			volumes []string
			want    error
		}{{[]string{"a", "c"}, control.ErrExists}, {nil, control.ErrInvalid}, {[]string{"c", "none"}, control.ErrNotFound}} {
			_, err := n.client.Snapshots.CreateGroup(ctx, &controlpb.CreateGroupRequest{Name: "s", Volumes: test.volumes})
			if !errors.As(err, &told) || !errors.Is(err, test.want) || told.SameSpec {
				t.Errorf("%v: %v", test.volumes, err)
			}
		}
		if _, err := n.client.Snapshots.CreateGroup(ctx, &controlpb.CreateGroupRequest{Name: "t", Volumes: []string{"c", "c"}}); !errors.Is(err, control.ErrInvalid) {
			t.Error(err)
		}
		if l, err := n.client.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{}); err != nil || len(l.GetSnapshots()) != 2 {
			t.Errorf("%v, %v", l, err)
		}
	})
}
