package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// labThread writes the files of a thread of the kernel that has used so many seconds.
func labThread(t *testing.T, proc, id, name string, start, seconds int) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(proc, id), 0o700); err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("%s (%s) I 2 0 0 0 -1 69238880 0 0 0 0 0 %d 0 0 20 0 1 0 %d 0 0", id, name, seconds*clockTicks, start)
	if err := os.WriteFile(filepath.Join(proc, id, "stat"), []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheKernelsWorkersAreAddedUp(t *testing.T) {
	proc := t.TempDir()
	k := &kernelThreads{proc: proc}
	children := func(ids string) {
		if err := os.MkdirAll(filepath.Join(proc, "2/task/2"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, "2/task/2/children"), []byte(ids), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	uses := func(want float64) {
		t.Helper()
		if seconds, resident := k.use(); magnitude(seconds-want) > 1e-9 || resident != 0 {
			t.Errorf("%v s and %d bytes, want %v s", seconds, resident, want)
		}
	}
	uses(0) // nothing to be seen
	labThread(t, proc, "10", "kworker/u8:1-dm-thin", 100, 3)
	labThread(t, proc, "11", "kworker/0:2+events (x)", 100, 1)
	labThread(t, proc, "12", "jbd2/vda-8", 100, 50)
	labThread(t, proc, "13", "loop0", 200, 2)
	labThread(t, proc, "14", "ksoftirqd/0", 1, 70)
	labThread(t, proc, "15", "dm_bufio_cache", 1, 1)
	children("10 11 12 13 14 15 99 x\n") // 99 just ended
	uses(7)
	labThread(t, proc, "10", "kworker/u8:1+loop0", 100, 4)
	uses(8)
	children("10 11 12 14 15\n") // loop0 ended: its time stays
	uses(8)
	labThread(t, proc, "11", "kworker/1:0", 900, 1) // another one with the same number
	uses(9)
	if err := os.WriteFile(filepath.Join(proc, "10/stat"), []byte("10 (kworker/x) S"), 0o600); err != nil {
		t.Fatal(err)
	}
	uses(9) // unreadable is as good as ended
	if isWorker("1 systemd") || isWorker("") {
		t.Error("took anything for a worker")
	}
	if kernelSeen(proc) {
		t.Error("saw the kernel's threads where there are none")
	}
}

// labTarget is a file that stands for a device of the kernel.
type labTarget struct {
	written uint64
	stops   int
	failed  error
}

func (l *labTarget) Written() uint64 { l.written += 4096; return l.written }
func (l *labTarget) Stop() error     { l.stops++; return l.failed }
func (*labTarget) Command() []string { return []string{"mklab", "disk"} }

type labPeer struct {
	raw
	plan Plan
}

func (l labPeer) Plan(Site) (Plan, error) { return l.plan, nil }

func TestATargetOfTheKernelIsMadeAndTakenAway(t *testing.T) {
	target := new(labTarget)
	plan := Plan{Kernel: func(context.Context) (kernelTarget, error) { return target, nil }}
	s, err := startServer(t.Context(), plan, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.writtenSoFar(0) != 4096 || s.pid != 0 {
		t.Errorf("process %d", s.pid)
	}
	of := s.follow(0)
	of.take()
	of.Stop()
	if kernelSeen("/proc") && len(of.samples) == 0 {
		t.Error("nobody follows the kernel's threads")
	}
	for range 2 {
		s.Stop()
	}
	if target.stops != 1 || s.left != nil || s.written != 8192 {
		t.Errorf("stopped %d times, %v, %d bytes", target.stops, s.left, s.written)
	}

	busy := errors.New("device is busy")
	target.failed, plan.Setup = busy, [][]string{{"false"}}
	if _, err := startServer(t.Context(), plan, nil); !errors.Is(err, busy) || !strings.HasPrefix(err.Error(), "false: ") || target.stops != 2 {
		t.Errorf("a plan whose commands fail: %v, stopped %d times", err, target.stops)
	}
	plan.Kernel = func(context.Context) (kernelTarget, error) { return nil, busy }
	if _, err := startServer(t.Context(), plan, nil); !errors.Is(err, busy) {
		t.Error(err)
	}
	stage := &Stage{Dir: t.TempDir(), Size: 1 << 20}
	plan = Plan{Kernel: func(context.Context) (kernelTarget, error) { return target, nil }}
	err = stage.with(t.Context(), func(Site) (Plan, error) { return plan, nil }, func(Site, *server) error { return nil })
	if !errors.Is(err, busy) {
		t.Errorf("what a Stage could not take away: %v", err)
	}
}

// end to end: its bytes are counted, and what it leaves fails the run.
func TestRunOnATargetOfTheKernel(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio: apt install fio")
	}
	if testing.Short() {
		t.Skip("runs fio; not with -short")
	}
	path := filepath.Join(t.TempDir(), "f")
	if err := fillFile(path, SizeMin); err != nil {
		t.Fatal(err)
	}
	profile, err := LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	target := new(labTarget)
	c := Config{
		Profile: profile, Only: []string{"pool-bytes-randwrite-4k"}, Backing: Backing{Kind: BackingPool, Path: t.TempDir(), Size: SizeMin}, Client: fio{},
		Peers: []Peer{labPeer{plan: Plan{
			Target: Target{Engine: "libaio", Path: path},
			Kernel: func(context.Context) (kernelTarget, error) { return target, nil },
		}}},
		Rounds: 1, Ramp: -1, CountBytes: true,
	}
	r, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if run := r.Runs[0]; run.ServerBytesWritten != 4096 || run.IOs == 0 || target.stops != 1 || strings.Join(r.Peers[0].Command, " ") != "mklab disk" {
		t.Errorf("%+v, stopped %d times, of %v", run, target.stops, r.Peers[0].Command)
	}
	target.failed = errors.New("device is busy")
	for _, count := range []bool{true, false} {
		c.CountBytes = count
		if _, err := Run(t.Context(), c); !errors.Is(err, target.failed) {
			t.Errorf("counted %v: %v", count, err)
		}
	}
}

func TestAnOrderBegunIsFinished(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { // ends with the command
		_, err := outputWhole(ctx, []string{"sleep", "0.2"})
		done <- err
	}()
	time.Sleep(50 * time.Millisecond) // most likely it has begun
	cancel()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if _, err := outputWhole(ctx, []string{"true"}); !errors.Is(err, context.Canceled) {
		t.Errorf("began with an ended context: %v", err)
	}
	if _, err := outputWhole(t.Context(), []string{"sh", "-c", "echo why >&2; exit 1"}); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("%v, want what it said", err)
	}
	if _, err := lockFolder(filepath.Join(t.TempDir(), "nowhere")); err == nil {
		t.Error("locked nothing")
	}
}
