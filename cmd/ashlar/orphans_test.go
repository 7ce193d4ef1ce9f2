package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/internal/daemon"
)

// TestOrphansAreForWhoeverFindsNoDaemon: without a daemon on its socket this host's
// lists are asked; a daemon that refuses, or is elsewhere, is the one to ask.
func TestOrphansAreForWhoeverFindsNoDaemon(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var asked []daemon.OrphansConfig
	open := openOrphans
	t.Cleanup(func() { openOrphans = open })
	openOrphans = func(c daemon.OrphansConfig) *daemon.Orphans {
		asked = append(asked, c)
		return open(daemon.OrphansConfig{DeviceLinks: filepath.Join(dir, "links")})
	}
	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := execute(args, strings.NewReader(""), &out, &errs)
		return code, out.String(), errs.String()
	}
	for _, socket := range []string{dead, filepath.Join(dir, "none.sock")} {
		server := "unix://" + socket
		asked = nil
		code, _, errs := run("devices", "--server", server, "--fuse-keeper", "/run/k.sock")
		if code != exitOK || !strings.Contains(errs, "no daemon at "+server) || len(asked) != 1 || len(asked[0].Keepers) != 1 || asked[0].Keepers[0] != "/run/k.sock" {
			t.Errorf("devices: %d, %q, %+v", code, errs, asked)
		}
		if code, out, _ := run("devices", "--support", "--server", server); code != exitOK || strings.Count(out, "\n") != 4 || !strings.Contains(out, "ublk") {
			t.Errorf("support: %d, %q", code, out)
		}
		if code, out, _ := run("devices", "--output", "json", "--timeout", "0", "--server", server); code != exitOK || !strings.Contains(out, `"items"`) {
			t.Errorf("json: %d, %q", code, out)
		}
		want := "the kernel has no device /dev/null of Ashlar's"
		if os.Geteuid() != 0 {
			want = "CAP_SYS_ADMIN"
		}
		if code, _, errs := run("detach", "/dev/null", "--server", server); code != exitFailure || !strings.Contains(errs, want) {
			t.Errorf("detach: %d, %q", code, errs)
		}
		// Other commands have no daemon to ask.
		if code, _, errs := run("attach", "data", "--server", server); code != exitFailure || !strings.Contains(errs, "cannot reach the daemon") {
			t.Errorf("attach: %d, %q", code, errs)
		}
	}

	asked = nil
	local, elsewhere := &session{server: "unix://" + dead}, &session{server: "host:1"}
	away := control.Errorf(control.ErrUnavailable, "", "", "cannot reach the daemon: %w", syscall.ECONNREFUSED)
	for name, o := range map[string]*daemon.Orphans{
		"all is well":         local.orphans(nil, ""),
		"another host":        elsewhere.orphans(away, ""),
		"a daemon's answer":   local.orphans(control.Errorf(control.ErrInUse, "", "", "mounted"), ""),
		"forbidden":           local.orphans(control.Errorf(control.ErrUnavailable, "", "", "cannot reach: %w", syscall.EACCES), ""),
		"a daemon that stops": local.orphans(control.Errorf(control.ErrUnavailable, "", "", "stopping"), ""),
		"another error":       local.orphans(errors.Join(syscall.ENOENT), ""),
	} {
		if o != nil || len(asked) > 0 {
			t.Errorf("%s: the kernel is asked", name)
		}
	}
}
