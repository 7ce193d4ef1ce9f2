package vm

import "testing"

// TestOrphansOfNBD runs in User Mode Linux.
func TestOrphansOfNBD(t *testing.T) {
	requireGuest(t)
	runScript(t, []string{"./uml-run.sh", "-t", "600", "-m", "2500M", "-M", "nbd", "--"}, "orphans.sh", "nbd")
}

// TestOrphansOfUblk runs in an emulated machine with Linux 6.12.
func TestOrphansOfUblk(t *testing.T) {
	requireVM(t, "test-vm", "ublk_drv")
	runScript(t, []string{"./vm-run.sh", "-t", "600", "-m", "3G", "-M", "ublk_drv", "--"}, "orphans.sh", "ublk")
}

// TestOrphansOfFUSE runs on this host, in a mount namespace of its own.
func TestOrphansOfFUSE(t *testing.T) {
	requireFUSE(t)
	runScript(t, []string{"timeout", "600", "unshare", "--mount", "--propagation", "private"}, "orphans.sh", "fuse")
}
