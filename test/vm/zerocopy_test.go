package vm

import (
	"os"
	"testing"
)

// TestAttachedDiskGoesWithoutACopy runs in an emulated machine with the newest Linux of
// Debian.
func TestAttachedDiskGoesWithoutACopy(t *testing.T) {
	requireVM(t, "test-vm-new", "Linux 7.0")
	kills := "3"
	if os.Getenv(longVariable) == "1" {
		kills = "30"
	}
	runScript(t, []string{"./vm-run.sh", "-r", "trixie", "-t", "900", "-m", "3G", "-K", "2", "-M", "ublk_drv", "--"}, "zerocopy.sh", kills)
}
