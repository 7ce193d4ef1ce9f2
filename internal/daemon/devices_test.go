package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// fakeKernel is a way to attach that lives longer than the daemon, as the kernel does.
type fakeKernel struct {
	prefix string

	mu          sync.Mutex
	unsupported error
	refuse      error // of attach
	noResize    error
	notYet      int                    // how often recover fails
	hangs       chan struct{}          // has a message once recover waits, which it then does without end; nil: it does not
	devices     map[string]*fakeDevice // by path
	made        int
}

// fakeDevice is a device, served or not.
type fakeDevice struct {
	kernel   *fakeKernel
	node     string
	identity string
	size     uint64
	busy     bool
	taken    bool            // by another program
	gone     bool            // detached
	device   datapath.Device // nil: nobody serves it
}

func newFakeKernel(prefix string) *fakeKernel {
	return &fakeKernel{prefix: prefix, devices: map[string]*fakeDevice{}}
}

func (k *fakeKernel) supported() error { return k.unsupported }

func (k *fakeKernel) attach(ctx context.Context, s *deviceSource, o deviceOptions) (attachment, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuse != nil {
		return nil, k.refuse
	}
	d, err := s.open(ctx, o.readOnly)
	if err != nil {
		return nil, openError(s, err)
	}
	f := &fakeDevice{kernel: k, node: fmt.Sprint(k.prefix, k.made), identity: s.identity, size: d.Info().Size, device: d}
	k.made++
	k.devices[f.node] = f
	return f, nil
}

func (k *fakeKernel) found(context.Context) (list []foundDevice, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range k.devices {
		list = append(list, foundDevice{path: f.node, served: k.notYet > 0, matches: func(identity string) bool { return identity == f.identity }})
	}
	return list, nil
}

func (k *fakeKernel) recover(ctx context.Context, s *deviceSource, found foundDevice) (attachment, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.devices[found.path]
	if f.device != nil {
		return nil, errors.New("it is served")
	}
	if k.notYet > 0 {
		k.notYet--
		return nil, errors.New("the kernel has not let go of it")
	}
	if k.hangs != nil {
		k.hangs <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var err error
	f.device, err = s.open(ctx, false)
	return f, err
}

func (k *fakeKernel) remove(_ context.Context, found foundDevice) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.devices, found.path)
	return nil
}

func (k *fakeKernel) close() error { return nil }

func (f *fakeDevice) shape() (queues, depth int) { return 1, 32 }

// path is "" once the device is gone, as that of a loop device.
func (f *fakeDevice) path() string {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	if f.gone {
		return ""
	}
	return f.node
}

func (f *fakeDevice) state() (controlpb.DeviceState, string) {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	if f.taken {
		return controlpb.DeviceState_DEVICE_STATE_FAILED, "another program disconnected it"
	}
	return sourceState(f.device)
}

func (f *fakeDevice) resize(context.Context) error {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	if size := f.device.Info().Size; size != f.size {
		if f.kernel.noResize != nil {
			return f.kernel.noResize
		}
		f.size = size
	}
	return nil
}

func (f *fakeDevice) detach(context.Context, bool) error {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	if f.busy {
		return inUseError(f.node, errors.New("it is mounted"))
	}
	delete(f.kernel.devices, f.node)
	f.gone = true
	return f.device.Close()
}

func (f *fakeDevice) leave(context.Context) error {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	d := f.device
	f.device = nil
	return d.Close()
}

// attachNode is a node with two kernels: ublk that is not supported, nbd that is.
func attachNode(t *testing.T, change ...func(*ServeConfig)) (n *testNode, ublk, kernel *fakeKernel) {
	ublk, kernel = newFakeKernel("/dev/fakeublk"), newFakeKernel("/dev/fakenbd")
	ublk.unsupported = errors.New("ublk: no such module")
	n = newNode(t, nil, func(c *ServeConfig) {
		for _, f := range change {
			f(c)
		}
		c.ways = map[controlpb.Via]way{controlpb.Via_VIA_UBLK: ublk, controlpb.Via_VIA_NBD: kernel, controlpb.Via_VIA_FUSE: newFakeKernel("/dev/fakeloop")}
	})
	return n, ublk, kernel
}

// attached attaches a source and wants that to work.
func (n *testNode) attached(source string) *controlpb.Device {
	n.t.Helper()
	d, err := n.client.Devices.Attach(n.t.Context(), &controlpb.AttachRequest{Source: source})
	if err != nil {
		n.t.Fatal(err)
	}
	return d
}

func (n *testNode) listed() []*controlpb.Device {
	n.t.Helper()
	l, err := n.client.Devices.List(n.t.Context(), &controlpb.ListDevicesRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	return l.GetDevices()
}

// wants checks what an error is and says.
func wants(t *testing.T, err error, reason control.Reason, words ...string) {
	t.Helper()
	if !errors.Is(err, reason) {
		t.Errorf("%v is no %q", err, reason)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v does not say %q", err, w)
		}
	}
}

func TestAttachIsIdempotent(t *testing.T) {
	n, _, _ := attachNode(t)
	n.volume("data", 8*mib)
	d := n.attached("data")
	if d.GetVia() != controlpb.Via_VIA_NBD || d.GetWhy() != "nbd, since ublk: no such module" || d.GetSource() != "default/data" || d.GetPool() != "default" || d.GetVolume() != "data" {
		t.Errorf("%v", d)
	}
	for _, name := range []string{"data", "default/data"} {
		if again := n.attached(name); again.GetPath() != d.GetPath() {
			t.Errorf("%s: another device %s", name, again.GetPath())
		}
	}
	_, err := n.client.Devices.Attach(n.t.Context(), &controlpb.AttachRequest{Source: "data", ReadOnly: true})
	wants(t, err, control.ErrExists, d.GetPath(), "for writing", "detach it first")
	_, err = n.client.Devices.Attach(n.t.Context(), &controlpb.AttachRequest{Source: "data", Via: controlpb.Via_VIA_FUSE})
	wants(t, err, control.ErrExists, "through nbd")
	v, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Name: "data"})
	if err != nil || !slices.Equal(v.GetDevices(), []string{d.GetPath()}) {
		t.Errorf("the volume: %v, %v", v, err)
	}

	// Many at once make one device.
	n.volume("other", 8*mib)
	var group sync.WaitGroup
	paths := make([]string, 16)
	for i := range paths {
		group.Go(func() {
			if d, err := n.client.Devices.Attach(n.t.Context(), &controlpb.AttachRequest{Source: "other"}); err != nil {
				t.Error(err)
			} else {
				paths[i] = d.GetPath()
			}
		})
	}
	group.Wait()
	if slices.Sort(paths); paths[0] != paths[len(paths)-1] {
		t.Errorf("several devices: %q", paths)
	}
}

// TestAttachAfterAnotherProgramTookTheDevice makes a new device in place of one that will
// never serve again, unless that is still in use.
func TestAttachAfterAnotherProgramTookTheDevice(t *testing.T) {
	n, _, kernel := attachNode(t)
	n.volume("data", 8*mib)
	d := n.attached("data")
	set := func(taken, busy bool) {
		kernel.mu.Lock()
		defer kernel.mu.Unlock()
		f := kernel.devices[d.GetPath()]
		f.taken, f.busy = taken, busy
	}
	set(true, true)
	_, err := n.client.Devices.Attach(n.t.Context(), &controlpb.AttachRequest{Source: "data"})
	wants(t, err, control.ErrInUse, "mounted")
	set(true, false)
	again := n.attached("data")
	if again.GetPath() == d.GetPath() || again.GetState() != controlpb.DeviceState_DEVICE_STATE_ONLINE {
		t.Errorf("attached as %v, before as %s", again, d.GetPath())
	}
	if list := n.listed(); len(list) != 1 || list[0].GetPath() != again.GetPath() {
		t.Errorf("%v", list)
	}
}

func TestAttachRefuses(t *testing.T) {
	n, ublk, kernel := attachNode(t)
	n.volume("data", 8*mib)
	for _, tt := range []struct {
		request *controlpb.AttachRequest
		reason  control.Reason
		words   []string
	}{
		{&controlpb.AttachRequest{}, control.ErrInvalid, []string{"nothing to attach"}},
		{&controlpb.AttachRequest{Source: "none"}, control.ErrNotFound, []string{"none"}},
		{&controlpb.AttachRequest{Source: "data@none"}, control.ErrNotFound, []string{"data@none"}},
		{&controlpb.AttachRequest{Source: "none@none"}, control.ErrNotFound, []string{"none"}},
		{&controlpb.AttachRequest{Source: "/nowhere/disk"}, control.ErrPrecondition, []string{"/nowhere/disk", "no such file", "truncate"}},
		{&controlpb.AttachRequest{Source: "/"}, control.ErrPrecondition, []string{"is a directory"}},
		{&controlpb.AttachRequest{Source: "nbd+unix:///x?socket=/nowhere/nbd.sock"}, control.ErrPrecondition, []string{"no such file", "its server runs"}},
		{&controlpb.AttachRequest{Source: "http://x/y"}, control.ErrInvalid, []string{"http"}},
		{&controlpb.AttachRequest{Source: "data", Queues: 65}, control.ErrInvalid, []string{"65 queues"}},
		{&controlpb.AttachRequest{Source: "data", Depth: 1025}, control.ErrInvalid, []string{"1025"}},
		{&controlpb.AttachRequest{Source: "data", Via: 9}, control.ErrInvalid, []string{"no way"}},
		{&controlpb.AttachRequest{Source: "data", Via: controlpb.Via_VIA_UBLK}, control.ErrPrecondition, []string{"no such module", "--support"}},
	} {
		_, err := n.client.Devices.Attach(t.Context(), tt.request)
		wants(t, err, tt.reason, tt.words...)
	}
	// A way that fails is passed over, and named.
	ublk.unsupported, ublk.refuse = nil, errors.New("no more minors")
	if d := n.attached("data"); d.GetVia() != controlpb.Via_VIA_NBD || !strings.Contains(d.GetWhy(), "no more minors") {
		t.Errorf("%v", d)
	}
	n.volume("b", 8*mib)
	kernel.refuse = errors.New("attach: no netlink")
	_, err := n.client.Devices.Attach(t.Context(), &controlpb.AttachRequest{Source: "b", Via: controlpb.Via_VIA_NBD})
	wants(t, err, control.ErrPrecondition, "no netlink")
	n.config.ways[controlpb.Via_VIA_FUSE].(*fakeKernel).refuse = errors.New("fuse: 4 queues: too many")
	_, err = n.client.Devices.Attach(n.t.Context(), &controlpb.AttachRequest{Source: "b"})
	wants(t, err, control.ErrPrecondition, "ublk: no more minors; nbd: no netlink; fuse: 4 queues: too many; ")
	if v, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Name: "b"}); err != nil || v.GetOpenCount() != 0 {
		t.Errorf("left open: %v, %v", v, err)
	}
}

func TestDetach(t *testing.T) {
	var log testenv.Output
	n, _, kernel := attachNode(t, func(c *ServeConfig) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	n.volume("data", 8*mib)
	d := n.attached("data")
	detach := func(name string, force bool) error {
		_, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: name, Force: force})
		return err
	}
	kernel.devices[d.GetPath()].busy = true
	wants(t, detach("data", false), control.ErrInUse, "mounted")
	wants(t, detach(d.GetPath(), true), control.ErrInUse, "mounted")
	_, err := n.client.Volumes.Delete(t.Context(), &controlpb.DeleteVolumeRequest{Name: "data"})
	wants(t, err, control.ErrInUse, "detach it first: ashlar detach "+d.GetPath())
	if _, err := n.client.Snapshots.Create(t.Context(), &controlpb.CreateSnapshotRequest{Volume: "data", Name: "s"}); err != nil {
		t.Fatal(err)
	}
	_, err = n.client.Snapshots.Revert(t.Context(), &controlpb.RevertSnapshotRequest{Volume: "data", Name: "s"})
	wants(t, err, control.ErrInUse, "detach it first: ashlar detach "+d.GetPath())
	frozen := n.attached("data@s")
	_, err = n.client.Snapshots.Delete(t.Context(), &controlpb.DeleteSnapshotRequest{Volume: "data", Name: "s"})
	wants(t, err, control.ErrInUse, "detach it first: ashlar detach "+frozen.GetPath())
	_, err = n.client.Pools.Destroy(t.Context(), &controlpb.DestroyPoolRequest{Name: "default", Volumes: true})
	wants(t, err, control.ErrInUse, "detach first what is attached: "+d.GetPath()+", "+frozen.GetPath())
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: "data@s"}); err != nil {
		t.Fatal(err)
	}
	_, err = n.client.Pools.Close(t.Context(), &controlpb.ClosePoolRequest{Name: "default", Disconnect: true})
	wants(t, err, control.ErrInUse, d.GetPath(), "detach them first")
	kernel.devices[d.GetPath()].busy = false
	for _, name := range []string{"", "/dev/nothing", "nothing", "/dev/null"} {
		if err := detach(name, false); err == nil {
			t.Errorf("%q was detached", name)
		}
	}
	wants(t, detach("/dev/nothing", false), control.ErrNotFound, "not attached")
	if err := detach("data", false); err != nil {
		t.Fatal(err)
	}
	if line := "msg=detached source=default/data device=" + d.GetPath() + "\n"; !strings.Contains(log.String(), line) {
		t.Errorf("the log does not say %q:\n%s", line, log.String())
	}
	wants(t, detach("data", false), control.ErrNotFound, "not attached")
	if len(n.listed()) != 0 || len(kernel.devices) != 0 {
		t.Errorf("left: %v", n.listed())
	}
	if _, err = n.client.Volumes.Delete(t.Context(), &controlpb.DeleteVolumeRequest{Name: "data", Snapshots: true}); err != nil {
		t.Error(err)
	}
}

func TestDevicesOutliveTheDaemon(t *testing.T) {
	n, _, kernel := attachNode(t)
	n.volume("data", 8*mib)
	n.volume("gone", 8*mib)
	data, gone := n.attached("data"), n.attached("gone")
	file := filepath.Join(n.dir, "disk 1.img")
	if _, err := n.client.Pools.Create(t.Context(), &controlpb.CreatePoolRequest{Name: "second", Paths: []string{filepath.Join(n.dir, "second")}, FileSizeBytes: 64 * mib}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.Volumes.Create(t.Context(), &controlpb.CreateVolumeRequest{Pool: "second", Name: "late", SizeBytes: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	late := n.attached("late")
	testenv.SparseFile(t, file, 4*mib)
	plain := n.attached(file)
	before := n.listed()
	n.stop()
	if len(kernel.devices) != 4 {
		t.Fatalf("%d devices are left", len(kernel.devices))
	}
	for _, f := range kernel.devices {
		if f.device != nil {
			t.Errorf("%s is held by a daemon that ended", f.node)
		}
	}
	n.start()
	after := n.listed()
	if len(after) != 4 {
		t.Fatalf("%d devices: %v", len(after), after)
	}
	for i, d := range after {
		if d.GetPath() != before[i].GetPath() || d.GetSource() != before[i].GetSource() || !d.GetAttached().AsTime().Equal(before[i].GetAttached().AsTime()) || d.GetState() != controlpb.DeviceState_DEVICE_STATE_ONLINE {
			t.Errorf("%v, before %v", d, before[i])
		}
	}
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: file}); err != nil {
		t.Errorf("%s: %v", plain.GetPath(), err)
	}

	// A device whose volume is gone waits, and can be removed by force.
	n.stop()
	kernel.devices[gone.GetPath()].identity = "volume:another"
	n.start()
	for _, d := range n.listed() {
		want := controlpb.DeviceState_DEVICE_STATE_ONLINE
		if d.GetPath() == gone.GetPath() {
			want = controlpb.DeviceState_DEVICE_STATE_WAITING
		}
		if d.GetState() != want {
			t.Errorf("%v", d)
		}
	}
	_, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: gone.GetPath()})
	wants(t, err, control.ErrPrecondition, "--force", "not here")
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: gone.GetPath(), Force: true}); err != nil {
		t.Error(err)
	}

	// One of a pool that is closed goes on when the pool is opened.
	n.stop()
	spare := filepath.Join(n.dir, "hidden")
	rename(t, filepath.Join(n.dir, "second"), spare)
	n.start()
	waits := false
	for _, d := range n.listed() {
		waits = waits || d.GetPath() == late.GetPath() && d.GetState() == controlpb.DeviceState_DEVICE_STATE_WAITING
	}
	if !waits {
		t.Errorf("%v", n.listed())
	}
	rename(t, spare, filepath.Join(n.dir, "second"))
	if _, err := n.client.Pools.Open(t.Context(), &controlpb.OpenPoolRequest{Name: "second", Paths: []string{filepath.Join(n.dir, "second")}}); err != nil {
		t.Fatal(err)
	}
	for _, d := range n.listed() {
		if d.GetState() != controlpb.DeviceState_DEVICE_STATE_ONLINE {
			t.Errorf("%v", d)
		}
	}
	for _, name := range []string{data.GetPath(), "late"} {
		if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: name}); err != nil {
			t.Error(err)
		}
	}
}

// TestAttachOfAnotherServersExport: a volume of one node is a device of another.
func TestAttachOfAnotherServersExport(t *testing.T) {
	server := newNode(t, nil, nil)
	server.volume("data", 8*mib)
	n, _, kernel := attachNode(t)
	uri := "nbd+unix:///data?socket=" + server.config.NBDSockets[0]
	d := n.attached(uri)
	if d.GetSource() != uri || d.GetVolume() != "" || kernel.devices[d.GetPath()].size != 8*mib {
		t.Errorf("%v", d)
	}
	_, err := n.client.Devices.Attach(t.Context(), &controlpb.AttachRequest{Source: "nbd+unix:///none?socket=" + server.config.NBDSockets[0]})
	wants(t, err, control.ErrPrecondition, "none", "its server runs and has that export")
	server.stop()
	deadline := time.Now().Add(serveWait)
	for n.listed()[0].GetState() != controlpb.DeviceState_DEVICE_STATE_WAITING {
		if time.Now().After(deadline) {
			t.Fatalf("its server is gone: %v", n.listed())
		}
		time.Sleep(10 * time.Millisecond)
	}
	h, err := n.client.Node.Health(t.Context(), &controlpb.HealthRequest{})
	if err != nil || h.GetState() != controlpb.HealthState_HEALTH_STATE_DEGRADED || !strings.Contains(strings.Join(h.GetReasons(), " "), d.GetPath()) {
		t.Errorf("health: %v, %v", h, err)
	}
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: uri}); err != nil {
		t.Error(err)
	}
}

// TestRecoveryIsTriedAgain: what seems to be served, as by the id of a process that is
// ours now, or cannot be taken over at once, is taken over later, and is no reason to
// make a second device.
func TestRecoveryIsTriedAgain(t *testing.T) {
	n, _, kernel := attachNode(t)
	n.volume("data", 8*mib)
	d := n.attached("data")
	n.stop()
	kernel.notYet = 1 << 30
	n.start()
	_, err := n.client.Devices.Attach(t.Context(), &controlpb.AttachRequest{Source: "data"})
	wants(t, err, control.ErrUnavailable, d.GetPath(), "not taken over yet")
	n.stop() // while it is tried again
	n.start()
	kernel.mu.Lock()
	kernel.notYet = 2
	kernel.mu.Unlock()
	deadline := time.Now().Add(serveWait)
	for l := n.listed(); len(l) != 1 || l[0].GetState() != controlpb.DeviceState_DEVICE_STATE_ONLINE; l = n.listed() {
		if time.Now().After(deadline) {
			t.Fatalf("not taken over: %v", l)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if again := n.attached("data"); again.GetPath() != d.GetPath() {
		t.Errorf("a second device %s", again.GetPath())
	}
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: "data"}); err != nil {
		t.Error(err)
	}
}

// TestDaemonEndsWhileRecoveryWaits: for a server that is away, say.
func TestDaemonEndsWhileRecoveryWaits(t *testing.T) {
	n, _, kernel := attachNode(t)
	n.volume("data", 8*mib)
	n.attached("data")
	n.stop()
	kernel.notYet, kernel.hangs = 1, make(chan struct{}, 1)
	n.start()
	<-kernel.hangs
	began := time.Now()
	n.stop()
	if took := time.Since(began); took > recoverPatience/2 {
		t.Errorf("it took %v", took)
	}
	kernel.hangs = nil
	n.start()
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: "data"}); err != nil {
		t.Error(err)
	}
}

// TestNodeWithoutPoolsServes, though a device of another server's export waits: a probe
// that fails would have the daemon started again without end.
func TestNodeWithoutPoolsServes(t *testing.T) {
	server := newNode(t, nil, nil)
	server.volume("data", 8*mib)
	n, _, _ := attachNode(t, func(c *ServeConfig) { c.DefaultPool = 0 })
	n.attached("nbd+unix:///data?socket=" + server.config.NBDSockets[0])
	server.stop()
	for deadline := time.Now().Add(serveWait); n.listed()[0].GetState() != controlpb.DeviceState_DEVICE_STATE_WAITING; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("its server is gone: %v", n.listed())
		}
	}
	if h, err := n.client.Node.Health(t.Context(), &controlpb.HealthRequest{}); err != nil || h.GetState() != controlpb.HealthState_HEALTH_STATE_DEGRADED {
		t.Errorf("health: %v, %v", h, err)
	}
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: n.listed()[0].GetPath()}); err != nil {
		t.Error(err)
	}
}

func TestGrowingReachesTheDevice(t *testing.T) {
	n, _, kernel := attachNode(t)
	n.volume("data", 8*mib)
	d := n.attached("data")
	grow := func(size uint64) {
		t.Helper()
		if _, err := n.client.Volumes.Resize(t.Context(), &controlpb.ResizeVolumeRequest{Name: "data", SizeBytes: size}); err != nil {
			t.Fatal(err)
		}
	}
	grow(16 * mib)
	if got := kernel.devices[d.GetPath()].size; got != 16*mib {
		t.Errorf("the kernel shows %d", got)
	}
	kernel.noResize = errors.New("too old a kernel")
	grow(24 * mib)
	if l := n.listed(); !strings.Contains(l[0].GetReason(), "has not: too old a kernel") || l[0].GetState() != controlpb.DeviceState_DEVICE_STATE_ONLINE {
		t.Errorf("%v", l)
	}
	kernel.noResize = nil
	grow(32 * mib)
	if l := n.listed(); l[0].GetReason() != "" {
		t.Errorf("%v", l)
	}
	if _, err := n.client.Devices.Detach(t.Context(), &controlpb.DetachRequest{Name: "data"}); err != nil {
		t.Error(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}
