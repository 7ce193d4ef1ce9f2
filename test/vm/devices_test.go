package vm

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

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// deviceTests are those of devices.sh, how often they repeat what they do, and the
// same with ASHLAR_TEST_LONG=1.
var deviceTests = []struct {
	name        string
	count, long int
}{
	{"life", 0, 0},
	{"kill", 3, 50},
	{"reload", 3, 50},
	{"many", 20, 250},
	{"btrfs", 0, 0},
	{"stress", 1, 50},
	{"cases", 5, 100},
}

// devices runs one test of devices.sh by the command that runs things where the
// kernel has the driver.
func devices(t *testing.T, via string, where func(limit time.Duration) []string) {
	script, err := filepath.Abs("devices.sh")
	if err != nil {
		t.Fatal(err)
	}
	binary, err := filepath.Abs("../../bin/ashlar")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(stressVariable, buildStress(t))
	long := os.Getenv(longVariable) == "1"
	for _, test := range deviceTests {
		t.Run(test.name, func(t *testing.T) {
			count, limit := test.count, 10*time.Minute
			if long {
				count, limit = test.long, time.Hour
			}
			args := append(where(limit), script, binary, via, test.name)
			if count > 0 {
				args = append(args, strconv.Itoa(count))
			}
			run := exec.Command(args[0], args[1:]...)
			var out bytes.Buffer
			run.Stdout, run.Stderr = &out, &out
			if err := run.Run(); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			t.Log("\n" + out.String())
			if skipped := regexp.MustCompile(`(?m)^SKIP (.*)`).FindStringSubmatch(out.String()); skipped != nil {
				t.Skip(skipped[1])
			}
		})
	}
}

// TestDevicesThroughNBD runs in User Mode Linux.
func TestDevicesThroughNBD(t *testing.T) {
	requireGuest(t)
	devices(t, "nbd", func(limit time.Duration) []string {
		return []string{"./uml-run.sh", "-t", strconv.Itoa(int(limit.Seconds())), "-m", "2500M", "-M", "nbd:nbds_max=300,max_part=8",
			"-e", stressVariable, "-e", seedVariable, "--"}
	})
}

// TestDevicesThroughUblk runs in an emulated machine with Linux 6.12.
func TestDevicesThroughUblk(t *testing.T) {
	if !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm") {
		t.Skip("needs an emulated machine with ublk_drv (make test-vm does not skip it)")
	}
	testenv.RequireRoot(t)
	devices(t, "ublk", func(limit time.Duration) []string {
		return []string{"./vm-run.sh", "-t", strconv.Itoa(int(limit.Seconds())), "-m", "3G", "-M", "ublk_drv:ublks_max=300",
			"-e", stressVariable, "-e", seedVariable, "--"}
	})
}

// TestDevicesThroughFUSE runs on this host, in a mount namespace of its own.
func TestDevicesThroughFUSE(t *testing.T) {
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
	devices(t, "fuse", func(limit time.Duration) []string {
		return []string{"timeout", strconv.Itoa(int(limit.Seconds())), "unshare", "--mount", "--propagation", "private"}
	})
}
