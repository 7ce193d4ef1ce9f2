package daemon

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// stamp is a time on the wire; absent for none.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

var poolStates = map[pool.State]controlpb.PoolState{
	pool.StateOnline:   controlpb.PoolState_POOL_STATE_ONLINE,
	pool.StateReadOnly: controlpb.PoolState_POOL_STATE_READ_ONLY,
	pool.StateStopped:  controlpb.PoolState_POOL_STATE_STOPPED,
	engine.StateClosed: controlpb.PoolState_POOL_STATE_UNAVAILABLE,
}

func (c *controller) poolMessage(i engine.PoolInfo) *controlpb.Pool {
	p := &controlpb.Pool{
		Name: i.Name, Uuid: i.UUID.String(), State: poolStates[i.State], Reason: i.Reason,
		Created: stamp(i.Created), FormatVersion: i.Version,
		TotalBytes: i.Total, AllocatedBytes: i.Allocated, MetadataBytes: i.Info.Metadata, FreeBytes: i.Free,
		ReservedBytes: i.Reserved, ReserveBytes: i.Reserve, AvailableBytes: i.Available, ProvisionedBytes: i.Provisioned,
		OverProvisionPercent: uint32(c.config.OverProvision),
		VolumeCount:          uint32(i.Volumes), SnapshotCount: uint32(i.Snapshots), DirtyRegionCount: uint64(i.DirtyRegions),
		Journal: &controlpb.Journal{SizeBytes: i.Journal.Bytes, UsedBytes: i.Journal.Used, GroupCount: i.Journal.Groups},
	}
	for index, d := range i.Devices {
		p.Devices = append(p.Devices, &controlpb.PoolDevice{Index: uint32(index), Uuid: d.UUID.String(), Path: d.Path, SizeBytes: d.Size, Missing: !d.Present})
	}
	if i.Open && p.Reason == "" && p.State == controlpb.PoolState_POOL_STATE_READ_ONLY {
		p.Reason = "it was opened read-only"
	}
	return p
}

func foundMessage(f engine.FoundPool) *controlpb.FoundPool {
	p := &controlpb.FoundPool{Name: f.Name, Uuid: f.UUID.String(), Created: stamp(f.Created), FormatVersion: f.Version, Open: f.Open}
	for _, d := range f.Devices {
		p.Devices = append(p.Devices, &controlpb.PoolDevice{Index: uint32(d.Index), Uuid: d.UUID.String(), Path: d.Path, SizeBytes: d.Size})
	}
	for _, m := range f.Missing {
		p.Devices = append(p.Devices, &controlpb.PoolDevice{Index: uint32(m.Index), Uuid: m.UUID.String(), Path: m.Hint, SizeBytes: m.Size, Missing: true})
	}
	return p
}

func (c *controller) volumeMessage(i pool.VolumeInfo) *controlpb.Volume {
	return &controlpb.Volume{
		Name: i.Name, Uuid: i.UUID.String(), Pool: i.Pool, SizeBytes: i.Size, Thick: i.Thick, Labels: i.Labels,
		Created: stamp(i.Created), Parent: i.Parent, SnapshotCount: uint32(i.Snapshots), OpenCount: uint32(i.Open),
		Depth: uint32(i.Depth), AllocatedBytes: i.Allocated, Uris: c.uris(c.volumes.exportName(i.Pool, i.Name)),
		Devices: c.devices.ofVolume(i.Pool, i.Name), Limits: limitsMessage(i.Limits),
	}
}

// limitsOf are limits of the wire, none for none.
func limitsOf(l *controlpb.Limits) pool.Limits {
	return pool.Limits{IOPS: l.GetIops(), Bandwidth: l.GetBandwidthBytes()}
}

func limitsMessage(l pool.Limits) *controlpb.Limits {
	if l == (pool.Limits{}) {
		return nil
	}
	return &controlpb.Limits{Iops: l.IOPS, BandwidthBytes: l.Bandwidth}
}

func (c *controller) snapshotMessage(poolName string, s pool.SnapshotInfo) *controlpb.Snapshot {
	return &controlpb.Snapshot{
		Volume: s.Volume, Name: s.Name, Uuid: s.UUID.String(), Pool: poolName, SizeBytes: s.Size, Created: stamp(s.Created),
		Labels: s.Labels, Clones: s.Clones, OpenCount: uint32(s.Open), AllocatedBytes: s.Allocated,
		Uris: c.uris(c.volumes.exportName(poolName, s.Volume) + "@" + s.Name),
	}
}

var jobKinds = map[pool.JobKind]controlpb.JobKind{
	pool.JobMerge:  controlpb.JobKind_JOB_KIND_MERGE,
	pool.JobDelete: controlpb.JobKind_JOB_KIND_DELETE,
	pool.JobScrub:  controlpb.JobKind_JOB_KIND_SCRUB,
}

func jobMessage(j engine.Job) *controlpb.Job {
	m := &controlpb.Job{
		Id: j.ID, Kind: jobKinds[j.Kind], State: controlpb.JobState_JOB_STATE_RUNNING, Pool: j.Pool, Target: j.Target,
		DoneBytes: j.Done, TotalBytes: j.Total, Started: stamp(j.Started), Ended: stamp(j.Ended), Error: j.Err, DamagedBlocks: j.Found, Note: j.Note,
	}
	switch {
	case j.Ended.IsZero():
	case j.Stopped:
		m.State = controlpb.JobState_JOB_STATE_CANCELED
	case j.Err != "":
		m.State = controlpb.JobState_JOB_STATE_FAILED
	default:
		m.State = controlpb.JobState_JOB_STATE_DONE
	}
	return m
}

var eventKinds = map[pool.EventKind]controlpb.EventKind{
	pool.EventCorrupt:     controlpb.EventKind_EVENT_KIND_CORRUPT,
	pool.EventIO:          controlpb.EventKind_EVENT_KIND_IO_ERROR,
	pool.EventStopped:     controlpb.EventKind_EVENT_KIND_STOPPED,
	pool.EventSpaceLow:    controlpb.EventKind_EVENT_KIND_SPACE_LOW,
	pool.EventFull:        controlpb.EventKind_EVENT_KIND_FULL,
	pool.EventRepaired:    controlpb.EventKind_EVENT_KIND_REPAIRED,
	engine.EventOpened:    controlpb.EventKind_EVENT_KIND_POOL,
	engine.EventNotOpened: controlpb.EventKind_EVENT_KIND_POOL,
	engine.EventClosed:    controlpb.EventKind_EVENT_KIND_POOL,
	engine.EventAmbiguous: controlpb.EventKind_EVENT_KIND_POOL,
}

func eventMessage(e engine.Event) *controlpb.Event {
	return &controlpb.Event{
		Sequence: e.Sequence, Time: stamp(e.Time), Kind: eventKinds[e.Kind], Pool: e.Pool, Volume: e.Volume,
		OffsetBytes: e.Offset, Device: e.Device, AddressBytes: e.Address, Message: e.Message,
	}
}
