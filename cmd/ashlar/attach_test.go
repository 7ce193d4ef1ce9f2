package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestAttachOfWhatIsNotThereEndsWithOne: a file or a server that is missing is not the
// command line's fault.
func TestAttachOfWhatIsNotThereEndsWithOne(t *testing.T) {
	keeper := filepath.Join(t.TempDir(), "keeper.sock")
	k := start(t, command(t, "fuse-keeper", "--socket", keeper)) // a daemon would start this test for one
	k.until("it listens", func() bool { _, err := os.Stat(keeper); return err == nil })
	n := newNode(t, "--fuse-keeper", keeper)
	n.start()
	server := "unix://" + filepath.Join(n.dir, "control.sock")
	for _, source := range []string{filepath.Join(n.dir, "none.img"), n.dir, "nbd+unix:///x?socket=" + filepath.Join(n.dir, "none.sock")} {
		code, stdout, stderr := ashlar(t, "attach", "--server", server, source)
		if code != exitFailure || stdout != "" || !strings.Contains(stderr, source) || strings.Contains(stderr, "--help") {
			t.Errorf("%s: exit code %d, want %d\n%s%s", source, code, exitFailure, stdout, stderr)
		}
	}
	if code, _, stderr := ashlar(t, "attach", "--server", server, "http://x/y"); code != exitUsage {
		t.Errorf("no URI of NBD: exit code %d, want %d\n%s", code, exitUsage, stderr)
	}
	if code, _, stderr := ashlar(t, "pool", "import", "--server", server, filepath.Join(n.dir, "none")); code != exitFailure || !strings.Contains(stderr, "none") {
		t.Errorf("a pool on what is not there: exit code %d, want %d\n%s", code, exitFailure, stderr)
	}
}
