package vm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// longVariable set to 1 asks for more repetitions.
const longVariable = "ASHLAR_TEST_LONG"

// seedVariable repeats what fsstress did.
const seedVariable = "ASHLAR_TEST_SEED"

// Limits of one guest. They are waited for only when a test fails.
const (
	guestLimit     = 4 * time.Minute
	guestLimitLong = 15 * time.Minute // 50 restarts on each of two file systems
)

// requireGuest skips t outside make test-uml and returns the path of the binary under
// test.
func requireGuest(t *testing.T) (binary string) {
	t.Helper()
	if os.Getenv("ASHLAR_INTEROP") != "1" {
		t.Skip("needs bin/ashlar and a guest kernel (make test-uml does not skip it)")
	}
	testenv.RequireRoot(t)
	for command, debianPackage := range map[string]string{
		"linux.uml": "user-mode-linux", "nbd-client": "nbd-client", "mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs",
		"fio": "fio", "fstrim": "util-linux", "modprobe": "kmod",
	} {
		testenv.RequireCommand(t, command, debianPackage)
	}
	binary, err := filepath.Abs(binaryPath)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v; make test-uml builds it", err)
	}
	return binary
}

// stressVariable tells devices.sh where the program of test/fsstress is.
const stressVariable = "FSSTRESS"

// buildStress builds the program of test/fsstress, and returns its path.
func buildStress(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fsstress")
	build := exec.Command("go", "build", "-o", path, "../fsstress")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // static, as the guest may be another system one day
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// guest runs a command in User Mode Linux and wants it to succeed within the limit.
func guest(t *testing.T, limit time.Duration, command ...string) {
	t.Helper()
	run := exec.Command("./uml-run.sh", append([]string{"-t", fmt.Sprint(limit.Seconds()), "-m", "1500M", "-M", "nbd", "-e", longVariable, "-e", seedVariable, "--"}, command...)...)
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	if err := run.Run(); err != nil {
		t.Fatalf("in the guest: %v\n%s", err, out.String())
	}
	t.Log("in the guest:\n" + out.String())
}

func TestKernelClientKeepsFileSystems(t *testing.T) {
	binary, stress := requireGuest(t), buildStress(t)
	script, err := filepath.Abs("kernel-nbd.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, engine := range []string{"ring", "epoll"} {
		for _, fs := range []string{"ext4", "xfs", "btrfs"} {
			if fs == "btrfs" && engine != "ring" {
				continue // what differs between the engines, the other two show
			}
			t.Run(strings.Join([]string{engine, fs}, " "), func(t *testing.T) {
				guest(t, guestLimit, script, binary, stress, fs, "--engine", engine)
			})
		}
	}
}

// TestKernelAttach runs the tests of package nbd/attach that need the kernel's
// driver, each in a guest of its own.
func TestKernelAttach(t *testing.T) {
	binary := requireGuest(t)
	if os.Getenv(longVariable) != "1" {
		t.Skip("skipped: takes minutes; run: ASHLAR_TEST_LONG=1 make test-uml")
	}
	testenv.RequireCommand(t, "resize2fs", "e2fsprogs")
	guestTests(t, guestLimitLong, binary, "../../nbd/attach")
}

// guestTests runs the tests of a package of which the names begin with TestGuest, each in
// a guest of its own.
func guestTests(t *testing.T, limit time.Duration, binary, path string) {
	t.Helper()
	script, err := filepath.Abs("kernel-attach.sh")
	if err != nil {
		t.Fatal(err)
	}
	tests := filepath.Join(t.TempDir(), "guest.test")
	build := exec.Command("go", "test", "-c", "-o", tests, path)
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // static, as the guest may be another system one day
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	names, err := exec.Command(tests, "-test.list", "^TestGuest").Output()
	if err != nil {
		t.Fatal(err)
	}
	list := strings.Fields(string(names))
	if len(list) == 0 {
		t.Fatal("no tests found")
	}
	for _, name := range list {
		t.Run(name, func(t *testing.T) { guest(t, limit, script, binary, tests, name) })
	}
}
