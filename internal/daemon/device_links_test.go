package daemon

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLinks(t *testing.T) {
	l := links{filepath.Join(t.TempDir(), "ashlar")}
	sources := map[string]string{
		"default/data": "/dev/ublkb0", "default/data@one": "/dev/nbd1", "/srv/disk 1/a%2Fb.img": "/dev/loop7",
		"nbd://host:10809/x?tls-type=x509": "/dev/nbd2", "tank/data": "/dev/ublkb3",
	}
	for source, device := range sources {
		if !l.since(source, device).IsZero() {
			t.Errorf("%s: attached before it was", source)
		}
		if err := l.set(source, device); err != nil {
			t.Fatal(err)
		}
	}
	if to, err := os.Readlink(filepath.Join(l.dir, "default/data")); err != nil || to != "/dev/ublkb0" {
		t.Errorf("%s, %v", to, err)
	}
	found := l.sources()
	for source, device := range sources {
		if found[device] != source {
			t.Errorf("%s: %q, want %q", device, found[device], source)
		}
	}
	// Set again it keeps its time; with another device it does not.
	before := l.since("tank/data", "/dev/ublkb3")
	if err := l.set("tank/data", "/dev/ublkb3"); err != nil || before.IsZero() || !l.since("tank/data", "/dev/ublkb3").Equal(before) {
		t.Errorf("%v, %v", before, err)
	}
	if err := l.set("tank/data", "/dev/nbd9"); err != nil || !l.since("tank/data", "/dev/ublkb3").IsZero() || l.since("tank/data", "/dev/nbd9").IsZero() {
		t.Errorf("a moved link: %v", err)
	}
	l.clean(func(device string) bool { return device == "/dev/ublkb0" })
	if found := l.sources(); len(found) != 1 || found["/dev/ublkb0"] != "default/data" {
		t.Errorf("after cleaning: %v", found)
	}
	l.remove("default/nothing")
	l.remove("default/data")
	if _, err := os.Stat(l.dir); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v", err)
	}
	// Where no link can be made, it says why.
	if err := os.WriteFile(l.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.set("default/data", "/dev/ublkb0"); err == nil {
		t.Error("a link in a file")
	}
}

func TestComparePaths(t *testing.T) {
	for _, pair := range [][2]string{{"/dev/nbd2", "/dev/nbd10"}, {"/dev/loop9", "/dev/nbd1"}, {"/dev/nbd1", "/dev/ublkb0"}} {
		if comparePaths(pair[0], pair[1]) >= 0 || comparePaths(pair[1], pair[0]) <= 0 || comparePaths(pair[0], pair[0]) != 0 {
			t.Errorf("%v", pair)
		}
	}
}
