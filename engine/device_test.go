package engine

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ashlar-storage/ashlar/engine/pool"
	"golang.org/x/sys/unix"
)

func TestBlockDevicesLeavesOutWhatADaemonServes(t *testing.T) {
	sysfs := t.TempDir()
	for name, size := range map[string]string{
		"sda": "100", "sda1": "50", "nvme0n1": "7", "vdb": "1", "dm-0": "9", "cciss!c0d0": "3", "nbdx": "5",
		"nbd0": "100", "nbd0p1": "100", "ublkb3": "100", "loop0": "0", "sr0": "8", "ram1": "8", "zram0": "8", "fd0": "8",
	} {
		if err := errors.Join(os.Mkdir(filepath.Join(sysfs, name), 0o700), os.WriteFile(filepath.Join(sysfs, name, "size"), []byte(size+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"/dev/cciss/c0d0", "/dev/dm-0", "/dev/nbdx", "/dev/nvme0n1", "/dev/sda", "/dev/sda1", "/dev/vdb"}
	got := blockDevices(sysfs)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := blockDevices(filepath.Join(sysfs, "none")); got != nil {
		t.Errorf("%v", got)
	}
}

func TestFileErrorsSayWhatCallersActOn(t *testing.T) {
	for _, c := range []struct{ err, want error }{
		{os.ErrExist, pool.ErrExists}, {unix.ENOSPC, pool.ErrNoSpace}, {unix.EDQUOT, pool.ErrNoSpace}, {unix.EFBIG, pool.ErrInvalid}, {unix.EACCES, unix.EACCES},
	} {
		if err := fileError("x", c.err); !errors.Is(err, c.want) {
			t.Errorf("%v: %v", c.err, err)
		}
	}
}
