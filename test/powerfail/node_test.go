package powerfail

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const (
	readyLimit = 10 * time.Second // from start to ready, after whatever happened
	guestLimit = 60 * time.Second // likewise in the guest, which is slow: nothing is measured there
	stopLimit  = 20 * time.Second // from a signal to the end
	callLimit  = 60 * time.Second // one run of a command
)

// long reports whether the long runs were asked for.
func long() bool { return os.Getenv("ASHLAR_TEST_LONG") == "1" }

// seed is ASHLAR_TEST_SEED, or one of the moment; it is printed.
func seed(t *testing.T) uint64 {
	t.Helper()
	s, err := strconv.ParseUint(os.Getenv("ASHLAR_TEST_SEED"), 10, 64)
	if err != nil {
		s = rand.Uint64N(1 << 32)
	}
	t.Logf("seed: ASHLAR_TEST_SEED=%d", s)
	return s
}

// requireBinary skips t outside make test-powerfail, and returns the path of the
// binary under test.
func requireBinary(t *testing.T) string {
	t.Helper()
	if os.Getenv("ASHLAR_INTEROP") != "1" {
		t.Skip("needs bin/ashlar (make test-powerfail does not skip it)")
	}
	testenv.RequireRoot(t)
	binary, err := filepath.Abs("../../bin/ashlar")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v; make test-powerfail builds it", err)
	}
	return binary
}

// node is a daemon that is started and killed many times on one data directory.
type node struct {
	t      *testing.T
	binary string
	dir    string   // state, sockets and log
	args   []string // more arguments
	limit  time.Duration

	check   bool // the binary has pool check
	command *exec.Cmd
	ended   chan struct{} // closed when command has been waited for
	err     error         // of Wait; read after ended
}

// newNode makes a node in dir, whose path is short enough for sockets.
func newNode(t *testing.T, binary, dir string, args ...string) *node {
	t.Helper()
	n := &node{t: t, binary: binary, dir: dir, args: args, limit: readyLimit}
	help, err := exec.Command(binary, "pool", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	n.check = bytes.Contains(help, []byte("\n  check "))
	if !n.check {
		t.Log("this binary has no pool check")
	}
	t.Cleanup(func() {
		if n.running() {
			n.kill()
		}
		if t.Failed() {
			text, _ := os.ReadFile(n.path("log")) // as far as there is one
			t.Logf("the end of the daemon's log:\n%s", text[max(0, len(text)-8000):])
		}
	})
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) running() bool {
	if n.command == nil {
		return false
	}
	select {
	case <-n.ended:
		return false
	default:
		return true
	}
}

// launch starts the daemon and does not wait until it is ready.
func (n *node) launch() {
	n.t.Helper()
	if err := os.Remove(n.path("pid")); err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	log, err := os.OpenFile(n.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	n.command = exec.Command(n.binary, append([]string{
		"serve", "--data-dir", n.path("node"), "--socket", n.path("control"), "--nbd-socket", n.path("nbd"), "--pid-file", n.path("pid"),
	}, n.args...)...)
	n.command.Stdout, n.command.Stderr = log, log
	if err := n.command.Start(); err != nil {
		n.t.Fatal(err)
	}
	_ = log.Close() // the daemon has its own
	ended := make(chan struct{})
	n.ended = ended
	go func() { // ends with the process
		n.err = n.command.Wait()
		close(ended)
	}()
}

// start starts the daemon, waits until it is ready and says how long that took.
func (n *node) start() time.Duration {
	n.t.Helper()
	begun := time.Now()
	n.launch()
	for {
		if text, err := os.ReadFile(n.path("pid")); err == nil && len(text) > 0 {
			return time.Since(begun)
		}
		if !n.running() {
			n.t.Fatalf("the daemon ended before it was ready: %v", n.err)
		}
		if time.Since(begun) > n.limit {
			n.t.Fatalf("the daemon was not ready within %v", n.limit)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// kill is kill -9.
func (n *node) kill() {
	n.t.Helper()
	_ = n.command.Process.Kill() // what it ended with comes from Wait
	n.wait()
	var exit *exec.ExitError
	if !errors.As(n.err, &exit) || exit.Exited() {
		n.t.Errorf("the daemon ended by itself: %v", n.err)
	}
}

// stop is an orderly end.
func (n *node) stop() {
	n.t.Helper()
	_ = n.command.Process.Signal(os.Interrupt)
	n.wait()
	if n.err != nil {
		n.t.Errorf("the daemon ended with %v", n.err)
	}
}

func (n *node) wait() {
	n.t.Helper()
	select {
	case <-n.ended:
	case <-time.After(stopLimit):
		n.t.Fatalf("the daemon had not ended after %v", stopLimit)
	}
}

// try runs a command of the binary against the daemon.
func (n *node) try(args ...string) (string, error) {
	c := exec.Command(n.binary, args...)
	c.Env = append(os.Environ(), "ASHLAR_SERVER=unix://"+n.path("control"))
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	timer := time.AfterFunc(callLimit, func() { _ = c.Process.Kill() }) // it is stuck
	defer timer.Stop()
	if err := c.Run(); err != nil {
		return stdout.String(), fmt.Errorf("ashlar %s: %w\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// run is try for what must work.
func (n *node) run(args ...string) string {
	n.t.Helper()
	out, err := n.try(args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// thing is a volume or a snapshot in a list.
type thing struct {
	Volume string `json:"volume"` // of a snapshot
	Name   string `json:"name"`
	Size   int64  `json:"size_bytes"`
}

// list asks for all volumes, or snapshots as VOLUME@SNAPSHOT, and their sizes.
func (n *node) list(what string) map[string]int64 {
	n.t.Helper()
	var list struct {
		Items []thing `json:"items"`
	}
	if err := json.Unmarshal([]byte(n.run(what, "list", "--output", "json")), &list); err != nil {
		n.t.Fatal(err)
	}
	all := map[string]int64{}
	for _, i := range list.Items {
		if i.Volume != "" {
			i.Name = i.Volume + "@" + i.Name
		}
		all[i.Name] = i.Size
	}
	return all
}

// checkPool has the pool on devices checked while no daemon runs.
func (n *node) checkPool(when string, data bool, devices ...string) {
	n.t.Helper()
	if !n.check {
		return
	}
	args := append([]string{"pool", "check"}, devices...)
	if data {
		args = append(args, "--data")
	}
	var err error
	for begun := time.Now(); time.Since(begun) < stopLimit; time.Sleep(20 * time.Millisecond) {
		var exit *exec.ExitError
		if _, err = n.try(args...); err == nil {
			return
		}
		// A device is let go of a little after the process that had it.
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), "use") {
			break
		}
	}
	n.t.Errorf("%s: %v", when, err)
}

// percentiles shows durations by rank.
func percentiles(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	sorted := slices.Sorted(slices.Values(all))
	at := func(p int) time.Duration {
		return sorted[min(len(sorted)*p/100, len(sorted)-1)].Round(time.Millisecond)
	}
	return fmt.Sprintf("p50 %v, p95 %v, max %v", at(50), at(95), sorted[len(sorted)-1].Round(time.Millisecond))
}
