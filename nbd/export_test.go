package nbd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
)

// shelf is a resolver whose exports count how often their devices are opened.
type shelf struct {
	t      testing.TB
	stores map[string]*memdev.Store // immutable
	change func(*Export)            // immutable
	delay  time.Duration            // immutable; opening and closing takes this long

	open, opens, closes atomic.Int64
	overlap             atomic.Bool // a device was open twice
	fail                atomic.Pointer[error]
}

func newShelf(t testing.TB, names ...string) *shelf {
	t.Helper()
	s := &shelf{t: t, stores: map[string]*memdev.Store{}}
	for _, name := range names {
		store, err := memdev.NewStore(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := store.Close(); err != nil {
				t.Error(err)
			}
		})
		s.stores[name] = store
	}
	return s
}

type shelved struct {
	datapath.Device
	shelf *shelf
	once  sync.Once
}

func (d *shelved) Close() error {
	time.Sleep(d.shelf.delay)
	d.once.Do(func() { d.shelf.open.Add(-1) })
	d.shelf.closes.Add(1)
	return d.Device.Close()
}

func (s *shelf) Resolve(name string) (*Export, error) {
	if err := s.fail.Load(); err != nil {
		return nil, *err
	}
	name = strings.TrimPrefix(name, "alias-")
	if name == "" {
		name = "a"
	}
	store := s.stores[name]
	if store == nil {
		return nil, fmt.Errorf("%q: %w", name, ErrUnknownExport)
	}
	e := &Export{Name: name, Description: "on the shelf", Open: func() (datapath.Device, error) {
		time.Sleep(s.delay)
		if s.open.Add(1) > int64(len(s.stores)) {
			s.overlap.Store(true)
		}
		s.opens.Add(1)
		d, err := memdev.New(memdev.Config{Size: 1 << 20, Store: store})
		if err != nil {
			return nil, err
		}
		return &shelved{Device: datapath.Checked(d), shelf: s}, nil
	}}
	if s.change != nil {
		s.change(e)
	}
	return e, nil
}

func (s *shelf) List() []*Export {
	var list []*Export
	for name := range s.stores {
		e := &Export{Name: name, Description: "on the shelf", Open: func() (datapath.Device, error) { panic("a list opens nothing") }}
		if s.change != nil {
			s.change(e)
		}
		list = append(list, e)
	}
	return list
}

func (s *shelf) set() *ExportSet {
	set := &ExportSet{}
	set.SetResolver(s)
	return set
}

func (s *shelf) closed() {
	s.t.Helper()
	eventually(s.t, "devices are closed", func() bool { return s.open.Load() == 0 && s.opens.Load() == s.closes.Load() })
}

func TestResolvedExportOpensWithItsFirstConnectionAndClosesAfterItsLast(t *testing.T) {
	s := newShelf(t, "a", "b")
	rig := startServer(t, serverSetup{reactors: 2, config: ServerConfig{Exports: s.set()}})
	dial := func(name string) *Client {
		t.Helper()
		c, err := Dial(t.Context(), "unix", rig.address, Options{Export: name})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() }) // closed before, unless the test failed
		return c
	}
	first, second := dial("a"), dial("alias-a")
	if err := first.Write(t.Context(), []byte(strings.Repeat("x", 4096)), 4096, 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if err := second.Read(t.Context(), got, 4096, 0); err != nil || got[0] != 'x' {
		t.Errorf("the second connection reads %q, %v", got[:1], err)
	}
	other := dial("b")
	if opens, open := s.opens.Load(), s.open.Load(); opens != 2 || open != 2 {
		t.Errorf("opened %d times, %d open; want one device of each export", opens, open)
	}
	eventually(t, "the connections are counted", func() bool { // a moment after its client has been answered
		counts := rig.server.Connections()
		return counts["a"] == 2 && counts["b"] == 1
	})
	if err := errors.Join(first.Close(), other.Close()); err != nil {
		t.Error(err)
	}
	eventually(t, "the device of b is closed", func() bool { return s.open.Load() == 1 })
	if err := second.Read(t.Context(), got, 4096, 0); err != nil {
		t.Errorf("the last connection lost its device: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	s.closed()
	again := dial("a")
	if err := again.Read(t.Context(), got, 4096, 0); err != nil || got[0] != 'x' {
		t.Errorf("after reopening: %q, %v", got[:1], err)
	}
	rig.stop() // a device still in use is closed by the time Shutdown returns
	if open := s.open.Load(); open != 0 {
		t.Errorf("%d devices open after Shutdown", open)
	}
}

func TestResolvedExportsAreListedAndAskedAboutWithoutStayingOpen(t *testing.T) {
	s := newShelf(t, "a", "b")
	set := s.set()
	rig := startServer(t, serverSetup{config: ServerConfig{Exports: set}}, &Export{Name: "b", Description: "of the set", Device: memory(t, 1<<20)}, &Export{Name: "c", Device: memory(t, 1<<20)})
	list, err := List(t.Context(), "unix", rig.address, Options{})
	want := []ListedExport{{"a", "on the shelf"}, {"b", "of the set"}, {"c", ""}}
	if err != nil || !slices.Equal(list, want) {
		t.Errorf("%v, %v, want %v", list, err, want)
	}
	if opens := s.opens.Load(); opens != 0 {
		t.Errorf("listing opened %d devices", opens)
	}
	info, err := Info(t.Context(), "unix", rig.address, Options{Export: "a", MetaContexts: []string{ContextAllocation}})
	if err != nil || info.Size != 1<<20 || info.Name != "a" || len(info.Contexts) == 0 {
		t.Errorf("%+v, %v", info, err)
	}
	s.closed()
	if opens := s.opens.Load(); opens != 1 {
		t.Errorf("one handshake about one export opened its device %d times", opens)
	}
	if _, err := Info(t.Context(), "unix", rig.address, Options{Export: "nothing"}); err == nil {
		t.Error("an export nobody knows was found")
	}
	// Asked about in turn, in one handshake: one device at a time.
	c := rig.dial()
	for _, name := range []string{"a", "b", "a", "alias-a", "c", "a"} {
		request := append([]byte{0, 0, 0, byte(len(name))}, name...)
		c.mustOption(optInfo, append(request, 0, 0))
		if open := s.open.Load(); open > 1 {
			t.Errorf("%d devices open in one handshake", open)
		}
	}
	_ = c.conn.Close() // without a word
	s.closed()
}

func TestResolvedExportThatCannotBeOpenedIsRefusedAndTriedAgain(t *testing.T) {
	s := newShelf(t, "a")
	broken := errors.New("the pool is not open")
	s.fail.Store(&broken)
	rig := startServer(t, serverSetup{config: ServerConfig{Exports: s.set()}})
	if _, err := Dial(t.Context(), "unix", rig.address, Options{Export: "a"}); err == nil || !strings.Contains(err.Error(), "cannot be opened") {
		t.Errorf("%v", err)
	}
	s.fail.Store(nil)
	refuse := true
	s.change = func(e *Export) {
		if refuse {
			e.Open = func() (datapath.Device, error) { return nil, broken }
		}
	}
	if _, err := Dial(t.Context(), "unix", rig.address, Options{Export: "a"}); err == nil || !strings.Contains(err.Error(), "cannot be opened") {
		t.Errorf("%v", err)
	}
	if log := rig.log.String(); !strings.Contains(log, broken.Error()) {
		t.Errorf("the reason is not in the log:\n%s", log)
	}
	eventually(t, "the handshake has ended", func() bool { return rig.server.Stats().Negotiating == 0 })
	refuse = false
	c, err := Dial(t.Context(), "unix", rig.address, Options{Export: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	s.closed()
}

func TestResolvedExportForOthersIsNotOpened(t *testing.T) {
	s := newShelf(t, "a")
	s.change = func(e *Export) { e.ClientNames = []string{"somebody"} }
	rig := startServer(t, serverSetup{config: ServerConfig{Exports: s.set()}})
	if _, err := Dial(t.Context(), "unix", rig.address, Options{Export: "a"}); err == nil {
		t.Error("admitted without a certificate")
	}
	if opens := s.opens.Load(); opens != 0 {
		t.Errorf("opened %d times for one who may not have it", opens)
	}
}

func TestManyClientsOpenAndCloseOneResolvedExport(t *testing.T) {
	s := newShelf(t, "a")
	s.delay = time.Millisecond // so that opening, use and closing meet
	rig := startServer(t, serverSetup{reactors: 2, config: ServerConfig{Exports: s.set()}})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 15 {
				c, err := Dial(t.Context(), "unix", rig.address, Options{Export: "a"})
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(c.Read(t.Context(), make([]byte, 512), 0, 0), c.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	s.closed()
	if s.overlap.Load() {
		t.Error("the device was open twice at a time")
	}
}

func TestDisconnectEndsConnectionsOfSomeExports(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut=%v", cut), func(t *testing.T) {
			s := newShelf(t, "a", "b")
			rig := startServer(t, serverSetup{reactors: 2, config: ServerConfig{Exports: s.set()}})
			clients := map[string]*Client{}
			for _, name := range []string{"a", "b"} {
				c, err := Dial(t.Context(), "unix", rig.address, Options{Export: name})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = c.Close() }) // may be cut
				clients[name] = c
			}
			rig.connections(2)
			if n := rig.server.Disconnect(func(name string) bool { return name == "a" }, cut); n != 1 {
				t.Errorf("%d connections, want 1", n)
			}
			<-clients["a"].Done()
			eventually(t, "the device of a is closed", func() bool { return s.open.Load() == 1 })
			if err := clients["b"].Flush(t.Context()); err != nil {
				t.Errorf("the other connection: %v", err)
			}
		})
	}
}
