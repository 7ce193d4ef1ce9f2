package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/uring"
	"github.com/ashlar-storage/ashlar/internal/blockdev"
)

const (
	controlPath   = "/dev/ublk-control"
	maxPath       = "/sys/module/ublk_drv/parameters/ublks_max"
	classPath     = "/sys/class/ublk-char"
	controlBuffer = 4096                  // holds a path and the largest structure
	controlSlice  = 20 * time.Millisecond // how often a waiting command looks at its context
	cancelWait    = 5 * time.Second       // for the kernel to end a cancelled command
	retryInterval = 5 * time.Millisecond  // between tries of what another process still holds
	nodeWait      = 2 * time.Second       // for udev to make a node and set its owner
	deleteWait    = 2 * time.Second       // for the id of a deleted device to be free
	quiesceWait   = 2000                  // milliseconds for QUIESCE_DEV
	supportedText = "needs Linux 6.0 and the ublk_drv module: modprobe ublk_drv"
)

// pretendOld takes the driver for one before Linux 6.4. It is for tests, set before
// anything is started.
var pretendOld bool

// control gives commands to the driver. It has a ring of its own, which belongs to
// the thread that opened it; see withControl.
type control struct {
	ring     *uring.Ring
	file     *os.File
	buffer   []byte // of the command's data; the kernel has its address
	features Features
	encoded  bool // commands have the numbers of Linux 6.4
	stuck    bool // a command was given up; the buffer stays mapped for it
}

// withControl runs f with a control ring. The calling goroutine is locked to its
// thread meanwhile. It costs some system calls and is not for the data path.
func withControl(f func(c *control) error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	file, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w (%s)", ErrUnsupported, supportedText)
	case err != nil:
		return fmt.Errorf("ublk: %w (needs root, or udev rules for unprivileged devices)", err)
	}
	defer func() { _ = file.Close() }() // commands have ended
	c := &control{file: file}
	if c.ring, err = uring.Open(uring.Config{Entries: 4, SQE128: true}); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	defer func() { _ = c.ring.Close() }() // as above; what was given up is cancelled
	if !c.ring.Supports(uring.OpURingCmd) {
		return fmt.Errorf("%w: io_uring has no commands of drivers (%s)", ErrUnsupported, supportedText)
	}
	if c.buffer, err = unix.Mmap(-1, 0, controlBuffer, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return fmt.Errorf("ublk: control buffer: %w", err)
	}
	defer func() {
		if !c.stuck {
			_ = unix.Munmap(c.buffer) // a mapping of ours
		}
	}()
	if err := c.probe(); err != nil {
		return err
	}
	return f(c)
}

// probe asks for the driver's features. Drivers before Linux 6.5 do not know the
// question; they take the plain numbers of commands.
func (c *control) probe() error {
	if pretendOld {
		return nil
	}
	var b [8]byte
	err := c.do(context.Background(), &request{number: commandGetFeatures, device: commandDeviceNone, data: b[:], reads: true, always: true})
	switch {
	case err == nil:
		c.features = Features(binary.NativeEndian.Uint64(b[:]))
		c.encoded = true
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return err
	}
	return nil
}

// request is one control command.
type request struct {
	number uint32
	device uint32
	inline uint64 // data[0]
	data   []byte // sent, and received where reads is set
	reads  bool
	path   string // of the char device, for unprivileged ones
	always bool   // encoded whatever the driver
}

// commandError is what the driver answered.
type commandError struct {
	number uint32
	device uint32
	errno  unix.Errno
}

var commandNames = map[uint32]string{
	commandGetDevInfo: "GET_DEV_INFO", commandAddDev: "ADD_DEV", commandDelDev: "DEL_DEV", commandStartDev: "START_DEV",
	commandStopDev: "STOP_DEV", commandSetParams: "SET_PARAMS", commandGetParams: "GET_PARAMS",
	commandStartUserRecovery: "START_USER_RECOVERY", commandEndUserRecovery: "END_USER_RECOVERY",
	commandGetDevInfo2: "GET_DEV_INFO2", commandGetFeatures: "GET_FEATURES", commandUpdateSize: "UPDATE_SIZE",
	commandQuiesceDev: "QUIESCE_DEV",
}

// Error implements error.
func (e *commandError) Error() string {
	on := ""
	if e.device != commandDeviceNone {
		on = fmt.Sprintf(" of device %d", e.device)
	}
	hint := ""
	switch {
	case e.errno == unix.EPERM:
		hint = " (needs CAP_SYS_ADMIN)"
	case e.errno == unix.EINVAL && (e.number == commandStartDev || e.number == commandEndUserRecovery):
		// ublk_drv compares the server's pid with its own idea of it since c2c8089f325e
		// (Linux 6.17), and not yet across namespaces.
		hint = " (a server in a container may have to share the host's pid namespace)"
	}
	return fmt.Sprintf("ublk: %s%s: %s%s", commandNames[e.number], on, e.errno, hint)
}

// Unwrap gives the errno, and the package's own error where there is one.
func (e *commandError) Unwrap() []error {
	switch e.errno {
	case unix.ENODEV:
		return []error{e.errno, ErrNotFound}
	case unix.EEXIST:
		return []error{e.errno, ErrExists}
	case unix.EOPNOTSUPP:
		return []error{e.errno, ErrUnsupported}
	}
	return []error{e.errno}
}

// do gives one command and waits for its end, or for that of ctx: then the command
// is cancelled, which ends those that wait for a server.
func (c *control) do(ctx context.Context, q *request) error {
	at := 0
	if q.path != "" {
		at = copy(c.buffer, q.path) + 1
		c.buffer[at-1] = 0
	}
	length := at + copy(c.buffer[at:], q.data)
	command := controlCommand{device: q.device, data: q.inline, pathLength: uint16(at)}
	if length > 0 {
		command.address, command.length = uring.Address(c.buffer), uint16(length)
	}
	s := c.ring.SQE()
	s.Opcode = uring.OpURingCmd
	s.FD = int32(c.file.Fd())
	s.Offset = uint64(controlNumber(q.number, c.encoded || q.always))
	s.UserData = uint64(q.number)
	command.encode(c.ring.Command(s))
	var deadline time.Time // set when cancelled
	for {
		if err := c.ring.Enter(1, int64(controlSlice)); err != nil {
			return fmt.Errorf("ublk: %s: %w", commandNames[q.number], err)
		}
		for e := c.ring.Peek(); e != nil; e = c.ring.Peek() {
			done := *e
			c.ring.Seen()
			if done.UserData != uint64(q.number) {
				continue // the cancellation's own end
			}
			if done.Result < 0 {
				if !deadline.IsZero() {
					return fmt.Errorf("ublk: %s of device %d: %w", commandNames[q.number], q.device, ctx.Err())
				}
				return &commandError{number: q.number, device: q.device, errno: unix.Errno(-done.Result)}
			}
			if q.reads {
				copy(q.data, c.buffer[at:])
			}
			return nil
		}
		switch {
		case ctx.Err() != nil && deadline.IsZero():
			deadline = time.Now().Add(cancelWait)
			s := c.ring.SQE()
			s.Opcode = uring.OpAsyncCancel
			s.Addr = uint64(q.number)
		case !deadline.IsZero() && time.Now().After(deadline):
			c.stuck = true
			return fmt.Errorf("ublk: %s of device %d does not end: %w", commandNames[q.number], q.device, ctx.Err())
		}
	}
}

// info asks for a device. Where plain GET_DEV_INFO is refused, the device may be an
// unprivileged one of ours.
func (c *control) info(ctx context.Context, id int) (devInfo, error) {
	var b [devInfoSize]byte
	var d devInfo
	err := c.do(ctx, &request{number: commandGetDevInfo, device: uint32(id), data: b[:], reads: true})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		err = c.do(ctx, &request{number: commandGetDevInfo2, device: uint32(id), data: b[:], reads: true, path: charPath(id)})
	}
	if err == nil {
		d.decode(b[:])
	}
	return d, err
}

// path is what commands to a device carry: nothing, or its node when it is an
// unprivileged one.
func (d *devInfo) path() string {
	if d.features.Has(FeatureUnprivileged) {
		return charPath(int(d.device))
	}
	return ""
}

func (c *control) params(ctx context.Context, d *devInfo) (p params, err error) {
	var b [paramsSize]byte
	p.encode(b[:]) // the driver reads the length
	if err = c.do(ctx, &request{number: commandGetParams, device: d.device, data: b[:], reads: true, path: d.path()}); err == nil {
		p.decode(b[:])
	}
	return p, err
}

func (c *control) simple(ctx context.Context, number uint32, d *devInfo, inline uint64) error {
	return c.do(ctx, &request{number: number, device: d.device, inline: inline, path: d.path()})
}

// Supported reports why this system cannot have ublk devices, or nil.
//
// Errors: ErrUnsupported, *KernelError, or of permission.
func Supported() error {
	if err := runningKernel(); err != nil {
		return err
	}
	return withControl(func(*control) error { return nil })
}

// runningKernel says when the kernel is known to break.
func runningKernel() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("ublk: uname: %w", err)
	}
	return checkKernel(unix.ByteSliceToString(u.Release[:]))
}

// DriverFeatures are what the running driver can do.
func DriverFeatures() (f Features, err error) {
	err = withControl(func(c *control) error {
		f = c.features
		return nil
	})
	return f, err
}

// ZeroCopySupported reports why the running driver makes this package copy every byte, or
// nil. Whether those of a device are copied says Target.Copies.
func ZeroCopySupported() error {
	f, err := DriverFeatures()
	if err == nil && !f.Has(zeroCopyFeatures) {
		err = errCopyingDriver
	}
	return err
}

// DevicesMax is the driver's parameter ublks_max: how many devices it makes, or only how
// many unprivileged ones (since Linux 6.15, and in stable releases before).
func DevicesMax() (int, error) {
	b, err := os.ReadFile(maxPath)
	if err != nil {
		return 0, fmt.Errorf("ublk: %w", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("ublk: %s: %w", maxPath, err)
	}
	return n, nil
}

// ids are the devices the kernel has.
func ids() ([]int, error) {
	names, err := filepath.Glob(classPath + "/ublkc*")
	if _, statErr := os.Stat(classPath); statErr != nil || err != nil {
		names, err = filepath.Glob("/dev/ublkc*") // no sysfs here
	}
	if err != nil {
		return nil, fmt.Errorf("ublk: %w", err)
	}
	var list []int
	for _, name := range names {
		if id, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(name), "ublkc")); err == nil {
			list = append(list, id)
		}
	}
	slices.Sort(list)
	return list, nil
}

// List returns every ublk device of the system, by id. Those of others are among them.
func List(ctx context.Context) (list []Info, err error) {
	err = withControl(func(c *control) error {
		known, err := ids()
		if err != nil {
			return err
		}
		for _, id := range known {
			i, err := c.look(ctx, id)
			switch {
			case errors.Is(err, ErrNotFound), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
				continue // gone meanwhile, or another user's
			case err != nil:
				return err
			}
			list = append(list, i)
		}
		return nil
	})
	return list, err
}

// Find returns one device.
func Find(ctx context.Context, id int) (i Info, err error) {
	err = withControl(func(c *control) error {
		i, err = c.look(ctx, id)
		return err
	})
	return i, err
}

func (c *control) look(ctx context.Context, id int) (Info, error) {
	d, err := c.info(ctx, id)
	if err != nil {
		return Info{}, err
	}
	i := infoOf(&d)
	if p, err := c.params(ctx, &d); err == nil { // fails before they are set
		i.Size = p.size << sectorShift
		i.ReadOnly = p.attributes&attributeReadOnly != 0
	}
	return i, nil
}

// inUse says what holds a block device, as an ErrInUse. A disk without a server is
// not opened: that may wait for the server.
func inUse(id int, served bool) error {
	by := ""
	if served {
		f, err := os.OpenFile(blockPath(id), os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			_ = f.Close() // read-only
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil // no such disk, or a dead one: nobody's
		}
		by = "opened for itself by another program"
	}
	// Unreadable: the use goes unnamed.
	if mounts, holders, err := blockdev.Kernel().Users(filepath.Base(blockPath(id))); err == nil && len(mounts)+len(holders) > 0 {
		by = blockdev.Used(mounts, holders)
	}
	if by == "" {
		return nil
	}
	return fmt.Errorf("%w: %s is %s", ErrInUse, blockPath(id), by)
}

// Remove removes a device whose server is gone.
//
// Errors: ErrNotFound, ErrServed, ErrInUse.
func Remove(ctx context.Context, id int) error { return remove(ctx, id, false) }

// RemoveInUse removes a device whose server is gone even from under a mount. What
// waits for it fails, so that it can be unmounted.
//
// Errors: ErrNotFound, ErrServed.
func RemoveInUse(ctx context.Context, id int) error { return remove(ctx, id, true) }

func remove(ctx context.Context, id int, used bool) error {
	return withControl(func(c *control) error {
		d, err := c.info(ctx, id)
		if err != nil {
			return err
		}
		if d.state == StateLive {
			return fmt.Errorf("%w: %s, process %d", ErrServed, blockPath(id), d.pid)
		}
		if err := inUse(id, false); err != nil && !used {
			return err
		}
		if err := c.simple(ctx, commandStopDev, &d, 0); err != nil {
			return err
		}
		return c.delete(ctx, &d)
	})
}

// delete removes a stopped device. DEL_DEV takes it out of the system at once and then
// waits for its id to be free, which programs that have the disk open put off as long
// as they like; their I/O fails since STOP_DEV. That is not waited for.
func (c *control) delete(ctx context.Context, d *devInfo) error {
	inner, cancel := context.WithTimeout(ctx, deleteWait)
	defer cancel()
	err := c.simple(inner, commandDelDev, d, 0)
	if errors.Is(err, ErrNotFound) || (err != nil && inner.Err() != nil && ctx.Err() == nil) {
		return nil
	}
	return err
}
