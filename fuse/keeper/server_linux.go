package keeper

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lookInterval  = 50 * time.Millisecond // at entries that wait, when the keeper is to end
	sweepInterval = 10 * time.Second      // for descriptors of no use
)

// Server holds descriptors.
type Server struct {
	config   Config
	log      *slog.Logger
	lock     *os.File
	listener *net.UnixListener
	idle     chan struct{} // closed when it has been idle for long enough
	ended    chan struct{} // closed by Close
	once     sync.Once     // says that it waits

	mu      sync.Mutex
	closed  bool
	entries map[string]*entry
	conns   map[*net.UnixConn]struct{}
	timer   *time.Timer // ends the keeper; nil without Config.Idle
	resting bool        // the timer runs

	group sync.WaitGroup // of connections and of accept
}

// entry is a descriptor with its name and state.
type entry struct {
	state []byte
	fd    int
	owner *net.UnixConn // nil: nobody's
	pid   int32         // of the owner
}

// Start listens. A socket that a dead keeper left is replaced; a live one's is an error.
func Start(c Config) (*Server, error) {
	if !filepath.IsAbs(c.Socket) {
		return nil, fmt.Errorf("keeper: socket %q: an absolute path is needed", c.Socket)
	}
	if err := os.MkdirAll(filepath.Dir(c.Socket), 0o700); err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	s := &Server{config: c, log: c.Log, entries: map[string]*entry{}, conns: map[*net.UnixConn]struct{}{}, idle: make(chan struct{}), ended: make(chan struct{})}
	var err error
	if s.lock, err = os.OpenFile(c.Socket+".lock", os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	if err = unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = s.lock.Close() // nothing is written
		return nil, fmt.Errorf("keeper: another keeper serves %s", c.Socket)
	}
	_ = os.Remove(c.Socket) // of a dead keeper, if there is one
	if s.listener, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: c.Socket, Net: "unixpacket"}); err != nil {
		_ = s.lock.Close() // nothing is written
		return nil, fmt.Errorf("keeper: %w", err)
	}
	if err := os.Chmod(c.Socket, 0o600); err != nil {
		_ = s.listener.Close() // nobody has connected
		_ = s.lock.Close()     // nothing is written
		return nil, fmt.Errorf("keeper: %w", err)
	}
	if c.Idle > 0 {
		s.mu.Lock() // tire may run at once
		s.timer, s.resting = time.AfterFunc(c.Idle, s.tire), true
		s.mu.Unlock()
	}
	s.group.Add(2)
	go s.accept()
	go s.sweep()
	return s, nil
}

// sweep forgets entries that are nobody's and whose descriptor is of no use any more:
// the kernel has broken the connection, as with an unmount. It ends on Close.
func (s *Server) sweep() {
	defer s.group.Done()
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-s.ended:
			return
		case <-ticker.C:
			s.sweepOnce()
		}
	}
}

func (s *Server) sweepOnce() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, e := range s.entries {
		p := []unix.PollFd{{Fd: int32(e.fd)}}
		if _, err := unix.Poll(p, 0); err != nil || e.owner != nil || p[0].Revents&unix.POLLERR == 0 {
			continue
		}
		s.log.Info("keeper entry", "name", name, "from", "waiting", "to", "forgotten: its connection is broken")
		_ = unix.Close(e.fd) // forgotten
		delete(s.entries, name)
	}
	s.restLocked()
}

// restLocked starts the time of idleness when there is nothing to keep.
func (s *Server) restLocked() {
	if s.timer != nil && len(s.conns) == 0 && len(s.entries) == 0 && !s.closed && !s.resting {
		s.resting = true
		s.timer.Reset(s.config.Idle)
	}
}

// Run keeps until it has been idle for long enough, or stop says so. Asked to stop
// while an entry is nobody's, which would be lost, it waits until somebody has taken
// it; asked again, it does not.
func (s *Server) Run(stop <-chan struct{}) error {
	select {
	case <-stop:
	case <-s.idle:
		return s.Close()
	}
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	for waiting := s.waiting(); waiting > 0; waiting = s.waiting() {
		s.once.Do(func() {
			s.log.Warn("keeper ends when its entries have been taken, or at the next signal", "entries", waiting)
		})
		select {
		case <-stop:
			return s.Close()
		case <-look.C:
		}
	}
	return s.Close()
}

// waiting is how many entries are nobody's.
func (s *Server) waiting() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries {
		if e.owner == nil {
			n++
		}
	}
	return n
}

// Close ends the keeper and closes what it holds.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.ended)
	if s.timer != nil {
		s.timer.Stop()
	}
	for c := range s.conns {
		_ = c.Close() // it sees the end
	}
	s.mu.Unlock()
	err := s.listener.Close() // removes the socket
	s.group.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, e := range s.entries {
		if e.owner == nil {
			s.log.Warn("keeper ends with an entry that nobody owns", "name", name)
		}
		_ = unix.Close(e.fd) // the end
		delete(s.entries, name)
	}
	_ = s.lock.Close() // nothing is written
	return err
}

// tire ends an idle server.
func (s *Server) tire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resting = false
	if len(s.conns) > 0 || len(s.entries) > 0 || s.closed {
		return // somebody came; the timer is set when they go
	}
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

// accept ends when the listener is closed.
func (s *Server) accept() {
	defer s.group.Done()
	for {
		c, err := s.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Warn("keeper: accept", "error", err)
			time.Sleep(100 * time.Millisecond) // out of descriptors, for one
			continue
		}
		pid, err := trusted(c)
		if err != nil {
			s.log.Warn("keeper refuses a connection", "error", err)
			_ = c.Close() // refused
			continue
		}
		s.mu.Lock()
		if s.closed {
			_ = c.Close() // too late
			s.mu.Unlock()
			continue
		}
		s.conns[c] = struct{}{}
		s.group.Add(1)
		s.mu.Unlock()
		go s.serve(c, pid)
	}
}

// serve ends with its connection, which Close closes.
func (s *Server) serve(c *net.UnixConn, pid int32) {
	defer s.group.Done()
	buffer := make([]byte, messageMax+1)
	for {
		var m message
		fd, err := receive(c, buffer, &m)
		if err == nil {
			answer, give := s.handle(c, pid, &m, fd)
			err = send(c, &answer, give)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("keeper: connection", "pid", pid, "error", err)
			}
			break
		}
	}
	s.leave(c)
}

// leave ends what a connection owned.
func (s *Server) leave(c *net.UnixConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, e := range s.entries {
		if e.owner == c {
			e.owner, e.pid = nil, 0
			s.log.Info("keeper entry", "name", name, "from", "owned", "to", "waiting")
		}
	}
	delete(s.conns, c)
	_ = c.Close() // it has ended
	s.restLocked()
}

// handle does what a message asks. The descriptor it returns, if it is not none, goes
// with the answer and stays the entry's; the one that came is the entry's or closed.
func (s *Server) handle(c *net.UnixConn, pid int32, m *message, fd int) (answer message, give int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.kind != kindPut && fd != none {
		_ = unix.Close(fd) // not asked for
	}
	reply := message{kind: kindAnswer, name: m.name}
	if m.kind != kindNext && !m.named() {
		if m.kind == kindPut && fd != none {
			_ = unix.Close(fd) // refused
		}
		reply.code = codeInvalid
		return reply, none
	}
	e := s.entries[m.name]
	switch m.kind {
	case kindPut:
		reply.code = s.put(c, pid, m, e, fd)
		return reply, none
	case kindNext:
		return s.next(m.name), none
	case kindTake, kindRelease, kindRemove:
	default:
		reply.code = codeInvalid
		return reply, none
	}
	switch {
	case e == nil:
		reply.code = codeNotFound
		return reply, none
	case e.owner != nil && e.owner != c:
		reply.code, reply.owned, reply.pid = codeOwned, true, e.pid
		return reply, none
	}
	switch m.kind {
	case kindTake:
		e.owner, e.pid = c, pid
		reply.state = e.state
		return reply, e.fd
	case kindRelease:
		e.owner, e.pid = nil, 0
	case kindRemove:
		_ = unix.Close(e.fd) // forgotten
		delete(s.entries, m.name)
	}
	return reply, none
}

// put keeps a descriptor; where it does not, it closes it.
func (s *Server) put(c *net.UnixConn, pid int32, m *message, e *entry, fd int) code {
	result := codeOK
	switch {
	case fd == none:
		return codeInvalid
	case e != nil && e.owner == nil:
		result = codeExists
	case e != nil && e.owner != c:
		result = codeOwned
	case e == nil && len(s.entries) >= EntriesMax:
		result = codeFull
	}
	if result != codeOK {
		_ = unix.Close(fd) // refused
		return result
	}
	if e != nil {
		_ = unix.Close(e.fd) // replaced
	}
	s.entries[m.name] = &entry{state: m.state, fd: fd, owner: c, pid: pid}
	return codeOK
}

// next is the entry whose name follows after, in the order of names.
func (s *Server) next(after string) message {
	var names []string
	for name := range s.entries {
		if name > after {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return message{kind: kindAnswer, code: codeEnd}
	}
	name := slices.Min(names)
	e := s.entries[name]
	return message{kind: kindAnswer, name: name, state: e.state, owned: e.owner != nil, pid: e.pid}
}
