package attach

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd"
)

// fakeServer is an NBD server as far as the handshake, whose export may change.
type fakeServer struct {
	t       *testing.T
	address string

	mu sync.Mutex
	// Guarded by mu.
	listener net.Listener
	size     uint64
	flags    nbd.TransmissionFlags
	block    uint32            // 0: does not say
	unknown  bool              // there is no such export
	changing bool              // a larger one on each connection
	conns    map[net.Conn]bool // in transmission
	accepted int

	running sync.WaitGroup
}

const fakeFlags = nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagSendCache |
	nbd.FlagSendFastZero | nbd.FlagCanMultiConn

func newFakeServer(t *testing.T) *fakeServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "attach-*") // t.TempDir may be too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	s := &fakeServer{t: t, address: filepath.Join(dir, "s"), size: 64 << 20, flags: fakeFlags, conns: make(map[net.Conn]bool)}
	s.start()
	t.Cleanup(func() {
		s.stop()
		_ = os.RemoveAll(dir) // temporary
	})
	return s
}

func (s *fakeServer) start() {
	s.t.Helper()
	l, err := net.Listen("unix", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	s.listener = l
	s.mu.Unlock()
	s.running.Go(func() { // ends when the listener is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.running.Go(func() { s.serve(conn) }) // ends when either side closes
		}
	})
}

// stop ends the server and its connections.
func (s *fakeServer) stop() {
	s.mu.Lock()
	_ = s.listener.Close() // may be closed
	for conn := range s.conns {
		_ = conn.Close() // may be closed
	}
	s.mu.Unlock()
	s.running.Wait()
}

// alter changes the export under the lock.
func (s *fakeServer) alter(f func(*fakeServer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *fakeServer) serve(conn net.Conn) {
	s.mu.Lock()
	s.accepted++
	s.conns[conn] = true
	s.mu.Unlock()
	defer func() {
		_ = conn.Close() // may be closed
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	if err := s.handshake(conn); err == nil {
		_, _ = io.Copy(io.Discard, conn) // until the other side closes
	}
}

func (s *fakeServer) handshake(conn net.Conn) error {
	const option = 0x49484156454f5054
	be := binary.BigEndian
	b := be.AppendUint64(nil, 0x4e42444d41474943)
	b = be.AppendUint64(b, option)
	if _, err := conn.Write(be.AppendUint16(b, 3)); err != nil {
		return err
	}
	header := make([]byte, 16)
	if _, err := io.ReadFull(conn, header[:4]); err != nil {
		return err
	}
	reply := func(opt, kind uint32, data []byte) error {
		b := be.AppendUint64(nil, 0x3e889045565a9)
		b = be.AppendUint32(be.AppendUint32(be.AppendUint32(b, opt), kind), uint32(len(data)))
		_, err := conn.Write(append(b, data...))
		return err
	}
	for {
		if _, err := io.ReadFull(conn, header); err != nil {
			return err
		}
		opt := be.Uint32(header[8:])
		if _, err := io.CopyN(io.Discard, conn, int64(be.Uint32(header[12:]))); err != nil {
			return err
		}
		s.mu.Lock()
		size, flags, block, unknown := s.size, s.flags, s.block, s.unknown
		if s.changing {
			s.size += 1 << 20
		}
		s.mu.Unlock()
		switch {
		case opt != 7: // GO
			if err := reply(opt, 1<<31+1, nil); err != nil {
				return err
			}
			continue
		case unknown:
			if err := reply(opt, 1<<31+6, nil); err != nil {
				return err
			}
			continue
		}
		info := be.AppendUint16(be.AppendUint64(be.AppendUint16(nil, 0), size), uint16(flags))
		if err := reply(opt, 3, info); err != nil {
			return err
		}
		if block != 0 {
			info := be.AppendUint32(be.AppendUint32(be.AppendUint32(be.AppendUint16(nil, 3), block), max(block, 4096)), 1<<20)
			if err := reply(opt, 3, info); err != nil {
				return err
			}
		}
		return reply(opt, 1, nil)
	}
}

// live is how many connections are open.
func (s *fakeServer) live() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// fakeKernel is the driver: it has the devices, their sockets, and sysfs.
type fakeKernel struct {
	t    *testing.T
	root string

	mu sync.Mutex
	// Guarded by mu.
	devices   map[Index]*fakeDevice
	fail      map[uint8][]error // of the next commands of a kind
	requests  []fakeRequest
	listeners map[*fakeNotices]bool
	claims    error              // of opening a device
	syncs     chan struct{}      // Sync waits for it, if not nil
	held      bool               // a program has the device open: it stays after a disconnect
	old       bool               // no backend identifier
	silent    bool               // no group of notices
	taken     func(inode uint64) // told of each socket that replaces one; may be nil
}

type fakeDevice struct {
	open      bool // by a program
	connected bool
	backend   string
	sockets   []int // duplicates, as the kernel has references; -1 is dead
}

// fakeRequest is a command as the kernel decodes it.
type fakeRequest struct {
	command            uint8
	index              *Index
	size, blockSize    uint64
	timeout            *uint64
	flags, clientFlags uint64
	deadTimeout        uint64
	backend            string
	sockets            []int
}

func newFakeKernel(t *testing.T) (*fakeKernel, *Driver) {
	t.Helper()
	testenv.CheckFDs(t)
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	k := &fakeKernel{t: t, root: t.TempDir(), devices: make(map[Index]*fakeDevice), fail: make(map[uint8][]error), listeners: make(map[*fakeNotices]bool)}
	for index := range Index(4) {
		k.add(index)
	}
	k.file("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
	k.file("proc/swaps", "Filename Type Size Used Priority\n")
	t.Cleanup(func() {
		for index := range k.devices {
			k.drop(index)
		}
	})
	d := newDriver(k, host{sys: k.path("sys"), dev: "/dev", proc: k.path("proc"), node: k.node, claim: k.claim},
		Options{Log: slog.New(slog.DiscardHandler)})
	d.pace = pace{first: time.Millisecond, most: 4 * time.Millisecond, look: 10 * time.Millisecond, busy: time.Millisecond, busyTries: 3}
	return k, d
}

func (k *fakeKernel) path(name string) string { return filepath.Join(k.root, name) }

func (k *fakeKernel) file(name, content string) {
	k.t.Helper()
	path := k.path(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		k.t.Error(err)
	}
}

// sysfs writes a file of a device.
func (k *fakeKernel) sysfs(index Index, name, content string) {
	k.t.Helper()
	k.file(filepath.Join("sys/block", index.String(), name), content+"\n")
}

func (k *fakeKernel) add(index Index) *fakeDevice {
	d := &fakeDevice{}
	k.devices[index] = d
	k.sysfs(index, "dev", fmt.Sprintf("43:%d", index*32))
	k.sysfs(index, "size", "0")
	return d
}

// drop removes a device's connections, as a disconnect does.
func (k *fakeKernel) drop(index Index) {
	d := k.devices[index]
	for _, fd := range d.sockets {
		if fd >= 0 {
			_ = unix.Close(fd) // ours
		}
	}
	d.sockets, d.connected, d.backend = nil, false, ""
	if !k.held {
		k.release(index)
	}
}

func (k *fakeKernel) release(index Index) {
	for _, name := range []string{"pid", "backend"} {
		_ = os.Remove(k.path(filepath.Join("sys/block", index.String(), name))) // may not be there
	}
}

func (k *fakeKernel) node(path string) (string, error) {
	name := filepath.Base(path)
	if b, err := os.ReadFile(k.path("nodes/" + name)); err == nil {
		return string(b), nil
	}
	if _, err := os.Stat(k.path("nodes")); err == nil {
		return "", os.ErrNotExist
	}
	return text(k.path("sys/block/" + name + "/dev")), nil
}

type fakeClaim struct {
	k      *fakeKernel
	closed bool
}

func (k *fakeKernel) claim(string) (claimed, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.claims != nil {
		return nil, k.claims
	}
	return &fakeClaim{k: k}, nil
}

func (c *fakeClaim) Sync() error {
	c.k.mu.Lock()
	wait := c.k.syncs
	c.k.mu.Unlock()
	if wait != nil {
		<-wait
	}
	return nil
}

func (c *fakeClaim) Close() error {
	if c.closed {
		c.k.t.Error("closed twice")
	}
	c.closed = true
	return nil
}

func (k *fakeKernel) Close() error { return nil }

func (k *fakeKernel) execute(command uint8, attributes []byte, reply bool) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := decodeRequest(k.t, command, attributes)
	k.requests = append(k.requests, r)
	if reply != (command == commandConnect || command == commandStatus) {
		k.t.Errorf("command %d with reply %v", command, reply)
	}
	if errs := k.fail[command]; len(errs) > 0 {
		k.fail[command] = errs[1:]
		if errs[0] != nil {
			return nil, errs[0]
		}
	}
	switch command {
	case commandConnect:
		return k.connect(r)
	case commandReconfigure:
		return nil, k.reconfigure(r)
	case commandDisconnect:
		if r.index == nil || k.devices[*r.index] == nil {
			return nil, unix.EINVAL
		}
		k.drop(*r.index)
		return nil, nil
	case commandStatus:
		return k.status(), nil
	}
	return nil, unix.EOPNOTSUPP
}

func (k *fakeKernel) connect(r fakeRequest) ([]byte, error) {
	index := Index(0)
	if r.index != nil {
		index = *r.index
	} else {
		for k.devices[index] != nil && (k.devices[index].connected || k.devices[index].open) {
			index++
		}
	}
	d := k.devices[index]
	if d == nil {
		d = k.add(index)
	}
	if d.connected || d.open {
		return nil, unix.EBUSY
	}
	if r.size == 0 || len(r.sockets) == 0 || (len(r.sockets) > 1 && nbd.TransmissionFlags(r.flags)&nbd.FlagCanMultiConn == 0) {
		return nil, unix.EINVAL
	}
	d.connected = true
	d.sockets = k.duplicate(r.sockets)
	flag := func(f nbd.TransmissionFlags, yes, no string) string {
		if nbd.TransmissionFlags(r.flags)&f != 0 {
			return yes
		}
		return no
	}
	k.sysfs(index, "pid", strconv.Itoa(os.Getpid()))
	k.sysfs(index, "size", strconv.FormatUint(r.size/512, 10))
	k.sysfs(index, "ro", flag(nbd.FlagReadOnly, "1", "0"))
	k.sysfs(index, "inflight", "       1        2")
	k.sysfs(index, "queue/logical_block_size", strconv.FormatUint(r.blockSize, 10))
	k.sysfs(index, "queue/write_cache", flag(nbd.FlagSendFlush, "write back", "write through"))
	k.sysfs(index, "queue/fua", flag(nbd.FlagSendFUA, "1", "0"))
	k.sysfs(index, "queue/discard_max_bytes", flag(nbd.FlagSendTrim, "4294966784", "0"))
	k.sysfs(index, "queue/io_timeout", "30000")
	if !k.old {
		d.backend = r.backend
		k.sysfs(index, "backend", r.backend)
	}
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	return e.Encode()
}

func (k *fakeKernel) reconfigure(r fakeRequest) error {
	d := k.devices[*r.index]
	if d == nil || !d.connected || d.backend != r.backend {
		return unix.EINVAL
	}
	if r.size != 0 {
		k.sysfs(*r.index, "size", strconv.FormatUint(r.size/512, 10))
	}
	fresh := r.sockets
	for i, fd := range d.sockets {
		if fd < 0 && len(fresh) > 0 {
			d.sockets[i], fresh = k.duplicate(fresh[:1])[0], fresh[1:]
			var st unix.Stat_t
			if err := unix.Fstat(d.sockets[i], &st); err == nil && k.taken != nil {
				k.taken(st.Ino)
			}
		}
	}
	return nil
}

// duplicate has references of its own, and wants sockets.
func (k *fakeKernel) duplicate(fds []int) []int {
	var own []int
	for _, fd := range fds {
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
			k.t.Errorf("descriptor %d is no unix socket: %v", fd, err)
		}
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			k.t.Error(err)
		}
		own = append(own, n)
	}
	return own
}

func (k *fakeKernel) status() []byte {
	e := netlink.NewAttributeEncoder()
	e.Nested(attrDevices, func(list *netlink.AttributeEncoder) error {
		for index, d := range k.devices {
			list.Nested(attrDevice, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrDeviceIndex, uint32(index))
				connected := uint8(0)
				if d.connected || d.open {
					connected = 1
				}
				item.Uint8(attrDeviceConnected, connected)
				return nil
			})
		}
		return nil
	})
	b, err := e.Encode()
	if err != nil {
		k.t.Error(err)
	}
	return b
}

// lose has n connections of a device die, and tells.
func (k *fakeKernel) lose(index Index, n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, fd := range k.devices[index].sockets {
		if fd < 0 || n == 0 {
			continue
		}
		n--
		_ = unix.Close(fd) // ours
		k.devices[index].sockets[i] = -1
		for l := range k.listeners {
			l.notices <- fakeNotice{index: index}
		}
	}
}

// alive is how many connections of a device have not died.
func (k *fakeKernel) alive(index Index) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, fd := range k.devices[index].sockets {
		if fd >= 0 {
			n++
		}
	}
	return n
}

// tell sends a notice to all who listen, as soon as somebody does.
func (k *fakeKernel) tell(n fakeNotice) {
	k.t.Helper()
	eventually(k.t, "somebody listens", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return len(k.listeners) > 0
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	for l := range k.listeners {
		l.notices <- n
	}
}

// count is how many commands of a kind there were.
func (k *fakeKernel) count(command uint8) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.requests {
		if r.command == command {
			n++
		}
	}
	return n
}

// last is the last command of a kind.
func (k *fakeKernel) last(command uint8) fakeRequest {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range slices.Backward(k.requests) {
		if r.command == command {
			return r
		}
	}
	k.t.Fatalf("no command %d", command)
	return fakeRequest{}
}

type fakeNotice struct {
	index Index
	lost  bool
	err   error
}

type fakeNotices struct {
	k       *fakeKernel
	notices chan fakeNotice
	closed  chan struct{}
}

func (k *fakeKernel) listen() (notices, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.silent {
		return nil, &KernelError{What: "nbd notifications", Since: "4.12"}
	}
	l := &fakeNotices{k: k, notices: make(chan fakeNotice, 64), closed: make(chan struct{})}
	k.listeners[l] = true
	return l, nil
}

func (l *fakeNotices) receive() (Index, bool, error) {
	select {
	case n := <-l.notices:
		return n.index, n.lost, n.err
	case <-l.closed:
		return 0, false, os.ErrClosed
	}
}

func (l *fakeNotices) Close() error {
	l.k.mu.Lock()
	delete(l.k.listeners, l)
	l.k.mu.Unlock()
	close(l.closed)
	return nil
}

// decodeRequest reads attributes as the kernel does, without the code under test.
func decodeRequest(t *testing.T, command uint8, attributes []byte) fakeRequest {
	t.Helper()
	r := fakeRequest{command: command}
	d, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		t.Error(err)
		return r
	}
	for d.Next() {
		switch d.Type() {
		case 1:
			index := Index(d.Uint32())
			r.index = &index
		case 2:
			r.size = d.Uint64()
		case 3:
			r.blockSize = d.Uint64()
		case 4:
			n := d.Uint64()
			r.timeout = &n
		case 5:
			r.flags = d.Uint64()
		case 6:
			r.clientFlags = d.Uint64()
		case 7:
			d.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Nested(func(item *netlink.AttributeDecoder) error {
						for item.Next() {
							r.sockets = append(r.sockets, int(item.Uint32()))
						}
						return nil
					})
				}
				return nil
			})
		case 8:
			r.deadTimeout = d.Uint64()
		case 10:
			r.backend = string(bytes.TrimRight(d.Bytes(), "\x00"))
		default:
			t.Errorf("attribute %d", d.Type())
		}
	}
	if err := d.Err(); err != nil {
		t.Error(err)
	}
	return r
}

func (s *fakeServer) config() Config {
	return Config{Dial: Unix(s.address), Export: "pool/data", HandshakeTimeout: 5 * time.Second}
}

func attached(t *testing.T, d *Driver, c Config) Device {
	t.Helper()
	device, err := d.Connect(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return device
}
