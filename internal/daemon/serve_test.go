package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/enginetest"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd"
)

const mib = 1 << 20

// serveWait ends a test that waits for something which does not come.
const serveWait = 20 * time.Second

// testNode is a node whose daemon can be restarted.
type testNode struct {
	t         *testing.T
	dir       string
	config    ServeConfig
	drain     context.CancelFunc
	cut       chan struct{}
	ended     chan error
	addresses Addresses
	client    *control.Client
}

// onLayouts runs a test over pools in memory, and over real ones.
func onLayouts(t *testing.T, test func(*testing.T, engine.Layout)) {
	t.Run("fake", func(t *testing.T) {
		fake := &enginetest.Fake{}
		t.Cleanup(func() {
			if err := fake.Close(); err != nil {
				t.Error(err)
			}
		})
		test(t, fake)
	})
	t.Run("pool", func(t *testing.T) { test(t, nil) })
}

func newNode(t *testing.T, layout engine.Layout, change func(*ServeConfig)) *testNode {
	t.Helper()
	checkLeaks(t)
	dir := t.TempDir()
	n := &testNode{t: t, dir: dir, config: ServeConfig{
		DataDir: filepath.Join(dir, "data"), Version: "v", Options: map[string]any{"data-dir": "data"},
		Reactors:   ReactorConfig{Reactors: 2, Poll: reactor.PollOff, BufferBytes: 8 * mib},
		NBDSockets: []string{filepath.Join(dir, "nbd.sock")}, Listen: []string{"127.0.0.1:0"},
		Socket: filepath.Join(dir, "run", "control.sock"), Metrics: "127.0.0.1:0", Layout: layout, Log: quiet(),
		DefaultPool: 64 * mib, DeviceLinks: filepath.Join(dir, "dev"),
	}}
	if change != nil {
		change(&n.config)
	}
	t.Cleanup(n.stop)
	return n.start()
}

func (n *testNode) start() *testNode {
	n.t.Helper()
	ctx, drain := context.WithCancel(context.Background())
	ready := make(chan Addresses, 1)
	n.drain, n.cut, n.ended = drain, make(chan struct{}), make(chan error, 1)
	c := n.config
	c.Cut, c.Ready = n.cut, func(a Addresses) { ready <- a }
	go func() { n.ended <- Serve(ctx, c) }() // ends with drain
	select {
	case n.addresses = <-ready:
	case err := <-n.ended:
		drain()
		n.ended = nil
		n.t.Fatalf("the daemon did not start: %v", err)
	case <-time.After(serveWait):
		n.t.Fatal("the daemon does not start")
	}
	var err error
	if n.client, err = control.Dial(n.t.Context(), "unix://"+n.config.Socket, control.Options{Timeout: serveWait}); err != nil {
		n.t.Fatal(err)
	}
	return n
}

// stop drains the daemon and waits for its end.
func (n *testNode) stop() {
	n.t.Helper()
	if n.ended == nil {
		return
	}
	if n.client != nil {
		_ = n.client.Close() // nothing is asked any more
		n.client = nil
	}
	n.drain()
	select {
	case err := <-n.ended:
		if err != nil {
			n.t.Errorf("the daemon ended with: %v", err)
		}
	case <-time.After(serveWait):
		n.t.Error("the daemon does not end")
	}
	n.ended = nil
}

func (n *testNode) volume(name string, size uint64) *controlpb.Volume {
	n.t.Helper()
	v, err := n.client.Volumes.Create(n.t.Context(), &controlpb.CreateVolumeRequest{Name: name, SizeBytes: size})
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

func (n *testNode) dial(export string) *nbd.Client {
	n.t.Helper()
	c, err := nbd.Dial(n.t.Context(), "unix", n.config.NBDSockets[0], nbd.Options{Export: export})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Close() }) // closed by the test, or has lost its server
	return c
}

func (n *testNode) get(path string) (code int, text string) {
	n.t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	response, err := (&http.Client{Transport: transport}).Get("http://" + n.addresses.HTTP.String() + path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }() // read to its end
	b, err := io.ReadAll(response.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return response.StatusCode, string(b)
}

// closedVolumes waits until no volume is open.
func (n *testNode) closedVolumes() {
	n.t.Helper()
	for deadline := time.Now().Add(serveWait); ; time.Sleep(time.Millisecond) {
		list, err := n.client.Volumes.List(n.t.Context(), &controlpb.ListVolumesRequest{})
		if err != nil {
			n.t.Fatal(err)
		}
		if !slices.ContainsFunc(list.GetVolumes(), func(v *controlpb.Volume) bool { return v.GetOpenCount() > 0 }) {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("volumes stay open: %v", list)
		}
	}
}

func TestServeKeepsVolumesOverARestart(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		v := n.volume("data", 4*mib)
		if v.GetPool() != "default" || len(v.GetUris()) != 2 || v.GetSizeBytes() != 4*mib {
			t.Errorf("%v", v)
		}
		c := n.dial("data")
		block := bytes.Repeat([]byte("ashlar!\n"), 512)
		if err := errors.Join(c.Write(t.Context(), block, mib, 0), c.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
		if _, err := n.client.Snapshots.Create(t.Context(), &controlpb.CreateSnapshotRequest{Volume: "data", Name: "s"}); err != nil {
			t.Fatal(err)
		}
		if err := c.Write(t.Context(), make([]byte, 4096), mib, 0); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		n.closedVolumes()
		n.stop()
		n.start()

		list, err := nbd.List(t.Context(), "unix", n.config.NBDSockets[0], nbd.Options{})
		if err != nil || len(list) != 2 || list[0].Name != "data" || list[1].Name != "data@s" {
			t.Errorf("%v, %v", list, err)
		}
		got := make([]byte, 4096)
		for export, want := range map[string][]byte{"data": make([]byte, 4096), "default/data": make([]byte, 4096), "": make([]byte, 4096), "data@s": block, "default/data@s": block} {
			c := n.dial(export)
			if err := c.Read(t.Context(), got, mib, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%q: %q…, %v", export, got[:8], err)
			}
			if strings.Contains(export, "@") {
				if err := c.Write(t.Context(), got, 0, 0); err == nil {
					t.Errorf("%q takes writes", export)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		for _, export := range []string{"none", "data@none", "none@s", "data@", "other/data", "@s", "/data"} {
			if _, err := nbd.Info(t.Context(), "unix", n.config.NBDSockets[0], nbd.Options{Export: export}); err == nil {
				t.Errorf("%q was found", export)
			}
		}
		tcp, err := nbd.Dial(t.Context(), "tcp", n.addresses.NBD[1].String(), nbd.Options{Export: "data"})
		if err != nil {
			t.Fatal(err)
		}
		if err := tcp.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestServeResizesUnderAClient(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		n.volume("data", mib)
		c := n.dial("data")
		if _, err := n.client.Volumes.Resize(t.Context(), &controlpb.ResizeVolumeRequest{Name: "data", SizeBytes: 2 * mib}); err != nil {
			t.Fatal(err)
		}
		again := n.dial("data") // shares the device
		if again.Size() != 2*mib {
			t.Errorf("size %d", again.Size())
		}
		if err := errors.Join(again.Write(t.Context(), make([]byte, 4096), mib, 0), c.Close(), again.Close()); err != nil {
			t.Error(err)
		}
	})
}

func TestServeControlsVolumes(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		ctx := t.Context()
		n.volume("data", 4*mib)
		create := func(size uint64) error {
			_, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: "data", SizeBytes: size})
			return err
		}
		var told *control.Error
		if err := create(4 * mib); !errors.As(err, &told) || told.Reason != control.ErrExists || !told.SameSpec || told.Name != "data" {
			t.Errorf("the same again: %+v", err)
		}
		if err := create(8 * mib); !errors.As(err, &told) || told.Reason != control.ErrExists || told.SameSpec {
			t.Errorf("another of the name: %+v", err)
		}
		_, err := n.client.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Name: "none"})
		if !errors.Is(err, control.ErrNotFound) || !strings.Contains(err.Error(), "none") {
			t.Errorf("%v", err)
		}
		_, err = n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: "a@b", SizeBytes: mib})
		if !errors.Is(err, control.ErrInvalid) {
			t.Errorf("%v", err)
		}
		c := n.dial("data")
		if err := errors.Join(c.Write(ctx, make([]byte, 128<<10), 0, 0), c.Flush(ctx)); err != nil {
			t.Fatal(err)
		}
		if _, err := n.client.Volumes.Delete(ctx, &controlpb.DeleteVolumeRequest{Name: "data"}); !errors.Is(err, control.ErrInUse) {
			t.Errorf("delete under a client: %v", err)
		}
		info, err := n.client.Node.Info(ctx, &controlpb.InfoRequest{})
		if err != nil || len(info.GetExports()) != 1 || info.GetExports()[0].GetConnectionCount() != 1 || info.GetDataDir() != n.config.DataDir || len(info.GetPools()) != 1 {
			t.Errorf("%v, %v", info, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		n.closedVolumes()
		snapshot := &controlpb.CreateSnapshotRequest{Volume: "data", Name: "s", Labels: map[string]string{"k": "v"}}
		if s, err := n.client.Snapshots.Create(ctx, snapshot); err != nil || s.GetPool() != "default" || len(s.GetUris()) != 2 {
			t.Errorf("%v, %v", s, err)
		}
		if _, err := n.client.Snapshots.Create(ctx, snapshot); !errors.As(err, &told) || told.Reason != control.ErrExists || !told.SameSpec {
			t.Errorf("%v", err)
		}
		clone := &controlpb.CloneVolumeRequest{SourceVolume: "data", SourceSnapshot: "s", Name: "copy"}
		if v, err := n.client.Volumes.Clone(ctx, clone); err != nil || v.GetParent() != "data@s" || v.GetSizeBytes() != 4*mib {
			t.Errorf("%v, %v", v, err)
		}
		if _, err := n.client.Volumes.Clone(ctx, clone); !errors.As(err, &told) || told.Reason != control.ErrExists || !told.SameSpec {
			t.Errorf("%v", err)
		}
		clone.SourceSnapshot = "none"
		clone.Name = "other"
		if _, err := n.client.Volumes.Clone(ctx, clone); !errors.Is(err, control.ErrNotFound) {
			t.Errorf("%v", err)
		}
		if _, err := n.client.Volumes.SetLabels(ctx, &controlpb.SetLabelsRequest{Name: "copy", Labels: map[string]string{"app": "x"}}); err != nil {
			t.Error(err)
		}
		if list, err := n.client.Volumes.List(ctx, &controlpb.ListVolumesRequest{Labels: map[string]string{"app": "x"}}); err != nil || len(list.GetVolumes()) != 1 {
			t.Errorf("%v, %v", list, err)
		}
		if list, err := n.client.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{Pool: "default"}); err != nil || len(list.GetSnapshots()) != 1 {
			t.Errorf("%v, %v", list, err)
		}
		if m, err := n.client.Volumes.Map(ctx, &controlpb.MapVolumeRequest{Name: "data"}); err != nil || m.GetSizeBytes() != 4*mib || len(m.GetSnapshots()) != 1 {
			t.Errorf("%v, %v", m, err)
		}
		stream, err := n.client.Volumes.Changes(ctx, &controlpb.ChangesRequest{Volume: "data", Until: "s"})
		if err != nil {
			t.Fatal(err)
		}
		var changed uint64
		for {
			r, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range r.GetChanges() {
				changed += c.GetLengthBytes()
			}
		}
		if changed != 128<<10 {
			t.Errorf("%d bytes changed", changed)
		}
		if v, err := n.client.Snapshots.Revert(ctx, &controlpb.RevertSnapshotRequest{Volume: "data", Name: "s"}); err != nil || v.GetName() != "data" {
			t.Errorf("%v, %v", v, err)
		}
		if _, err := n.client.Volumes.Delete(ctx, &controlpb.DeleteVolumeRequest{Name: "data"}); !errors.Is(err, control.ErrHasSnapshots) {
			t.Errorf("%v", err)
		}
		j, err := n.client.Volumes.Delete(ctx, &controlpb.DeleteVolumeRequest{Name: "copy"})
		if err != nil {
			t.Fatal(err)
		}
		if j, err = n.client.WaitJob(ctx, j.GetId(), nil); err != nil || j.GetState() != controlpb.JobState_JOB_STATE_DONE {
			t.Errorf("%v, %v", j, err)
		}
		if list, err := n.client.Jobs.List(ctx, &controlpb.ListJobsRequest{}); err != nil || len(list.GetJobs()) == 0 {
			t.Errorf("%v, %v", list, err)
		}
		if _, err := n.client.Snapshots.Delete(ctx, &controlpb.DeleteSnapshotRequest{Volume: "data", Name: "s"}); err != nil {
			t.Error(err)
		}
	})
}

func TestServeControlsPools(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		ctx := t.Context()
		paths := []string{filepath.Join(n.dir, "d1"), filepath.Join(n.dir, "d2")}
		request := &controlpb.CreatePoolRequest{Name: "two", Paths: paths, FileSizeBytes: 64 * mib}
		p, err := n.client.Pools.Create(ctx, request)
		if err != nil || p.GetState() != controlpb.PoolState_POOL_STATE_ONLINE || len(p.GetDevices()) != 2 || p.GetTotalBytes() == 0 {
			t.Fatalf("%v, %v", p, err)
		}
		var told *control.Error
		if _, err := n.client.Pools.Create(ctx, request); !errors.As(err, &told) || told.Reason != control.ErrExists || !told.SameSpec {
			t.Errorf("%v", err)
		}
		if _, err := n.client.Pools.Create(ctx, &controlpb.CreatePoolRequest{Name: "x", Paths: []string{"relative"}}); !errors.Is(err, control.ErrInvalid) {
			t.Errorf("%v", err)
		}
		for _, c := range []struct {
			path   string
			size   uint64
			reason control.Reason
			remedy string
		}{
			{"/dev/null", 0, control.ErrPrecondition, "name a disk, a partition or a file"},
			{n.dir, 0, control.ErrPrecondition, "name a disk, a partition or a file"},
			{filepath.Join(n.dir, "none", "d1"), 64 * mib, control.ErrPrecondition, "mkdir -p " + filepath.Join(n.dir, "none")},
			{filepath.Join(n.dir, "none"), 0, control.ErrNotFound, "`lsblk` shows the disks there are"},
			{filepath.Join(paths[0], "d1"), 64 * mib, control.ErrPrecondition, ""},
			{"/proc/d1", 4096, control.ErrPrecondition, "name a directory that the daemon may make files in"},
		} {
			_, err := n.client.Pools.Create(ctx, &controlpb.CreatePoolRequest{Name: "x", Paths: []string{c.path}, FileSizeBytes: c.size})
			var told *control.Error
			if !errors.As(err, &told) || told.Reason != c.reason || told.Remedy != c.remedy || !strings.Contains(told.Message, c.path) {
				t.Errorf("%s: %v", c.path, err)
			}
		}
		if _, err := n.client.Pools.Open(ctx, &controlpb.OpenPoolRequest{Paths: []string{filepath.Join(n.dir, "none")}}); !errors.Is(err, control.ErrPrecondition) {
			t.Errorf("a pool on what is not there: %v", err)
		}
		if _, err := n.client.Pools.Create(ctx, &controlpb.CreatePoolRequest{Name: "x", Paths: []string{paths[0]}}); err == nil {
			t.Error("a pool over another, without force")
		}
		if _, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: "v", SizeBytes: mib}); !errors.Is(err, control.ErrInvalid) {
			t.Errorf("two pools and none named: %v", err)
		}
		if _, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Pool: "two", Name: "v", SizeBytes: mib}); err != nil {
			t.Fatal(err)
		}
		if p, err := n.client.Pools.AddDevice(ctx, &controlpb.AddDeviceRequest{Name: "two", Path: filepath.Join(n.dir, "d3"), FileSizeBytes: 64 * mib}); err != nil || len(p.GetDevices()) != 3 {
			t.Errorf("%v, %v", p, err)
		}
		if _, err := n.client.Pools.Grow(ctx, &controlpb.GrowPoolRequest{Name: "two", FileSizeBytes: 96 * mib}); err != nil {
			t.Errorf("%v", err)
		}
		if s, err := n.client.Pools.Scan(ctx, &controlpb.ScanPoolsRequest{Paths: []string{n.dir}}); err != nil || len(s.GetPools()) != 1 || !s.GetPools()[0].GetOpen() {
			t.Errorf("%v, %v", s, err)
		}
		if j, err := n.client.Pools.Scrub(ctx, &controlpb.ScrubPoolRequest{Name: "two"}); err != nil || j.GetKind() != controlpb.JobKind_JOB_KIND_SCRUB {
			t.Errorf("%v, %v", j, err)
		}
		_, _ = n.client.Pools.StopScrub(ctx, &controlpb.StopScrubRequest{Name: "two"}) // a real one may have ended
		c := n.dial("v")
		if _, err := n.client.Pools.Close(ctx, &controlpb.ClosePoolRequest{Name: "two"}); !errors.Is(err, control.ErrInUse) {
			t.Errorf("close under a client: %v", err)
		}
		if _, err := n.client.Pools.Close(ctx, &controlpb.ClosePoolRequest{Name: "two", Disconnect: true}); err != nil {
			t.Errorf("%v", err)
		}
		<-c.Done()
		if _, err := n.client.Pools.Get(ctx, &controlpb.GetPoolRequest{Name: "two"}); !errors.Is(err, control.ErrNotFound) {
			t.Errorf("%v", err)
		}
		if p, err := n.client.Pools.Open(ctx, &controlpb.OpenPoolRequest{Paths: []string{n.dir}}); err != nil || p.GetName() != "two" || p.GetVolumeCount() != 1 {
			t.Errorf("%v, %v", p, err)
		}
		if _, err := n.client.Pools.Destroy(ctx, &controlpb.DestroyPoolRequest{Name: "two"}); !errors.Is(err, control.ErrHasVolumes) {
			t.Errorf("%v", err)
		}
		if _, err := n.client.Pools.Destroy(ctx, &controlpb.DestroyPoolRequest{Name: "two", Volumes: true}); err != nil {
			t.Errorf("%v", err)
		}
		if list, err := n.client.Pools.List(ctx, &controlpb.ListPoolsRequest{}); err != nil || len(list.GetPools()) != 1 {
			t.Errorf("%v, %v", list, err)
		}
		events, err := n.client.Events.Watch(ctx, &controlpb.WatchEventsRequest{Pool: "two"})
		if err != nil {
			t.Fatal(err)
		}
		var seen int
		for {
			e, err := events.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil || e.GetPool() != "two" {
				t.Fatalf("%v, %v", e, err)
			}
			seen++
		}
		if seen < 4 { // opened, closed, opened, closed
			t.Errorf("%d events", seen)
		}
		for _, follow := range []bool{false, true} { // "two" is gone too, but was there
			bounded, cancel := context.WithTimeout(ctx, serveWait)
			events, err := n.client.Events.Watch(bounded, &controlpb.WatchEventsRequest{Pool: "never", Follow: follow})
			if err == nil {
				_, err = events.Recv()
			}
			cancel()
			if !errors.Is(err, control.ErrNotFound) || !strings.Contains(err.Error(), "never") {
				t.Errorf("events of a pool that never was: %v", err)
			}
		}
	})
}

// A promise beyond --over-provision is refused with a reason of its own: there is space.
func TestServeRefusesToOverProvision(t *testing.T) {
	n := newNode(t, nil, func(c *ServeConfig) { c.OverProvision = 100 })
	_, err := n.client.Volumes.Create(t.Context(), &controlpb.CreateVolumeRequest{Name: "large", SizeBytes: 1 << 30})
	if !errors.Is(err, control.ErrOverProvisioned) || status.Code(err) != codes.ResourceExhausted {
		t.Errorf("create: %v", err)
	} else if text := err.Error(); !strings.Contains(text, "large") || !strings.Contains(text, "100 %") || strings.Contains(text, "no space") || strings.Contains(text, "delete snapshots") {
		t.Errorf("create: %q", text)
	}
	n.volume("v", mib)
	if _, err := n.client.Volumes.Resize(t.Context(), &controlpb.ResizeVolumeRequest{Name: "v", SizeBytes: 1 << 30}); !errors.Is(err, control.ErrOverProvisioned) {
		t.Errorf("resize: %v", err)
	}
}

func TestServeTellsOfAPoolThatIsNotOpen(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		second := filepath.Join(n.dir, "d2")
		if _, err := n.client.Pools.Create(t.Context(), &controlpb.CreatePoolRequest{Name: "two", Paths: []string{filepath.Join(n.dir, "d1"), second}, FileSizeBytes: 64 * mib}); err != nil {
			t.Fatal(err)
		}
		n.stop()
		if err := os.Rename(second, second+".away"); err != nil {
			t.Fatal(err)
		}
		n.start()
		p, err := n.client.Pools.Get(t.Context(), &controlpb.GetPoolRequest{Name: "two"})
		if err != nil || p.GetState() != controlpb.PoolState_POOL_STATE_UNAVAILABLE || !strings.Contains(p.GetReason(), second) {
			t.Errorf("%v, %v", p, err)
		}
		if _, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Name: "v"}); !errors.Is(err, control.ErrMissingDevice) {
			t.Errorf("%v", err)
		}
		h, err := n.client.Node.Health(t.Context(), &controlpb.HealthRequest{})
		if err != nil || h.GetState() != controlpb.HealthState_HEALTH_STATE_DEGRADED || len(h.GetReasons()) != 1 {
			t.Errorf("%v, %v", h, err)
		}
		if code, text := n.get("/healthz"); code != http.StatusOK || !strings.HasPrefix(text, "degraded\n") {
			t.Errorf("%d %s", code, text)
		}
	})
}

func TestServeMeasures(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		n.volume("data", mib)
		for range 2 { // counts outlive the device
			c := n.dial("data")
			if err := errors.Join(c.Write(t.Context(), make([]byte, 4096), 0, 0), c.Close()); err != nil {
				t.Fatal(err)
			}
			n.closedVolumes()
		}
		code, text := n.get("/metrics")
		if code != http.StatusOK {
			t.Fatalf("%d\n%s", code, text)
		}
		for _, line := range []string{
			`export_request_seconds_count{export="data",op="write"} 2`, `nbd_written_bytes_total 8192`,
			`pool_state{pool="default",state="online"} 1`, `pool_state{pool="default",state="closed"} 0`, `pool_volumes{pool="default"} 1`,
			`pool_provisioned_bytes{pool="default"} 1.048576e+06`, `pool_devices_missing{pool="default"} 0`, `pool_events_total{kind="opened"} 1`,
		} {
			if !strings.Contains(text, line+"\n") {
				t.Errorf("%s is not in\n%s", line, text)
			}
		}
		if code, text := n.get("/healthz"); code != http.StatusOK || text != "ok\n" {
			t.Errorf("%d %q", code, text)
		}
		if code, _ := n.get("/debug/pprof/cmdline"); code != http.StatusOK {
			t.Error(code)
		}
		documented, err := os.ReadFile("../../docs/metrics.md")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(text, "\n") {
			if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
				name, _, _ = strings.Cut(name, " ")
				if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && !strings.Contains(string(documented), "`"+name+"`") {
					t.Errorf("%s is not in docs/metrics.md", name)
				}
			}
		}
	})
}

func TestServeHasItsDataDirectoryToItself(t *testing.T) {
	fake := &enginetest.Fake{}
	n := newNode(t, fake, func(c *ServeConfig) { c.DefaultPool = 0 })
	err := Serve(t.Context(), ServeConfig{DataDir: n.config.DataDir, Log: quiet(), Layout: fake})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) || !strings.Contains(err.Error(), n.config.DataDir) {
		t.Errorf("%v", err)
	}
	n.stop()
	n.start() // the lock is free again
}

func TestServeWritesTheOptionsInForce(t *testing.T) {
	fake := &enginetest.Fake{}
	n := newNode(t, fake, func(c *ServeConfig) { c.DefaultPool = 0 })
	b, err := os.ReadFile(filepath.Join(n.config.DataDir, "options.json"))
	var options map[string]any
	if err := errors.Join(err, json.Unmarshal(b, &options)); err != nil || options["data-dir"] != "data" {
		t.Errorf("%s, %v", b, err)
	}
	info, err := os.Stat(n.config.Socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the control socket: %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Dir(n.config.Socket)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("its directory: %v, %v", info.Mode(), err)
	}
}

func TestServeUndoesWhatItBegan(t *testing.T) {
	dir := t.TempDir()
	file := testenv.SparseFile(t, filepath.Join(dir, "file"), 10)
	broken := filepath.Join(dir, "broken")
	if err := errors.Join(os.Mkdir(broken, 0o700), os.WriteFile(filepath.Join(broken, "pools.json"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }() // accepts nothing
	for name, c := range map[string]struct {
		change func(*ServeConfig)
		want   string
	}{
		"data directory":  {func(c *ServeConfig) { c.DataDir = filepath.Join(file, "below") }, "file"},
		"control socket":  {func(c *ServeConfig) { c.Socket = file }, "no socket"},
		"nbd socket":      {func(c *ServeConfig) { c.NBDSockets = []string{file} }, "no socket"},
		"address":         {func(c *ServeConfig) { c.Listen = []string{taken.Addr().String()} }, taken.Addr().String()},
		"plain text":      {func(c *ServeConfig) { c.Listen = []string{"0.0.0.0:0"} }, "plain text"},
		"metrics":         {func(c *ServeConfig) { c.Metrics = "192.0.2.1:1" }, "--metrics"},
		"reactors":        {func(c *ServeConfig) { c.Reactors.CPUs = []int{1000} }, "1000"},
		"too few CPUs":    {func(c *ServeConfig) { c.Reactors = ReactorConfig{Reactors: 3, CPUs: []int{0}} }, "CPU"},
		"catalog":         {func(c *ServeConfig) { c.DataDir = broken }, "pools.json"},
		"TLS":             {func(c *ServeConfig) { c.TLS = nbd.TLSForced }, "TLS"},
		"the first pool":  {func(c *ServeConfig) { c.DefaultPool, c.PoolFile = mib, filepath.Join(dir, "no", "where") }, "where"},
		"file of a pool":  {func(c *ServeConfig) { c.DefaultPool, c.PoolFile = mib, file }, "file"},
		"options in json": {func(c *ServeConfig) { c.Options = func() {} }, "options"},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			config := ServeConfig{DataDir: filepath.Join(t.TempDir(), "data"), Socket: filepath.Join(t.TempDir(), "s"), Log: quiet(), Layout: &enginetest.Fake{}}
			c.change(&config)
			if err := Serve(t.Context(), config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want a word about %s", err, c.want)
			}
		})
	}
}

func TestServeEndsStreamsAndIdleClientsWhenItDrains(t *testing.T) {
	fake := &enginetest.Fake{}
	t.Cleanup(func() { _ = fake.Close() }) // memory only
	n := newNode(t, fake, nil)
	n.volume("data", mib)
	c := n.dial("data")
	stream, err := n.client.Events.Watch(t.Context(), &controlpb.WatchEventsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := stream.Recv(); err != nil || e.GetKind() != controlpb.EventKind_EVENT_KIND_POOL {
		t.Errorf("%v, %v", e, err)
	}
	j, err := n.client.Pools.Scrub(t.Context(), &controlpb.ScrubPoolRequest{})
	if err != nil {
		t.Fatal(err)
	}
	job, err := n.client.Jobs.Watch(t.Context(), &controlpb.WatchJobRequest{Id: j.GetId()})
	if err != nil {
		t.Fatal(err)
	}
	if j, err := job.Recv(); err != nil || j.GetState() != controlpb.JobState_JOB_STATE_RUNNING {
		t.Errorf("%v, %v", j, err)
	}
	began := time.Now()
	n.drain()
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, control.ErrUnavailable) {
		t.Errorf("events: %v", err)
	}
	if _, err := job.Recv(); !errors.Is(err, control.ErrUnavailable) {
		t.Errorf("job: %v", err)
	}
	<-c.Done()
	n.stop()
	if took := time.Since(began); took > controlPatience {
		t.Errorf("draining idle clients took %v", took)
	}
}

func TestServeGivesEachExportToItsClients(t *testing.T) {
	e := &engine.Engine{}
	v := newVolumes(e, true, map[string][]string{"": {"all"}, "a": {"ann"}, "p/a": {"pat"}, "a@s": {"sue"}, "b": {"bob"}})
	for x, want := range map[exported]string{
		{name: "a", pool: "p", volume: "a"}:                  "all ann pat",
		{name: "p/a", pool: "p", volume: "a"}:                "all ann pat",
		{name: "a@s", pool: "p", volume: "a", snapshot: "s"}: "all ann pat sue",
		{name: "c", pool: "p", volume: "c"}:                  "all",
	} {
		export := v.export(x)
		if got := strings.Join(export.ClientNames, " "); got != want || !export.TLSOnly || export.ReadOnly != (x.snapshot != "") {
			t.Errorf("%+v: %q, want %q", x, got, want)
		}
	}
}

func TestProblems(t *testing.T) {
	closed := func(err error) error { return &engine.NotOpenError{Pool: "p", Reason: err} }
	for _, c := range []struct {
		err  error
		want codes.Code
		why  control.Reason
	}{
		{pool.ErrNotFound, codes.NotFound, control.ErrNotFound},
		{fmt.Errorf("volume v: %w", pool.ErrExists), codes.AlreadyExists, control.ErrExists},
		{pool.ErrNoSpace, codes.ResourceExhausted, control.ErrNoSpace},
		{pool.ErrOverProvisioned, codes.ResourceExhausted, control.ErrOverProvisioned},
		{engine.ErrVolumes, codes.FailedPrecondition, control.ErrHasVolumes},
		{engine.ErrNoDefault, codes.InvalidArgument, control.ErrInvalid},
		{engine.ErrBusy, codes.Unavailable, control.ErrUnavailable},
		{&pool.MissingError{Pool: "p"}, codes.FailedPrecondition, control.ErrMissingDevice},
		{closed(&pool.MissingError{Pool: "p"}), codes.FailedPrecondition, control.ErrMissingDevice},
		{closed(pool.ErrNotFound), codes.Unavailable, control.ErrUnavailable}, // not: not found
		{closed(pool.ErrCorrupt), codes.DataLoss, control.ErrCorrupt},
		{closed(pool.ErrUnsupported), codes.FailedPrecondition, control.ErrUnsupportedFormat},
		{errors.New("whatever"), codes.Internal, control.ErrInternal},
	} {
		err := problem("volume", "v", c.err)
		if s := status.Convert(err); s.Code() != c.want || !errors.Is(err, c.why) || !strings.Contains(s.Message(), "v") {
			t.Errorf("%v: %v", c.err, s)
		}
	}
	if problem("", "", nil) != nil {
		t.Error("nil is an error")
	}
}

func TestJobStates(t *testing.T) {
	now := time.Now()
	for want, j := range map[controlpb.JobState]pool.Job{
		controlpb.JobState_JOB_STATE_RUNNING:  {Done: 1, Total: 2},
		controlpb.JobState_JOB_STATE_DONE:     {Done: 2, Total: 2, Ended: now},
		controlpb.JobState_JOB_STATE_FAILED:   {Done: 1, Total: 2, Ended: now, Err: "a device failed"},
		controlpb.JobState_JOB_STATE_CANCELED: {Done: 2, Total: 2, Ended: now, Stopped: true}, // the pool has shrunk meanwhile
	} {
		j.Kind = pool.JobScrub
		if m := jobMessage(engine.Job{Job: j}); m.GetState() != want || m.GetError() != j.Err {
			t.Errorf("%+v: %v", j, m)
		}
	}
}
