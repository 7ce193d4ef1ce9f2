package interop

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// upstream is somebody's NBD server that an export of ours stands on.
type upstream struct {
	name   string
	needs  string // Debian package
	args   func(socket, disk string) []string
	socket string

	command *exec.Cmd
}

func upstreams() []*upstream {
	return []*upstream{
		{name: "nbdkit", needs: "nbdkit", args: func(socket, disk string) []string {
			return []string{"--foreground", "--unix", socket, "file", disk}
		}},
		{name: "qemu-nbd", needs: "qemu-utils", args: func(socket, disk string) []string {
			return []string{"--persistent", "--shared=8", "--format=raw", "--discard=unmap", "--socket=" + socket, disk}
		}},
		{name: binary, needs: "", args: func(socket, disk string) []string { return []string{"export", "--socket", socket, disk} }},
	}
}

// start runs the server and waits until it listens.
func (u *upstream) start(t *testing.T, dir, disk string) {
	t.Helper()
	path := u.name
	if u.needs != "" {
		path = testenv.RequireCommand(t, u.name, u.needs)
	}
	u.socket = filepath.Join(dir, "up")
	if err := os.Remove(u.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	u.command = exec.Command(path, u.args(u.socket, disk)...)
	if err := u.command.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(readyLimit); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", u.socket); err == nil {
			_ = c.Close() // it listens
			return
		}
		if time.Now().After(deadline) {
			u.kill()
			t.Fatalf("%s does not listen after %v", u.name, readyLimit)
		}
	}
}

// kill ends the server as a crash does.
func (u *upstream) kill() {
	_ = u.command.Process.Kill() // it is ours
	_ = u.command.Wait()         // killed
}

// TestExportOfAnotherServersExport stands on each server in turn and is used by
// other people's clients.
func TestExportOfAnotherServersExport(t *testing.T) {
	requireInterop(t)
	for _, u := range upstreams() {
		t.Run(filepath.Base(u.name), func(t *testing.T) {
			dir := scratch(t)
			disk, source, back := sparse(t, dir, "disk", 64*mib), patchwork(t, dir, "source", 64*mib), filepath.Join(dir, "back")
			u.start(t, dir, disk)
			defer u.kill()
			s := serve(t, "nbd+unix:///?socket="+u.socket)
			tool(t, "nbdcopy", "--flush", source, s.uri)
			same(t, source, disk)
			tool(t, "nbdcopy", s.uri, back)
			same(t, source, back)
			tool(t, "qemu-io", "-f", "raw", "-c", "write -P 7 12288 65536", "-c", "write -z 1M 1M", "-c", "discard 4M 1M",
				"-c", "flush", "-c", "read -P 7 12288 65536", "-c", "read -P 0 1M 1M", s.uri)
			tool(t, "nbdinfo", "--map", s.uri)
		})
	}
}

// TestUpstreamKilledUnderLoad kills the server below while fio verifies above.
func TestUpstreamKilledUnderLoad(t *testing.T) {
	requireInterop(t)
	for _, u := range upstreams() {
		t.Run(filepath.Base(u.name), func(t *testing.T) {
			dir := scratch(t)
			disk := sparse(t, dir, "disk", 128*mib)
			u.start(t, dir, disk)
			defer func() { u.kill() }()
			s := serve(t, "nbd+unix:///?socket="+u.socket)
			ended := make(chan error, 1)
			go func() { // ends with fio
				_, err := try(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+s.uri, "--thread", "--rw=randwrite", "--bs=4k", "--iodepth=16",
					"--size=128M", "--fsync=64", "--rate_iops=8000", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--eta=never")
				ended <- err
			}()
			kills := 0
			for {
				select {
				case err := <-ended:
					if err != nil {
						t.Error(err)
					}
					if kills < 3 {
						t.Errorf("only %d kills", kills)
					}
					t.Logf("%d kills", kills)
					return
				case <-time.After(700 * time.Millisecond):
					u.kill()
					time.Sleep(100 * time.Millisecond)
					u.start(t, dir, disk)
					kills++
				}
			}
		})
	}
}
