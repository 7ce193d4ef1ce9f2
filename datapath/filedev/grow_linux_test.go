package filedev

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestGrowTakesUpWhatTheFileGained(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if n, err := d.Grow(); n != 1<<20 || err != nil {
		t.Errorf("nothing gained: %d, %v", n, err)
	}
	if err := os.Truncate(path, 3<<20); err != nil {
		t.Fatal(err)
	}
	if n, err := d.Grow(); n != 3<<20 || err != nil || d.Info().Size != 3<<20 {
		t.Errorf("grown: %d, %v, info %d", n, err, d.Info().Size)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if n, err := d.Grow(); n != 3<<20 || err != nil {
		t.Errorf("a file that became smaller: %d, %v", n, err)
	}
}

func TestGrowRefusesARaggedEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20+100), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{Access: AccessDirect})
	if err != nil {
		t.Skipf("skipped: %v", err)
	}
	defer d.Close()
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Grow(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
}
