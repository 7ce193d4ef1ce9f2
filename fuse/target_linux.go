package fuse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
	"github.com/ashlar-storage/ashlar/internal/flusher"
)

// Target is a device that this process serves. Its methods are for ordinary
// goroutines, not for reactors.
type Target struct {
	config  Config       // immutable
	session session      // immutable once served
	log     *slog.Logger // immutable
	queues  []*queue     // immutable; what is in them belongs to their reactors

	mu   sync.Mutex
	fd   int  // /dev/fuse; -1 when closed
	kept bool // the keeper has it
	loop loop
	over bool // stopped or detached
}

// Supported reports why this system cannot have such devices, or nil. That it can does
// not say that they survive their server; see Recoverable.
//
// Errors: ErrUnsupported, or of permission.
func Supported() error {
	fd, err := openConnection()
	if err != nil {
		return err
	}
	_ = unix.Close(fd) // not mounted
	if fd, err = openControl(); err != nil {
		return err
	}
	_ = unix.Close(fd) // nothing is written
	return nil
}

// Recoverable reports why a device of this kernel does not survive its server, or nil.
//
// Errors: ErrNoResend.
func Recoverable() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("fuse: uname: %w", err)
	}
	return recoverableRelease(unix.ByteSliceToString(u.Release[:]))
}

func recoverableRelease(release string) error {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil || major < 6 || (major == 6 && minor < 9) {
		return fmt.Errorf("%w: this is Linux %s", ErrNoResend, release)
	}
	return nil
}

// Start makes a block device of the kernel's and serves it. When it returns, the
// device can be used.
//
// What a process that died left of a device of that name is removed first if its
// connection is broken and nobody uses it.
//
// Errors: ErrUnsupported, ErrExists for a device of that name that lives or waits for
// its server (Recover it), ErrInUse for a Loop that is taken and for a dead device that
// is still mounted, or of permission. Nothing is left behind.
func Start(ctx context.Context, c Config) (*Target, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if err := Supported(); err != nil {
		return nil, err
	}
	if err := makeRoom(ctx, &c); err != nil {
		return nil, err
	}
	t := newTarget(&c)
	t.session = session{
		background: uint16(c.Depth), ioMax: uint32(c.IOMax), block: c.BlockSize, readOnly: c.info(c.BlockSize).ReadOnly,
		file: filepath.Join(c.Dir, fileName(c.Name)),
	}
	if err := t.prepare(); err != nil {
		return nil, err
	}
	if err := t.start(ctx); err != nil {
		t.abandon(ctx)
		return nil, err
	}
	t.log.Info("fuse device started", "device", t.Path(), "file", t.session.file, "queues", len(t.queues), "depth", c.Depth, "kept", t.kept)
	return t, nil
}

// makeRoom removes what is left of a dead device, and refuses one that is not dead.
func makeRoom(ctx context.Context, c *Config) error {
	old, err := find(c.Name)
	if errors.Is(err, ErrNotFound) && c.Keeper == nil {
		return nil
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if c.Keeper != nil {
		old.State = StateWaiting // if the keeper has it
	}
	err = remove(ctx, &old, c.Keeper, false)
	if errors.Is(err, ErrServed) {
		err = fmt.Errorf("%w: %s: %w", ErrExists, c.Name, err)
	}
	return err
}

// find returns what the kernel has of a device, without who uses it.
func find(name string) (Info, error) {
	i := Info{Name: name, Loop: AnyLoop}
	mounted, err := mounts()
	if err != nil {
		return i, err
	}
	configured, err := loops(mounted)
	if err != nil {
		return i, err
	}
	for _, m := range mounted {
		if m.name == name {
			i.File, i.Connection = m.file, m.connection
		}
	}
	for _, l := range configured {
		if l.carried == loopName(name) && (i.File == "" || l.connection == i.Connection) {
			i.Loop, i.Connection = l.number, l.connection
		}
	}
	if i.File == "" && i.Loop < 0 {
		return i, fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	return i, nil
}

func newTarget(c *Config) *Target {
	return &Target{config: *c, log: c.Reactors[0].Log().With("volume", c.Name), fd: -1, loop: loop{number: AnyLoop}}
}

// prepare makes the queues.
func (t *Target) prepare() error {
	flusher.Become(t.config.Reactors, t.log)
	info := t.config.info(t.session.block)
	info.ReadOnly = info.ReadOnly || t.session.readOnly
	for _, r := range leastUsed(t.config.Reactors, t.config.Queues) {
		q := &queue{target: t, reactor: r, ioMax: int(t.session.ioMax), info: info}
		var err error
		if runErr := q.reactor.Run(func(*reactor.Reactor) { err = q.prepare(t.config.Depth, t.config.Device) }); runErr != nil {
			err = runErr
		}
		if err != nil {
			t.unprepare()
			return fmt.Errorf("fuse: %s: %w", t.config.Name, err)
		}
		t.queues = append(t.queues, q)
	}
	return nil
}

// unprepare closes the queues.
func (t *Target) unprepare() {
	for _, q := range t.queues {
		_ = q.reactor.Run(func(*reactor.Reactor) { q.close() }) // a stopped reactor has nothing to give back
	}
}

// start makes the mount, has it kept, and makes the loop device, in that order: what a
// process that dies in between leaves is a mount that nobody uses.
func (t *Target) start(ctx context.Context) (err error) {
	if t.fd, err = openConnection(); err != nil {
		return err
	}
	if err = mountFile(t.fd, t.config.Name, t.session.file, int(t.session.ioMax)); err != nil {
		t.session.file = "" // not mounted
		return err
	}
	if t.session.connection, err = connectionOf(t.session.file); err != nil {
		return err
	}
	if err = greet(ctx, t.fd, &t.session); err != nil {
		return err
	}
	if err = t.keep(ctx); err != nil {
		return err
	}
	if err = t.connect(); err != nil {
		return err
	}
	return t.attach()
}

// keep hands the connection to the keeper. Where the kernel could not send requests
// again, they must fail with this process, or they would wait for ever.
func (t *Target) keep(ctx context.Context) error {
	if t.config.Keeper == nil {
		return nil
	}
	if !t.session.resends() {
		t.log.Warn("fuse device does not survive this process", "reason", ErrNoResend)
		return nil
	}
	if err := t.config.Keeper.Put(ctx, t.config.Name, t.session.encode(), t.fd); err != nil {
		return fmt.Errorf("fuse: %s: %w", t.config.Name, err)
	}
	t.kept = true
	return nil
}

// connect begins to serve.
func (t *Target) connect() error {
	for _, q := range t.queues {
		var err error
		if runErr := q.reactor.Run(func(*reactor.Reactor) { err = q.connect(t.fd) }); runErr != nil {
			err = runErr
		}
		if err != nil {
			return fmt.Errorf("fuse: %s: %w", t.config.Name, err)
		}
	}
	return nil
}

// attach makes the loop device.
func (t *Target) attach() error {
	carried := loopName(t.config.Name)
	number, err := attachLoop(t.session.file, carried, t.config.Loop, t.session.block, t.session.readOnly)
	if err != nil {
		return err
	}
	sys := fmt.Sprintf("/sys/block/loop%d/loop/", number)
	t.loop = loop{number: number, carried: carried, backing: text(sys + "backing_file"), connection: t.session.connection, readOnly: t.session.readOnly}
	if text(sys+"dio") != "1" {
		t.log.Warn("the loop driver refuses direct I/O: the device is slow, and data is cached twice", "device", loopPath(number))
	}
	return nil
}

// recoverable tells whether another process can go on. Immutable once served.
func (t *Target) recoverable() bool { return t.kept }

// abandon removes what start made.
func (t *Target) abandon(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	if err := t.dismantle(ctx); err != nil {
		t.log.Error("fuse device that did not start is left behind", "error", err)
	}
}

// Path is the block device, /dev/loopN.
func (t *Target) Path() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.loop.number < 0 {
		return ""
	}
	return loopPath(t.loop.number)
}

// Loop is the number in Path.
func (t *Target) Loop() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.loop.number
}

// File is where the mount is, which is a file.
func (t *Target) File() string { return t.session.file }

// Connection is the number of the connection in /sys/fs/fuse/connections.
func (t *Target) Connection() uint32 { return t.session.connection }

// Kept tells whether the device survives this process.
func (t *Target) Kept() bool { return t.kept }

// Queues is how many reactors serve.
func (t *Target) Queues() int { return len(t.queues) }

// Depth is how many requests are in flight at most.
func (t *Target) Depth() int { return t.config.Depth }

// Stop removes the device from the system: the loop device, which writes back what is
// cached, then the mount and its file.
//
// Errors: ErrInUse when it is mounted or held; it is served on then. When ctx ends
// first, the device may be half gone; Stop can be called again.
func (t *Target) Stop(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil
	}
	path := loopPath(t.loop.number)
	if err := t.dismantle(ctx); err != nil {
		return err
	}
	t.over = true
	t.log.Info("fuse device removed", "device", path)
	return nil
}

// dismantle takes everything away, in the one order in which nobody waits for anything
// that is gone.
func (t *Target) dismantle(ctx context.Context) error {
	if t.loop.number >= 0 {
		if err := busy(t.loop.number); err != nil {
			return err
		}
		for _, q := range t.queues {
			_ = q.reactor.Run(func(*reactor.Reactor) { q.failHeld() }) // a stopped reactor holds nothing
		}
		if err := detachLoop(ctx, &t.loop); err != nil {
			return err
		}
		t.loop = loop{number: AnyLoop}
	}
	if t.session.file != "" {
		if err := unmountFile(ctx, t.session.file); err != nil {
			return err
		}
	}
	if err := t.rest(ctx, true); err != nil {
		return err
	}
	t.unprepare()
	if t.kept {
		if err := t.config.Keeper.Remove(ctx, t.config.Name); err != nil {
			t.log.Warn("keeper holds a descriptor of a device that is gone", "error", err)
		}
	}
	t.closeConnection()
	return nil
}

// rest waits until nothing is at the device; nothing is read any more.
func (t *Target) rest(ctx context.Context, stopping bool) error {
	for _, q := range t.queues {
		var emptied <-chan struct{}
		if q.reactor.Run(func(*reactor.Reactor) { emptied = q.giveUp(stopping) }) != nil {
			continue // a stopped reactor has nothing in flight
		}
		select {
		case <-emptied:
		case <-ctx.Done():
			return fmt.Errorf("fuse: requests of %s do not end: %w", t.config.Name, ctx.Err())
		}
	}
	return nil
}

func (t *Target) closeConnection() {
	if t.fd >= 0 {
		_ = unix.Close(t.fd) // nothing is answered any more
		t.fd = -1
	}
}

// Detach leaves the device to another process, which calls [Recover]: mounts stay, and
// requests wait. What is at the store runs to its end first, and is answered. The store
// may be closed afterwards.
//
// Errors: ErrNoResend for a device that no keeper holds. When ctx ends first, nothing
// more is served; Detach can be called again.
func (t *Target) Detach(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil
	}
	if !t.kept {
		return fmt.Errorf("%w: no keeper holds %s", ErrNoResend, t.config.Name)
	}
	if err := t.rest(ctx, false); err != nil {
		return err
	}
	t.unprepare()
	t.closeConnection()
	t.over = true
	t.log.Info("fuse device detached", "device", loopPath(t.loop.number))
	if err := t.config.Keeper.Release(ctx, t.config.Name); err != nil && !errors.Is(err, keeper.ErrAway) {
		return fmt.Errorf("fuse: %s: %w", t.config.Name, err)
	}
	return nil
}

// Resize shows the device's present size to the kernel. Call it after the store grew.
func (t *Target) Resize(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return t.resizeLocked()
}

func (t *Target) resizeLocked() error {
	info := t.config.info(t.session.block)
	info.ReadOnly = info.ReadOnly || t.session.readOnly
	for _, q := range t.queues {
		_ = q.reactor.Run(func(*reactor.Reactor) { q.info = info }) // a stopped reactor serves nobody
	}
	if t.session.file == "" {
		return fmt.Errorf("fuse: %s: its mount is in another mount namespace; detach and attach it for the new size", t.config.Name)
	}
	return resizeLoop(t.loop.number, t.session.file)
}

// Stats adds up all queues. Any goroutine.
func (t *Target) Stats() (s Stats) {
	for _, q := range t.queues {
		for op := range s.Requests {
			s.Requests[op] += q.counters.requests[op].Load()
		}
		s.Read += q.counters.read.Load()
		s.Written += q.counters.written.Load()
		s.Errors += q.counters.errors.Load()
		s.Control += q.counters.control.Load()
		s.InFlight += int(q.counters.inFlight.Load())
		s.Gone = s.Gone || q.counters.gone.Load()
	}
	return s
}
