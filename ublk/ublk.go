package ublk

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// The conditions callers act on.
var (
	// ErrUnsupported says that the system has no usable ublk; wrapped with why.
	ErrUnsupported = errors.New("ublk: not supported")
	// ErrNotFound says that the kernel has no device of that id.
	ErrNotFound = errors.New("ublk: no such device")
	// ErrExists says that the id is taken.
	ErrExists = errors.New("ublk: the device exists")
	// ErrInUse says that a device is mounted or held; wrapped with by what.
	ErrInUse = errors.New("ublk: the device is in use")
	// ErrServed says that a device's server lives.
	ErrServed = errors.New("ublk: another process serves the device")
	// ErrNotOurs says that a device was not made by Ashlar.
	ErrNotOurs = errors.New("ublk: not a device of Ashlar")
	// ErrNoResize says that the kernel cannot change the size of a device in use.
	ErrNoResize = errors.New("ublk: no change of size in use (needs Linux 6.16)")
)

// AnyID asks for the first free id.
const AnyID = -1

const (
	depthDefault = 128 // what fio and file systems keep in flight on one queue, and some
	queuesMax    = 64
)

// Config says what to export and how.
type Config struct {
	Device   datapath.Device // closed by whoever opened it, after Stop or Detach
	Reactors []*reactor.Reactor

	ID     int // of /dev/ublkbID; AnyID for the first free one
	Queues int // hardware queues; one per reactor when 0. The kernel makes at most one per CPU
	Depth  int // requests in flight per queue; 128 when 0
	IOMax  int // bytes of the longest read or write; 512 KiB when 0, less where the device wants less
	Tag    Tag // whose device this is; List shows it, Recover checks it

	ReadOnly bool
	// Unprivileged makes a device that its owner can serve without CAP_SYS_ADMIN, where
	// udev gives them /dev/ublk-control. The kernel recovers no such device.
	Unprivileged bool
	// PlainBuffers does without user copy where the kernel has it.
	PlainBuffers bool
	// Copy has the bytes pass through this process even where they need not.
	Copy bool
}

// Tag says whose device a device is. The kernel keeps it, so that a restarted process
// finds its devices; 48 bits.
type Tag uint64

const (
	tagBits = 48
	// tagMark is in the upper 16 bits of what the kernel keeps: the device is of Ashlar.
	tagMark = 0xa51a << tagBits
)

// TagOf is the tag of a volume's name.
func TagOf(name string) Tag {
	sum := sha256.Sum256([]byte(name))
	return Tag(binary.BigEndian.Uint64(sum[:]) >> (64 - tagBits))
}

// Info is a device as the kernel lists it.
type Info struct {
	ID       int
	State    State
	Queues   int
	Depth    int
	PID      int // of its server, which may be dead; -1 for none
	Features Features
	Ours     bool // made by Ashlar
	Tag      Tag  // where Ours
	UID, GID int
	Size     uint64 // bytes
	ReadOnly bool
}

// Path is the device's node.
func (i *Info) Path() string { return blockPath(i.ID) }

func blockPath(id int) string { return fmt.Sprintf("/dev/ublkb%d", id) }
func charPath(id int) string  { return fmt.Sprintf("/dev/ublkc%d", id) }

func infoOf(d *devInfo) Info {
	i := Info{
		ID: int(d.device), State: d.state, Queues: int(d.queues), Depth: int(d.depth), PID: int(d.pid),
		Features: d.features, UID: int(d.uid), GID: int(d.gid),
	}
	if i.Ours = d.tag&^(1<<tagBits-1) == tagMark; i.Ours {
		i.Tag = Tag(d.tag & (1<<tagBits - 1))
	}
	return i
}

// check completes c and says what is wrong with it.
func (c *Config) check() error {
	switch {
	case c.Device == nil || len(c.Reactors) == 0:
		return errors.New("ublk: a device and at least one reactor are needed")
	case c.ID < AnyID || c.ID >= devicesMax:
		return fmt.Errorf("ublk: id %d: must be below %d", c.ID, devicesMax)
	case c.Queues < 0 || c.Queues > queuesMax:
		return fmt.Errorf("ublk: %d queues: at most %d", c.Queues, queuesMax)
	case c.Depth < 0 || c.Depth > queueDepthMax:
		return fmt.Errorf("ublk: depth %d: at most %d", c.Depth, queueDepthMax)
	case c.IOMax < 0:
		return fmt.Errorf("ublk: largest I/O of %d bytes", c.IOMax)
	case c.Tag >= 1<<tagBits:
		return fmt.Errorf("ublk: tag %#x: at most %d bits", uint64(c.Tag), tagBits)
	}
	if c.Queues == 0 {
		c.Queues = len(c.Reactors)
	}
	if c.Depth == 0 {
		c.Depth = depthDefault
	}
	for _, r := range c.Reactors {
		if !r.Commands() {
			return fmt.Errorf("%w: reactor %s runs on %s (needs io_uring of Linux 5.19)", ErrUnsupported, r.Name(), r.Describe())
		}
	}
	return nil
}

// info is the device as it is exported.
func (c *Config) info() datapath.Info {
	i := c.Device.Info()
	i.ReadOnly = i.ReadOnly || c.ReadOnly
	return i
}
