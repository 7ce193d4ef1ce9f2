package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
)

// orphanKernel is a way whose devices nobody serves, unless it says so.
type orphanKernel struct {
	*fakeKernel
	list    []foundDevice
	listErr error
	stuck   error // of remove
	removed []string
	looked  int
	freeAt  int // after so many looks nothing is served
	closed  bool
}

func (k *orphanKernel) found(context.Context) ([]foundDevice, error) {
	k.looked++
	list := append([]foundDevice(nil), k.list...)
	for i := range list {
		if k.freeAt > 0 && k.looked > k.freeAt {
			list[i].served = false
		}
	}
	return list, k.listErr
}

func (k *orphanKernel) remove(_ context.Context, f foundDevice) error {
	if k.stuck != nil {
		return k.stuck
	}
	k.removed = append(k.removed, f.path)
	return nil
}

func (k *orphanKernel) close() error { k.closed = true; return nil }

// orphanRig is a host of orphans, with files of its own for those of the kernel.
type orphanRig struct {
	t         *testing.T
	root      string
	orphans   *Orphans
	ublk, nbd *orphanKernel
	fuse      *orphanKernel
	rights    error
}

func newOrphanRig(t *testing.T) *orphanRig {
	r := &orphanRig{t: t, root: t.TempDir()}
	r.ublk, r.nbd, r.fuse = &orphanKernel{fakeKernel: newFakeKernel("")}, &orphanKernel{fakeKernel: newFakeKernel("")}, &orphanKernel{fakeKernel: newFakeKernel("")}
	r.orphans = NewOrphans(OrphansConfig{
		DeviceLinks: filepath.Join(r.root, "links"), patience: 10 * time.Second, rights: func() error { return r.rights },
		kernel: blockdev.Host{Sys: filepath.Join(r.root, "sys"), Dev: "/dev", Proc: filepath.Join(r.root, "proc")},
		ways:   map[controlpb.Via]way{controlpb.Via_VIA_UBLK: r.ublk, controlpb.Via_VIA_NBD: r.nbd, controlpb.Via_VIA_FUSE: r.fuse},
	})
	t.Cleanup(func() {
		if err := r.orphans.Close(); err != nil || !r.ublk.closed || !r.nbd.closed || !r.fuse.closed {
			t.Errorf("close: %v", err)
		}
	})
	return r
}

func (r *orphanRig) file(path, content string) {
	r.t.Helper()
	path = filepath.Join(r.root, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *orphanRig) link(source, device string) {
	r.t.Helper()
	if err := r.orphans.devices.links.set(source, device); err != nil {
		r.t.Fatal(err)
	}
}

func TestOrphansAreListed(t *testing.T) {
	r := newOrphanRig(t)
	r.ublk.list = []foundDevice{{path: "/dev/none-b10"}, {path: "/dev/none-b2"}}
	r.nbd.list = []foundDevice{{path: "/dev/none-n0", source: "default/served", served: true}}
	r.fuse.list = []foundDevice{{path: "/dev/none-l0", source: "default/kept", doubt: "who knows"}}
	r.fuse.listErr = errors.New("no list of mounts")
	r.nbd.unsupported = errors.New("modprobe nbd")
	r.file("sys/block/none-b2/dev", "259:7\n")
	r.file("sys/block/none-b2/ro", "1\n")
	r.file("proc/self/mountinfo", "")
	r.link("default/data", "/dev/none-b2")
	devices, support, err := r.orphans.List(t.Context())
	if err == nil || !strings.Contains(err.Error(), "fuse: no list of mounts") {
		t.Errorf("%v", err)
	}
	var got []string
	for _, d := range devices {
		got = append(got, fmt.Sprint(d.GetPath(), " ", d.GetSource(), " ", d.GetVia(), " ", d.GetState(), " ", d.GetReason(), " ", d.GetReadOnly(), " ", d.GetAttached() != nil))
	}
	want := []string{
		"/dev/none-b2 default/data VIA_UBLK DEVICE_STATE_WAITING no server true true",
		"/dev/none-b10  VIA_UBLK DEVICE_STATE_WAITING no server false false",
		"/dev/none-l0 default/kept VIA_FUSE DEVICE_STATE_WAITING who knows false false",
		"/dev/none-n0 default/served VIA_NBD DEVICE_STATE_ONLINE another daemon serves it false false",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(support) != 3 || support[1].GetAvailable() || support[1].GetReason() != "modprobe nbd" || !support[0].GetAvailable() {
		t.Errorf("%v", support)
	}
}

func TestOrphansAreDetached(t *testing.T) {
	r := newOrphanRig(t)
	r.ublk.list = []foundDevice{{path: "/dev/none-b0"}, {path: "/dev/none-b1"}}
	r.nbd.list = []foundDevice{{path: "/dev/none-n0", source: "tank/data"}, {path: "/dev/none-n1", source: "/srv/data"}}
	r.link("default/data", "/dev/none-b0")
	r.link("default/other", "/dev/none-b1")
	detach := func(name string, force bool) (*controlpb.Device, error) {
		return r.orphans.Detach(t.Context(), name, force)
	}

	_, err := detach("data", false)
	wants(t, err, control.ErrInvalid, "/dev/none-b0", "/dev/none-n0")
	_, err = detach("nothing", false)
	wants(t, err, control.ErrNotFound, "no device nothing of Ashlar", "ashlar devices")
	r.ublk.unsupported = errors.New("modprobe ublk_drv")
	_, err = detach("/dev/ublkb7", false)
	wants(t, err, control.ErrNotFound, "/dev/ublkb7", "modprobe ublk_drv")
	r.fuse.listErr = errors.New("needs root")
	_, err = detach("/dev/loop7", false)
	wants(t, err, control.ErrNotFound, "as far as can be seen", "needs root")
	r.fuse.listErr = nil

	for name, path := range map[string]string{
		"other": "/dev/none-b1", "tank/data": "/dev/none-n0", "/srv/data": "/dev/none-n1", "default/data": "/dev/none-b0",
	} {
		d, err := detach(name, false)
		if err != nil || d.GetPath() != path || d.GetReason() != "" {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	if len(r.ublk.removed) != 2 || len(r.nbd.removed) != 2 {
		t.Errorf("removed %q, %q", r.ublk.removed, r.nbd.removed)
	}
	if left := r.orphans.devices.links.sources(); len(left) != 0 {
		t.Errorf("names are left: %v", left)
	}
	r.nbd.stuck = errors.New("the kernel does not let go")
	_, err = detach("/dev/none-n0", true)
	wants(t, err, control.ErrInternal, "/dev/none-n0", "does not let go")
}

func TestOrphansThatAreUsedStay(t *testing.T) {
	r := newOrphanRig(t)
	r.nbd.list = []foundDevice{{path: "/dev/none-n0", source: "default/data"}}
	refused := func(reason control.Reason, words ...string) {
		t.Helper()
		for _, force := range []bool{false, true} {
			if force && reason == control.ErrPrecondition {
				continue // it would be done
			}
			_, err := r.orphans.Detach(t.Context(), "data", force)
			wants(t, err, reason, words...)
		}
		if len(r.nbd.removed) > 0 {
			t.Errorf("removed %q", r.nbd.removed)
		}
	}
	r.rights = errors.New("it needs CAP_SYS_ADMIN")
	refused(control.ErrDenied, "CAP_SYS_ADMIN", "as root")
	r.rights = nil

	// One that the kernel only has not let go of yet is waited for; see below.
	r.nbd.list[0].served = true
	r.orphans.config.patience = 20 * time.Millisecond
	refused(control.ErrInUse, "/dev/none-n0 is served by a daemon", "--server")
	r.nbd.list[0].served = false

	r.file("sys/block/none-n0/dev", "43:0\n")
	r.file("proc/5/mountinfo", "30 22 43:0 / /mnt/a rw - ext4 /dev/none-n0 rw\n")
	if err := os.MkdirAll(filepath.Join(r.root, "proc/5/ns"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("mnt:[2]", filepath.Join(r.root, "proc/5/ns/mnt")); err != nil {
		t.Fatal(err)
	}
	refused(control.ErrInUse, "/mnt/a (of process 5)")
	r.file("proc/5/mountinfo", "")

	r.file("sys/block/none-n0/inflight", "1 2\n")
	refused(control.ErrPrecondition, "3 requests wait", "--force", "start the daemon")
	d, err := r.orphans.Detach(t.Context(), "data", true)
	if err != nil || !strings.Contains(d.GetReason(), "ended with an error: 3 requests wait") {
		t.Errorf("%v, %v", d, err)
	}
}

func TestOrphanOfAProcessThatDiesIsWaitedFor(t *testing.T) {
	r := newOrphanRig(t)
	r.nbd.list = []foundDevice{{path: "/dev/none-n0", source: "default/data", served: true}}
	r.nbd.freeAt = 3
	if _, err := r.orphans.Detach(t.Context(), "data", false); err != nil || r.nbd.looked < 4 {
		t.Errorf("after %d looks: %v", r.nbd.looked, err)
	}
	// It ends with the caller's patience.
	r.nbd.freeAt = 0
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.orphans.Detach(ctx, "data", false)
	wants(t, err, control.ErrInUse, "served")
	// And where it is gone meanwhile, there is nothing to do.
	r.nbd.looked, r.nbd.freeAt = 0, 0
	gone := &vanishing{orphanKernel: r.nbd}
	r.orphans.devices.ways[controlpb.Via_VIA_NBD] = gone
	_, err = r.orphans.Detach(t.Context(), "data", false)
	wants(t, err, control.ErrNotFound, "/dev/none-n0")
}

// vanishing lists its devices once.
type vanishing struct{ *orphanKernel }

func (k *vanishing) found(ctx context.Context) ([]foundDevice, error) {
	list, err := k.orphanKernel.found(ctx)
	k.list = nil
	return list, err
}

// TestOrphansOfThisHost looks at the real lists, whatever they have: nothing is changed.
func TestOrphansOfThisHost(t *testing.T) {
	keepers := []string{filepath.Join(t.TempDir(), "none.sock"), filepath.Join(shortDir(t), "keeper.sock")}
	s, err := keeper.Start(keeper.Config{Socket: keepers[1]})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }() // holds nothing
	o := NewOrphans(OrphansConfig{Keepers: keepers})
	if _, support, err := o.List(t.Context()); len(support) != 3 {
		t.Errorf("%v, %v", support, err)
	} else if err != nil {
		t.Logf("not all could be listed: %v", err)
	}
	if os.Geteuid() == 0 && adminRights() == nil {
		_, err := o.Detach(t.Context(), "/dev/null", true)
		wants(t, err, control.ErrNotFound, "/dev/null")
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}

// shortDir is a directory whose paths fit into the address of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "orphans-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // temporary
	return dir
}

func TestKeeperOfADataDirectory(t *testing.T) {
	if got := keeperSocket("/var/lib/ashlar"); got != "/var/lib/ashlar/keeper.sock" {
		t.Error(got)
	}
	long := keeperSocket("/" + strings.Repeat("d", unix.PathMax))
	if len(long) > socketPathMax || !strings.HasPrefix(long, "/run/ashlar/keeper-") {
		t.Error(long)
	}
}
