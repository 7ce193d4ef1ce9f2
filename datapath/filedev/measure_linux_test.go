package filedev

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMeasureTakesUpWhatTheFileGained(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Measure(); d.Info().Size != 1<<20 || err != nil {
		t.Errorf("nothing gained: %d, %v", d.Info().Size, err)
	}
	if err := os.Truncate(path, 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := d.Measure(); err != nil || d.Info().Size != 3<<20 {
		t.Errorf("grown: %v, %d", err, d.Info().Size)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := d.Measure(); d.Info().Size != 3<<20 || err != nil {
		t.Errorf("a file that became smaller: %d, %v", d.Info().Size, err)
	}
}

func TestMeasureRefusesARaggedEnd(t *testing.T) {
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
	if err := d.Measure(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
}
