package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/daemon"
	"github.com/ashlar-storage/ashlar/nbd"
)

// installed is a daemon whose program lies where an upgrade can put another.
type installed struct {
	*process
	t       *testing.T
	node    *node
	program string
	config  string // its configuration file
}

// install starts a node by a copy of this program, with a configuration file of the
// text.
func install(t *testing.T, text string) *installed {
	t.Helper()
	dir := t.TempDir()
	i := &installed{t: t, program: filepath.Join(dir, "ashlar"), config: filepath.Join(dir, "serve.yaml")}
	i.put(i.self())
	i.node = newNode(t)
	i.configure(text)
	c := command(t, "serve", "--config", i.config)
	c.Path, c.Args[0] = i.program, i.program
	c.Env = append(c.Env, mainVariable+"="+mainToo)
	i.process = start(t, c)
	i.socket = filepath.Join(i.node.dir, "nbd.sock")
	i.until("it serves", func() bool { _, err := os.Stat(filepath.Join(i.node.dir, "pid")); return err == nil })
	return i
}

// self is this program.
func (i *installed) self() []byte {
	i.t.Helper()
	path, err := os.Executable()
	if err != nil {
		i.t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		i.t.Fatal(err)
	}
	return b
}

// put puts a program in place, as a package manager does: a new file, renamed.
func (i *installed) put(program []byte) {
	i.t.Helper()
	if err := errors.Join(os.WriteFile(i.program+".new", program, 0o755), os.Rename(i.program+".new", i.program)); err != nil {
		i.t.Fatal(err)
	}
}

// configure writes the configuration file: the text, and of what the node needs that
// which the text does not say.
func (i *installed) configure(text string) {
	i.t.Helper()
	for j := 1; j < len(i.node.args); j += 2 { // of the command line: --NAME VALUE
		if name := i.node.args[j][2:]; !strings.Contains("\n"+text, "\n"+name+":") {
			text += name + ": " + i.node.args[j+1] + "\n"
		}
	}
	if err := os.WriteFile(i.config, []byte(text), 0o600); err != nil {
		i.t.Fatal(err)
	}
}

// running says of which file the process runs.
func (i *installed) running() os.FileInfo {
	i.t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d/exe", i.cmd.Process.Pid))
	if err != nil {
		i.t.Fatal(err)
	}
	return info
}

// lines counts the lines of the log that have all of these words.
func (i *installed) lines(words ...string) (n int) {
	for _, line := range strings.Split(i.stderr.String(), "\n") {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			n++
		}
	}
	return n
}

// handOver has it hand over, and waits until it has.
func (i *installed) handOver() {
	i.t.Helper()
	before := i.lines(`msg="handed over"`)
	i.signal(syscall.SIGHUP)
	i.until("it hands over", func() bool { return i.lines(`msg="handed over"`) == before+1 })
}

// writes writes a block of a volume and reads it again.
func (i *installed) writes(volume string) {
	i.t.Helper()
	c, block, got := i.dial(nbd.Options{Export: volume}), bytes.Repeat([]byte{'x'}, 4096), make([]byte, 4096)
	if err := errors.Join(c.Write(i.t.Context(), block, 0, 0), c.Flush(i.t.Context()), c.Read(i.t.Context(), got, 0, 0), c.Close()); err != nil || !bytes.Equal(got, block) {
		i.t.Errorf("%s: %q…, %v", volume, got[:4], err)
	}
}

// freeAddress is an address nobody has now.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return l.Addr().String()
}

func TestHandOverRunsWhatLiesThereNow(t *testing.T) {
	metrics := freeAddress(t)
	i := install(t, "metrics: "+metrics+"\n")
	i.node.ask("volume", "create", "data", "--size", "16MiB")
	i.writes("data")
	before := i.running()
	i.put(i.self())
	i.handOver()
	if os.SameFile(before, i.running()) {
		t.Error("it still runs the old program")
	}
	if i.lines(`msg="handing over"`, "to=") != 1 {
		t.Errorf("it does not say to whom it hands over")
	}
	c, got := i.dial(nbd.Options{Export: "data"}), make([]byte, 4096)
	if err := errors.Join(c.Read(t.Context(), got, 0, 0), c.Close()); err != nil || got[0] != 'x' {
		t.Errorf("%q…, %v", got[:4], err)
	}
	i.signal(syscall.SIGTERM)
	if code := i.code(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestHandOverTakesNewOptions changes where it listens, also to what overlaps the
// address it has.
func TestHandOverTakesNewOptions(t *testing.T) {
	address, metrics := freeAddress(t), freeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	i := install(t, "listen: ["+address+"]\nmetrics: "+metrics+"\n")
	i.node.ask("volume", "create", "data", "--size", "16MiB")
	i.configure("listen: [0.0.0.0:" + port + "]\ninsecure-plaintext: true\nmetrics: " + metrics + "\n")
	i.handOver()
	i.configure("listen: [" + metrics + "]\nmetrics: " + address + "\n") // exchanged
	i.handOver()
	r, err := http.Get("http://" + address + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r.Body)
	if err = errors.Join(err, r.Body.Close()); err != nil || string(text) != "ok\n" {
		t.Errorf("%q, %v", text, err)
	}
	i.writes("data")
	c, err := nbd.Dial(t.Context(), "tcp", metrics, nbd.Options{Export: "data"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestHandOverGoesOnWithoutAFirstPool: only its making shows whether that can be done,
// and then nobody else serves the devices.
func TestHandOverGoesOnWithoutAFirstPool(t *testing.T) {
	i := install(t, "default-pool: 0\n")
	i.configure("default-pool: 1MiB\n")
	i.handOver()
	if i.lines(`msg="the first pool is not made"`, "too few") != 1 {
		t.Error("it does not say so")
	}
	i.node.ask("pool", "list")
}

// TestHandOverIsRefused: whatever would keep the successor from starting is said in a
// sentence, and the daemon serves on.
func TestHandOverIsRefused(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }() // accepts nothing
	none := filepath.Join(t.TempDir(), "none")
	const right = "scrub-rate: 10MiB/s\n"
	i := install(t, right)
	i.node.ask("volume", "create", "data", "--size", "16MiB")
	self, pid := i.self(), i.cmd.Process.Pid
	for _, c := range []struct {
		name    string
		program []byte // nil: removed
		config  string
		want    string
	}{
		{"a program of nonsense", []byte("nonsense\n"), right, i.program + " cannot be started: exec format error"},
		{"no program", nil, right, i.program + " cannot be started: no such file"},
		{"another program", []byte("#!/bin/sh\nexit 0\n"), right, i.program + " does not answer `serve --check` as ashlar does"},
		{"another program that speaks", []byte("#!/bin/sh\necho ashlar 1.0\n"), right, "does not answer `serve --check` as ashlar does"},
		{"a program that fails", []byte("#!/bin/sh\nexit 3\n"), right, i.program + " could not take over: exit status 3"},
		{"a program without one of the flags", []byte("#!/bin/sh\necho 'ashlar: unknown flag: --check' >&2\necho more >&2\nexit 2\n"), right, i.program + " could not take over: unknown flag: --check\""},
		{"an unknown option", self, right + "reactor: 2\n", i.config + `:2: unknown option \"reactor\"`},
		{"a wrong value", self, "reactors: two\n", i.config + `:1: reactors \"two\"`},
		{"no YAML", self, "a: [\n", i.config + ":1:"},
		{"an unknown group to observe", self, "observe: [disk]\n", `--observe \"disk\": must be one of`},
		{"an address that is taken", self, "listen: [" + taken.Addr().String() + "]\n", "listen on " + taken.Addr().String() + ": bind: address already in use"},
		{"metrics on an address that is taken", self, "metrics: " + taken.Addr().String() + "\n", "--metrics: listen on " + taken.Addr().String()},
		{"one address twice", self, "listen: [127.0.0.1:1099]\nmetrics: 127.0.0.1:1099\n", "--metrics: listen on 127.0.0.1:1099"},
		{"a socket that is a file", self, "nbd-socket: [" + i.config + "]\n", "is no socket"},
		{"plain text", self, "listen: [0.0.0.0:0]\n", "--insecure-plaintext"},
		{"a certificate that is not there", self, "tls: require\ntls-cert: " + none + "\ntls-key: " + none + "\n", "TLS certificate"},
		{"control without a certificate", self, "control-listen: [127.0.0.1:0]\n", "--control-tls-cert"},
		{"more reactors than CPUs", self, "pin: 0\nreactors: 2\n", "CPU"},
		{"a CPU that is not there", self, "pin: 1000\n", "CPU 1000"},
		{"a collector that is no address", self, "otlp-endpoint: nonsense\n", "no address of a collector"},
		{"a pid file without a directory", self, "pid-file: " + none + "/pid\n", "pid file: "},
		{"another data directory", self, "data-dir: " + none + "\n", "the data directory would be " + none},
	} {
		t.Run(c.name, func(t *testing.T) {
			i.t = t
			if c.program == nil {
				if err := os.Remove(i.program); err != nil {
					t.Fatal(err)
				}
			} else if i.size() != int64(len(c.program)) { // else it is there
				i.put(c.program)
			}
			i.configure(c.config)
			const refused = `msg="not handed over: this process goes on serving"`
			before, same := i.lines(refused), i.lines(refused, c.want)
			i.signal(syscall.SIGHUP)
			i.until("it refuses", func() bool { return i.lines(refused) > before })
			i.writes("data")
			if i.lines(refused) != before+1 || i.lines(refused, c.want) != same+1 {
				t.Errorf("want one more line with %s", c.want)
			}
		})
	}
	i.t = t
	// Set right again, it hands over.
	i.put(self)
	i.configure(right)
	i.handOver()
	i.writes("data")
	if i.cmd.Process.Pid != pid {
		t.Error("another process")
	}
}

// size is that of the program in place; 0: there is none.
func (i *installed) size() int64 {
	info, err := os.Stat(i.program)
	if err != nil {
		return 0
	}
	return info.Size()
}

func TestServeCheckAnswers(t *testing.T) {
	n := newNode(t)
	check := append(slices.Clone(n.args), "--check")
	code, stdout, stderr := ashlar(t, check...)
	version, ok := parseAnswer(stdout)
	if code != 0 || stderr != "" || !ok || version != versionText() || !strings.Contains(stdout, filepath.Join(n.dir, "data")) {
		t.Errorf("exit code %d, %q\n%s", code, stdout, stderr)
	}
	if left, err := os.ReadDir(n.dir); err != nil || len(left) != 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	p := n.start()
	if code, stdout, stderr := ashlar(t, check...); code != 0 || stdout == "" { // what runs is not in the way
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	if _, err := net.Dial("unix", p.socket); err != nil {
		t.Errorf("the daemon's socket is gone: %v", err)
	}
	for code, args := range map[int][]string{
		exitUsage:   append(slices.Clone(check), "--depth", "0"),
		exitFailure: append(slices.Clone(check), "--pid-file", n.dir),
	} {
		if got, stdout, stderr := ashlar(t, args...); got != code || stdout != "" {
			t.Errorf("%q: exit code %d\n%s", args, got, stderr)
		}
	}
}

func TestCheckStandsBeforeTheEndOfFlags(t *testing.T) {
	for _, c := range []struct{ args, want []string }{
		{[]string{"serve", "--config", "x"}, []string{"serve", "--config", "x", "--check"}},
		{[]string{"serve", "--config", "x", "--"}, []string{"serve", "--config", "x", "--check", "--"}},
	} {
		s := successor{args: c.args}
		if got := s.checkArgs(); !slices.Equal(got, c.want) {
			t.Errorf("%q", got)
		}
	}
}

func TestOnlyAnAnswerIsAnAnswer(t *testing.T) {
	for text, want := range map[string]bool{
		"ashlar 1 can serve /x with these options\n": true,
		"": false, "ashlar 1\n": false, "ashlar can serve": false, "1 can serve /x with these options": false, "ashlar 1 can serve /x": false,
	} {
		if _, ok := parseAnswer(text); ok != want {
			t.Errorf("%q: %v", text, ok)
		}
	}
	var h head
	if n, err := h.Write(make([]byte, headMax+1)); n != headMax+1 || err != nil || h.Len() != headMax {
		t.Errorf("%d, %v; %d are kept", n, err, h.Len())
	}
	if n, err := h.Write(make([]byte, 1)); n != 1 || err != nil || h.Len() != headMax {
		t.Errorf("%d, %v; %d are kept", n, err, h.Len())
	}
}

// TestOrders drives a daemon's signals without one.
func TestOrders(t *testing.T) {
	type world struct {
		signals chan os.Signal
		checks  chan chan error // one for each check that begins
		drained chan error
		cut     chan struct{}
	}
	begin := func(t *testing.T) *world {
		w := &world{make(chan os.Signal), make(chan chan error), make(chan error, 9), make(chan struct{})}
		ended, over := make(chan struct{}), make(chan struct{})
		o := &orders{
			signals: w.signals, ended: ended, drain: func(cause error) { w.drained <- cause }, cut: w.cut, log: slog.New(slog.DiscardHandler),
			check: func(ctx context.Context) (string, error) {
				result := make(chan error)
				w.checks <- result
				select {
				case err := <-result:
					return "v", err
				case <-ctx.Done():
					return "", ctx.Err()
				}
			},
		}
		go func() { o.obey(); close(over) }() // ends with ended, or a second signal
		t.Cleanup(func() { close(ended); <-over })
		return w
	}
	drained := func(t *testing.T, w *world, want error) {
		t.Helper()
		select {
		case err := <-w.drained:
			if err.Error() != want.Error() {
				t.Errorf("drained for %v, want %v", err, want)
			}
		case <-time.After(wait):
			t.Fatal("it does not drain")
		}
		if len(w.drained) != 0 {
			t.Error("it drains again")
		}
	}
	t.Run("a good successor", func(t *testing.T) {
		w := begin(t)
		w.signals <- syscall.SIGHUP
		<-w.checks <- nil
		drained(t, w, daemon.ErrHandOver)
		w.signals <- syscall.SIGHUP // it is on its way
		w.signals <- syscall.SIGTERM
		<-w.cut
	})
	t.Run("asked again meanwhile", func(t *testing.T) {
		w := begin(t)
		w.signals <- syscall.SIGHUP
		first := <-w.checks
		w.signals <- syscall.SIGHUP
		first <- nil // of the options before
		<-w.checks <- errors.New("bad")
		w.signals <- syscall.SIGHUP
		<-w.checks <- nil
		drained(t, w, daemon.ErrHandOver)
	})
	t.Run("told to end meanwhile", func(t *testing.T) {
		w := begin(t)
		w.signals <- syscall.SIGHUP
		<-w.checks
		w.signals <- syscall.SIGTERM
		drained(t, w, errors.New("terminated"))
		w.signals <- syscall.SIGINT
		<-w.cut
		if len(w.drained) != 0 {
			t.Error("it hands over all the same")
		}
	})
}
