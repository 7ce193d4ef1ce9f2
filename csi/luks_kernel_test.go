package csi

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// requireCrypt skips t where the kernel has no dm-crypt, or cryptsetup is missing;
// where make test-csi has promised both, it fails.
func requireCrypt(t *testing.T) {
	t.Helper()
	testenv.RequireRoot(t)
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0) // the file alone may be one that cryptsetup made
	if err == nil {
		_ = f.Close() // nothing was asked of it
		_, err = exec.LookPath("cryptsetup")
	}
	if err == nil {
		return
	}
	if slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-csi-luks") {
		t.Fatal(err)
	}
	t.Skipf("needs cryptsetup and the kernel's dm-crypt: %v (make test-csi brings a machine with both)", err)
}

// TestEncryptedVolumesOnTheKernelsOwnDMCrypt takes a volume through its life with the
// real cryptsetup: made, written, restarted, grown, and opened by the right key only.
func TestEncryptedVolumesOnTheKernelsOwnDMCrypt(t *testing.T) {
	requireCrypt(t)
	r := newRig(t, nil)
	r.daemon.loops = true
	v := r.create("v", 64*mib, func(q *spec.CreateVolumeRequest) { q.Parameters = map[string]string{"encrypted": "true"} })
	staging := filepath.Join(r.daemon.dir, "staging")
	stage := func(key string) error {
		for deadline := time.Now().Add(wait); ; time.Sleep(50 * time.Millisecond) {
			_, err := r.NodeStageVolume(t.Context(), &spec.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, VolumeCapability: mountCapability("ext4"),
				VolumeContext: v.GetVolumeContext(), Secrets: map[string]string{secretPassphrase: key}})
			if status.Code(err) != codes.Aborted || time.Now().After(deadline) { // a driver that begins looks at the volume, too: the kubelet comes again
				return err
			}
		}
	}
	unstage := func() {
		t.Helper()
		if _, err := r.NodeUnstageVolume(t.Context(), &spec.NodeUnstageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging}); err != nil {
			t.Fatal(err)
		}
	}
	if err := stage(passphrase); err != nil {
		t.Fatal(err)
	}
	plain := bytes.Repeat([]byte("plain text "), 10_000)
	file := filepath.Join(staging, "file")
	if err := os.WriteFile(file, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if err := stage(passphrase); err != nil {
		t.Fatalf("a driver that was started again: %v", err)
	}
	e, err := r.NodeExpandVolume(t.Context(), &spec.NodeExpandVolumeRequest{VolumeId: v.GetVolumeId(), VolumePath: staging, CapacityRange: &spec.CapacityRange{RequiredBytes: 128 * mib}})
	if err != nil || e.GetCapacityBytes() != 128*mib {
		t.Fatalf("expand: %v, %v", e, err)
	}
	stats, err := r.NodeGetVolumeStats(t.Context(), &spec.NodeGetVolumeStatsRequest{VolumeId: v.GetVolumeId(), VolumePath: staging})
	if err != nil || stats.GetUsage()[0].GetTotal() < 100*mib {
		t.Errorf("after it has grown: %v, %v", stats, err)
	}
	unstage()
	if left, _ := filepath.Glob("/dev/mapper/ashlar-*"); len(left) > 0 {
		t.Errorf("mappings are left: %v", left)
	}
	stored, err := os.ReadFile(r.daemon.file("default", "v"))
	if err != nil || bytes.Contains(stored, []byte("plain text plain text")) {
		t.Errorf("the volume has what was written, as it was: %v", err)
	}
	dump, err := exec.Command("cryptsetup", "luksDump", r.daemon.file("default", "v")).CombinedOutput()
	if n := regexp.MustCompile(`Memory:\s+(\d+)`).FindSubmatch(dump); err != nil || n == nil {
		t.Errorf("what opening takes is not known: %v\n%s", err, dump)
	} else if kib, err := strconv.Atoi(string(n[1])); err != nil || kib > luksMemory {
		t.Errorf("opening takes %s KiB of memory, want at most %d", n[1], luksMemory)
	}
	want(t, "a wrong key", stage("wrong"), codes.Unauthenticated, "does not open it")
	want(t, "half of the key", stage(passphrase[:strings.IndexByte(passphrase, '\n')]), codes.Unauthenticated, "does not open it")
	if len(r.daemon.devices) != 0 {
		t.Errorf("devices are left: %v", r.daemon.devices)
	}
	if err := stage(passphrase); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("the file does not hold what was written: %v", err)
	}
	unstage()
	if strings.Contains(r.log.String(), "correct-horse") {
		t.Errorf("the key is in the log:\n%s", r.log)
	}
}
