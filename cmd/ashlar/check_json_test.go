package main

import (
	"strings"
	"testing"
)

// TestPoolCheckJSON is --output json by its short name.
func TestPoolCheckJSON(t *testing.T) {
	path := poolFile(t, "format-v1.img.gz")
	code, long, stderr := ashlar(t, "pool", "check", path, "--output", "json")
	if code == exitUsage || code == exitFailure {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	if again, short, _ := ashlar(t, "pool", "check", path, "--json"); again != code || short != long || !strings.HasPrefix(short, "{") {
		t.Errorf("exit code %d, want %d\n%s\nwant\n%s", again, code, short, long)
	}
	if code, _, stderr := ashlar(t, "pool", "check", path, "--json", "--output", "table"); code != exitUsage || !strings.Contains(stderr, "json") {
		t.Errorf("both: exit code %d\n%s", code, stderr)
	}
}
