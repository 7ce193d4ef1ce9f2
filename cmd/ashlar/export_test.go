package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd"
)

// wait ends a test that waits for something which does not come.
const wait = 20 * time.Second

// process is a running `ashlar export`.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	socket string
	stderr testenv.Output // what it has said so far
	ended  chan struct{}
	err    error // of the process; valid once ended is closed
}

// start starts a prepared command and kills it at the end of the test, if it
// still runs.
func start(t testing.TB, c *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: c, ended: make(chan struct{})}
	c.Stderr = &p.stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		p.err = c.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = c.Process.Kill() // may have ended
		<-p.ended
		if t.Failed() {
			t.Logf("standard error:\n%s", &p.stderr)
		}
	})
	return p
}

// export starts `ashlar export` on a socket and waits until it serves.
func export(t testing.TB, args ...string) *process {
	t.Helper()
	dir := t.TempDir()
	socket, pidFile := filepath.Join(dir, "nbd.sock"), filepath.Join(dir, "pid")
	p := start(t, command(t, append([]string{"export", "--socket", socket, "--pid-file", pidFile}, args...)...))
	p.socket = socket
	p.until("it serves", func() bool { _, err := os.Stat(pidFile); return err == nil })
	return p
}

func (p *process) until(what string, holds func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(wait); !holds(); time.Sleep(time.Millisecond) {
		select {
		case <-p.ended:
			p.t.Fatalf("%s: ashlar ended: %v\n%s", what, p.err, &p.stderr)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("did not happen in %v: %s", wait, what)
		}
	}
}

// code waits for the end of the process.
func (p *process) code() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(wait):
		p.t.Fatalf("ashlar does not end")
	}
	return exitCode(p.t, p.err)
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) dial(o nbd.Options) *nbd.Client {
	p.t.Helper()
	c, err := nbd.Dial(p.t.Context(), "unix", p.socket, o)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() }) // may be closed by the test, or have lost its server
	return c
}

func TestExportRefusesWhatItCannotServe(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	file, small := testenv.SparseFile(t, path("disk.img"), 1<<20), testenv.SparseFile(t, path("small"), 511)
	empty := testenv.SparseFile(t, path("empty"), 0)
	served := export(t, file) // holds the file and a socket
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }() // accepts nothing
	mem := func(args ...string) []string { return append([]string{"export", "--mem", "1MiB"}, args...) }
	on := func(args ...string) []string { return append([]string{"export", "--socket", path("s")}, args...) }
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"missing file", on(path("missing")), "missing"},
		{"missing file by name", on("a=" + path("missing")), "missing"},
		{"directory", on(dir), dir},
		{"file below a sector", on(small), "small"},
		{"empty file", on(empty), "empty"},
		{"file in use", on(file), "disk.img"},
		{"character device", on("/dev/null"), "/dev/null"},
		{"a name twice", on("a="+testenv.SparseFile(t, path("one"), 4096), "a="+testenv.SparseFile(t, path("two"), 4096)), "taken"},
		{"socket in use", mem("--socket", served.socket), "another server"},
		{"socket is a file", mem("--socket", small), "no socket"},
		{"socket without a directory", mem("--socket", path("no/where")), "no/where"},
		{"address in use", mem("--listen", taken.Addr().String()), "in use"},
		{"bad address", mem("--listen", "nonsense"), "nonsense"},
		{"every address in plain text", mem("--listen", "0.0.0.0:0"), "--insecure-plaintext"},
		{"every address in plain text, short", mem("--listen", ":0"), "--insecure-plaintext"},
		{"IPv6 in plain text", mem("--listen", "[::]:0"), "--insecure-plaintext"},
		{"metrics for everyone", mem("--socket", path("s"), "--metrics", "0.0.0.0:0"), "--metrics"},
		{"metrics on an address in use", mem("--socket", path("s"), "--metrics", taken.Addr().String()), "--metrics"},
		{"pid file without a directory", mem("--socket", path("s"), "--pid-file", path("no/where")), "pid file"},
		{"TLS without files", mem("--socket", path("s"), "--tls", "on", "--tls-cert", path("c"), "--tls-key", path("k")), "TLS certificate"},
		{"too few CPUs", mem("--socket", path("s"), "--pin", "0", "--reactors", "2"), "CPU"},
	} {
		code, _, stderr := ashlar(t, c.args...)
		if code != exitFailure || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, want %d\n%s", c.name, code, exitFailure, stderr)
		}
		if _, err := os.Lstat(path("s")); err == nil {
			t.Errorf("%s: the socket is left behind", c.name)
		}
	}
	if b, err := os.ReadFile(small); err != nil || len(b) != 511 {
		t.Errorf("a file in the place of the socket was touched: %d bytes, %v", len(b), err)
	}
	if err := served.dial(nbd.Options{}).Write(t.Context(), make([]byte, 512), 0, 0); err != nil {
		t.Errorf("the one that serves: %v", err)
	}
}

func TestExportReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	p := export(t, "--mem", "1MiB", "--socket", path)
	p.socket = path
	p.dial(nbd.Options{})
}

func TestExportListensOnOtherAddressesWhenTold(t *testing.T) {
	p := export(t, "--mem", "1MiB", "--listen", "0.0.0.0:0", "--insecure-plaintext")
	p.dial(nbd.Options{})
}

// TestSignalsDrain: the server ends with 0 and cleans up.
func TestSignalsDrain(t *testing.T) {
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		p := export(t, "--mem", "64MiB")
		pidFile := filepath.Join(filepath.Dir(p.socket), "pid")
		if b, err := os.ReadFile(pidFile); err != nil || string(b) != fmt.Sprintf("%d\n", p.cmd.Process.Pid) {
			t.Errorf("pid file: %q, %v", b, err)
		}
		idle, busy := p.dial(nbd.Options{}), p.dial(nbd.Options{})
		stopped := make(chan error, 1)
		go func() { // ends when the server refuses or closes
			buffer := make([]byte, 1<<20)
			for {
				if err := busy.Write(t.Context(), buffer, 0, 0); err != nil {
					stopped <- err
					return
				}
			}
		}()
		if err := idle.Write(t.Context(), make([]byte, 4096), 0, 0); err != nil {
			t.Fatal(err)
		}
		p.signal(s)
		if code := p.code(); code != 0 {
			t.Errorf("%v: exit code %d", s, code)
		}
		<-stopped
		<-idle.Done()
		for _, left := range []string{p.socket, pidFile} {
			if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left behind (%v)", left, err)
			}
		}
		if s := p.stderr.String(); s != "" {
			t.Errorf("it says:\n%s", s)
		}
	}
}

func TestRunEndsWithTheCodeOfItsCommand(t *testing.T) {
	for shell, want := range map[string]int{
		"true": 0, "exit 7": 7, "exit 255": 255, "kill -9 $$": 128 + 9, "kill -TERM $$": 128 + 15, "no-such-command": 127,
		`test -n "$uri" && test -S "$unixsocket"`:               0,
		`test -z "$` + mainVariable + `$LISTEN_FDS$LISTEN_PID"`: 0,
	} {
		if code, _, stderr := ashlar(t, "export", "--mem", "1MiB", "--run", shell); code != want {
			t.Errorf("%s: exit code %d, want %d\n%s", shell, code, want, stderr)
		}
	}
}

func TestRunNamesTheExportInItsURI(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string // a pattern
	}{
		{nil, `^nbd\+unix:///\?socket=/.*nbd\.sock$`},
		{[]string{"--name", "a b/c"}, `^nbd\+unix:///a(%20|\+)b(/|%2F)c\?socket=/.*nbd\.sock$`},
		{[]string{"--listen", "127.0.0.1:0"}, `^nbd://127\.0\.0\.1:[0-9]+/?$`},
		{[]string{"--listen", "[::1]:0", "--name", "x"}, `^nbd://\[::1\]:[0-9]+/x$`},
	} {
		code, stdout, stderr := ashlar(t, append([]string{"export", "--mem", "1MiB", "--run", `printf %s "$uri"`}, c.args...)...)
		if strings.Contains(stderr, "cannot assign requested address") {
			continue // no IPv6 here
		}
		if code != 0 || !regexp.MustCompile(c.want).MatchString(stdout) {
			t.Errorf("%q: exit code %d, uri %q, want %s\n%s", c.args, code, stdout, c.want, stderr)
			continue
		}
		if u, err := nbd.ParseURI(stdout); err != nil || len(c.args) == 2 && c.args[0] == "--name" && u.Export != c.args[1] {
			t.Errorf("%q becomes %+v, %v", stdout, u, err)
		}
	}
}

func TestRunLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	if code, _, stderr := ashlar(t, "export", "--mem", "1MiB", "--run", "true"); code != 0 {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// use writes and reads through a client, and says goodbye.
func use(t testing.TB, conn net.Conn) {
	t.Helper()
	c, err := nbd.NewClient(t.Context(), conn, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("word"), 50000)
	got := make([]byte, len(want))
	if err := errors.Join(c.Write(t.Context(), want, 1, nbd.CommandFlagFUA), c.Read(t.Context(), got, 1, 0), c.Close()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("data differ, or %v", err)
	}
}

func TestStdioOverASocketPair(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "theirs"), os.NewFile(uintptr(pair[1]), "ours")
	c := command(t, "export", "--mem", "1MiB", "--stdio")
	c.Stdin, c.Stdout = theirs, theirs
	p := start(t, c)
	_ = theirs.Close() // the process has it
	conn, err := net.FileConn(ours)
	_ = ours.Close() // FileConn has a duplicate
	if err != nil {
		t.Fatal(err)
	}
	use(t, conn)
	if code := p.code(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// pipes is the client's side of --stdio over two pipes.
type pipes struct{ in, out *os.File }

func (p *pipes) Read(b []byte) (int, error)         { return p.in.Read(b) }
func (p *pipes) Write(b []byte) (int, error)        { return p.out.Write(b) }
func (p *pipes) Close() error                       { return errors.Join(p.out.Close(), p.in.Close()) }
func (p *pipes) LocalAddr() net.Addr                { return &net.UnixAddr{Net: "unix"} }
func (p *pipes) RemoteAddr() net.Addr               { return &net.UnixAddr{Net: "unix"} }
func (p *pipes) SetReadDeadline(t time.Time) error  { return p.in.SetReadDeadline(t) }
func (p *pipes) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }
func (p *pipes) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// stdioPipes starts `ashlar export --stdio` between two pipes.
func stdioPipes(t testing.TB) (*process, *pipes) {
	t.Helper()
	theirIn, ourOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ourIn, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := command(t, "export", "--mem", "1MiB", "--stdio")
	c.Stdin, c.Stdout = theirIn, theirOut
	p := start(t, c)
	_, _ = theirIn.Close(), theirOut.Close() // the process has them
	client := &pipes{in: ourIn, out: ourOut}
	t.Cleanup(func() { _ = client.Close() }) // may be closed by the test
	return p, client
}

func TestStdioOverPipes(t *testing.T) {
	p, client := stdioPipes(t)
	use(t, client)
	if code := p.code(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestStdioEndsWithItsClient(t *testing.T) {
	for _, greeted := range []bool{false, true} {
		p, client := stdioPipes(t)
		if greeted {
			if _, err := nbd.NewClient(t.Context(), client, nbd.Options{}); err != nil {
				t.Fatal(err)
			}
		}
		_ = client.Close() // hangs up without a word
		if code := p.code(); code != 0 && (greeted || code != exitFailure) {
			t.Errorf("greeted %v: exit code %d", greeted, code)
		}
	}
}

// TestStdioDrainsOnSIGTERM although its client says nothing and stays.
func TestStdioDrainsOnSIGTERM(t *testing.T) {
	for _, greeted := range []bool{false, true} {
		p, client := stdioPipes(t)
		if greeted {
			if _, err := nbd.NewClient(t.Context(), client, nbd.Options{}); err != nil {
				t.Fatal(err)
			}
		} else if _, err := io.ReadFull(client, make([]byte, 18)); err != nil { // the greeting: it serves
			t.Fatal(err)
		}
		p.signal(syscall.SIGTERM)
		if code := p.code(); code != 0 {
			t.Errorf("greeted %v: exit code %d", greeted, code)
		}
	}
}

// TestListenFDs passes listening sockets as a service manager does.
func TestListenFDs(t *testing.T) {
	dir := t.TempDir()
	var files []*os.File
	var addresses []string
	for i := range 2 {
		l, err := net.Listen("unix", filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _, _ = f.Close(), l.Close() }() // the process has the socket
		files, addresses = append(files, f), append(addresses, l.Addr().String())
	}
	shell := func(variables, arguments string) *exec.Cmd {
		c := exec.CommandContext(t.Context(), "/bin/sh", "-c", variables+` exec "$0" export --mem 1MiB `+arguments, command(t).Path)
		c.Env = command(t).Env
		c.ExtraFiles = files
		return c
	}
	p := start(t, shell("LISTEN_PID=$$ LISTEN_FDS=2", ""))
	for _, address := range addresses {
		c, err := nbd.Dial(t.Context(), "unix", address, nbd.Options{}) // the socket listens already
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	p.signal(syscall.SIGTERM)
	if code := p.code(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if _, err := os.Stat(addresses[0]); err != nil {
		t.Errorf("a socket that is not ours is gone: %v", err)
	}
	// Those meant for another process are not touched.
	p = start(t, shell("LISTEN_PID=1 LISTEN_FDS=2", "--socket "+filepath.Join(dir, "own")))
	p.until("it listens", func() bool { _, err := os.Stat(filepath.Join(dir, "own")); return err == nil })
	p.signal(syscall.SIGTERM)
	if code := p.code(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, variables := range []string{"LISTEN_PID=$$ LISTEN_FDS=x", "LISTEN_PID=$$ LISTEN_FDS=1000", "LISTEN_PID=$$ LISTEN_FDS=-1", "LISTEN_PID=$$ LISTEN_FDS=3"} {
		p := start(t, shell(variables, ""))
		if code := p.code(); code != exitFailure || !strings.Contains(p.stderr.String(), "LISTEN_FDS") {
			t.Errorf("%s: exit code %d\n%s", variables, code, &p.stderr)
		}
	}
}

// freePort is a TCP port nobody listens on just now.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // to be used by another
	return l.Addr().String()
}

func get(t testing.TB, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }() // read
	b, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", url, response.Status, err)
	}
	return string(b)
}

// TestSlowRequestsOfAnExport: what takes long is logged with where the time went, and
// counted.
func TestSlowRequestsOfAnExport(t *testing.T) {
	address := freePort(t)
	p := export(t, "--mem", "1MiB", "--metrics", address, "--delay", "20ms", "--slow-io", "10ms")
	c := p.dial(nbd.Options{})
	if err := c.Write(t.Context(), make([]byte, 4096), 8192, 0); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second) // it is written beside the data path
	for {
		text := get(t, "http://"+address+"/metrics")
		if strings.Contains(text, `export_slow_requests_total{export="",op="write"} 1`) && strings.Contains(text, "export_slow_request_threshold_seconds 0.01") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(text)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	log := p.stderr.String()
	for _, want := range []string{"slow request", "op=write offset=8192 length=4096", "stages.receive=", "stages.reply="} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %s:\n%s", want, log)
		}
	}
}

func TestMetrics(t *testing.T) {
	address := freePort(t)
	p := export(t, "--mem", "1MiB", "--metrics", address)
	c := p.dial(nbd.Options{})
	if err := errors.Join(c.Write(t.Context(), make([]byte, 5000), 0, 0), c.Read(t.Context(), make([]byte, 3000), 0, 0), c.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := get(t, "http://"+address+"/healthz"); got != "ok\n" {
		t.Errorf("healthz: %q", got)
	}
	if got := get(t, "http://"+address+"/debug/pprof/"); !strings.Contains(got, "goroutine") {
		t.Errorf("pprof: %q", got)
	}
	text := get(t, "http://"+address+"/metrics")
	help, kind := map[string]bool{}, map[string]string{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "# HELP "):
			help[f[2]] = len(f) > 3
		case strings.HasPrefix(line, "# TYPE "):
			kind[f[2]] = f[3]
		default:
			name, _, _ := strings.Cut(f[0], "{")
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				if whole := strings.TrimSuffix(name, part); kind[whole] == "histogram" {
					name = whole
				}
			}
			if !strings.HasPrefix(name, "nbd_") && !strings.HasPrefix(name, "reactor_") {
				continue // the runtime's
			}
			if !help[name] || kind[name] == "" {
				t.Errorf("%s has no HELP or no TYPE", name)
			}
			if (kind[name] == "counter") != strings.HasSuffix(name, "_total") {
				t.Errorf("%s is a %s", name, kind[name])
			}
		}
	}
	for _, want := range []string{
		`nbd_requests_total{op="write"} 1`, `nbd_requests_total{op="read"} 1`, `nbd_requests_total{op="flush"} 1`, "nbd_written_bytes_total 5000", "nbd_read_bytes_total 3000",
		`nbd_connections{state="transmission"} 1`, "nbd_connections_accepted_total 1", "nbd_error_replies_total 0",
		`reactor_time_seconds_total{reactor="r0",state="busy"}`, "process_resident_memory_bytes", "go_goroutines",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("there is no %s", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}

func TestExportsByName(t *testing.T) {
	dir := t.TempDir()
	a, b := testenv.SparseFile(t, filepath.Join(dir, "a.img"), 1<<20), testenv.SparseFile(t, filepath.Join(dir, "b=c.img"), 2<<20)
	p := export(t, "second="+b, "first="+a)
	list, err := nbd.List(t.Context(), "unix", p.socket, nbd.Options{})
	if err != nil || len(list) != 2 || list[0].Name != "first" || list[1].Name != "second" {
		t.Errorf("%+v, %v", list, err)
	}
	for name, size := range map[string]uint64{"first": 1 << 20, "second": 2 << 20, "": 2 << 20} {
		if c := p.dial(nbd.Options{Export: name}); c.Size() != size {
			t.Errorf("%q: size %d, want %d", name, c.Size(), size)
		}
	}
	if _, err := nbd.Dial(t.Context(), "unix", p.socket, nbd.Options{Export: "third"}); err == nil {
		t.Error("an unknown export is served")
	}
}

func TestReadOnlyAndUnlisted(t *testing.T) {
	file := testenv.SparseFile(t, filepath.Join(t.TempDir(), "a=b.img"), 1<<20) // a path that exists is a path
	p := export(t, "--read-only", "--no-list", "--name", "n", file)
	c := p.dial(nbd.Options{Export: "n", Unchecked: true})
	if c.Flags()&nbd.FlagReadOnly == 0 {
		t.Errorf("flags %#x", c.Flags())
	}
	if err := c.Write(t.Context(), make([]byte, 512), 0, 0); !errors.Is(err, nbd.ErrnoPerm) {
		t.Errorf("write: %v", err)
	}
	if err := c.Read(t.Context(), make([]byte, 512), 0, 0); err != nil {
		t.Errorf("read: %v", err)
	}
	if _, err := nbd.List(t.Context(), "unix", p.socket, nbd.Options{}); err == nil {
		t.Error("the names are told")
	}
}

// TestFileThatShrinks: what is gone gives EIO, never zeros; the rest, and other
// exports, are served.
func TestFileThatShrinks(t *testing.T) {
	const size, left = 4 << 20, 1 << 20
	data := bytes.Repeat([]byte("content!"), size/8)
	for name, dir := range map[string]string{"memory": testenv.TmpfsDir(t), "disk": t.TempDir()} {
		for _, access := range []string{"auto", "buffered"} {
			t.Run(name+"/"+access, func(t *testing.T) {
				path := filepath.Join(dir, access)
				if err := os.WriteFile(path, data, 0o600); err != nil {
					t.Fatal(err)
				}
				other := testenv.SparseFile(t, filepath.Join(dir, access+"-other"), 1<<20)
				p := export(t, "--access", access, "a="+path, "b="+other)
				c, beside := p.dial(nbd.Options{Export: "a"}), p.dial(nbd.Options{Export: "b"})
				got := make([]byte, 4096)
				if err := c.Read(t.Context(), got, 2<<20, 0); err != nil || !bytes.Equal(got, data[:4096]) {
					t.Fatal(err)
				}
				if err := os.Truncate(path, left); err != nil {
					t.Fatal(err)
				}
				for _, offset := range []uint64{left, 2 << 20, size - 4096, left - 2048} {
					if err := c.Read(t.Context(), got, offset, 0); !errors.Is(err, nbd.ErrnoIO) {
						t.Errorf("read at %d: %v", offset, err)
					}
				}
				if err := c.Read(t.Context(), got, left-4096, 0); err != nil || !bytes.Equal(got, data[:4096]) {
					t.Errorf("read of what is left: %v", err)
				}
				if err := errors.Join(beside.Write(t.Context(), got, 0, 0), beside.Flush(t.Context())); err != nil {
					t.Errorf("the other export: %v", err)
				}
				p.signal(syscall.SIGTERM)
				if code := p.code(); code != 0 {
					t.Errorf("exit code %d", code)
				}
			})
		}
	}
}

// TestFullFilesystem: ENOSPC reaches the client, and harms nothing.
func TestFullFilesystem(t *testing.T) {
	testenv.RequireRoot(t)
	for _, access := range []string{"auto", "buffered"} {
		t.Run(access, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
				t.Skipf("needs to mount a tmpfs (%v)", err)
			}
			defer func() { // once the server is gone
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}()
			p := export(t, "--access", access, testenv.SparseFile(t, filepath.Join(dir, "disk.img"), 64<<20))
			c := p.dial(nbd.Options{})
			data := bytes.Repeat([]byte("content!"), 32<<10) // 256 KiB
			var kept []uint64
			full := false
			for offset := uint64(0); offset < 16<<20; offset += uint64(len(data)) {
				switch err := c.Write(t.Context(), data, offset, 0); {
				case err == nil:
					kept = append(kept, offset)
				case errors.Is(err, nbd.ErrnoNoSpace):
					full = true
				default:
					t.Fatalf("write at %d: %v", offset, err)
				}
			}
			if !full || len(kept) < 8 {
				t.Fatalf("full: %v, %d writes succeeded", full, len(kept))
			}
			got := make([]byte, len(data))
			for _, offset := range kept {
				if err := c.Read(t.Context(), got, offset, 0); err != nil || !bytes.Equal(got, data) {
					t.Errorf("what was written at %d is lost: %v", offset, err)
				}
				if err := c.Write(t.Context(), data, offset, nbd.CommandFlagFUA); err != nil {
					t.Errorf("write over what is there: %v", err)
				}
			}
			if err := c.Flush(t.Context()); err != nil {
				t.Errorf("flush: %v", err)
			}
			// With room again, writes succeed again.
			if err := c.Trim(t.Context(), 0, 1<<20, 0); err != nil {
				t.Errorf("trim: %v", err)
			}
			if err := c.Write(t.Context(), data, 20<<20, 0); err != nil {
				t.Errorf("write after trim: %v", err)
			}
			p.signal(syscall.SIGTERM)
			if code := p.code(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}
