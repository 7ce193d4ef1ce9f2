package ublk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
)

// Target is a device that this process serves. Its methods are for ordinary
// goroutines, not for reactors.
type Target struct {
	id     int          // immutable
	path   string       // immutable
	config Config       // immutable
	info   devInfo      // immutable; as the kernel made it
	log    *slog.Logger // immutable
	queues []*queue     // immutable; what is in them belongs to their reactors
	copies error        // why bytes pass through this process; nil: they need not. Immutable

	mu   sync.Mutex
	file *os.File // /dev/ublkcN; nil when closed
	over bool     // stopped or detached
}

// Start makes a block device of the kernel's and serves it. When it returns, the
// device can be used.
//
// Errors: ErrUnsupported, *KernelError, ErrExists for an ID that is taken, or of
// permission. Nothing is left behind.
func Start(ctx context.Context, c Config) (*Target, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	info := c.info()
	ioMax := ioMaxOf(&info, c.IOMax)
	p, err := paramsOf(&info, ioMax)
	if err != nil {
		return nil, err
	}
	if err := runningKernel(); err != nil {
		return nil, err
	}
	var t *Target
	err = withControl(func(control *control) error {
		copies := c.copies(control.features)
		d, err := control.add(ctx, &c, ioMax, copies == nil)
		if err != nil {
			return err
		}
		if t, err = prepare(&c, &d, &info, copies); err != nil {
			_ = control.delete(ctx, &d) // the first error is told
			return err
		}
		var b [paramsSize]byte
		p.encode(b[:])
		// Opened first: commands to an unprivileged device need a node of its owner's.
		if t.file, err = openChar(ctx, t.id); err == nil {
			err = control.do(ctx, &request{number: commandSetParams, device: d.device, data: b[:], path: d.path()})
		}
		if err == nil {
			err = t.connect()
		}
		if err == nil {
			err = control.simple(ctx, commandStartDev, &d, uint64(os.Getpid()))
		}
		if err != nil {
			t.abandon(control)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	t.log.Info("ublk device started", "device", t.path, "queues", t.info.queues, "depth", t.info.depth,
		"user_copy", t.info.features.Has(FeatureUserCopy), "zero_copy", t.copies == nil, "size", info.Size)
	return t, nil
}

// zeroCopyFeatures are those of a driver that is trusted to go without copies. AUTO_BUF_REG
// and user copy are enough to do it, but what became of registered buffers when a server
// died was mended for a year (Linux 6.15: 6ee6bd5d4fce, a freed request was used; 6.17:
// c5c5eb24ed61, released after the device), and recovery is promised. SAFE_STOP (7.0) is
// the sign of a driver with all that. Tests run on 7.3.
const zeroCopyFeatures = FeatureUserCopy | FeatureAutoBuffer | FeatureQuiesce | FeatureSafeStop

var errCopyingDriver = errors.New("ublk: the driver cannot do without, or not safely when its server dies (needs Linux 7.0)")

// add makes a device with everything the driver and the configuration allow.
func (c *control) add(ctx context.Context, config *Config, ioMax int, zeroCopy bool) (devInfo, error) {
	d := devInfo{
		queues: uint16(config.Queues), depth: uint16(config.Depth), ioMax: uint32(ioMax),
		device: commandDeviceNone, pid: -1, tag: tagMark | uint64(config.Tag),
	}
	if config.ID != AnyID {
		d.device = uint32(config.ID)
	}
	wanted := FeatureEncodedCommands | FeatureUpdateSize
	if config.Unprivileged {
		d.features = FeatureUnprivileged
	} else {
		d.features = FeatureRecovery | FeatureReissue
		wanted |= FeatureQuiesce
		if !config.PlainBuffers {
			wanted |= FeatureUserCopy
		}
		if zeroCopy {
			wanted |= FeatureAutoBuffer
		}
	}
	d.features |= wanted & c.features
	most, mostErr := DevicesMax() // before, so that the error can say how many there may be
	var b [devInfoSize]byte
	d.encode(b[:])
	err := c.do(ctx, &request{number: commandAddDev, device: d.device, data: b[:], reads: true})
	if errors.Is(err, unix.EACCES) && mostErr == nil {
		return d, fmt.Errorf("%w (ublks_max is %d: raise %s)", err, most, maxPath)
	}
	if err == nil {
		d.decode(b[:])
	}
	return d, err
}

// prepare makes a target of a device that exists, with nothing taken from the driver
// yet. Copies says why its bytes are to be copied, or is nil.
func prepare(c *Config, d *devInfo, info *datapath.Info, copies error) (*Target, error) {
	t := &Target{id: int(d.device), path: blockPath(int(d.device)), config: *c, info: *d, log: c.Reactors[0].Log(), copies: copies}
	if t.copies == nil && !d.features.Has(FeatureAutoBuffer|FeatureUserCopy) {
		t.copies = errors.New("the device was made to copy; one attached anew would not")
	}
	encoded := d.features.Has(FeatureEncodedCommands) && !pretendOld
	for i := range int(d.queues) {
		q := &queue{
			target: t, reactor: c.Reactors[i%len(c.Reactors)], index: uint16(i), ioMax: int(d.ioMax),
			userCopy: d.features.Has(FeatureUserCopy), info: *info,
			autoBuffer: d.features.Has(FeatureAutoBuffer), buffers: buffersNone,
			fetch: ioNumber(commandFetchRequest, encoded), commit: ioNumber(commandCommitAndFetch, encoded),
		}
		var err error
		if runErr := q.reactor.Run(func(*reactor.Reactor) {
			if err = q.prepare(int(d.depth), c.Device); err == nil && t.copies == nil && !q.takePlaces() {
				t.copies = fmt.Errorf("the table of registered buffers of reactor %s is full, or its engine has none", q.reactor.Name())
			}
		}); runErr != nil {
			err = runErr
		}
		if err != nil {
			t.unprepare()
			return nil, fmt.Errorf("ublk: device %d: %w", t.id, err)
		}
		t.queues = append(t.queues, q)
	}
	return t, nil
}

// unprepare gives back what prepare took.
func (t *Target) unprepare() {
	for _, q := range t.queues {
		_ = q.reactor.Run(func(*reactor.Reactor) { q.close(true) }) // a reactor that stopped has nothing to give back
	}
}

// connect gives every slot of every queue to the kernel. It reports a command the kernel did not take: START_DEV and END_USER_RECOVERY would
// wait for it for ever.
func (t *Target) connect() error {
	fd := int(t.file.Fd())
	errs := make([]error, len(t.queues))
	var group sync.WaitGroup
	for i, q := range t.queues {
		group.Go(func() {
			if err := q.reactor.Run(func(*reactor.Reactor) { errs[i] = q.connect(fd) }); err != nil {
				errs[i] = err
				return
			}
			_ = q.reactor.Run(func(*reactor.Reactor) {}) // a turn later, what was refused has come back
			if errno := q.counters.failed.Load(); errno != 0 {
				errs[i] = fmt.Errorf("FETCH_REQ of queue %d: %w", q.index, unix.Errno(errno))
			}
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("ublk: device %d: %w", t.id, err)
	}
	return nil
}

// openChar opens /dev/ublkcN, which udev may still be making, and which a process that
// just died may still hold.
func openChar(ctx context.Context, id int) (*os.File, error) {
	deadline := time.Now().Add(nodeWait)
	for {
		f, err := os.OpenFile(charPath(id), os.O_RDWR, 0)
		if err == nil {
			return f, nil
		}
		wait := errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EBUSY)
		if !wait || ctx.Err() != nil || time.Now().After(deadline) {
			return nil, fmt.Errorf("ublk: %w", err)
		}
		time.Sleep(retryInterval)
	}
}

// abandon removes a device that could not be started.
func (t *Target) abandon(c *control) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*cancelWait)
	defer cancel()
	if err := t.remove(ctx, c); err != nil {
		t.log.Error("ublk device that did not start is left behind", "device", t.path, "error", err)
	}
}

// ID is the number in the device's path.
func (t *Target) ID() int { return t.id }

// Path is the block device, /dev/ublkbN.
func (t *Target) Path() string { return t.path }

// Features are those of the device.
func (t *Target) Features() Features { return t.info.features }

// Copies says why the bytes of requests pass through this process, or is nil: then the
// disk and the programs that use the device exchange them inside the kernel, except those
// of requests that do not suit the disk (Stats.Passed counts those that do).
func (t *Target) Copies() error { return t.copies }

// copies says why the bytes of a new or recovered device with c are copied.
func (c *Config) copies(driver Features) error {
	switch {
	case c.Copy:
		return errors.New("as asked")
	case c.PlainBuffers || c.Unprivileged:
		return errors.New("the device is unprivileged or has plain buffers")
	case !driver.Has(zeroCopyFeatures):
		return errCopyingDriver
	}
	align, err := datapath.FixedBuffersOf(c.Device)
	switch {
	case err != nil:
		return err
	case align > datapath.BlockSize:
		return fmt.Errorf("the store takes multiples of %d bytes", align)
	}
	return nil
}

// Queues is how many hardware queues the kernel made.
func (t *Target) Queues() int { return int(t.info.queues) }

// Depth is how many requests each queue has in flight at most.
func (t *Target) Depth() int { return int(t.info.depth) }

// Stop removes the device from the system.
//
// Errors: ErrInUse when it is mounted or held; it is served on then. When ctx ends
// first, the device may be half gone; Stop can be called again.
func (t *Target) Stop(ctx context.Context) error { return t.stop(ctx, false) }

// StopInUse removes the device even from under a mount; what it has in flight ends
// well, what comes after fails.
func (t *Target) StopInUse(ctx context.Context) error { return t.stop(ctx, true) }

func (t *Target) stop(ctx context.Context, used bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil
	}
	if !used { // looking opens the disk
		if err := inUse(t.id, true); err != nil {
			return err
		}
	}
	err := withControl(func(c *control) error { return t.remove(ctx, c) })
	if err == nil {
		t.over = true
		t.log.Info("ublk device removed", "device", t.path)
	}
	return err
}

// remove takes a device away in the one order that does not hang: stop (which ends
// every command), unmap and close, delete. While the file is open, the id is ours and
// nobody else's.
func (t *Target) remove(ctx context.Context, c *control) error {
	for _, q := range t.queues {
		_ = q.reactor.Run(func(*reactor.Reactor) { q.failHeld() }) // a stopped reactor holds nothing
	}
	if err := c.simple(ctx, commandStopDev, &t.info, 0); err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	for _, q := range t.queues {
		if err := q.wait(ctx); err != nil {
			return err
		}
	}
	if t.file != nil {
		_ = t.file.Close() // the commands have ended
		t.file = nil
	}
	return c.delete(ctx, &t.info)
}

// wait waits for the queue to be given back.
func (q *queue) wait(ctx context.Context) error {
	var drained chan struct{}
	if q.reactor.Run(func(*reactor.Reactor) {
		drained = q.drained
		if drained != nil && !q.fetched {
			q.finish() // no command was given
		}
	}) != nil || drained == nil {
		return nil
	}
	select {
	case <-drained:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("ublk: queue %d of device %d still has commands: %w", q.index, q.target.id, ctx.Err())
	}
}

// Detach leaves the device to another process, which calls [Recover]: mounts stay, and
// requests wait. What is at the store runs to its end first; it was not answered, so
// the kernel issues it again. The store may be closed afterwards.
//
// Where the kernel can quiesce a device (Linux 6.16), it is free at once. Before, the
// kernel lets go of it when this process ends or the reactors stop, and not sooner.
func (t *Target) Detach(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil
	}
	if !t.info.features.Has(FeatureRecovery) {
		return fmt.Errorf("%w: an unprivileged device cannot be left to another process", ErrUnsupported)
	}
	t.quiesce(ctx)
	for _, q := range t.queues {
		var emptied <-chan struct{}
		if q.reactor.Run(func(*reactor.Reactor) { emptied = q.giveUp() }) != nil {
			continue // a stopped reactor has nothing in flight
		}
		select {
		case <-emptied:
		case <-ctx.Done():
			return fmt.Errorf("ublk: queue %d of device %d: %w", q.index, t.id, ctx.Err())
		}
	}
	t.quiesce(ctx) // what was answered, and so fetched, after the first time
	for _, q := range t.queues {
		_ = q.reactor.Run(func(*reactor.Reactor) { q.leave() }) // as above
	}
	if t.file != nil {
		_ = t.file.Close() // commands in flight keep the kernel's side open
		t.file = nil
	}
	t.over = true
	t.log.Info("ublk device detached", "device", t.path)
	return nil
}

// quiesce has the kernel take back the slots that have no request, where it can, and
// waits for them. A request keeps it from nothing: it is issued again.
func (t *Target) quiesce(ctx context.Context) {
	if !t.info.features.Has(FeatureQuiesce) {
		return
	}
	err := withControl(func(c *control) error { return c.simple(ctx, commandQuiesceDev, &t.info, quiesceWait) })
	if err != nil {
		t.log.Warn("ublk device is not quiesced before the process ends", "device", t.path, "reason", err)
		return
	}
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(retryInterval) {
		rest := 0
		for _, q := range t.queues {
			_ = q.reactor.Run(func(*reactor.Reactor) { rest += len(q.slots) - q.retired - len(q.held) - q.atDevice - len(q.waiting) })
		}
		if rest == 0 {
			return
		}
	}
}

// Resize shows the device's present size to the kernel.
//
// Errors: ErrNoResize; the old size stays in force then.
func (t *Target) Resize(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return fmt.Errorf("ublk: device %d is stopped", t.id)
	}
	info := t.config.info()
	if shown, err := blockdev.Kernel().Device(filepath.Base(t.Path())); err == nil && shown.Size == sectorsOf(&info)<<sectorShift {
		return nil
	}
	if !t.info.features.Has(FeatureUpdateSize) {
		return ErrNoResize
	}
	// Requests to the new end come as soon as the kernel knows of it; ones to the old
	// end are refused by the store once it is gone.
	t.setInfo(info)
	return withControl(func(c *control) error {
		return c.simple(ctx, commandUpdateSize, &t.info, sectorsOf(&info))
	})
}

func (t *Target) setInfo(info datapath.Info) {
	for _, q := range t.queues {
		_ = q.reactor.Run(func(*reactor.Reactor) { q.info = info }) // a stopped reactor serves nobody
	}
}

// Stats is what a target has done.
type Stats struct {
	Requests [datapath.OpCount]uint64 // completed, by operation
	Read     uint64                   // bytes
	Written  uint64                   // bytes
	Passed   uint64                   // reads and writes whose bytes did not pass through this process
	Errors   uint64                   // requests answered with an error
	InFlight int                      // requests at the device
	Lost     int                      // slots the kernel took back; all of them: the device is gone
}

// Stats adds up all queues. Any goroutine.
func (t *Target) Stats() (s Stats) {
	for _, q := range t.queues {
		for op := range s.Requests {
			s.Requests[op] += q.counters.requests[op].Load()
		}
		s.Read += q.counters.read.Load()
		s.Written += q.counters.written.Load()
		s.Passed += q.counters.passed.Load()
		s.Errors += q.counters.errors.Load()
		s.InFlight += int(q.counters.inFlight.Load())
		s.Lost += int(q.counters.retired.Load())
	}
	return s
}
