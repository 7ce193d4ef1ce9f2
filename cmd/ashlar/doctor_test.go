package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/ashlar-storage/ashlar/internal/doctor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd/attach"
)

// The scripts in testdata see a host with one disk, on which nothing is a failure but
// what their options make one: nothing can be written below /nowhere.
func init() {
	if os.Getenv(mainVariable) != "" {
		return // a command that a test runs is what it is
	}
	files := fstest.MapFS{}
	for path, text := range map[string]string{
		"proc/self/status": "CapEff:\t000001ffffffffff\n", "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cgroup.controllers": "cpu",
		"sys/kernel/btf/vmlinux": "BTF", "dev/fuse": "", "dev/loop-control": "", "lib/modules/6.12.1/modules.dep": "kernel/drivers/block/nbd.ko:\n",
		"srv/ashlar/x": "", "var/lib/ashlar/x": "", "run/ashlar/x": "", "run/systemd/system/x": "", "etc/systemd/system/ashlar.service": "[Service]\n", "nowhere/x": "",
		"sys/block/nvme0n1/size": "3907029168", "sys/block/nvme0n1/queue/logical_block_size": "512", "sys/block/nvme0n1/queue/physical_block_size": "4096",
		"sys/block/nvme0n1/queue/write_cache": "write back", "sys/block/nvme0n1/queue/scheduler": "[none]", "sys/block/nvme0n1/queue/discard_max_bytes": "1", "sys/block/nvme0n1/dev": "259:0",
	} {
		files[path] = &fstest.MapFile{Data: []byte(text)}
	}
	thisHost = func() *doctor.Host {
		return &doctor.Host{
			Root: files, Release: func() (string, string, error) { return "6.12.1", "x86_64", nil },
			Ring: func() error { return nil }, Ublk: func() error { return nil }, NBD: func() error { return attach.ErrNoDriver },
			Limit: func(doctor.Resource) (uint64, uint64, error) { return doctor.Unlimited, doctor.Unlimited, nil },
			Filesystem: func(string) (doctor.Filesystem, error) {
				return doctor.Filesystem{Magic: 0xEF53, Size: 1 << 40, Free: 1 << 39}, nil
			},
			Direct: func(string) error { return nil }, Reflink: func(string) error { return syscall.EOPNOTSUPP },
			Writable: func(dir string) error {
				if strings.HasPrefix(dir, "/nowhere") {
					return syscall.EROFS
				}
				return nil
			},
			ReadDisk: func(string, []byte) error { return nil }, Listen: func(string) error { return nil },
			Daemon:  func(string) (string, error) { return "", fs.ErrNotExist },
			Clock:   func() (bool, error) { return true, nil },
			Foreign: func([]byte) string { return "" },
		}
	}
}

func TestDoctorReadsTheConfiguration(t *testing.T) {
	o, findings, err := doctorOptions("testdata/doctor/serve.yaml", true)
	if err != nil || len(findings) != 1 || findings[0].Level != doctor.OK || o.DataDir != "/srv/ashlar" || len(o.Listen) != 2 || o.Socket != "/run/ashlar/other.sock" ||
		o.Metrics != "127.0.0.1:9120" || o.Buffers != 128<<20 || len(o.Control) != 1 {
		t.Errorf("%+v, %+v, %v", o, findings, err)
	}
	for _, asked := range []bool{false, true} {
		o, findings, err = doctorOptions(filepath.Join(t.TempDir(), "none.yaml"), asked)
		if asked != errors.Is(err, fs.ErrNotExist) || !asked && (len(findings) > 0 || o.DataDir != "/var/lib/ashlar" || len(o.Listen) != 1 || o.Socket != "/run/ashlar/control.sock" || o.Buffers != 64<<20) {
			t.Errorf("asked for %v: %+v, %+v, %v", asked, o, findings, err)
		}
	}
	refused := filepath.Join(t.TempDir(), "serve.yaml")
	if err := os.WriteFile(refused, []byte("check: true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, findings, err := doctorOptions(refused, true); err != nil || len(findings) != 1 || findings[0].Level != doctor.Failure || !strings.Contains(findings[0].Text, "command line only") {
		t.Errorf("what serve refuses: %+v, %v", findings, err)
	}
	if os.Geteuid() != 0 {
		locked := testenv.SparseFile(t, filepath.Join(t.TempDir(), "locked.yaml"), 1)
		if err := os.Chmod(locked, 0); err != nil {
			t.Fatal(err)
		}
		if _, findings, err := doctorOptions(locked, true); err != nil || len(findings) != 1 || findings[0].Level != doctor.Note {
			t.Errorf("%+v, %v", findings, err)
		}
	}
}

// TestDoctorOnThisHost runs the command as it is, on whatever host this is.
func TestDoctorOnThisHost(t *testing.T) {
	here, err := filepath.Abs("testdata/doctor/here.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := command(t, "doctor", "--data-dir", filepath.Base(dir), "--config", here, "--output", "json")
	c.Dir = filepath.Dir(dir) // a path is one of the directory the command runs in
	out, err := c.Output()
	var r struct {
		Items []struct{ Check, Level, Text, Remedy string }
		OK    int
	}
	if code := exitCode(t, err); code != exitOK && code != exitFailure || json.Unmarshal(out, &r) != nil || r.OK == 0 || len(r.Items) < r.OK {
		t.Errorf("exit code %d, %s", code, out)
	}
	if !strings.Contains(string(out), dir+" can be written to") {
		t.Errorf("%s lacks %s", out, dir)
	}
}
