package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/benchmarks/internal/load"
)

const (
	dialMax     = 5 * time.Second
	sendMax     = 1 << 20   // one buffer of requests; a request larger than it gets a buffer of its size
	receiveSize = 256 << 10 // fits the level 2 cache; payload only passes through it
	optionMax   = 64 << 10  // reply to an option; real ones are below 100 bytes
)

// nbdTarget is an export named by a URI.
type nbdTarget struct {
	network, address, export string
	structured               bool
	spin                     time.Duration
	size                     uint64
}

// openNBD asks the server for the size of the export.
func openNBD(uri string, structured bool, spin time.Duration) (target, error) {
	t := &nbdTarget{structured: structured, spin: spin}
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("uri %q: %w", uri, err)
	}
	t.export = strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "nbd+unix":
		t.network, t.address = "unix", u.Query().Get("socket")
		if t.address == "" {
			return nil, fmt.Errorf("uri %q: no socket, want nbd+unix:///EXPORT?socket=PATH", uri)
		}
	case "nbd":
		t.network, t.address = "tcp", u.Host
		if u.Port() == "" {
			t.address = net.JoinHostPort(u.Hostname(), "10809")
		}
	default:
		return nil, fmt.Errorf("uri %q: want nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT", uri)
	}
	c, size, err := t.dial()
	if err != nil {
		return nil, err
	}
	t.size = size
	return t, errors.Join(sendDisconnect(c), c.Close())
}

func (t *nbdTarget) Size() uint64 { return t.size }

// Close has nothing to do: each driver has a connection of its own.
func (t *nbdTarget) Close() error { return nil }

// dial connects and goes through the handshake.
func (t *nbdTarget) dial() (net.Conn, uint64, error) {
	c, err := net.DialTimeout(t.network, t.address, dialMax)
	if err != nil {
		return nil, 0, fmt.Errorf("nbd: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(dialMax)); err != nil {
		return nil, 0, errors.Join(err, c.Close())
	}
	size, err := handshake(c, t.export, t.structured)
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("nbd: handshake with %s, export %q: %w", t.address, t.export, err), c.Close())
	}
	return c, size, nil
}

func sendDisconnect(c io.Writer) error {
	var b [requestBytes]byte
	putRequest(b[:], cmdDisc, 0, 0, 0)
	_, err := c.Write(b[:])
	return err
}

// handshake negotiates fixed newstyle and returns the size of the export.
func handshake(c io.ReadWriter, export string, structured bool) (uint64, error) {
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(hello[0:]) != magicServer || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return 0, errors.New("the peer does not greet as a newstyle NBD server")
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if flags&flagFixedNewstyle == 0 {
		return 0, errors.New("the server does not speak fixed newstyle")
	}
	if err := binary.Write(c, binary.BigEndian, uint32(flags&(flagFixedNewstyle|flagNoZeroes))); err != nil {
		return 0, err
	}
	if structured {
		if err := sendOption(c, optStructuredReply, nil); err != nil {
			return 0, err
		}
		kind, _, err := readOptionReply(c, optStructuredReply)
		if err != nil {
			return 0, err
		}
		if kind != repAck {
			return 0, fmt.Errorf("the server refuses structured replies (reply %#x)", kind)
		}
	}
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = binary.BigEndian.AppendUint16(data, 0) // asks for no further information
	if err := sendOption(c, optGo, data); err != nil {
		return 0, err
	}
	var size uint64
	for found := false; ; {
		kind, body, err := readOptionReply(c, optGo)
		switch {
		case err != nil:
			return 0, err
		case kind == repAck && found:
			return size, nil
		case kind == repAck:
			return 0, errors.New("the server did not tell the export's size")
		case kind&repErrorBit != 0:
			return 0, fmt.Errorf("the server refuses the export (reply %#x): %s", kind, body)
		case kind == repInfo && len(body) >= 12 && binary.BigEndian.Uint16(body) == infoExport:
			size, found = binary.BigEndian.Uint64(body[2:]), true
		}
	}
}

func sendOption(c io.Writer, option uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := c.Write(append(b, data...))
	return err
}

func readOptionReply(c io.Reader, option uint32) (kind uint32, body []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(head[16:])
	if binary.BigEndian.Uint64(head[0:]) != magicOptReply || binary.BigEndian.Uint32(head[8:]) != option || length > optionMax {
		return 0, nil, fmt.Errorf("the reply to option %d is malformed", option)
	}
	body = make([]byte, length)
	_, err = io.ReadFull(c, body)
	return binary.BigEndian.Uint32(head[12:]), body, err
}

// slot is one request in flight.
type slot struct {
	sent   time.Time
	length int // of its data
	op     load.Op
	busy   bool
}

// nbdDriver is one connection, served by one thread.
type nbdDriver struct {
	fd      int // blocking, with a receive timeout; not in Go's poller
	spin    time.Duration
	block   int
	slots   []slot
	free    []uint16
	send    []byte // requests wait in [sendFrom:sendTo]; payload is whatever lies there
	receive []byte // received and not yet decoded: [:received]

	sendFrom, sendTo, received int

	decoder replies
}

// Open connects one job.
func (t *nbdTarget) Open(p load.Pattern, jobIndex int) (driver, error) {
	c, _, err := t.dial()
	if err != nil {
		return nil, err
	}
	fd, err := detach(c)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	one := requestBytes + p.BlockBytes
	d := &nbdDriver{
		fd: fd, spin: t.spin, block: p.BlockBytes,
		slots: make([]slot, p.Depth), free: make([]uint16, p.Depth),
		send:    make([]byte, max(one, min(sendMax, p.Depth*one))),
		receive: make([]byte, receiveSize),
	}
	for i := range d.free {
		d.free[i] = uint16(i)
	}
	random := rand.NewChaCha8([32]byte{byte(jobIndex)})
	_, _ = random.Read(d.send) // never fails
	d.decoder.readLength = func(cookie uint64) (int, bool) {
		if cookie >= uint64(len(d.slots)) || !d.slots[cookie].busy {
			return 0, false
		}
		if d.slots[cookie].op != load.OpRead {
			return 0, true
		}
		return d.slots[cookie].length, true
	}
	return d, nil
}

// detach takes the socket out of Go's poller: this thread waits in the kernel.
func detach(c net.Conn) (fd int, err error) {
	defer func() { err = errors.Join(err, c.Close()) }() // the duplicate stays open
	sc, ok := c.(syscall.Conn)
	if !ok {
		return -1, fmt.Errorf("a %T has no file descriptor", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd = -1
	var dupErr error
	if err := raw.Control(func(old uintptr) {
		if fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); dupErr != nil {
			return
		}
		if dupErr = unix.SetNonblock(fd, false); dupErr != nil {
			return
		}
		timeout := unix.NsecToTimeval(wakeUp.Nanoseconds())
		dupErr = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
	}); err != nil {
		return -1, err
	}
	return fd, dupErr
}

// Run drives the connection until the schedule's end.
func (d *nbdDriver) Run(g *load.Generator, m *load.Meter, s schedule) error {
	var (
		now       = time.Now()
		lastReply = now
		began     bool
		inFlight  int
	)
	finish := func(cookie uint64) {
		x := &d.slots[cookie]
		x.busy = false
		d.free = append(d.free, uint16(cookie)) // within its capacity
		inFlight--
		if began && !now.After(s.end) {
			m.Record(x.op, now.Sub(x.sent), x.length)
		}
	}
	for {
		if !began && !now.Before(s.begin) {
			m.Begin(now)
			began = true
		}
		open := now.Before(s.end)
		if !open {
			m.End(s.end)
			if inFlight == 0 {
				return nil
			}
		}
		if open && d.sendFrom == d.sendTo {
			inFlight += d.fill(g, now)
		}
		flags := 0 // waits, at most wakeUp
		if d.sendFrom < d.sendTo {
			n, err := send(d.fd, d.send[d.sendFrom:d.sendTo])
			if err != nil {
				return fmt.Errorf("nbd: send: %w", err)
			}
			if d.sendFrom += n; d.sendFrom < d.sendTo {
				// The server reads nothing now: it may wait for us to take its replies.
				if err := waitEither(d.fd); err != nil {
					return err
				}
				flags = unix.MSG_DONTWAIT
			}
		}
		n, err := d.await(flags)
		now = time.Now()
		if err != nil {
			return fmt.Errorf("nbd: receive: %w", err)
		}
		if n == 0 {
			if now.Sub(lastReply) > replyMax {
				return fmt.Errorf("nbd: no reply for %v with %d requests in flight", replyMax, inFlight)
			}
			continue
		}
		lastReply = now
		d.received += n
		used, err := d.decoder.Decode(d.receive[:d.received], finish)
		if err != nil {
			return err
		}
		d.received = copy(d.receive, d.receive[used:d.received])
	}
}

// await receives what is there, or else the first that comes. It spins for a while before
// it sleeps: being woken costs the server, on whose CPU time that is, more than a reply.
func (d *nbdDriver) await(flags int) (int, error) {
	if flags == 0 && d.spin > 0 {
		for began := time.Now(); ; {
			n, err := receive(d.fd, d.receive[d.received:], unix.MSG_DONTWAIT)
			if n != 0 || err != nil {
				return n, err
			}
			if time.Since(began) >= d.spin {
				break
			}
		}
	}
	return receive(d.fd, d.receive[d.received:], flags)
}

// fill puts requests for the free slots into the empty send buffer.
func (d *nbdDriver) fill(g *load.Generator, now time.Time) (count int) {
	d.sendFrom, d.sendTo = 0, 0
	for len(d.free) > 0 && d.sendTo+requestBytes+d.block <= len(d.send) {
		index := d.free[len(d.free)-1]
		d.free = d.free[:len(d.free)-1]
		op, offset := g.Next()
		x := &d.slots[index]
		*x = slot{sent: now, op: op, length: d.block, busy: true}
		command, payload := uint16(cmdRead), 0
		switch op {
		case load.OpWrite:
			command, payload = cmdWrite, d.block
		case load.OpFlush:
			command, x.length = cmdFlush, 0
		}
		putRequest(d.send[d.sendTo:], command, uint64(index), offset, uint32(x.length))
		d.sendTo += requestBytes + payload
		count++
	}
	return count
}

// Close says goodbye and closes the connection.
func (d *nbdDriver) Close() error {
	var b [requestBytes]byte
	putRequest(b[:], cmdDisc, 0, 0, 0)
	_, _ = send(d.fd, b[:]) // a courtesy: the server may be gone
	return unix.Close(d.fd)
}

// waitEither waits until the socket can be read or written, at most wakeUp.
func waitEither(fd int) error {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
	if _, err := unix.Poll(p, int(wakeUp.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("nbd: poll: %w", err)
	}
	return nil
}
