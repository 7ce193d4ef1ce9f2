package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// StateClosed is the state of a pool that the catalog knows and that is not open.
const StateClosed pool.State = "closed"

// PoolInfo describes a pool of the catalog. While it is not open, only Name, UUID,
// State, Reason and Members are known, the members as they were last.
type PoolInfo struct {
	pool.Info
	Open    bool
	Devices []PoolDevice
}

// PoolDevice is a device of a pool.
type PoolDevice struct {
	Path    string // where it is, or was last
	UUID    uuid.UUID
	Size    uint64 // bytes; as the pool records it
	Present bool   // it is open; of a pool that is not: it was there at the last try
	Access  string // how its bytes are reached; "" when not present
}

// Pools describes every pool the catalog knows, by name.
func (e *Engine) Pools() []PoolInfo {
	e.mu.Lock()
	list := e.sortedLocked()
	e.mu.Unlock()
	infos := make([]PoolInfo, 0, len(list))
	for _, en := range list {
		infos = append(infos, e.describe(en))
	}
	return infos
}

// Pool describes one by name; "" is the only one.
func (e *Engine) Pool(name string) (PoolInfo, error) {
	en, err := e.find(name)
	if err != nil {
		return PoolInfo{}, err
	}
	return e.describe(en), nil
}

func (e *Engine) describe(en *entry) PoolInfo {
	l, err := en.lease()
	if err != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		i := PoolInfo{Info: pool.Info{Name: en.record.Name, UUID: en.record.UUID, State: StateClosed, Reason: err.Error()}}
		var not *NotOpenError
		if errors.As(err, &not) {
			i.Reason = not.Reason.Error()
		}
		for index, d := range en.record.Devices {
			i.Members = append(i.Members, pool.Member{Index: index, UUID: d.UUID, Size: d.Size, Hint: d.Path})
			i.Devices = append(i.Devices, PoolDevice{Path: d.Path, UUID: d.UUID, Size: d.Size, Present: slices.Contains(en.seen, d.UUID)})
		}
		return i
	}
	defer l.done()
	i := PoolInfo{Info: l.pool.Info(), Open: true}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range i.Members {
		d := PoolDevice{Path: m.Hint, UUID: m.UUID, Size: m.Size}
		if at := slices.IndexFunc(en.members, func(open *member) bool { return open.label != nil && open.label.Device == m.UUID }); at >= 0 {
			d.Path, d.Present = en.members[at].path, true
			if device, ok := en.members[at].device.(interface {
				Access() (filedev.Access, string)
			}); ok {
				way, _ := device.Access()
				d.Access = string(way)
			}
		}
		i.Devices = append(i.Devices, d)
	}
	return i
}

// named is the pool of a name, or nil.
func (e *Engine) named(name string) *entry {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, en := range e.pools {
		if en.record.Name == name {
			return en
		}
	}
	return nil
}

// find is the pool of a name, or the only one.
func (e *Engine) find(name string) (*entry, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	if name == "" {
		if len(e.pools) != 1 {
			return nil, fmt.Errorf("%w (this node has %d)", ErrNoDefault, len(e.pools))
		}
		for _, en := range e.pools {
			return en, nil
		}
	}
	for _, en := range e.pools {
		if en.record.Name == name {
			return en, nil
		}
	}
	return nil, fmt.Errorf("pool %s: %w", name, pool.ErrNotFound)
}

// changePool takes the turn to change the pool of a name, or the only one. The caller
// gives it back, unless there is an error.
func (e *Engine) changePool(name string) (*entry, error) {
	if err := e.change(); err != nil {
		return nil, err
	}
	en, err := e.find(name)
	if err != nil {
		<-e.turn
	}
	return en, err
}

// changeOpen is changePool of one that must be open, with a lease of it. The caller ends
// that, and then gives the turn back.
func (e *Engine) changeOpen(name string) (*entry, lease, error) {
	en, err := e.changePool(name)
	if err != nil {
		return nil, lease{}, err
	}
	l, err := en.lease()
	if err != nil {
		<-e.turn
	}
	return en, l, err
}

// PoolSpec says what pool to make.
type PoolSpec struct {
	Name string
	// Paths are block devices and files. One that does not exist is made as a sparse
	// file of Size bytes. Without paths it is one file in the data directory.
	Paths []string
	Size  uint64 // bytes, of each file made
	Force bool   // overwrite what a device holds
}

// CreatePool makes a pool and opens it. With an error no file is left that was not
// there before; a device that was being formatted may have lost what it held.
func (e *Engine) CreatePool(s PoolSpec) (PoolInfo, error) {
	if err := ValidateName("pool", s.Name); err != nil {
		return PoolInfo{}, err
	}
	if err := e.change(); err != nil {
		return PoolInfo{}, err
	}
	defer func() { <-e.turn }()
	if other := e.named(s.Name); other != nil {
		return PoolInfo{}, fmt.Errorf("pool %s: %w", s.Name, pool.ErrExists)
	}
	paths := s.Paths
	if len(paths) == 0 {
		if s.Size == 0 {
			return PoolInfo{}, fmt.Errorf("pool %s: neither devices nor the size of a file to make are given: %w", s.Name, pool.ErrInvalid)
		}
		paths = []string{filepath.Join(e.config.DataDir, poolsDir, s.Name+imageSuffix)}
	}
	list, err := e.prepare(paths, s.Size, s.Force)
	if err != nil {
		return PoolInfo{}, fmt.Errorf("pool %s: %w", s.Name, err)
	}
	en, err := e.create(s, list)
	if err != nil {
		discard(list)
		return PoolInfo{}, fmt.Errorf("pool %s: %w", s.Name, err)
	}
	return e.describe(en), nil
}

func (e *Engine) create(s PoolSpec, list []prepared) (*entry, error) {
	var members []*member
	for _, p := range list {
		d, err := e.openDevice(p.now, false)
		if err != nil {
			return nil, errors.Join(deviceError(p.now, err), closeMembers(members))
		}
		members = append(members, &member{path: p.now, device: d})
	}
	id, err := e.layout.Format(pool.FormatConfig{
		Name: s.Name, Disks: disks(members), Reactor: e.config.Reactors[0], Force: s.Force,
		JournalBytes: e.config.JournalBytes, ZoneRegions: e.config.ZoneRegions,
	})
	if err = errors.Join(err, closeMembers(members)); err != nil {
		return nil, err
	}
	if err := settle(list); err != nil {
		return nil, err
	}
	// From here on the pool is there, and a crash leaves it to be found.
	r := record{UUID: id, Name: s.Name}
	members = nil
	for _, p := range list {
		m, err := e.openMember(e.reactorOf(id), p.path, false)
		if err == nil && (m.label == nil || m.label.Pool != id) {
			err = errors.Join(fmt.Errorf("%s: the pool just made is not found on it: %w", p.path, pool.ErrCorrupt), m.device.Close())
		}
		if err != nil {
			return nil, errors.Join(err, closeMembers(members))
		}
		members = append(members, m)
		r.Devices = append(r.Devices, deviceRecord{UUID: m.label.Device, Path: m.path, Size: m.device.Info().Size})
	}
	en := &entry{engine: e, record: r, reason: errors.New("it is being opened")}
	e.mu.Lock()
	e.pools[id] = en
	e.mu.Unlock()
	forget := func() {
		e.mu.Lock()
		delete(e.pools, id)
		e.mu.Unlock()
	}
	if err := e.save(); err != nil {
		forget()
		return nil, errors.Join(err, closeMembers(members))
	}
	if err := e.open(en, members, e.config.ReadOnly); err != nil {
		forget()
		return nil, errors.Join(err, e.save())
	}
	return en, nil
}

// GrowPool takes into use what the devices of a pool have become larger by. With a
// size, its files below that size are made that large first; pool.ErrInvalid when all
// its files are larger.
//
// A device that cannot learn its new size while it is open has the pool closed and
// opened anew: pool.ErrInUse while volumes of it are open.
func (e *Engine) GrowPool(name string, size uint64) (PoolInfo, error) {
	en, l, err := e.changeOpen(name)
	if err != nil {
		return PoolInfo{}, err
	}
	defer func() { <-e.turn }()
	defer func() { l.done() }()
	fail := func(err error) (PoolInfo, error) {
		return PoolInfo{}, fmt.Errorf("grow pool %s: %w", en.record.Name, err)
	}
	if en.readOnly {
		return fail(pool.ErrReadOnly)
	}
	if size > units.SizeMax {
		return fail(fmt.Errorf("%s are more than a file can hold: %w", units.FormatSize(size), pool.ErrInvalid))
	}
	if least := smallestFile(en.members); size > 0 && size < least {
		return fail(fmt.Errorf("%s are less than the %s its files have, and a pool cannot become smaller: %w", units.FormatSize(size), units.FormatSize(least), pool.ErrInvalid))
	}
	larger, blind := false, false
	for _, m := range en.members {
		if size > 0 {
			if err := enlarge(m.path, size); err != nil {
				return fail(err)
			}
		}
		before := m.device.Info().Size
		if device, ok := m.device.(interface{ Measure() error }); ok {
			if err := device.Measure(); err != nil {
				return fail(err)
			}
			larger = larger || m.device.Info().Size > before
			continue
		}
		if info, err := os.Stat(m.path); err == nil && info.Mode().IsRegular() && uint64(info.Size()) == before {
			continue
		}
		blind = true // larger, or a block device, of which only opening tells
	}
	if blind {
		l.done()
		l = lease{}
		if err := e.shut(en, errors.New("it is being opened anew")); err != nil {
			return fail(fmt.Errorf("a device has to be opened anew for that, but volumes are in use: %w", err))
		}
		e.reopen(en, nil)
		if l, err = en.lease(); err != nil {
			l = lease{}
			return fail(err)
		}
		larger = true
	}
	if !larger {
		e.log.Info("grow: no device is larger than it was", "pool", en.record.Name)
	}
	if err := l.pool.Grow(); err != nil {
		return fail(err)
	}
	if err := e.remember(en); err != nil {
		return fail(err)
	}
	return e.describe(en), nil
}

// smallestFile is the size of the smallest file among the devices of a pool, 0 if none
// is a file.
func smallestFile(members []*member) (least uint64) {
	for _, m := range members {
		if info, err := os.Stat(m.path); err == nil && info.Mode().IsRegular() && (least == 0 || uint64(info.Size()) < least) {
			least = uint64(info.Size())
		}
	}
	return least
}

// enlarge makes a file at least size bytes long. Other devices are left alone.
func enlarge(path string, size uint64) error {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || uint64(info.Size()) >= size {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = f.Truncate(int64(size))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fileError(path, err)
	}
	return nil
}

// AddDevice makes a device part of a pool; a path that does not exist is made as a
// sparse file of size bytes.
func (e *Engine) AddDevice(name, path string, size uint64, force bool) (PoolInfo, error) {
	en, l, err := e.changeOpen(name)
	if err != nil {
		return PoolInfo{}, err
	}
	defer func() { <-e.turn }()
	defer l.done()
	list, err := e.prepare([]string{path}, size, force)
	if err == nil {
		err = e.addTo(en, l.pool, list, force)
	}
	if err != nil {
		return PoolInfo{}, fmt.Errorf("pool %s: add %s: %w", en.record.Name, path, err)
	}
	return e.describe(en), nil
}

func (e *Engine) addTo(en *entry, p Pool, list []prepared, force bool) (err error) {
	// The file gets its name first: the pool keeps it open from then on. Without a
	// label it is no pool's to anyone who finds it after a crash.
	if err := settle(list); err != nil {
		discard(list)
		return err
	}
	undo := func(err error) error {
		discard(list)
		return err
	}
	m, err := e.openMember(e.reactorOf(en.record.UUID), list[0].path, false)
	if err != nil {
		return undo(err)
	}
	if force { // pool.AddDisk refuses what is foreign, and knows no force
		if err := e.layout.Erase(e.reactorOf(en.record.UUID), m.disk()); err != nil {
			return undo(errors.Join(err, m.device.Close()))
		}
	}
	if err := p.AddDisk(m.disk()); err != nil {
		return undo(errors.Join(err, m.device.Close()))
	}
	if m.label, err = e.layout.Probe(e.reactorOf(en.record.UUID), m.disk()); err != nil {
		e.log.Warn("a device just added cannot be asked for its label", "pool", en.record.Name, "path", m.path, "error", err)
	}
	e.mu.Lock()
	en.members = append(slices.Clone(en.members), m)
	e.mu.Unlock()
	return e.remember(en)
}

// DestroyPool takes a pool off its devices, for good. Files in the data directory
// that the engine made are removed. A pool with volumes, or one that is not open,
// needs force; one with open devices is never destroyed.
func (e *Engine) DestroyPool(name string, force bool) error {
	if name == "" {
		return fmt.Errorf("destroy pool: no name: %w", pool.ErrInvalid) // never the default
	}
	en, err := e.changePool(name)
	if err != nil {
		return err
	}
	defer func() { <-e.turn }()
	fail := func(err error) error { return fmt.Errorf("destroy pool %s: %w", name, err) }
	l, err := en.lease()
	if err != nil && !force {
		return fail(fmt.Errorf("what it holds is unknown: %w", err))
	}
	if err == nil {
		n := l.pool.Info().Volumes
		l.done()
		if n > 0 && !force {
			return fail(fmt.Errorf("%w: %d", ErrVolumes, n))
		}
	}
	if en.readOnly && err == nil {
		return fail(pool.ErrReadOnly)
	}
	if err := e.shut(en, errors.New("it is being destroyed")); errors.Is(err, pool.ErrInUse) {
		return fail(err)
	} else if err != nil {
		e.log.Warn("a pool that is being destroyed did not close well", "pool", name, "error", err)
	}
	e.mu.Lock()
	en.record.Destroying = true // so that a crash does not leave half a pool to be found
	e.mu.Unlock()
	if err := e.save(); err != nil {
		return fail(err)
	}
	if err := e.erase(en); err != nil {
		e.mu.Lock()
		en.reason = fmt.Errorf("it is being destroyed, and that did not end: %w", err)
		e.mu.Unlock()
		return fail(err)
	}
	if err := os.Remove(e.crashLog(en.record.UUID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		e.log.Warn("a file of a pool that is gone was left", "pool", name, "error", err)
	}
	e.mu.Lock()
	delete(e.pools, en.record.UUID)
	e.mu.Unlock()
	return e.save()
}
