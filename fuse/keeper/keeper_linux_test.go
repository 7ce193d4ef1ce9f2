package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const wait = 30 * time.Second // for one step, on a loaded machine

// Variables that make the test binary a keeper at a socket that ends when idle, and a
// program that connects to one.
const (
	keepVariable = "ASHLAR_KEEPER_TEST_KEEP"
	dialVariable = "ASHLAR_KEEPER_TEST_DIAL"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(keepVariable); socket != "" {
		s, err := Start(Config{Socket: socket, Idle: 100 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
		if err == nil {
			err = s.Run(nil)
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if socket := os.Getenv(dialVariable); socket != "" {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		_, err := Open(ctx, Options{Socket: socket})
		fmt.Println(err)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	t.Cleanup(cancel)
	return ctx
}

func startServer(t testing.TB, socket string) *Server {
	t.Helper()
	s, err := Start(Config{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // a test may have
	return s
}

func open(t testing.TB, socket string) *Client {
	t.Helper()
	c, err := Open(within(t), Options{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func socketPath(t testing.TB) string { return filepath.Join(t.TempDir(), "run", "keeper") }

// token is a descriptor that can be told from others: a file with a text in it.
func token(t testing.TB, text string) int {
	t.Helper()
	fd, err := unix.MemfdCreate(text, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if _, err := unix.Pwrite(fd, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
	return fd
}

func content(t testing.TB, fd int) string {
	t.Helper()
	var b [100]byte
	n, err := unix.Pread(fd, b[:], 0)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(wait); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", wait, what)
		}
	}
}

func check(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || (want == nil && err != nil) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func TestEntriesAreKeptForTheNextOwner(t *testing.T) {
	testenv.CheckFDs(t)
	socket := socketPath(t)
	startServer(t, socket)
	ctx := within(t)
	a := open(t, socket)
	check(t, a.Put(ctx, "one", []byte("state"), token(t, "first")), nil)
	check(t, a.Put(ctx, "two", nil, token(t, "second")), nil)

	b := open(t, socket)
	_, _, err := b.Take(ctx, "one")
	check(t, err, ErrOwned)
	if !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("%v does not name the owner", err)
	}
	check(t, b.Put(ctx, "one", nil, token(t, "x")), ErrOwned)
	check(t, b.Remove(ctx, "one"), ErrOwned)
	_, _, err = b.Take(ctx, "three")
	check(t, err, ErrNotFound)
	check(t, b.Remove(ctx, "three"), nil)
	check(t, b.Release(ctx, "three"), nil)

	check(t, a.Put(ctx, "one", []byte("newer"), token(t, "third")), nil) // its own
	_, _, err = a.Take(ctx, "one")
	check(t, err, ErrOwned)
	list, err := b.List(ctx)
	check(t, err, nil)
	if len(list) != 2 || list[0].Name != "one" || string(list[0].State) != "newer" || !list[0].Owned || list[0].PID != os.Getpid() || list[1].Name != "two" {
		t.Errorf("list %+v", list)
	}

	check(t, a.Release(ctx, "two"), nil)
	check(t, b.Put(ctx, "two", nil, token(t, "x")), ErrExists)
	check(t, b.Remove(ctx, "two"), nil)
	_, _, err = b.Take(ctx, "two")
	check(t, err, ErrNotFound)

	check(t, a.Close(), nil) // as the end of its process does
	var state []byte
	var fd int
	eventually(t, "the entry is free", func() bool {
		state, fd, err = b.Take(ctx, "one")
		return !errors.Is(err, ErrOwned)
	})
	check(t, err, nil)
	if string(state) != "newer" || content(t, fd) != "third" {
		t.Errorf("state %q, content %q", state, content(t, fd))
	}
	_ = unix.Close(fd)
	check(t, b.Remove(ctx, "one"), nil)
	if _, err := a.List(ctx); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed client: %v", err)
	}
	check(t, a.Close(), nil)
	check(t, b.Close(), nil)
}

func TestClientRefusesWhatIsTooLong(t *testing.T) {
	socket := socketPath(t)
	startServer(t, socket)
	c := open(t, socket)
	ctx := within(t)
	fd := token(t, "x")
	for _, tt := range []struct {
		name  string
		state []byte
		fd    int
	}{
		{"", nil, fd}, {strings.Repeat("n", NameMax+1), nil, fd}, {"n", make([]byte, StateMax+1), fd}, {"n", nil, -1},
	} {
		if err := c.Put(ctx, tt.name, tt.state, tt.fd); err == nil {
			t.Errorf("name of %d, state of %d, descriptor %d: no error", len(tt.name), len(tt.state), tt.fd)
		}
	}
	check(t, c.Put(ctx, strings.Repeat("n", NameMax), make([]byte, StateMax), fd), nil)
}

func TestFullKeeperRefuses(t *testing.T) {
	s := startServer(t, socketPath(t))
	s.mu.Lock()
	for i := range EntriesMax {
		s.entries[fmt.Sprint(i)] = &entry{fd: none}
	}
	fd, err := unix.Dup(token(t, "x"))
	check(t, err, nil)
	m := message{kind: kindPut, name: "one more"}
	s.mu.Unlock()
	if answer, _ := s.handle(nil, 1, &m, fd); answer.code != codeFull {
		t.Errorf("code %d", answer.code)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the refused descriptor is open: %v", err)
	}
	s.mu.Lock()
	clear(s.entries)
	s.mu.Unlock()
}

// dial connects without a client.
func dial(t testing.TB, socket string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestServerAnswersOrEndsOnWhatIsNoMessage(t *testing.T) {
	testenv.CheckFDs(t)
	socket := socketPath(t)
	startServer(t, socket)
	one := token(t, "x")
	good := (&message{kind: kindTake, name: "n"}).encode()
	other := append([]byte(nil), good...)
	other[0] = version + 1
	for name, tt := range map[string]struct {
		bytes  []byte
		fds    []int
		answer code // codeEnd: the connection ends
	}{
		"another version":    {other, nil, codeEnd},
		"too short":          {good[:5], nil, codeEnd},
		"too long":           {append(good, make([]byte, messageMax)...), nil, codeEnd},
		"two descriptors":    {good, []int{one, one}, codeEnd},
		"many descriptors":   {good, slicesRepeat(one, 40), codeEnd},
		"no name":            {(&message{kind: kindTake}).encode(), nil, codeInvalid},
		"put of no name":     {(&message{kind: kindPut}).encode(), []int{one}, codeInvalid},
		"put of nothing":     {(&message{kind: kindPut, name: "n"}).encode(), nil, codeInvalid},
		"an answer":          {(&message{kind: kindAnswer, name: "n"}).encode(), nil, codeInvalid},
		"a take with a gift": {good, []int{one}, codeNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, socket)
			var rights []byte
			if tt.fds != nil {
				rights = unix.UnixRights(tt.fds...)
			}
			if _, _, err := c.WriteMsgUnix(tt.bytes, rights, nil); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(wait))
			var m message
			_, err := receive(c, make([]byte, messageMax+1), &m)
			if tt.answer == codeEnd {
				if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("%v, %+v; want the end", err, m)
				}
			} else if err != nil || m.code != tt.answer {
				t.Errorf("%v, %+v; want code %d", err, m, tt.answer)
			}
			_ = c.Close()
		})
	}
}

func slicesRepeat(fd, n int) (list []int) {
	for range n {
		list = append(list, fd)
	}
	return list
}

func TestSecondKeeperIsRefusedAndADeadOnesSocketReplaced(t *testing.T) {
	socket := socketPath(t)
	s := startServer(t, socket)
	if _, err := Start(Config{Socket: socket}); err == nil || !strings.Contains(err.Error(), "another keeper") {
		t.Errorf("a second keeper: %v", err)
	}
	check(t, s.Close(), nil)
	if err := os.WriteFile(socket, nil, 0o600); err != nil { // as a dead one leaves it
		t.Fatal(err)
	}
	startServer(t, socket)
	for name, bad := range map[string]string{
		"relative": "keeper", "no directory": "/proc/no/keeper", "too long": filepath.Join(t.TempDir(), strings.Repeat("x", 120)),
		"not a place for a lock": "/proc/keeper",
	} {
		if _, err := Start(Config{Socket: bad}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestClientPutsItsEntriesAgainWhenTheKeeperWasReplaced(t *testing.T) {
	testenv.CheckFDs(t)
	socket := socketPath(t)
	s := startServer(t, socket)
	c := open(t, socket)
	ctx := within(t)
	check(t, c.Put(ctx, "one", []byte("state"), token(t, "first")), nil)
	check(t, c.Put(ctx, "two", nil, token(t, "second")), nil)
	check(t, c.Remove(ctx, "two"), nil)
	check(t, s.Close(), nil)
	if _, err := c.List(ctx); !errors.Is(err, ErrAway) {
		t.Errorf("without a keeper: %v", err)
	}
	s = startServer(t, socket)
	eventually(t, "the entry is back, though nobody asked", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.entries) == 1 && s.entries["one"] != nil
	})
	check(t, c.Close(), nil)
	eventually(t, "the entry is free", func() bool { return s.waiting() == 1 })
	b := open(t, socket)
	_, fd, err := b.Take(ctx, "one")
	check(t, err, nil)
	if content(t, fd) != "first" {
		t.Error("another descriptor")
	}
	_ = unix.Close(fd)
	check(t, b.Close(), nil)
	check(t, s.Close(), nil)
}

func TestClientThatLostItsConnectionOwnsItsEntriesAgain(t *testing.T) {
	socket := socketPath(t)
	s := startServer(t, socket)
	c := open(t, socket)
	ctx := within(t)
	check(t, c.Put(ctx, "one", nil, token(t, "first")), nil)
	s.mu.Lock()
	for conn := range s.conns {
		_ = conn.Close() // the keeper lives
	}
	s.mu.Unlock()
	eventually(t, "the entry has an owner again", func() bool {
		list, err := c.List(ctx)
		return err == nil && len(list) == 1 && list[0].Owned
	})
}

func TestIdleKeeperEnds(t *testing.T) {
	socket := socketPath(t)
	s, err := Start(Config{Socket: socket, Idle: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	check(t, err, nil)
	done := make(chan error, 1)
	go func() { done <- s.Run(nil) }()
	c, err := Open(within(t), Options{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		check(t, <-done, nil) // a slow machine: it had ended
		return
	}
	check(t, c.Put(within(t), "one", nil, token(t, "x")), nil)
	check(t, c.Close(), nil)
	time.Sleep(100 * time.Millisecond)
	select {
	case <-done:
		t.Fatal("it ended with an entry")
	default:
	}
	c = open(t, socket)
	check(t, c.Remove(within(t), "one"), nil)
	check(t, c.Close(), nil)
	select {
	case err := <-done:
		check(t, err, nil)
	case <-time.After(wait):
		t.Fatal("it does not end")
	}
}

func TestStoppedKeeperWaitsForItsEntriesToBeTaken(t *testing.T) {
	socket := socketPath(t)
	s := startServer(t, socket)
	ctx := within(t)
	a := open(t, socket)
	check(t, a.Put(ctx, "one", nil, token(t, "x")), nil)
	check(t, a.Release(ctx, "one"), nil)
	stop := make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- s.Run(stop) }()
	stop <- struct{}{}
	time.Sleep(4 * lookInterval)
	_, fd, err := a.Take(ctx, "one") // it still serves
	check(t, err, nil)
	_ = unix.Close(fd)
	check(t, <-done, nil)

	socket = socketPath(t)
	s = startServer(t, socket)
	b := open(t, socket)
	check(t, b.Put(ctx, "one", nil, token(t, "x")), nil)
	check(t, b.Release(ctx, "one"), nil)
	go func() { done <- s.Run(stop) }()
	stop <- struct{}{}
	stop <- struct{}{} // does not wait
	check(t, <-done, nil)
}

func TestClientStartsAKeeperThatOutlivesIt(t *testing.T) {
	socket := socketPath(t)
	ctx := within(t)
	if _, err := Open(ctx, Options{Socket: socket}); !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "fuse-keeper --socket") {
		t.Errorf("nobody listens: %v", err)
	}
	if _, err := Open(ctx, Options{Socket: socket, Command: []string{"/no/such/program"}}); err == nil {
		t.Error("a program that is not there was started")
	}
	self, err := os.Executable()
	check(t, err, nil)
	o := Options{Socket: socket, Command: []string{"/usr/bin/env", keepVariable + "=" + socket, self}, Log: slog.New(slog.DiscardHandler)}
	c, err := Open(ctx, o)
	check(t, err, nil)
	check(t, c.Put(ctx, "one", nil, token(t, "x")), nil)
	pid := ownerOfSocket(t, c)
	if session, err := unix.Getsid(pid); err != nil || session != pid {
		t.Errorf("it is in session %d (%v), not one of its own", session, err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another keeper has the entry", func() bool {
		list, err := c.List(ctx)
		return err == nil && len(list) == 1 && ownerOfSocket(t, c) != pid
	})
	check(t, c.Remove(ctx, "one"), nil)
	check(t, c.Close(), nil)
	eventually(t, "it ends when idle", func() bool { _, err := os.Stat(socket); return errors.Is(err, os.ErrNotExist) })
	time.Sleep(10 * time.Millisecond) // for the goroutine that waits for it
}

func ownerOfSocket(t testing.TB, c *Client) int {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return 0
	}
	cred, err := peer(c.conn)
	if err != nil {
		return 0 // just ended
	}
	return int(cred.Pid)
}

func TestOpenRefusesAKeeperThatSpeaksSomethingElse(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "keeper")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	check(t, err, nil)
	defer func() { _ = l.Close() }()
	for _, says := range [][]byte{{version + 1, 1, 2, 3}, (&message{kind: kindAnswer, name: ""}).encode()} {
		done := make(chan struct{})
		go func() { // ends with the client's connections
			defer close(done)
			for range 2 { // it tries again
				c, err := l.AcceptUnix()
				if err != nil {
					return
				}
				_, _ = c.Read(make([]byte, messageMax))
				_, _ = c.Write(says)
				_ = c.Close()
				if says[0] == version {
					return
				}
			}
		}()
		if _, err := Open(within(t), Options{Socket: socket}); !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrAway) {
			t.Errorf("%v: %v", says, err)
		}
		<-done
	}
	if _, err := Open(within(t), Options{Socket: t.TempDir()}); err == nil {
		t.Error("a directory was taken for a socket")
	}
}

func TestSilentKeeperIsNotWaitedForPastTheContext(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "keeper")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	check(t, err, nil)
	defer func() { _ = l.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, Options{Socket: socket}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestStrangersAreRefused(t *testing.T) {
	testenv.RequireRoot(t)
	dir, err := os.MkdirTemp("/tmp", "ashlar-keeper-*") // where others may look
	check(t, err, nil)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755), nil)
	socket := filepath.Join(dir, "keeper")
	startServer(t, socket)
	self, err := os.ReadFile("/proc/self/exe")
	check(t, err, nil)
	program := filepath.Join(dir, "stranger")
	check(t, os.WriteFile(program, self, 0o755), nil)
	for _, mode := range []os.FileMode{0o600, 0o666} {
		check(t, os.Chmod(socket, mode), nil)
		c := exec.Command(program)
		c.Env = append(os.Environ(), dialVariable+"="+socket)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		c.Dir = "/"
		out, err := c.CombinedOutput()
		if err != nil || strings.Contains(string(out), "<nil>") || len(out) == 0 {
			t.Errorf("mode %v: %v, %s", mode, err, out)
		}
	}
}

func TestEntriesWhoseConnectionIsBrokenAreForgotten(t *testing.T) {
	socket := socketPath(t)
	s := startServer(t, socket)
	c := open(t, socket)
	ctx := within(t)
	var ends [2]int
	check(t, unix.Pipe2(ends[:], unix.O_CLOEXEC), nil)
	check(t, c.Put(ctx, "broken", nil, ends[1]), nil) // the end of a pipe for writing, without one for reading
	check(t, c.Put(ctx, "whole", nil, token(t, "x")), nil)
	_ = unix.Close(ends[0])
	_ = unix.Close(ends[1])
	s.sweepOnce()
	list, err := c.List(ctx)
	if err != nil || len(list) != 2 {
		t.Errorf("owned: %+v, %v", list, err)
	}
	check(t, c.Release(ctx, "broken"), nil)
	check(t, c.Release(ctx, "whole"), nil)
	s.sweepOnce()
	list, err = c.List(ctx)
	if err != nil || len(list) != 1 || list[0].Name != "whole" {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestSelfCommandIsThisProgram(t *testing.T) {
	command, err := SelfCommand("/run/x")
	check(t, err, nil)
	if _, err := os.Stat(command[0]); err != nil || strings.Join(command[1:], " ") != "fuse-keeper --socket /run/x --idle 1m" {
		t.Errorf("%q: %v", command, err)
	}
}

func FuzzMessage(f *testing.F) {
	f.Add((&message{kind: kindPut, name: "name", state: []byte("state")}).encode())
	f.Add((&message{kind: kindAnswer, code: codeOwned, owned: true, pid: 7}).encode())
	f.Add([]byte{version, 1, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message
		if m.decode(b) != nil {
			return
		}
		if got := m.encode(); string(got) != string(b) {
			t.Errorf("%x came back as %x", b, got)
		}
	})
}
