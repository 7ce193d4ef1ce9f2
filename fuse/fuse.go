package fuse

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
)

// The conditions callers act on.
var (
	// ErrUnsupported says that the system has no usable FUSE or loop devices; wrapped
	// with why.
	ErrUnsupported = errors.New("fuse: not supported")
	// ErrNotFound says that no device has that name, or, from Recover, that the keeper
	// holds none.
	ErrNotFound = errors.New("fuse: no such device")
	// ErrExists says that the name is exported already.
	ErrExists = errors.New("fuse: the device exists")
	// ErrInUse says that a device is mounted or held; wrapped with by what.
	ErrInUse = errors.New("fuse: the device is in use")
	// ErrServed says that a device's server lives.
	ErrServed = errors.New("fuse: another process serves the device")
	// ErrDead says that the kernel has broken a device's connection: every request of
	// it fails, and only Remove helps.
	ErrDead = errors.New("fuse: the device's connection is broken")
	// ErrNoResend says that the kernel cannot send requests again to another process.
	ErrNoResend = errors.New("fuse: no recovery (needs Linux 6.9)")
	// ErrMismatch says that a store cannot go on with a device.
	ErrMismatch = errors.New("fuse: the device does not match the store")
)

// AnyLoop asks for the first free loop device.
const AnyLoop = -1

const (
	depthDefault = 128 // the loop driver has 128 requests in flight at most
	depthMax     = 1 << 12
	queuesMax    = 64
	nameMax      = 1 << 10

	ioMaxDefault = 256 << 10 // longer requests come in parts, several at once
	ioMaxLimit   = 1 << 20   // what FUSE allows (fs.fuse.max_pages_limit)
	ioMaxLeast   = 4096      // the kernel takes no less

	blockDefault = datapath.BlockSize
	blockMin     = 512
)

// Config says what to export and how. Device, Reactors, Dir and Name are required.
type Config struct {
	Device   datapath.Device // closed by whoever opened it, after Stop or Detach
	Reactors []*reactor.Reactor

	// Name identifies the device: up to 1024 bytes without control characters. It is
	// the source of the mount, and List and Find tell it.
	Name string
	// Dir is where the file of the device is, made when missing. It belongs to Ashlar;
	// for devices that are to be found after a reboot it need not survive one.
	Dir string
	// Keeper holds the connection when this process dies. Without, requests fail then.
	Keeper *keeper.Client

	Loop      int    // of /dev/loopN; AnyLoop for the first free one
	Queues    int    // reactors that serve, those of Reactors with the fewest devices; 1 when 0
	Depth     int    // requests in flight, over all queues; 128 when 0
	IOMax     int    // bytes of the longest read or write; 256 KiB when 0, less where the device wants less
	BlockSize uint32 // logical block of the loop device in bytes: 512 to 4096; 4096 when 0
	ReadOnly  bool
}

// State says who serves a device.
type State uint8

// The states.
const (
	// StateUnknown is a device that the keeper does not hold: its server may live, or
	// be dead and the connection with it.
	StateUnknown State = iota
	// StateServed is one with a process that serves it.
	StateServed
	// StateWaiting is one whose server is gone. Requests wait for Recover.
	StateWaiting
)

// String names the state.
func (s State) String() string {
	switch s {
	case StateServed:
		return "served"
	case StateWaiting:
		return "waiting"
	}
	return "unknown"
}

// Info is a device as the kernel, and the keeper, list it.
type Info struct {
	Name       string
	Loop       int    // of /dev/loopN; -1 when there is none
	File       string // the mount, which is a file; "" when this mount namespace does not have it
	Connection uint32 // of /sys/fs/fuse/connections
	State      State
	PID        int    // of the server, with StateServed
	Size       uint64 // bytes of the loop device
	BlockSize  uint32 // bytes
	ReadOnly   bool
	Mounts     []string // where it is mounted in this mount namespace, "swap" too
	Holders    []string // devices made of it
}

// Path is the block device's node; "" when there is none.
func (i *Info) Path() string {
	if i.Loop < 0 {
		return ""
	}
	return loopPath(i.Loop)
}

func loopPath(loop int) string { return fmt.Sprintf("/dev/loop%d", loop) }

// Stats is what a target has done.
type Stats struct {
	Requests [datapath.OpCount]uint64 // completed, by operation
	Read     uint64                   // bytes
	Written  uint64                   // bytes
	Errors   uint64                   // requests answered with an error
	Control  uint64                   // requests about the file itself
	InFlight int                      // requests at the device
	Gone     bool                     // the kernel has broken the connection: the device is dead
}

// check completes c and says what is wrong with it.
func (c *Config) check() error {
	switch {
	case c.Device == nil || len(c.Reactors) == 0:
		return errors.New("fuse: a device and at least one reactor are needed")
	case c.Name == "" || len(c.Name) > nameMax || strings.ContainsFunc(c.Name, control):
		return fmt.Errorf("fuse: name %.40q: 1 to %d bytes without control characters are needed", c.Name, nameMax)
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("fuse: directory %q: an absolute path is needed", c.Dir)
	case c.Loop < AnyLoop || c.Loop >= loopsMax:
		return fmt.Errorf("fuse: loop device %d: must be below %d", c.Loop, loopsMax)
	case c.Queues < 0 || c.Queues > queuesMax || c.Queues > len(c.Reactors):
		return fmt.Errorf("fuse: %d queues: at most one for each reactor, of which there are %d, and at most %d", c.Queues, len(c.Reactors), queuesMax)
	case c.Depth < 0 || c.Depth > depthMax:
		return fmt.Errorf("fuse: depth %d: at most %d", c.Depth, depthMax)
	case c.IOMax != 0 && (c.IOMax < ioMaxLeast || c.IOMax > ioMaxLimit):
		return fmt.Errorf("fuse: largest I/O of %d bytes: must be %d to %d", c.IOMax, ioMaxLeast, ioMaxLimit)
	case c.BlockSize != 0 && (c.BlockSize < blockMin || c.BlockSize > blockDefault || c.BlockSize&(c.BlockSize-1) != 0):
		return fmt.Errorf("fuse: blocks of %d bytes (want 512, 1024, 2048 or 4096)", c.BlockSize)
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Depth == 0 {
		c.Depth = depthDefault
	}
	c.Depth = max(c.Depth, c.Queues)
	if c.IOMax == 0 {
		c.IOMax = ioMaxDefault
	}
	if c.BlockSize == 0 {
		c.BlockSize = blockDefault
	}
	info := c.Device.Info()
	if info.MinIO > c.BlockSize {
		return fmt.Errorf("fuse: blocks of %d bytes on a device whose smallest I/O is %d", c.BlockSize, info.MinIO)
	}
	if info.Size < uint64(c.BlockSize) {
		return fmt.Errorf("fuse: a device of %d bytes, less than one block", info.Size)
	}
	if info.MaxIO != 0 && info.MaxIO < ioMaxLeast {
		return fmt.Errorf("fuse: a device whose largest I/O is %d bytes: the kernel sends %d", info.MaxIO, ioMaxLeast)
	}
	if info.MaxIO != 0 {
		c.IOMax = min(c.IOMax, int(info.MaxIO))
	}
	c.IOMax &^= ioMaxLeast - 1
	return nil
}

const loopsMax = 1 << 20 // minor numbers of a driver

func control(r rune) bool { return r < ' ' || r == 0x7f }

// info is the device as it is exported: whole blocks.
func (c *Config) info(block uint32) datapath.Info {
	i := c.Device.Info()
	i.Size &^= uint64(block - 1)
	i.ReadOnly = i.ReadOnly || c.ReadOnly
	return i
}

// fileName is the name of a device's file in Config.Dir: the device's own, as far as
// that is a name of a file. It is for people; what a device is called says its mount.
func fileName(name string) string {
	const most = 200 // of 255 bytes
	var b strings.Builder
	for i := range len(name) {
		switch c := name[i]; {
		case c == '%' || c == '/' || c <= ' ' || c >= 0x7f || c == '\\' || (c == '.' && i == 0):
			fmt.Fprintf(&b, "%%%02x", c)
		default:
			b.WriteByte(c)
		}
	}
	if b.Len() <= most {
		return b.String()
	}
	return b.String()[:most-17] + "~" + hash(name)
}
