package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/nbd"
)

// controller serves the control API: it translates, the engine does.
type controller struct {
	config   *ServeConfig
	engine   *engine.Engine
	volumes  *volumes
	server   *nbd.Server
	devices  *devices
	reactors []*reactor.Reactor
	observer diskObserver // nil: nobody wants the kernel observed
	uris     func(export string) []string
	started  time.Time
	stopping <-chan struct{} // closed when the daemon ends: streams end
}

func (c *controller) register(s *grpc.Server) {
	controlpb.RegisterPoolsServer(s, &poolsService{controller: c})
	controlpb.RegisterVolumesServer(s, &volumesService{controller: c})
	controlpb.RegisterSnapshotsServer(s, &snapshotsService{controller: c})
	controlpb.RegisterJobsServer(s, &jobsService{controller: c})
	controlpb.RegisterEventsServer(s, &eventsService{controller: c})
	controlpb.RegisterDevicesServer(s, &devicesService{controller: c})
	controlpb.RegisterObserveServer(s, &observeService{controller: c})
	controlpb.RegisterNodeServer(s, &nodeService{controller: c})
}

// until is ctx, which also ends with the daemon.
func (c *controller) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with the daemon, or the call
		select {
		case <-c.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// ending is err, or that the daemon ends.
func (c *controller) ending(kind, name string, err error) error {
	select {
	case <-c.stopping:
		return control.Errorf(control.ErrUnavailable, kind, name, "the daemon is going down")
	default:
		return problem(kind, name, err)
	}
}

// ref is how the engine knows a volume.
func ref(poolName, volume string) string {
	if poolName == "" {
		return volume
	}
	return poolName + "/" + volume
}

// absolute wants paths that mean the same here as there.
func absolute(kind, name string, paths ...string) error {
	for _, p := range paths {
		if !filepath.IsAbs(p) {
			return control.Errorf(control.ErrInvalid, kind, name, "the path %q is not absolute", p)
		}
	}
	return nil
}

// ---- pools ----------------------------------------------------------------

type poolsService struct {
	controlpb.UnimplementedPoolsServer
	*controller
}

// reply is a pool, or what went wrong with it.
func (s *poolsService) reply(name string, i engine.PoolInfo, err error) (*controlpb.Pool, error) {
	if err != nil {
		return nil, problem("pool", name, err)
	}
	return s.poolMessage(i), nil
}

func (s *poolsService) Create(_ context.Context, r *controlpb.CreatePoolRequest) (*controlpb.Pool, error) {
	if err := absolute("pool", r.GetName(), r.GetPaths()...); err != nil {
		return nil, err
	}
	i, err := s.engine.CreatePool(engine.PoolSpec{Name: r.GetName(), Paths: r.GetPaths(), Size: r.GetFileSizeBytes(), Force: r.GetForce()})
	if errors.Is(err, pool.ErrExists) {
		if old, oldErr := s.engine.Pool(r.GetName()); oldErr == nil && r.GetName() != "" {
			told := control.Errorf(control.ErrExists, "pool", r.GetName(), "%w", err)
			told.SameSpec = samePool(r, old)
			return nil, told
		}
	}
	return s.reply(r.GetName(), i, err)
}

// samePool says whether a pool is what a request asked for.
func samePool(r *controlpb.CreatePoolRequest, i engine.PoolInfo) bool {
	if len(r.GetPaths()) == 0 {
		return len(i.Devices) == 1 && i.Devices[0].Size == r.GetFileSizeBytes()
	}
	have := map[string]bool{}
	for _, d := range i.Devices {
		have[d.Path] = true
	}
	for _, p := range r.GetPaths() {
		if !have[filepath.Clean(p)] {
			return false
		}
	}
	return len(have) == len(r.GetPaths())
}

func (s *poolsService) List(context.Context, *controlpb.ListPoolsRequest) (*controlpb.ListPoolsResponse, error) {
	reply := &controlpb.ListPoolsResponse{}
	for _, i := range s.engine.Pools() {
		reply.Pools = append(reply.Pools, s.poolMessage(i))
	}
	return reply, nil
}

func (s *poolsService) Get(_ context.Context, r *controlpb.GetPoolRequest) (*controlpb.Pool, error) {
	i, err := s.engine.Pool(r.GetName())
	return s.reply(r.GetName(), i, err)
}

func (s *poolsService) Grow(_ context.Context, r *controlpb.GrowPoolRequest) (*controlpb.Pool, error) {
	i, err := s.engine.GrowPool(r.GetName(), r.GetFileSizeBytes())
	p, err := s.reply(r.GetName(), i, err)
	return p, remedied(err, control.ErrInUse, "disconnect their clients first")
}

func (s *poolsService) AddDevice(_ context.Context, r *controlpb.AddDeviceRequest) (*controlpb.Pool, error) {
	if err := absolute("pool", r.GetName(), r.GetPath()); err != nil {
		return nil, err
	}
	i, err := s.engine.AddDevice(r.GetName(), r.GetPath(), r.GetFileSizeBytes(), r.GetForce())
	return s.reply(r.GetName(), i, err)
}

func (s *poolsService) Scan(_ context.Context, r *controlpb.ScanPoolsRequest) (*controlpb.ScanPoolsResponse, error) {
	if err := absolute("", "", r.GetPaths()...); err != nil {
		return nil, err
	}
	found, failures, err := s.engine.Scan(r.GetPaths())
	if err != nil {
		return nil, problem("", "", err)
	}
	reply := &controlpb.ScanPoolsResponse{}
	for _, f := range found {
		reply.Pools = append(reply.Pools, foundMessage(f))
	}
	for _, f := range failures {
		reply.Failures = append(reply.Failures, &controlpb.ScanFailure{Path: f.Path, Message: f.Err.Error()})
	}
	return reply, nil
}

func (s *poolsService) Open(ctx context.Context, r *controlpb.OpenPoolRequest) (*controlpb.Pool, error) {
	if err := absolute("pool", r.GetName(), r.GetPaths()...); err != nil {
		return nil, err
	}
	spec := engine.ImportSpec{Name: r.GetName(), Paths: r.GetPaths(), ReadOnly: r.GetReadOnly(), ScanDevices: true}
	if id, err := uuid.Parse(r.GetName()); err == nil {
		spec.Name, spec.UUID = "", id
	}
	i, err := s.engine.ImportPool(spec)
	if err == nil {
		s.devices.recover(context.WithoutCancel(ctx)) // those that waited for it
	}
	p, err := s.reply(r.GetName(), i, err)
	return p, remedied(err, control.ErrNotFound, "`ashlar pool scan` shows where pools are")
}

func (s *poolsService) Close(ctx context.Context, r *controlpb.ClosePoolRequest) (*controlpb.ClosePoolResponse, error) {
	i, err := s.engine.Pool(r.GetName())
	if err != nil {
		return nil, problem("pool", r.GetName(), err)
	}
	if err := s.unattached(i.Name); err != nil {
		return nil, err
	}
	release := s.volumes.hold(i.Name)
	defer release()
	if err := s.close(ctx, i.Name, r.GetDisconnect()); err != nil {
		return nil, remedied(problem("pool", i.Name, err), control.ErrInUse, "disconnect their clients, or give --disconnect")
	}
	return &controlpb.ClosePoolResponse{}, nil
}

// unattached refuses what cannot be done under the devices of a pool.
func (c *controller) unattached(poolName string) error {
	paths := c.devices.ofPool(poolName)
	if len(paths) == 0 {
		return nil
	}
	told := control.Errorf(control.ErrInUse, "pool", poolName, "pool %s has volumes attached: %s", poolName, strings.Join(paths, ", "))
	told.Remedy = "detach them first"
	return told
}

// inUse is err, which may say that a volume is in use, or snapshots of it, with the
// remedy where some of these are attached.
func (c *controller) inUse(err error, poolName, volume string, some func(*exported) bool) error {
	i, lookErr := c.engine.Volume(ref(poolName, volume))
	if lookErr != nil {
		return err
	}
	return detachFirst(err, c.devices.ofExports(func(x *exported) bool { return x.pool == i.Pool && x.volume == i.Name && some(x) }))
}

// drainPatience is how long the clients of a pool have for what they have in flight
// when it is closed; nbd.ServerConfig.DrainTimeout is the same at the end of all.
const drainPatience = 10 * time.Second

// close closes a pool, after its clients have gone if disconnect.
func (s *poolsService) close(ctx context.Context, name string, disconnect bool) error {
	cutAt := time.Now().Add(drainPatience)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if disconnect {
			mine, err := s.exportsOf(name)
			if err != nil {
				return err
			}
			s.server.Disconnect(func(export string) bool { return mine[export] }, time.Now().After(cutAt))
		}
		err := s.engine.ClosePool(name)
		if !disconnect || !errors.Is(err, pool.ErrInUse) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, ctx.Err())
		case <-s.stopping:
			return engine.ErrClosed
		}
	}
}

func (c *controller) exportsOf(poolName string) (map[string]bool, error) {
	all, err := c.volumes.names()
	if err != nil {
		return nil, err
	}
	mine := map[string]bool{}
	for _, x := range all {
		if x.pool == poolName {
			mine[x.name] = true
			// A connection keeps the name it was made with, from before another pool
			// brought a volume of the same one.
			mine[strings.TrimPrefix(x.name, poolName+"/")] = true
		}
	}
	for _, x := range all {
		if x.pool != poolName {
			delete(mine, x.name)
		}
	}
	return mine, nil
}

func (s *poolsService) Scrub(_ context.Context, r *controlpb.ScrubPoolRequest) (*controlpb.Job, error) {
	j, err := s.engine.Scrub(r.GetName(), r.GetRateBytes())
	if err != nil {
		return nil, problem("pool", r.GetName(), err)
	}
	return jobMessage(j), nil
}

func (s *poolsService) StopScrub(_ context.Context, r *controlpb.StopScrubRequest) (*controlpb.Job, error) {
	j, err := s.engine.StopScrub(r.GetName())
	if errors.Is(err, pool.ErrNotFound) {
		if i, poolErr := s.engine.Pool(r.GetName()); poolErr == nil { // the scrub is what is not there
			return nil, control.Errorf(control.ErrNotFound, "job", "", "pool %s: no scrub is running", i.Name)
		}
	}
	if err != nil {
		return nil, problem("pool", r.GetName(), err)
	}
	return jobMessage(j), nil
}

func (s *poolsService) Destroy(_ context.Context, r *controlpb.DestroyPoolRequest) (*controlpb.DestroyPoolResponse, error) {
	if err := s.engine.DestroyPool(r.GetName(), r.GetVolumes()); err != nil {
		err = remedied(problem("pool", r.GetName(), err), control.ErrInUse, "disconnect their clients first")
		return nil, detachFirst(err, s.devices.ofPool(r.GetName()))
	}
	return &controlpb.DestroyPoolResponse{}, nil
}

// ---- volumes --------------------------------------------------------------

type volumesService struct {
	controlpb.UnimplementedVolumesServer
	*controller
}

func (s *volumesService) reply(name string, i pool.VolumeInfo, err error) (*controlpb.Volume, error) {
	if err != nil {
		return nil, problem("volume", name, err)
	}
	return s.volumeMessage(i), nil
}

// get describes a volume after it was changed.
func (s *volumesService) get(poolName, name string) (*controlpb.Volume, error) {
	i, err := s.engine.Volume(ref(poolName, name))
	return s.reply(name, i, err)
}

// exists completes the error of a volume that is there already.
func (s *volumesService) exists(poolName, name string, err error, same func(pool.VolumeInfo) bool) error {
	told := control.Errorf(control.ErrExists, "volume", name, "%w", err)
	if old, oldErr := s.engine.Volume(ref(poolName, name)); oldErr == nil {
		told.SameSpec = same(old)
	}
	return told
}

func (s *volumesService) Create(_ context.Context, r *controlpb.CreateVolumeRequest) (*controlpb.Volume, error) {
	i, err := s.engine.CreateVolume(r.GetPool(), pool.VolumeSpec{Name: r.GetName(), Size: r.GetSizeBytes(), Thick: r.GetThick(), Labels: r.GetLabels(), Limits: limitsOf(r.GetLimits())})
	if errors.Is(err, pool.ErrExists) {
		return nil, s.exists(r.GetPool(), r.GetName(), err, func(old pool.VolumeInfo) bool {
			return old.Size == r.GetSizeBytes() && old.Thick == r.GetThick() && old.Parent == "" && maps.Equal(old.Labels, r.GetLabels()) && old.Limits == limitsOf(r.GetLimits())
		})
	}
	return s.reply(r.GetName(), i, err)
}

func (s *volumesService) Clone(_ context.Context, r *controlpb.CloneVolumeRequest) (*controlpb.Volume, error) {
	source := ref(r.GetPool(), r.GetSourceVolume())
	i, err := s.engine.Clone(source, r.GetSourceSnapshot(), pool.VolumeSpec{Name: r.GetName(), Size: r.GetSizeBytes(), Thick: r.GetThick(), Labels: r.GetLabels(), Limits: limitsOf(r.GetLimits())})
	if errors.Is(err, pool.ErrExists) {
		return nil, s.exists(r.GetPool(), r.GetName(), err, func(old pool.VolumeInfo) bool {
			size := r.GetSizeBytes()
			if size == 0 {
				size = s.snapshotSize(source, r.GetSourceSnapshot())
			}
			_, plain, ok := strings.Cut(r.GetSourceVolume(), "/")
			if !ok {
				plain = r.GetSourceVolume()
			}
			return old.Parent == plain+"@"+r.GetSourceSnapshot() && old.Size == size && old.Thick == r.GetThick() && maps.Equal(old.Labels, r.GetLabels()) &&
				old.Limits == limitsOf(r.GetLimits())
		})
	}
	if err != nil {
		// What is not found is the source.
		if errors.Is(err, pool.ErrNotFound) {
			return nil, problem("snapshot", r.GetSourceVolume()+"@"+r.GetSourceSnapshot(), err)
		}
		return nil, problem("volume", r.GetName(), err)
	}
	return s.volumeMessage(i), nil
}

// snapshotSize is the size of a snapshot, 0 when there is none.
func (c *controller) snapshotSize(volume, name string) uint64 {
	list, err := c.engine.Snapshots(volume)
	if err != nil {
		return 0
	}
	for _, s := range list {
		if s.Name == name {
			return s.Size
		}
	}
	return 0
}

func (s *volumesService) List(_ context.Context, r *controlpb.ListVolumesRequest) (*controlpb.ListVolumesResponse, error) {
	list, err := s.engine.Volumes(r.GetPool())
	if err != nil {
		return nil, problem("pool", r.GetPool(), err)
	}
	reply := &controlpb.ListVolumesResponse{}
	for _, i := range list {
		fits := true
		for key, value := range r.GetLabels() {
			have, ok := i.Labels[key]
			fits = fits && ok && have == value
		}
		if fits {
			reply.Volumes = append(reply.Volumes, s.volumeMessage(i))
		}
	}
	return reply, nil
}

func (s *volumesService) Get(_ context.Context, r *controlpb.GetVolumeRequest) (*controlpb.Volume, error) {
	return s.get(r.GetPool(), r.GetName())
}

func (s *volumesService) Resize(ctx context.Context, r *controlpb.ResizeVolumeRequest) (*controlpb.Volume, error) {
	if err := s.engine.Resize(ref(r.GetPool(), r.GetName()), r.GetSizeBytes()); err != nil {
		return nil, problem("volume", r.GetName(), err)
	}
	if i, err := s.engine.Volume(ref(r.GetPool(), r.GetName())); err == nil {
		s.devices.resized(ctx, i.Pool, i.Name)
	}
	return s.get(r.GetPool(), r.GetName())
}

func (s *volumesService) Delete(_ context.Context, r *controlpb.DeleteVolumeRequest) (*controlpb.Job, error) {
	j, err := s.engine.DeleteVolume(ref(r.GetPool(), r.GetName()), r.GetSnapshots())
	if err != nil {
		return nil, s.inUse(problem("volume", r.GetName(), err), r.GetPool(), r.GetName(), func(*exported) bool { return true })
	}
	return jobMessage(j), nil
}

func (s *volumesService) SetLabels(_ context.Context, r *controlpb.SetLabelsRequest) (*controlpb.Volume, error) {
	if err := s.engine.SetLabels(ref(r.GetPool(), r.GetName()), r.GetLabels()); err != nil {
		return nil, problem("volume", r.GetName(), err)
	}
	return s.get(r.GetPool(), r.GetName())
}

func (s *volumesService) SetLimits(_ context.Context, r *controlpb.SetLimitsRequest) (*controlpb.Volume, error) {
	if err := s.engine.SetLimits(ref(r.GetPool(), r.GetName()), limitsOf(r.GetLimits())); err != nil {
		return nil, problem("volume", r.GetName(), err)
	}
	return s.get(r.GetPool(), r.GetName())
}

func (s *volumesService) Map(_ context.Context, r *controlpb.MapVolumeRequest) (*controlpb.VolumeMap, error) {
	name := ref(r.GetPool(), r.GetName())
	m, err := s.engine.Map(name)
	if err != nil {
		return nil, problem("volume", r.GetName(), err)
	}
	i, err := s.engine.Volume(name)
	if err != nil {
		return nil, problem("volume", r.GetName(), err)
	}
	reply := &controlpb.VolumeMap{
		Volume: m.Volume, Pool: i.Pool, SizeBytes: m.Size, MappedBytes: m.Mapped,
		ExclusiveBytes: m.Exclusive, SharedBytes: m.Shared, ReclaimableBytes: m.Reclaimable,
	}
	for _, snapshot := range m.Snapshots {
		reply.Snapshots = append(reply.Snapshots, s.snapshotMessage(i.Pool, snapshot))
	}
	return reply, nil
}

// changesMax is how many runs go into one message of Changes: some 100 KiB.
const changesMax = 4096

func (s *volumesService) Changes(r *controlpb.ChangesRequest, stream grpc.ServerStreamingServer[controlpb.ChangesResponse]) error {
	name := ref(r.GetPool(), r.GetVolume())
	i, err := s.engine.Volume(name)
	if err != nil {
		return problem("volume", r.GetVolume(), err)
	}
	size := i.Size
	if r.GetUntil() != "" {
		size = s.snapshotSize(name, r.GetUntil())
	}
	for offset := r.GetOffsetBytes(); ; {
		if err := stream.Context().Err(); err != nil {
			return s.ending("volume", r.GetVolume(), err)
		}
		select {
		case <-s.stopping:
			return s.ending("volume", r.GetVolume(), nil)
		default:
		}
		changes, next, err := s.engine.Changes(name, r.GetSince(), r.GetUntil(), offset, changesMax)
		if err != nil {
			return problem("volume", r.GetVolume(), err)
		}
		reply := &controlpb.ChangesResponse{SizeBytes: size, NextBytes: next}
		for _, c := range changes {
			reply.Changes = append(reply.Changes, &controlpb.Change{OffsetBytes: c.Offset, LengthBytes: c.Length, Zero: c.Zero})
		}
		if err := stream.Send(reply); err != nil {
			return err
		}
		if next >= size {
			return nil
		}
		if next <= offset {
			return control.Errorf(control.ErrInternal, "volume", r.GetVolume(), "volume %s: its changes do not go on after %d", r.GetVolume(), offset)
		}
		offset = next
	}
}

// ---- snapshots ------------------------------------------------------------

type snapshotsService struct {
	controlpb.UnimplementedSnapshotsServer
	*controller
}

func (s *snapshotsService) Create(_ context.Context, r *controlpb.CreateSnapshotRequest) (*controlpb.Snapshot, error) {
	name := ref(r.GetPool(), r.GetVolume())
	full := r.GetVolume() + "@" + r.GetName()
	i, err := s.engine.CreateSnapshot(name, r.GetName(), r.GetLabels())
	if errors.Is(err, pool.ErrExists) {
		told := control.Errorf(control.ErrExists, "snapshot", full, "%w", err)
		if list, listErr := s.engine.Snapshots(name); listErr == nil {
			for _, old := range list {
				told.SameSpec = told.SameSpec || old.Name == r.GetName() && maps.Equal(old.Labels, r.GetLabels())
			}
		}
		return nil, told
	}
	if err != nil {
		if errors.Is(err, pool.ErrNotFound) {
			return nil, problem("volume", r.GetVolume(), err)
		}
		return nil, problem("snapshot", full, err)
	}
	v, err := s.engine.Volume(name)
	if err != nil {
		return nil, problem("volume", r.GetVolume(), err)
	}
	return s.snapshotMessage(v.Pool, i), nil
}

func (s *snapshotsService) CreateGroup(_ context.Context, r *controlpb.CreateGroupRequest) (*controlpb.CreateGroupResponse, error) {
	var names []string
	for _, volume := range r.GetVolumes() {
		names = append(names, ref(r.GetPool(), volume))
	}
	list, err := s.engine.CreateSnapshotGroup(r.GetName(), names, r.GetLabels())
	if errors.Is(err, pool.ErrExists) {
		told := control.Errorf(control.ErrExists, "snapshot", r.GetName(), "%w", err)
		list, same := s.group(names, r.GetName())
		for _, old := range list {
			same = same && maps.Equal(old.Labels, r.GetLabels())
		}
		told.SameSpec = same
		return nil, told
	}
	if err != nil {
		return nil, problem("snapshot", r.GetName(), err)
	}
	reply := &controlpb.CreateGroupResponse{}
	for _, i := range list {
		reply.Snapshots = append(reply.Snapshots, s.snapshotMessage(i.Pool, i.SnapshotInfo))
	}
	return reply, nil
}

// group finds the snapshots of one name of several volumes; whole says that all are
// there, made together.
func (s *snapshotsService) group(names []string, snapshot string) (list []engine.SnapshotInfo, whole bool) {
	for _, name := range names {
		all, err := s.engine.Snapshots(name)
		if err != nil {
			return nil, false
		}
		for _, i := range all {
			if i.Name == snapshot {
				list = append(list, i)
			}
		}
	}
	whole = len(list) == len(names)
	for _, i := range list {
		whole = whole && i.Created.Equal(list[0].Created)
	}
	return list, whole
}

func (s *snapshotsService) List(_ context.Context, r *controlpb.ListSnapshotsRequest) (*controlpb.ListSnapshotsResponse, error) {
	list, err := s.engine.Snapshots(ref(r.GetPool(), r.GetVolume())) // "POOL/" for all of a pool
	if err != nil {
		kind, name := "volume", r.GetVolume()
		if name == "" {
			kind, name = "pool", r.GetPool()
		}
		return nil, problem(kind, name, err)
	}
	reply := &controlpb.ListSnapshotsResponse{}
	for _, i := range list {
		reply.Snapshots = append(reply.Snapshots, s.snapshotMessage(i.Pool, i.SnapshotInfo))
	}
	return reply, nil
}

func (s *snapshotsService) Revert(_ context.Context, r *controlpb.RevertSnapshotRequest) (*controlpb.Volume, error) {
	name := ref(r.GetPool(), r.GetVolume())
	if err := s.engine.Revert(name, r.GetName()); err != nil {
		err = problem("snapshot", r.GetVolume()+"@"+r.GetName(), err)
		return nil, s.inUse(err, r.GetPool(), r.GetVolume(), func(x *exported) bool { return x.snapshot == "" })
	}
	i, err := s.engine.Volume(name)
	if err != nil {
		return nil, problem("volume", r.GetVolume(), err)
	}
	return s.volumeMessage(i), nil
}

func (s *snapshotsService) Delete(_ context.Context, r *controlpb.DeleteSnapshotRequest) (*controlpb.Job, error) {
	j, err := s.engine.DeleteSnapshot(ref(r.GetPool(), r.GetVolume()), r.GetName())
	if err != nil {
		err = problem("snapshot", r.GetVolume()+"@"+r.GetName(), err)
		return nil, s.inUse(err, r.GetPool(), r.GetVolume(), func(x *exported) bool { return x.snapshot == r.GetName() })
	}
	return jobMessage(j), nil
}

// ---- jobs -----------------------------------------------------------------

type jobsService struct {
	controlpb.UnimplementedJobsServer
	*controller
}

func (s *jobsService) List(_ context.Context, r *controlpb.ListJobsRequest) (*controlpb.ListJobsResponse, error) {
	list, err := s.engine.Jobs(r.GetPool())
	if err != nil {
		return nil, problem("pool", r.GetPool(), err)
	}
	reply := &controlpb.ListJobsResponse{}
	for _, j := range list {
		if !r.GetRunning() || j.Ended.IsZero() {
			reply.Jobs = append(reply.Jobs, jobMessage(j))
		}
	}
	return reply, nil
}

// The interval of Watch: what is asked for within bounds that cost nobody much.
const (
	watchInterval    = 500 * time.Millisecond
	watchIntervalMin = 10 * time.Millisecond
)

func (s *jobsService) Watch(r *controlpb.WatchJobRequest, stream grpc.ServerStreamingServer[controlpb.Job]) error {
	interval := watchInterval
	if r.GetInterval() != nil {
		interval = max(r.GetInterval().AsDuration(), watchIntervalMin)
	}
	ctx, cancel := s.until(stream.Context())
	defer cancel()
	var sent engine.Job
	for first := true; ; first = false {
		j, err := s.engine.Job(r.GetId())
		if err != nil {
			return s.ending("job", r.GetId(), err)
		}
		if first || j.Done != sent.Done || j.Note != sent.Note || !j.Ended.IsZero() {
			if err := stream.Send(jobMessage(j)); err != nil {
				return err
			}
			sent = j
		}
		if !j.Ended.IsZero() {
			return nil
		}
		wait, done := context.WithTimeout(ctx, interval)
		_, err = s.engine.WaitJob(wait, r.GetId())
		done()
		if ctx.Err() != nil || err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return s.ending("job", r.GetId(), errors.Join(err, ctx.Err()))
		}
	}
}

// ---- events ---------------------------------------------------------------

type eventsService struct {
	controlpb.UnimplementedEventsServer
	*controller
}

func (s *eventsService) Watch(r *controlpb.WatchEventsRequest, stream grpc.ServerStreamingServer[controlpb.Event]) error {
	if err := s.known(r.GetPool()); err != nil {
		return err
	}
	send := func(e engine.Event) error {
		if r.GetPool() != "" && e.Pool != r.GetPool() {
			return nil
		}
		return stream.Send(eventMessage(e))
	}
	if !r.GetFollow() {
		for _, e := range s.engine.Events(r.GetAfter()) {
			if err := send(e); err != nil {
				return err
			}
		}
		return nil
	}
	ctx, cancel := s.until(stream.Context())
	defer cancel()
	subscription := s.engine.Subscribe(r.GetAfter())
	for {
		e, _, err := subscription.Next(ctx) // what is lost shows as a gap of sequences
		if err != nil {
			return s.ending("", "", err)
		}
		if err := send(e); err != nil {
			return err
		}
	}
}

// known refuses the name of a pool that neither is nor was: nothing would ever be told
// of it.
func (s *eventsService) known(name string) error {
	if name == "" || slices.ContainsFunc(s.engine.Events(0), func(e engine.Event) bool { return e.Pool == name }) {
		return nil
	}
	_, err := s.engine.Pool(name)
	return problem("pool", name, err)
}

// ---- node -----------------------------------------------------------------

type nodeService struct {
	controlpb.UnimplementedNodeServer
	*controller
}

func (s *nodeService) Info(context.Context, *controlpb.InfoRequest) (*controlpb.InfoResponse, error) {
	hostname, _ := os.Hostname() // "" when the kernel does not say
	reply := &controlpb.InfoResponse{
		Version: s.config.Version, Commit: s.config.Commit, Hostname: hostname,
		Started: stamp(s.started), Uptime: durationpb.New(time.Since(s.started)), DataDir: s.config.DataDir,
	}
	for _, i := range s.engine.Pools() {
		reply.Pools = append(reply.Pools, s.poolMessage(i))
	}
	all, err := s.volumes.names()
	if err != nil {
		return nil, s.ending("", "", err)
	}
	readOnly := map[string]bool{}
	for _, p := range reply.GetPools() {
		readOnly[p.GetName()] = p.GetState() == controlpb.PoolState_POOL_STATE_READ_ONLY
	}
	connections := s.server.Connections()
	for _, x := range all {
		reply.Exports = append(reply.Exports, &controlpb.Export{
			Name: x.name, Pool: x.pool, Uris: s.uris(x.name), SizeBytes: x.size,
			ReadOnly: x.snapshot != "" || readOnly[x.pool], ConnectionCount: uint32(connections[x.name]),
		})
	}
	return reply, nil
}

func (s *nodeService) Health(context.Context, *controlpb.HealthRequest) (*controlpb.HealthResponse, error) {
	state, reasons := s.health()
	return &controlpb.HealthResponse{State: state, Reasons: reasons}, nil
}

// health says whether every pool and device of the node serves. It has failed when
// there are pools and none does.
func (c *controller) health() (controlpb.HealthState, []string) {
	select {
	case <-c.stopping:
		return controlpb.HealthState_HEALTH_STATE_FAILED, []string{"the daemon is going down"}
	default:
	}
	var reasons []string
	list := c.engine.Pools()
	serving := 0
	for _, i := range list {
		switch i.State {
		case pool.StateOnline:
			serving++
			continue
		case pool.StateReadOnly:
			serving++
			reasons = append(reasons, fmt.Sprintf("pool %s is read-only: %s", i.Name, i.Reason))
		case pool.StateStopped:
			reasons = append(reasons, fmt.Sprintf("pool %s has stopped: %s", i.Name, i.Reason))
		default:
			reasons = append(reasons, fmt.Sprintf("pool %s is not open: %s", i.Name, i.Reason))
		}
	}
	if c.devices != nil {
		reasons = append(reasons, c.devices.waiting()...)
	}
	switch {
	case len(reasons) == 0:
		return controlpb.HealthState_HEALTH_STATE_OK, nil
	case serving == 0 && len(list) > 0:
		return controlpb.HealthState_HEALTH_STATE_FAILED, reasons
	}
	return controlpb.HealthState_HEALTH_STATE_DEGRADED, reasons
}
