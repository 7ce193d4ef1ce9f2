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

// runScript runs a script of this folder on bin/ashlar, by the command that runs things
// where the kernel has what it takes, and wants it to succeed. It returns what the
// script said.
func runScript(t *testing.T, where []string, script string, args ...string) string {
	t.Helper()
	script, err := filepath.Abs(script)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := filepath.Abs(binaryPath)
	if err != nil {
		t.Fatal(err)
	}
	command := slices.Concat(where, []string{script, binary}, args)
	run := exec.Command(command[0], command[1:]...)
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	if err := run.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log("\n" + out.String())
	return out.String()
}

// binaryPath is the binary under test.
const binaryPath = "../../bin/ashlar"

// requireVM skips t outside the make target that gets an emulated machine with what is
// named.
func requireVM(t *testing.T, target, what string) {
	t.Helper()
	if !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), target) {
		t.Skipf("needs an emulated machine with %s (make %s does not skip it)", what, target)
	}
	testenv.RequireRoot(t)
}

// requireFUSE skips t unless this host has FUSE and loop devices, and make test-uml runs.
func requireFUSE(t *testing.T) {
	t.Helper()
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
}
