package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"strings"
	"syscall"
	"time"
)

// Index is the number of an nbd device: 5 is /dev/nbd5.
type Index uint32

// String is the device's name in /sys/block.
func (i Index) String() string { return fmt.Sprintf("nbd%d", uint32(i)) }

// Dialer opens one more connection to the server, before any handshake. It is a
// unix socket, always: a TCP socket of the kernel needs memory to write pages out
// for want of memory, and has timeouts of its own.
type Dialer func(ctx context.Context) (*net.UnixConn, error)

// Unix is the Dialer of a socket's path.
func Unix(path string) Dialer {
	return func(ctx context.Context) (*net.UnixConn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return nil, err
		}
		return conn.(*net.UnixConn), nil
	}
}

// Defaults and bounds of Config.
const (
	connectionsDefault = 4  // one a CPU that does I/O is all the driver uses; four saturate a reactor
	connectionsMax     = 64 // one netlink message holds them, with room
	backendMax         = 4096

	deadDefault      = 5 * time.Minute  // longer than a restart with recovery; the operator's limit, see DESIGN.md §1.2
	handshakeDefault = 10 * time.Second // of one connection to a daemon on this host

	// A request whose connection died is sent again when its own timer runs out, and
	// not before, however soon there are new connections (drivers/block/nbd.c,
	// nbd_xmit_timeout). With one connection the timer spares a server that is only
	// slow. With several it does not: it cuts the connection and sends the request
	// again on another, so it has to be beyond what a slow server needs.
	retryAlone  = time.Second
	retryAmong  = 10 * time.Second
	blockMin    = 512
	blockMax    = 4096 // the driver takes up to the page size, which is 4096 everywhere
	timeoutUnit = time.Second
)

// Never, as a DeadTimeout, has I/O wait without end: 292 years. The driver takes 0 for no
// wait at all.
const Never time.Duration = math.MaxInt64

// Config says what to attach and how. Dial is required.
type Config struct {
	Dial    Dialer
	Export  string // the export's name at the server
	Backend string // names the volume in the kernel's own list; Export, if empty

	Index            *Index        // of the device; nil for one the kernel chooses
	Connections      int           // 0 means 4; one, where the server does not allow several
	BlockSize        uint32        // bytes: 512, 1024, 2048 or 4096; 0 for the smallest the server takes
	ReadOnly         bool          // refuse writes even where the server takes them
	DeadTimeout      time.Duration // I/O without any connection fails after this; 0 means 5 min, Never without end; whole seconds
	RetryAfter       time.Duration // resend a request unanswered for this long; 0: 1 s with one connection, 10 s with several
	HandshakeTimeout time.Duration // of one connection; 0 means 10 s
}

func (c *Config) setDefaults() error {
	if c.Dial == nil {
		return errors.New("attach: no Dial")
	}
	if c.Backend == "" {
		c.Backend = c.Export
	}
	if len(c.Backend) > backendMax || strings.ContainsAny(c.Backend, "\x00\n") {
		return fmt.Errorf("attach: backend %.40q (at most %d bytes, no line break)", c.Backend, backendMax)
	}
	if c.Connections == 0 {
		c.Connections = connectionsDefault
	}
	if c.Connections < 0 || c.Connections > connectionsMax {
		return fmt.Errorf("attach: %d connections (want 1 to %d)", c.Connections, connectionsMax)
	}
	if b := c.BlockSize; b != 0 && (b < blockMin || b > blockMax || b&(b-1) != 0) {
		return fmt.Errorf("attach: blocks of %d bytes (want 512, 1024, 2048 or 4096)", b)
	}
	if c.DeadTimeout == 0 {
		c.DeadTimeout = deadDefault
	}
	if c.DeadTimeout < timeoutUnit || c.RetryAfter < 0 {
		return fmt.Errorf("attach: dead timeout %v, retry after %v (want at least 1 s, and none below 0)", c.DeadTimeout, c.RetryAfter)
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = handshakeDefault
	}
	return nil
}

// Device is an attached device as the kernel describes it.
type Device struct {
	Index     Index
	Path      string // of the device node
	Backend   string // what Config.Backend was; "" before Linux 5.14 and for devices of others
	PID       int    // of the process that attached it, as the host numbers it; it may be gone
	Size      uint64 // bytes
	BlockSize uint32 // bytes
	ReadOnly  bool
	Cached    bool // the server has a cache that is flushed when asked
	FUA       bool // single writes can be made durable
	Discard   bool // discards reach the server
	Zeroes    bool // so do writes of zeroes without data (Linux 6.12)
	InFlight  int  // requests the server has not answered

	Mounts  []string // where its file systems are mounted, in our mount namespace; "swap" too
	Holders []string // devices made of it: device mapper, RAID
}

// Options are of a Driver.
type Options struct {
	Log *slog.Logger // nil means slog.Default()
}

// DisconnectOptions say how a device is detached.
type DisconnectOptions struct {
	// Force detaches without writing back what programs wrote to the device node
	// and did not sync, for a device whose server does not answer. One that is
	// mounted is refused all the same.
	Force bool
}

// Errors of the driver.
var (
	// ErrNoDriver is a kernel without the nbd driver.
	ErrNoDriver = errors.New("attach: the kernel has no nbd driver loaded (run: modprobe nbd)")
	// ErrPermission is a lack of privilege.
	ErrPermission = errors.New("attach: not permitted (needs CAP_SYS_ADMIN in the initial user namespace)")
	// ErrNotAttached is a device without a server.
	ErrNotAttached = errors.New("attach: not attached")
	// ErrServer is a server that cannot be reached, or that refuses.
	ErrServer = errors.New("attach: the server is gone or refuses")
	// ErrMismatch is a server that does not have what the device had.
	ErrMismatch = errors.New("attach: the export is not what is attached")
)

// InUseError refuses an index that somebody has.
type InUseError struct{ Index Index }

// Error implements error.
func (e *InUseError) Error() string {
	return fmt.Sprintf("attach: %v is in use (attached, or open in a program)", e.Index)
}

// Unwrap makes errors.Is(err, syscall.EBUSY) work.
func (e *InUseError) Unwrap() error { return syscall.EBUSY }

// AttachedError refuses to attach a volume twice.
type AttachedError struct{ Device Device }

// Error implements error.
func (e *AttachedError) Error() string {
	return fmt.Sprintf("attach: %s is attached already, as %s", e.Device.Backend, e.Device.Path)
}

// BusyError refuses to detach a device that is used.
type BusyError struct{ Device Device }

// Error implements error.
func (e *BusyError) Error() string {
	s := "attach: " + e.Device.Path
	switch d := e.Device; {
	case len(d.Mounts) > 0:
		return s + " is mounted on " + strings.Join(d.Mounts, ", ")
	case len(d.Holders) > 0:
		return s + " is in use by " + strings.Join(d.Holders, ", ")
	}
	return s + " is in use by a program, or mounted in another namespace"
}

// Unwrap makes errors.Is(err, syscall.EBUSY) work.
func (e *BusyError) Unwrap() error { return syscall.EBUSY }

// StaleNodeError is a device node that does not lead to the device.
type StaleNodeError struct {
	Path       string
	Have, Want string // "major:minor", or what else is there
}

// Error implements error.
func (e *StaleNodeError) Error() string {
	return fmt.Sprintf("attach: %s is %s and should be block device %s (remove it and run: mknod %[1]s b %[4]s)",
		e.Path, e.Have, e.Want, strings.Replace(e.Want, ":", " ", 1))
}

// KernelError is a feature that the kernel lacks.
type KernelError struct{ What, Since string }

// Error implements error.
func (e *KernelError) Error() string {
	return fmt.Sprintf("attach: %s: not supported by this kernel (needs Linux %s)", e.What, e.Since)
}

// Unwrap makes errors.Is(err, errors.ErrUnsupported) work.
func (e *KernelError) Unwrap() error { return errors.ErrUnsupported }
