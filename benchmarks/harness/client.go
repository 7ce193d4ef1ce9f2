package harness

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"time"
)

// Client puts load on a target.
type Client interface {
	Name() string
	Program() (program, debianPackage string)
	VersionArgs() []string
	// Check tells whether the client can run the case on the target.
	Check(Case, Target) error
	// Run loads the target and returns what it measured. It calls started with
	// the process id once the client runs, and leaves nothing running.
	Run(ctx context.Context, job ClientJob) (Measured, error)
}

// ClientJob is one run of a client.
type ClientJob struct {
	Case    Case
	Timing  Timing
	Target  Target
	Dir     string // empty, for the client's files
	CPUs    []int
	Bound   time.Duration // the run is ended after so long
	Started func(pid int)
}

// Measured is what one run of a client measured. A latency of 0 was not measured.
type Measured struct {
	Metrics
	From, To time.Time // where the load was surely on, for sampling
	Whole    bool      // they hold all of the load: it ended with its work
}

// clients is the table of clients, the default first.
var clients = []Client{fio{}, &devperf{}, qemuImg{}}

// ClientNames lists the clients.
func ClientNames() []string {
	names := make([]string, len(clients))
	for i, c := range clients {
		names[i] = c.Name()
	}
	return names
}

// FindClient gives a client by name.
func FindClient(name string) (Client, error) {
	for _, c := range clients {
		if c.Name() == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("no client is called %q (have %v)", name, ClientNames())
}

// MissingError says that a program is not installed, and how to get it.
type MissingError struct{ Program, Remedy string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is not installed; %s", e.Program, e.Remedy)
}

func lookProgram(program, debianPackage string) error {
	if program == "" {
		return nil
	}
	if _, err := exec.LookPath(program); err != nil {
		return &MissingError{Program: program, Remedy: "apt install " + debianPackage}
	}
	return nil
}

// endMax is how long after its last request a client may still run: fio looks
// for ended jobs every 100 ms, then computes its report.
const endMax = 200 * time.Millisecond

// insideWindow is a part of the run where the measured load is surely on, for
// clients that do not tell their window. It is counted from the client's end:
// its start-up takes from 0.1 to 0.6 s, longer with some servers, its end little.
func insideWindow(ended time.Time, seconds float64) (from, to time.Time) {
	length := time.Duration(seconds * float64(time.Second))
	return ended.Add(-length), ended.Add(-min(endMax, length/2))
}

// runClient starts argv on the job's CPUs and waits for it. Output is what it
// wrote to standard output.
func runClient(ctx context.Context, job ClientJob, argv []string) (output []byte, started, ended time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, job.Bound)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = job.Dir
	cmd.WaitDelay = time.Second
	cmd.Cancel = func() error { return killGroup(cmd) }
	stdout, stderr := new(limited), new(tail)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := startOn(cmd, job.CPUs); err != nil {
		return nil, started, ended, fmt.Errorf("%s: %w", argv[0], err)
	}
	started = time.Now()
	if job.Started != nil {
		job.Started(cmd.Process.Pid)
	}
	err = cmd.Wait()
	ended = time.Now()
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return nil, started, ended, fmt.Errorf("%s: not done after %v, ended", argv[0], job.Bound)
	case ctx.Err() != nil:
		return nil, started, ended, ctx.Err()
	case err != nil:
		said := stderr.String()
		if said == "" {
			said = stdout.Head()
		}
		return stdout.buf, started, ended, fmt.Errorf("%s: %w: %s", argv[0], err, said)
	}
	return stdout.buf, started, ended, nil
}

// limited keeps the begin of what is written to it.
type limited struct{ buf []byte }

const outputMax = 16 << 20 // a client's report; fio's is below 1 MiB

func (l *limited) Write(p []byte) (int, error) {
	l.buf = append(l.buf, p[:min(len(p), outputMax-len(l.buf))]...)
	return len(p), nil
}

// Head is enough of the output for an error.
func (l *limited) Head() string { return string(l.buf[:min(len(l.buf), 1<<10)]) }

// randomChunk is a megabyte that does not compress, the same on every machine.
func randomChunk() []byte {
	chunk := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte("ashlar bench"))).Read(chunk) // never fails
	return chunk
}
