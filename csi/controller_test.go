package csi

import (
	"strings"
	"sync"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// want fails t unless err has a code, and a text in it.
func want(t *testing.T, what string, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("%s: %v; want %v with %q", what, err, code, text)
	}
}

func TestWrongRequestsOfTheControllerAreRefused(t *testing.T) {
	r := newRig(t, nil)
	ctx := t.Context()
	v := r.create("there", gib, nil)
	foreignID := VolumeID{"node-2", "default", "there"}.String()
	foreignSnapshot := SnapshotID{"node-2", "default", "there", "s"}.String()
	absent := VolumeID{"node-1", "default", "absent"}.String()
	type request = spec.CreateVolumeRequest
	for _, tt := range []struct {
		name   string
		change func(*request)
		code   codes.Code
		text   string
	}{
		{"no name", func(q *request) { q.Name = "" }, codes.InvalidArgument, "no name"},
		{"a name of 300 characters", func(q *request) { q.Name = strings.Repeat("n", 300) }, codes.InvalidArgument, "300 bytes"},
		{"a name with a control character", func(q *request) { q.Name = "a\x07" }, codes.InvalidArgument, "control character"},
		{"no capabilities", func(q *request) { q.VolumeCapabilities = nil }, codes.InvalidArgument, "capabilities"},
		{"an unknown parameter", func(q *request) { q.Parameters = map[string]string{"replicas": "3"} }, codes.InvalidArgument, "pool, fsType, encrypted"},
		{"an unknown mutable parameter", func(q *request) { q.MutableParameters = map[string]string{"fsType": "xfs"} }, codes.InvalidArgument, "iopsLimit, bandwidthLimit"},
		{"two filesystems", func(q *request) {
			q.Parameters = map[string]string{"fsType": "xfs"}
			q.VolumeCapabilities = []*spec.VolumeCapability{mountCapability("ext4")}
		}, codes.InvalidArgument, "fsType is xfs"},
		{"size 0", func(q *request) { q.CapacityRange = &spec.CapacityRange{} }, codes.OutOfRange, "size is 0"},
		{"a negative size", func(q *request) { q.CapacityRange.RequiredBytes = -4096 }, codes.OutOfRange, "negative"},
		{"a huge size", func(q *request) { q.CapacityRange.RequiredBytes = 1 << 60 }, codes.OutOfRange, "at most"},
		{"an xfs too small", func(q *request) {
			q.Parameters = map[string]string{"fsType": "xfs"}
			q.CapacityRange = &spec.CapacityRange{RequiredBytes: 1, LimitBytes: 100 * mib}
		}, codes.OutOfRange, "needs 314572800"},
		{"an unknown pool", func(q *request) { q.Parameters = map[string]string{"pool": "nowhere"} }, codes.ResourceExhausted, "no pool nowhere"},
		{"an unknown node", func(q *request) {
			q.AccessibilityRequirements = &spec.TopologyRequirement{Requisite: []*spec.Topology{{Segments: map[string]string{TopologyKey: "node-9"}}}}
		}, codes.ResourceExhausted, "node-9"},
		{"more than the pool has", func(q *request) {
			q.Parameters = map[string]string{"thick": "true"}
			q.CapacityRange.RequiredBytes = 1 << 40
		}, codes.ResourceExhausted, "available"},
		{"a snapshot that never was", func(q *request) { q.VolumeContentSource = fromSnapshot("nonsense") }, codes.NotFound, "nonsense"},
		{"a snapshot that is gone", func(q *request) {
			q.VolumeContentSource = fromSnapshot(SnapshotID{"node-1", "default", "there", "gone"}.String())
		}, codes.NotFound, "gone"},
		{"a snapshot of another node", func(q *request) { q.VolumeContentSource = fromSnapshot(foreignSnapshot) }, codes.ResourceExhausted, "node-2"},
		{"a volume that is gone", func(q *request) { q.VolumeContentSource = fromVolume(absent) }, codes.NotFound, "absent"},
		{"a source that is none", func(q *request) { q.VolumeContentSource = &spec.VolumeContentSource{} }, codes.InvalidArgument, "neither"},
		{"a copy in another pool", func(q *request) {
			q.VolumeContentSource = fromVolume(v.GetVolumeId())
			q.Parameters = map[string]string{"pool": "other"}
		}, codes.InvalidArgument, "cannot be made in pool other"},
		{"an encrypted copy of a plain volume", func(q *request) {
			q.VolumeContentSource = fromVolume(v.GetVolumeId())
			q.Parameters = map[string]string{"encrypted": "true"}
		}, codes.InvalidArgument, "encrypted=false"},
		{"a copy too small", func(q *request) {
			q.VolumeContentSource = fromVolume(v.GetVolumeId())
			q.CapacityRange = &spec.CapacityRange{RequiredBytes: mib, LimitBytes: 2 * mib}
		}, codes.OutOfRange, "the source has"},
	} {
		q := &request{Name: "new", VolumeCapabilities: []*spec.VolumeCapability{mountCapability("")}, CapacityRange: &spec.CapacityRange{RequiredBytes: gib}}
		tt.change(q)
		_, err := r.CreateVolume(ctx, q)
		want(t, tt.name, err, tt.code, tt.text)
	}

	for _, tt := range []struct {
		name string
		call func() error
		code codes.Code
		text string
	}{
		{"delete nothing", func() error { _, err := r.DeleteVolume(ctx, &spec.DeleteVolumeRequest{}); return err }, codes.InvalidArgument, "volume id"},
		{"delete another node's", func() error {
			_, err := r.DeleteVolume(ctx, &spec.DeleteVolumeRequest{VolumeId: foreignID})
			return err
		}, codes.FailedPrecondition, "node-2"},
		{"delete in a pool that is closed", func() error {
			_, err := r.DeleteVolume(ctx, &spec.DeleteVolumeRequest{VolumeId: VolumeID{"node-1", "closed", "v"}.String()})
			return err
		}, codes.FailedPrecondition, "import the pool"},
		{"delete a snapshot in a pool that is closed", func() error {
			_, err := r.DeleteSnapshot(ctx, &spec.DeleteSnapshotRequest{SnapshotId: SnapshotID{"node-1", "closed", "v", "s"}.String()})
			return err
		}, codes.FailedPrecondition, "import the pool, or delete the VolumeSnapshotContent"},
		{"delete a group snapshot in a pool that is closed", func() error {
			_, err := r.DeleteVolumeGroupSnapshot(ctx, &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: GroupID{"node-1", "closed", "g"}.String()})
			return err
		}, codes.FailedPrecondition, "import the pool, or delete the VolumeGroupSnapshotContent"},
		{"expand nothing", func() error {
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{})
			return err
		}, codes.InvalidArgument, "volume id"},
		{"expand to nothing", func() error {
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId()})
			return err
		}, codes.InvalidArgument, "capacity range"},
		{"expand to 0", func() error {
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &spec.CapacityRange{}})
			return err
		}, codes.OutOfRange, "0"},
		{"shrink", func() error {
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &spec.CapacityRange{RequiredBytes: mib, LimitBytes: 2 * mib}})
			return err
		}, codes.OutOfRange, "do not shrink"},
		{"expand for many nodes", func() error {
			c := mountCapability("")
			c.AccessMode.Mode = spec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &spec.CapacityRange{RequiredBytes: gib}, VolumeCapability: c})
			return err
		}, codes.InvalidArgument, "one node"},
		{"expand what is gone", func() error {
			_, err := r.ControllerExpandVolume(ctx, &spec.ControllerExpandVolumeRequest{VolumeId: absent, CapacityRange: &spec.CapacityRange{RequiredBytes: gib}})
			return err
		}, codes.NotFound, "absent"},
		{"modify nothing", func() error {
			_, err := r.ControllerModifyVolume(ctx, &spec.ControllerModifyVolumeRequest{})
			return err
		}, codes.InvalidArgument, "volume id"},
		{"modify with an unknown parameter", func() error {
			_, err := r.ControllerModifyVolume(ctx, &spec.ControllerModifyVolumeRequest{VolumeId: v.GetVolumeId(), MutableParameters: map[string]string{"pool": "x"}})
			return err
		}, codes.InvalidArgument, "iopsLimit"},
		{"modify what is gone", func() error {
			_, err := r.ControllerModifyVolume(ctx, &spec.ControllerModifyVolumeRequest{VolumeId: absent})
			return err
		}, codes.NotFound, "absent"},
		{"modify another node's", func() error {
			_, err := r.ControllerModifyVolume(ctx, &spec.ControllerModifyVolumeRequest{VolumeId: foreignID})
			return err
		}, codes.Unavailable, "node-2"},
		{"modify nonsense", func() error {
			_, err := r.ControllerModifyVolume(ctx, &spec.ControllerModifyVolumeRequest{VolumeId: "nonsense"})
			return err
		}, codes.NotFound, "nonsense"},
		{"validate nothing", func() error {
			_, err := r.ValidateVolumeCapabilities(ctx, &spec.ValidateVolumeCapabilitiesRequest{})
			return err
		}, codes.InvalidArgument, "volume id"},
		{"get nothing", func() error { _, err := r.ControllerGetVolume(ctx, &spec.ControllerGetVolumeRequest{}); return err }, codes.InvalidArgument, "volume id"},
		{"a wrong token", func() error {
			_, err := r.ListVolumes(ctx, &spec.ListVolumesRequest{StartingToken: "5"})
			return err
		}, codes.Aborted, "token"},
		{"a negative page", func() error { _, err := r.ListVolumes(ctx, &spec.ListVolumesRequest{MaxEntries: -1}); return err }, codes.InvalidArgument, "negative"},
		{"capacity with an unknown parameter", func() error {
			_, err := r.GetCapacity(ctx, &spec.GetCapacityRequest{Parameters: map[string]string{"x": "y"}})
			return err
		}, codes.InvalidArgument, "known are"},
		{"a snapshot of nothing", func() error { _, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "s"}); return err }, codes.InvalidArgument, "source volume id"},
		{"a snapshot without a name", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{SourceVolumeId: v.GetVolumeId()})
			return err
		}, codes.InvalidArgument, "name"},
		{"a snapshot with a parameter", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId(), Parameters: map[string]string{"keep": "1d"}})
			return err
		}, codes.InvalidArgument, "takes none"},
		{"a snapshot elsewhere", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId(),
				AccessibilityRequirements: &spec.TopologyRequirement{Preferred: []*spec.Topology{{Segments: map[string]string{TopologyKey: "node-9"}}}}})
			return err
		}, codes.ResourceExhausted, "node-9"},
		{"a snapshot of a deleted volume", func() error {
			_, err := r.CreateSnapshot(ctx, &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: absent})
			return err
		}, codes.NotFound, "absent"},
		{"delete no snapshot", func() error { _, err := r.DeleteSnapshot(ctx, &spec.DeleteSnapshotRequest{}); return err }, codes.InvalidArgument, "snapshot id"},
		{"delete another node's snapshot", func() error {
			_, err := r.DeleteSnapshot(ctx, &spec.DeleteSnapshotRequest{SnapshotId: foreignSnapshot})
			return err
		}, codes.FailedPrecondition, "node-2"},
		{"get no snapshot", func() error { _, err := r.GetSnapshot(ctx, &spec.GetSnapshotRequest{}); return err }, codes.InvalidArgument, "snapshot id"},
		{"health of nothing", func() error {
			_, err := r.ControllerGetVolumeHealth(ctx, &spec.ControllerGetVolumeHealthRequest{})
			return err
		}, codes.InvalidArgument, "volume id"},
		{"health of what is gone", func() error {
			_, err := r.ControllerGetVolumeHealth(ctx, &spec.ControllerGetVolumeHealthRequest{VolumeId: absent})
			return err
		}, codes.NotFound, "absent"},
	} {
		want(t, tt.name, tt.call(), tt.code, tt.text)
	}
	if n := len(r.daemon.volumes); n != 1 {
		t.Errorf("%d volumes are left, of 1", n)
	}
	for _, s := range r.daemon.snapshots {
		if len(s) > 0 {
			t.Errorf("snapshots are left: %v", s)
		}
	}
}

func fromSnapshot(id string) *spec.VolumeContentSource {
	return &spec.VolumeContentSource{Type: &spec.VolumeContentSource_Snapshot{Snapshot: &spec.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *spec.VolumeContentSource {
	return &spec.VolumeContentSource{Type: &spec.VolumeContentSource_Volume{Volume: &spec.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

func TestCreateIsIdempotentAndTellsOtherSpecs(t *testing.T) {
	r := newRig(t, nil)
	r.daemon.pool("other", gib)
	base := func() *spec.CreateVolumeRequest {
		return &spec.CreateVolumeRequest{
			Name: "größe 1/2", VolumeCapabilities: []*spec.VolumeCapability{mountCapability("")}, CapacityRange: &spec.CapacityRange{RequiredBytes: 100 * mib},
			Parameters: map[string]string{"pool": "default", "iopsLimit": "100", "csi.storage.k8s.io/pvc/name": "data"},
		}
	}
	made, err := r.CreateVolume(t.Context(), base())
	if err != nil {
		t.Fatal(err)
	}
	v := r.daemon.volumes["default/"+nameOf("größe 1/2", volumeNameMax)]
	if v.GetLabels()[labelName] != "größe 1/2" || v.GetLabels()["csi.storage.k8s.io/pvc/name"] != "data" || v.GetLimits().GetIops() != 100 {
		t.Errorf("the volume is %v", v)
	}
	again, err := r.CreateVolume(t.Context(), base())
	if err != nil || again.String() != made.String() {
		t.Errorf("again: %v, %v; want %v", again, err, made)
	}
	for name, change := range map[string]func(*spec.CreateVolumeRequest){
		"size": func(q *spec.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = gib },
		"limit": func(q *spec.CreateVolumeRequest) {
			q.CapacityRange.RequiredBytes, q.CapacityRange.LimitBytes = mib, 2*mib
		},
		"pool":       func(q *spec.CreateVolumeRequest) { q.Parameters["pool"] = "other" },
		"parameters": func(q *spec.CreateVolumeRequest) { q.Parameters["fsType"] = "xfs" },
		"source":     func(q *spec.CreateVolumeRequest) { q.VolumeContentSource = fromSnapshot("s1/n/p/v/s") },
	} {
		q := base()
		change(q)
		_, err := r.CreateVolume(t.Context(), q)
		want(t, name, err, codes.AlreadyExists, "exists in pool default")
	}
	// One that an operator made.
	if _, err := r.daemon.create(&controlpb.Volume{Pool: "default", Name: "mine", SizeBytes: gib}); err != nil {
		t.Fatal(err)
	}
	q := base()
	q.Name = "mine"
	_, err = r.CreateVolume(t.Context(), q)
	want(t, "an operator's volume", err, codes.AlreadyExists, "did not make it")
}

func TestManyCreateTheSame(t *testing.T) {
	r := newRig(t, nil)
	var group sync.WaitGroup
	ids := make(chan string, 200)
	for range 8 {
		group.Go(func() { // ends with its calls
			for range 20 {
				reply, err := r.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "one", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}})
				switch status.Code(err) {
				case codes.OK:
					ids <- reply.GetVolume().GetVolumeId()
				case codes.Aborted:
				default:
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	close(ids)
	seen := map[string]bool{}
	for id := range ids {
		seen[id] = true
	}
	if len(seen) != 1 || len(r.daemon.volumes) != 1 {
		t.Errorf("ids %v, %d volumes", seen, len(r.daemon.volumes))
	}
}

func TestDeleteIsIdempotent(t *testing.T) {
	r := newRig(t, nil)
	v := r.create("v", gib, nil)
	for range 3 {
		if _, err := r.DeleteVolume(t.Context(), &spec.DeleteVolumeRequest{VolumeId: v.GetVolumeId()}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.DeleteVolume(t.Context(), &spec.DeleteVolumeRequest{VolumeId: "never/was"}); err != nil {
		t.Error(err)
	}
	v = r.create("used", gib, nil)
	r.daemon.devices["default/used"] = &controlpb.Device{Path: "/dev/fake9"}
	_, err := r.DeleteVolume(t.Context(), &spec.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
	want(t, "delete of a volume in use", err, codes.FailedPrecondition, "in use")
	delete(r.daemon.devices, "default/used")
	if _, err := r.CreateSnapshot(t.Context(), &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId()}); err != nil {
		t.Fatal(err)
	}
	_, err = r.DeleteVolume(t.Context(), &spec.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
	want(t, "delete of a volume with snapshots", err, codes.FailedPrecondition, "has snapshots")
}

func TestExpandAndModify(t *testing.T) {
	r := newRig(t, nil)
	v := r.create("v", gib, nil)
	expand := func(id string, to int64) *spec.ControllerExpandVolumeResponse {
		t.Helper()
		e, err := r.ControllerExpandVolume(t.Context(), &spec.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &spec.CapacityRange{RequiredBytes: to}})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	for _, to := range []int64{2 * gib, 2 * gib, gib} { // repeated, and smaller
		if e := expand(v.GetVolumeId(), to); e.GetCapacityBytes() != 2*gib || !e.GetNodeExpansionRequired() {
			t.Errorf("%d: %v", to, e)
		}
	}
	// A volume of another node is grown there.
	if e := expand("v1/node-2/default/v", 3*gib); e.GetCapacityBytes() != 3*gib || !e.GetNodeExpansionRequired() {
		t.Errorf("elsewhere: %v", e)
	}
	for _, tt := range []struct {
		given map[string]string
		iops  uint64
		bytes uint64
	}{
		{map[string]string{"iopsLimit": "2k"}, 2000, 0},
		{map[string]string{"bandwidthLimit": "1MiB"}, 2000, mib},
		{map[string]string{"iopsLimit": "0"}, 0, mib},
		{map[string]string{"bandwidthLimit": "0"}, 0, 0},
	} {
		if _, err := r.ControllerModifyVolume(t.Context(), &spec.ControllerModifyVolumeRequest{VolumeId: v.GetVolumeId(), MutableParameters: tt.given}); err != nil {
			t.Fatal(err)
		}
		if l := r.daemon.volumes["default/v"].GetLimits(); l.GetIops() != tt.iops || l.GetBandwidthBytes() != tt.bytes {
			t.Errorf("%v: %v", tt.given, l)
		}
	}
	r.daemon.pools["default"].OverProvisionPercent = 100
	_, err := r.ControllerExpandVolume(t.Context(), &spec.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &spec.CapacityRange{RequiredBytes: 1 << 40}})
	want(t, "more than the pool", err, codes.ResourceExhausted, "of 100GiB available")
}

func TestEncryptedVolumesHaveTheSizeAskedFor(t *testing.T) {
	r := newRig(t, nil)
	encrypt := func(q *spec.CreateVolumeRequest) { q.Parameters = map[string]string{"encrypted": "true"} }
	v := r.create("v", gib, encrypt)
	if v.GetCapacityBytes() != gib || r.daemon.volumes["default/v"].GetSizeBytes() != gib+luksHeader || v.GetVolumeContext()[keyEncrypted] != "true" {
		t.Errorf("%v of %v", v, r.daemon.volumes["default/v"])
	}
	s, err := r.CreateSnapshot(t.Context(), &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId()})
	if err != nil || s.GetSnapshot().GetSizeBytes() != gib {
		t.Errorf("snapshot %v, %v", s, err)
	}
	c := r.create("c", gib, func(q *spec.CreateVolumeRequest) {
		encrypt(q)
		q.VolumeContentSource = fromSnapshot(s.GetSnapshot().GetSnapshotId())
		q.CapacityRange = nil
	})
	if c.GetCapacityBytes() != gib || r.daemon.volumes["default/c"].GetLabels()[labelEncrypted] == "" {
		t.Errorf("%v", c)
	}
	_, err = r.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "d", VolumeCapabilities: []*spec.VolumeCapability{blockCapability()}, VolumeContentSource: fromVolume(v.GetVolumeId())})
	want(t, "a plain copy", err, codes.InvalidArgument, "encrypted=true")
}
