package blockdev

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMountOf(t *testing.T) {
	numbers, sources := []string{"43:0", "43:1"}, []string{"/dev/nbd0", "/dev/nbd0p1"}
	for line, want := range map[string]string{
		"30 22 43:1 / /a rw - ext4 /dev/x rw":                     "/a",
		"30 22 43:0 / /a\\011b\\134\\040c rw a:1 b - ext4 x rw":   "/a\tb\\ c",
		"30 22 0:1 / /a rw - btrfs /dev/nbd0p1 rw":                "/a",
		"30 22 43:10 / /a rw - ext4 /dev/nbd10 rw":                "",
		"30 22 43:0 / /a rw":                                      "",
		"30 22 43:0 - ext4 /dev/nbd0 rw":                          "",
		"30 22 0:1 / /a rw - tmpfs":                               "",
		"":                                                        "",
		"30 22 43:0 / /odd\\9 rw - ext4 x rw":                     "/odd\\9",
		"30 22 43:0 / /end\\04 rw - ext4 x rw":                    "/end\\04",
		"30 22 43:0 / /dash\\040-\\040x rw - ext4 /dev/nbd0 rw":   "/dash - x",
		"30 22 43:0 /sub / rw,relatime shared:1 - ext4 /dev/x rw": "/",
	} {
		if got, ok := mountOf(line, numbers, sources); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v; want %q", line, got, ok, want)
		}
	}
}

// write makes a file with its directories.
func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDevice(t *testing.T) {
	root := t.TempDir()
	h := Host{Sys: filepath.Join(root, "sys"), Dev: "/dev", Proc: filepath.Join(root, "proc")}
	if _, err := h.Device("loop3"); !IsGone(err) || !strings.Contains(err.Error(), "/dev/loop3") {
		t.Errorf("a device that is not there: %v", err)
	}
	write(t, h.Attribute("loop3", "dev"), "7:3\n")
	write(t, h.Attribute("loop3", "size"), "16\n")
	write(t, h.Attribute("loop3", "ro"), "1\n")
	write(t, h.Attribute("loop3", "holders/dm-1/x"), "")
	write(t, h.Attribute("dm-1", "dm/name"), "secret\n")
	write(t, h.Attribute("loop3", "loop3p1/dev"), "259:5\n")
	if _, err := h.Device("loop3"); err == nil {
		t.Error("no mount table, and no error")
	}
	write(t, filepath.Join(h.Proc, "self/mountinfo"), "1 2 259:5 / /mnt/a rw - ext4 /dev/loop3p1 rw\n1 2 259:5 / /mnt/a rw - ext4 x rw\n")
	write(t, filepath.Join(h.Proc, "swaps"), "Filename Type\n/dev/loop3 partition 1 0 -2\n")
	d, err := h.Device("loop3")
	if err != nil {
		t.Fatal(err)
	}
	if d.Path != "/dev/loop3" || d.Major != 7 || d.Minor != 3 || d.Size != 8192 || !d.ReadOnly {
		t.Errorf("%+v", d)
	}
	if !slices.Equal(d.Mounts, []string{"/mnt/a", "swap"}) || !slices.Equal(d.Holders, []string{"dm-1 (secret)"}) {
		t.Errorf("mounts %q, holders %q", d.Mounts, d.Holders)
	}
	if got, want := Used(d.Mounts, d.Holders), "mounted on /mnt/a, used as swap, part of dm-1 (secret)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	write(t, h.Attribute("loop3", "dev"), "seven\n")
	if _, err := h.Device("loop3"); err == nil || IsGone(err) {
		t.Errorf("a device number that is none: %v", err)
	}
	if n := h.Number("loop3", "dev"); n != 0 {
		t.Errorf("number of a text: %d", n)
	}
}
