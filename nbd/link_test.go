package nbd

import (
	"errors"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// linkRig is a link on the server's reactor, driven from the test.
type linkRig struct {
	t       *testing.T
	link    *Link
	reactor *reactor.Reactor
	dead    chan error
}

func (rig *serverRig) link(options Options) *linkRig {
	t := rig.t.(*testing.T)
	t.Helper()
	l, err := DialLink(t.Context(), "unix", rig.address, options)
	if err != nil {
		t.Fatal(err)
	}
	k := &linkRig{t: t, link: l, reactor: rig.reactors[0], dead: make(chan error, 1)}
	k.run(func() {
		if err := l.Start(k.reactor, func(err error) { k.dead <- err }); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		k.run(l.Close)
		l.Wait()
	})
	return k
}

func (k *linkRig) run(f func()) {
	k.t.Helper()
	if err := k.reactor.Run(func(*reactor.Reactor) { f() }); err != nil && !errors.Is(err, reactor.ErrStopped) {
		k.t.Fatal(err)
	}
}

// do submits requests at once and waits for all of them.
func (k *linkRig) do(requests ...*LinkRequest) {
	k.t.Helper()
	ended := make(chan struct{}, len(requests))
	for _, r := range requests {
		r.Done = func(*LinkRequest) { ended <- struct{}{} }
	}
	k.run(func() {
		for _, r := range requests {
			k.link.Submit(r)
		}
	})
	for range requests {
		select {
		case <-ended:
		case <-time.After(serverWait):
			k.t.Fatalf("a request did not end in %v", serverWait)
		}
	}
}

func TestLinkKeepsMoreRequestsThanItsDepth(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	k := rig.link(Options{Depth: 2})
	var requests []*LinkRequest
	for i := range 64 {
		requests = append(requests, &LinkRequest{Command: CommandWrite, Offset: uint64(i) * 4096, Length: 4096, Buf: make([]byte, 4096)})
		requests[i].Buf[0] = byte(i)
	}
	k.do(requests...)
	for i, r := range requests {
		if r.Errno != ErrnoOK {
			t.Fatalf("write %d: %d", i, r.Errno)
		}
		r.Command = CommandRead
		clear(r.Buf)
	}
	k.do(requests...)
	for i, r := range requests {
		if r.Errno != ErrnoOK || r.Buf[0] != byte(i) {
			t.Fatalf("read %d: %d, byte %d", i, r.Errno, r.Buf[0])
		}
	}
	hole := &LinkRequest{Command: CommandRead, Offset: 64 * 4096, Length: 4096, Buf: make([]byte, 4096)}
	if k.do(hole); !hole.Zero {
		t.Error("a hole was not reported as zeros")
	}
}

func TestLinkDiesOnceAndSaysWhy(t *testing.T) {
	rig := startServer(t, serverSetup{reactors: 2}, &Export{Device: memory(t, 1<<20)})
	k := rig.link(Options{})
	k.do(&LinkRequest{Command: CommandFlush})
	k.run(func() { k.link.decodeGarbage() })
	select {
	case err := <-k.dead:
		if broken := new(ViolationError); !errors.As(err, &broken) {
			t.Errorf("died of %v", err)
		}
	case <-time.After(serverWait):
		t.Fatal("lives on")
	}
	k.run(func() {
		k.link.Submit(&LinkRequest{Command: CommandFlush, Done: func(*LinkRequest) { t.Error("ended on a dead link") }})
	})
	k.run(k.link.Cut) // again
}

// decodeGarbage behaves as if the server had sent what no reply begins with.
func (l *Link) decodeGarbage() {
	l.rxStart, l.rxEnd = 0, copy(l.rx, "HTTP/1.1 400 Bad Request")
	if err := l.decode(); err != nil {
		l.die(err)
	}
}

func TestLinkSeesTheServerLeave(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	other, err := reactor.Start(reactor.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Stop()
	l, err := DialLink(t.Context(), "unix", rig.address, Options{})
	if err != nil {
		t.Fatal(err)
	}
	dead := make(chan error, 1)
	_ = other.Run(func(r *reactor.Reactor) { err = l.Start(r, func(err error) { dead <- err }) }) // it runs
	if err != nil {
		t.Fatal(err)
	}
	rig.stop()
	if err := <-dead; !errors.Is(err, ErrServerLeft) {
		t.Errorf("died of %v", err)
	}
	l.Wait()
}
