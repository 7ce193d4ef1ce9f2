package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	startMax = 10 * time.Second // for a server to answer
	stopMax  = 5 * time.Second  // after SIGTERM; then SIGKILL
	closeMax = time.Minute      // the same for a node, which writes what it has not yet
	setupMax = 10 * time.Second // for a program to tell about itself
	orderMax = 5 * time.Minute  // for each command of a plan: one fills a volume
	readyGap = 10 * time.Millisecond
	tailMax  = 4 << 10 // bytes of a child's output kept for an error
)

// server is a started plan.
type server struct {
	pid    int // 0 when the plan starts nothing
	target Target
	kernel kernelTarget  // nil: a process serves, or nobody
	cmd    *exec.Cmd     // nil for a detached server
	exited chan struct{} // closed when cmd has ended
	output *tail
	known  map[int]uint64 // process ids seen of the tree, with their start

	patience time.Duration // of Stop
	killed   bool          // Stop lost it
	left     error         // what Stop could not take away
	written  uint64        // bytes given to devices in the whole life of cmd, or by the kernel's target; set by Stop
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - tailMax; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.buf))
}

// startServer starts a plan on the CPUs and waits until it answers. On error
// nothing is left running.
func startServer(ctx context.Context, p Plan, cpus []int) (*server, error) {
	s := &server{target: p.Target, output: new(tail), known: map[int]uint64{}, patience: stopMax}
	if p.StopMax > 0 {
		s.patience = p.StopMax
	}
	for path, text := range p.Files {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return nil, fmt.Errorf("start the server: %w", err)
		}
	}
	if p.Kernel != nil {
		var err error
		if s.kernel, err = p.Kernel(ctx); err != nil {
			return nil, err
		}
		if err := runAll(ctx, p.Setup); err != nil {
			s.Stop()
			return nil, errors.Join(err, s.left)
		}
		return s, nil
	}
	if len(p.Argv) == 0 {
		return s, nil
	}
	cmd := exec.Command(p.Argv[0], p.Argv[1:]...)
	cmd.Stdout, cmd.Stderr = s.output, s.output
	cmd.WaitDelay = stopMax // a detached child keeps the output open
	if err := startOn(cmd, cpus); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	s.cmd, s.pid, s.exited = cmd, cmd.Process.Pid, make(chan struct{})
	go func() { // ends with the process
		_ = cmd.Wait() // an early end is noticed by its socket, and reported with the output
		close(s.exited)
	}()
	if err := s.ready(ctx, p); err != nil {
		text := s.output.String()
		s.Stop()
		if text != "" {
			err = fmt.Errorf("%w; its output: %s", err, text)
		}
		return nil, fmt.Errorf("%s: %w", strings.Join(p.Argv, " "), err)
	}
	return s, nil
}

func (s *server) ready(ctx context.Context, p Plan) error {
	startCtx, cancel := context.WithTimeout(ctx, startMax)
	defer cancel()
	if p.PIDFile != "" {
		if err := s.adopt(startCtx, p.PIDFile); err != nil {
			return err
		}
	}
	network, address, _ := strings.Cut(p.Ready, ":")
	for {
		c, err := new(net.Dialer).DialContext(startCtx, network, address)
		if err == nil {
			_ = c.Close() // only looked whether it answers
			break
		}
		exited := s.exited
		if p.PIDFile != "" {
			exited = nil // the starter is expected to end
		}
		select {
		case <-exited:
			return errors.New("ended before it answered")
		case <-startCtx.Done():
			return fmt.Errorf("does not answer on %s: %w", p.Ready, err)
		case <-time.After(readyGap):
		}
	}
	return runAll(ctx, p.Setup)
}

// runAll runs commands one after the other.
func runAll(ctx context.Context, commands [][]string) error {
	for _, argv := range commands {
		if err := runBounded(ctx, argv); err != nil {
			return err
		}
	}
	return nil
}

// adopt waits for the pid file of a server that detaches.
func (s *server) adopt(ctx context.Context, path string) error {
	for {
		text, err := os.ReadFile(path)
		if err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && pid > 1 {
				s.pid = pid
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wrote no process id to %s", path)
		case <-time.After(readyGap):
		}
	}
}

func runBounded(ctx context.Context, argv []string) error {
	_, err := outputOf(ctx, argv)
	return err
}

// outputOf runs a command and gives what it wrote to standard output.
func outputOf(ctx context.Context, argv []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, orderMax)
	defer cancel()
	return capture(exec.CommandContext(ctx, argv[0], argv[1:]...))
}

// outputWhole is the same for a command that is never interrupted, neither by ctx nor by
// a terminal's ^C; with ctx ended it does not begin.
func outputWhole(ctx context.Context, argv []string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), orderMax)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	ownGroup(cmd)
	return capture(cmd)
}

// capture runs a command; what it said is in an error.
func capture(cmd *exec.Cmd) ([]byte, error) {
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	said := new(tail)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, said), said
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, said)
	}
	return out.Bytes(), nil
}

// note remembers the process tree, so that Stop finds children whose parent is
// gone. A start time tells a process from a later one with the same id.
func (s *server) note() {
	if s.pid == 0 {
		return
	}
	for _, pid := range tree(s.pid) {
		if st, err := readStat(pid); err == nil {
			s.known[pid] = st.startTicks
		}
	}
}

// cleanUp runs the plan's last commands, also when ctx has ended.
func (s *server) cleanUp(ctx context.Context, p Plan) error {
	return runAll(context.WithoutCancel(ctx), p.After)
}

// writtenSoFar is what the server has given to devices, 0 when that cannot be read.
func (s *server) writtenSoFar(pid int) uint64 {
	if s.kernel != nil {
		return s.kernel.Written()
	}
	return processWritten(pid)
}

// follow begins to sample what the server uses; pid is its process, or 0.
func (s *server) follow(pid int) *sampler {
	if s.kernel != nil {
		return startKernelSampler()
	}
	return startSampler(pid)
}

// Stop ends the server and its children and waits for them.
func (s *server) Stop() {
	if s.kernel != nil {
		s.left = s.kernel.Stop()
		s.written = s.kernel.Written()
		s.kernel = nil
		return
	}
	if s.pid == 0 {
		return
	}
	s.note()
	s.signal(syscall.SIGTERM)
	deadline := time.Now().Add(s.patience)
	for s.alive() && time.Now().Before(deadline) {
		time.Sleep(readyGap)
	}
	if s.alive() {
		s.killed = true
		s.signal(syscall.SIGKILL)
	}
	if s.exited != nil {
		<-s.exited
		s.written = bytesWritten(s.cmd)
	}
	s.pid = 0
}

func (s *server) signal(sig syscall.Signal) {
	for pid := range s.known {
		if s.running(pid) {
			_ = syscall.Kill(pid, sig) // it may end on its own meanwhile
		}
	}
}

func (s *server) running(pid int) bool {
	st, err := readStat(pid)
	return err == nil && st.startTicks == s.known[pid]
}

func (s *server) alive() bool {
	for pid := range s.known {
		if s.running(pid) {
			return true
		}
	}
	return false
}

// freePort finds a TCP port of the loopback that nobody listens on now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer func() { _ = l.Close() }() // nothing was accepted
	return l.Addr().(*net.TCPAddr).Port, nil
}
