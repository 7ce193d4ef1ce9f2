package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	callWait    = 10 * time.Second       // for an answer; the keeper answers from memory
	launchWait  = 10 * time.Second       // for a keeper that was started to listen
	dialEvery   = 5 * time.Millisecond   // meanwhile
	ownedWait   = 5 * time.Second        // for the keeper to see that an old connection has ended
	restoreMost = 5 * time.Second        // between tries to have a keeper again: doubled from the first
	restoreWait = 100 * time.Millisecond // the first
)

// Client is a process's connection to its keeper. Its methods are for any goroutine but
// a reactor's. What it owns it puts again when the keeper has to be replaced.
type Client struct {
	options Options      // immutable
	log     *slog.Logger // immutable
	lost    chan struct{}
	stop    chan struct{} // closed by Close
	once    sync.Once     // closes it
	group   sync.WaitGroup

	mu      sync.Mutex // one call at a time
	conn    *net.UnixConn
	answers chan answer // of conn; closed when it has ended
	held    map[string]held
	closed  bool
}

// held is an entry that the client owns, with a descriptor of its own.
type held struct {
	state []byte
	fd    int
}

type answer struct {
	message message
	fd      int
}

// Open connects to the keeper, and starts it when Options.Command says how.
//
// Errors: ErrAway, ErrProtocol.
func Open(ctx context.Context, o Options) (*Client, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	c := &Client{options: o, log: o.Log, lost: make(chan struct{}, 1), stop: make(chan struct{}), held: map[string]held{}}
	c.mu.Lock()
	err := c.connectLocked(ctx)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if _, err := c.List(ctx); err != nil { // another version would not understand it
		_ = c.Close() // nothing was put
		return nil, err
	}
	c.group.Add(1)
	go c.restore()
	return c, nil
}

// Socket is the path of the keeper's socket.
func (c *Client) Socket() string { return c.options.Socket }

// Close ends the connection: what this process owned is nobody's from now on.
func (c *Client) Close() error {
	c.once.Do(func() { close(c.stop) }) // before the lock, which whoever dials has
	c.mu.Lock()
	c.closed = true
	c.dropLocked()
	for name, h := range c.held {
		_ = unix.Close(h.fd) // a duplicate
		delete(c.held, name)
	}
	c.mu.Unlock()
	c.group.Wait()
	return nil
}

// Put has the keeper hold a descriptor, which stays the caller's too. An entry of that
// name that this client owns is replaced.
//
// Errors: ErrExists for an entry that waits for somebody, ErrOwned, ErrFull, ErrAway.
func (c *Client) Put(ctx context.Context, name string, state []byte, fd int) error {
	if len(name) == 0 || len(name) > NameMax || len(state) > StateMax {
		return fmt.Errorf("keeper: entry with a name of %d bytes (1 to %d) and a state of %d (at most %d)", len(name), NameMax, len(state), StateMax)
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keeper: duplicate the descriptor: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.callLocked(ctx, &message{kind: kindPut, name: name, state: state}, own); err != nil {
		_ = unix.Close(own) // not kept
		return err
	}
	c.holdLocked(name, state, own)
	return nil
}

func (c *Client) holdLocked(name string, state []byte, fd int) {
	if old, ok := c.held[name]; ok {
		_ = unix.Close(old.fd) // a duplicate
	}
	c.held[name] = held{state: append([]byte(nil), state...), fd: fd}
}

// Take makes an entry this client's, and returns its state and a descriptor, which is
// the caller's to close.
//
// Errors: ErrNotFound, ErrOwned, also for an entry that is this client's already, ErrAway.
func (c *Client) Take(ctx context.Context, name string) (state []byte, fd int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.held[name]; ok {
		return nil, none, fmt.Errorf("%w: process %d", ErrOwned, os.Getpid())
	}
	a, err := c.callLocked(ctx, &message{kind: kindTake, name: name}, none)
	if err != nil {
		return nil, none, err
	}
	if a.fd == none {
		return nil, none, ErrProtocol
	}
	own, err := unix.FcntlInt(uintptr(a.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		_ = unix.Close(a.fd) // the keeper has it
		return nil, none, fmt.Errorf("keeper: duplicate the descriptor: %w", err)
	}
	c.holdLocked(name, a.message.state, own)
	return a.message.state, a.fd, nil
}

// Release leaves an entry with the keeper, for others to take. One that the keeper does
// not have is no error.
func (c *Client) Release(ctx context.Context, name string) error {
	return c.forget(ctx, name, kindRelease)
}

// Remove has the keeper close an entry's descriptor. One that the keeper does not have
// is no error.
//
// Errors: ErrOwned, ErrAway.
func (c *Client) Remove(ctx context.Context, name string) error {
	return c.forget(ctx, name, kindRemove)
}

func (c *Client) forget(ctx context.Context, name string, what kind) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.callLocked(ctx, &message{kind: what, name: name}, none); err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if h, ok := c.held[name]; ok {
		_ = unix.Close(h.fd) // a duplicate
		delete(c.held, name)
	}
	return nil
}

// List returns what the keeper holds, by name.
func (c *Client) List(ctx context.Context) ([]Entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []Entry
	for after := ""; ; {
		a, err := c.callLocked(ctx, &message{kind: kindNext, name: after}, none)
		if err != nil {
			return nil, err
		}
		m := &a.message
		if m.code == codeEnd {
			return list, nil
		}
		if m.name <= after || len(list) >= EntriesMax {
			c.dropLocked()
			return nil, ErrProtocol
		}
		list = append(list, Entry{Name: m.name, State: m.state, Owned: m.owned, PID: int(m.pid)})
		after = m.name
	}
}

// callLocked sends a message and waits for its answer. A connection that has ended is
// made anew first.
func (c *Client) callLocked(ctx context.Context, m *message, fd int) (answer, error) {
	if c.closed {
		return answer{}, fmt.Errorf("keeper: %w", net.ErrClosed)
	}
	if c.conn == nil {
		if err := c.connectLocked(ctx); err != nil {
			return answer{}, err
		}
	}
	a, err := c.exchangeLocked(ctx, m, fd)
	if errors.Is(err, ErrAway) && ctx.Err() == nil { // it ended, maybe long ago
		if err = c.connectLocked(ctx); err == nil {
			a, err = c.exchangeLocked(ctx, m, fd)
		}
	}
	return a, err
}

func (c *Client) exchangeLocked(ctx context.Context, m *message, fd int) (answer, error) {
	if err := send(c.conn, m, fd); err != nil {
		c.dropLocked()
		return answer{}, fmt.Errorf("%w at %s: %w", ErrAway, c.options.Socket, err)
	}
	timer := time.NewTimer(callWait)
	defer timer.Stop()
	select {
	case a, ok := <-c.answers:
		if !ok {
			c.dropLocked()
			return answer{}, fmt.Errorf("%w at %s: it ended", ErrAway, c.options.Socket)
		}
		if err := codeErrors[a.message.code]; err != nil {
			if a.fd != none {
				_ = unix.Close(a.fd) // not asked for
			}
			if a.message.owned {
				err = fmt.Errorf("%w: process %d", err, a.message.pid)
			}
			return answer{}, err
		}
		if m.kind != kindTake && a.fd != none {
			_ = unix.Close(a.fd) // not asked for
		}
		return a, nil
	case <-ctx.Done():
		c.dropLocked() // the answer would be taken for that of the next message
		return answer{}, fmt.Errorf("keeper: %w", ctx.Err())
	case <-timer.C:
		c.dropLocked()
		return answer{}, fmt.Errorf("keeper: no answer at %s within %v", c.options.Socket, callWait)
	}
}

// dropLocked ends the connection.
func (c *Client) dropLocked() {
	if c.conn == nil {
		return
	}
	_ = c.conn.Close() // it is not used any more
	for a := range c.answers {
		if a.fd != none {
			_ = unix.Close(a.fd) // nobody waits for it
		}
	}
	c.conn, c.answers = nil, nil
	select {
	case c.lost <- struct{}{}:
	default:
	}
}

// connectLocked makes a connection and puts what the client owns.
func (c *Client) connectLocked(ctx context.Context) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	if _, err := trusted(conn); err != nil {
		_ = conn.Close() // refused
		return err
	}
	c.conn, c.answers = conn, make(chan answer, 1)
	c.group.Add(1)
	go c.listen(conn, c.answers)
	for name, h := range c.held {
		err := c.putAgainLocked(ctx, name, h)
		if err == nil {
			continue
		}
		c.log.Error("keeper does not hold a descriptor", "name", name, "error", err)
		if c.conn == nil {
			return err
		}
	}
	return nil
}

// putAgainLocked puts an entry after the connection was lost. Where the keeper is the
// same, it may not have seen yet that the old one has ended, and then it has the entry
// as nobody's.
func (c *Client) putAgainLocked(ctx context.Context, name string, h held) error {
	for deadline := time.Now().Add(ownedWait); ; {
		_, err := c.exchangeLocked(ctx, &message{kind: kindPut, name: name, state: h.state}, h.fd)
		if errors.Is(err, ErrExists) {
			var a answer
			if a, err = c.exchangeLocked(ctx, &message{kind: kindTake, name: name}, none); err == nil && a.fd != none {
				_ = unix.Close(a.fd) // we have one
			}
		}
		if !errors.Is(err, ErrOwned) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-c.stop:
			return err
		case <-time.After(dialEvery):
		}
	}
}

// dial reaches the keeper, and starts one when none listens.
func (c *Client) dial(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	started := false
	deadline := time.Now().Add(launchWait)
	for {
		conn, err := d.DialContext(ctx, "unixpacket", c.options.Socket)
		switch {
		case err == nil:
			return conn.(*net.UnixConn), nil
		case !refused(err):
			return nil, fmt.Errorf("keeper: %w", err)
		case len(c.options.Command) == 0:
			return nil, fmt.Errorf("%w at %s (start: ashlar fuse-keeper --socket %[2]s)", ErrAway, c.options.Socket)
		case !started:
			if err := Launch(c.options.Command); err != nil {
				return nil, err
			}
			started = true
		case time.Now().After(deadline):
			return nil, fmt.Errorf("%w at %s, though %s was started", ErrAway, c.options.Socket, c.options.Command[0])
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("keeper: %w", ctx.Err())
		case <-c.stop:
			return nil, fmt.Errorf("keeper: %w", net.ErrClosed)
		case <-time.After(dialEvery):
		}
	}
}

// listen ends with its connection.
func (c *Client) listen(conn *net.UnixConn, answers chan<- answer) {
	defer c.group.Done()
	buffer := make([]byte, messageMax+1)
	for {
		var a answer
		var err error
		if a.fd, err = receive(conn, buffer, &a.message); err != nil {
			break
		}
		answers <- a
	}
	close(answers)
	select {
	case c.lost <- struct{}{}:
	default:
	}
}

// restore has a keeper again when the connection has ended by itself. It ends on Close.
func (c *Client) restore() {
	defer c.group.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c.group.Add(1)
	go func() { // ends on Close, or with the one above
		defer c.group.Done()
		select {
		case <-c.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	wait := restoreWait
	for {
		select {
		case <-c.stop:
			return
		case <-c.lost:
		}
		c.mu.Lock()
		var err error
		if !c.closed && c.goneLocked() {
			c.dropLocked()
			err = c.connectLocked(ctx)
		}
		count := len(c.held)
		c.mu.Unlock()
		if err == nil {
			wait = restoreWait
			continue
		}
		c.log.Warn("keeper is away: devices do not survive this process until it is back", "entries", count, "error", err)
		select {
		case <-c.stop:
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, restoreMost)
		select {
		case c.lost <- struct{}{}:
		default:
		}
	}
}

// goneLocked tells whether the connection has ended. No call is under way.
func (c *Client) goneLocked() bool {
	if c.conn == nil {
		return len(c.held) > 0
	}
	select {
	case a, ok := <-c.answers:
		if ok && a.fd != none {
			_ = unix.Close(a.fd) // nobody asked
		}
		return !ok
	default:
		return false
	}
}
