package fuse

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/fuse/keeper"
)

// Recover takes over a device whose server is gone: it goes on under its mounts, and
// what was in flight is done again. IOMax, BlockSize and ReadOnly are the device's own,
// whatever c says; so is Depth, where c says more. Where the process died before it had
// made the loop device, that is made now.
//
// c.Device must hold what the last one held, and nothing of the dead process may still
// be on its way to the disk: a write that it had in flight there could land on newer
// data, since the kernel sends every write again that was not answered. A store that
// holds a lock on its files (flock, O_EXCL) is safe when it is open: the lock ends with
// the last of them.
//
// It waits, up to the end of ctx, for the dead process to end.
//
// Errors: ErrNotFound, ErrServed, ErrDead, ErrNoResend, ErrMismatch, or of what Start
// says. A device that could not be recovered waits on.
func Recover(ctx context.Context, c Config) (*Target, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Keeper == nil {
		return nil, errors.New("fuse: recovery from which keeper?")
	}
	state, fd, err := take(ctx, &c)
	if err != nil {
		return nil, err
	}
	t := newTarget(&c)
	t.fd, t.kept = fd, true
	if err := t.recover(ctx, state); err != nil {
		t.unprepare()
		t.closeConnection()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if err := c.Keeper.Release(ctx, c.Name); err != nil {
			t.log.Error("keeper takes a device for served that is not", "error", err)
		}
		return nil, err
	}
	t.log.Info("fuse device recovered", "device", t.Path(), "queues", len(t.queues), "depth", t.config.Depth)
	return t, nil
}

// servedWait is how long a dead process may take to close its connection to the keeper.
const servedWait = 5 * time.Second

// take takes the connection from the keeper.
func take(ctx context.Context, c *Config) (state []byte, fd int, err error) {
	owned := false // as the keeper has said
	for deadline := time.Now().Add(servedWait); ; owned = true {
		state, fd, err = c.Keeper.Take(ctx, c.Name)
		switch {
		case err != nil && owned && ctx.Err() != nil:
			return nil, -1, fmt.Errorf("%w: %w", ErrServed, ctx.Err())
		case errors.Is(err, keeper.ErrNotFound):
			return nil, -1, fmt.Errorf("%w: the keeper at %s does not hold %s", ErrNotFound, c.Keeper.Socket(), c.Name)
		case errors.Is(err, keeper.ErrOwned) && time.Now().After(deadline):
			return nil, -1, fmt.Errorf("%w: %w", ErrServed, err)
		case !errors.Is(err, keeper.ErrOwned):
			return state, fd, err
		}
		select {
		case <-ctx.Done():
			return nil, -1, fmt.Errorf("%w: %w", ErrServed, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

func (t *Target) recover(ctx context.Context, state []byte) error {
	if err := t.session.decode(state); err != nil {
		return err
	}
	if broken(t.fd) {
		return fmt.Errorf("%w: %s", ErrDead, t.config.Name)
	}
	if !t.session.resends() {
		return fmt.Errorf("%w: %s", ErrNoResend, t.config.Name)
	}
	t.config.Depth = min(t.config.Depth, int(t.session.background))
	at, err := locate(t.session.connection)
	if err != nil {
		return err
	}
	l, err := loopOf(t.config.Name, t.session.connection)
	if err != nil {
		return err
	}
	if err := t.takeable(&l); err != nil {
		return err
	}
	t.session.file = at
	if err := t.prepare(); err != nil {
		return err
	}
	if err := resend(t.fd); err != nil {
		return err
	}
	if err := t.connect(); err != nil {
		return err
	}
	t.loop = l
	if l.number < 0 {
		if at == "" {
			return fmt.Errorf("%w: %s has no loop device, and its mount is in another mount namespace", ErrMismatch, t.config.Name)
		}
		return t.attach()
	}
	if info := t.config.info(t.session.block); loopSize(l.number) != info.Size {
		if err := t.resizeLocked(); err != nil {
			t.log.Warn("fuse device keeps its size", "reason", err)
		}
	}
	return nil
}

// locate is where a connection is mounted in this mount namespace; "" for nowhere.
func locate(connection uint32) (string, error) {
	list, err := mounts()
	if err != nil {
		return "", err
	}
	for i := range list {
		if list[i].connection == connection {
			return list[i].file, nil
		}
	}
	return "", nil
}

// loopOf is the loop device of a connection; its number is AnyLoop when there is none.
func loopOf(name string, connection uint32) (loop, error) {
	mounted, err := mounts()
	if err != nil {
		return loop{}, err
	}
	list, err := loops(mounted)
	if err != nil {
		return loop{}, err
	}
	for _, l := range list {
		if l.connection == connection && l.carried == loopName(name) {
			if sure, ok := look(l.number); ok && sure.connection == connection && sure.carried == l.carried {
				return l, nil
			}
		}
	}
	return loop{number: AnyLoop}, nil
}

// takeable says why a store cannot go on with a device.
func (t *Target) takeable(l *loop) error {
	info := t.config.Device.Info()
	switch {
	case info.MinIO > t.session.block:
		return fmt.Errorf("%w: %s has blocks of %d bytes, the store's smallest I/O is %d", ErrMismatch, t.config.Name, t.session.block, info.MinIO)
	case info.MaxIO != 0 && info.MaxIO < t.session.ioMax:
		return fmt.Errorf("%w: requests of %s have up to %d bytes, the store takes %d", ErrMismatch, t.config.Name, t.session.ioMax, info.MaxIO)
	case info.ReadOnly && !t.session.readOnly:
		return fmt.Errorf("%w: %s can be written, the store cannot", ErrMismatch, t.config.Name)
	case l.number >= 0 && t.config.info(t.session.block).Size < loopSize(l.number):
		return fmt.Errorf("%w: %s has %d bytes, the store %d", ErrMismatch, t.config.Name, loopSize(l.number), info.Size)
	}
	return nil
}

// resend has the kernel send again what was read and not answered.
func resend(fd int) error {
	b := make([]byte, headerOutSize)
	putHeader(b, 0, -notifyResend, 0) // a notification is an answer to nobody, with its code for an error
	_, err := unix.Write(fd, b)
	switch {
	case errors.Is(err, unix.EINVAL):
		return ErrNoResend
	case err != nil:
		return fmt.Errorf("fuse: resend: %w", err)
	}
	return nil
}

func loopSize(number int) uint64 {
	return sysNumber(number, "size") * 512
}

func sysNumber(number int, name string) (n uint64) {
	_, _ = fmt.Sscan(text(fmt.Sprintf("/sys/block/loop%d/%s", number, name)), &n) // gone: 0
	return n
}

// List returns the devices of Ashlar, by name: those of this mount namespace, and those
// with a loop device. k may be nil; then nobody knows who serves them.
func List(ctx context.Context, k *keeper.Client) ([]Info, error) {
	mounted, err := mounts()
	if err != nil {
		return nil, err
	}
	configured, err := loops(mounted)
	if err != nil {
		return nil, err
	}
	var kept []keeper.Entry
	if k != nil {
		if kept, err = k.List(ctx); err != nil {
			return nil, err
		}
	}
	used := readTables()
	byConnection := map[uint32]*Info{}
	var list []*Info
	add := func(connection uint32) *Info {
		i := byConnection[connection]
		if i == nil {
			i = &Info{Loop: AnyLoop, Connection: connection}
			byConnection[connection] = i
			list = append(list, i)
		}
		return i
	}
	for _, m := range mounted {
		i := add(m.connection)
		i.Name, i.File = m.name, m.file
	}
	for _, e := range kept {
		var s session
		if s.decode(e.State) != nil {
			continue // not ours
		}
		i := add(s.connection)
		if i.Name == "" {
			i.Name = e.Name
		}
		if i.Name == e.Name {
			i.State, i.PID, i.BlockSize, i.ReadOnly = StateWaiting, 0, s.block, s.readOnly
			if e.Owned {
				i.State, i.PID = StateServed, e.PID
			}
		}
	}
	for _, l := range configured {
		i := add(l.connection)
		if i.Name == "" {
			i.Name = strings.TrimPrefix(l.carried, loopMark)
		}
		if loopName(i.Name) != l.carried && strings.TrimPrefix(l.carried, loopMark) != i.Name {
			continue // somebody's own loop device on our file
		}
		i.Loop, i.ReadOnly = l.number, l.readOnly
		i.Size, i.BlockSize = loopSize(l.number), uint32(sysNumber(l.number, "queue/logical_block_size"))
		i.Mounts, i.Holders = used.users(l.number)
	}
	infos := make([]Info, 0, len(list))
	for _, i := range list {
		infos = append(infos, *i)
	}
	slices.SortFunc(infos, func(a, b Info) int { return strings.Compare(a.Name, b.Name) })
	return infos, nil
}

// Find returns the device of a name.
//
// Errors: ErrNotFound.
func Find(ctx context.Context, name string, k *keeper.Client) (Info, error) {
	list, err := List(ctx, k)
	if err != nil {
		return Info{}, err
	}
	for _, i := range list {
		if i.Name == name || (i.Loop >= 0 && loopMark+i.Name == loopName(name)) {
			i.Name = name
			return i, nil
		}
	}
	return Info{}, fmt.Errorf("%w: %s", ErrNotFound, name)
}

// Remove removes a device whose server is gone: one that waits, and one whose connection
// is broken. What was written to it and not written back is lost.
//
// Errors: ErrNotFound, ErrServed, ErrInUse.
func Remove(ctx context.Context, name string, k *keeper.Client) error {
	i, err := Find(ctx, name, k)
	if err != nil {
		return err
	}
	return remove(ctx, &i, k, true)
}

// remove removes a device; one that waits for its server only if waiting is set.
func remove(ctx context.Context, i *Info, k *keeper.Client, waiting bool) error {
	if i.State == StateServed {
		return fmt.Errorf("%w: %s, process %d", ErrServed, i.Name, i.PID)
	}
	state := i.State
	if state == StateWaiting {
		_, fd, err := k.Take(ctx, i.Name)
		switch {
		case errors.Is(err, keeper.ErrNotFound):
			state = StateUnknown
		case errors.Is(err, keeper.ErrOwned):
			return fmt.Errorf("%w: %w", ErrServed, err)
		case err != nil:
			return err
		default:
			gone := broken(fd)
			_ = unix.Close(fd) // the keeper's stays
			if !gone && !waiting {
				err = fmt.Errorf("%w: %s waits for its server", ErrServed, i.Name)
			} else if i.Loop >= 0 {
				err = busy(i.Loop)
			}
			if err != nil {
				return errors.Join(err, k.Release(ctx, i.Name))
			}
			if err := k.Remove(ctx, i.Name); err != nil { // breaks the connection: nobody waits any more
				return err
			}
		}
	}
	if state == StateUnknown && ((i.File != "" && !dead(i.File)) || (i.File == "" && i.Loop >= 0 && !deadLoop(i.Loop))) {
		return fmt.Errorf("%w: %s", ErrServed, i.Name)
	}
	if i.Loop >= 0 {
		l := loop{number: i.Loop, carried: loopName(i.Name), connection: i.Connection, backing: text(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", i.Loop))}
		if err := detachLoop(ctx, &l); err != nil {
			return err
		}
	}
	if i.File == "" {
		return nil
	}
	return unmountFile(ctx, filepath.Clean(i.File))
}
