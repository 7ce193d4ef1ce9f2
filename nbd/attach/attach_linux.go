package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/nbd"
)

// kernelFlags are the transmission flags that any version of the driver knows;
// it ignores those it does not (write zeroes and rotational came with Linux 6.12).
const kernelFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagRotational |
	nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagCanMultiConn

const poll = 10 * time.Millisecond // between looks at what the kernel has no notice for

// Driver is the kernel's nbd driver. Its methods may be called from any goroutine.
// It keeps nothing of the devices: what is attached is read from the kernel.
type Driver struct {
	family family
	host   host
	log    *slog.Logger
	pace   pace
}

// Open reaches the driver. Errors: ErrNoDriver.
func Open(o Options) (*Driver, error) {
	h := kernelHost()
	f, err := openFamily(dialKernel, h.sys)
	if err != nil {
		return nil, err
	}
	return newDriver(f, h, o), nil
}

func newDriver(f family, h host, o Options) *Driver {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &Driver{family: f, host: h, log: o.Log, pace: paceDefault}
}

// Close gives the driver back. Devices stay attached.
func (d *Driver) Close() error { return d.family.Close() }

// List describes the attached devices, those of other programs too.
func (d *Driver) List() ([]Device, error) {
	taken, err := d.taken()
	if err != nil {
		return nil, err
	}
	var devices []Device
	for index, connected := range taken {
		if !connected {
			continue
		}
		device, err := d.host.device(index)
		if errors.Is(err, ErrNotAttached) {
			continue // open in a program, and without a server; or detached just now
		}
		if err != nil {
			return nil, err
		}
		devices = append(devices, device)
	}
	slices.SortFunc(devices, func(a, b Device) int { return int(a.Index) - int(b.Index) })
	return devices, nil
}

// Status describes a device. Errors: ErrNotAttached.
func (d *Driver) Status(index Index) (Device, error) { return d.host.device(index) }

// Find describes the device of a backend. Errors: ErrNotAttached.
func (d *Driver) Find(backend string) (Device, error) {
	devices, err := d.List()
	if err != nil {
		return Device{}, err
	}
	for _, device := range devices {
		if backend != "" && device.Backend == backend {
			return device, nil
		}
	}
	return Device{}, fmt.Errorf("%w: %s", ErrNotAttached, backend)
}

// FreeIndex returns the lowest index from from on that nobody has. Somebody may
// have it a moment later; Connect tells.
func (d *Driver) FreeIndex(from Index) (Index, error) {
	taken, err := d.taken()
	if err != nil {
		return 0, err
	}
	for index := from; ; index++ {
		if !taken[index] && !d.host.attached(index) {
			return index, nil
		}
	}
}

func (d *Driver) taken() (map[Index]bool, error) {
	reply, err := d.family.execute(commandStatus, nil, true)
	if err != nil {
		return nil, netlinkError("status", err)
	}
	taken, err := decodeStatus(reply)
	if err != nil {
		return nil, fmt.Errorf("attach: status: %w", err)
	}
	return taken, nil
}

// Connect attaches an export. The device outlives this process; Keep has to run
// somewhere for it to outlive the server's.
//
// Errors: *AttachedError, *InUseError, ErrServer, ErrPermission, *StaleNodeError.
// On an error nothing is attached.
func (d *Driver) Connect(ctx context.Context, c Config) (Device, error) {
	if err := c.setDefaults(); err != nil {
		return Device{}, err
	}
	if c.Backend != "" {
		device, err := d.Find(c.Backend)
		if err == nil {
			return Device{}, &AttachedError{Device: device}
		}
		if !errors.Is(err, ErrNotAttached) {
			return Device{}, err
		}
	}
	conns, info, err := c.open(ctx)
	if err != nil {
		return Device{}, err
	}
	defer conns.close() // the kernel has references of its own
	if c.ReadOnly {
		info.Flags |= nbd.FlagReadOnly
	}
	block, size, err := c.geometry(info)
	if err != nil {
		return Device{}, err
	}
	p := parameters{
		index: c.Index, size: size, blockSize: block, flags: uint64(info.Flags & kernelFlags), connect: true,
		deadSeconds: seconds(c.DeadTimeout), backend: c.Backend, sockets: conns.fds,
	}
	index, err := d.connect(ctx, &p)
	if err != nil {
		return Device{}, err
	}
	device, err := d.settle(ctx, index, c.retryAfter(len(conns.fds)))
	if err != nil { // nobody has used it yet
		return Device{}, errors.Join(err, d.command(commandDisconnect, &parameters{index: &index}))
	}
	if c.Backend != "" && device.Backend == "" {
		d.log.Warn("nbd device without a name in the kernel", "device", device.Path, "volume", c.Backend,
			"cause", &KernelError{What: "backend identifier", Since: "5.14"})
	}
	d.log.Info("nbd device", "device", device.Path, "volume", c.Backend, "from", "detached", "to", "attached", "connections", len(conns.fds))
	return device, nil
}

// connect has the kernel attach, and returns the index.
func (d *Driver) connect(ctx context.Context, p *parameters) (Index, error) {
	attributes, err := p.encode()
	if err != nil {
		return 0, fmt.Errorf("attach: %w", err)
	}
	var reply []byte
	for try := 1; ; try++ {
		reply, err = d.family.execute(commandConnect, attributes, true)
		// udev and the like open devices for a moment, and an open device cannot be
		// attached. The kernel's own choice passes over them.
		passing := errors.Is(err, unix.EBUSY) && p.index != nil && !d.host.attached(*p.index)
		if !passing || try == d.pace.busyTries || !sleep(ctx, d.pace.busy) {
			break
		}
	}
	if errors.Is(err, unix.EBUSY) && p.index != nil {
		return 0, &InUseError{Index: *p.index}
	}
	if err != nil {
		return 0, netlinkError("connect", err)
	}
	index, err := decodeIndex(reply)
	if err != nil {
		return 0, fmt.Errorf("attach: connect: %w", err)
	}
	return index, nil
}

// settle waits until a device that was attached shows, and sets its timer.
func (d *Driver) settle(ctx context.Context, index Index, retryAfter time.Duration) (Device, error) {
	for !d.host.attached(index) {
		if !sleep(ctx, poll) {
			return Device{}, fmt.Errorf("attach: %v does not show: %w", index, ctx.Err())
		}
	}
	if err := d.host.checkNode(index); err != nil {
		return Device{}, err
	}
	// The timer's file is in milliseconds, and there since Linux 4.20. Where it
	// cannot be written (sysfs read-only, in a container) the driver's 30 s hold.
	timer := strconv.FormatInt(retryAfter.Milliseconds(), 10)
	if err := os.WriteFile(d.host.block(index, "queue/io_timeout"), []byte(timer), 0); err != nil {
		d.log.Warn("nbd device keeps the driver's timer of 30 s for requests of lost connections", "device", index, "err", err)
	}
	return d.host.device(index)
}

// Reconfigure gives an attached device fresh connections in place of those that
// died, and its new size, if the export has grown. The kernel takes as many
// connections as have died; when none has, nothing changes.
//
// Errors: ErrNotAttached, ErrServer, ErrMismatch, ErrPermission.
func (d *Driver) Reconfigure(ctx context.Context, index Index, c Config) (Device, error) {
	if err := c.setDefaults(); err != nil {
		return Device{}, err
	}
	device, err := d.host.device(index)
	if err != nil {
		return Device{}, err
	}
	if c.Backend != "" && device.Backend != "" && c.Backend != device.Backend {
		return Device{}, fmt.Errorf("%w: %s has %s", ErrMismatch, device.Path, device.Backend)
	}
	conns, info, err := c.open(ctx)
	if err != nil {
		return Device{}, err
	}
	defer conns.close() // the kernel has references to those it took
	if err := device.fits(info); err != nil {
		return Device{}, err
	}
	size := info.Size &^ uint64(device.BlockSize-1)
	p := parameters{index: &index, backend: device.Backend, deadSeconds: seconds(c.DeadTimeout), sockets: conns.fds}
	if size != device.Size {
		p.size = size
	}
	if err := d.change(&p); err != nil {
		return Device{}, err
	}
	return d.host.device(index)
}

// fits tells whether an export can take the place of the one that is attached: the
// kernel goes on as if nothing had changed, its size aside.
func (d *Device) fits(info nbd.ExportInfo) error {
	switch {
	case info.Size&^uint64(d.BlockSize-1) < d.Size: // it is another volume, or an old copy of it
		return fmt.Errorf("%w: %d bytes, and %s has %d", ErrMismatch, info.Size, d.Path, d.Size)
	case info.BlockMin > d.BlockSize:
		return fmt.Errorf("%w: blocks of %d bytes, and %s has %d", ErrMismatch, info.BlockMin, d.Path, d.BlockSize)
	case info.Flags&nbd.FlagReadOnly != 0 && !d.ReadOnly:
		return fmt.Errorf("%w: it is read-only, and %s is not", ErrMismatch, d.Path)
	}
	for _, need := range []struct {
		has  bool
		flag nbd.TransmissionFlags
		name string
	}{{d.Cached, nbd.FlagSendFlush, "flush"}, {d.FUA, nbd.FlagSendFUA, "FUA"}, {d.Discard, nbd.FlagSendTrim, "trim"}, {d.Zeroes, nbd.FlagSendWriteZeroes, "write zeroes"}} {
		if need.has && info.Flags&need.flag == 0 {
			return fmt.Errorf("%w: it has no %s, and %s has", ErrMismatch, need.name, d.Path)
		}
	}
	return nil
}

// Resize tells the kernel that the export has grown.
//
// Errors: ErrNotAttached, ErrMismatch for less than there is.
func (d *Driver) Resize(index Index, size uint64) (Device, error) {
	device, err := d.host.device(index)
	if err != nil {
		return Device{}, err
	}
	size &^= uint64(device.BlockSize - 1)
	if size < device.Size {
		return Device{}, fmt.Errorf("%w: %s cannot shrink from %d bytes to %d", ErrMismatch, device.Path, device.Size, size)
	}
	if size == device.Size {
		return device, nil
	}
	if err := d.change(&parameters{index: &index, backend: device.Backend, size: size}); err != nil {
		return Device{}, err
	}
	d.log.Info("nbd device", "device", device.Path, "volume", device.Backend, "from", device.Size, "to", size)
	return d.host.device(index)
}

// change sends RECONFIGURE, which fails with EINVAL for a device that has been
// detached meanwhile.
func (d *Driver) change(p *parameters) error {
	err := d.command(commandReconfigure, p)
	if errors.Is(err, unix.EINVAL) && !d.host.attached(*p.index) {
		return fmt.Errorf("%w: %v", ErrNotAttached, *p.index)
	}
	return err
}

func (d *Driver) command(command uint8, p *parameters) error {
	attributes, err := p.encode()
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if _, err := d.family.execute(command, attributes, false); err != nil {
		return netlinkError(map[uint8]string{commandDisconnect: "disconnect", commandReconfigure: "reconfigure"}[command], err)
	}
	return nil
}

// Disconnect detaches a device that nobody uses, after what was written to it is at
// the server. It returns when the device is gone.
//
// Errors: ErrNotAttached, *BusyError; ctx's, with the device still attached, when
// the server does not take what is written.
func (d *Driver) Disconnect(ctx context.Context, index Index, o DisconnectOptions) error {
	device, err := d.host.device(index)
	if err != nil {
		return err
	}
	if len(device.Mounts)+len(device.Holders) > 0 {
		return &BusyError{Device: device}
	}
	if err := d.detach(ctx, device, o); err != nil {
		return err
	}
	// The driver lets go of a device when the last who has it open closes it.
	for d.host.attached(index) {
		if !sleep(ctx, poll) {
			return fmt.Errorf("attach: %s has no server any more, and a program still has it open: %w", device.Path, ctx.Err())
		}
	}
	d.log.Info("nbd device", "device", device.Path, "volume", device.Backend, "from", "attached", "to", "detached")
	return nil
}

// detach has the driver end its connections.
func (d *Driver) detach(ctx context.Context, device Device, o DisconnectOptions) error {
	if !o.Force {
		if err := d.host.checkNode(device.Index); err != nil {
			return err
		}
		c, err := d.flush(ctx, device)
		if err != nil {
			return err
		}
		defer c.Close() // nobody could mount it in between; nothing was written through it
	}
	return d.command(commandDisconnect, &parameters{index: &device.Index})
}

// flush claims a device and writes back what the page cache has for it.
func (d *Driver) flush(ctx context.Context, device Device) (claimed, error) {
	type result struct {
		claimed claimed
		err     error
	}
	done := make(chan result, 1)
	go func() { // ends with the server's answer, or when the dead timeout fails the I/O: a system call that nothing else ends
		c, err := d.host.claim(device.Path)
		if err == nil && !device.ReadOnly {
			if err = c.Sync(); err != nil {
				_ = c.Close() // err says more
			}
		}
		done <- result{c, err}
	}()
	select {
	case r := <-done:
		switch {
		case errors.Is(r.err, unix.EBUSY):
			return nil, &BusyError{Device: device}
		case r.err != nil:
			return nil, fmt.Errorf("attach: %w", r.err)
		}
		return r.claimed, nil
	case <-ctx.Done():
		go func() { // ends with the one above
			if r := <-done; r.err == nil {
				_ = r.claimed.Close() // nobody wants it any more
			}
		}()
		return nil, fmt.Errorf("attach: %s: its server does not take what is written (force detaches without): %w", device.Path, ctx.Err())
	}
}

// geometry is the device's block size and size.
func (c *Config) geometry(info nbd.ExportInfo) (block uint32, size uint64, err error) {
	block = c.BlockSize
	least := max(info.BlockMin, blockMin)
	if block == 0 {
		block = least
	}
	if block < least || block > blockMax {
		return 0, 0, fmt.Errorf("%w: it takes blocks of %d bytes and more, the kernel %d to %d", ErrServer, least, blockMin, blockMax)
	}
	size = info.Size &^ uint64(block-1) // the kernel has whole blocks only
	if size == 0 || size > math.MaxInt64 {
		return 0, 0, fmt.Errorf("%w: an export of %d bytes is no device", ErrServer, info.Size)
	}
	return block, size, nil
}

func (c *Config) retryAfter(connections int) time.Duration {
	switch {
	case c.RetryAfter != 0:
		return max(c.RetryAfter, time.Millisecond)
	case connections == 1:
		return retryAlone
	}
	return retryAmong
}

// seconds rounds up: the driver's timeouts are in seconds, and 0 would be none.
func seconds(d time.Duration) uint64 {
	n := uint64(d / timeoutUnit)
	if d%timeoutUnit > 0 {
		n++
	}
	return n
}

// connections are sockets in transmission, for the kernel.
type connections struct {
	conns []*net.UnixConn
	fds   []int
}

func (c *connections) close() {
	for _, conn := range c.conns {
		_ = conn.Close() // the kernel has what it took; the server sees the others end
	}
}

// open makes the connections and runs their handshakes. There is one only when the
// server does not promise that a flush covers all of them.
func (c *Config) open(ctx context.Context) (*connections, nbd.ExportInfo, error) {
	list := &connections{}
	var info nbd.ExportInfo
	for n := c.Connections; len(list.fds) < n; {
		conn, err := c.Dial(ctx)
		if err != nil {
			list.close()
			return nil, info, fmt.Errorf("%w: %w", ErrServer, err)
		}
		got, err := nbd.Negotiate(ctx, conn, nbd.Options{Export: c.Export, HandshakeTimeout: c.HandshakeTimeout}) // closes conn on an error
		if err != nil {
			list.close()
			return nil, info, fmt.Errorf("%w: %w", ErrServer, err)
		}
		fd, err := descriptor(conn)
		list.conns = append(list.conns, conn)
		if err == nil && len(list.fds) > 0 && (got.Size != info.Size || got.Flags != info.Flags) {
			err = errors.New("it changes between two connections")
		}
		if err != nil {
			list.close()
			return nil, info, fmt.Errorf("%w: %w", ErrServer, err)
		}
		list.fds, info = append(list.fds, fd), got
		if info.Flags&nbd.FlagCanMultiConn == 0 {
			n = 1
		}
	}
	return list, info, nil
}

// descriptor is the number of a connection's descriptor, valid until its Close.
func descriptor(conn *net.UnixConn) (fd int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(n uintptr) { fd = int(n) })
	return fd, err
}

// sleep waits, and tells whether it was to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
