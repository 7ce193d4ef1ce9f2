package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// mainVariable has the test binary be the command itself, so that tests run what
// they were built with: the race detector, -tags invariants.
const mainVariable = "ASHLAR_TEST_MAIN"

// mainToo, as its value, has what the command starts be the command too: a daemon that
// hands over becomes one again.
const mainToo = "children too"

func TestMain(m *testing.M) {
	_ = os.Setenv("TZ", "UTC") // tables show local time; fails for an empty name only
	if value := os.Getenv(mainVariable); value != "" {
		if value != mainToo {
			_ = os.Unsetenv(mainVariable) // not for children; fails for an empty name only
		}
		os.Exit(run(os.Args[1:]))
	}
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		// What the command starts, such as a keeper: were it the tests again, they would
		// start it again, without an end.
		os.Exit(run(os.Args[1:]))
	}
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-test.") {
		fmt.Fprintf(os.Stderr, "%q is for the command, which this is with %s=%q: the tests are not run instead\n", os.Args[1:], mainVariable, mainToo)
		os.Exit(exitFailure)
	}
	os.Exit(m.Run())
}

// command is ashlar with arguments, ready to start.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), self, args...)
	c.Env = append(os.Environ(), mainVariable+"=1", "GORACE=atexit_sleep_ms=0") // else the race detector adds a second to each run
	return c
}

// ashlar runs a command to its end.
func ashlar(t testing.TB, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	c := command(t, args...)
	c.Stdout, c.Stderr = &out, &errs
	return exitCode(t, c.Run()), out.String(), errs.String()
}

func exitCode(t testing.TB, err error) int {
	t.Helper()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	t.Fatal(err)
	return -1
}

// write makes a file of size bytes.
func TestWrongCommandLinesEndWithTwo(t *testing.T) {
	file := testenv.SparseFile(t, filepath.Join(t.TempDir(), "disk.img"), 1<<20)
	mem := []string{"export", "--mem", "1MiB"}
	with := func(more ...string) []string { return append(slices.Clone(mem), more...) }
	for _, c := range []struct {
		args []string
		want string // what the message names
	}{
		{[]string{"nonsense"}, "nonsense"},
		{[]string{"--nonsense"}, "--nonsense"},
		{[]string{"export"}, "nothing to export"},
		{[]string{"export", "--nonsense"}, "--nonsense"},
		{[]string{"export", ""}, "empty"},
		{[]string{"export", "x="}, "NAME=FILE"},
		{[]string{"export", file, file}, "NAME=FILE"},
		{[]string{"export", "a=" + file, file}, "NAME=FILE"},
		{[]string{"export", "--name", "n", "a=" + file}, "--name"},
		{[]string{"export", "--name", "n", "a=" + file, "b=" + file}, "--name"},
		{with(file), "--mem"},
		{[]string{"export", "--null", "1MiB", file}, "--null"},
		{with("--null", "1MiB"), "null"},
		{[]string{"export", "--mem", "511"}, "512"},
		{[]string{"export", "--mem", "0"}, "512"},
		{[]string{"export", "--null", "1"}, "512"},
		{[]string{"export", "--mem", "much"}, "mem"},
		{[]string{"export", "--mem", "-1"}, "mem"},
		{[]string{"export", "--mem"}, "mem"},
		{with("--stdio", "--run", "true"), "stdio"},
		{with("--stdio", "--socket", "s"), "--stdio"},
		{with("--stdio", "--listen", "127.0.0.1:0"), "--stdio"},
		{with("--reactors", "-1"), "--reactors"},
		{with("--reactors", "257"), "--reactors"},
		{with("--reactors", "two"), "reactors"},
		{with("--pin", "x"), "pin"},
		{with("--poll", "x"), "--poll"},
		{with("--engine", "x"), "--engine"},
		{with("--access", "x"), "--access"},
		{with("--slow-io", "-1s"), "--slow-io"},
		{with("--dead-timeout", "10ms"), "--dead-timeout"},
		{with("--buffers", "1MiB"), "--buffers"},
		{with("--buffers", "65GiB"), "--buffers"},
		{with("--connections", "0"), "--connections"},
		{with("--depth", "0"), "--depth"},
		{with("--depth", "513"), "--depth"},
		{with("--log-level", "loud"), "--log-level"},
		{with("--log-format", "xml"), "--log-format"},
		{with("--tls", "maybe"), "--tls"},
		{with("--tls", "on"), "--tls-cert"},
		{with("--tls", "require", "--tls-cert", "c"), "--tls-key"},
		{with("--tls-cert", "c"), "--tls"},
		{with("--tls-key", "k"), "--tls"},
		{with("--tls-ca", "c"), "--tls"},
		{with("--tls-only"), "--tls"},
		{with("--tls-allow", "n"), "--tls"},
		{with("--tls", "on", "--tls-cert", "c", "--tls-key", "k", "--tls-allow", "n"), "--tls-ca"},
		{[]string{"version", "--output", "xml"}, "--output"},
		{[]string{"version", "more"}, "takes no argument"},
		{[]string{"man", "more"}, "takes no argument"},
		{[]string{"serve", "more"}, "takes no argument"},
		{[]string{"fuse-keeper", "more"}, "takes no argument"},
		{[]string{"bench"}, "TARGET"},
	} {
		code, stdout, stderr := ashlar(t, c.args...)
		if code != exitUsage || !strings.Contains(stderr, c.want) || !strings.Contains(stderr, "--help") || stdout != "" {
			t.Errorf("ashlar %q: exit code %d, want %d\n%s%s", c.args, code, exitUsage, stderr, stdout)
		}
		if lines := strings.Count(stderr, "\n"); lines > 3 {
			t.Errorf("ashlar %q says %d lines:\n%s", c.args, lines, stderr)
		}
	}
}

func TestHelpEndsWithZero(t *testing.T) {
	for _, args := range [][]string{{}, {"--help"}, {"export", "--help"}, {"help", "export"}, {"--version"}} {
		if code, stdout, stderr := ashlar(t, args...); code != 0 || stdout == "" || stderr != "" {
			t.Errorf("ashlar %q: exit code %d\n%s%s", args, code, stdout, stderr)
		}
	}
}

func TestVersionInBothForms(t *testing.T) {
	code, stdout, _ := ashlar(t, "version")
	if code != 0 || !strings.HasPrefix(stdout, "ashlar ") {
		t.Errorf("exit code %d, %q", code, stdout)
	}
	code, stdout, _ = ashlar(t, "version", "--output", "json")
	var v map[string]string
	if err := json.Unmarshal([]byte(stdout), &v); code != 0 || err != nil || v["version"] == "" || v["go"] != runtime.Version() || v["os"] != runtime.GOOS || v["arch"] != runtime.GOARCH {
		t.Errorf("exit code %d, %q, %v", code, stdout, err)
	}
}

func TestCompletionForEveryShell(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, stdout, stderr := ashlar(t, "completion", shell); code != 0 || !strings.Contains(stdout, "ashlar") {
			t.Errorf("%s: exit code %d\n%s", shell, code, stderr)
		}
	}
	for flag, words := range map[string][]string{
		"--poll": {"auto", "busy", "off"}, "--engine": {"auto", "ring", "epoll"}, "--access": {"auto", "direct", "inline", "buffered"},
		"--tls": {"off", "on", "require"}, "--log-level": {"debug", "info", "warn", "error"}, "--log-format": {"text", "json"},
	} {
		code, stdout, _ := ashlar(t, "__complete", "export", flag, "")
		offered := strings.Fields(stdout)
		if len(offered) < len(words) || !slices.Equal(offered[:len(words)], words) || code != 0 {
			t.Errorf("%s: offered %q, want %q", flag, offered, words)
		}
	}
	for typed, words := range map[string][]string{
		"": {"disks", "reactors", "io_uring", "nbd", "ublk", "none"}, "n": {"nbd", "none"},
		"disks,n": {"disks,nbd"}, "disks,nbd,": {"disks,nbd,reactors", "disks,nbd,io_uring", "disks,nbd,ublk"},
	} {
		code, stdout, _ := ashlar(t, "__complete", "serve", "--observe", typed)
		offered, directive, _ := strings.Cut(stdout, ":")
		if !slices.Equal(strings.Fields(offered), words) || code != 0 || !strings.HasPrefix(directive, "6\n") { // no file, no space
			t.Errorf("--observe %s: offered %q", typed, stdout)
		}
	}
}

func TestManWritesAPageForEachCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "here")
	if code, _, stderr := ashlar(t, "man", "--dir", dir); code != 0 {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	for _, page := range []string{"ashlar.1", "ashlar-export.1", "ashlar-bench.1", "ashlar-version.1", "ashlar-pool-create.1", "ashlar-volume.1", "ashlar-snapshot-delete.1", "ashlar-job-watch.1", "ashlar-events.1"} {
		if b, err := os.ReadFile(filepath.Join(dir, page)); err != nil || !bytes.Contains(b, []byte(".SH OPTIONS")) {
			t.Errorf("%s: %v", page, err)
		}
	}
	if code, _, stderr := ashlar(t, "man", "--dir", testenv.SparseFile(t, filepath.Join(t.TempDir(), "file"), 1)); code != exitFailure || !strings.Contains(stderr, "file") {
		t.Errorf("into a file: exit code %d\n%s", code, stderr)
	}
}
