package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// lease holds an open pool: it is not closed before done.
type lease struct {
	entry   *entry
	pool    Pool
	name    string
	opening uint64
	life    context.Context
}

// lease takes hold of a pool, if it is open.
func (en *entry) lease() (lease, error) {
	en.engine.mu.Lock()
	defer en.engine.mu.Unlock()
	return en.leaseLocked()
}

func (en *entry) leaseLocked() (lease, error) {
	switch {
	case en.pool == nil:
		return lease{}, &NotOpenError{en.record.Name, en.reason}
	case en.leaving:
		return lease{}, &NotOpenError{en.record.Name, errors.New("it is being closed")}
	}
	en.users++
	return lease{en, en.pool, en.record.Name, en.opening, en.life}, nil
}

// done ends the lease. That of the zero lease does nothing.
func (l lease) done() {
	if l.entry == nil {
		return
	}
	l.entry.engine.mu.Lock()
	defer l.entry.engine.mu.Unlock()
	if l.entry.users--; l.entry.users == 0 && l.entry.leaving {
		close(l.entry.idle)
	}
}

// leaseAll takes hold of every open pool, by name.
func (e *Engine) leaseAll() []lease {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []lease
	for _, en := range e.sortedLocked() {
		if l, err := en.leaseLocked(); err == nil {
			list = append(list, l)
		}
	}
	return list
}

// leasePool takes hold of a pool by name; "" is the only one.
func (e *Engine) leasePool(name string) (lease, error) {
	en, err := e.find(name)
	if err != nil {
		return lease{}, err
	}
	return en.lease()
}

// lookup finds the pool of a volume by a reference: VOLUME or POOL/VOLUME. The
// caller ends the lease.
//
// Errors: pool.ErrNotFound only when every pool the volume could be in was asked;
// else a *NotOpenError.
func (e *Engine) lookup(ref string) (l lease, volume string, err error) {
	if name, volume, ok := strings.Cut(ref, "/"); ok {
		if name == "" {
			return lease{}, "", fmt.Errorf("volume %q: no pool before the slash: %w", ref, pool.ErrInvalid)
		}
		if l, err = e.leasePool(name); err != nil {
			return lease{}, "", err
		}
		return l, volume, nil
	}
	if ref == "" {
		return lease{}, "", fmt.Errorf("no volume is named: %w", pool.ErrInvalid)
	}
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return lease{}, "", ErrClosed
	}
	var open []lease
	var closed error
	for _, en := range e.sortedLocked() {
		l, err := en.leaseLocked()
		if err != nil {
			closed = err
			continue
		}
		open = append(open, l)
	}
	e.mu.Unlock()
	var found []lease
	for _, l := range open {
		_, volumeErr := l.pool.Volume(ref)
		switch {
		case volumeErr == nil:
			found = append(found, l)
			continue
		case !errors.Is(volumeErr, pool.ErrNotFound):
			closed = volumeErr // it may be there
		}
		l.done()
	}
	switch {
	case len(found) == 1:
		return found[0], ref, nil
	case len(found) > 1:
		var names []string
		for _, l := range found {
			names = append(names, l.name)
			l.done()
		}
		return lease{}, "", fmt.Errorf("volume %s: %w (pools %s)", ref, ErrAmbiguous, strings.Join(names, ", "))
	case closed != nil:
		return lease{}, "", fmt.Errorf("volume %s is in none of the open pools, but not all are open: %w", ref, closed)
	}
	return lease{}, "", fmt.Errorf("volume %s: %w", ref, pool.ErrNotFound)
}

// reserve keeps a volume's name for one who is about to make it, unless a pool has
// it. Pools that are not open cannot be asked; should one of them have the name,
// both volumes are reached as POOL/VOLUME when it comes back.
func (e *Engine) reserve(name string) (release func(), err error) {
	e.mu.Lock()
	taken := e.naming[name]
	e.naming[name] = true
	e.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("make volume %s: %w", name, ErrBusy)
	}
	release = func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.naming, name)
	}
	for _, l := range e.leaseAll() {
		if v, volumeErr := l.pool.Volume(name); volumeErr == nil {
			err = fmt.Errorf("volume %s: %w in pool %s", name, pool.ErrExists, v.Pool)
		}
		l.done()
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// place reads where a new volume is to be: the pool may stand before its name.
func (e *Engine) place(poolName, name string) (l lease, volume string, err error) {
	if before, after, ok := strings.Cut(name, "/"); ok {
		if err := ValidateName("pool", before); err != nil {
			return lease{}, "", fmt.Errorf("volume %s: %w", name, err)
		}
		if poolName != "" && poolName != before {
			return lease{}, "", fmt.Errorf("volume %s: what stands before the slash is its pool, but the pool asked for is %s: name one pool: %w", name, poolName, pool.ErrInvalid)
		}
		poolName, name = before, after
	}
	if err := ValidateName("volume", name); err != nil {
		return lease{}, "", err
	}
	l, err = e.leasePool(poolName)
	return l, name, err
}

// CreateVolume makes a volume in a pool; "" is the only one. The pool may also
// stand before the name in s.
func (e *Engine) CreateVolume(poolName string, s pool.VolumeSpec) (pool.VolumeInfo, error) {
	l, name, err := e.place(poolName, s.Name)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	defer l.done()
	release, err := e.reserve(name)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	defer release()
	s.Name = name
	return l.pool.CreateVolume(s)
}

// Clone makes a volume, in the same pool, that begins as a snapshot of another.
func (e *Engine) Clone(ref, snapshot string, s pool.VolumeSpec) (pool.VolumeInfo, error) {
	l, volume, err := e.lookup(ref)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	defer l.done()
	if before, after, ok := strings.Cut(s.Name, "/"); ok {
		if before != l.name {
			return pool.VolumeInfo{}, fmt.Errorf("clone %s of %s: a clone is in the pool of its snapshot, %s: %w", s.Name, ref, l.name, pool.ErrInvalid)
		}
		s.Name = after
	}
	if err := ValidateName("volume", s.Name); err != nil {
		return pool.VolumeInfo{}, err
	}
	release, err := e.reserve(s.Name)
	if err != nil {
		return pool.VolumeInfo{}, err
	}
	defer release()
	return l.pool.Clone(volume, snapshot, s)
}

// Volumes describes the volumes of a pool, or of all open pools for "", by name.
func (e *Engine) Volumes(poolName string) ([]pool.VolumeInfo, error) {
	if poolName != "" {
		l, err := e.leasePool(poolName)
		if err != nil {
			return nil, err
		}
		defer l.done()
		return l.pool.Volumes(), nil
	}
	var list []pool.VolumeInfo
	for _, l := range e.leaseAll() {
		list = append(list, l.pool.Volumes()...)
		l.done()
	}
	slices.SortStableFunc(list, func(a, b pool.VolumeInfo) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Volume describes one.
func (e *Engine) Volume(ref string) (v pool.VolumeInfo, err error) {
	err = e.with(ref, func(p Pool, volume string) error { v, err = p.Volume(volume); return err })
	return v, err
}

// with runs f on the pool of a volume.
func (e *Engine) with(ref string, f func(p Pool, volume string) error) error {
	l, volume, err := e.lookup(ref)
	if err != nil {
		return err
	}
	defer l.done()
	return f(l.pool, volume)
}

// Resize makes a volume larger.
func (e *Engine) Resize(ref string, size uint64) error {
	return e.with(ref, func(p Pool, volume string) error { return p.Resize(volume, size) })
}

// DeleteVolume removes a volume nobody has open; with snapshots only when cascade.
func (e *Engine) DeleteVolume(ref string, cascade bool) (Job, error) {
	return e.job(ref, func(p Pool, volume string) (pool.Job, error) { return p.DeleteVolume(volume, cascade) })
}

// SetLabels replaces the labels of a volume.
func (e *Engine) SetLabels(ref string, labels map[string]string) error {
	return e.with(ref, func(p Pool, volume string) error { return p.SetLabels(volume, labels) })
}

// SetLimits changes how much a volume may do.
func (e *Engine) SetLimits(ref string, l pool.Limits) error {
	return e.with(ref, func(p Pool, volume string) error { return p.SetLimits(volume, l) })
}

// CreateSnapshot keeps a volume as it is now.
func (e *Engine) CreateSnapshot(ref, name string, labels map[string]string) (s pool.SnapshotInfo, err error) {
	if err := ValidateName("snapshot", name); err != nil {
		return s, err
	}
	err = e.with(ref, func(p Pool, volume string) error { s, err = p.CreateSnapshot(volume, name, labels); return err })
	return s, err
}

// CreateSnapshotGroup keeps several volumes of one pool as they are at one point in
// the order of the writes of all of them.
func (e *Engine) CreateSnapshotGroup(name string, refs []string, labels map[string]string) ([]SnapshotInfo, error) {
	if err := ValidateName("snapshot", name); err != nil {
		return nil, err
	}
	if len(refs) == 0 {
		return nil, fmt.Errorf("snapshot %s: of no volume: %w", name, pool.ErrInvalid)
	}
	var first lease
	var volumes []string
	for i, ref := range refs {
		l, volume, err := e.lookup(ref)
		if err != nil {
			return nil, err
		}
		defer l.done()
		if i == 0 {
			first = l
		}
		if l.entry != first.entry {
			return nil, fmt.Errorf("snapshot %s: volume %s is in pool %s, and %s in %s: a group is in one pool: %w", name, volumes[0], first.name, volume, l.name, pool.ErrInvalid)
		}
		volumes = append(volumes, volume)
	}
	infos, err := first.pool.CreateSnapshotGroup(name, volumes, labels)
	var list []SnapshotInfo
	for _, s := range infos {
		list = append(list, SnapshotInfo{first.name, s})
	}
	return list, err
}

// SnapshotInfo is a snapshot with the pool it is in.
type SnapshotInfo struct {
	Pool string
	pool.SnapshotInfo
}

// Snapshots describes the snapshots of a volume, oldest first; of every volume of
// every open pool for "", and of those of one pool for "POOL/".
func (e *Engine) Snapshots(ref string) ([]SnapshotInfo, error) {
	var leases []lease
	volume := ""
	if ref == "" {
		leases = e.leaseAll()
	} else if name, ok := strings.CutSuffix(ref, "/"); ok {
		l, err := e.leasePool(name)
		if err != nil {
			return nil, err
		}
		leases = []lease{l}
	} else {
		l, name, err := e.lookup(ref)
		if err != nil {
			return nil, err
		}
		leases, volume = []lease{l}, name
	}
	var list []SnapshotInfo
	var errs []error
	for _, l := range leases {
		snapshots, err := l.pool.Snapshots(volume)
		for _, s := range snapshots {
			list = append(list, SnapshotInfo{l.name, s})
		}
		errs = append(errs, err)
		l.done()
	}
	return list, errors.Join(errs...)
}

// DeleteSnapshot removes a snapshot nobody has open.
func (e *Engine) DeleteSnapshot(ref, name string) (Job, error) {
	return e.job(ref, func(p Pool, volume string) (pool.Job, error) { return p.DeleteSnapshot(volume, name) })
}

// Revert makes a volume nobody has open what a snapshot of it is.
func (e *Engine) Revert(ref, snapshot string) error {
	return e.with(ref, func(p Pool, volume string) error { return p.Revert(volume, snapshot) })
}

// Map says where a volume's bytes are.
func (e *Engine) Map(ref string) (m pool.MapInfo, err error) {
	err = e.with(ref, func(p Pool, volume string) error { m, err = p.Map(volume); return err })
	return m, err
}

// Changes lists what differs between two states of a volume; see pool.Pool.Changes.
func (e *Engine) Changes(ref, since, until string, offset uint64, max int) (changes []pool.Change, next uint64, err error) {
	err = e.with(ref, func(p Pool, volume string) error {
		changes, next, err = p.Changes(volume, since, until, offset, max)
		return err
	})
	return changes, next, err
}

// SplitRef takes VOLUME@SNAPSHOT apart; snapshot is "" for a volume.
func SplitRef(ref string) (volume, snapshot string) {
	volume, snapshot, _ = strings.Cut(ref, "@")
	return volume, snapshot
}

// handout is a device of a pool that counts as open until it is closed.
type handout struct {
	datapath.Device
	entry *entry
}

// Unwrap is the device of the pool.
func (h *handout) Unwrap() datapath.Device { return h.Device }

// Close implements datapath.Device.
func (h *handout) Close() error {
	err := h.Device.Close()
	h.entry.engine.mu.Lock()
	defer h.entry.engine.mu.Unlock()
	h.entry.devices--
	return err
}

func (l lease) handOut(d datapath.Device, err error) (datapath.Device, error) {
	if err != nil {
		return nil, err
	}
	l.entry.engine.mu.Lock()
	defer l.entry.engine.mu.Unlock()
	l.entry.devices++
	return &handout{d, l.entry}, nil
}

// OpenVolume gives the device of a volume. Whoever has it closes it, before the
// engine is closed.
func (e *Engine) OpenVolume(ref string) (datapath.Device, error) {
	l, volume, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	defer l.done()
	return l.handOut(l.pool.OpenVolume(volume))
}

// OpenSnapshot gives a read-only device of a snapshot.
func (e *Engine) OpenSnapshot(ref, snapshot string) (datapath.Device, error) {
	l, volume, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	defer l.done()
	return l.handOut(l.pool.OpenSnapshot(volume, snapshot))
}
