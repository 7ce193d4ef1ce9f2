package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// openFile opens a file or block device the way that suits it.
func openFile(path string, readOnly bool) (datapath.Device, error) {
	d, err := filedev.Open(path, filedev.Options{ReadOnly: readOnly, Access: filedev.AccessAuto})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// member is an open device of a pool, or one that is to become so.
type member struct {
	path   string
	device datapath.Device
	label  *pool.Label // what it says of itself; nil when not asked, or nothing
}

func (m *member) disk() pool.Disk { return pool.Disk{Path: m.path, Device: m.device} }

func disks(members []*member) []pool.Disk {
	var list []pool.Disk
	for _, m := range members {
		list = append(list, m.disk())
	}
	return list
}

func closeMembers(members []*member) error {
	var errs []error
	for _, m := range members {
		if err := m.device.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", m.path, err))
		}
	}
	return errors.Join(errs...)
}

// openMember opens the device at path and reads its label; m.label stays nil on
// pool.ErrNotPool.
func (e *Engine) openMember(r *reactor.Reactor, path string, readOnly bool) (*member, error) {
	d, err := e.openDevice(path, readOnly)
	if err != nil {
		return nil, deviceError(path, err)
	}
	m := &member{path: path, device: d}
	if m.label, err = e.layout.Probe(r, m.disk()); err != nil && !errors.Is(err, pool.ErrNotPool) {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), d.Close())
	}
	if err != nil {
		m.label = nil
	}
	return m, nil
}

// makeFile makes a sparse file of size bytes under the name temporary; errors speak
// of path, which it will have. It never touches a file that exists.
func makeFile(temporary, path string, size uint64, force bool) error {
	if size > units.SizeMax {
		return fmt.Errorf("make %s: %s is more than a file can hold: %w", path, units.FormatSize(size), pool.ErrInvalid)
	}
	var fsys unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &fsys); err != nil {
		return deviceError(path, fmt.Errorf("make %s: the directory: %w", path, err))
	}
	if whole := fsys.Blocks * uint64(fsys.Bsize); whole > 0 && size > whole && !force {
		return fmt.Errorf("make %s: %s do not fit: the whole filesystem has %s (--force makes the file all the same; it then runs full early): %w",
			path, units.FormatSize(size), units.FormatSize(whole), pool.ErrNoSpace)
	}
	f, err := os.OpenFile(temporary, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fileError(path, err)
	}
	err = f.Truncate(int64(size))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		_ = os.Remove(temporary) // ours, and empty
		return fileError(path, err)
	}
	return nil
}

// fileError says what kept a file from being made, in words callers act on.
func fileError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("make %s: the file %w (without a size it is used as it is)", path, pool.ErrExists)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("make %s: the filesystem is full (%w): %w", path, err, pool.ErrNoSpace)
	case errors.Is(err, unix.EFBIG):
		return fmt.Errorf("make %s: the filesystem takes no file of this size (%w): %w", path, err, pool.ErrInvalid)
	}
	return &DeviceError{Path: path, Remedy: "name a directory that the daemon may make files in", Err: fmt.Errorf("make %s: %w", path, err)}
}

// prepared is a path that a pool is about to be made on.
type prepared struct {
	path string // in the end
	now  string // for now: of a file made here, under its temporary name
	made bool
}

// prepare makes the files that do not exist yet. With an error nothing is left.
func (e *Engine) prepare(paths []string, size uint64, force bool) (list []prepared, err error) {
	defer func() {
		if err != nil {
			discard(list)
		}
	}()
	var seen []os.FileInfo
	for _, path := range paths {
		path, err := filepath.Abs(path)
		if err != nil {
			return list, err
		}
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist) && size == 0:
			err := fmt.Errorf("%s: there is no such device or file (give a size, and a sparse file is made): %w", path, pool.ErrNotFound)
			return list, &DeviceError{Path: path, Remedy: "`lsblk` shows the disks there are", Err: err}
		case errors.Is(err, fs.ErrNotExist):
			if slices.ContainsFunc(list, func(p prepared) bool { return p.path == path }) {
				return list, fmt.Errorf("%s: named twice: %w", path, pool.ErrInvalid)
			}
			temporary := path + newSuffix
			if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by one who died half-way
				return list, err
			}
			if err := makeFile(temporary, path, size, force); err != nil {
				return list, err
			}
			list = append(list, prepared{path: path, now: temporary, made: true})
		case err != nil:
			return list, deviceError(path, err)
		case size > 0 && info.Mode().IsRegular():
			return list, fileError(path, fs.ErrExist)
		default:
			if slices.ContainsFunc(seen, func(other os.FileInfo) bool { return os.SameFile(info, other) }) {
				return list, fmt.Errorf("%s: named twice: %w", path, pool.ErrInvalid)
			}
			// Opening it would find it locked, by us, and wait for that to end.
			if open := e.memberAt(info); open != nil {
				return list, fmt.Errorf("%s: is a device of pool %s, which is open: %w", path, open.label.Name, pool.ErrInUse)
			}
			seen = append(seen, info)
			list = append(list, prepared{path: path, now: path})
		}
	}
	return list, nil
}

// memberAt is the device of an open pool that a path leads to, or nil.
func (e *Engine) memberAt(info os.FileInfo) *member {
	for _, open := range e.openMembers() {
		if other, err := os.Stat(open.path); err == nil && open.label != nil && (os.SameFile(info, other) || sameDevice(info, other)) {
			return open
		}
	}
	return nil
}

// discard removes the files that prepare made.
func discard(list []prepared) {
	for _, p := range list {
		if p.made {
			_ = os.Remove(p.now) // ours, and without a pool
		}
	}
}

// settle gives the files their final names, durably. A file that has appeared
// there meanwhile stays.
func settle(list []prepared) error {
	for i := range list {
		p := &list[i]
		if !p.made {
			continue
		}
		if err := unix.Renameat2(unix.AT_FDCWD, p.now, unix.AT_FDCWD, p.path, unix.RENAME_NOREPLACE); err != nil {
			if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) { // some filesystems lack the flag
				return fileError(p.path, err)
			}
			if err := os.Rename(p.now, p.path); err != nil {
				return err
			}
		}
		p.now = p.path
		if err := syncDir(filepath.Dir(p.path)); err != nil {
			return err
		}
	}
	return nil
}

// blockDevices lists /dev names of the block devices sysfs shows.
//
// Left out are devices without a size, and those a daemon like this one may serve
// (nbd, ublk): a read of them before it serves would never end.
func blockDevices(sysfs string) []string {
	entries, err := os.ReadDir(sysfs)
	if err != nil {
		return nil // no sysfs, no devices
	}
	var paths []string
	for _, entry := range entries {
		name := entry.Name()
		if slices.ContainsFunc([]string{"nbd", "ublk", "ram", "zram", "sr", "fd", "mtdblock"}, func(prefix string) bool {
			rest, ok := strings.CutPrefix(name, prefix)
			return ok && strings.Trim(rest, "bp0123456789") == ""
		}) {
			continue
		}
		size, err := os.ReadFile(filepath.Join(sysfs, name, "size"))
		if err != nil || strings.TrimSpace(string(size)) == "0" {
			continue
		}
		paths = append(paths, "/dev/"+strings.ReplaceAll(name, "!", "/")) // sysfs writes "/" in a name so
	}
	return paths
}

// usualPlaces lists where a pool's device may be: on the paths given and
// configured, among the files the engine made, and on block devices when asked.
func (e *Engine) usualPlaces(given []string, devices bool) ([]string, error) {
	var configured []string
	for _, path := range e.config.Scan {
		if _, err := os.Stat(path); err != nil {
			e.log.Warn("a path to look for devices on is not there", "path", path, "error", err)
			continue
		}
		configured = append(configured, path)
	}
	return e.places(slices.Concat(given, configured), true, devices)
}

// places lists paths: those given (a directory stands for the files in it), of own
// the files the engine made itself, of devices the block devices.
func (e *Engine) places(given []string, own, devices bool) ([]string, error) {
	var paths []string
	add := func(path string) {
		if !slices.Contains(paths, path) && !strings.HasSuffix(path, newSuffix) {
			paths = append(paths, path)
		}
	}
	for _, path := range given {
		path, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, &DeviceError{Path: path, Err: err}
		}
		if !info.IsDir() {
			add(path)
			continue
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			inner := filepath.Join(path, entry.Name())
			if info, err := os.Stat(inner); err == nil && (info.Mode().IsRegular() || info.Mode()&(fs.ModeDevice|fs.ModeCharDevice) == fs.ModeDevice) {
				add(inner)
			}
		}
	}
	if own {
		for _, path := range e.ownFiles() {
			add(path)
		}
	}
	if devices {
		for _, path := range blockDevices(e.sysfs) {
			add(path)
		}
	}
	return paths, nil
}

// ownFiles are the files in the engine's own directory, by name.
func (e *Engine) ownFiles() []string {
	dir := filepath.Join(e.config.DataDir, poolsDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		e.log.Warn("the directory of pool files cannot be read", "path", dir, "error", err)
	}
	var paths []string
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), imageSuffix) {
			paths = append(paths, filepath.Join(dir, entry.Name()))
		}
	}
	return paths
}

// sighting is a label seen on a device.
type sighting struct {
	path  string
	label *pool.Label
}

// look reads the labels of the paths. Devices of open pools and those held are
// known, and not opened again: their locks are ours.
func (e *Engine) look(paths []string, held []*member) (list []sighting, failures []ScanFailure) {
	type known struct {
		info  os.FileInfo
		label *pool.Label
	}
	var seen []known
	for _, open := range slices.Concat(e.openMembers(), held) {
		if info, err := os.Stat(open.path); err == nil {
			seen = append(seen, known{info, open.label})
		}
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			continue // it has gone since it was listed
		}
		at := slices.IndexFunc(seen, func(other known) bool { return os.SameFile(info, other.info) || sameDevice(info, other.info) })
		if at >= 0 {
			if seen[at].label != nil {
				list = append(list, sighting{path, seen[at].label})
				seen[at].label = nil // its other names are no other devices
			}
			continue
		}
		seen = append(seen, known{info: info})
		if info.Mode().IsRegular() && info.Size() < 4*datapath.BlockSize {
			continue // too small for any pool
		}
		m, err := e.openMember(e.config.Reactors[0], path, true)
		if err != nil {
			e.log.Info("scan", "path", path, "error", err)
			failures = append(failures, ScanFailure{path, err})
			continue
		}
		if m.label != nil {
			list = append(list, sighting{path, m.label})
		}
		if err := m.device.Close(); err != nil {
			failures = append(failures, ScanFailure{path, err})
		}
	}
	return list, failures
}

// ScanFailure is a path a scan could not read.
type ScanFailure struct {
	Path string
	Err  error
}

// sameDevice tells two names of one block device.
func sameDevice(a, b os.FileInfo) bool {
	if a.Mode()&fs.ModeDevice == 0 || b.Mode()&fs.ModeDevice == 0 {
		return false
	}
	x, okX := a.Sys().(*syscall.Stat_t)
	y, okY := b.Sys().(*syscall.Stat_t)
	return okX && okY && x.Rdev == y.Rdev
}

// newest is the label with the highest generation: it knows the members.
func newest(labels []*pool.Label) *pool.Label {
	var best *pool.Label
	for _, l := range labels {
		if l != nil && (best == nil || l.Generation > best.Generation) {
			best = l
		}
	}
	return best
}

// gather opens the devices of a pool: at the paths it was last seen on, at those
// its labels name, and if some are missing still, wherever a scan finds them. It
// returns what there is; problems say why a known path did not serve.
func (e *Engine) gather(r *reactor.Reactor, id uuid.UUID, paths, more []string, devices, readOnly bool) (found []*member, problems []string, err error) {
	tried := map[string]bool{}
	have := func(device uuid.UUID) *member {
		i := slices.IndexFunc(found, func(m *member) bool { return m.label.Device == device })
		if i < 0 {
			return nil
		}
		return found[i]
	}
	try := func(path string) {
		if path == "" || tried[path] {
			return
		}
		tried[path] = true
		m, err := e.openMember(r, path, readOnly)
		switch {
		case err != nil:
			problems = append(problems, err.Error())
			return
		case m.label == nil:
			problems = append(problems, fmt.Sprintf("%s: no pool on it", path))
		case m.label.Pool != id:
			problems = append(problems, fmt.Sprintf("%s: belongs to pool %s (%s)", path, m.label.Name, m.label.Pool))
		case have(m.label.Device) != nil:
			problems = append(problems, fmt.Sprintf("%s: a copy of %s, which is used", path, have(m.label.Device).path))
		default:
			found = append(found, m)
			return
		}
		if err := m.device.Close(); err != nil {
			problems = append(problems, err.Error())
		}
	}
	labels := func() *pool.Label {
		var list []*pool.Label
		for _, m := range found {
			list = append(list, m.label)
		}
		return newest(list)
	}
	missing := func() []uuid.UUID {
		l := labels()
		if l == nil {
			return []uuid.UUID{uuid.Nil} // who knows
		}
		var ids []uuid.UUID
		for _, member := range l.Members {
			if have(member.UUID) == nil {
				ids = append(ids, member.UUID)
			}
		}
		return ids
	}
	for _, path := range paths {
		try(path)
	}
	if len(missing()) == 0 {
		return found, problems, nil
	}
	if l := labels(); l != nil {
		for _, member := range l.Members {
			if have(member.UUID) == nil {
				try(member.Hint)
			}
		}
	}
	if len(missing()) == 0 {
		return found, problems, nil
	}
	places, err := e.usualPlaces(more, devices)
	if err != nil {
		return found, problems, err
	}
	candidates := map[uuid.UUID][]string{} // by device
	sightings, _ := e.look(places, found)  // what cannot be read is logged there
	for _, s := range sightings {
		if s.label.Pool == id && have(s.label.Device) == nil {
			candidates[s.label.Device] = append(candidates[s.label.Device], s.path)
		}
	}
	for device, paths := range candidates {
		if len(paths) > 1 {
			// Either could be the older copy; a guess could lose what was acknowledged.
			slices.Sort(paths)
			problems = append(problems, fmt.Sprintf("device %s is there %d times (%s): take the copies away", device, len(paths), strings.Join(paths, ", ")))
			continue
		}
		delete(tried, paths[0])
		try(paths[0])
	}
	return found, problems, nil
}
