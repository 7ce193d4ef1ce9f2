package nbd

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// serverWait ends a test that waits for something which does not come. It is
// generous: it is waited for only when a test fails.
const serverWait = 20 * time.Second

// serverRig is a server with reactors of its own on a Unix socket.
type serverRig struct {
	t        testing.TB
	server   *Server
	reactors []*reactor.Reactor
	address  string // of the Unix socket
	log      *serverLog
	served   chan error // what Serve returned
	stopOnce sync.Once
}

// serverSetup says how a test wants its server. The zero value is one reactor of
// the engine that suits the host, and the defaults of ServerConfig.
type serverSetup struct {
	engine   reactor.EngineKind
	reactors int
	buffers  int64 // bytes of each reactor's arena
	bare     bool  // exports are not wrapped in datapath.Checked
	config   ServerConfig
}

// serverLog keeps what the server logs.
type serverLog struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (l *serverLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *serverLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// size and reset are for those who log without end.
func (l *serverLog) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Len()
}

func (l *serverLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Reset()
}

// startServer starts a server for exports and stops it at the end of the test,
// which fails when goroutines, descriptors or buffers are left, or an error was
// logged. The devices are closed then, too.
func startServer(t testing.TB, setup serverSetup, exports ...*Export) *serverRig {
	t.Helper()
	if _, fuzzing := t.(*testing.F); !fuzzing { // the fuzzer has goroutines and pipes of its own
		testenv.CheckFDs(t)
		before := goleak.IgnoreCurrent()
		t.Cleanup(func() { goleak.VerifyNone(t, before) })
	}
	if setup.engine == reactor.EngineRing {
		testenv.RequireIOURing(t)
	}
	rig := &serverRig{t: t, log: &serverLog{}, served: make(chan error, 1)}
	log := slog.New(slog.NewTextHandler(rig.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for range max(setup.reactors, 1) {
		r, err := reactor.Start(reactor.Config{Engine: setup.engine, BufferBytes: setup.buffers, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		rig.reactors = append(rig.reactors, r)
	}
	c := setup.config
	c.Reactors, c.Log = rig.reactors, log
	if c.Exports == nil {
		c.Exports = &ExportSet{}
	}
	for _, e := range exports {
		if !setup.bare {
			stats := filter.NewStats(datapath.Checked(e.Device), filter.StatsConfig{})
			t.Cleanup(func() { checkTimed(t, stats) }) // after the server has stopped
			e.Device = stats
		}
		if err := c.Exports.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if rig.server, err = NewServer(c); err != nil {
		t.Fatal(err)
	}
	rig.address = filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", rig.address)
	if err != nil {
		t.Fatal(err)
	}
	go func() { rig.served <- rig.server.Serve(l) }() // ends with Shutdown
	t.Cleanup(func() {
		for _, e := range exports {
			rig.release(e.Device) // a test that failed may have left requests that hang
		}
		rig.stop()
		for _, e := range exports {
			if err := e.Device.Close(); err != nil {
				t.Error(err)
			}
		}
		if s := rig.log.String(); strings.Contains(s, "level=ERROR") {
			t.Errorf("errors were logged:\n%s", s)
		}
	})
	return rig
}

// release lets go of what hangs at a device that fails by rules.
func (rig *serverRig) release(d datapath.Device) {
	for d != nil {
		if f, ok := d.(*filter.Fault); ok {
			if err := f.SetRules(nil); err != nil {
				rig.t.Error(err)
			}
			f.Release()
		}
		u, ok := d.(interface{ Unwrap() datapath.Device })
		if !ok {
			return
		}
		d = u.Unwrap()
	}
}

// stop shuts the server down and stops the reactors.
func (rig *serverRig) stop() {
	rig.stopOnce.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), serverWait)
		defer cancel()
		if err := rig.server.Shutdown(ctx); err != nil {
			rig.t.Error(err)
		}
		if err := <-rig.served; !errors.Is(err, ErrServerClosed) {
			rig.t.Errorf("Serve: %v", err)
		}
		for _, r := range rig.reactors {
			r.Stop()
		}
	})
}

// dial connects and greets as a client of fixed newstyle.
func (rig *serverRig) dial() *rawConn {
	rig.t.Helper()
	return rawDial(rig.t, "unix", rig.address, clientFixedNewstyle|clientNoZeroes)
}

// listenTCP has the server listen on a TCP port of this host, too.
func (rig *serverRig) listenTCP() (address string) {
	rig.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		rig.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- rig.server.Serve(l) }() // ends with Shutdown
	rig.t.Cleanup(func() {
		rig.stop()
		if err := <-ended; !errors.Is(err, ErrServerClosed) {
			rig.t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

// arenaUsed is how much of the first reactor's buffers is in use.
func (rig *serverRig) arenaUsed() (used int64) {
	rig.t.Helper()
	if err := rig.reactors[0].Run(func(r *reactor.Reactor) { used = r.Buffers().Used() }); err != nil {
		rig.t.Fatal(err)
	}
	return used
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(serverWait); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen in %v: %s", serverWait, what)
		}
	}
}

// connections waits until the server has as many connections in transmission.
func (rig *serverRig) connections(n int) {
	rig.t.Helper()
	eventually(rig.t, "the number of connections", func() bool { return rig.server.Stats().Connections == n })
}

// onEngines runs a test with each engine.
func onEngines(t *testing.T, test func(*testing.T, reactor.EngineKind)) {
	for _, engine := range []reactor.EngineKind{reactor.EngineRing, reactor.EngineEpoll} {
		t.Run(string(engine), func(t *testing.T) { test(t, engine) })
	}
}

// memory is a device in memory.
func memory(t testing.TB, size uint64) *memdev.Device {
	t.Helper()
	d, err := memdev.New(memdev.Config{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// faulty is a device that fails by rules, over one in memory.
func faulty(t testing.TB, size uint64, rules ...filter.FaultRule) *filter.Fault {
	t.Helper()
	f, err := filter.NewFault(memory(t, size), filter.FaultConfig{Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// describedDevice shows other information than the device below it has.
type describedDevice struct {
	datapath.Device
	change func(*datapath.Info)
}

// Unwrap is the device below.
func (d *describedDevice) Unwrap() datapath.Device { return d.Device }

// Info implements datapath.Device.
func (d *describedDevice) Info() datapath.Info {
	i := d.Device.Info()
	d.change(&i)
	return i
}
