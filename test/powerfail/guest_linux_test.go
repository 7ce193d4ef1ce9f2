package powerfail

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// guest runs TestInGuest of this test binary in User Mode Linux.
func guest(t *testing.T, kind, fs string) {
	t.Helper()
	requireBinary(t)
	for command, debianPackage := range map[string]string{
		"linux.uml": "user-mode-linux", "nbd-client": "nbd-client", "mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs",
		"dmsetup": "dmsetup", "losetup": "mount", "fstrim": "util-linux", "modprobe": "kmod",
	} {
		testenv.RequireCommand(t, command, debianPackage)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	limit := "420"
	if long() {
		limit = "7200"
	}
	args := []string{"-t", limit, "-m", "1800M", "-M", "nbd loop dm-mod dm-log-writes dm-snapshot dm-flakey"}
	for _, v := range []string{"ASHLAR_GUEST", "ASHLAR_GUEST_FS", "ASHLAR_INTEROP", "ASHLAR_TARGET", "ASHLAR_TEST_LONG", "ASHLAR_TEST_SEED"} {
		args = append(args, "-e", v)
	}
	run := exec.Command("../vm/uml-run.sh", append(args, "--", self, "-test.run", "^TestInGuest$", "-test.v", "-test.timeout", limit+"s")...)
	run.Env = append(os.Environ(), "ASHLAR_GUEST="+kind, "ASHLAR_GUEST_FS="+fs)
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	err = run.Run()
	t.Log("in the guest:\n" + out.String())
	if err != nil {
		t.Fatalf("in the guest: %v", err)
	}
	if !strings.Contains(out.String(), "--- PASS: TestInGuest") {
		t.Fatal("the guest ran nothing")
	}
}
