package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is one side of a pseudo terminal: what a program writes to the other is
// collected here.
type terminal struct {
	t      *testing.T
	master *os.File
	done   chan struct{}

	mu   sync.Mutex
	text bytes.Buffer
}

// openTerminal makes a pseudo terminal of a size; slave is for the program.
func openTerminal(t *testing.T, columns, rows uint16) (term *terminal, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals (%v)", err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		_ = master.Close() // unused
		t.Skipf("needs pseudo terminals (%v)", err)
	}
	term = &terminal{t: t, master: master, done: make(chan struct{})}
	term.resize(columns, rows)
	go func() { // ends when the program has closed its side
		defer close(term.done)
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			if err != nil {
				return
			}
			term.mu.Lock()
			term.text.Write(b[:n])
			term.mu.Unlock()
		}
	}()
	t.Cleanup(func() { <-term.done; _ = master.Close() })
	return term, slave
}

func (x *terminal) resize(columns, rows uint16) {
	x.t.Helper()
	if err := unix.IoctlSetWinsize(int(x.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		x.t.Fatal(err)
	}
}

// until waits for text to be drawn, and forgets what was drawn.
func (x *terminal) until(text string) {
	x.t.Helper()
	for deadline := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		x.mu.Lock()
		drawn := x.text.String()
		found := strings.Contains(drawn, text)
		if found {
			x.text.Reset()
		}
		x.mu.Unlock()
		if found {
			return
		}
		if time.Now().After(deadline) {
			x.t.Fatalf("%q was not drawn in %v:\n%q", text, wait, drawn)
		}
	}
}

func (x *terminal) press(keys string) {
	x.t.Helper()
	if _, err := x.master.WriteString(keys); err != nil {
		x.t.Fatal(err)
	}
}

// TestTopOnATerminal runs the command on a pseudo terminal: it draws, follows keys and
// a new size, sees the daemon go and come back, and leaves the terminal as it was.
func TestTopOnATerminal(t *testing.T) {
	for _, how := range []string{"q", "signal"} {
		t.Run(how, func(t *testing.T) {
			d := startDaemon(t)
			term, slave := openTerminal(t, 100, 30)
			c := command(t, "top", "--interval", "20ms")
			c.Env = append(c.Env, "TERM=xterm")
			c.Stdin, c.Stdout = slave, slave
			c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
			if err != nil {
				t.Fatal(err)
			}
			p := start(t, c)
			defer func() { _ = slave.Close() }() // lets the reader end
			term.until("[4 volumes]")
			term.press("2")
			term.until("[2 reactors]")
			term.press("1\r")
			term.until("top cause: ")
			term.press("\x1b")
			term.until("vm2")
			term.resize(60, 10)
			if err := p.cmd.Process.Signal(syscall.SIGWINCH); err != nil {
				t.Fatal(err)
			}
			term.until("[4 volumes]")
			d.silent.Store(true)
			term.until("daemon away")
			d.silent.Store(false)
			term.until("IOPS")
			if how == "q" {
				term.press("q")
			} else {
				p.signal(syscall.SIGTERM)
			}
			if code := p.code(); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
			if err != nil || *after != *before {
				t.Errorf("the terminal was left as %+v, not %+v: %v", after, before, err)
			}
		})
	}
}

func TestTopWithoutADaemonEndsAtOnce(t *testing.T) {
	_, slave := openTerminal(t, 80, 24)
	c := command(t, "top", "--server", "unix:///nowhere/control.sock")
	c.Stdin, c.Stdout = slave, slave
	p := start(t, c)
	defer func() { _ = slave.Close() }() // lets the reader end
	if code := p.code(); code != exitFailure || !strings.Contains(p.stderr.String(), "is `ashlar serve` running?") {
		t.Errorf("exit code %d\n%s", code, &p.stderr)
	}
}

// TestWhyFitsTheTerminal: on a narrow one each kind of request has a table.
func TestWhyFitsTheTerminal(t *testing.T) {
	startDaemon(t)
	term, slave := openTerminal(t, 80, 24)
	c := command(t, "why", "vm1", "--interval", "10ms")
	c.Stdout = slave
	p := start(t, c)
	_ = slave.Close() // so that the reader ends with the command
	if code := p.code(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	<-term.done
	if n := strings.Count(term.text.String(), "STAGE"); n != 3 {
		t.Errorf("%d tables\n%s", n, &term.text)
	}
}

// TestNoCommandAsksTheTerminal: a terminal that does not answer would hold up every
// command for seconds.
func TestNoCommandAsksTheTerminal(t *testing.T) {
	term, slave := openTerminal(t, 80, 24)
	c := command(t, "version")
	c.Env = append(c.Env, "TERM=xterm-256color")
	c.Stdin, c.Stdout = slave, slave
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	p := start(t, c)
	_ = slave.Close() // so that the reader ends with the command
	if code := p.code(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	<-term.done
	if text := term.text.String(); !strings.HasPrefix(text, "ashlar ") || strings.Contains(text, "\x1b") {
		t.Errorf("it wrote %q", text)
	}
}
