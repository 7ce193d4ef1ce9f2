package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/nbd"
)

// serveCommand parses a command line of serve and returns what came of it.
func serveCommand(t *testing.T, args ...string) (map[string]any, error) {
	t.Helper()
	var options map[string]any
	c := newServeCommand()
	c.SilenceErrors, c.SilenceUsage = true, true
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := readConfig(c.Flags(), c.Flag("config").Value.String(), notInConfig...); err != nil {
			return err
		}
		options = optionsInForce(c.Flags())
		return nil
	}
	c.SetArgs(args)
	err := c.Execute()
	return options, err
}

func configFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "serve.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigFileHasTheWordsOfTheFlags(t *testing.T) {
	path := configFile(t, `# a node
data-dir: /var/lib/x
default-pool: 10GiB   # a size
reactors: 2
pin: 0,2-3
read-only: true
listen: [0.0.0.0:10809, "[::]:10809"]
nbd-socket:
  - /run/a.sock
  - /run/b.sock
tls-allow: host-a
socket: ""
scrub-rate: 10MiB/s
over-provision: 0x64
`)
	options, err := serveCommand(t, "--config", path, "--reactors", "3", "--listen", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{
		"data-dir": "/var/lib/x", "default-pool": "10GiB", "pin": "0,2-3", "read-only": true, "socket": "", "scrub-rate": "10MiB/s", "over-provision": "100",
		"reactors": "3", "listen": []string{"127.0.0.1:1"}, // the command line goes before
		"nbd-socket": []string{"/run/a.sock", "/run/b.sock"}, "tls-allow": []string{"host-a"}, "depth": "256",
	} {
		if fmt.Sprint(options[name]) != fmt.Sprint(want) {
			t.Errorf("%s: %v, want %v", name, options[name], want)
		}
	}
	if _, ok := options["help"]; ok {
		t.Error("help is an option")
	}
	for _, text := range []string{"", "# nothing\n", "---\n", "{}", "---\n# nothing\n...\n"} {
		if _, err := serveCommand(t, "--config", configFile(t, text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestConfigFileErrorsNameTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"data-dir: /x\nreactor: 2\n":              ":2: unknown option \"reactor\"",
		"data_dir: /x\n":                          ":1: unknown option \"data_dir\" (it is \"data-dir\")",
		"depth: 1\ntls: off\nreactors: two\n":     ":3: reactors \"two\"",
		"pin: 0\ndefault-pool: big\n":             ":2: default-pool \"big\"",
		"read-only: maybe\n":                      ":1: read-only \"maybe\"",
		"config: /x\n":                            ":1: \"config\" is for the command line only",
		"check: true\n":                           ":1: \"check\" is for the command line only",
		"help: true\n":                            ":1: \"help\" is for the command line only",
		"reactors: [1, 2]\n":                      ":1: reactors: takes one value",
		"data-dir:\n":                             ":1: data-dir: has no value",
		"tls:\n  cert: x\n":                       ":1: tls: takes a value",
		"listen:\n  - a: b\n":                     ":1: listen: takes a value",
		"\nlisten: *x\n":                          ":2:",
		"- data-dir\n":                            ":1: options are written NAME: VALUE",
		"data-dir\n":                              ":1: options are written NAME: VALUE",
		"depth: 1\n\ndepth: 2\n":                  ":3:",
		"depth: 1\n---\ndepth: 2\n":               "a second document",
		"depth: [1\n":                             ":1:",
		"data-dir: \"x\n":                         ":1:",
		"\tdepth: 1\n":                            ":1:",
		strings.Repeat("# long\n", configMax/7+1): "larger",
	} {
		path := configFile(t, text)
		_, err := serveCommand(t, "--config", path)
		var usage *usageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %s", text, err, want)
		}
	}
	_, err := serveCommand(t, "--config", filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func FuzzConfigFile(f *testing.F) {
	for _, seed := range []string{"data-dir: /x\n", "listen: [a, b]\nreactors: 2\n", "a: &x 1\nb: *x\n", "? a\n: b\n", "<<: {a: b}\n", "a: |\n  x\n", "---\n---\n", "!!binary x: y", "-", "{", "a:\n- - b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path := configFile(t, text)
		flags := newServeCommand().Flags()
		if err := readConfig(flags, path, notInConfig...); err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("%v does not name the file", err)
		}
	})
}

// TestTheExampleConfigurationIsRight reads what deploy/systemd offers, with and
// without what is commented out.
func TestTheExampleConfigurationIsRight(t *testing.T) {
	b, err := os.ReadFile("../../deploy/systemd/serve.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(b), strings.ReplaceAll(string(b), "\n#", "\n")} {
		var lines []string // a comment is a sentence, an option has a colon after its name
		for _, line := range strings.Split(text, "\n") {
			name, _, ok := strings.Cut(line, ":")
			if ok && newServeCommand().Flags().Lookup(strings.TrimSpace(name)) != nil {
				lines = append(lines, line)
			} else if ok && !strings.HasPrefix(line, "#") && !strings.Contains(name, " ") {
				t.Errorf("%q is no option", line)
			}
		}
		if _, err := serveCommand(t, "--config", configFile(t, strings.Join(lines, "\n"))); err != nil {
			t.Error(err)
		}
	}
	if _, err := serveCommand(t, "--config", "../../deploy/systemd/serve.yaml"); err != nil {
		t.Error(err)
	}
}

func TestServeRefusesWrongOptions(t *testing.T) {
	d := []string{"serve", "--data-dir", t.TempDir(), "--socket", ""}
	with := func(more ...string) []string { return append(slices.Clone(d), more...) }
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"serve"}, "--data-dir"},
		{with("more"), "more"},
		{with("--nonsense"), "--nonsense"},
		{with("--pool-file", "x"), "--default-pool"},
		{with("--over-provision", "-1"), "--over-provision"},
		{with("--slow-io", "-1s"), "--slow-io"},
		{with("--dead-timeout", "-1s"), "--dead-timeout"},
		{with("--dead-timeout", "999ms"), "--dead-timeout"},
		{with("--checksum-cache", "1KiB"), "--checksum-cache"},
		{with("--scrub-rate", "0"), "--scrub-rate"},
		{with("--control-listen", "127.0.0.1:0"), "--control-tls-ca"},
		{with("--control-tls-cert", "x"), "--control-tls-key"},
		{with("--control-allow", "x"), "--control-listen"},
		{with("--reactors", "-1"), "--reactors"},
		{with("--poll", "x"), "--poll"},
		{with("--depth", "0"), "--depth"},
		{with("--tls", "maybe"), "--tls"},
		{with("--tls-cert", "x"), "--tls"},
		{with("--log-level", "loud"), "--log-level"},
		{with("--config", configFile(t, "depths: 1\n")), ":1: unknown option"},
	} {
		code, stdout, stderr := ashlar(t, c.args...)
		if code != exitUsage || !strings.Contains(stderr, c.want) || !strings.Contains(stderr, "--help") || stdout != "" {
			t.Errorf("ashlar %q: exit code %d, want %d\n%s%s", c.args, code, exitUsage, stderr, stdout)
		}
	}
	if code, _, stderr := ashlar(t, with("--config", filepath.Join(t.TempDir(), "none"))...); code != exitFailure || !strings.Contains(stderr, "none") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	for flag, words := range map[string][]string{"--poll": {"auto", "busy", "off"}, "--tls": {"off", "on", "require"}, "--log-format": {"text", "json"}} {
		code, stdout, _ := ashlar(t, "__complete", "serve", flag, "")
		offered := strings.Fields(stdout)
		if len(offered) < len(words) || !slices.Equal(offered[:len(words)], words) || code != 0 {
			t.Errorf("%s: offered %q, want %q", flag, offered, words)
		}
	}
}

// node is a data directory with sockets for `ashlar serve`.
type node struct {
	t    *testing.T
	dir  string
	args []string
}

func newNode(t *testing.T, args ...string) *node {
	t.Helper()
	dir := t.TempDir()
	return &node{t, dir, append([]string{
		"serve", "--data-dir", filepath.Join(dir, "data"), "--socket", filepath.Join(dir, "control.sock"),
		"--nbd-socket", filepath.Join(dir, "nbd.sock"), "--pid-file", filepath.Join(dir, "pid"), "--default-pool", "256MiB", "--reactors", "1",
	}, args...)}
}

func (n *node) start(environment ...string) *process {
	n.t.Helper()
	pid := filepath.Join(n.dir, "pid")
	_ = os.Remove(pid) // of a process that was killed
	c := command(n.t, n.args...)
	c.Env = append(c.Env, environment...)
	p := start(n.t, c)
	p.socket = filepath.Join(n.dir, "nbd.sock")
	p.until("it serves", func() bool { _, err := os.Stat(pid); return err == nil })
	return p
}

// ask runs a command against the node and wants it to end well.
func (n *node) ask(args ...string) string {
	n.t.Helper()
	code, stdout, stderr := ashlar(n.t, append(args, "--server", "unix://"+filepath.Join(n.dir, "control.sock"))...)
	if code != 0 {
		n.t.Fatalf("ashlar %q: exit code %d\n%s", args, code, stderr)
	}
	return stdout
}

func TestServeRunsANodeThatSurvivesBeingKilled(t *testing.T) {
	n := newNode(t)
	p := n.start()
	n.ask("volume", "create", "data", "--size", "16MiB")
	block := bytes.Repeat([]byte("x"), 4096)
	for round := range 3 {
		c := p.dial(nbd.Options{Export: "data"})
		if err := errors.Join(c.Write(t.Context(), block, uint64(round)<<20, 0), c.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
		p.signal(syscall.SIGKILL)
		<-p.ended
		p = n.start()
		c = p.dial(nbd.Options{Export: "data"})
		got := make([]byte, 4096)
		for i := range round + 1 {
			if err := c.Read(t.Context(), got, uint64(i)<<20, 0); err != nil || !bytes.Equal(got, block) {
				t.Fatalf("after kill %d, block %d: %q…, %v", round, i, got[:4], err)
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if out := n.ask("pool", "list"); !strings.Contains(out, "default") {
		t.Errorf("%s", out)
	}
	b, err := os.ReadFile(filepath.Join(n.dir, "data", "options.json"))
	var options map[string]any
	if err := errors.Join(err, json.Unmarshal(b, &options)); err != nil || options["default-pool"] != "256MiB" || options["log-level"] != "info" {
		t.Errorf("%s, %v", b, err)
	}
	// A second daemon on the same data names the first.
	code, _, stderr := ashlar(t, "serve", "--data-dir", filepath.Join(n.dir, "data"), "--socket", "")
	if code != exitFailure || !strings.Contains(stderr, fmt.Sprintf("process %d", p.cmd.Process.Pid)) {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	p.signal(syscall.SIGTERM)
	if code := p.code(); code != 0 {
		t.Errorf("exit code %d\n%s", code, &p.stderr)
	}
	for _, name := range []string{"pid", "control.sock", "nbd.sock"} {
		if _, err := os.Lstat(filepath.Join(n.dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}

func TestServeTellsTheServiceManager(t *testing.T) {
	n := newNode(t)
	address := filepath.Join(n.dir, "notify.sock")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // read from below
	seen := make(chan string, 100)
	go func() { // ends with the socket
		b := make([]byte, 4096)
		for {
			size, err := l.Read(b)
			if err != nil {
				return
			}
			for _, line := range strings.Split(string(b[:size]), "\n") {
				select {
				case seen <- line:
				default: // nobody needs that many
				}
			}
		}
	}()
	expect := func(want string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		for {
			select {
			case line := <-seen:
				if line == want {
					return
				}
			case <-ctx.Done():
				t.Fatalf("%s was not said", want)
			}
		}
	}
	p := n.start("NOTIFY_SOCKET="+address, fmt.Sprintf("WATCHDOG_USEC=%d", (300*time.Millisecond).Microseconds()))
	expect("READY=1")
	expect("WATCHDOG=1")
	expect("WATCHDOG=1")
	p.signal(syscall.SIGTERM)
	expect("STOPPING=1")
	if code := p.code(); code != 0 {
		t.Errorf("exit code %d\n%s", code, &p.stderr)
	}
}
