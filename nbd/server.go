package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// ServerConfig says how a server behaves. Reactors and Exports are required;
// zero values elsewhere mean the defaults named.
type ServerConfig struct {
	Reactors []*reactor.Reactor // carry the connections; stopped by their owner, after the server
	Exports  *ExportSet
	Log      *slog.Logger // slog.Default()

	TLS       TLSMode     // TLSOff
	TLSConfig *tls.Config // certificates and client authentication; see LoadTLS

	NoList           bool          // refuse LIST
	HandshakeTimeout time.Duration // 10 s, from accept to the end of negotiation, TLS included
	StallTimeout     time.Duration // 30 s without a byte in the middle of a request or a reply
	DrainTimeout     time.Duration // 10 s for requests in flight when the server stops
	ConnectionsMax   int           // 1024
	PerAddressMax    int           // connections from one address, 256; Unix sockets count as one without this bound
	Depth            int           // requests in flight per connection, 256; at most 512
	BytesMax         int64         // payload in flight per connection, 16 MiB
}

func (c *ServerConfig) setDefaults() {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	duration := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	duration(&c.HandshakeTimeout, 10*time.Second)
	duration(&c.StallTimeout, 30*time.Second)
	duration(&c.DrainTimeout, 10*time.Second)
	number := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	number(&c.ConnectionsMax, 1024)
	number(&c.PerAddressMax, 256)
	number(&c.Depth, 256)
	if c.BytesMax == 0 {
		c.BytesMax = 16 << 20
	}
	if c.TLS == "" {
		c.TLS = TLSOff
	}
}

// ErrServerClosed is what Serve returns after Shutdown.
var ErrServerClosed = errors.New("nbd: server closed")

// Server exports devices to NBD clients.
type Server struct {
	config ServerConfig
	log    *slog.Logger
	closed atomic.Bool
	huge   atomic.Int32 // replies above wholeMax in memory
	nextID atomic.Uint64
	group  sync.WaitGroup // connections, from accept to their end

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	pending   map[net.Conn]struct{} // in handshake
	conns     map[*conn]struct{}    // in transmission
	addresses map[string]int
	load      []int // connections by reactor
	total     int
	past      ExportCounters // of connections that have ended

	accepted   atomic.Uint64
	refused    atomic.Uint64
	handshakes atomic.Uint64 // that failed
}

// NewServer makes a server. It serves nothing until Serve or ServeConn.
func NewServer(c ServerConfig) (*Server, error) {
	c.setDefaults()
	switch {
	case len(c.Reactors) == 0:
		return nil, errors.New("nbd: a server needs at least one reactor")
	case c.Exports == nil:
		return nil, errors.New("nbd: a server needs a set of exports")
	case c.TLS != TLSOff && c.TLS != TLSSelective && c.TLS != TLSForced:
		return nil, fmt.Errorf("nbd: unknown TLS mode %q (off, on, require)", c.TLS)
	case c.TLS != TLSOff && c.TLSConfig == nil:
		return nil, errors.New("nbd: TLS needs a certificate and a key")
	case c.Depth < 1 || c.Depth > 512:
		return nil, fmt.Errorf("nbd: depth %d: must be 1 to 512", c.Depth)
	}
	return &Server{
		config: c, log: c.Log,
		listeners: map[net.Listener]struct{}{},
		pending:   map[net.Conn]struct{}{},
		conns:     map[*conn]struct{}{},
		addresses: map[string]int{},
		load:      make([]int, len(c.Reactors)),
	}, nil
}

// Serve accepts connections from l until Shutdown, and closes l.
//
// Errors: ErrServerClosed after Shutdown; anything else is the listener's.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed.Load() {
		s.mu.Unlock()
		_ = l.Close() // never used
		return ErrServerClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
		_ = l.Close() // accepting is over
	}()
	delay := time.Duration(0)
	for {
		c, err := l.Accept()
		if err != nil {
			if s.closed.Load() {
				return ErrServerClosed
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ECONNABORTED) {
				// Those who are connected go on; whoever waits is taken when there is room.
				delay = min(max(2*delay, 5*time.Millisecond), time.Second)
				s.log.Warn("nbd: accepting a connection failed, trying again", "error", err, "in", delay)
				time.Sleep(delay)
				continue
			}
			return fmt.Errorf("nbd: accept: %w", err)
		}
		delay = 0
		if !s.admit(c) {
			_ = c.Close() // refused
			continue
		}
		go func() {
			defer s.group.Done()
			if err := s.serve(c); err != nil {
				s.log.Info("nbd connection not served", "remote", remoteOf(c), "reason", err)
			}
		}()
	}
}

// ServeConn serves one connection to its end, for socket activation in inetd's
// style. It takes c over.
func (s *Server) ServeConn(c net.Conn) error {
	if !s.admit(c) {
		_ = c.Close() // refused
		return ErrServerClosed
	}
	defer s.group.Done()
	return s.serve(c)
}

func remoteOf(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	return "local"
}

// addressOf is what connections are counted by: the host, or "" for local ones.
func addressOf(c net.Conn) string {
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return a.IP.String()
	}
	return ""
}

// admit counts a new connection in, unless there are too many.
func (s *Server) admit(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	address := addressOf(c)
	switch {
	case s.closed.Load():
		return false
	case s.total >= s.config.ConnectionsMax, address != "" && s.addresses[address] >= s.config.PerAddressMax:
		s.refused.Add(1)
		s.log.Warn("nbd connection refused: too many", "remote", remoteOf(c), "connections", s.total, "of_address", s.addresses[address])
		return false
	}
	s.total++
	s.addresses[address]++
	s.pending[c] = struct{}{}
	s.group.Add(1)
	s.accepted.Add(1)
	return true
}

func (s *Server) leave(address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.addresses[address]--; s.addresses[address] == 0 {
		delete(s.addresses, address)
	}
}

// serve runs one connection from handshake to end.
func (s *Server) serve(socket net.Conn) error {
	defer s.leave(addressOf(socket))
	tune(socket)
	n, err := s.handshake(socket)
	if err != nil {
		left := errors.Is(err, errDisconnect)
		if !left {
			s.handshakes.Add(1) // before the client sees the end
		}
		_ = socket.Close() // nothing more to say
		if left {
			return nil
		}
		return err
	}
	defer func() {
		if err := n.release(); err != nil {
			s.log.Error("nbd: closing a device", "export", n.export.Name, "error", err)
		}
	}()
	fd, pump, err := detach(n, s.config.StallTimeout)
	if err != nil {
		_ = socket.Close() // unusable
		return err
	}
	c := &conn{
		server: s, export: n.export, info: n.info, wire: wire{fd: fd},
		structured: n.structured, extended: n.extended, contexts: n.contexts, encrypted: pump != nil,
		id: s.nextID.Add(1), remote: remoteOf(socket), closed: make(chan struct{}),
	}
	place, ok := s.place(c)
	if !ok {
		_ = unix.Close(fd) // no request was taken
		pump.wait()
		return ErrServerClosed
	}
	var startErr error
	err = c.reactor.Run(func(*reactor.Reactor) { startErr = c.start() })
	if err = errors.Join(err, startErr); err != nil {
		_ = unix.Close(fd) // no request was taken
		s.remove(c, place)
		pump.wait()
		return err
	}
	s.log.Debug("nbd connection", "export", n.export.Name, "connection", c.id, "remote", c.remote, "reactor", c.reactor.Name(),
		"structured", c.structured, "extended", c.extended, "tls", n.tls != nil, "contexts", c.contexts)
	if s.closed.Load() {
		c.reactor.Post(reactor.TaskFunc(func(*reactor.Reactor) { c.drain() }))
	}
	<-c.closed
	s.remove(c, place)
	pump.wait()
	s.log.Debug("nbd connection ended", "export", n.export.Name, "connection", c.id, "remote", c.remote)
	return nil
}

func (s *Server) handshake(socket net.Conn) (*negotiated, error) {
	defer func() {
		s.mu.Lock()
		delete(s.pending, socket)
		s.mu.Unlock()
	}()
	if err := handshakeDeadline(socket, s.config.HandshakeTimeout); err != nil {
		return nil, err
	}
	if s.closed.Load() { // Shutdown may have set its deadline before this one
		return nil, errDisconnect
	}
	n, err := negotiate(socket, handshakeConfig{
		exports: s.config.Exports, tlsMode: s.config.TLS, tlsConfig: s.config.TLSConfig,
		listing: !s.config.NoList, closing: s.closed.Load, log: s.log,
	})
	if err != nil {
		return n, err
	}
	if err := socket.SetDeadline(time.Time{}); err != nil {
		return n, errors.Join(err, n.release())
	}
	return n, nil
}

// place gives c to the reactor with the fewest connections.
func (s *Server) place(c *conn) (index int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, n := range s.load {
		if n < s.load[index] {
			index = i
		}
	}
	s.load[index]++
	c.reactor = s.config.Reactors[index]
	s.conns[c] = struct{}{}
	return index, true
}

func (s *Server) remove(c *conn, index int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.load[index]--
	delete(s.conns, c)
	s.past.add(c)
}

// takeHuge takes one of the places for replies above wholeMax.
func (s *Server) takeHuge() bool {
	if s.huge.Add(1) > hugeMax {
		s.huge.Add(-1)
		return false
	}
	return true
}

// Shutdown stops the server: no new connection is taken, requests in flight are
// served, later ones get ESHUTDOWN (from clients of simple replies, such as the
// kernel's, they are left unanswered), and connections close. Those that have not
// ended when DrainTimeout or ctx is over are cut; their requests still run to their
// end at the device before Shutdown returns.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed.Store(true)
	for l := range s.listeners {
		_ = l.Close() // accepting is over
	}
	for c := range s.pending {
		_ = c.SetDeadline(time.Now()) // negotiation ends at its next read or write
	}
	s.mu.Unlock()
	s.each((*conn).drain)
	done := make(chan struct{})
	go func() { // ends with the last connection, which the cut below forces
		s.group.Wait()
		close(done)
	}()
	timer := time.NewTimer(s.config.DrainTimeout)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-timer.C:
	case <-ctx.Done():
	}
	s.each((*conn).kill)
	<-done
	return nil
}

// Disconnect ends the connections in transmission to the exports that match: what
// has been received is served, later requests get ESHUTDOWN. With cut they end
// without an answer; what is at the device runs to its end all the same. It returns
// how many there are and does not wait for them.
func (s *Server) Disconnect(match func(export string) bool, cut bool) int {
	end := (*conn).drain
	if cut {
		end = (*conn).kill
	}
	return s.eachOf(match, end)
}

// Connections counts the connections in transmission, by the name of their export.
func (s *Server) Connections() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts := make(map[string]int)
	for c := range s.conns {
		counts[c.export.Name]++
	}
	return counts
}

// each runs f for every connection in transmission, on its reactor.
func (s *Server) each(f func(*conn)) {
	s.eachOf(func(string) bool { return true }, f)
}

func (s *Server) eachOf(match func(export string) bool, f func(*conn)) int {
	s.mu.Lock()
	list := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		if match(c.export.Name) {
			list = append(list, c)
		}
	}
	s.mu.Unlock()
	for _, c := range list {
		c.reactor.Post(reactor.TaskFunc(func(*reactor.Reactor) {
			if c.queue != nil {
				f(c)
			}
		}))
	}
	return len(list)
}
