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

// orphans runs orphans.sh by the command that runs things where the kernel has the
// driver.
func orphans(t *testing.T, via string, where ...string) {
	script, err := filepath.Abs("orphans.sh")
	if err != nil {
		t.Fatal(err)
	}
	binary, err := filepath.Abs("../../bin/ashlar")
	if err != nil {
		t.Fatal(err)
	}
	args := append(where, script, binary, via)
	run := exec.Command(args[0], args[1:]...)
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	if err := run.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log("\n" + out.String())
}

// TestOrphansOfNBD runs in User Mode Linux.
func TestOrphansOfNBD(t *testing.T) {
	requireGuest(t)
	orphans(t, "nbd", "./uml-run.sh", "-t", "600", "-m", "2500M", "-M", "nbd", "--")
}

// TestOrphansOfUblk runs in an emulated machine with Linux 6.12.
func TestOrphansOfUblk(t *testing.T) {
	if !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm") {
		t.Skip("needs an emulated machine with ublk_drv (make test-vm does not skip it)")
	}
	testenv.RequireRoot(t)
	orphans(t, "ublk", "./vm-run.sh", "-t", "600", "-m", "3G", "-M", "ublk_drv", "--")
}

// TestOrphansOfFUSE runs on this host, in a mount namespace of its own.
func TestOrphansOfFUSE(t *testing.T) {
	if os.Getenv("ASHLAR_INTEROP") != "1" {
		t.Skip("needs bin/ashlar and loop devices (make test-uml does not skip it)")
	}
	testenv.RequireRoot(t)
	if err := exec.Command("losetup", "-f").Run(); err != nil {
		t.Skipf("no loop devices here: losetup -f: %v", err)
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no FUSE here: %v", err)
	}
	_ = f.Close() // nothing is mounted
	orphans(t, "fuse", "timeout", "600", "unshare", "--mount", "--propagation", "private")
}
