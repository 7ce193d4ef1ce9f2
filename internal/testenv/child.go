package testenv

import (
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Child is another process of this test binary, which its TestMain tells from the test by
// a variable of the environment. A test may kill it.
type Child struct {
	Command *exec.Cmd
	Said    string // its first line
	Errors  Output // what it wrote to standard error

	input io.WriteCloser
	limit time.Duration // for its first line
}

// NewChild makes one with a variable, NAME=VALUE. It does not run yet.
func NewChild(variable string) *Child {
	c := &Child{Command: exec.Command("/proc/self/exe"), limit: 3 * time.Minute}
	c.Command.Env = append(os.Environ(), variable)
	c.Command.Stderr = &c.Errors
	return c
}

// Start starts it and waits for its first line, on standard output. One that says nothing,
// or what begins with "error", fails t; so does one that has said nothing after three
// minutes, with what its goroutines are doing.
func (c *Child) Start(t testing.TB) {
	t.Helper()
	var err error
	if c.input, err = c.Command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.Command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Command.Start(); err != nil {
		t.Fatal(err)
	}
	hung := time.AfterFunc(c.limit, func() { _ = c.Command.Process.Signal(syscall.SIGQUIT) }) // it lives until waited for
	defer hung.Stop()
	var b [300]byte
	n, _ := out.Read(b[:]) // nothing, of one that ended
	c.Said = strings.TrimSpace(string(b[:n]))
	if c.Said == "" || strings.HasPrefix(c.Said, "error") {
		c.Kill()
		t.Fatalf("%s says %q\n%s", c.Command.Env[len(c.Command.Env)-1], c.Said, &c.Errors)
	}
}

// Kill kills it, and returns when it is gone.
func (c *Child) Kill() {
	_ = c.Command.Process.Kill() // it lives until waited for
	_ = c.Command.Wait()         // "signal: killed"
}

// End gives it an order on standard input, and the end of that, and wants it to end well.
func (c *Child) End(t testing.TB, order string) {
	t.Helper()
	if err := c.end(order); err != nil {
		t.Errorf("%s: %v\n%s", c.Command.Env[len(c.Command.Env)-1], err, &c.Errors)
	}
}

// EndAnyhow is End without an order for a child that may have ended otherwise.
func (c *Child) EndAnyhow() { _ = c.end("") }

func (c *Child) end(order string) error {
	_, _ = io.WriteString(c.input, order) // one that is dead is seen below
	_ = c.input.Close()
	return c.Command.Wait()
}
