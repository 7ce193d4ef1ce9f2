// Package enginetest holds a layout of pools that keeps volumes in memory: for
// tests of what stands on the engine, and of the engine itself, that are about
// names, devices and lives of pools and not about bytes on disks.
//
// Labels are real: they lie at the start of each device, so that devices are
// found, moved, lost and copied as files. Everything else is in the Fake, which
// outlives the engine it serves as a disk would.
package enginetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// Fake is an engine.Layout. The zero value is ready.
type Fake struct {
	mu    sync.Mutex
	pools map[uuid.UUID]*state

	// FailOpen, unless nil, may refuse to open a pool. Set it before use.
	FailOpen func(name string) error
}

// Close gives the memory of all volumes back.
func (f *Fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, s := range f.pools {
		for _, v := range s.volumes {
			errs = append(errs, v.store.Close())
			for _, snapshot := range v.snapshots {
				errs = append(errs, snapshot.store.Close())
			}
		}
	}
	f.pools = nil
	return errors.Join(errs...)
}

// state is what a pool holds, open or not.
type state struct {
	mu      sync.Mutex
	label   pool.Label
	volumes map[string]*volume
	jobs    []pool.Job
	wake    chan struct{} // closed when a job ends
	open    bool
}

type volume struct {
	info      pool.VolumeInfo
	store     *memdev.Store
	open      int
	snapshots []*snapshot
}

type snapshot struct {
	info  pool.SnapshotInfo
	store *memdev.Store
	open  int
}

// storeMax is the most a volume can grow to: address space, not memory.
const storeMax = 1 << 30

const magic = "enginetest pool\n"

func write(path string, label *pool.Label) error {
	b, err := json.Marshal(label)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	block := make([]byte, datapath.BlockSize)
	copy(block, magic)
	copy(block[len(magic):], b)
	_, err = f.WriteAt(block, 0)
	return errors.Join(err, f.Close())
}

func read(path string) (label *pool.Label, foreign bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer func() { _ = f.Close() }() // read-only
	block := make([]byte, datapath.BlockSize)
	if _, err := f.ReadAt(block, 0); err != nil {
		return nil, false, err
	}
	text, ours := bytes.CutPrefix(block, []byte(magic))
	if !ours {
		return nil, len(bytes.Trim(block, "\x00")) > 0, nil
	}
	label = &pool.Label{}
	return label, false, json.Unmarshal(bytes.TrimRight(text, "\x00"), label)
}

// Format implements engine.Layout.
func (f *Fake) Format(c pool.FormatConfig) (uuid.UUID, error) {
	label := pool.Label{Pool: uuid.New(), Name: c.Name, Generation: 1, Version: 1, Created: time.Unix(1700000000, 0).UTC()}
	for i, d := range c.Disks {
		old, foreign, err := read(d.Path)
		switch {
		case err != nil:
			return uuid.Nil, err
		case (old != nil || foreign) && !c.Force:
			return uuid.Nil, fmt.Errorf("%s: %w", d.Path, pool.ErrForeign)
		}
		label.Members = append(label.Members, pool.Member{Index: i, UUID: uuid.New(), Size: d.Device.Info().Size, Hint: d.Path})
	}
	for i, d := range c.Disks {
		mine := label
		mine.Device, mine.Index = label.Members[i].UUID, i
		if err := write(d.Path, &mine); err != nil {
			return uuid.Nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pools == nil {
		f.pools = map[uuid.UUID]*state{}
	}
	f.pools[label.Pool] = &state{label: label, volumes: map[string]*volume{}, wake: make(chan struct{})}
	return label.Pool, nil
}

// Probe implements engine.Layout.
func (f *Fake) Probe(_ *reactor.Reactor, d pool.Disk) (*pool.Label, error) {
	label, _, err := read(d.Path)
	if err == nil && label == nil {
		err = pool.ErrNotPool
	}
	return label, err
}

// Erase implements engine.Layout.
func (f *Fake) Erase(_ *reactor.Reactor, d pool.Disk) error {
	file, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(make([]byte, datapath.BlockSize), 0)
	return errors.Join(err, file.Close())
}

// Open implements engine.Layout.
func (f *Fake) Open(c pool.Config) (engine.Pool, error) {
	var best *pool.Label
	have := map[uuid.UUID]pool.Disk{}
	for _, d := range c.Disks {
		label, _, err := read(d.Path)
		if err != nil || label == nil {
			return nil, fmt.Errorf("%s: %w", d.Path, errors.Join(err, pool.ErrNotPool))
		}
		have[label.Device] = d
		if best == nil || label.Generation > best.Generation {
			best = label
		}
	}
	if best == nil {
		return nil, pool.ErrInvalid
	}
	if f.FailOpen != nil {
		if err := f.FailOpen(best.Name); err != nil {
			return nil, err
		}
	}
	missing := &pool.MissingError{Pool: best.Name}
	for _, m := range best.Members {
		if _, ok := have[m.UUID]; !ok {
			missing.Missing = append(missing.Missing, m)
		}
	}
	if len(missing.Missing) > 0 && !c.ReadOnly {
		return nil, missing
	}
	f.mu.Lock()
	s := f.pools[best.Pool]
	f.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("pool %s: %w", best.Name, pool.ErrCorrupt)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open {
		return nil, fmt.Errorf("pool %s: opened twice: %w", best.Name, pool.ErrInUse)
	}
	s.open = true
	p := &Pool{state: s, config: c, disks: c.Disks, Fail: c.Event}
	if !c.ReadOnly {
		for i, m := range best.Members {
			s.label.Members[i].Hint = have[m.UUID].Path
		}
	}
	return p, nil
}

// Pool is an open pool of a Fake.
type Pool struct {
	*state
	config pool.Config
	disks  []pool.Disk
	Fail   func(pool.Event) // reports an event as if the pool had met it
}

// Close implements engine.Pool.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = false
	for _, v := range p.volumes {
		if v.open > 0 {
			return fmt.Errorf("volume %s is open", v.info.Name)
		}
	}
	return nil
}

// Info implements engine.Pool.
func (p *Pool) Info() pool.Info {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := pool.Info{Name: p.label.Name, UUID: p.label.Pool, State: pool.StateOnline, Members: slices.Clone(p.label.Members), Created: p.label.Created, Version: p.label.Version, Volumes: len(p.volumes)}
	if p.config.ReadOnly {
		i.State, i.Reason = pool.StateReadOnly, "opened read-only"
	}
	for _, m := range i.Members {
		i.Total += m.Size
	}
	for _, v := range p.volumes {
		i.Provisioned += v.info.Size
		i.Allocated += v.store.Allocated()
		i.Snapshots += len(v.snapshots)
	}
	i.Metadata = 1 << 20
	i.Free = i.Total - i.Metadata - i.Allocated
	i.Available = i.Free
	i.Journal = pool.JournalInfo{Bytes: 4 << 20, Used: 4096, Groups: 7}
	return i
}

// Grow implements engine.Pool.
func (p *Pool) Grow() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.config.ReadOnly {
		return pool.ErrReadOnly
	}
	for i, m := range p.label.Members {
		for _, d := range p.disks {
			if label, _, _ := read(d.Path); label != nil && label.Device == m.UUID {
				p.label.Members[i].Size = d.Device.Info().Size
			}
		}
	}
	return p.relabelLocked()
}

func (p *Pool) relabelLocked() error {
	p.label.Generation++
	for i, m := range p.label.Members {
		mine := p.label
		mine.Device, mine.Index = m.UUID, i
		if err := write(m.Hint, &mine); err != nil {
			return err
		}
	}
	return nil
}

// AddDisk implements engine.Pool.
func (p *Pool) AddDisk(d pool.Disk) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.config.ReadOnly {
		return pool.ErrReadOnly
	}
	if old, foreign, err := read(d.Path); err != nil || old != nil || foreign {
		return fmt.Errorf("%s: %w", d.Path, errors.Join(err, pool.ErrForeign))
	}
	p.label.Members = append(p.label.Members, pool.Member{Index: len(p.label.Members), UUID: uuid.New(), Size: d.Device.Info().Size, Hint: d.Path})
	p.disks = append(p.disks, d)
	return p.relabelLocked()
}

func notFound(kind, name string) error { return fmt.Errorf("%s %s: %w", kind, name, pool.ErrNotFound) }

func (p *Pool) makeLocked(s pool.VolumeSpec, parent string) (*volume, error) {
	switch {
	case p.config.ReadOnly:
		return nil, pool.ErrReadOnly
	case p.volumes[s.Name] != nil:
		return nil, fmt.Errorf("volume %s: %w", s.Name, pool.ErrExists)
	case s.Size == 0 || s.Size%datapath.BlockSize != 0:
		return nil, fmt.Errorf("volume %s: size %d: %w", s.Name, s.Size, pool.ErrInvalid)
	case s.Size > storeMax:
		return nil, fmt.Errorf("volume %s: %w", s.Name, pool.ErrNoSpace)
	}
	store, err := memdev.NewStore(storeMax)
	if err != nil {
		return nil, err
	}
	v := &volume{store: store, info: pool.VolumeInfo{Name: s.Name, UUID: uuid.New(), Pool: p.label.Name, Size: s.Size, Thick: s.Thick, Labels: s.Labels, Limits: s.Limits, Created: time.Unix(1700000001, 0).UTC(), Parent: parent, Depth: 1}}
	p.volumes[s.Name] = v
	return v, nil
}

func (v *volume) describe() pool.VolumeInfo {
	i := v.info
	i.Snapshots, i.Open, i.Allocated = len(v.snapshots), v.open, v.store.Allocated()
	return i
}

// CreateVolume implements engine.Pool.
func (p *Pool) CreateVolume(s pool.VolumeSpec) (pool.VolumeInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.makeLocked(s, "")
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	return v.describe(), nil
}

// Clone implements engine.Pool.
func (p *Pool) Clone(volume, name string, s pool.VolumeSpec) (pool.VolumeInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, from, err := p.snapshotLocked(volume, name)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	if s.Size == 0 {
		s.Size = from.info.Size
	}
	v, err := p.makeLocked(s, volume+"@"+name)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	copyStore(v.store, from.store, from.info.Size)
	return v.describe(), nil
}

func copyStore(to, from *memdev.Store, size uint64) {
	page := make([]byte, memdev.PageSize)
	for offset := uint64(0); offset < size; offset += memdev.PageSize {
		if hole := from.Read(page, offset); hole {
			to.Zero(offset, memdev.PageSize, false)
			continue
		}
		to.Write(page, offset)
	}
}

// Volumes implements engine.Pool.
func (p *Pool) Volumes() []pool.VolumeInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []pool.VolumeInfo
	for _, v := range p.volumes {
		list = append(list, v.describe())
	}
	slices.SortFunc(list, func(a, b pool.VolumeInfo) int { return strings.Compare(a.Name, b.Name) })
	return list
}

func (p *Pool) volumeLocked(name string) (*volume, error) {
	v := p.volumes[name]
	if v == nil {
		return nil, notFound("volume", name)
	}
	return v, nil
}

func (p *Pool) snapshotLocked(volume, name string) (*volume, *snapshot, error) {
	v, err := p.volumeLocked(volume)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range v.snapshots {
		if s.info.Name == name {
			return v, s, nil
		}
	}
	return v, nil, notFound("snapshot", volume+"@"+name)
}

// Volume implements engine.Pool.
func (p *Pool) Volume(name string) (pool.VolumeInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(name)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	return v.describe(), nil
}

// Resize implements engine.Pool.
func (p *Pool) Resize(volume string, size uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(volume)
	switch {
	case err != nil:
		return err
	case size < v.info.Size || size%datapath.BlockSize != 0:
		return fmt.Errorf("volume %s: %w", volume, pool.ErrInvalid)
	}
	v.info.Size = size
	return nil
}

func (p *Pool) endedLocked(kind pool.JobKind, target string, total uint64) pool.Job {
	now := time.Unix(1700000002, 0).UTC()
	j := pool.Job{ID: uint64(len(p.jobs) + 1), Kind: kind, Pool: p.label.Name, Target: target, Done: total, Total: total, Started: now, Ended: now}
	p.jobs = append(p.jobs, j)
	return j
}

// DeleteVolume implements engine.Pool.
func (p *Pool) DeleteVolume(volume string, cascade bool) (pool.Job, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(volume)
	switch {
	case err != nil:
		return pool.Job{}, err
	case v.open > 0:
		return pool.Job{}, fmt.Errorf("volume %s: %w", volume, pool.ErrInUse)
	case len(v.snapshots) > 0 && !cascade:
		return pool.Job{}, fmt.Errorf("volume %s: %w", volume, pool.ErrHasSnapshots)
	}
	delete(p.volumes, volume)
	err = v.store.Close()
	for _, s := range v.snapshots {
		err = errors.Join(err, s.store.Close())
	}
	return p.endedLocked(pool.JobDelete, volume, v.info.Size), err
}

// SetLabels implements engine.Pool.
func (p *Pool) SetLabels(volume string, labels map[string]string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(volume)
	if err == nil {
		v.info.Labels = labels
	}
	return err
}

// SetLimits implements engine.Pool.
func (p *Pool) SetLimits(volume string, l pool.Limits) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(volume)
	if err == nil {
		v.info.Limits = l
	}
	return err
}

// CreateSnapshotGroup implements engine.Pool.
func (p *Pool) CreateSnapshotGroup(name string, volumes []string, labels map[string]string) ([]pool.SnapshotInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, volume := range volumes {
		v, old, err := p.snapshotLocked(volume, name)
		switch {
		case v == nil:
			return nil, err
		case old != nil:
			return nil, fmt.Errorf("snapshot %s@%s: %w", volume, name, pool.ErrExists)
		case slices.Contains(volumes[:i], volume):
			return nil, fmt.Errorf("snapshot %s: volume %s is named twice: %w", name, volume, pool.ErrInvalid)
		}
	}
	var infos []pool.SnapshotInfo
	for _, volume := range volumes {
		s, err := p.createSnapshotLocked(volume, name, labels)
		if err != nil {
			return nil, err
		}
		infos = append(infos, s)
	}
	return infos, nil
}

// CreateSnapshot implements engine.Pool.
func (p *Pool) CreateSnapshot(volume, name string, labels map[string]string) (pool.SnapshotInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.createSnapshotLocked(volume, name, labels)
}

func (p *Pool) createSnapshotLocked(volume, name string, labels map[string]string) (pool.SnapshotInfo, error) {
	v, old, err := p.snapshotLocked(volume, name)
	switch {
	case v == nil:
		return pool.SnapshotInfo{}, err
	case old != nil:
		return pool.SnapshotInfo{}, fmt.Errorf("snapshot %s@%s: %w", volume, name, pool.ErrExists)
	}
	store, err := memdev.NewStore(storeMax)
	if err != nil {
		return pool.SnapshotInfo{}, err
	}
	copyStore(store, v.store, v.info.Size)
	s := &snapshot{store: store, info: pool.SnapshotInfo{Volume: volume, Name: name, UUID: uuid.New(), Size: v.info.Size, Labels: labels, Created: time.Unix(1700000003, 0).UTC()}}
	v.snapshots = append(v.snapshots, s)
	return s.info, nil
}

// Snapshots implements engine.Pool.
func (p *Pool) Snapshots(volume string) ([]pool.SnapshotInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if volume != "" && p.volumes[volume] == nil {
		return nil, notFound("volume", volume)
	}
	var list []pool.SnapshotInfo
	for name, v := range p.volumes {
		if volume != "" && name != volume {
			continue
		}
		for _, s := range v.snapshots {
			i := s.info
			i.Open, i.Allocated = s.open, s.store.Allocated()
			list = append(list, i)
		}
	}
	slices.SortStableFunc(list, func(a, b pool.SnapshotInfo) int { return strings.Compare(a.Volume, b.Volume) })
	return list, nil
}

// DeleteSnapshot implements engine.Pool.
func (p *Pool) DeleteSnapshot(volume, name string) (pool.Job, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, s, err := p.snapshotLocked(volume, name)
	switch {
	case err != nil:
		return pool.Job{}, err
	case s.open > 0:
		return pool.Job{}, fmt.Errorf("snapshot %s@%s: %w", volume, name, pool.ErrInUse)
	}
	v.snapshots = slices.DeleteFunc(v.snapshots, func(other *snapshot) bool { return other == s })
	return p.endedLocked(pool.JobMerge, volume+"@"+name, s.info.Size), s.store.Close()
}

// Revert implements engine.Pool.
func (p *Pool) Revert(volume, name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, s, err := p.snapshotLocked(volume, name)
	switch {
	case err != nil:
		return err
	case v.open > 0:
		return fmt.Errorf("volume %s: %w", volume, pool.ErrInUse)
	}
	copyStore(v.store, s.store, s.info.Size)
	return nil
}

// device is open on a store and counts.
type device struct {
	*memdev.Device
	size  func() uint64
	close func()
}

// Info implements datapath.Device.
func (d *device) Info() datapath.Info {
	if size := d.size(); size > d.Device.Info().Size {
		_ = d.Resize(size) // within SizeMax
	}
	return d.Device.Info()
}

// Close implements datapath.Device.
func (d *device) Close() error {
	d.close()
	return d.Device.Close()
}

// OpenVolume implements engine.Pool.
func (p *Pool) OpenVolume(name string) (datapath.Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(name)
	if err != nil {
		return nil, err
	}
	d, err := memdev.New(memdev.Config{Size: v.info.Size, SizeMax: storeMax, ReadOnly: p.config.ReadOnly, Store: v.store})
	if err != nil {
		return nil, err
	}
	v.open++
	return &device{Device: d, size: func() uint64 {
		p.mu.Lock()
		defer p.mu.Unlock()
		return v.info.Size
	}, close: func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		v.open--
	}}, nil
}

// OpenSnapshot implements engine.Pool.
func (p *Pool) OpenSnapshot(volume, name string) (datapath.Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, s, err := p.snapshotLocked(volume, name)
	if err != nil {
		return nil, err
	}
	d, err := memdev.New(memdev.Config{Size: s.info.Size, SizeMax: storeMax, ReadOnly: true, Store: s.store})
	if err != nil {
		return nil, err
	}
	s.open++
	return &device{Device: d, size: func() uint64 { return s.info.Size }, close: func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		s.open--
	}}, nil
}

// Map implements engine.Pool.
func (p *Pool) Map(volume string) (pool.MapInfo, error) {
	snapshots, err := p.Snapshots(volume)
	if err != nil {
		return pool.MapInfo{}, err
	}
	v, err := p.Volume(volume)
	return pool.MapInfo{Volume: volume, Size: v.Size, Mapped: v.Allocated, Exclusive: v.Allocated, Reclaimable: v.Allocated, Snapshots: snapshots}, err
}

// Changes implements engine.Pool: every allocated page differs.
func (p *Pool) Changes(volume, _, _ string, offset uint64, max int) (changes []pool.Change, next uint64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := p.volumeLocked(volume)
	if err != nil {
		return nil, 0, err
	}
	for offset < v.info.Size && len(changes) < max {
		n, allocated := v.store.Run(offset, min(v.info.Size-offset, memdev.PageSize))
		if allocated {
			changes = append(changes, pool.Change{Offset: offset, Length: n})
		}
		offset += n
	}
	return changes, min(offset, v.info.Size), nil
}

// Scrub implements engine.Pool. It runs until it is stopped.
func (p *Pool) Scrub(uint64) (pool.Job, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, j := range p.jobs {
		if j.Kind == pool.JobScrub && j.Ended.IsZero() {
			return pool.Job{}, fmt.Errorf("scrub: %w", pool.ErrInUse)
		}
	}
	j := p.endedLocked(pool.JobScrub, p.label.Name, 1<<30)
	j.Ended, j.Done = time.Time{}, 4096
	p.jobs[len(p.jobs)-1] = j
	return j, nil
}

// StopScrub implements engine.Pool.
func (p *Pool) StopScrub() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.jobs {
		if j := &p.jobs[i]; j.Kind == pool.JobScrub && j.Ended.IsZero() {
			j.Ended, j.Stopped = time.Unix(1700000004, 0).UTC(), true
			close(p.wake)
			p.wake = make(chan struct{})
			return nil
		}
	}
	return fmt.Errorf("scrub: %w", pool.ErrNotFound)
}

// Jobs implements engine.Pool.
func (p *Pool) Jobs() []pool.Job {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.jobs)
}

// WaitJob implements engine.Pool.
func (p *Pool) WaitJob(ctx context.Context, id uint64) (pool.Job, error) {
	for {
		p.mu.Lock()
		if id == 0 || id > uint64(len(p.jobs)) {
			p.mu.Unlock()
			return pool.Job{}, notFound("job", fmt.Sprint(id))
		}
		j, wake := p.jobs[id-1], p.wake
		p.mu.Unlock()
		if !j.Ended.IsZero() {
			return j, nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return pool.Job{}, ctx.Err()
		}
	}
}
