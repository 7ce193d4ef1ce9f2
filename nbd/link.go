package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/invariant"
)

// ErrServerLeft is what a link dies of when the server ends the stream between
// two replies: it was stopped, killed, or moved.
var ErrServerLeft = errors.New("nbd: the server hung up")

// linkWriteTimeout is how long the server may take no byte of an encrypted link.
const linkWriteTimeout = 30 * time.Second

// Link is one connection to one export, like [Client], but it lives on a reactor:
// no goroutine, no lock and no allocation per request. Its owner decides what
// happens to requests when it dies.
//
// The way of a request: Submit queues it, the end of the turn sends all that is
// queued in one system call, and the reactor's report of bytes from the server
// runs the decoder, which fills Buf and ends the request through its Done.
//
// A link dies once, through Dead; requests not ended by then never end on it,
// and their buffers are free. The handshake runs before, in DialLink, on an ordinary
// goroutine; TLS is carried by goroutines beside the reactor, as for a server.
type Link struct {
	wire
	info     ExportInfo // immutable
	headers  Headers    // immutable
	contexts []Context  // immutable
	pump     *pump      // immutable
	secured  net.Conn   // immutable: the connection under TLS; nil without

	// Owned by the reactor.
	reactor *reactor.Reactor
	watch   reactor.Watch
	onDead  func(error)
	dead    bool
	slots   []linkSlot
	free    []uint32 // indexes of slots
	waiting linkQueue
	linkReceiver
	linkSender
}

// LinkRequest is one command on a [Link]. Its maker owns it and uses it again and
// again; between Submit and Done, or the death of the link, it and Buf belong to
// the link.
type LinkRequest struct {
	Command Command
	Flags   CommandFlags
	Offset  uint64 // bytes; 0 for a flush
	Length  uint64 // bytes; 0 for a flush
	Buf     []byte // of reads and writes, with len(Buf) == Length; else nil

	// Context is the index in Contexts of what a block status asks for. Its
	// extents are appended to Extents[:0] and never beyond the capacity.
	Context int
	Extents []datapath.Extent

	Errno Error // the server's answer
	Zero  bool  // a read whose whole range the server reported as holes
	// Done runs once, on the reactor, never inside Submit, unless the link dies
	// before. It may submit.
	Done func(*LinkRequest)

	next *LinkRequest // in a linkQueue
}

// linkQueue is a list through the requests.
type linkQueue struct{ first, last *LinkRequest }

func (q *linkQueue) push(r *LinkRequest) {
	r.next = nil
	if q.last != nil {
		q.last.next = r
	} else {
		q.first = r
	}
	q.last = r
}

func (q *linkQueue) pop() *LinkRequest {
	r := q.first
	if q.first = r.next; q.first == nil {
		q.last = nil
	}
	r.next = nil
	return r
}

// linkSlot is a request on the wire, with what the decoder knows of its reply.
// The cookie is the slot's index below and a generation above.
type linkSlot struct {
	clientSlot // its request and lock are unused
	request    *LinkRequest
	header     [sizeRequestExtended]byte
	errno      Error // of the first error chunk
	holes      uint64
	sending    bool // its header or payload is not all sent
	replied    bool // the reply came before that
}

// DialLink connects to a server and opens an export. ctx bounds the connecting
// and the handshake only. Options.Depth is how many requests may be on the wire.
//
// Context: any goroutine that may wait. The link is then started on a reactor, or
// closed.
func DialLink(ctx context.Context, network, address string, options Options) (*Link, error) {
	conn, err := dialConn(ctx, network, address, &options)
	if err != nil {
		return nil, err
	}
	tune(conn)
	h, err := negotiateClient(ctx, conn, &options, (*clientHandshake).open)
	if err != nil {
		return nil, err
	}
	if n := h.in.Buffered(); n != 0 {
		_ = clientCloseConn(h.conn) // the server's mistake says more
		return nil, violationf("%d bytes behind the handshake, before any request", n)
	}
	return newLink(h)
}

// newLink takes the connection of a finished handshake off Go's poller.
func newLink(h *clientHandshake) (*Link, error) {
	l := &Link{info: h.info, headers: h.headers, contexts: h.contexts}
	n := &negotiated{conn: h.conn}
	if t, ok := h.conn.(*tls.Conn); ok {
		n.tls, l.secured = t, t.NetConn()
	}
	var err error
	if l.fd, l.pump, err = detach(n, linkWriteTimeout); err != nil {
		_ = clientCloseConn(h.conn) // nothing was asked on it
		return nil, err
	}
	l.slots = make([]linkSlot, h.options.Depth)
	l.free = make([]uint32, h.options.Depth)
	for i := range l.free {
		l.free[i] = uint32(len(l.free) - 1 - i)
		l.slots[i].covered.spans = make([]clientSpan, 0, clientSpansKept)
	}
	l.rx = make([]byte, receiveSize)
	l.ring = make([]uint32, h.options.Depth)
	return l, nil
}

// Info is what the server said of the export.
func (l *Link) Info() ExportInfo { return l.info }

// Headers is the form of messages that was negotiated.
func (l *Link) Headers() Headers { return l.headers }

// Contexts are the metadata contexts in force. The caller must not change them.
func (l *Link) Contexts() []Context { return l.contexts }

// PayloadMax is how many bytes one read or write may carry.
func (l *Link) PayloadMax() uint32 {
	if l.info.PayloadMax != 0 {
		return l.info.PayloadMax
	}
	return payloadMax
}

// EffectMax is the longest range of one command without payload.
func (l *Link) EffectMax() uint64 {
	if l.headers == HeadersExtended {
		return clientSizeMax
	}
	return 1 << 31 // the largest power of two in 32 bits: aligned to everything
}

// Received counts the bytes that came: whoever watches it sees whether the server
// does anything.
func (l *Link) Received() uint64 { return l.received }

// Start puts the link on r; dead is called, never inside Submit, when it dies.
//
// Context: on r.
func (l *Link) Start(r *reactor.Reactor, dead func(error)) error {
	l.reactor, l.onDead = r, dead
	l.flushLater.Func = l.flush
	l.readLater.Func = l.receive
	l.watch = reactor.Watch{FD: l.fd, Ready: l.ready}
	if err := r.AddWatch(&l.watch); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	l.readable = true
	r.Defer(&l.readLater)
	return nil
}

// Submit queues q. It never blocks; more requests than the depth wait here.
//
// Bounds: what the server offers and how long a request may be is in Info,
// PayloadMax and EffectMax; the caller keeps to it.
// Context: on the reactor, in a Done too. On a dead link it does nothing.
func (l *Link) Submit(q *LinkRequest) {
	if invariant.Enabled {
		moves := q.Command == CommandRead || q.Command == CommandWrite
		invariant.Check(q.Done != nil && (!moves || uint64(len(q.Buf)) == q.Length), "nbd link: malformed request")
	}
	l.waiting.push(q)
	if !l.dead {
		l.reactor.Defer(&l.flushLater)
	}
}

// take puts the next waiting request on the wire.
func (l *Link) take() *linkSlot {
	q := l.waiting.pop()
	index := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	s := &l.slots[index]
	s.inUse = true
	s.cookie = (s.cookie>>32+1)<<32 | uint64(index)
	s.command, s.flags, s.offset, s.length, s.request = q.Command, q.Flags, q.Offset, q.Length, q
	s.errno, s.holes, s.content, s.seen, s.wanted = ErrnoOK, 0, 0, 0, 0
	s.sending, s.replied = true, false
	s.covered.reset()
	flags := q.Flags
	switch {
	case q.Command == CommandBlockStatus:
		s.wanted = 1<<len(l.contexts) - 1
		q.Extents = q.Extents[:0]
	case q.Command == CommandWrite && l.headers == HeadersExtended:
		flags |= CommandFlagPayloadLen
	}
	appendRequest(s.header[:0], l.headers == HeadersExtended, flags, q.Command, s.cookie, q.Offset, q.Length)
	return s
}

// finish ends the request of s, whose reply is complete, once its bytes are out.
func (l *Link) finish(s *linkSlot) {
	if s.sending { // the server did not wait for all of the data
		s.replied = true
		return
	}
	q := s.request
	q.Errno = s.errno
	q.Zero = s.command == CommandRead && s.errno == ErrnoOK && s.holes == s.length
	s.inUse, s.request = false, nil
	l.free = append(l.free, uint32(s.cookie))
	if l.waiting.first != nil {
		l.reactor.Defer(&l.flushLater)
	}
	q.Done(q)
}

// die ends the link for a reason.
func (l *Link) die(err error) {
	if l.dead {
		return
	}
	l.Cut()
	l.onDead(err)
}

// Cut drops the connection at once, without a word to the server and without
// calling Dead. Nothing of it touches a buffer afterwards.
//
// Context: on the reactor, or before Start. It may be called again.
func (l *Link) Cut() {
	if l.dead {
		return
	}
	l.dead = true
	if l.reactor != nil {
		l.reactor.RemoveWatch(&l.watch)
	}
	if l.secured != nil {
		_ = l.secured.Close() // under the encryption, so that nothing waits for the server
	}
	_ = unix.Shutdown(l.fd, unix.SHUT_RDWR) // the peer may be gone
	_ = unix.Close(l.fd)                    // shut down before
}

// Close takes leave of the server, unless a request is half sent, and drops the
// connection. Nothing is in flight.
//
// Context: as for Cut.
func (l *Link) Close() {
	if l.dead {
		return
	}
	if l.sendHead == l.sendTail {
		b := appendRequest(l.rx[:0], l.headers == HeadersExtended, 0, CommandDisconnect, 0, 0, 0)
		l.iov[0].Base = &b[0]
		l.iov[0].SetLen(len(b))
		_, _ = l.send(1) // a courtesy; the end of the stream says the same
	}
	l.secured = nil // its own end follows when the pump has carried the goodbye
	l.Cut()
}

// Wait returns when nothing of a link that was cut or closed runs any more.
//
// Context: any goroutine that may wait.
func (l *Link) Wait() { l.pump.wait() }
