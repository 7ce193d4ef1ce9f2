package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

var binary = "../../bin/ashlar" // made absolute by TestMain

const (
	readyLimit = 10 * time.Second  // from start to the pid file
	stopLimit  = 20 * time.Second  // from SIGTERM to the end
	toolLimit  = 120 * time.Second // one run of somebody's tool
)

func TestMain(m *testing.M) {
	if path, err := filepath.Abs(binary); err == nil {
		binary = path
	}
	// The distribution's tools with the distribution's Python, whatever version
	// managers the user has in front of them.
	if err := os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:"+os.Getenv("PATH")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	os.Exit(m.Run())
}

// requireInterop skips t outside make interop.
func requireInterop(t *testing.T) {
	t.Helper()
	if os.Getenv("ASHLAR_INTEROP") != "1" {
		t.Skip("needs bin/ashlar and other people's NBD programs (make interop does not skip it)")
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v; make interop builds it", err)
	}
}

// server is a running bin/ashlar export.
type server struct {
	dir     string // short enough for a socket's path
	socket  string
	pidFile string
	uri     string // of the export without a name
	command *exec.Cmd
	log     *testenv.Output
	ended   chan struct{} // closed when the process has been waited for
	err     error         // of Wait; read after ended
}

// scratch makes a directory with a path short enough for unix sockets, on a file
// system that knows holes.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "ashlar-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // nothing of value
	return dir
}

// serve starts an export on a unix socket. The arguments follow "export
// --socket S --pid-file P".
func serve(t *testing.T, args ...string) *server {
	t.Helper()
	s := newServer(t)
	s.socket = filepath.Join(s.dir, "socket")
	s.uri = s.named("")
	s.start(t, append([]string{"--socket", s.socket}, args...)...)
	return s
}

// serveTCP starts an export on a free loopback port and returns host and port.
func serveTCP(t *testing.T, args ...string) (s *server, address string) {
	t.Helper()
	address = freeAddress(t)
	s = newServer(t)
	s.uri = "nbd://" + address
	s.start(t, append([]string{"--listen", address}, args...)...)
	return s, address
}

// freeAddress is a loopback address with a port nobody has.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil { // the port stays free for the moment it takes
		t.Fatal(err)
	}
	return l.Addr().String()
}

func newServer(t *testing.T) *server {
	t.Helper()
	dir := scratch(t)
	return &server{dir: dir, pidFile: filepath.Join(dir, "pid"), log: new(testenv.Output), ended: make(chan struct{})}
}

func (s *server) start(t *testing.T, args ...string) {
	t.Helper()
	s.command = exec.Command(binary, append([]string{"export", "--pid-file", s.pidFile, "--verbose"}, args...)...)
	s.launch(t)
}

// launch starts s.command, waits until it is ready and arranges its end.
func (s *server) launch(t *testing.T) {
	t.Helper()
	s.command.Stdout, s.command.Stderr = s.log, s.log
	if err := s.command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		s.err = s.command.Wait()
		close(s.ended)
	}()
	t.Cleanup(func() {
		s.stop(t)
		if t.Failed() {
			t.Logf("the server's output:\n%s", s.log)
		}
	})
	for deadline := time.Now().Add(readyLimit); ; time.Sleep(5 * time.Millisecond) {
		if text, err := os.ReadFile(s.pidFile); err == nil && len(text) > 0 {
			return
		}
		select {
		case <-s.ended:
			t.Fatalf("the server ended before it was ready: %v\n%s", s.err, s.log)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("no pid file after %v", readyLimit)
		}
	}
}

// stop ends the server with SIGTERM and wants it to end well. A second call
// does nothing.
func (s *server) stop(t *testing.T) {
	t.Helper()
	select {
	case <-s.ended:
		if s.err != nil {
			t.Errorf("the server ended with %v", s.err)
			s.err = nil
		}
		return
	default:
	}
	_ = s.command.Process.Signal(syscall.SIGTERM) // it may have ended just now
	select {
	case <-s.ended:
		if s.err != nil {
			t.Errorf("after SIGTERM the server ended with %v", s.err)
			s.err = nil
		}
	case <-time.After(stopLimit):
		t.Errorf("the server did not end within %v of SIGTERM", stopLimit)
		_ = s.command.Process.Kill() // it is ours and stuck
		<-s.ended
		s.err = nil
	}
}

// named is the URI of an export of s by name.
func (s *server) named(name string) string {
	return "nbd+unix:///" + url.PathEscape(name) + "?socket=" + s.socket
}

// tool runs a program and returns its standard output; a failure fails t.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var packages = map[string]string{
	"nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "nbdsh": "libnbd-bin", "python3": "python3-libnbd",
	"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "nbd-client": "nbd-client", "fio": "fio",
	"openssl": "openssl", "nbdkit": "nbdkit", "cmp": "diffutils", "sh": "dash", "go": "golang",
}

// try runs a program that is allowed to fail.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	path := name
	if !filepath.IsAbs(name) {
		path = testenv.RequireCommand(t, name, packages[name])
	}
	ctx, cancel := context.WithTimeout(t.Context(), toolLimit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(ctx, path, args...)
	command.Stdout, command.Stderr = &stdout, &stderr
	command.WaitDelay = time.Second
	err := command.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("no end within %v: %w", toolLimit, errors.Join(ctx.Err(), err))
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), err
}

// script runs a libnbd script of testdata and turns its lines into subtests.
func script(t *testing.T, name string, args ...string) {
	t.Helper()
	testenv.RequireCommand(t, "nbdsh", "libnbd-bin")
	if _, err := try(t, "python3", "-c", "import nbd"); err != nil {
		t.Fatalf("python3 cannot import nbd (Debian package python3-libnbd): %v", err)
	}
	out, err := try(t, "python3", append([]string{"-B", filepath.Join("testdata", name)}, args...)...)
	count := 0
	for line := range strings.Lines(out) {
		verdict, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		function, reason, _ := strings.Cut(rest, ": ")
		title, at, _ := strings.Cut(strings.TrimPrefix(function, "test_"), ", ")
		count++
		t.Run(title, func(t *testing.T) {
			switch verdict {
			case "ok":
			case "skip":
				t.Skip(reason)
			default:
				t.Errorf("%s %s: %s", name, at, reason)
			}
		})
	}
	if count == 0 || err != nil && !t.Failed() {
		t.Errorf("%d cases, then %v", count, err)
	}
}

// sparse makes an empty sparse file.
func sparse(t *testing.T, dir, name string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// patchwork makes a sparse file of which about half are islands of random bytes.
func patchwork(t *testing.T, dir, name string, size int64) string {
	t.Helper()
	path := sparse(t, dir, name, size)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()
	seed := [32]byte{1, 2, 3}
	source, chooser := rand.NewChaCha8(seed), rand.New(rand.NewPCG(1, 2))
	for offset := int64(0); offset < size; {
		length := min(int64(1+chooser.IntN(512))*4096, size-offset)
		if chooser.IntN(2) == 0 {
			if _, err := io.CopyN(io.NewOffsetWriter(f, offset), source, length); err != nil {
				t.Fatal(err)
			}
		}
		offset += length
	}
	return path
}

// same wants two files to hold the same bytes.
func same(t *testing.T, a, b string) {
	t.Helper()
	tool(t, "cmp", a, b)
}
