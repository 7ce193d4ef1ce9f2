package engine

import (
	"context"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// Pool is what the engine asks of an open pool. *pool.Pool is one; what each
// method does is said there.
type Pool interface {
	Close() error
	Info() pool.Info
	Grow() error
	AddDisk(d pool.Disk) error

	CreateVolume(s pool.VolumeSpec) (pool.VolumeInfo, error)
	Clone(volume, snapshot string, s pool.VolumeSpec) (pool.VolumeInfo, error)
	Volumes() []pool.VolumeInfo
	Volume(name string) (pool.VolumeInfo, error)
	Resize(volume string, size uint64) error
	DeleteVolume(volume string, cascade bool) (pool.Job, error)
	SetLabels(volume string, labels map[string]string) error
	SetLimits(volume string, l pool.Limits) error

	CreateSnapshot(volume, name string, labels map[string]string) (pool.SnapshotInfo, error)
	CreateSnapshotGroup(name string, volumes []string, labels map[string]string) ([]pool.SnapshotInfo, error)
	Snapshots(volume string) ([]pool.SnapshotInfo, error)
	DeleteSnapshot(volume, name string) (pool.Job, error)
	Revert(volume, snapshot string) error

	OpenVolume(name string) (datapath.Device, error)
	OpenSnapshot(volume, name string) (datapath.Device, error)

	Map(volume string) (pool.MapInfo, error)
	Changes(volume, since, until string, offset uint64, max int) (changes []pool.Change, next uint64, err error)
	Scrub(rate uint64) (pool.Job, error)
	StopScrub() error
	Jobs() []pool.Job
	WaitJob(ctx context.Context, id uint64) (pool.Job, error)
}

// Layout makes, finds and opens pools on devices: package pool, or a test's.
type Layout interface {
	Format(c pool.FormatConfig) (uuid.UUID, error)
	Probe(r *reactor.Reactor, d pool.Disk) (*pool.Label, error)
	Erase(r *reactor.Reactor, d pool.Disk) error
	Open(c pool.Config) (Pool, error)
}

// onDisk is the layout of package pool.
type onDisk struct{}

func (onDisk) Format(c pool.FormatConfig) (uuid.UUID, error) { return pool.Format(c) }
func (onDisk) Probe(r *reactor.Reactor, d pool.Disk) (*pool.Label, error) {
	return pool.Probe(r, d)
}
func (onDisk) Erase(r *reactor.Reactor, d pool.Disk) error { return pool.Erase(r, d) }
func (onDisk) Open(c pool.Config) (Pool, error) {
	p, err := pool.Open(c)
	if err != nil {
		return nil, err // not a Pool that holds a nil *pool.Pool
	}
	return p, nil
}
