package main

import (
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// sized makes a file of zeros.
func sized(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// poolWith makes a pool with a volume in a file.
func poolWith(t *testing.T, volume string) (path string) {
	t.Helper()
	path = sized(t, 64<<20)
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	d, err := filedev.Open(path, filedev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := reactor.Start(reactor.Config{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	disks := []pool.Disk{{Path: path, Device: d}}
	if _, err := pool.Format(pool.FormatConfig{Name: "p", Disks: disks, Reactor: r}); err != nil {
		t.Fatal(err)
	}
	p, err := pool.Open(pool.Config{Disks: disks, Reactor: r, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.CreateVolume(pool.VolumeSpec{Name: volume, Size: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDevicesOfThisProcessAreLoaded(t *testing.T) {
	for name, c := range map[string]struct {
		arguments []string
		want      []string
	}{
		"null":            {[]string{"--device", "null:1GiB"}, []string{"read"}},
		"memory, mixed":   {[]string{"--device", "mem:16MiB", "--op", "randrw", "--connections", "2", "--depth", "7", "--poll", "busy"}, []string{"read", "write"}},
		"a file, flushes": {[]string{"--device", sized(t, 16<<20), "--op", "write", "--flush-every", "3"}, []string{"write", "flush"}},
		"a volume":        {[]string{"--device", "volume:v", "--pool", poolWith(t, "v"), "--op", "randrw", "--poll", "off"}, []string{"read", "write"}},
		"idle":            {[]string{"--device", "null:1GiB", "--op", "none"}, nil},
		"long requests":   {[]string{"--device", "mem:64MiB", "--block", "4MiB", "--depth", "32"}, []string{"read"}},
	} {
		t.Run(name, func(t *testing.T) {
			wantOperations(t, c.want, func() (map[string]uint64, error) { return measureFor(t, c.arguments...) })
		})
	}
}

func TestDevicesThatCannotBeLoaded(t *testing.T) {
	file := sized(t, 1<<20)
	for want, arguments := range map[string][]string{
		"no such file":     {"--device", "/nowhere/disk"},
		"null:x":           {"--device", "null:x"},
		"mem:":             {"--device", "mem:"},
		"of which pool":    {"--device", "volume:v"},
		"not found":        {"--device", "volume:w", "--pool", poolWith(t, "v")},
		"no such file or":  {"--device", "volume:v", "--pool", "/nowhere/disk"},
		"no pool on":       {"--device", "volume:v", "--pool", file},
		"beyond":           {"--device", "null:1MiB", "--size", "2MiB"},
		"hold no block of": {"--device", "null:1KiB"},
	} {
		if _, err := measureFor(t, arguments...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", arguments, err, want)
		}
	}
	for want, arguments := range map[string][]string{
		"one of them":       {"--device", "null:1MiB", "--uri", "nbd://h"},
		"--pool belongs to": {"--device", "null:1MiB", "--pool", file},
		`poll "x"`:          {"--device", "null:1MiB", "--poll", "x"},
		"spin":              {"--uri", "nbd://h", "--spin", "1s"},
	} {
		if _, _, err := parse(arguments); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", arguments, err, want)
		}
	}
}

// A file that is cut short under the load ends it with an error that names the request.
func TestAnErrorOfTheDeviceEndsTheRun(t *testing.T) {
	path := sized(t, 16<<20)
	o, p, err := parse([]string{"--device", path, "--ramp", "0s", "--runtime", "10s"})
	if err != nil {
		t.Fatal(err)
	}
	target, err := open(o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := measure(target, p, nil, o); err == nil || !strings.Contains(err.Error(), "read of 4096 bytes at") {
		t.Errorf("%v", err)
	}
	if err := target.Close(); err != nil {
		t.Error(err)
	}
}
