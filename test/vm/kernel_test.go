package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// requireGuest skips t outside make test-uml and returns the paths of the binary
// under test and of this test binary, which runs inside the guest too.
func requireGuest(t *testing.T) (binary, self string) {
	t.Helper()
	if os.Getenv("ASHLAR_INTEROP") != "1" {
		t.Skip("needs bin/ashlar and a guest kernel (make test-uml does not skip it)")
	}
	testenv.RequireRoot(t)
	for command, debianPackage := range map[string]string{
		"linux.uml": "user-mode-linux", "nbd-client": "nbd-client", "mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs",
		"fio": "fio", "fstrim": "util-linux", "modprobe": "kmod",
	} {
		testenv.RequireCommand(t, command, debianPackage)
	}
	binary, err := filepath.Abs("../../bin/ashlar")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v; make test-uml builds it", err)
	}
	if self, err = os.Executable(); err != nil {
		t.Fatal(err)
	}
	return binary, self
}

// guest runs a command in User Mode Linux and wants it to succeed.
func guest(t *testing.T, command ...string) {
	t.Helper()
	run := exec.Command("./uml-run.sh", append([]string{"-t", "240", "-m", "1500M", "-M", "nbd", "--"}, command...)...)
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	if err := run.Run(); err != nil {
		t.Fatalf("in the guest: %v\n%s", err, out.String())
	}
	t.Log("in the guest:\n" + out.String())
}

func TestKernelClientKeepsFileSystems(t *testing.T) {
	binary, self := requireGuest(t)
	script, err := filepath.Abs("kernel-nbd.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, engine := range []string{"ring", "epoll"} {
		for _, fs := range []string{"ext4", "xfs"} {
			t.Run(strings.Join([]string{engine, fs}, " "), func(t *testing.T) {
				guest(t, script, binary, self, fs, "--engine", engine)
			})
		}
	}
}
