package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// shutdown begins to shut the server down; the channel tells when it has.
func (rig *serverRig) shutdown(ctx context.Context) <-chan error {
	done := make(chan error, 1)
	go func() { done <- rig.server.Shutdown(ctx) }() // ends with the server
	eventually(rig.t, "the server takes no more", func() bool { return rig.server.closed.Load() })
	return done
}

// refusing waits until every connection has been told to drain: the message lies
// in its reactor's mailbox before ours.
func (rig *serverRig) refusing() {
	rig.t.Helper()
	eventually(rig.t, "connections drain", func() bool {
		all := true
		rig.server.mu.Lock()
		list := make([]*conn, 0, len(rig.server.conns))
		for c := range rig.server.conns {
			list = append(list, c)
		}
		rig.server.mu.Unlock()
		for _, c := range list {
			if err := c.reactor.Run(func(*reactor.Reactor) { all = all && (c.refusing || c.dead) }); err != nil {
				rig.t.Fatal(err)
			}
		}
		return all
	})
}

func TestShutdownFinishesWhatIsInFlight(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		onModes(t, func(t *testing.T, mode Headers) {
			f := faulty(t, 8<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead, datapath.OpWrite}, Offset: 4096, Action: filter.FaultHang})
			rig := startServer(t, serverSetup{engine: engine}, &Export{Device: f})
			s := rig.openSession(mode, "")
			idle := rig.openSession(mode, "")
			s.queue(0, CommandRead, 4096, 2<<20, nil)
			s.queue(0, CommandWrite, 4096, 4096, make([]byte, 4096))
			s.push()
			eventually(t, "they reach the device", func() bool { return f.Hanging() >= 2 })
			// One whose payload is on its way is in flight, too.
			half := s.queue(0, CommandWrite, 8192, 4096, make([]byte, 4096))
			rest := s.out[len(s.out)-1000:]
			s.send(s.out[:len(s.out)-1000])
			s.out = nil
			eventually(t, "it is begun", func() bool { return rig.server.Stats().Totals.InFlight == 3 })

			done := rig.shutdown(t.Context())
			idle.expectClosed() // at once
			rig.refusing()
			late := s.queue(0, CommandRead, 0, 512, nil)
			lateWrite := s.queue(0, CommandWrite, 0, 512, make([]byte, 512))
			out := s.out
			s.out = nil
			s.send(append(rest, out...))
			if mode == HeadersSimple { // the kernel's client takes a refusal for an I/O error
				delete(s.pending, late.cookie)
				delete(s.pending, lateWrite.cookie)
			} else {
				s.wait(late)
				s.wait(lateWrite)
			}
			if mode != HeadersSimple && (late.errno != ErrnoShutdown || lateWrite.errno != ErrnoShutdown) {
				t.Errorf("late requests: %v, %v", late.errno, lateWrite.errno)
			}
			eventually(t, "the half write reaches the device", func() bool { return f.Hanging() >= 3 })
			if _, err := net.Dial("unix", rig.address); err == nil {
				t.Error("the server still listens")
			}
			f.Release()
			for len(s.pending) > 0 {
				if a := s.next(); a.done && a.errno != ErrnoOK {
					t.Errorf("command %d: %v", a.command, a.errno)
				}
			}
			if !half.done {
				t.Error("a write in flight was not answered")
			}
			s.expectClosed()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	})
}

func TestShutdownClosesIdleConnectionsQuickly(t *testing.T) {
	rig := startServer(t, serverSetup{reactors: 2}, &Export{Device: memory(t, 1<<20)})
	var sessions []*session
	for range 50 {
		sessions = append(sessions, rig.openSession(HeadersStructured, ""))
	}
	start := time.Now()
	rig.stop()
	if d := time.Since(start); d > 5*time.Second { // far below the 10 s of DrainTimeout
		t.Errorf("shutting down took %v", d)
	}
	for _, s := range sessions {
		s.expectClosed()
	}
}

func TestShutdownEndsNegotiations(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	silent, greeted := newRawConn(t, rig.connect()), rig.dial()
	silent.read(sizeGreeting)
	greeted.mustOption(optList, nil)
	half := rig.dial()
	half.send(appendOption(nil, optGo, rawInfo(""))[:10])
	start := time.Now()
	rig.stop()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("shutting down took %v", d)
	}
	for _, r := range []*rawConn{silent, greeted, half} {
		r.expectClosed()
	}
}

func TestShutdownEndsStalledTLSNegotiations(t *testing.T) {
	rig, _ := startTLSServer(t, TLSForced, ServerConfig{})
	r := rig.dial()
	r.mustOption(optStartTLS, nil)
	start := time.Now()
	rig.stop()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("shutting down took %v", d)
	}
	r.expectClosed()
}

// TestShutdownCutsWhoDoesNotEnd: by its own timeout, or when the caller's context
// ends. What is at the device still runs to its end first.
func TestShutdownCutsWhoDoesNotEnd(t *testing.T) {
	for name, c := range map[string]struct {
		drain time.Duration
		ctx   time.Duration
	}{"timeout": {50 * time.Millisecond, serverWait}, "context": {serverWait, 50 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Action: filter.FaultHang})
			rig := startServer(t, serverSetup{config: ServerConfig{DrainTimeout: c.drain}}, &Export{Device: f})
			s := rig.openSession(HeadersStructured, "")
			s.queue(0, CommandRead, 0, 4096, nil)
			s.push()
			stuck := rig.openSession(HeadersStructured, "")
			stuck.send(appendRequest(nil, false, 0, CommandWrite, 1, 0, 4096)) // and no payload
			lazy := rig.openSession(HeadersStructured, "")
			eventually(t, "the read hangs", func() bool { return f.Hanging() == 1 })
			ctx, cancel := context.WithTimeout(t.Context(), c.ctx)
			defer cancel()
			done := rig.shutdown(ctx)
			lazy.expectClosed()
			stuck.expectClosed()
			s.expectClosed()
			select {
			case <-done:
				t.Error("the server has stopped while a request is at the device")
			case <-time.After(50 * time.Millisecond): // time in which it could have
			}
			f.Release()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestShutdownUnderLoad(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		for range 2 {
			d := filter.NewDelay(memory(t, 8<<20), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{datapath.OpRead: {Jitter: time.Millisecond}}})
			rig := startServer(t, serverSetup{engine: engine, reactors: 2}, &Export{Device: d})
			ended := make(chan error)
			const clients = 4
			for i := range clients {
				s := rig.openSession(sessionModes[1+i%2], "", ContextAllocation)
				for i := range 1000 {
					s.queue(0, CommandRead, 0, uint64(512+i%100*100), nil)
					s.queue(0, CommandBlockStatus, 0, 4096, nil)
					s.queue(0, CommandWrite, 0, 4096, make([]byte, 4096))
				}
				go func() { _, _ = s.conn.Write(s.out) }() // ends when the server closes
				go func() {                                // likewise
					_, err := io.Copy(io.Discard, s.in)
					ended <- err
				}()
			}
			eventually(t, "requests are served", func() bool { return rig.server.Stats().Totals.Requests[datapath.OpRead] > 50 })
			done := rig.shutdown(t.Context())
			for range clients {
				if err := <-ended; errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("a client was not told of the end")
				}
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			rig.stop()
		}
	})
}

func TestServeAfterShutdown(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	rig.stop()
	l, err := net.Listen("unix", rig.address+"2")
	if err != nil {
		t.Fatal(err)
	}
	if err := rig.server.Serve(l); err != ErrServerClosed {
		t.Errorf("Serve: %v", err)
	}
	client, server := net.Pipe()
	if err := rig.server.ServeConn(server); err != ErrServerClosed {
		t.Errorf("ServeConn: %v", err)
	}
	if _, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a refused connection: %v", err)
	}
	if err := rig.server.Shutdown(t.Context()); err != nil {
		t.Errorf("a second Shutdown: %v", err)
	}
}
