package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// poolFile unpacks an image of a pool of package pool into a sparse file.
func poolFile(t *testing.T, image string) string {
	t.Helper()
	b := testenv.Unpack(t, "../../engine/pool/testdata/"+image)
	path := filepath.Join(t.TempDir(), "pool.img")
	out, err := os.Create(path)
	if err == nil {
		err = out.Truncate(int64(len(b)))
	}
	for at := 0; at < len(b) && err == nil; at += 4096 {
		if page := b[at : at+4096]; !bytes.Equal(page, make([]byte, 4096)) {
			_, err = out.WriteAt(page, int64(at))
		}
	}
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// overwrite puts data into a file.
func overwrite(t *testing.T, path string, offset int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(data, offset)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestPoolCheck(t *testing.T) {
	clean := poolFile(t, "format-v1.img.gz")
	run := func(want int, words string, args ...string) string {
		t.Helper()
		code, out, errs := ashlar(t, append([]string{"pool", "check"}, args...)...)
		if code != want {
			t.Errorf("%q: exit code %d, want %d:\n%s%s", args, code, want, out, errs)
		}
		if !strings.Contains(out+errs, words) {
			t.Errorf("%q: does not say %q:\n%s%s", args, words, out, errs)
		}
		return out
	}
	before, err := os.ReadFile(clean)
	if err != nil {
		t.Fatal(err)
	}
	run(exitOK, "found      no damage, 0 notes", clean, "--data")
	run(exitOK, "check of metadata p: ", clean, "--data")
	run(exitOK, "not closed in order", poolFile(t, "format-v1-crashed.img.gz"))

	// One copy of a superblock.
	overwrite(t, clean, 100, []byte{1, 2, 3})
	run(exitFindings, "warning superblock-copy: "+clean+" at 0: the superblock at the start is damaged", clean)
	var report struct {
		Pool     string
		Bad      int
		Complete bool
		Findings []struct {
			Code, What, Remedy string
			Where              struct {
				Device string
				Offset uint64
			}
			Repaired bool
		}
	}
	out := run(exitFindings, "", clean, "--output", "json")
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.Pool != "p" || report.Bad != 1 || !report.Complete || len(report.Findings) != 1 || report.Findings[0].Where.Device != clean || report.Findings[0].Remedy == "" {
		t.Errorf("as JSON (%v): %s", err, out)
	}
	run(exitRepaired, "(repaired)", clean, "--repair")
	run(exitOK, "no damage", clean, "--data")
	if after, err := os.ReadFile(clean); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the repair has not made it what it was (%v)", err)
	}

	// Held by another process.
	f, err := os.Open(clean)
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	run(exitFailure, "ashlar pool close", clean)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	run(exitFailure, "no pool on this device", empty)
	run(exitFailure, "no such file", empty+".none")
	run(exitUsage, "DEVICE or FILE is missing")
	run(exitUsage, "needs --repair", clean, "--recompute-checksums")
	run(exitUsage, "table or json", clean, "-o", "yaml")
}
