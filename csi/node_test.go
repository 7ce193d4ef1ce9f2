package csi

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/mount-utils"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

func TestWrongRequestsOfTheNodeAreRefused(t *testing.T) {
	r := newRig(t, nil)
	ctx := t.Context()
	v := r.create("v", gib, nil).GetVolumeId()
	c := mountCapability("")
	for _, tt := range []struct {
		name string
		call func() error
		code codes.Code
		text string
	}{
		{"stage nothing", func() error { _, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{}); return err }, codes.InvalidArgument, "volume id"},
		{"stage nowhere", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: v})
			return err
		}, codes.InvalidArgument, "staging target path"},
		{"stage a relative path", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: v, StagingTargetPath: "x", VolumeCapability: c})
			return err
		}, codes.InvalidArgument, "absolute"},
		{"stage without capability", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: v, StagingTargetPath: "/x"})
			return err
		}, codes.InvalidArgument, "capability"},
		{"stage a wrong context", func() error {
			_, err := r.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{VolumeId: v, StagingTargetPath: "/x", VolumeCapability: c, VolumeContext: map[string]string{keyFSType: "btrfs"}})
			return err
		}, codes.InvalidArgument, "ext4 or xfs"},
		{"unstage nothing", func() error { _, err := r.NodeUnstageVolume(ctx, &spec.NodeUnstageVolumeRequest{}); return err }, codes.InvalidArgument, "volume id"},
		{"unstage nowhere", func() error {
			_, err := r.NodeUnstageVolume(ctx, &spec.NodeUnstageVolumeRequest{VolumeId: v})
			return err
		}, codes.InvalidArgument, "staging target path"},
		{"unstage nonsense", func() error {
			_, err := r.NodeUnstageVolume(ctx, &spec.NodeUnstageVolumeRequest{VolumeId: "nonsense", StagingTargetPath: "/x"})
			return err
		}, codes.NotFound, "nonsense"},
		{"publish nothing", func() error { _, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{}); return err }, codes.InvalidArgument, "volume id"},
		{"publish nowhere", func() error {
			_, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{VolumeId: v})
			return err
		}, codes.InvalidArgument, "target path"},
		{"publish to a relative path", func() error {
			_, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{VolumeId: v, TargetPath: "x"})
			return err
		}, codes.InvalidArgument, "absolute"},
		{"publish without capability", func() error {
			_, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{VolumeId: v, TargetPath: "/x"})
			return err
		}, codes.InvalidArgument, "capability"},
		{"publish without staging path", func() error {
			_, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{VolumeId: v, TargetPath: "/x", VolumeCapability: c})
			return err
		}, codes.FailedPrecondition, "stage the volume first"},
		{"publish what is not staged", func() error {
			_, err := r.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{VolumeId: v, TargetPath: "/x", StagingTargetPath: "/y", VolumeCapability: c})
			return err
		}, codes.FailedPrecondition, "stage it first"},
		{"unpublish nothing", func() error {
			_, err := r.NodeUnpublishVolume(ctx, &spec.NodeUnpublishVolumeRequest{})
			return err
		}, codes.InvalidArgument, "volume id"},
		{"unpublish nowhere", func() error {
			_, err := r.NodeUnpublishVolume(ctx, &spec.NodeUnpublishVolumeRequest{VolumeId: v})
			return err
		}, codes.InvalidArgument, "target path"},
		{"unpublish another node's", func() error {
			_, err := r.NodeUnpublishVolume(ctx, &spec.NodeUnpublishVolumeRequest{VolumeId: "v1/node-2/default/v", TargetPath: "/x"})
			return err
		}, codes.NotFound, "node-1"},
		{"unpublish a folder with files", func() error {
			full := filepath.Join(r.daemon.dir, "full")
			if err := errors.Join(os.Mkdir(full, 0o755), os.WriteFile(filepath.Join(full, "kept"), nil, 0o600)); err != nil {
				return err
			}
			_, err := r.NodeUnpublishVolume(ctx, &spec.NodeUnpublishVolumeRequest{VolumeId: v, TargetPath: full})
			return err
		}, codes.Internal, "not empty"},
		{"stats of nothing", func() error {
			_, err := r.NodeGetVolumeStats(ctx, &spec.NodeGetVolumeStatsRequest{})
			return err
		}, codes.InvalidArgument, "volume id"},
		{"stats of no path", func() error {
			_, err := r.NodeGetVolumeStats(ctx, &spec.NodeGetVolumeStatsRequest{VolumeId: v})
			return err
		}, codes.InvalidArgument, "volume path"},
		{"expand nothing", func() error { _, err := r.NodeExpandVolume(ctx, &spec.NodeExpandVolumeRequest{}); return err }, codes.InvalidArgument, "volume id"},
		{"expand no path", func() error {
			_, err := r.NodeExpandVolume(ctx, &spec.NodeExpandVolumeRequest{VolumeId: v})
			return err
		}, codes.InvalidArgument, "volume path"},
		{"expand for many nodes", func() error {
			many := mountCapability("")
			many.AccessMode.Mode = spec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
			_, err := r.NodeExpandVolume(ctx, &spec.NodeExpandVolumeRequest{VolumeId: v, VolumePath: "/x", VolumeCapability: many})
			return err
		}, codes.InvalidArgument, "one node"},
		{"expand with a wrong size", func() error {
			_, err := r.NodeExpandVolume(ctx, &spec.NodeExpandVolumeRequest{VolumeId: v, VolumePath: "/", CapacityRange: &spec.CapacityRange{}})
			return err
		}, codes.OutOfRange, "0"},
		{"expand what is not attached", func() error {
			_, err := r.NodeExpandVolume(ctx, &spec.NodeExpandVolumeRequest{VolumeId: v, VolumePath: "/"})
			return err
		}, codes.FailedPrecondition, "not attached"},
	} {
		want(t, tt.name, tt.call(), tt.code, tt.text)
	}
}

// TestStageTakesBackWhatItCannotFinish has the device be none, so that nothing can be
// mounted.
func TestStageTakesBackWhatItCannotFinish(t *testing.T) {
	r := newRig(t, nil)
	v := r.create("v", gib, nil).GetVolumeId()
	_, err := r.NodeStageVolume(t.Context(), &spec.NodeStageVolumeRequest{VolumeId: v, StagingTargetPath: filepath.Join(r.daemon.dir, "staging"), VolumeCapability: mountCapability("")})
	want(t, "stage", err, codes.Internal, "/dev/fake1")
	if len(r.daemon.devices) != 0 || r.daemon.volumes["default/v"].GetLabels()[labelStaged] != "" {
		t.Errorf("left are %v and %v", r.daemon.devices, r.daemon.volumes["default/v"])
	}
	if r.daemon.volumes["default/v"].GetLabels()[labelBlank] == "" {
		t.Error("a volume that was never mounted is not blank any more")
	}
	r.daemon.fail("Devices/Detach", control.Errorf(control.ErrInUse, "device", "/dev/fake2", ""))
	_, err = r.NodeStageVolume(t.Context(), &spec.NodeStageVolumeRequest{VolumeId: v, StagingTargetPath: filepath.Join(r.daemon.dir, "staging"), VolumeCapability: mountCapability("")})
	want(t, "stage", err, codes.Internal, "/dev/fake2")
	if !strings.Contains(r.log.String(), "stays attached") {
		t.Errorf("the log does not tell what is left:\n%s", r.log)
	}
	r.daemon.fail("Devices/Detach", nil)
	for range 2 { // also where there is nothing
		if _, err := r.NodeUnstageVolume(t.Context(), &spec.NodeUnstageVolumeRequest{VolumeId: v, StagingTargetPath: filepath.Join(r.daemon.dir, "staging")}); status.Code(err) != codes.Internal && err != nil {
			t.Error(err)
		}
	}
	delete(r.daemon.devices, "default/v")
	if _, err := r.NodeUnstageVolume(t.Context(), &spec.NodeUnstageVolumeRequest{VolumeId: v, StagingTargetPath: filepath.Join(r.daemon.dir, "staging")}); err != nil {
		t.Error(err)
	}
}

// TestAnEncryptedVolumeIsStagedAndGrown goes through cryptsetup's part of a volume's
// life, with a cryptsetup that only maps a device to itself.
func TestAnEncryptedVolumeIsStagedAndGrown(t *testing.T) {
	testenv.RequireRoot(t)
	var commands []string
	var r *rig
	r = newRig(t, func(c *Config) {
		c.Command = func(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
			if name != "cryptsetup" {
				return execCommand(ctx, stdin, name, args...)
			}
			commands = append(commands, args[0])
			switch args[0] {
			case "luksFormat", "resize":
				return nil, nil
			case "open":
				if string(stdin) != passphrase {
					return nil, exited(t, exitNoPermission)
				}
				return nil, os.Symlink(args[len(args)-2], filepath.Join(r.daemon.dir, args[len(args)-1]))
			case "close":
				return nil, os.Remove(filepath.Join(r.daemon.dir, args[1]))
			}
			return nil, exited(t, 1)
		}
	})
	r.driver.node.mapper = r.daemon.dir
	r.daemon.loops = true
	v := r.create("v", 64*mib, func(q *spec.CreateVolumeRequest) { q.Parameters = map[string]string{"encrypted": "true"} })
	staging := filepath.Join(r.daemon.dir, "staging")
	stage := func(key string) error {
		_, err := r.NodeStageVolume(t.Context(), &spec.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, VolumeCapability: mountCapability("xfs"),
			VolumeContext: map[string]string{}, Secrets: map[string]string{secretPassphrase: key}})
		return err
	}
	want(t, "no key", stage(""), codes.Unauthenticated, "passphrase")
	want(t, "a wrong key", stage("wrong"), codes.Unauthenticated, "does not open it")
	if len(r.daemon.devices) != 0 {
		t.Errorf("left are %v", r.daemon.devices)
	}
	if _, err := r.ControllerExpandVolume(t.Context(), &spec.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &spec.CapacityRange{RequiredBytes: 400 * mib}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := stage(passphrase); err != nil {
			t.Fatal(err)
		}
	}
	// A resizer of another node left it to this one to grow the volume.
	e, err := r.NodeExpandVolume(t.Context(), &spec.NodeExpandVolumeRequest{VolumeId: v.GetVolumeId(), VolumePath: staging, CapacityRange: &spec.CapacityRange{RequiredBytes: 500 * mib}})
	if err != nil || e.GetCapacityBytes() != 500*mib {
		t.Errorf("%v, %v", e, err)
	}
	if got := r.daemon.volumes["default/v"].GetSizeBytes(); got != 500*mib+luksHeader {
		t.Errorf("the volume has %d bytes", got)
	}
	if _, err := r.NodeUnstageVolume(t.Context(), &spec.NodeUnstageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging}); err != nil {
		t.Error(err)
	}
	if got := strings.Join(commands, " "); got != "luksFormat open luksFormat open resize close" {
		t.Errorf("cryptsetup did %s", got)
	}
	if strings.Contains(r.log.String(), "correct-horse") {
		t.Errorf("the key is in the log:\n%s", r.log)
	}
}

// TestAHalfMadeFilesystemIsMadeAgain has a mkfs that was killed leave what looks like
// a filesystem and is none.
func TestAHalfMadeFilesystemIsMadeAgain(t *testing.T) {
	testenv.RequireRoot(t)
	r := newRig(t, nil)
	r.daemon.loops = true
	v := r.create("v", 64*mib, nil)
	staging := filepath.Join(r.daemon.dir, "staging")
	file := r.daemon.file("default", "v")
	half := make([]byte, 4096)
	half[1024+56], half[1024+57] = 0x53, 0xef // an ext superblock's magic, and nothing else
	write := func() {
		if err := os.WriteFile(file, half, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	q := &spec.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, VolumeCapability: mountCapability("ext4")}
	if _, err := r.NodeStageVolume(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	unstage := func() {
		t.Helper()
		if _, err := r.NodeUnstageVolume(t.Context(), &spec.NodeUnstageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging}); err != nil {
			t.Fatal(err)
		}
	}
	unstage()
	// The same on a volume that was used is damage, and is left as it is.
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	write()
	if _, err := r.NodeStageVolume(t.Context(), q); err == nil {
		t.Error("a damaged filesystem is mounted")
	}
	now, err := os.ReadFile(file)
	if err != nil || string(now[:4096]) != string(half) {
		t.Errorf("a damaged filesystem was changed: %v", err)
	}
}

func TestMountsThatCannotBeMadeOrUndone(t *testing.T) {
	h := newHost(mount.NewFakeMounter(nil), execCommand, newRigLog())
	dir := t.TempDir()
	h.table = filepath.Join(dir, "none")
	if _, err := h.mountAt("/x"); err == nil {
		t.Error("mounts without a table")
	}
	if err := h.unmount("/x"); err == nil {
		t.Error("an unmount without a table")
	}
	if _, err := (&node{driver: &Driver{node: h}}).at("/x"); err == nil {
		t.Error("a path without a table")
	}
	// A table in which the mount stays, whatever is done.
	h.table = filepath.Join(dir, "table")
	if err := os.WriteFile(h.table, []byte("30 1 7:1 / "+dir+"/at rw - ext4 /dev/loop1 rw\n31 1 0:5 /loop9 "+dir+"/node ro - devtmpfs devtmpfs rw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.mounter = &mount.FakeMounter{UnmountFunc: func(string) error { return nil }}
	if err := h.unmount(dir + "/at"); err == nil || !strings.Contains(err.Error(), "again and again") {
		t.Errorf("%v", err)
	}
	m, err := h.mountAt(dir + "/at")
	if err != nil || m == nil || m.device != makeDevice(7, 1) || m.block || m.readOnly {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := h.mountAt(dir + "/node"); err != nil || m == nil || m.block || !m.readOnly { // there is no node
		t.Errorf("%+v, %v", m, err)
	}
	failing := &mount.FakeMounter{MountPoints: []mount.MountPoint{{Path: dir + "/at"}}, UnmountFunc: func(string) error { return errors.New("stuck") }}
	h.mounter = failing
	if err := h.unmount(dir + "/at"); err == nil || !strings.Contains(err.Error(), "stuck") {
		t.Errorf("%v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, block := range []bool{true, false} {
		if err := h.bind("/dev/null", filepath.Join(file, "x"), block, nil); err == nil {
			t.Errorf("a mount point in a file, block %t", block)
		}
	}
	failing.MountCheckErrors = nil
	h.mounter = refusing{failing}
	target := filepath.Join(dir, "target")
	if err := h.bind("/dev/null", target, false, nil); err == nil {
		t.Error("a mount that was refused")
	}
	if _, err := os.Stat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mount point stays: %v", err)
	}
	if under("/kubelet-2/x", "/kubelet") || !under("/kubelet/x", "/kubelet/") || under("/x", "") {
		t.Error("a path is not where it seems to be")
	}
	if _, err := deviceNumber(file); err == nil {
		t.Error("a file is a device")
	}
	if _, err := blockSize(filepath.Join(dir, "none")); err == nil {
		t.Error("nothing has a size")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := awaitSize(ctx, file, 4096); err == nil || !strings.Contains(err.Error(), "0 bytes and its volume 4096") {
		t.Errorf("%v", err)
	}
	if err := awaitSize(ctx, filepath.Join(dir, "none"), 4096); err == nil {
		t.Error("nothing has grown")
	}
}

// refusing mounts nothing.
type refusing struct{ mount.Interface }

func (refusing) Mount(string, string, string, []string) error { return errors.New("refused") }

func TestCleaningTriesAgain(t *testing.T) {
	r := newRig(t, nil)
	r.daemon.fail("Devices/List", control.Errorf(control.ErrNotSupported, "", "", ""))
	r.restart()
	waitLog(t, r, "is not looked for")
	r.daemon.fail("Devices/List", control.Errorf(control.ErrIO, "pool", "default", ""))
	r.restart()
	waitLog(t, r, "trying again")
	r.daemon.fail("Devices/List", nil)
	// A device of a volume that is gone, and one of a volume that is busy.
	for name, labels := range map[string]map[string]string{"staged": {labelStaged: "true"}, "operators": nil} {
		if _, err := r.daemon.create(&controlpb.Volume{Pool: "default", Name: name, SizeBytes: gib, Labels: labels}); err != nil {
			t.Fatal(err)
		}
		r.daemon.devices["default/"+name] = &controlpb.Device{Pool: "default", Volume: name, Source: "default/" + name, State: controlpb.DeviceState_DEVICE_STATE_WAITING}
	}
	r.daemon.devices["default/gone"] = &controlpb.Device{Pool: "default", Volume: "gone", Source: "default/gone"}
	r.daemon.devices["other"] = &controlpb.Device{Path: "/dev/fake8", Source: "/some/file"}
	c, err := r.driver.daemon.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := r.driver.locks.lock(volumeKey("staged"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.driver.dropDevices(t.Context(), c); err != nil {
		t.Error(err)
	}
	unlock()
	if r.daemon.devices["default/staged"] == nil || r.daemon.devices["default/gone"] != nil {
		t.Errorf("left are %v", r.daemon.devices)
	}
	r.daemon.fail("Devices/Detach", control.Errorf(control.ErrInUse, "device", "x", ""))
	if err := r.driver.dropDevices(t.Context(), c); err != nil {
		t.Error(err)
	}
	waitLog(t, r, "mounted nowhere stays attached")
	r.daemon.fail("Devices/Detach", nil)
	r.daemon.fail("Volumes/Get", control.Errorf(control.ErrIO, "volume", "staged", ""))
	if err := r.driver.dropDevices(t.Context(), c); err == nil {
		t.Error("a daemon that fails is not told of")
	}
	r.daemon.fail("Volumes/Get", nil)
	if err := r.driver.dropDevices(t.Context(), c); err != nil {
		t.Error(err)
	}
	if len(r.daemon.devices) != 2 {
		t.Errorf("left are %v", r.daemon.devices)
	}
	r.daemon.devices = map[string]*controlpb.Device{}
}
