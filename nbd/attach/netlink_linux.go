package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The interface of the driver: include/uapi/linux/nbd-netlink.h.
const (
	familyName    = "nbd"
	familyVersion = 1
	groupName     = "nbd_mc_group"

	commandConnect     = 1
	commandDisconnect  = 2
	commandReconfigure = 3
	commandLinkDead    = 4 // from the kernel, to the group
	commandStatus      = 5

	attrIndex       = 1 // u32
	attrSize        = 2 // u64, bytes
	attrBlockSize   = 3 // u64, bytes
	attrTimeout     = 4 // u64, seconds
	attrServerFlags = 5 // u64, the transmission flags
	attrClientFlags = 6 // u64
	attrSockets     = 7 // list of attrSocket
	attrDeadTimeout = 8 // u64, seconds
	attrDevices     = 9 // list of attrDevice
	attrBackend     = 10

	attrSocket          = 1 // nested in attrSockets
	attrSocketFD        = 1 // u32, nested in attrSocket
	attrDevice          = 1 // nested in attrDevices
	attrDeviceIndex     = 1 // u32, nested in attrDevice
	attrDeviceConnected = 2 // u8, nested in attrDevice
)

// family is the driver's generic netlink family, or a fake of it. Any goroutine.
type family interface {
	// execute sends a command. With reply the kernel answers with a message, whose
	// attributes are returned; without, with success or failure only.
	execute(command uint8, attributes []byte, reply bool) ([]byte, error)
	// listen joins the group of notifications.
	listen() (notices, error)
	Close() error
}

// notices are what the driver tells without being asked.
type notices interface {
	// receive waits for the next notice that a connection died, and returns the
	// device's index. With lost, notices were lost: any connection may have died.
	receive() (index Index, lost bool, err error)
	// Close ends a receive that waits.
	Close() error
}

// kernelFamily is the family of this kernel.
type kernelFamily struct {
	conn *genetlink.Conn
	id   atomic.Uint32 // a uint16; another one whenever the driver is loaded
	dial func() (*genetlink.Conn, error)
	sys  string
}

func openFamily(dial func() (*genetlink.Conn, error), sys string) (*kernelFamily, error) {
	conn, f, err := dialFamily(dial, sys)
	if err != nil {
		return nil, err
	}
	k := &kernelFamily{conn: conn, dial: dial, sys: sys}
	k.id.Store(uint32(f.ID))
	return k, nil
}

func dialKernel() (*genetlink.Conn, error) {
	conn, err := genetlink.Dial(nil)
	if err == nil {
		_ = conn.SetOption(netlink.ExtendedAcknowledge, true) // for better messages, where the kernel can (4.12)
	}
	return conn, err
}

func dialFamily(dial func() (*genetlink.Conn, error), sys string) (*genetlink.Conn, genetlink.Family, error) {
	conn, err := dial()
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, genetlink.Family{}, fmt.Errorf("%w: no generic netlink", ErrNoDriver)
	}
	if err != nil {
		return nil, genetlink.Family{}, netlinkError("open", err)
	}
	f, err := findFamily(conn, sys)
	if err != nil {
		_ = conn.Close() // nothing was asked
		return nil, f, err
	}
	return conn, f, nil
}

func findFamily(conn *genetlink.Conn, sys string) (genetlink.Family, error) {
	f, err := conn.GetFamily(familyName)
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(sys, "module/nbd")); err == nil { // loaded, and without the family
			return f, &KernelError{What: "nbd by netlink", Since: "4.12"}
		}
		return f, ErrNoDriver
	}
	if err != nil {
		return f, netlinkError("family", err)
	}
	return f, nil
}

// netlinkError says what an error of the kernel means, and gives its own words.
func netlinkError(what string, err error) error {
	if errors.Is(err, ErrNoDriver) || errors.As(err, new(*KernelError)) {
		return err // says it already
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %s", ErrPermission, what)
	}
	if e := new(netlink.OpError); errors.As(err, &e) && e.Message != "" {
		return fmt.Errorf("attach: %s: the kernel refuses: %s: %w", what, e.Message, e.Err)
	}
	return fmt.Errorf("attach: %s: %w", what, err)
}

func (k *kernelFamily) execute(command uint8, attributes []byte, reply bool) ([]byte, error) {
	flags := netlink.Request
	if !reply {
		// A command with a reply gets none: the acknowledgement would come as a second
		// packet and be taken for the answer to the next command.
		flags |= netlink.Acknowledge
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: familyVersion}, Data: attributes}
	id := k.id.Load()
	replies, err := k.conn.Execute(m, uint16(id), flags)
	if errors.Is(err, unix.ENOENT) { // no family has this id: the driver was unloaded since
		f, findErr := findFamily(k.conn, k.sys)
		if findErr != nil {
			return nil, findErr
		}
		if uint32(f.ID) != id {
			k.id.Store(uint32(f.ID))
			replies, err = k.conn.Execute(m, f.ID, flags)
		}
	}
	if err != nil || !reply {
		return nil, err
	}
	if len(replies) != 1 {
		return nil, fmt.Errorf("%d replies to one command", len(replies))
	}
	return replies[0].Data, nil
}

func (k *kernelFamily) Close() error { return k.conn.Close() }

func (k *kernelFamily) listen() (notices, error) {
	conn, f, err := dialFamily(k.dial, k.sys)
	if err != nil {
		return nil, err
	}
	for _, g := range f.Groups {
		if g.Name != groupName {
			continue
		}
		if err := conn.JoinGroup(g.ID); err != nil {
			_ = conn.Close() // err says more
			return nil, netlinkError("notifications", err)
		}
		return &kernelNotices{conn: conn}, nil
	}
	_ = conn.Close() // of no use
	return nil, &KernelError{What: "nbd notifications", Since: "4.12"}
}

type kernelNotices struct {
	conn *genetlink.Conn

	// Owned by the receiver.
	queue []Index
}

func (n *kernelNotices) receive() (Index, bool, error) {
	for len(n.queue) == 0 {
		messages, _, err := n.conn.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			return 0, true, nil
		}
		if err != nil {
			return 0, false, err
		}
		for _, m := range messages {
			if m.Header.Command != commandLinkDead {
				continue
			}
			index, err := decodeIndex(m.Data)
			if err != nil {
				return 0, true, nil // one we do not understand may be about ours
			}
			n.queue = append(n.queue, index)
		}
	}
	index := n.queue[0]
	n.queue = n.queue[1:]
	return index, false, nil
}

func (n *kernelNotices) Close() error { return n.conn.Close() }

// parameters are what a command carries. Zero fields are left out.
type parameters struct {
	index       *Index
	size        uint64
	blockSize   uint32
	flags       uint64
	deadSeconds uint64
	connect     bool // the timeout is given, as 0: no limit of the driver's own
	backend     string
	sockets     []int
}

func (p *parameters) encode() ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	if p.index != nil {
		e.Uint32(attrIndex, uint32(*p.index))
	}
	if p.size != 0 {
		e.Uint64(attrSize, p.size)
	}
	if p.blockSize != 0 {
		e.Uint64(attrBlockSize, uint64(p.blockSize))
	}
	if p.connect {
		e.Uint64(attrTimeout, 0)
		e.Uint64(attrServerFlags, p.flags)
		e.Uint64(attrClientFlags, 0) // the device stays when its last user closes it
	}
	if p.deadSeconds != 0 {
		e.Uint64(attrDeadTimeout, p.deadSeconds)
	}
	if p.backend != "" {
		e.String(attrBackend, p.backend)
	}
	if len(p.sockets) > 0 {
		e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
			for _, fd := range p.sockets {
				list.Nested(attrSocket, func(item *netlink.AttributeEncoder) error {
					item.Uint32(attrSocketFD, uint32(fd))
					return nil
				})
			}
			return nil
		})
	}
	return e.Encode()
}

func decodeIndex(attributes []byte) (Index, error) {
	d, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		return 0, err
	}
	for d.Next() {
		if d.Type() == attrIndex {
			return Index(d.Uint32()), d.Err()
		}
	}
	if err := d.Err(); err != nil {
		return 0, err
	}
	return 0, errors.New("no index in the kernel's message")
}

// decodeStatus reads the reply to a status command: the devices there are, and
// whether somebody has them.
func decodeStatus(attributes []byte) (map[Index]bool, error) {
	devices := make(map[Index]bool)
	d, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		return nil, err
	}
	for d.Next() {
		if d.Type() != attrDevices {
			continue
		}
		d.Nested(func(list *netlink.AttributeDecoder) error {
			for list.Next() {
				if list.Type() != attrDevice {
					continue
				}
				list.Nested(func(item *netlink.AttributeDecoder) error {
					var index Index
					var seen, connected bool
					for item.Next() {
						switch item.Type() {
						case attrDeviceIndex:
							index, seen = Index(item.Uint32()), true
						case attrDeviceConnected:
							connected = item.Uint8() != 0
						}
					}
					if seen {
						devices[index] = connected
					}
					return item.Err()
				})
			}
			return list.Err()
		})
	}
	return devices, d.Err()
}
