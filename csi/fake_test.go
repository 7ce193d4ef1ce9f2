package csi

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// fakeDaemon serves the control API from memory, with one pool or more. Its devices
// are loop devices on sparse files, or only told of (paths "/dev/fakeN").
type fakeDaemon struct {
	controlpb.UnimplementedPoolsServer
	controlpb.UnimplementedDevicesServer
	controlpb.UnimplementedNodeServer

	dir   string
	loops bool
	serve *grpc.Server
	addr  string

	mu        sync.Mutex
	pools     map[string]*controlpb.Pool
	volumes   map[string]*controlpb.Volume              // by pool/name
	snapshots map[string]map[string]*controlpb.Snapshot // by pool/volume, name
	devices   map[string]*controlpb.Device              // by pool/volume
	changes   []*controlpb.Change                       // of every snapshot
	clock     int64
	next      int
	fails     map[string]error // by method: returned instead, as long as it is there
	calls     map[string]int
}

type fakeVolumes struct {
	controlpb.UnimplementedVolumesServer
	*fakeDaemon
}

type fakeSnapshots struct {
	controlpb.UnimplementedSnapshotsServer
	*fakeDaemon
}

type fakeNode struct {
	controlpb.UnimplementedNodeServer
	*fakeDaemon
}

type fakePools struct {
	controlpb.UnimplementedPoolsServer
	*fakeDaemon
}

type fakeDevices struct {
	controlpb.UnimplementedDevicesServer
	*fakeDaemon
}

func newFakeDaemon(t *testing.T) *fakeDaemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "csi-") // short enough for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // nothing of value
	f := &fakeDaemon{
		dir: dir, addr: filepath.Join(dir, "control.sock"), pools: map[string]*controlpb.Pool{}, volumes: map[string]*controlpb.Volume{},
		snapshots: map[string]map[string]*controlpb.Snapshot{}, devices: map[string]*controlpb.Device{}, fails: map[string]error{}, calls: map[string]int{},
	}
	f.pool("default", 100*gib)
	f.start(t)
	t.Cleanup(func() {
		f.stop()
		for _, d := range f.devices {
			_ = exec.Command("losetup", "-d", d.GetPath()).Run() // gone already in a test that passed
		}
	})
	return f
}

func (f *fakeDaemon) pool(name string, size uint64) *controlpb.Pool {
	p := &controlpb.Pool{Name: name, State: controlpb.PoolState_POOL_STATE_ONLINE, TotalBytes: size, AvailableBytes: size}
	f.pools[name] = p
	return p
}

func (f *fakeDaemon) start(t *testing.T) {
	t.Helper()
	_ = os.Remove(f.addr) // of before
	l, err := net.Listen("unix", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	f.serve = grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, r any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		method := strings.TrimPrefix(info.FullMethod, "/ashlar.control.v1.")
		f.mu.Lock()
		f.calls[method]++
		err := f.fails[method]
		f.mu.Unlock()
		if err != nil {
			return nil, err
		}
		return h(ctx, r)
	}), grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		f.mu.Lock()
		err := f.fails[strings.TrimPrefix(info.FullMethod, "/ashlar.control.v1.")]
		f.mu.Unlock()
		if err != nil {
			return err
		}
		return h(srv, s)
	}))
	controlpb.RegisterPoolsServer(f.serve, &fakePools{fakeDaemon: f})
	controlpb.RegisterVolumesServer(f.serve, &fakeVolumes{fakeDaemon: f})
	controlpb.RegisterSnapshotsServer(f.serve, &fakeSnapshots{fakeDaemon: f})
	controlpb.RegisterDevicesServer(f.serve, &fakeDevices{fakeDaemon: f})
	controlpb.RegisterNodeServer(f.serve, &fakeNode{fakeDaemon: f})
	s := f.serve
	go func() { _ = s.Serve(l) }() // ends with stop
}

func (f *fakeDaemon) stop() { f.serve.Stop() }

// fail has a method, such as Volumes/Create, return err until it is called again
// with nil.
func (f *fakeDaemon) fail(method string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.fails, method)
	} else {
		f.fails[method] = err
	}
}

func (f *fakeDaemon) now() *timestamppb.Timestamp {
	f.clock++
	return &timestamppb.Timestamp{Seconds: 1_700_000_000 + f.clock}
}

func (f *fakeDaemon) file(pool, volume string) string { return filepath.Join(f.dir, pool+"-"+volume) }

func (f *fakePools) List(context.Context, *controlpb.ListPoolsRequest) (*controlpb.ListPoolsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &controlpb.ListPoolsResponse{}
	for _, name := range slices.Sorted(maps.Keys(f.pools)) {
		l.Pools = append(l.Pools, proto.Clone(f.pools[name]).(*controlpb.Pool))
	}
	return l, nil
}

func (f *fakePools) Get(_ context.Context, r *controlpb.GetPoolRequest) (*controlpb.Pool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.pools[r.GetName()]; p != nil {
		return proto.Clone(p).(*controlpb.Pool), nil
	}
	return nil, control.Errorf(control.ErrNotFound, "pool", r.GetName(), "")
}

func (f *fakeDaemon) get(pool, name string) (*controlpb.Volume, error) {
	v := f.volumes[pool+"/"+name]
	if v == nil {
		return nil, control.Errorf(control.ErrNotFound, "volume", name, "")
	}
	v = proto.Clone(v).(*controlpb.Volume)
	v.SnapshotCount = uint32(len(f.snapshots[pool+"/"+name]))
	return v, nil
}

func (f *fakeDaemon) create(v *controlpb.Volume) (*controlpb.Volume, error) {
	p := f.pools[v.GetPool()]
	switch {
	case p == nil:
		return nil, control.Errorf(control.ErrNotFound, "pool", v.GetPool(), "")
	case f.volumes[v.GetPool()+"/"+v.GetName()] != nil:
		return nil, control.Errorf(control.ErrExists, "volume", v.GetName(), "")
	case !validName(v.GetName(), 62):
		return nil, control.Errorf(control.ErrInvalid, "volume", v.GetName(), "")
	case v.GetThick() && v.GetSizeBytes() > p.GetAvailableBytes():
		return nil, control.Errorf(control.ErrNoSpace, "volume", v.GetName(), "")
	}
	if v.GetThick() {
		p.AvailableBytes -= v.GetSizeBytes()
	}
	p.ProvisionedBytes += v.GetSizeBytes()
	p.VolumeCount++
	v.Created = f.now()
	f.volumes[v.GetPool()+"/"+v.GetName()] = v
	return f.get(v.GetPool(), v.GetName())
}

func (f *fakeVolumes) Create(_ context.Context, r *controlpb.CreateVolumeRequest) (*controlpb.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.create(&controlpb.Volume{Pool: r.GetPool(), Name: r.GetName(), SizeBytes: r.GetSizeBytes(), Thick: r.GetThick(), Labels: r.GetLabels(), Limits: r.GetLimits()})
}

func (f *fakeVolumes) Get(_ context.Context, r *controlpb.GetVolumeRequest) (*controlpb.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.get(r.GetPool(), r.GetName())
}

func (f *fakeVolumes) List(_ context.Context, r *controlpb.ListVolumesRequest) (*controlpb.ListVolumesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &controlpb.ListVolumesResponse{}
	for _, key := range slices.Sorted(maps.Keys(f.volumes)) {
		v := f.volumes[key]
		fits := true
		for k, want := range r.GetLabels() {
			fits = fits && v.GetLabels()[k] == want
		}
		if fits {
			l.Volumes = append(l.Volumes, proto.Clone(v).(*controlpb.Volume))
		}
	}
	return l, nil
}

func (f *fakeVolumes) Resize(_ context.Context, r *controlpb.ResizeVolumeRequest) (*controlpb.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.volumes[r.GetPool()+"/"+r.GetName()]
	if v == nil {
		return nil, control.Errorf(control.ErrNotFound, "volume", r.GetName(), "")
	}
	if p := f.pools[r.GetPool()]; p.GetOverProvisionPercent() > 0 && r.GetSizeBytes() > p.GetTotalBytes() {
		return nil, control.Errorf(control.ErrOverProvisioned, "volume", r.GetName(), "")
	}
	v.SizeBytes = r.GetSizeBytes()
	if f.devices[r.GetPool()+"/"+r.GetName()] != nil && f.loops {
		if err := os.Truncate(f.file(r.GetPool(), r.GetName()), int64(v.SizeBytes)); err != nil {
			return nil, err
		}
	}
	return f.get(r.GetPool(), r.GetName())
}

func (f *fakeVolumes) Delete(_ context.Context, r *controlpb.DeleteVolumeRequest) (*controlpb.Job, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := r.GetPool() + "/" + r.GetName()
	v := f.volumes[key]
	switch {
	case v == nil:
		return nil, control.Errorf(control.ErrNotFound, "volume", r.GetName(), "")
	case f.devices[key] != nil:
		return nil, control.Errorf(control.ErrInUse, "volume", r.GetName(), "")
	case len(f.snapshots[key]) > 0:
		return nil, control.Errorf(control.ErrHasSnapshots, "volume", r.GetName(), "")
	}
	delete(f.volumes, key)
	_ = os.Remove(f.file(r.GetPool(), r.GetName())) // only there once it was attached
	return &controlpb.Job{Id: "1", State: controlpb.JobState_JOB_STATE_DONE}, nil
}

func (f *fakeVolumes) Clone(_ context.Context, r *controlpb.CloneVolumeRequest) (*controlpb.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.snapshots[r.GetPool()+"/"+r.GetSourceVolume()][r.GetSourceSnapshot()]
	if s == nil {
		return nil, control.Errorf(control.ErrNotFound, "snapshot", r.GetSourceSnapshot(), "")
	}
	v, err := f.create(&controlpb.Volume{Pool: r.GetPool(), Name: r.GetName(), SizeBytes: r.GetSizeBytes(), Thick: r.GetThick(), Labels: r.GetLabels(), Limits: r.GetLimits()})
	if err == nil && f.loops {
		if _, statErr := os.Stat(s.GetUuid()); statErr == nil {
			err = exec.Command("cp", "--sparse=always", s.GetUuid(), f.file(r.GetPool(), r.GetName())).Run()
		}
	}
	return v, err
}

func (f *fakeVolumes) Changes(r *controlpb.ChangesRequest, stream grpc.ServerStreamingServer[controlpb.ChangesResponse]) error {
	f.mu.Lock()
	size, list := f.volumes[r.GetPool()+"/"+r.GetVolume()].GetSizeBytes(), slices.Clone(f.changes)
	f.mu.Unlock()
	for i, c := range list {
		if c.GetOffsetBytes()+c.GetLengthBytes() <= r.GetOffsetBytes() {
			continue
		}
		if err := stream.Send(&controlpb.ChangesResponse{SizeBytes: size, Changes: list[i : i+1]}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeVolumes) SetLabels(_ context.Context, r *controlpb.SetLabelsRequest) (*controlpb.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.volumes[r.GetPool()+"/"+r.GetName()]
	if v == nil {
		return nil, control.Errorf(control.ErrNotFound, "volume", r.GetName(), "")
	}
	v.Labels = r.GetLabels()
	return f.get(r.GetPool(), r.GetName())
}

func (f *fakeVolumes) SetLimits(_ context.Context, r *controlpb.SetLimitsRequest) (*controlpb.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.volumes[r.GetPool()+"/"+r.GetName()]
	if v == nil {
		return nil, control.Errorf(control.ErrNotFound, "volume", r.GetName(), "")
	}
	v.Limits = r.GetLimits()
	return f.get(r.GetPool(), r.GetName())
}

func (f *fakeSnapshots) Create(_ context.Context, r *controlpb.CreateSnapshotRequest) (*controlpb.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.take(r.GetPool(), r.GetVolume(), r.GetName(), r.GetLabels())
}

func (f *fakeDaemon) take(pool, volume, name string, labels map[string]string) (*controlpb.Snapshot, error) {
	key := pool + "/" + volume
	v := f.volumes[key]
	switch {
	case v == nil:
		return nil, control.Errorf(control.ErrNotFound, "volume", volume, "")
	case f.snapshots[key][name] != nil:
		return nil, control.Errorf(control.ErrExists, "snapshot", volume+"@"+name, "")
	case f.snapshots[key] == nil:
		f.snapshots[key] = map[string]*controlpb.Snapshot{}
	}
	s := &controlpb.Snapshot{Volume: volume, Name: name, Pool: pool, SizeBytes: v.GetSizeBytes(), Created: f.now(), Labels: labels}
	if f.loops {
		s.Uuid = f.file(pool, volume) + "@" + name // its file
		if _, err := os.Stat(f.file(pool, volume)); err == nil {
			if err := exec.Command("cp", "--sparse=always", f.file(pool, volume), s.GetUuid()).Run(); err != nil {
				return nil, err
			}
		}
	}
	f.snapshots[key][name] = s
	return proto.Clone(s).(*controlpb.Snapshot), nil
}

func (f *fakeSnapshots) CreateGroup(_ context.Context, r *controlpb.CreateGroupRequest) (*controlpb.CreateGroupResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	reply := &controlpb.CreateGroupResponse{}
	for _, v := range r.GetVolumes() {
		s, err := f.take(r.GetPool(), v, r.GetName(), maps.Clone(r.GetLabels()))
		if err != nil {
			return nil, err
		}
		reply.Snapshots = append(reply.Snapshots, s)
	}
	return reply, nil
}

func (f *fakeSnapshots) List(_ context.Context, r *controlpb.ListSnapshotsRequest) (*controlpb.ListSnapshotsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.GetVolume() != "" && f.volumes[r.GetPool()+"/"+r.GetVolume()] == nil {
		return nil, control.Errorf(control.ErrNotFound, "volume", r.GetVolume(), "")
	}
	l := &controlpb.ListSnapshotsResponse{}
	for _, key := range slices.Sorted(maps.Keys(f.snapshots)) {
		for _, s := range f.snapshots[key] {
			if (r.GetPool() == "" || r.GetPool() == s.GetPool()) && (r.GetVolume() == "" || r.GetVolume() == s.GetVolume()) {
				l.Snapshots = append(l.Snapshots, proto.Clone(s).(*controlpb.Snapshot))
			}
		}
	}
	return l, nil
}

func (f *fakeSnapshots) Delete(_ context.Context, r *controlpb.DeleteSnapshotRequest) (*controlpb.Job, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := r.GetPool() + "/" + r.GetVolume()
	if f.snapshots[key][r.GetName()] == nil {
		return nil, control.Errorf(control.ErrNotFound, "snapshot", r.GetName(), "")
	}
	if f.loops {
		_ = os.Remove(f.snapshots[key][r.GetName()].GetUuid()) // only there if the volume was ever attached
	}
	delete(f.snapshots[key], r.GetName())
	return &controlpb.Job{Id: "1", State: controlpb.JobState_JOB_STATE_DONE}, nil
}

func (f *fakeDevices) Attach(_ context.Context, r *controlpb.AttachRequest) (*controlpb.Device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.volumes[r.GetSource()]
	if v == nil {
		return nil, control.Errorf(control.ErrNotFound, "volume", r.GetSource(), "")
	}
	if d := f.devices[r.GetSource()]; d != nil {
		return d, nil
	}
	f.next++
	d := &controlpb.Device{Path: fmt.Sprintf("/dev/fake%d", f.next), Via: controlpb.Via_VIA_FUSE, Source: r.GetSource(), Pool: v.GetPool(), Volume: v.GetName(), SizeBytes: v.GetSizeBytes(), State: controlpb.DeviceState_DEVICE_STATE_ONLINE}
	if f.loops {
		path := f.file(v.GetPool(), v.GetName())
		if file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
			return nil, err
		} else if err := file.Truncate(int64(v.GetSizeBytes())); err != nil {
			return nil, err
		} else if err := file.Close(); err != nil {
			return nil, err
		}
		out, err := exec.Command("losetup", "--find", "--show", path).Output()
		if err != nil {
			return nil, control.Errorf(control.ErrIO, "device", path, "losetup: %v", err)
		}
		d.Path = strings.TrimSpace(string(out))
	}
	f.devices[r.GetSource()] = d
	return d, nil
}

func (f *fakeDevices) Detach(_ context.Context, r *controlpb.DetachRequest) (*controlpb.DetachResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, d := range f.devices {
		if d.GetPath() != r.GetName() && d.GetSource() != r.GetName() {
			continue
		}
		if f.loops {
			if out, err := exec.Command("findmnt", "--noheadings", "--source", d.GetPath()).Output(); err == nil {
				return nil, control.Errorf(control.ErrInUse, "device", d.GetPath(), "device %s: mounted: %s", d.GetPath(), out)
			}
			if err := exec.Command("losetup", "-d", d.GetPath()).Run(); err != nil {
				return nil, control.Errorf(control.ErrInUse, "device", d.GetPath(), "%v", err)
			}
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // it goes when its last opener does
				if _, err := os.Stat("/sys/block/" + filepath.Base(d.GetPath()) + "/loop"); err != nil || time.Now().After(deadline) {
					break
				}
			}
		}
		delete(f.devices, key)
		return &controlpb.DetachResponse{Device: d}, nil
	}
	return nil, control.Errorf(control.ErrNotFound, "device", r.GetName(), "")
}

func (f *fakeDevices) List(context.Context, *controlpb.ListDevicesRequest) (*controlpb.ListDevicesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &controlpb.ListDevicesResponse{}
	for _, key := range slices.Sorted(maps.Keys(f.devices)) {
		l.Devices = append(l.Devices, proto.Clone(f.devices[key]).(*controlpb.Device))
	}
	return l, nil
}

func (f *fakeNode) Health(context.Context, *controlpb.HealthRequest) (*controlpb.HealthResponse, error) {
	return &controlpb.HealthResponse{State: controlpb.HealthState_HEALTH_STATE_OK}, nil
}

// ---- the driver under test --------------------------------------------------

// rig is a driver that serves, on a fake daemon.
type rig struct {
	t      *testing.T
	daemon *fakeDaemon
	config Config
	driver *Driver
	log    *testenv.Output
	stop   func() error

	spec.IdentityClient
	spec.ControllerClient
	spec.GroupControllerClient
	spec.NodeClient
	spec.SnapshotMetadataClient
}

// wait ends a test that waits for something which does not come.
const wait = 60 * time.Second

func newRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	f := newFakeDaemon(t)
	r := &rig{t: t, daemon: f, log: &testenv.Output{}}
	r.config = Config{
		Mode: ModeAll, Endpoint: "unix://" + filepath.Join(f.dir, "csi.sock"), Control: "unix://" + f.addr, NodeID: "node-1",
		KubeletDir: f.dir, Version: "v0", Timeout: wait, Log: slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&r.config)
	}
	t.Cleanup(func() {
		if err := r.end(); err != nil {
			t.Errorf("the driver ended with: %v", err)
		}
	})
	return r.start()
}

func (r *rig) start() *rig {
	r.t.Helper()
	ready := make(chan struct{})
	c := r.config
	c.Ready = func() { close(ready) }
	var err error
	if r.driver, err = New(c); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.driver.Serve(ctx) }() // ends with cancel
	select {
	case <-ready:
	case err := <-ended:
		cancel()
		r.t.Fatalf("the driver did not start: %v", err)
	}
	conn, err := grpc.NewClient(r.config.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.stop = func() error {
		_ = conn.Close() // nothing is asked any more
		cancel()
		return <-ended
	}
	r.IdentityClient, r.ControllerClient, r.GroupControllerClient = spec.NewIdentityClient(conn), spec.NewControllerClient(conn), spec.NewGroupControllerClient(conn)
	r.NodeClient, r.SnapshotMetadataClient = spec.NewNodeClient(conn), spec.NewSnapshotMetadataClient(conn)
	return r
}

// end stops the driver once.
func (r *rig) end() error {
	if r.stop == nil {
		return nil
	}
	stop := r.stop
	r.stop = nil
	return stop()
}

// restart is a driver that was killed: nothing is kept but the sockets' path.
func (r *rig) restart() {
	r.t.Helper()
	if err := r.end(); err != nil {
		r.t.Errorf("the driver ended with: %v", err)
	}
	r.start()
}

func mountCapability(fs string) *spec.VolumeCapability {
	return &spec.VolumeCapability{
		AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{FsType: fs}},
		AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func blockCapability() *spec.VolumeCapability {
	return &spec.VolumeCapability{
		AccessType: &spec.VolumeCapability_Block{Block: &spec.VolumeCapability_BlockVolume{}},
		AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// create makes a volume.
func (r *rig) create(name string, size int64, change func(*spec.CreateVolumeRequest)) *spec.Volume {
	r.t.Helper()
	request := &spec.CreateVolumeRequest{Name: name, VolumeCapabilities: []*spec.VolumeCapability{mountCapability("")}, CapacityRange: &spec.CapacityRange{RequiredBytes: size}}
	if change != nil {
		change(request)
	}
	reply, err := r.CreateVolume(r.t.Context(), request)
	if err != nil {
		r.t.Fatalf("volume %s: %v", name, err)
	}
	return reply.GetVolume()
}

// newRigLog is a log that nobody reads.
func newRigLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

// waitLog waits until the driver has logged something.
func waitLog(t *testing.T, r *rig, text string) {
	t.Helper()
	for deadline := time.Now().Add(wait); !strings.Contains(r.log.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the log never says %q:\n%s", text, r.log)
		}
	}
}
