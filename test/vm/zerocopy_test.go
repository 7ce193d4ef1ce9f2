package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestAttachedDiskGoesWithoutACopy runs in an emulated machine with the newest Linux of
// Debian.
func TestAttachedDiskGoesWithoutACopy(t *testing.T) {
	if !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm-new") {
		t.Skip("needs an emulated machine with Linux 7.0 (make test-vm-new does not skip it)")
	}
	testenv.RequireRoot(t)
	binary, err := filepath.Abs("../../bin/ashlar")
	if err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("zerocopy.sh")
	if err != nil {
		t.Fatal(err)
	}
	kills := "3"
	if os.Getenv(longVariable) == "1" {
		kills = "30"
	}
	run := exec.Command("./vm-run.sh", "-r", "trixie", "-t", "900", "-m", "3G", "-K", "2", "-M", "ublk_drv", "--", script, binary, kills)
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	if err := run.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log("\n" + out.String())
}
