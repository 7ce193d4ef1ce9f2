package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
	"github.com/ashlar-storage/ashlar/internal/crc32c"
	"github.com/ashlar-storage/ashlar/internal/flusher"
)

// devices are the block devices of this host that the daemon serves. The kernel is
// the record of them: recover finds those of the daemon before.
type devices struct {
	engine   *engine.Engine
	volumes  *volumes
	reactors []*reactor.Reactor
	log      *slog.Logger
	links    links
	dead     time.Duration   // how long requests wait for another server; see remote.Config
	node     string          // of what is no volume: whose it is, where a host has several daemons
	order    []controlpb.Via // in which auto tries
	ways     map[controlpb.Via]way

	mu       sync.Mutex
	attached map[string]*attachedDevice // by identity
	busy     map[string]chan struct{}   // by identity: closed when what goes on with it is over
	ended    bool                       // nothing is attached any more
	retrying bool                       // recover goes on

	ending  chan struct{} // closed with ended
	retries sync.WaitGroup
	work    sync.WaitGroup // what goes on
}

// attachedDevice is a device with its source. Its fields do not change.
type attachedDevice struct {
	attachment
	source   *deviceSource
	via      controlpb.Via
	why      string
	readOnly bool
	since    time.Time
	resized  error // why the kernel does not show the present size; guarded by devices.mu
}

func newDevices(e *engine.Engine, v *volumes, reactors []*reactor.Reactor, c *ServeConfig) (*devices, error) {
	kernel, err := newNBDWay(reactors, c.DeadTimeout, c.Log)
	if err != nil {
		return nil, err
	}
	ways := map[controlpb.Via]way{
		controlpb.Via_VIA_UBLK: &ublkWay{reactors}, controlpb.Via_VIA_NBD: kernel,
		controlpb.Via_VIA_FUSE: newFUSEWay(reactors, c.DataDir, c.Keeper, c.Log),
	}
	if c.ways != nil {
		ways = c.ways
	}
	return &devices{
		engine: e, volumes: v, reactors: reactors, log: c.Log, links: links{cmp.Or(c.DeviceLinks, "/dev/ashlar")},
		dead:  c.DeadTimeout,
		node:  fmt.Sprintf("%08x", crc32c.Checksum([]byte(c.DataDir))),
		order: []controlpb.Via{controlpb.Via_VIA_UBLK, controlpb.Via_VIA_NBD, controlpb.Via_VIA_FUSE}, ways: ways,
		attached: map[string]*attachedDevice{}, busy: map[string]chan struct{}{}, ending: make(chan struct{}),
	}, nil
}

// hold waits until nothing goes on with an identity and keeps others from it until
// release.
func (d *devices) hold(ctx context.Context, identity string) (release func(), err error) {
	for {
		d.mu.Lock()
		if d.ended {
			d.mu.Unlock()
			return nil, engine.ErrClosed
		}
		other, taken := d.busy[identity]
		if !taken {
			mine := make(chan struct{})
			d.busy[identity] = mine
			d.work.Add(1)
			d.mu.Unlock()
			return func() {
				d.mu.Lock()
				delete(d.busy, identity)
				d.mu.Unlock()
				close(mine)
				d.work.Done()
			}, nil
		}
		d.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (d *devices) get(identity string) *attachedDevice {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.attached[identity]
}

func (d *devices) put(identity string, a *attachedDevice) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a == nil {
		delete(d.attached, identity)
	} else {
		d.attached[identity] = a
	}
}

// all are the attached devices by path.
func (d *devices) all() []*attachedDevice {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []*attachedDevice
	for _, a := range d.attached {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b *attachedDevice) int { return comparePaths(a.path(), b.path()) })
	return list
}

// comparePaths orders /dev/nbd2 before /dev/nbd10.
func comparePaths(a, b string) int {
	if len(a) != len(b) && strings.TrimRight(a, "0123456789") == strings.TrimRight(b, "0123456789") {
		return len(a) - len(b)
	}
	return strings.Compare(a, b)
}

// viaNames are what people call the ways.
var viaNames = map[controlpb.Via]string{
	controlpb.Via_VIA_UBLK: "ublk", controlpb.Via_VIA_NBD: "nbd", controlpb.Via_VIA_FUSE: "fuse",
}

// whyNot is an error of a way without the package, which the name of the way says.
func whyNot(err error) string {
	text := err.Error()
	for _, prefix := range []string{"ublk: ", "attach: ", "fuse: "} {
		if rest, found := strings.CutPrefix(text, prefix); found {
			return rest
		}
	}
	return text
}

// attach makes a block device of a source, or describes the one it has.
func (d *devices) attach(ctx context.Context, name string, via controlpb.Via, o deviceOptions) (*attachedDevice, error) {
	s, err := d.source(name)
	if err != nil {
		return nil, err
	}
	if s.readOnly {
		o.readOnly = true
	}
	release, err := d.hold(ctx, s.identity)
	if err != nil {
		return nil, problem("device", name, err)
	}
	defer release()
	if old := d.get(s.identity); old != nil {
		state, why := old.state()
		if state != controlpb.DeviceState_DEVICE_STATE_FAILED {
			return old, d.fits(old, via, o)
		}
		// It will never serve again, for instance since another program took it away.
		d.log.Warn("attaching anew", "source", name, "device", old.path(), "reason", why)
		if err := old.detach(ctx, false); err != nil {
			return nil, problem("device", old.path(), err)
		}
		d.put(s.identity, nil)
		d.links.remove(s.name)
	}
	if err := d.awaited(ctx, s); err != nil {
		return nil, err
	}
	order := d.order
	if via != controlpb.Via_VIA_UNSPECIFIED {
		order = []controlpb.Via{via}
	}
	var passed []string // why the ways before were not taken
	var first error
	for _, via := range order {
		w := d.ways[via]
		if w == nil {
			return nil, control.Errorf(control.ErrInvalid, "device", name, "there is no way %v to attach", via)
		}
		err := w.supported()
		if err == nil {
			flusher.Become(d.reactors, d.log)
			var a attachment
			if a, err = w.attach(ctx, s, o); err == nil {
				return d.attachedNow(s, a, via, o, len(order) == 1, passed), nil
			}
			var told *control.Error
			if errors.As(err, &told) || ctx.Err() != nil {
				return nil, problem("device", name, err) // the source's fault: another way would not help
			}
		}
		if first == nil {
			first = err
		}
		passed = append(passed, viaNames[via]+": "+whyNot(err))
	}
	told := control.Errorf(control.ErrPrecondition, "device", name, "%s cannot be attached: %w", name, first)
	if len(passed) > 1 {
		told = control.Errorf(control.ErrPrecondition, "device", name, "%s cannot be attached in any way: %s", name, strings.Join(passed, "; "))
	}
	told.Remedy = "`ashlar devices --support` shows what each way needs"
	return nil, told
}

func (d *devices) attachedNow(s *deviceSource, a attachment, via controlpb.Via, o deviceOptions, asked bool, passed []string) *attachedDevice {
	device := &attachedDevice{attachment: a, source: s, via: via, readOnly: o.readOnly, since: time.Now()}
	if device.why = viaNames[via] + " is the first that works here"; asked {
		device.why = ""
	}
	if len(passed) > 0 {
		device.why = viaNames[via] + ", since " + strings.Join(passed, "; ")
	}
	if err := d.links.set(s.name, a.path()); err != nil {
		d.log.Warn("no link to a device", "device", a.path(), "source", s.name, "error", err)
	} else {
		device.since = d.links.since(s.name, a.path())
	}
	d.put(s.identity, device)
	d.log.Info("attached", "source", s.name, "device", a.path(), "via", viaNames[via], "why", device.why)
	return device
}

// awaited refuses a second device of a source whose first is still to be taken over.
func (d *devices) awaited(ctx context.Context, s *deviceSource) error {
	d.mu.Lock()
	retrying := d.retrying
	d.mu.Unlock()
	if !retrying {
		return nil
	}
	left, err := d.left(ctx)
	if err != nil {
		return problem("device", s.name, err)
	}
	for _, l := range left {
		if l.matches(s.identity) {
			return control.Errorf(control.ErrUnavailable, "device", s.name, "%s is attached as %s, which is not taken over yet", s.name, l.path)
		}
	}
	return nil
}

// fits says whether a device is attached as asked.
func (d *devices) fits(old *attachedDevice, via controlpb.Via, o deviceOptions) error {
	differs := ""
	switch {
	case via != controlpb.Via_VIA_UNSPECIFIED && via != old.via:
		differs = "through " + viaNames[old.via]
	case o.readOnly && !old.readOnly:
		differs = "for writing"
	case !o.readOnly && old.readOnly && !old.source.readOnly:
		differs = "read-only"
	default:
		return nil
	}
	told := control.Errorf(control.ErrExists, "device", old.source.name, "%s is attached as %s, %s", old.source.name, old.path(), differs)
	told.Remedy = "detach it first: ashlar detach " + old.path()
	return told
}

// named finds an attached device by its path or source.
func (d *devices) named(name string) (*attachedDevice, error) {
	if filepath.IsAbs(name) {
		path := name
		if to, err := filepath.EvalSymlinks(name); err == nil {
			path = to
		}
		for _, a := range d.all() {
			if a.path() == path {
				return a, nil
			}
		}
	}
	for _, a := range d.all() {
		if a.source.name == name {
			return a, nil
		}
	}
	s, err := d.source(name)
	if err != nil && !notFound(err) {
		return nil, err
	}
	if err == nil {
		if a := d.get(s.identity); a != nil {
			return a, nil
		}
	}
	told := control.Errorf(control.ErrNotFound, "device", name, "%s is not attached", name)
	told.Remedy = "`ashlar devices` shows what is"
	return nil, told
}

// detach removes a device.
func (d *devices) detach(ctx context.Context, name string, force bool) (*controlpb.Device, error) {
	a, err := d.named(name)
	if err != nil {
		if m, found := d.detachLeft(ctx, name, force, &err); found {
			return m, err
		}
		return nil, err
	}
	release, err := d.hold(ctx, a.source.identity)
	if err != nil {
		return nil, problem("device", name, err)
	}
	defer release()
	if d.get(a.source.identity) != a { // somebody was faster
		return nil, control.Errorf(control.ErrNotFound, "device", name, "%s is not attached any more", name)
	}
	m := d.message(a)
	if err := a.detach(ctx, force); err != nil {
		return nil, problem("device", m.GetPath(), err)
	}
	d.put(a.source.identity, nil)
	d.links.remove(a.source.name)
	d.log.Info("detached", "source", a.source.name, "device", m.GetPath()) // it has no path any more
	return m, nil
}

// detachLeft removes a device of the kernel's list that has no source here.
func (d *devices) detachLeft(ctx context.Context, name string, force bool, err *error) (*controlpb.Device, bool) {
	left, listErr := d.left(ctx)
	if listErr != nil {
		return nil, false
	}
	for _, l := range left {
		if l.path != name {
			continue
		}
		m := d.leftMessage(l)
		if !force {
			told := control.Errorf(control.ErrPrecondition, "device", name, "%s waits for a daemon: %v", name, errNoSource)
			told.Remedy = "give --force to remove it with what was not written back"
			*err = told
			return nil, true
		}
		if *err = d.ways[l.via].remove(ctx, l.foundDevice); *err != nil {
			*err = problem("device", name, *err)
			return nil, true
		}
		d.log.Warn("removed a device without a source", "device", name)
		return m, true
	}
	return nil, false
}

// leftDevice is a device that Ashlar made and this daemon does not serve.
type leftDevice struct {
	foundDevice
	via controlpb.Via
}

// left are the devices of the kernel's lists that this daemon does not serve.
func (d *devices) left(ctx context.Context) ([]leftDevice, error) {
	var errs []error
	mine := map[string]bool{}
	var list []leftDevice
	for _, via := range d.order {
		found, err := d.ways[via].found(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", viaNames[via], err))
		}
		for _, f := range found {
			list = append(list, leftDevice{f, via})
		}
	}
	for _, a := range d.all() { // after the lists, so that one attached meanwhile is known
		mine[a.path()] = true
	}
	list = slices.DeleteFunc(list, func(l leftDevice) bool { return mine[l.path] })
	return list, errors.Join(errs...)
}

// recoverPatience bounds taking over one device of the daemon before.
const recoverPatience = time.Minute

// recover takes over what the daemon before has left. Devices whose pools are closed
// wait; it is called again when a pool is opened. What fails, such as one whose server
// is away or that the kernel has not let go of yet, is tried again until it is done.
func (d *devices) recover(ctx context.Context) {
	if d.recoverOnce(ctx) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.retrying || d.ended {
		return
	}
	d.retrying = true
	d.retries.Go(func() { // ends when all are taken over, or with the daemon
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		d.retries.Go(func() { // ends with the daemon, or the tries
			select {
			case <-d.ending:
				cancel() // a try that waits for another server must not keep the daemon
			case <-ctx.Done():
			}
		})
		for pause := recoverFirst; ; pause = min(2*pause, recoverMost) {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			if d.recoverOnce(ctx) == 0 {
				d.mu.Lock()
				d.retrying = false
				d.mu.Unlock()
				return
			}
		}
	})
}

// Pauses between tries to take over a device.
const (
	recoverFirst = 50 * time.Millisecond
	recoverMost  = 10 * time.Second
)

// recoverOnce tries to take over each device that has a source here, and returns how
// many it could not. Who has the source open is the only one who may serve it, so a
// device that seems to be served is one that the kernel is still taking from a dead
// process: its id may be ours now.
func (d *devices) recoverOnce(ctx context.Context) int {
	left, err := d.left(ctx)
	if err != nil {
		d.log.Warn("the kernel's devices cannot all be listed", "error", err)
	}
	paths := map[string]bool{}
	for _, l := range left {
		paths[l.path] = true
	}
	for _, a := range d.all() {
		paths[a.path()] = true
	}
	if err == nil {
		d.links.clean(func(device string) bool { return paths[device] })
	}
	if len(left) == 0 {
		return 0
	}
	known, err := d.sources()
	if err != nil {
		d.log.Error("devices of the daemon before", "error", err)
		return len(left)
	}
	hints := d.links.sources()
	var failed atomic.Int32
	var each sync.WaitGroup
	limit := make(chan struct{}, 16)
	for _, l := range left {
		s, err := d.sourceOf(known, l.matches, hints[l.path])
		if err != nil {
			if !l.served { // else it is another daemon's
				d.log.Warn("a device waits", "device", l.path, "reason", err)
			}
			continue
		}
		each.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			if err := d.takeOver(ctx, l, s); err != nil {
				failed.Add(1)
				d.log.Error("a device is not taken over yet", "device", l.path, "source", s.name, "error", err)
			}
		})
	}
	each.Wait()
	return int(failed.Load())
}

// takeOver serves a device of the daemon before.
func (d *devices) takeOver(ctx context.Context, l leftDevice, s *deviceSource) error {
	ctx, cancel := context.WithTimeout(ctx, recoverPatience)
	defer cancel()
	release, err := d.hold(ctx, s.identity)
	if err != nil {
		return err
	}
	defer release()
	if d.get(s.identity) != nil {
		return nil
	}
	begin := time.Now()
	flusher.Become(d.reactors, d.log)
	a, err := d.ways[l.via].recover(ctx, s, l.foundDevice)
	if err != nil {
		return err
	}
	device := &attachedDevice{attachment: a, source: s, via: l.via, since: d.links.since(s.name, l.path)}
	if b, err := blockdev.Kernel().Device(filepath.Base(l.path)); err == nil {
		device.readOnly = b.ReadOnly
	}
	d.put(s.identity, device)
	if err := d.links.set(s.name, a.path()); err != nil {
		d.log.Warn("no link to a device", "device", a.path(), "source", s.name, "error", err)
	}
	if err := a.resize(ctx); err != nil { // it may have grown while nobody served it
		d.log.Warn("the kernel does not show a device's present size", "device", l.path, "error", err)
	}
	d.log.Info("took over", "source", s.name, "device", l.path, "via", viaNames[l.via], "took", time.Since(begin))
	return nil
}

// resized shows the kernel that a volume has grown, where it is attached.
func (d *devices) resized(ctx context.Context, poolName, volume string) {
	for _, a := range d.all() {
		if x := a.source.exported; x == nil || x.pool != poolName || x.volume != volume || x.snapshot != "" {
			continue
		}
		err := a.resize(ctx)
		if err != nil {
			d.log.Warn("the kernel does not show a device's present size", "device", a.path(), "error", err)
		}
		d.mu.Lock()
		a.resized = err
		d.mu.Unlock()
	}
}

// ofExports are the paths of the devices of some volumes and snapshots.
func (d *devices) ofExports(some func(*exported) bool) []string {
	var paths []string
	for _, a := range d.all() {
		if x := a.source.exported; x != nil && some(x) {
			paths = append(paths, a.path())
		}
	}
	return paths
}

// ofPool are the devices of a pool's volumes and snapshots.
func (d *devices) ofPool(poolName string) []string {
	return d.ofExports(func(x *exported) bool { return x.pool == poolName })
}

// ofVolume are the devices of a volume itself.
func (d *devices) ofVolume(poolName, volume string) []string {
	return d.ofExports(func(x *exported) bool { return x.pool == poolName && x.volume == volume && x.snapshot == "" })
}

// waiting says of each device that does not do what it should why not.
func (d *devices) waiting() []string {
	var reasons []string
	for _, a := range d.all() {
		if state, reason := a.state(); state != controlpb.DeviceState_DEVICE_STATE_ONLINE {
			reasons = append(reasons, fmt.Sprintf("device %s (%s): %s", a.path(), a.source.name, reason))
		}
	}
	return reasons
}

// leave lets go of all devices, which stay for the next daemon.
func (d *devices) leave(ctx context.Context) error {
	d.mu.Lock()
	before := d.ended
	d.ended = true
	d.mu.Unlock()
	if before {
		return nil
	}
	close(d.ending)
	d.retries.Wait()
	d.work.Wait()
	var mu sync.Mutex
	var errs []error
	var each sync.WaitGroup
	for _, a := range d.all() {
		each.Go(func() {
			if err := a.leave(ctx); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("%s: %w", a.path(), err))
			}
		})
	}
	each.Wait()
	if w, ok := d.ways[controlpb.Via_VIA_NBD].(*nbdWay); ok {
		w.shutdown(ctx)
	}
	for _, w := range d.ways {
		errs = append(errs, w.close())
	}
	return errors.Join(errs...)
}
