package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Headers is the form of the messages after the handshake. Each form can do what
// the one before it can, and more.
type Headers uint8

// The forms of messages.
const (
	// HeadersExtended has 64-bit lengths (NBD extension-ext-header). As a wish it
	// includes the others: the best the server has is taken.
	HeadersExtended Headers = iota
	// HeadersStructured has replies in chunks, which errors, holes and metadata
	// contexts need; lengths have 32 bits.
	HeadersStructured
	// HeadersSimple is what every server speaks.
	HeadersSimple
)

// String names the form.
func (h Headers) String() string {
	return [...]string{"extended", "structured", "simple"}[min(h, HeadersSimple)]
}

// Defaults and bounds of Options.
const (
	clientDepth            = 64
	clientDepthMax         = 1 << 16
	clientHandshakeTimeout = 30 * time.Second
	clientCloseTimeout     = 10 * time.Second
	clientContextsMax      = 64 // more than any server has; bounds what a reply can make us keep
)

// Options say what a client wants of a server. The zero value asks for the
// default export, in plaintext, with every feature.
type Options struct {
	Export string

	// TLSConfig lets TLS start when the server has it. Without TLSRequired the
	// connection goes on in plaintext when the server has not, so anyone on the way
	// can turn TLS off. A nil TLSConfig with TLSRequired means the defaults of
	// crypto/tls. Where ServerName is empty, Dial over TCP takes the host from the
	// address; over a unix socket, which has no name, the certificate's chain is
	// verified and its name is not.
	TLSConfig   *tls.Config
	TLSRequired bool

	// MetaContexts are asked for by their full names. Which of them the server has
	// is in Client.Contexts; a missing one is no error.
	MetaContexts []string

	Headers        Headers // the best form to ask for
	ExportNameOnly bool    // select the export as old servers do: no GO, no block sizes

	// Unchecked sends commands and flags the server did not advertise, ranges
	// outside the export and unaligned ones, so that the server has to refuse them.
	Unchecked bool

	Depth            int           // requests on the wire at once; 0 means 64
	HandshakeTimeout time.Duration // 0 means 30 s; the context of Dial bounds it too
	CloseTimeout     time.Duration // how long Close waits for the server; 0 means 10 s
}

func (o *Options) setDefaults() error {
	if o.Depth == 0 {
		o.Depth = clientDepth
	}
	if o.Depth < 0 || o.Depth > clientDepthMax {
		return fmt.Errorf("nbd: depth %d (want 1 to %d)", o.Depth, clientDepthMax)
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = clientHandshakeTimeout
	}
	if o.CloseTimeout == 0 {
		o.CloseTimeout = clientCloseTimeout
	}
	if len(o.Export) > stringMax {
		return fmt.Errorf("nbd: export name of %d bytes (at most %d)", len(o.Export), stringMax)
	}
	if len(o.MetaContexts) > clientContextsMax {
		return fmt.Errorf("nbd: %d metadata contexts (at most %d)", len(o.MetaContexts), clientContextsMax)
	}
	for _, name := range o.MetaContexts {
		if len(name) > stringMax {
			return fmt.Errorf("nbd: metadata context name of %d bytes (at most %d)", len(name), stringMax)
		}
	}
	if o.TLSRequired && o.TLSConfig == nil {
		o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return nil
}

// ExportInfo is what a server says of an export.
type ExportInfo struct {
	Name        string // the server's canonical name; from Info only, else the name asked for
	Description string // from Info only
	Size        uint64 // bytes, at most 2^63-1
	Flags       TransmissionFlags

	// The block sizes, in bytes; all zero when the server does not say. Requests
	// must then be multiples of 512 with payloads of at most 32 MiB to be safe;
	// most servers take any.
	BlockMin, BlockPreferred, PayloadMax uint32

	Contexts []string // the metadata contexts on offer; from Info only
}

// Context is a metadata context the server reports by block status.
type Context struct {
	ID   uint32 // on this connection
	Name string
}

// Client is one connection to one export. Its methods may be called from any
// goroutine.
//
// Requests are pipelined: Submit queues, one goroutine writes what is queued in
// as few system calls as it can, another reads the replies and ends the requests
// in whatever order the server replies.
//
// A client is dead once the connection fails or the server breaks the protocol.
// Death is final: Err says why, Done is closed, and every request in flight or
// submitted later ends with that error. What to reconnect and resubmit is decided
// above: a Request that ended with the client's Err has kept its fields and may
// be given to another Client.
type Client struct {
	conn     net.Conn // immutable
	info     ExportInfo
	headers  Headers   // immutable
	contexts []Context // immutable
	options  Options   // immutable
	tls      bool      // immutable

	in      *bufio.Reader // owned by the reader
	scratch [64]byte      // owned by the reader
	out     clientBatch   // owned by the writer

	readerDone chan struct{} // closed by the reader when it ends
	writerDone chan struct{} // closed by the writer when it ends
	dead       chan struct{} // closed with err set

	mu sync.Mutex
	// Guarded by mu.
	wake     sync.Cond // the writer waits here
	queue    clientQueue
	slots    []clientSlot
	free     []uint32 // indexes of slots
	busy     int      // slots in use
	closing  bool     // no new requests; the writer says goodbye when all have ended
	stopped  bool     // the writer has ended
	draining bool     // a goroutine ends requests submitted since
	err      error    // sticky; the first cause of death

	calls []*clientCall // for the blocking methods; at most Depth
}

// Dial connects to a server and opens an export. ctx bounds the connecting and
// the handshake only.
func Dial(ctx context.Context, network, address string, options Options) (*Client, error) {
	conn, err := dialConn(ctx, network, address, &options)
	if err != nil {
		return nil, err
	}
	return NewClient(ctx, conn, options)
}

// DialURI is Dial for an NBD URI, whose export and TLS parameters complete
// options.
func DialURI(ctx context.Context, uri string, options Options) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if options, err = u.Options(options); err != nil {
		return nil, err
	}
	network, address := u.Address()
	return Dial(ctx, network, address, options)
}

func dialConn(ctx context.Context, network, address string, options *Options) (net.Conn, error) {
	if err := options.setDefaults(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, options.HandshakeTimeout)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	if host, _, err := net.SplitHostPort(address); err == nil && options.TLSConfig != nil && options.TLSConfig.ServerName == "" &&
		conn.RemoteAddr().Network() != "unix" {
		options.TLSConfig = options.TLSConfig.Clone()
		options.TLSConfig.ServerName = host
	}
	return conn, nil
}

// NewClient runs the handshake on conn and opens the export. ctx bounds the
// handshake only.
//
// Ownership: conn belongs to the client from here on; on an error it is closed.
func NewClient(ctx context.Context, conn net.Conn, options Options) (*Client, error) {
	if err := options.setDefaults(); err != nil {
		_ = conn.Close() // nothing was said on it
		return nil, err
	}
	h, err := negotiateClient(ctx, conn, &options, (*clientHandshake).open)
	if err != nil {
		return nil, err
	}
	c := newClient(h)
	c.out.init(len(c.contexts))
	go c.read()  // ends when the connection fails or is closed
	go c.write() // ends when Shutdown is called and all requests have ended
	return c, nil
}

// newClient makes the client of a finished handshake, without goroutines.
func newClient(h *clientHandshake) *Client {
	c := &Client{
		conn:       h.conn,
		info:       h.info,
		headers:    h.headers,
		contexts:   h.contexts,
		options:    *h.options,
		tls:        h.tls,
		in:         h.in,
		readerDone: make(chan struct{}),
		writerDone: make(chan struct{}),
		dead:       make(chan struct{}),
		slots:      make([]clientSlot, h.options.Depth),
		free:       make([]uint32, h.options.Depth),
	}
	c.wake.L = &c.mu
	for i := range c.free {
		c.free[i] = uint32(len(c.free) - 1 - i)
	}
	return c
}

// Info returns what the server said of the export.
func (c *Client) Info() ExportInfo { return c.info }

// Size is the export's size in bytes.
func (c *Client) Size() uint64 { return c.info.Size }

// Flags say what the export can do.
func (c *Client) Flags() TransmissionFlags { return c.info.Flags }

// Headers is the form of messages that was negotiated.
func (c *Client) Headers() Headers { return c.headers }

// TLS reports whether the connection is encrypted.
func (c *Client) TLS() bool { return c.tls }

// Contexts are the metadata contexts in force, in the order the server gave
// them. The caller must not change them.
func (c *Client) Contexts() []Context { return c.contexts }

// PayloadMax is how many bytes one read or write may carry.
func (c *Client) PayloadMax() uint32 {
	if c.info.PayloadMax != 0 {
		return c.info.PayloadMax
	}
	return payloadMax
}

// Done is closed when the client is dead.
func (c *Client) Done() <-chan struct{} { return c.dead }

// Err is nil while the client lives, and then what it died of: ErrClientClosed
// after a Shutdown, a *ViolationError, or an error of the connection.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// die notes what the client dies of, unless it is dead already.
func (c *Client) die(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
		close(c.dead)
	}
	c.wake.Broadcast()
	c.mu.Unlock()
}

// fail kills the client and cuts the connection, which unblocks the reader and
// the writer.
func (c *Client) fail(err error) {
	c.die(err)
	_ = clientCloseConn(c.conn) // it may have been closed; err is what matters
}

// clientCloseConn closes without waiting. A TLS connection is closed below its
// encryption: its own Close may wait for a writer that is stuck.
func clientCloseConn(conn net.Conn) error {
	if t, ok := conn.(*tls.Conn); ok {
		return t.NetConn().Close()
	}
	return conn.Close()
}

// Close is Shutdown with the CloseTimeout of the options.
func (c *Client) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), c.options.CloseTimeout)
	defer cancel()
	return c.Shutdown(ctx)
}

// Shutdown waits until every request submitted so far has ended, says goodbye to
// the server and closes the connection. When ctx ends first, the connection is
// cut and the requests left end with ErrClientClosed.
//
// It returns what the client died of if that was no Shutdown, and ctx's error if
// it had to cut. No goroutine of the client is left when it returns. It must not
// be called inside a Done function.
func (c *Client) Shutdown(ctx context.Context) error {
	c.mu.Lock()
	c.closing = true
	c.wake.Broadcast()
	c.mu.Unlock()

	var cut error
	select {
	case <-c.writerDone:
	case <-ctx.Done():
		c.mu.Lock()
		if c.err == nil {
			cut = ctx.Err()
		}
		c.mu.Unlock()
		c.fail(ErrClientClosed)
		<-c.writerDone
	}
	<-c.readerDone
	if cut != nil {
		return fmt.Errorf("nbd: close: %w", cut)
	}
	if err := c.Err(); !errors.Is(err, ErrClientClosed) {
		return err
	}
	return nil
}
