package remote

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd"
)

// remoteWait ends a test that waits for something which does not come.
const remoteWait = 30 * time.Second

// node is a server that can be stopped and started again at the same address, with
// another device behind it.
type node struct {
	t       *testing.T
	address string
	config  nbd.ServerConfig

	mu       sync.Mutex
	server   *nbd.Server
	reactors []*reactor.Reactor
	ended    chan error

	closers []func() error // of what is behind it, when it has stopped for good
}

// newNode makes a node that does not run yet.
func newNode(t *testing.T) *node {
	t.Helper()
	testenv.CheckFDs(t)
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	n := &node{t: t, address: filepath.Join(t.TempDir(), "nbd.sock")}
	t.Cleanup(func() {
		n.kill()
		for _, closer := range n.closers {
			if err := closer(); err != nil {
				t.Error(err)
			}
		}
	})
	return n
}

func (n *node) uri() string { return "nbd+unix:///?socket=" + n.address }

// start serves d as the default export.
func (n *node) start(d datapath.Device) {
	n.t.Helper()
	l, err := net.Listen("unix", n.address)
	if err != nil {
		n.t.Fatal(err)
	}
	r, err := reactor.Start(reactor.Config{Name: "server", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		n.t.Fatal(err)
	}
	c := n.config
	c.Reactors, c.Log, c.Exports = []*reactor.Reactor{r}, slog.New(slog.DiscardHandler), &nbd.ExportSet{}
	if err := c.Exports.Add(&nbd.Export{Device: datapath.Checked(d)}); err != nil {
		n.t.Fatal(err)
	}
	s, err := nbd.NewServer(c)
	if err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }() // ends with Shutdown
	n.mu.Lock()
	n.server, n.reactors, n.ended = s, c.Reactors, ended
	n.mu.Unlock()
}

// stop drains the server, as a restart by hand does.
func (n *node) stop() { n.end(remoteWait) }

// kill cuts the server off its clients at once.
func (n *node) kill() { n.end(0) }

func (n *node) end(patience time.Duration) {
	n.mu.Lock()
	s, reactors, ended := n.server, n.reactors, n.ended
	n.server, n.reactors = nil, nil
	n.mu.Unlock()
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_ = s.Shutdown(ctx) // a kill has it fail
	if err := <-ended; !errors.Is(err, nbd.ErrServerClosed) {
		n.t.Errorf("Serve: %v", err)
	}
	for _, r := range reactors {
		r.Stop()
	}
}

// memory is a device in memory, closed when the node has ended.
func (n *node) memory(c memdev.Config) *memdev.Device {
	n.t.Helper()
	d, err := memdev.New(c)
	if err != nil {
		n.t.Fatal(err)
	}
	n.closers = append(n.closers, d.Close)
	return d
}

// open opens a remote device and closes it at the end of the test.
func open(t *testing.T, c Config) *Device {
	t.Helper()
	d := openUnclosed(t, c)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(remoteWait); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen in %v: %s", remoteWait, what)
		}
	}
}

// reach waits until d is in a condition.
func reach(t *testing.T, d *Device, want Condition) State {
	t.Helper()
	eventually(t, string(want), func() bool { return d.State().Condition == want })
	return d.State()
}

// proxy carries connections to a server and cuts them where it is told to.
type proxy struct {
	t        *testing.T
	listener net.Listener
	target   string
	group    sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool // guarded by mu
	// Bytes that the next connection may carry before it is cut, in each direction;
	// negative: no limit. Guarded by mu.
	up, down int
	cuts     int // guarded by mu
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "proxy.sock"))
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, listener: l, target: target, conns: map[net.Conn]bool{}, up: -1, down: -1}
	p.group.Add(1)
	go p.serve() // ends with the listener
	t.Cleanup(func() {
		_ = l.Close() // ends serve
		p.cut()
		p.group.Wait()
	})
	return p
}

func (p *proxy) uri() string { return "nbd+unix:///?socket=" + p.listener.Addr().String() }

func (p *proxy) serve() {
	defer p.group.Done()
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("unix", p.target)
		if err != nil {
			_ = client.Close() // the client tries again
			continue
		}
		p.mu.Lock()
		p.conns[client], p.conns[server] = true, true
		up, down := p.up, p.down
		p.up, p.down = -1, -1
		p.mu.Unlock()
		p.group.Add(2)
		go p.carry(server, client, up)   // ends with either side
		go p.carry(client, server, down) // likewise
	}
}

// carry copies until limit bytes have gone, then cuts both sides.
func (p *proxy) carry(to, from net.Conn, limit int) {
	defer p.group.Done()
	var err error
	if limit < 0 {
		_, err = io.Copy(to, from)
	} else {
		_, err = io.CopyN(to, from, int64(limit))
	}
	if limit >= 0 && err == nil {
		p.mu.Lock()
		p.cuts++
		p.mu.Unlock()
	}
	_, _ = to.Close(), from.Close() // the other direction ends with it
	p.mu.Lock()
	delete(p.conns, to)
	delete(p.conns, from)
	p.mu.Unlock()
}

// limit says what the next connection may carry.
func (p *proxy) limit(up, down int) {
	p.mu.Lock()
	p.up, p.down = up, down
	p.mu.Unlock()
}

func (p *proxy) cutCount() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cuts
}

// cut drops every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close() // carry ends
	}
}

// openUnclosed is open for a device that somebody else closes.
func openUnclosed(t *testing.T, c Config) *Device {
	t.Helper()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.resend == 0 {
		c.resend = time.Millisecond // the servers of these tests end with their connections
	}
	d, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// dropSession has the device lose its connections.
func (d *Device) dropSession(why string) {
	_ = d.reactor.Run(func(*reactor.Reactor) { d.core.lost(errors.New(why)) }) // it runs until Close
}
