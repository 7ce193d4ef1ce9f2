package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// reactorOf gives each pool one of the reactors, the same at every start.
func (e *Engine) reactorOf(id uuid.UUID) *reactor.Reactor {
	return e.config.Reactors[int(id[15])%len(e.config.Reactors)]
}

// reopen opens a pool of the catalog, or notes why not. The caller has the turn,
// or is Open.
func (e *Engine) reopen(en *entry, more []string) {
	r := en.record
	var paths []string
	for _, d := range r.Devices {
		paths = append(paths, d.Path)
	}
	readOnly := e.config.ReadOnly || r.ReadOnly
	members, problems, err := e.gather(e.reactorOf(r.UUID), r.UUID, paths, more, e.config.ScanDevices, readOnly)
	var seen []uuid.UUID
	for _, m := range members {
		if m.label != nil {
			seen = append(seen, m.label.Device)
		}
	}
	if err == nil && len(members) == 0 {
		gone := &pool.MissingError{Pool: r.Name}
		for i, d := range r.Devices {
			gone.Missing = append(gone.Missing, pool.Member{Index: i, UUID: d.UUID, Size: d.Size, Hint: d.Path})
		}
		err = gone
	}
	if err == nil {
		err = e.open(en, members, readOnly)
	} else {
		err = errors.Join(err, closeMembers(members))
	}
	if err != nil && len(problems) > 0 {
		err = fmt.Errorf("%w (%s)", err, strings.Join(problems, "; "))
	}
	if err != nil {
		e.mu.Lock()
		en.reason, en.seen = err, seen
		e.mu.Unlock()
		e.report(pool.Event{Kind: EventNotOpened, Pool: r.Name, Message: err.Error()})
		return
	}
	for _, p := range problems {
		e.log.Warn("pool device", "pool", r.Name, "problem", p)
	}
	if err := e.remember(en); err != nil {
		e.log.Warn("the catalog could not be written; the pool is found by its signature next time", "pool", r.Name, "error", err)
	}
}

// open opens a pool on its members and takes them over; with an error it closes
// them.
func (e *Engine) open(en *entry, members []*member, readOnly bool) error {
	p, err := e.layout.Open(pool.Config{
		Disks: disks(members), Reactor: e.reactorOf(en.record.UUID), ReadOnly: readOnly,
		SumCacheBytes: e.config.SumCacheBytes, OverProvision: e.config.OverProvision, ScrubRate: e.config.ScrubRate,
		CrashLog: e.crashLog(en.record.UUID), Event: e.report, Log: e.log,
	})
	if err != nil {
		return errors.Join(err, closeMembers(members))
	}
	e.mu.Lock()
	en.pool, en.reason, en.readOnly, en.members = p, nil, readOnly, members
	en.users, en.devices, en.leaving, en.idle = 0, 0, false, make(chan struct{})
	en.life, en.end = context.WithCancel(context.Background())
	e.openings++
	en.opening = e.openings
	e.mu.Unlock()
	i := p.Info()
	message := fmt.Sprintf("open on %d of %d device(s), %d volume(s)", len(members), len(i.Members), i.Volumes)
	if readOnly {
		message += ", read-only"
	}
	e.report(pool.Event{Kind: EventOpened, Pool: i.Name, Message: message})
	e.findDuplicates(en)
	return nil
}

// findDuplicates reports the volumes of a pool whose names another pool has.
func (e *Engine) findDuplicates(en *entry) {
	others := map[string]string{} // volume -> pool
	for _, l := range e.leaseAll() {
		if l.entry != en {
			for _, v := range l.pool.Volumes() {
				others[v.Name] = v.Pool
			}
		}
		l.done()
	}
	for _, v := range en.pool.Volumes() {
		if other, ok := others[v.Name]; ok {
			e.report(pool.Event{Kind: EventAmbiguous, Pool: v.Pool, Volume: v.Name,
				Message: fmt.Sprintf("pool %s has a volume of this name too: each is reached as POOL/%s only", other, v.Name)})
		}
	}
}

// remember brings the catalog up to date with an open pool.
func (e *Engine) remember(en *entry) error {
	i := en.pool.Info()
	e.mu.Lock()
	before := en.record
	r := record{UUID: en.record.UUID, Name: i.Name, ReadOnly: en.record.ReadOnly}
	for _, m := range i.Members {
		d := deviceRecord{UUID: m.UUID, Path: m.Hint, Size: m.Size}
		if at := slices.IndexFunc(en.members, func(open *member) bool { return open.label != nil && open.label.Device == m.UUID }); at >= 0 {
			d.Path = en.members[at].path
		}
		r.Devices = append(r.Devices, d)
	}
	same := before.Name == r.Name && slices.Equal(before.Devices, r.Devices) && !before.Destroying
	en.record = r
	e.mu.Unlock()
	if same {
		return nil
	}
	return e.save()
}

// adopt takes pools into the catalog that lie whole in the engine's own directory:
// made by one who died before he could write it down, or put there by hand.
func (e *Engine) adopt() {
	own, _ := e.look(e.ownFiles(), nil) // what cannot be read is logged there
	for _, found := range e.group(own) {
		if found.Known || len(found.Missing) > 0 || e.named(found.Name) != nil || slices.Contains(e.forgotten, found.UUID) {
			continue
		}
		var paths []string
		for _, d := range found.Devices {
			paths = append(paths, d.Path)
		}
		en := &entry{engine: e, record: record{UUID: found.UUID, Name: found.Name}}
		for _, d := range found.Devices {
			en.record.Devices = append(en.record.Devices, deviceRecord{UUID: d.UUID, Path: d.Path, Size: d.Size})
		}
		e.log.Info("pool found in the data directory", "pool", found.Name, "devices", paths)
		e.mu.Lock()
		e.pools[found.UUID] = en
		e.mu.Unlock()
		e.reopen(en, nil)
		e.mu.Lock()
		if en.pool == nil {
			delete(e.pools, found.UUID) // not ours to remember
		}
		e.mu.Unlock()
		if err := e.save(); err != nil {
			e.log.Warn("the catalog could not be written", "error", err)
		}
	}
}

// shut closes an open pool once the calls under way have ended. The caller has the
// turn.
//
// Errors: pool.ErrInUse when devices of it are open; it stays open then. Others are
// of closing; it is not open any more.
func (e *Engine) shut(en *entry, reason error) error {
	e.mu.Lock()
	if en.pool == nil {
		e.mu.Unlock()
		return nil
	}
	if en.devices > 0 {
		n := en.devices
		e.mu.Unlock()
		return fmt.Errorf("pool %s: its volumes and snapshots are open %d time(s): %w", en.record.Name, n, pool.ErrInUse)
	}
	en.leaving = true
	if en.users == 0 {
		close(en.idle)
	}
	en.end()
	e.mu.Unlock()
	<-en.idle
	e.mu.Lock()
	if en.devices > 0 { // opened by a call that was under way
		n := en.devices
		en.leaving, en.idle = false, make(chan struct{})
		en.life, en.end = context.WithCancel(context.Background())
		e.mu.Unlock()
		return fmt.Errorf("pool %s: its volumes and snapshots are open %d time(s): %w", en.record.Name, n, pool.ErrInUse)
	}
	p, members := en.pool, en.members
	en.pool, en.members, en.reason = nil, nil, reason
	name := en.record.Name
	e.mu.Unlock()
	err := p.Close()
	if err != nil {
		err = fmt.Errorf("close pool %s: %w", name, err)
	}
	err = errors.Join(err, closeMembers(members))
	message := "closed"
	if err != nil {
		message = err.Error()
	}
	e.report(pool.Event{Kind: EventClosed, Pool: name, Message: message})
	return err
}

// FoundDevice is a device with a label.
type FoundDevice struct {
	Path  string
	UUID  uuid.UUID
	Index int
	Size  uint64 // bytes; as its pool records it
}

// FoundPool is a pool that a scan saw.
type FoundPool struct {
	UUID    uuid.UUID
	Name    string
	Version uint32
	Created time.Time
	Devices []FoundDevice // by index; two of one UUID are copies
	Missing []pool.Member // not seen
	Known   bool          // it is in the catalog of this node
	Open    bool
}

// Scan looks for pools on paths (a directory stands for the files in it), or
// without any, in the data directory and on all block devices. It changes nothing.
func (e *Engine) Scan(paths []string) ([]FoundPool, []ScanFailure, error) {
	if err := e.change(); err != nil {
		return nil, nil, err
	}
	defer func() { <-e.turn }()
	places, err := e.places(paths, len(paths) == 0, len(paths) == 0)
	if err != nil {
		return nil, nil, err
	}
	list, failures := e.look(places, nil)
	return e.group(list), failures, nil
}

// group puts the devices of each pool together.
func (e *Engine) group(list []sighting) []FoundPool {
	labels := map[uuid.UUID][]*pool.Label{}
	places := map[uuid.UUID][]sighting{}
	for _, s := range list {
		labels[s.label.Pool] = append(labels[s.label.Pool], s.label)
		places[s.label.Pool] = append(places[s.label.Pool], s)
	}
	var found []FoundPool
	for id, labels := range labels {
		l := newest(labels)
		f := FoundPool{UUID: id, Name: l.Name, Version: l.Version, Created: l.Created, Missing: slices.Clone(l.Members)}
		for _, s := range places[id] {
			d := FoundDevice{Path: s.path, UUID: s.label.Device, Index: s.label.Index}
			if i := slices.IndexFunc(l.Members, func(m pool.Member) bool { return m.UUID == d.UUID }); i >= 0 {
				d.Size = l.Members[i].Size
			}
			f.Devices = append(f.Devices, d)
			f.Missing = slices.DeleteFunc(f.Missing, func(m pool.Member) bool { return m.UUID == d.UUID })
		}
		slices.SortFunc(f.Devices, func(a, b FoundDevice) int {
			return 2*(a.Index-b.Index) + strings.Compare(a.Path, b.Path)
		})
		e.mu.Lock()
		if en := e.pools[id]; en != nil {
			f.Known, f.Open = true, en.pool != nil
		}
		e.mu.Unlock()
		found = append(found, f)
	}
	slices.SortFunc(found, func(a, b FoundPool) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.UUID.String(), b.UUID.String())
	})
	return found
}

// ImportSpec says which pool to import: one of Name and UUID, or neither, when only
// one is found.
type ImportSpec struct {
	Name        string
	UUID        uuid.UUID
	Paths       []string // where to look; the usual places when there are none
	ScanDevices bool
	ReadOnly    bool // also with missing devices; stays so until it is imported otherwise
}

// ImportPool takes a pool into the catalog and opens it. One that is open already
// is described as it is, unless it is open in the other mode: then it is opened
// anew.
func (e *Engine) ImportPool(s ImportSpec) (PoolInfo, error) {
	if err := e.change(); err != nil {
		return PoolInfo{}, err
	}
	defer func() { <-e.turn }()
	var places []string
	var err error
	if len(s.Paths) > 0 {
		places, err = e.places(s.Paths, false, false)
	} else {
		places, err = e.usualPlaces(nil, s.ScanDevices)
		for _, m := range e.openMembers() { // these are known wherever they lie
			places = append(places, m.path)
		}
	}
	if err != nil {
		return PoolInfo{}, err
	}
	list, failures := e.look(places, nil)
	var fits []FoundPool
	for _, f := range e.group(list) {
		switch {
		case s.UUID != uuid.Nil && f.UUID != s.UUID, s.Name != "" && f.Name != s.Name:
		case s.UUID == uuid.Nil && s.Name == "" && f.Open:
		default:
			fits = append(fits, f)
		}
	}
	what := s.Name
	if s.UUID != uuid.Nil {
		what = s.UUID.String()
	}
	switch {
	case len(fits) == 0:
		where := fmt.Sprintf("the %d files and devices looked at", len(places))
		if len(places) == 1 {
			where = places[0]
		}
		err := fmt.Errorf("import pool %s: it is not on %s: %w", what, where, pool.ErrNotFound)
		if what == "" {
			err = fmt.Errorf("import: no pool that is not open already on %s: %w", where, pool.ErrNotFound)
		}
		for _, f := range failures {
			err = fmt.Errorf("%w; %w", err, f.Err)
		}
		return PoolInfo{}, err
	case len(fits) > 1:
		var names []string
		for _, f := range fits {
			names = append(names, fmt.Sprintf("%s (%s)", f.Name, f.UUID))
		}
		return PoolInfo{}, fmt.Errorf("import: several pools fit, name one by its UUID: %s: %w", strings.Join(names, ", "), pool.ErrInvalid)
	}
	found := fits[0]
	if other := e.named(found.Name); other != nil && other.record.UUID != found.UUID {
		return PoolInfo{}, fmt.Errorf("import pool %s (%s): pool %s of this node has that name: %w", found.Name, found.UUID, other.record.UUID, pool.ErrExists)
	}
	if err := ValidateName("pool", found.Name); err != nil {
		return PoolInfo{}, err
	}
	e.mu.Lock()
	en := e.pools[found.UUID]
	known := en != nil
	if !known {
		en = &entry{engine: e, record: record{UUID: found.UUID, Name: found.Name}}
		e.pools[found.UUID] = en
	}
	open, mode := en.pool != nil, en.readOnly
	e.mu.Unlock()
	if open && mode == (s.ReadOnly || e.config.ReadOnly) {
		return e.describe(en), nil
	}
	if open {
		if err := e.shut(en, errors.New("it is being opened anew")); err != nil {
			return PoolInfo{}, err
		}
	}
	e.mu.Lock()
	en.record.ReadOnly = s.ReadOnly
	var paths []string
	for _, d := range found.Devices {
		paths = append(paths, d.Path)
		if i := slices.IndexFunc(en.record.Devices, func(r deviceRecord) bool { return r.UUID == d.UUID }); i >= 0 {
			en.record.Devices[i].Path = d.Path
		} else {
			en.record.Devices = append(en.record.Devices, deviceRecord{UUID: d.UUID, Path: d.Path, Size: d.Size})
		}
	}
	e.mu.Unlock()
	e.reopen(en, paths)
	e.mu.Lock()
	reason := en.reason
	if reason != nil && !known {
		delete(e.pools, found.UUID)
	}
	e.mu.Unlock()
	if reason != nil {
		return PoolInfo{}, fmt.Errorf("import: %w", &NotOpenError{found.Name, reason})
	}
	e.mu.Lock()
	e.forgotten = slices.DeleteFunc(slices.Clone(e.forgotten), func(id uuid.UUID) bool { return id == found.UUID })
	e.mu.Unlock()
	if err := e.save(); err != nil {
		return PoolInfo{}, err
	}
	return e.describe(en), nil
}

// ClosePool closes a pool, which stays on its devices, and forgets it.
//
// Errors: pool.ErrInUse while devices of it are open.
func (e *Engine) ClosePool(name string) error {
	if err := e.change(); err != nil {
		return err
	}
	defer func() { <-e.turn }()
	en, err := e.find(name)
	if err != nil {
		return err
	}
	closeErr := e.shut(en, errors.New("it is being closed"))
	if errors.Is(closeErr, pool.ErrInUse) {
		return closeErr
	}
	e.mu.Lock()
	delete(e.pools, en.record.UUID)
	if slices.ContainsFunc(en.record.Devices, func(d deviceRecord) bool { return filepath.Dir(d.Path) == filepath.Join(e.config.DataDir, poolsDir) }) {
		e.forgotten = append(slices.Clone(e.forgotten), en.record.UUID)
	}
	e.mu.Unlock()
	return errors.Join(closeErr, e.save())
}

// finishDestroy goes on with what DestroyPool began.
func (e *Engine) finishDestroy(en *entry) {
	err := e.erase(en)
	if err == nil {
		e.mu.Lock()
		delete(e.pools, en.record.UUID)
		e.mu.Unlock()
		err = e.save()
	}
	if err != nil {
		e.mu.Lock()
		en.reason = fmt.Errorf("it is being destroyed, and that did not end: %w", err)
		e.mu.Unlock()
		e.report(pool.Event{Kind: EventNotOpened, Pool: en.record.Name, Message: en.reason.Error()})
	}
}

// erase takes a pool that is not open off its devices, and removes the files the
// engine made in its own directory.
func (e *Engine) erase(en *entry) error {
	var errs []error
	for _, d := range en.record.Devices {
		m, err := e.openMember(e.reactorOf(en.record.UUID), d.Path, false)
		if errors.Is(err, os.ErrNotExist) {
			continue // there is nothing to erase
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		foreign := m.label != nil && m.label.Pool != en.record.UUID // the device has a new life
		if m.label != nil && !foreign {
			err = e.layout.Erase(e.reactorOf(en.record.UUID), m.disk())
		}
		if err = errors.Join(err, m.device.Close()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", d.Path, err))
			continue
		}
		if !foreign && filepath.Dir(d.Path) == filepath.Join(e.config.DataDir, poolsDir) && strings.HasSuffix(d.Path, imageSuffix) {
			if err := os.Remove(d.Path); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// crashLog is the file that keeps what clients of a pool were told is written, but
// did not flush, over the death of this process.
func (e *Engine) crashLog(id uuid.UUID) string {
	return filepath.Join(e.config.DataDir, poolsDir, id.String()+".pending")
}
