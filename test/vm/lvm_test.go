package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// buildRig builds what lvm.sh runs, and returns its folder.
func buildRig(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, args := range [][]string{
		{"build", "-o", filepath.Join(dir, "bars"), "../../benchmarks/bars"},
		{"build", "-o", filepath.Join(dir, "devperf"), "../../benchmarks/devperf"},
		{"test", "-c", "-o", filepath.Join(dir, "harness.test"), "../../benchmarks/harness"},
	} {
		build := exec.Command("go", args...)
		build.Env = append(os.Environ(), "CGO_ENABLED=0") // static, as the guest may be another system one day
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return dir
}

// TestThinVolumesOfLVM runs in an emulated machine with Linux 6.12.
func TestThinVolumesOfLVM(t *testing.T) {
	requireVM(t, "test-vm", "dm-thin-pool")
	testenv.RequireCommand(t, "lvm", "lvm2")
	testenv.RequireCommand(t, "thin_check", "thin-provisioning-tools")
	runScript(t, []string{"./vm-run.sh", "-t", "1800", "-m", "3G", "-K", "2:4G", "-M", "loop", "-e", testenv.TargetVariable, "--"}, "lvm.sh", buildRig(t))
}
