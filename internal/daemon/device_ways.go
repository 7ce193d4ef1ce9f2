package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
	"github.com/ashlar-storage/ashlar/nbd"
	"github.com/ashlar-storage/ashlar/nbd/attach"
	"github.com/ashlar-storage/ashlar/nbd/remote"
	"github.com/ashlar-storage/ashlar/ublk"
)

// way is a kernel interface through which a device can be attached.
type way interface {
	// supported reports why this system cannot attach that way, with the remedy.
	supported() error
	// attach makes a block device of a source. Nothing is left behind on an error.
	attach(ctx context.Context, s *deviceSource, o deviceOptions) (attachment, error)
	// found lists devices of this way that the kernel has and Ashlar made.
	found(ctx context.Context) ([]foundDevice, error)
	// recover takes over a device that was found, when nobody serves it.
	recover(ctx context.Context, s *deviceSource, f foundDevice) (attachment, error)
	// remove removes a device that was found and nobody serves.
	remove(ctx context.Context, f foundDevice) error
	close() error
}

// deviceOptions are how a device is wanted; 0 is as suits.
type deviceOptions struct {
	queues, depth int
	readOnly      bool
}

// foundDevice is a device that the kernel has.
type foundDevice struct {
	path    string
	matches func(identity string) bool
	served  bool // by a living process, maybe another daemon
	id      int
	backend string
	source  string // the name it was attached by, where the kernel has it
	doubt   string // why it is not known whether it is served
}

// attachment is a device that this daemon serves.
type attachment interface {
	path() string
	shape() (queues, depth int)
	// state says whether requests are served, and else why not.
	state() (controlpb.DeviceState, string)
	// resize shows the kernel the present size of the source.
	resize(ctx context.Context) error
	// detach removes the device from the system, unless it is used.
	detach(ctx context.Context, force bool) error
	// leave lets go of the device, which stays and waits for the next daemon.
	leave(ctx context.Context) error
}

// inUse is a refusal to detach, by what.
func inUseError(path string, err error) error {
	told := control.Errorf(control.ErrInUse, "device", path, "%w", err)
	told.Remedy = "unmount it, or close the programs that have it open"
	if b, e := blockdev.Kernel().Device(filepath.Base(path)); e == nil && len(b.Mounts)+len(b.Holders) > 0 {
		told = control.Errorf(control.ErrInUse, "device", path, "%s is in use: %s", path, blockdev.Used(b.Mounts, b.Holders))
		told.Remedy = "unmount it first"
		if len(b.Mounts) > 0 {
			told.Remedy = "umount " + b.Mounts[0] + " first"
		}
	}
	return told
}

// ---- ublk -----------------------------------------------------------------

// ublkDepth leaves room for hundreds of devices in the reservations of a reactor; one
// queue with that many requests in flight is more than a disk needs.
const ublkDepth = 64

type ublkWay struct{ reactors []*reactor.Reactor }

func (w *ublkWay) supported() error {
	if err := ublk.Supported(); err != nil {
		return err
	}
	return nil
}

func (w *ublkWay) config(s *deviceSource, d datapath.Device, o deviceOptions) ublk.Config {
	c := ublk.Config{Device: d, Reactors: w.reactors, ID: ublk.AnyID, Queues: o.queues, Depth: o.depth, Tag: ublk.TagOf(s.identity), ReadOnly: o.readOnly}
	if c.Depth == 0 {
		c.Depth = ublkDepth
	}
	return c
}

func (w *ublkWay) attach(ctx context.Context, s *deviceSource, o deviceOptions) (attachment, error) {
	d, err := s.open(ctx, o.readOnly)
	if err != nil {
		return nil, openError(s, err)
	}
	t, err := ublk.Start(ctx, w.config(s, d, o))
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &ublkAttachment{target: t, device: d, volume: s.exported != nil}, nil
}

func (w *ublkWay) found(ctx context.Context) ([]foundDevice, error) {
	list, err := ublk.List(ctx)
	if err != nil {
		if errors.Is(err, ublk.ErrUnsupported) {
			return nil, nil
		}
		return nil, err
	}
	var found []foundDevice
	for _, i := range list {
		if i.Ours {
			found = append(found, foundDevice{
				path: i.Path(), id: i.ID, served: i.State == ublk.StateLive && i.PID > 0 && alive(i.PID),
				matches: func(identity string) bool { return ublk.TagOf(identity) == i.Tag },
			})
		}
	}
	return found, nil
}

// alive says whether there is such a process.
func alive(pid int) bool { return unix.Kill(pid, 0) != unix.ESRCH }

func (w *ublkWay) recover(ctx context.Context, s *deviceSource, f foundDevice) (attachment, error) {
	i, err := ublk.Find(ctx, f.id)
	if err != nil {
		return nil, err
	}
	// The pool's files and the file's lock are ours once it is open: whatever a dead
	// daemon had on the way to the disk is over.
	d, err := s.open(ctx, i.ReadOnly)
	if err != nil {
		return nil, openError(s, err)
	}
	c := w.config(s, d, deviceOptions{readOnly: i.ReadOnly})
	c.ID = f.id
	t, err := ublk.Recover(ctx, c)
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &ublkAttachment{target: t, device: d, volume: s.exported != nil}, nil
}

func (w *ublkWay) remove(ctx context.Context, f foundDevice) error {
	err := ublk.Remove(ctx, f.id)
	if errors.Is(err, ublk.ErrInUse) || errors.Is(err, ublk.ErrServed) {
		return inUseError(f.path, err)
	}
	return err
}

func (w *ublkWay) close() error { return nil }

// remark says of a way that works what it does here.
func (w *ublkWay) remark() string {
	if err := ublk.ZeroCopySupported(); err != nil {
		return "every byte is copied: " + strings.TrimPrefix(err.Error(), "ublk: ")
	}
	return "files and disks are served without a copy; volumes of a pool are copied, for their CRC"
}

type ublkAttachment struct {
	target *ublk.Target
	device datapath.Device
	volume bool // of a pool
}

// note says whether bytes are copied, and why.
func (a *ublkAttachment) note() string {
	switch err := a.target.Copies(); {
	case err == nil:
		return "bytes go between disk and program without a copy"
	case a.volume:
		return "bytes are copied: volumes of a pool have their CRC checked"
	default:
		return "bytes are copied: " + err.Error()
	}
}

func (a *ublkAttachment) path() string               { return a.target.Path() }
func (a *ublkAttachment) shape() (queues, depth int) { return a.target.Queues(), a.target.Depth() }

func (a *ublkAttachment) state() (controlpb.DeviceState, string) {
	if a.target.Stats().Lost > 0 {
		return controlpb.DeviceState_DEVICE_STATE_FAILED, "the kernel took the device away"
	}
	return sourceState(a.device)
}

func (a *ublkAttachment) resize(ctx context.Context) error { return a.target.Resize(ctx) }

func (a *ublkAttachment) detach(ctx context.Context, _ bool) error {
	if err := a.target.Stop(ctx); err != nil {
		if errors.Is(err, ublk.ErrInUse) {
			return inUseError(a.path(), err)
		}
		return err
	}
	return a.device.Close()
}

func (a *ublkAttachment) leave(ctx context.Context) error {
	// Detach answers nothing, so what does not end can be given up: the kernel sends it
	// again to the next daemon.
	late := time.AfterFunc(drainPatience, func() { abandon(a.device) })
	defer late.Stop()
	return errors.Join(a.target.Detach(ctx), a.device.Close())
}

// sourceState says whether what a device shows is there.
func sourceState(d datapath.Device) (controlpb.DeviceState, string) {
	for _, r := range remotesOf(d) {
		switch state := r.State(); state.Condition {
		case remote.Waiting:
			return controlpb.DeviceState_DEVICE_STATE_WAITING, "the server is away: " + state.Reason
		case remote.Failed:
			return controlpb.DeviceState_DEVICE_STATE_FAILED, "the server is away: " + state.Reason
		}
	}
	return controlpb.DeviceState_DEVICE_STATE_ONLINE, ""
}

// ---- the kernel's nbd driver ----------------------------------------------

// backendPrefix begins the backend of our devices in the kernel's list:
// ashlar IDENTITY NAME.
const backendPrefix = "ashlar "

// nbdWay attaches over socket pairs to a server of its own, which offers nothing but
// what is attached.
type nbdWay struct {
	log     *slog.Logger
	server  *nbd.Server
	exports *nbd.ExportSet
	serving sync.WaitGroup
	// connections of each device, unless asked: one a reactor. With one, the kernel
	// waits for a slow reply as long as it takes; with several, it cuts the connection
	// and sends the request again.
	connections int
	dead        time.Duration // how long requests wait for a daemon; see attach.Config

	mu     sync.Mutex
	driver *attach.Driver           // nil until the kernel has one
	opened map[datapath.Device]bool // by the server
}

// nbdDepth is for each connection. The kernel sends up to 128 requests on one; those
// beyond wait in the socket, at no cost.
const nbdDepth = 64

func newNBDWay(reactors []*reactor.Reactor, dead time.Duration, log *slog.Logger) (*nbdWay, error) {
	w := &nbdWay{log: log, dead: dead, exports: &nbd.ExportSet{}, opened: map[datapath.Device]bool{}, connections: min(len(reactors), 4)}
	var err error
	w.server, err = nbd.NewServer(nbd.ServerConfig{
		Reactors: reactors, Exports: w.exports, Log: log, Depth: nbdDepth, DrainTimeout: drainPatience,
		ConnectionsMax: 1 << 16, PerAddressMax: 1 << 16, HandshakeTimeout: 30 * time.Second,
	})
	return w, err
}

// open is the driver, once the kernel has one; the module may be loaded later.
func (w *nbdWay) open() (*attach.Driver, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.driver == nil {
		d, err := attach.Open(attach.Options{Log: w.log})
		if err != nil {
			return nil, err
		}
		w.driver = d
	}
	return w.driver, nil
}

func (w *nbdWay) supported() error {
	if os.Geteuid() != 0 {
		return attach.ErrPermission
	}
	_, err := w.open()
	return err
}

// dial makes one more connection of the kernel to the server.
func (w *nbdWay) dial(context.Context) (*net.UnixConn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	var ends [2]net.Conn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "kernel")
		ends[i], err = net.FileConn(f)
		_ = f.Close() // the connection has a descriptor of its own
		if err != nil {
			for _, c := range ends[:i] {
				_ = c.Close() // nothing was sent
			}
			if i == 0 {
				_ = unix.Close(pair[1])
			}
			return nil, fmt.Errorf("socket pair: %w", err)
		}
	}
	w.serving.Go(func() {
		if err := w.server.ServeConn(ends[1]); err != nil && !errors.Is(err, nbd.ErrServerClosed) {
			w.log.Debug("a connection of the kernel ended", "error", err)
		}
	})
	return ends[0].(*net.UnixConn), nil
}

// offer makes a source an export that the kernel can connect to.
func (w *nbdWay) offer(s *deviceSource, backend string, readOnly bool) error {
	return w.exports.Add(&nbd.Export{Name: backend, Description: s.name, ReadOnly: readOnly || s.readOnly, Open: func() (datapath.Device, error) {
		d, err := s.open(context.Background(), readOnly || s.readOnly)
		if err != nil {
			return nil, openError(s, err)
		}
		o := &offered{d, w}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.opened[o] = true
		return o, nil
	}})
}

// offered is a device that the server has open.
type offered struct {
	datapath.Device
	way *nbdWay
}

// Unwrap gives the device below.
func (o *offered) Unwrap() datapath.Device { return o.Device }

// Close implements datapath.Device.
func (o *offered) Close() error {
	o.way.mu.Lock()
	delete(o.way.opened, o)
	o.way.mu.Unlock()
	return o.Device.Close()
}

func (w *nbdWay) config(backend string, o deviceOptions) attach.Config {
	if o.queues == 0 {
		o.queues = w.connections
	}
	return attach.Config{Dial: w.dial, Export: backend, Backend: backend, Connections: o.queues, ReadOnly: o.readOnly, DeadTimeout: w.dead}
}

func (w *nbdWay) attach(ctx context.Context, s *deviceSource, o deviceOptions) (attachment, error) {
	driver, err := w.open()
	if err != nil {
		return nil, err
	}
	o.readOnly = o.readOnly || s.readOnly
	// Opened here for the error; the export shares nothing with it but the pool.
	d, err := s.open(ctx, o.readOnly)
	if err != nil {
		return nil, openError(s, err)
	}
	if err := d.Close(); err != nil {
		return nil, openError(s, err)
	}
	backend := backendPrefix + s.identity + " " + s.name
	if err := w.offer(s, backend, o.readOnly); err != nil {
		return nil, err
	}
	c := w.config(backend, o)
	device, err := driver.Connect(ctx, c)
	if err != nil {
		w.exports.Remove(backend)
		return nil, err
	}
	a := &nbdAttachment{way: w, driver: driver, config: c, index: device.Index, node: device.Path, source: s}
	a.keep()
	return a, nil
}

func (w *nbdWay) found(context.Context) ([]foundDevice, error) {
	driver, err := w.open()
	if err != nil {
		if errors.Is(err, attach.ErrNoDriver) {
			return nil, nil
		}
		return nil, err
	}
	list, err := driver.List()
	if err != nil {
		return nil, err
	}
	var found []foundDevice
	for _, d := range list {
		rest, ours := strings.CutPrefix(d.Backend, backendPrefix)
		if !ours {
			continue
		}
		id, source, _ := strings.Cut(rest, " ")
		found = append(found, foundDevice{
			path: d.Path, id: int(d.Index), backend: d.Backend, source: source,
			matches: func(identity string) bool { return identity == id || strings.HasPrefix(rest, identity+" ") },
		})
	}
	return found, nil
}

func (w *nbdWay) recover(ctx context.Context, s *deviceSource, f foundDevice) (attachment, error) {
	driver, err := w.open()
	if err != nil {
		return nil, err
	}
	device, err := driver.Status(attach.Index(f.id))
	if err != nil {
		return nil, err
	}
	if err := w.offer(s, f.backend, device.ReadOnly); err != nil {
		return nil, err
	}
	a := &nbdAttachment{
		way: w, driver: driver, config: w.config(f.backend, deviceOptions{readOnly: device.ReadOnly}),
		index: device.Index, node: device.Path, source: s,
	}
	// Here for the error; Keep would try for ever.
	if _, err := driver.Reconfigure(ctx, a.index, a.config); err != nil {
		w.exports.Remove(f.backend)
		return nil, err
	}
	a.keep()
	return a, nil
}

func (w *nbdWay) remove(ctx context.Context, f foundDevice) error {
	driver, err := w.open()
	if err != nil {
		return err
	}
	err = driver.Disconnect(ctx, attach.Index(f.id), attach.DisconnectOptions{Force: true})
	var busy *attach.BusyError
	if errors.As(err, &busy) {
		return inUseError(f.path, err)
	}
	return err
}

// shutdown ends all connections; the devices wait for the next daemon.
func (w *nbdWay) shutdown(ctx context.Context) {
	// Connections that have not ended by then are cut, so that no answer reaches the
	// kernel: it sends what has none again to the next daemon.
	late := time.AfterFunc(drainPatience+time.Second, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for d := range w.opened {
			abandon(d)
		}
	})
	defer late.Stop()
	_ = w.server.Shutdown(ctx) // it waits, and has no errors
	w.serving.Wait()
}

func (w *nbdWay) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.driver == nil {
		return nil
	}
	return w.driver.Close()
}

// nbdDriver is what an attached device needs of [attach.Driver].
type nbdDriver interface {
	Keep(context.Context, attach.Index, attach.Config) error
	Status(attach.Index) (attach.Device, error)
	Reconfigure(context.Context, attach.Index, attach.Config) (attach.Device, error)
	Disconnect(context.Context, attach.Index, attach.DisconnectOptions) error
}

type nbdAttachment struct {
	way    *nbdWay
	driver nbdDriver
	config attach.Config
	index  attach.Index
	node   string
	source *deviceSource

	mu     sync.Mutex         // guards what follows: a device is looked at while it is detached
	cancel context.CancelFunc // of keep
	kept   chan struct{}      // closed when keep has ended
	failed error              // with which it ended by itself; nil: it did not
}

// keep gives the device fresh connections when some die, until unkeep.
func (a *nbdAttachment) keep() {
	ctx, cancel := context.WithCancel(context.Background())
	kept := make(chan struct{})
	a.mu.Lock()
	a.cancel, a.kept, a.failed = cancel, kept, nil
	a.mu.Unlock()
	go func() { // ends with cancel, or the device
		defer close(kept)
		if err := a.driver.Keep(ctx, a.index, a.config); err != nil && ctx.Err() == nil {
			a.mu.Lock()
			a.failed = err
			a.mu.Unlock()
		}
	}()
}

// unkeep ends keep, and returns what it had ended with before.
func (a *nbdAttachment) unkeep() error {
	a.mu.Lock()
	cancel, kept := a.cancel, a.kept
	a.mu.Unlock()
	cancel()
	<-kept
	return a.failure()
}

func (a *nbdAttachment) failure() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

func (a *nbdAttachment) path() string { return a.node }

func (a *nbdAttachment) shape() (queues, depth int) {
	return max(1, a.way.server.Connections()[a.config.Export]), 0
}

func (a *nbdAttachment) state() (controlpb.DeviceState, string) {
	if err := a.failure(); err != nil {
		return controlpb.DeviceState_DEVICE_STATE_FAILED, err.Error()
	}
	if a.way.server.Connections()[a.config.Export] == 0 {
		if _, err := a.driver.Status(a.index); errors.Is(err, attach.ErrNotAttached) {
			return controlpb.DeviceState_DEVICE_STATE_FAILED, "another program disconnected it; attach it again"
		}
		return controlpb.DeviceState_DEVICE_STATE_WAITING, "the kernel has no connection to the daemon"
	}
	return controlpb.DeviceState_DEVICE_STATE_ONLINE, ""
}

func (a *nbdAttachment) resize(ctx context.Context) error {
	_, err := a.driver.Reconfigure(ctx, a.index, a.config)
	return err
}

func (a *nbdAttachment) detach(ctx context.Context, force bool) error {
	err := a.unkeep()
	if !errors.Is(err, attach.ErrNotAttached) { // else the number may be another program's device by now
		err = a.driver.Disconnect(ctx, a.index, attach.DisconnectOptions{Force: force})
	}
	if err != nil && !errors.Is(err, attach.ErrNotAttached) {
		a.keep()
		var busy *attach.BusyError
		if errors.As(err, &busy) {
			return inUseError(a.node, err)
		}
		return err
	}
	a.way.exports.Remove(a.config.Export)
	return a.gone(ctx)
}

// gone waits until the server has closed what the device had open.
func (a *nbdAttachment) gone(ctx context.Context) error {
	for pause := time.Millisecond; a.way.server.Connections()[a.config.Export] > 0; pause = min(2*pause, 50*time.Millisecond) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("%s is detached, but its connections have not ended: %w", a.node, ctx.Err())
		}
	}
	return nil
}

func (a *nbdAttachment) leave(context.Context) error {
	_ = a.unkeep() // the next daemon has connections of its own
	return nil
}
