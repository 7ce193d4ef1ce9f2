package vm

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// deviceTests are those of devices.sh, how often they repeat what they do, the same with
// ASHLAR_TEST_LONG=1, and for a record.
var deviceTests = []struct {
	name                  string
	count, long, recorded int
	record                func(t *testing.T, folder, via, place string, count int, figures map[string][]float64)
}{
	{name: "life"},
	{name: "kill", count: 3, long: 50},
	{name: "reload", count: 3, long: 50, recorded: 5, record: recordPauses},
	{name: "many", count: 20, long: 250, recorded: 250, record: recordMany},
	{name: "btrfs"},
	{name: "stress", count: 1, long: 50},
	{name: "cases", count: 5, long: 100},
}

// devices runs the tests of devices.sh by the command that runs things where the kernel
// has the driver; place says where that is.
func devices(t *testing.T, via, place string, where func(limit time.Duration) []string) {
	t.Setenv(stressVariable, buildStress(t))
	folder := recordFolder(t)
	for _, test := range deviceTests {
		t.Run(test.name, func(t *testing.T) {
			count, limit := test.count, 10*time.Minute
			recorded := test.record != nil && folder != ""
			switch {
			case os.Getenv(longVariable) == "1":
				count, limit = test.long, time.Hour
			case recorded:
				count, limit = test.recorded, time.Hour
			}
			args := []string{via, test.name}
			if count > 0 {
				args = append(args, strconv.Itoa(count))
			}
			out := runScript(t, where(limit), "devices.sh", args...)
			if recorded {
				test.record(t, folder, via, place, count, figuresOf(t, out))
			}
			if skipped := regexp.MustCompile(`(?m)^SKIP (.*)`).FindStringSubmatch(out); skipped != nil {
				t.Skip(skipped[1])
			}
		})
	}
}

// recordPauses records how long nobody served while another process took over.
func recordPauses(t *testing.T, folder, via, place string, count int, figures map[string][]float64) {
	note := fmt.Sprintf("the longest of %d hand-overs under load, on ext4 and xfs, %s", 2*count, place)
	if err := writeRecord(folder, newRecord(t, "attach-pause-"+via, note, figures["pause"])); err != nil {
		t.Error(err)
	}
}

// recordMany records what each of many attached volumes costs.
func recordMany(t *testing.T, folder, via, place string, count int, figures map[string][]float64) {
	note := fmt.Sprintf("%d devices through %s, %s", count, via, place)
	for _, name := range []string{"memory", "time"} {
		if err := writeRecord(folder, newRecord(t, "attach-"+name, note, figures[name])); err != nil {
			t.Error(err)
		}
	}
}

// TestDevicesThroughNBD runs in User Mode Linux.
func TestDevicesThroughNBD(t *testing.T) {
	requireGuest(t)
	devices(t, "nbd", "in User Mode Linux, one CPU", func(limit time.Duration) []string {
		return []string{"./uml-run.sh", "-t", strconv.Itoa(int(limit.Seconds())), "-m", "2500M", "-M", "nbd:nbds_max=300,max_part=8",
			"-e", stressVariable, "-e", seedVariable, "--"}
	})
}

// TestDevicesThroughUblk runs in an emulated machine with Linux 6.12.
func TestDevicesThroughUblk(t *testing.T) {
	requireVM(t, "test-vm", "ublk_drv")
	devices(t, "ublk", "in an emulated machine, where starting a program takes a second", func(limit time.Duration) []string {
		return []string{"./vm-run.sh", "-t", strconv.Itoa(int(limit.Seconds())), "-m", "3G", "-M", "ublk_drv:ublks_max=300",
			"-e", stressVariable, "-e", seedVariable, "--"}
	})
}

// TestDevicesThroughFUSE runs on this host, in a mount namespace of its own.
func TestDevicesThroughFUSE(t *testing.T) {
	requireFUSE(t)
	devices(t, "fuse", "on this host", func(limit time.Duration) []string {
		return []string{"timeout", strconv.Itoa(int(limit.Seconds())), "unshare", "--mount", "--propagation", "private"}
	})
}
