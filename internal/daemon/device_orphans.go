package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
	"github.com/ashlar-storage/ashlar/nbd/attach"
)

// OrphansConfig says where orphans are looked for. Its zero value is for this host as it
// is set up by this repository.
type OrphansConfig struct {
	// Keepers are sockets of keepers, beside those that daemons start in their data
	// directories.
	Keepers     []string
	DeviceLinks string // directory of links to devices; /dev/ashlar
	Log         *slog.Logger

	ways     map[controlpb.Via]way // tests'
	kernel   blockdev.Host
	patience time.Duration
	rights   func() error
}

// Orphans are the devices that Ashlar made and that outlive their daemon. It knows of
// them what the kernel knows; it serves nothing, and has no pool open.
type Orphans struct {
	devices *devices
	config  OrphansConfig
}

// keeperDefault is where the keeper of deploy/systemd listens.
const keeperDefault = "/run/ashlar-keeper/keeper.sock"

// orphanPatience is how long the kernel may take to let go of a process that died; see
// ublk.Recover and fuse.Recover.
const orphanPatience = 5 * time.Second

// NewOrphans touches nothing yet. Close it.
func NewOrphans(c OrphansConfig) *Orphans {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.patience = cmp.Or(c.patience, orphanPatience)
	if c.kernel == (blockdev.Host{}) {
		c.kernel = blockdev.Kernel()
	}
	if c.rights == nil {
		c.rights = adminRights
	}
	ways := map[controlpb.Via]way{
		controlpb.Via_VIA_UBLK: &ublkWay{}, controlpb.Via_VIA_NBD: &nbdOrphans{nbdWay{log: c.Log}},
		controlpb.Via_VIA_FUSE: &fuseOrphans{keepers: append(c.Keepers, keeperDefault), log: c.Log},
	}
	if c.ways != nil {
		ways = c.ways
	}
	return &Orphans{config: c, devices: &devices{
		log: c.Log, links: links{cmp.Or(c.DeviceLinks, "/dev/ashlar")}, ways: ways,
		order: []controlpb.Via{controlpb.Via_VIA_UBLK, controlpb.Via_VIA_NBD, controlpb.Via_VIA_FUSE},
	}}
}

// Close gives back what was opened.
func (o *Orphans) Close() error {
	var errs []error
	for _, w := range o.devices.ways {
		errs = append(errs, w.close())
	}
	return errors.Join(errs...)
}

// errNoServer says that nobody serves a device.
var errNoServer = errors.New("no server")

// List describes the devices by path, and the ways to attach. An error says what could
// not be listed; the rest is.
func (o *Orphans) List(ctx context.Context) ([]*controlpb.Device, []*controlpb.ViaSupport, error) {
	left, err := o.devices.left(ctx)
	slices.SortFunc(left, func(a, b leftDevice) int { return comparePaths(a.path, b.path) })
	list := make([]*controlpb.Device, 0, len(left))
	for _, l := range left {
		list = append(list, o.message(l))
	}
	return list, o.devices.support(), err
}

// message describes a device. One that is served is another daemon's.
func (o *Orphans) message(l leftDevice) *controlpb.Device {
	m := o.devices.leftMessage(l)
	m.Source = cmp.Or(l.source, m.GetSource())
	if m.Reason = cmp.Or(l.doubt, errNoServer.Error()); l.served {
		m.State, m.Reason = controlpb.DeviceState_DEVICE_STATE_ONLINE, "another daemon serves it"
	}
	if since := o.devices.links.since(m.GetSource(), l.path); m.GetSource() != "" && !since.IsZero() {
		m.Attached = stamp(since)
	}
	if b, err := o.config.kernel.Device(filepath.Base(l.path)); err == nil {
		m.ReadOnly = b.ReadOnly
	}
	return m
}

// Detach removes a device that nobody serves, by its path or the name of its source.
// With force also one with requests that wait, which end with an error; the reason of
// what is returned says so.
//
// Errors are *control.Error: ErrDenied, ErrNotFound, ErrInvalid for a name that several
// have, ErrInUse when it is mounted, held or served, ErrPrecondition where it takes
// force.
func (o *Orphans) Detach(ctx context.Context, name string, force bool) (*controlpb.Device, error) {
	if err := o.config.rights(); err != nil {
		told := control.Errorf(control.ErrDenied, "device", name, "%s: a device without a server is removed by the kernel: %w", name, err)
		told.Remedy = "run it as root, or start the daemon and ask it"
		return nil, told
	}
	l, err := o.named(ctx, name)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(o.config.patience); l.served; {
		if ctx.Err() != nil || time.Now().After(deadline) {
			told := control.Errorf(control.ErrInUse, "device", l.path, "%s is served by a daemon that does not listen here", l.path)
			told.Remedy = "ask that daemon (--server), or end it"
			return nil, told
		}
		time.Sleep(50 * time.Millisecond) // the process may be on its way out
		if l, err = o.named(ctx, l.path); err != nil {
			return nil, err
		}
	}
	m := o.message(l)
	block := filepath.Base(l.path)
	if len(m.GetMounts())+len(m.GetHolders()) > 0 {
		return nil, inUseError(l.path, errors.New(blockdev.Used(m.GetMounts(), m.GetHolders())))
	}
	if where := o.config.kernel.UsersElsewhere(block); len(where) > 0 {
		return nil, inUseError(l.path, fmt.Errorf("%s is mounted on %s", l.path, strings.Join(where, ", ")))
	}
	pending := o.config.kernel.Pending(block)
	if !pending.None() && !force {
		told := control.Errorf(control.ErrPrecondition, "device", l.path, "%s has no server, and work that would be lost: %s", l.path, pending.String())
		told.Remedy = "start the daemon, which goes on with it; or give --force: what waits ends with an error, and what is not synced is lost"
		return nil, told
	}
	if err := o.devices.ways[l.via].remove(ctx, l.foundDevice); err != nil {
		return nil, problem("device", l.path, err)
	}
	if m.Reason = ""; !pending.None() {
		m.Reason = "what it had ended with an error: " + pending.String()
	}
	for device, source := range o.devices.links.sources() {
		if device == l.path {
			o.devices.links.remove(source)
		}
	}
	return m, nil
}

// named finds a device by its path, a link to it, or its source: with its pool, or
// without where no other pool has one of that name.
func (o *Orphans) named(ctx context.Context, name string) (leftDevice, error) {
	left, listed := o.devices.left(ctx)
	path := name
	if to, err := filepath.EvalSymlinks(name); err == nil && filepath.IsAbs(name) {
		path = to
	}
	hints := o.devices.links.sources()
	var found []leftDevice
	for _, l := range left {
		source := cmp.Or(l.source, hints[l.path])
		if l.path == path || l.path == name || (source != "" && source == name) {
			return l, nil
		}
		if _, volume, inPool := strings.Cut(source, "/"); inPool && !filepath.IsAbs(source) && !strings.Contains(source, "://") && volume == name {
			found = append(found, l)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		told := control.Errorf(control.ErrInvalid, "device", name, "%s is %s and %s", name, found[0].path, found[1].path)
		told.Remedy = "name one of them"
		return leftDevice{}, told
	}
	why := ""
	for _, via := range o.devices.order {
		if err := o.devices.ways[via].supported(); err != nil && strings.HasPrefix(filepath.Base(path), viaBlocks[via]) {
			why = ": " + err.Error()
		}
	}
	told := control.Errorf(control.ErrNotFound, "device", name, "the kernel has no device %s of Ashlar's%s", name, why)
	if listed != nil {
		told = control.Errorf(control.ErrNotFound, "device", name, "the kernel has no device %s of Ashlar's, as far as can be seen: %w", name, listed)
	}
	told.Remedy = "`ashlar devices` shows what it has"
	return leftDevice{}, told
}

// viaBlocks begin the names of block devices of each way.
var viaBlocks = map[controlpb.Via]string{
	controlpb.Via_VIA_UBLK: "ublkb", controlpb.Via_VIA_NBD: "nbd", controlpb.Via_VIA_FUSE: "loop",
}

// adminRights says why this process cannot have the kernel remove devices.
func adminRights() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return errors.New("it needs CAP_SYS_ADMIN")
	}
	return nil
}

// nbdOrphans are the devices of the nbd driver, which does not say whether one has a
// server.
type nbdOrphans struct{ nbdWay }

func (w *nbdOrphans) found(ctx context.Context) ([]foundDevice, error) {
	found, err := w.nbdWay.found(ctx)
	if err != nil || len(found) == 0 {
		return found, err
	}
	driver, err := w.open()
	if err != nil {
		return nil, err
	}
	errs := make([]error, len(found))
	var each sync.WaitGroup
	limit := make(chan struct{}, 16) // each may wait a second
	for i := range found {
		each.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			found[i].served, errs[i] = driver.Served(attach.Index(found[i].id))
		})
	}
	each.Wait()
	var kept []foundDevice
	for i, err := range errs {
		if errors.Is(err, attach.ErrNotAttached) { // gone meanwhile
			errs[i] = nil
			continue
		}
		kept = append(kept, found[i])
	}
	// One is enough: it is the want of a right, for all of them.
	if i := slices.IndexFunc(errs, func(err error) bool { return err != nil }); i >= 0 {
		return kept, fmt.Errorf("whether devices have a server: %w", errs[i])
	}
	return kept, nil
}

// fuseOrphans are devices on FUSE mounts, whose connections keepers hold. The daemon's
// data directory, where its keeper listens, is that of the mount.
type fuseOrphans struct {
	fuseWay // for supported alone
	keepers []string
	log     *slog.Logger

	mu   sync.Mutex
	open map[string]*keeper.Client // by socket
	of   map[string]*keeper.Client // by name of a device
}

func (w *fuseOrphans) found(ctx context.Context) ([]foundDevice, error) {
	list, err := fuse.List(ctx, nil)
	if errors.Is(err, fuse.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	sockets := slices.Clone(w.keepers)
	for _, i := range list {
		if i.File != "" {
			sockets = append(sockets, keeperSocket(filepath.Dir(filepath.Dir(i.File))))
		}
	}
	slices.Sort(sockets)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.of = map[string]*keeper.Client{}
	known := foundFUSE(list)
	for i := range known {
		known[i].doubt = "no server, or one whose keeper is not known here (--fuse-keeper)"
	}
	var errs []error
	for _, socket := range slices.Compact(sockets) {
		k := w.open[socket]
		if k == nil {
			if _, err := os.Stat(socket); err != nil && !errors.Is(err, os.ErrPermission) {
				continue // nobody has ever listened there
			}
			if k, err = keeper.Open(ctx, keeper.Options{Socket: socket, Log: w.log}); err != nil {
				if !errors.Is(err, keeper.ErrAway) || errors.Is(err, os.ErrPermission) {
					errs = append(errs, err)
				}
				continue // it ended, and its devices are dead
			}
			if w.open == nil {
				w.open = map[string]*keeper.Client{}
			}
			w.open[socket] = k
		}
		kept, err := fuse.List(ctx, k)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, i := range kept {
			if i.State == fuse.StateUnknown {
				continue
			}
			w.of[i.Name] = k
			for _, f := range foundFUSE([]fuse.Info{i}) {
				known = append(slices.DeleteFunc(known, func(old foundDevice) bool { return old.path == f.path }), f)
			}
		}
	}
	return known, errors.Join(errs...)
}

func (w *fuseOrphans) remove(ctx context.Context, f foundDevice) error {
	w.mu.Lock()
	k := w.of[f.backend]
	w.mu.Unlock()
	err := fuse.Remove(ctx, f.backend, k)
	switch {
	case errors.Is(err, fuse.ErrServed) && k == nil:
		told := control.Errorf(control.ErrInUse, "device", f.path, "%s waits for a server, and its keeper is not known", f.path)
		told.Remedy = "give --fuse-keeper the socket that `ashlar serve` has"
		return told
	case errors.Is(err, fuse.ErrInUse), errors.Is(err, fuse.ErrServed):
		return inUseError(f.path, err)
	}
	return err
}

func (w *fuseOrphans) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, k := range w.open {
		errs = append(errs, k.Close())
	}
	w.open = nil
	return errors.Join(errs...)
}
