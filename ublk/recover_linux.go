package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/uring"
)

const servedWait = time.Second // for the kernel to notice that a server died

// Recover takes over a device whose server is gone: it goes on under its mounts, and
// what was in flight is issued again. Queues, Depth and IOMax are the device's own,
// whatever c says.
//
// c.Device must hold what the last one held, and nothing of the dead process may still
// be on its way to the disk: the kernel gives the device away before a write that the
// process had in flight there is done, and such a write could land on newer data. A
// store that holds a lock on its files (flock, O_EXCL) is safe when it is open: the lock
// ends with the last of them.
//
// It waits, up to the end of ctx, for the kernel to be done with the dead process.
//
// A device that this process detached is let go of when its reactors have stopped;
// one that it still serves never is.
//
// Errors: ErrNotFound, ErrServed, ErrNotOurs, ErrNoResize, or of what Start says.
func Recover(ctx context.Context, c Config) (*Target, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.ID == AnyID {
		return nil, errors.New("ublk: recovery of which device?")
	}
	if err := runningKernel(); err != nil {
		return nil, err
	}
	info := c.info()
	var t *Target
	err := withControl(func(control *control) error {
		d, err := control.info(ctx, c.ID)
		if err != nil {
			return err
		}
		if err := owned(&d, c.Tag); err != nil {
			return err
		}
		p, err := control.params(ctx, &d)
		if err != nil {
			return err
		}
		if err := takeable(&p, &info); err != nil {
			return fmt.Errorf("ublk: device %d: %w", c.ID, err)
		}
		if t, err = prepare(&c, &d, &info, c.copies(control.features)); err != nil {
			return err
		}
		if err := control.release(ctx, &d); err != nil {
			t.unprepare()
			return err
		}
		if t.file, err = openChar(ctx, t.id); err == nil {
			err = t.connect()
		}
		if err == nil {
			err = control.simple(ctx, commandEndUserRecovery, &d, uint64(os.Getpid()))
		}
		if err != nil {
			t.letGo()
			return err
		}
		if p.size != sectorsOf(&info) {
			if err := control.simple(ctx, commandUpdateSize, &d, sectorsOf(&info)); err != nil {
				t.log.Warn("ublk device keeps its size", "device", t.path, "reason", err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	t.log.Info("ublk device recovered", "device", t.path, "queues", t.info.queues, "depth", t.info.depth, "zero_copy", t.copies == nil)
	return t, nil
}

// owned says why a device is not one to recover under a tag.
func owned(d *devInfo, tag Tag) error {
	switch i := infoOf(d); {
	case !i.Ours:
		return fmt.Errorf("%w: %s", ErrNotOurs, i.Path())
	case i.Tag != tag:
		return fmt.Errorf("%w: %s has tag %012x, not %012x", ErrNotOurs, i.Path(), uint64(i.Tag), uint64(tag))
	case i.State == StateDead || !i.Features.Has(FeatureRecovery):
		return fmt.Errorf("ublk: device %d is %s and cannot be recovered", i.ID, i.State)
	}
	return nil
}

// takeable says why a store cannot go on with a device. One that has grown can: where the
// driver cannot change the size of a device (before Linux 6.16), the device keeps it.
func takeable(p *params, info *datapath.Info) error {
	if limit := ioMaxOf(info, int(p.ioMax)<<sectorShift); limit < int(p.ioMax)<<sectorShift {
		return fmt.Errorf("its requests have up to %d bytes, the store takes %d", p.ioMax<<sectorShift, limit)
	}
	if info.MinIO > 1<<p.logical {
		return fmt.Errorf("its blocks have %d bytes, the store's %d", 1<<p.logical, info.MinIO)
	}
	if size := sectorsOf(info); size < p.size {
		return fmt.Errorf("it has %d sectors, the store %d: %w", p.size, size, ErrNoResize)
	}
	return nil
}

// release waits for the kernel to be done with the old server, and begins recovery.
//
// A process that was killed takes a moment to let go; one that is alive for servedWait
// is taken for the server (a pid may be another's by now).
func (c *control) release(ctx context.Context, d *devInfo) error {
	began := time.Now()
	mended := c.features.Has(FeatureQuiesce)
	for {
		now, err := c.info(ctx, int(d.device))
		if err != nil {
			return err
		}
		if !mended && now.state == StateQuiesced {
			if err := mend(ctx, d); err != nil && !errors.Is(err, unix.EBUSY) {
				return err
			}
			mended = true
		}
		switch err = c.simple(ctx, commandStartUserRecovery, d, 0); {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINVAL) && now.state == StateQuiesced:
			return nil // begun before, by a process that died of it: no queue is ready
		case !errors.Is(err, unix.EBUSY):
			return err
		case now.state == StateLive && int(now.pid) != os.Getpid() && alive(int(now.pid)) && time.Since(began) > servedWait:
			return fmt.Errorf("%w: %s, process %d", ErrServed, blockPath(int(d.device)), now.pid)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("ublk: device %d is not let go of: %w", d.device, ctx.Err())
		case <-time.After(retryInterval):
		}
	}
}

// mend makes a device recoverable whose last recovery was killed between the FETCH_REQs
// of one reactor and those of another, or before any. Drivers before Linux 6.15 reset
// queues in START_USER_RECOVERY only, where they follow the pointer to a queue's server
// (ublk_queue_reinit: NULL, an oops, seen on 6.12), or refuse when no queue has one, and
// then map the descriptors to nobody else. So queues without a server are given one: a
// thread that fetches all their slots in one system call, and ends.
func mend(ctx context.Context, d *devInfo) error {
	type result struct {
		thread int
		err    error
	}
	done := make(chan result)
	go func() { // ends after what it does
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := mendOnThread(ctx, d)
		done <- result{unix.Gettid(), err}
	}()
	r := <-done
	for deadline := time.Now().Add(time.Second); r.err == nil && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", r.thread)); err != nil {
			break // the driver warns of a server that is not dying
		}
	}
	return r.err
}

func mendOnThread(ctx context.Context, d *devInfo) error {
	file, err := openChar(ctx, int(d.device))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // nothing is written
	ring, err := uring.Open(uring.Config{Entries: uint32(min(int(d.queues)*int(d.depth), 1<<14))})
	if err != nil {
		return err
	}
	defer func() { _ = ring.Close() }() // takes the fetched slots back
	encoded := d.features.Has(FeatureEncodedCommands) && !pretendOld
	command := func(number uint32, queue, tag int, address uint64) {
		s := ring.SQE()
		for s == nil {
			_ = ring.Enter(0, 0) // a ring of ours; what fails is seen in its completions
			s = ring.SQE()
		}
		s.Opcode = uring.OpURingCmd
		s.FD = int32(file.Fd())
		s.Offset = uint64(number)
		s.UserData = uint64(queue)
		var b [ioCommandSize]byte
		encodeIOCommand(&b, uint16(queue), uint16(tag), 0, address)
		copy(ring.Command(s), b[:])
	}
	// A number of no driver changes nothing. It is refused with EINVAL on a queue that
	// has a server, since that is another thread, and with EOPNOTSUPP on others.
	const foreign = 3<<30 | ioCommandSize<<16 | 'x'<<8 | commandFetchRequest
	for q := range int(d.queues) {
		command(foreign, q, 0, 0)
	}
	var bare []int
	for seen := 0; seen < int(d.queues); {
		if err := ring.Enter(1, int64(controlSlice)); err != nil {
			return err
		}
		for e := ring.Peek(); e != nil; e = ring.Peek() {
			if e.Result == -int32(unix.EOPNOTSUPP) {
				bare = append(bare, int(e.UserData))
			}
			ring.Seen()
			seen++
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if len(bare) == 0 {
		return nil
	}
	address := uint64(0)
	if !d.features.Has(FeatureUserCopy) {
		address = 1 << 12 // no request comes, so that nothing is ever copied there
	}
	for _, q := range bare {
		for tag := range int(d.depth) {
			command(ioNumber(commandFetchRequest, encoded), q, tag, address)
		}
	}
	return ring.Enter(0, 0)
}

// alive reports whether a process exists that is not about to end.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	for i := len(stat) - 1; i > 1; i-- { // the name, which may hold anything, ends at the last ')'
		if stat[i] == ')' && i+2 < len(stat) {
			return stat[i+2] != 'Z' && stat[i+2] != 'X'
		}
	}
	return false
}

// letGo leaves a device as it was found, as far as the kernel allows.
func (t *Target) letGo() {
	ctx, cancel := context.WithTimeout(context.Background(), cancelWait)
	defer cancel()
	if err := t.Detach(ctx); err != nil {
		t.log.Error("ublk device whose recovery failed", "device", t.path, "error", err)
	}
}
