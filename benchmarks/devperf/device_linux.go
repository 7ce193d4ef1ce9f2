package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/internal/load"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// deviceTarget is a device in this process: no export, no socket and no other process
// is between the load and what it is about.
type deviceTarget struct {
	device datapath.Device
	poll   reactor.PollMode
	cpus   []int // of the jobs' reactors, in turn; none: not pinned
	close  func() error
}

// openDevice opens what name stands for: null:SIZE, mem:SIZE, volume:NAME of the pool
// on the disks in pools, or the path of a file or block device.
func openDevice(name string, pools []string, poll string, cpus []int) (target, error) {
	t := &deviceTarget{poll: reactor.PollMode(poll), cpus: cpus}
	t.close = func() error { return t.device.Close() }
	kind, rest, _ := strings.Cut(name, ":")
	var size units.Size
	var err error
	switch kind {
	case "null":
		if err = size.Set(rest); err == nil {
			t.device = nulldev.New(uint64(size))
		}
	case "mem":
		if err = size.Set(rest); err == nil {
			t.device, err = memdev.New(memdev.Config{Size: uint64(size)})
		}
	case "volume":
		err = t.openVolume(rest, pools)
	default:
		t.device, err = filedev.Open(name, filedev.Options{})
	}
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	return t, nil
}

// openVolume opens a pool that no daemon has open, and a volume of it.
func (t *deviceTarget) openVolume(name string, pools []string) (err error) {
	if len(pools) == 0 {
		return errors.New("of which pool? give its disks by --pool")
	}
	var closers []func() error
	undo := func() (err error) {
		for i := len(closers) - 1; i >= 0; i-- {
			err = errors.Join(err, closers[i]())
		}
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, undo())
		}
	}()
	log := slog.New(slog.DiscardHandler)
	r, err := reactor.Start(reactor.Config{Name: "pool", Poll: reactor.PollOff, Log: log})
	if err != nil {
		return err
	}
	closers = append(closers, func() error { r.Stop(); return nil })
	var disks []pool.Disk
	for _, path := range pools {
		d, err := filedev.Open(path, filedev.Options{})
		if err != nil {
			return err
		}
		closers = append(closers, d.Close)
		disks = append(disks, pool.Disk{Path: path, Device: d})
	}
	p, err := pool.Open(pool.Config{Disks: disks, Reactor: r, Log: log})
	if err != nil {
		return err
	}
	closers = append(closers, p.Close)
	if t.device, err = p.OpenVolume(name); err != nil {
		return err
	}
	closers = append(closers, t.device.Close)
	t.close = undo
	return nil
}

func (t *deviceTarget) Size() uint64 { return t.device.Info().Size }

func (t *deviceTarget) Close() error { return t.close() }

// Open makes a queue of the device, on a reactor of its own.
func (t *deviceTarget) Open(p load.Pattern, jobIndex int) (driver, error) {
	info := t.device.Info()
	switch {
	case p.Writes() && info.ReadOnly:
		return nil, fmt.Errorf("%s is read-only", info.Description)
	case p.FlushEvery > 0 && !info.Has(datapath.FeatureFlush):
		return nil, fmt.Errorf("%s has no flush", info.Description)
	case p.BlockBytes%int(info.MinIO) != 0:
		return nil, fmt.Errorf("%s takes multiples of %d bytes, not %d", info.Description, info.MinIO, p.BlockBytes)
	case info.MaxIO != 0 && p.BlockBytes > int(info.MaxIO):
		return nil, fmt.Errorf("%s takes at most %d bytes at once, not %d", info.Description, info.MaxIO, p.BlockBytes)
	}
	c := reactor.Config{Name: fmt.Sprintf("job %d", jobIndex), Poll: t.poll, Log: slog.New(slog.DiscardHandler)}
	c.BufferBytes = max(64<<20, 2*int64(p.Depth)*int64(p.BlockBytes))
	if len(t.cpus) > 0 {
		c.CPU = 1 + t.cpus[jobIndex%len(t.cpus)]
	}
	r, err := reactor.Start(c)
	if err != nil {
		return nil, err
	}
	d := &deviceDriver{r: r, failed: make(chan error, 1)}
	if e := r.Run(func(r *reactor.Reactor) { err = d.open(t.device, p) }); e != nil || err != nil {
		r.Stop()
		return nil, errors.Join(e, err)
	}
	return d, nil
}

// deviceDriver is one queue. Its reactor owns everything but failed.
type deviceDriver struct {
	r      *reactor.Reactor
	queue  datapath.Queue
	slots  []*deviceSlot
	free   []*deviceSlot
	ended  []*deviceSlot // completed, and not yet recorded
	gather reactor.Deferred
	failed chan error // the outcome of Run

	generator *load.Generator
	meter     *load.Meter
	schedule  schedule
	began     bool
	over      bool
	err       error // the first
}

// deviceSlot is one request in flight.
type deviceSlot struct {
	datapath.Request
	memory []byte
	sent   time.Time
	op     load.Op
}

func (d *deviceDriver) open(device datapath.Device, p load.Pattern) error {
	queue, err := device.OpenQueue(d.r, p.Depth)
	if err != nil {
		return err
	}
	d.queue, d.gather.Func = queue, d.turn
	d.ended = make([]*deviceSlot, 0, p.Depth)
	for i := range p.Depth {
		s := &deviceSlot{memory: d.r.Buffers().Alloc(p.BlockBytes)}
		if s.memory == nil {
			return errors.Join(fmt.Errorf("no memory for %d requests of %d bytes", p.Depth, p.BlockBytes), queue.Close())
		}
		s.Tag = uint32(i)
		s.Done = func(*datapath.Request) {
			d.ended = append(d.ended, s)
			d.r.Defer(&d.gather)
		}
		d.slots, d.free = append(d.slots, s), append(d.free, s)
	}
	return nil
}

// Run keeps the pattern's depth in flight until s.end.
func (d *deviceDriver) Run(g *load.Generator, m *load.Meter, s schedule) error {
	d.generator, d.meter, d.schedule = g, m, s
	if !d.r.Post(reactor.TaskFunc(func(*reactor.Reactor) { d.turn() })) {
		return reactor.ErrStopped
	}
	return <-d.failed
}

// turn records what has ended since the last one, and submits as much again. The clock
// is read once for all of them.
func (d *deviceDriver) turn() {
	if d.over {
		return
	}
	now := time.Now()
	if !d.began && !now.Before(d.schedule.begin) {
		d.meter.Begin(now)
		d.began = true
	}
	for _, s := range d.ended {
		if s.Status != datapath.StatusOK && d.err == nil {
			d.err = fmt.Errorf("%s of %d bytes at %d: %s", s.Op, s.Length, s.Offset, s.Status)
		}
		if d.began && !now.After(d.schedule.end) {
			d.meter.Record(s.op, now.Sub(s.sent), int(s.Length))
		}
		d.free = append(d.free, s) // within its capacity
	}
	d.ended = d.ended[:0]
	if d.err == nil && now.Before(d.schedule.end) {
		for n := len(d.free); n > 0; n-- {
			s := d.free[n-1]
			d.free = d.free[:n-1]
			d.submit(s, now)
		}
		return
	}
	if len(d.free) == len(d.slots) {
		d.over = true
		if d.began {
			d.meter.End(d.schedule.end)
		}
		d.failed <- d.err
	}
}

func (d *deviceDriver) submit(s *deviceSlot, now time.Time) {
	op, offset := d.generator.Next()
	s.op, s.sent = op, now
	s.Flags, s.Status, s.Zero = 0, datapath.StatusOK, false
	s.Offset, s.Length, s.Buf = offset, uint64(len(s.memory)), s.memory
	switch op {
	case load.OpRead:
		s.Op = datapath.OpRead
	case load.OpWrite:
		s.Op = datapath.OpWrite
	default:
		s.Op, s.Offset, s.Length, s.Buf = datapath.OpFlush, 0, 0, nil
	}
	d.queue.Submit(&s.Request)
}

// Close ends the queue, with nothing in flight, and its reactor.
func (d *deviceDriver) Close() error {
	var err error
	busy := false
	e := d.r.Run(func(r *reactor.Reactor) {
		if busy = len(d.free)+len(d.ended) < len(d.slots); busy {
			return
		}
		for _, s := range d.slots {
			r.FreeBuffer(s.memory)
		}
		err = d.queue.Close()
	})
	if busy {
		return errors.New("the device has not answered: its queue is left as it is")
	}
	d.r.Stop()
	return errors.Join(e, err)
}
