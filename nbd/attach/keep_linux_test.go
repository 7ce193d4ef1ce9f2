package attach

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// kept runs Keep; stop ends it and returns its error.
func kept(t *testing.T, d *Driver, index Index, c Config) (ended <-chan error, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Keep(ctx, index, c) }() // ends with ctx
	t.Cleanup(cancel)
	return done, cancel
}

func TestKeepReplacesConnectionsAtOnce(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	index := attached(t, d, s.config()).Index
	ended, stop := kept(t, d, index, s.config())
	k.tell(fakeNotice{index: index + 1}) // of no concern
	for _, n := range []int{1, 4, 2} {
		k.lose(index, n)
		eventually(t, "all connections live", func() bool { return k.alive(index) == 4 })
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if len(k.listeners) != 0 {
		t.Error("it still listens")
	}
}

func TestKeepFindsWhatDiedBefore(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	index := attached(t, d, s.config()).Index
	k.lose(index, 3) // nobody listens
	_, stop := kept(t, d, index, s.config())
	defer stop()
	eventually(t, "all connections live", func() bool { return k.alive(index) == 4 })
}

func TestKeepSurvivesLostNotices(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	index := attached(t, d, s.config()).Index
	ended, stop := kept(t, d, index, s.config())
	eventually(t, "the first look", func() bool { return k.count(commandReconfigure) == 1 })
	k.mu.Lock()
	listeners := k.listeners
	k.listeners = nil
	k.mu.Unlock()
	k.lose(index, 4) // nobody is told
	k.mu.Lock()
	k.listeners = listeners
	k.mu.Unlock()
	k.tell(fakeNotice{lost: true})
	eventually(t, "all connections live", func() bool { return k.alive(index) == 4 })
	stop()
	<-ended
}

func TestKeepWaitsForTheServer(t *testing.T) {
	for name, outage := range map[string]struct{ begin, end func(*fakeServer) }{
		"gone":       {func(s *fakeServer) { s.stop() }, func(s *fakeServer) { s.start() }},
		"not yet":    {func(s *fakeServer) { s.alter(func(s *fakeServer) { s.unknown = true }) }, func(s *fakeServer) { s.alter(func(s *fakeServer) { s.unknown = false }) }},
		"an old one": {func(s *fakeServer) { s.alter(func(s *fakeServer) { s.size /= 2 }) }, func(s *fakeServer) { s.alter(func(s *fakeServer) { s.size *= 2 }) }},
	} {
		t.Run(name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			s := newFakeServer(t)
			index := attached(t, d, s.config()).Index
			ended, stop := kept(t, d, index, s.config())
			eventually(t, "the first look", func() bool { return k.count(commandReconfigure) == 1 })
			outage.begin(s)
			k.lose(index, 4)
			time.Sleep(20 * time.Millisecond) // some tries
			if n := k.alive(index); n != 0 {
				t.Errorf("%d connections of nowhere", n)
			}
			outage.end(s)
			eventually(t, "all connections live", func() bool { return k.alive(index) == 4 })
			stop()
			<-ended
		})
	}
}

func TestKeepEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		cause func(*fakeKernel, *Driver, Index)
		want  error
	}{
		"when the device is detached": {func(_ *fakeKernel, d *Driver, index Index) {
			if err := d.Disconnect(context.Background(), index, DisconnectOptions{}); err != nil {
				panic(err)
			}
		}, ErrNotAttached},
		"without permission": {func(k *fakeKernel, _ *Driver, index Index) {
			k.mu.Lock()
			k.fail[commandReconfigure] = []error{unix.EPERM}
			k.mu.Unlock()
			k.lose(index, 1)
		}, ErrPermission},
		"without notices": {func(k *fakeKernel, _ *Driver, _ Index) { k.tell(fakeNotice{err: unix.EBADF}) }, unix.EBADF},
	} {
		t.Run(name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			s := newFakeServer(t)
			index := attached(t, d, s.config()).Index
			ended, _ := kept(t, d, index, s.config())
			eventually(t, "the first look", func() bool { return k.count(commandReconfigure) == 1 })
			tt.cause(k, d, index)
			if err := <-ended; !errors.Is(err, tt.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestKeepDoesNotBegin(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	if err := d.Keep(t.Context(), 0, s.config()); !errors.Is(err, ErrNotAttached) {
		t.Errorf("not attached: %v", err)
	}
	if err := d.Keep(t.Context(), 0, Config{}); err == nil {
		t.Error("without Dial")
	}
	k.silent = true
	if err := d.Keep(t.Context(), 0, s.config()); !errors.As(err, new(*KernelError)) {
		t.Errorf("no notices: %v", err)
	}
}

func TestBackoffDoublesToItsBound(t *testing.T) {
	p := pace{first: 5 * time.Millisecond, most: 500 * time.Millisecond}
	for failed, want := range map[int]time.Duration{1: 5, 2: 10, 3: 20, 7: 320, 8: 500, 9: 500, 1 << 20: 500} {
		if got := p.backoff(failed); got != want*time.Millisecond {
			t.Errorf("after %d: %v, want %v", failed, got, want*time.Millisecond)
		}
	}
}
