//go:build linux

package reactor

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/buf"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// each runs a test on both engines, and wants no descriptor left.
func each(t *testing.T, f func(t *testing.T, c Config)) {
	t.Helper()
	for _, engine := range []EngineKind{EngineRing, EngineEpoll} {
		t.Run(string(engine), func(t *testing.T) {
			if engine == EngineRing {
				testenv.RequireIOURing(t)
			}
			testenv.CheckFDs(t)
			f(t, Config{Engine: engine, Log: slog.New(slog.DiscardHandler)})
		})
	}
}

func begin(t testing.TB, c Config) *Reactor {
	t.Helper()
	r, err := Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	return r
}

func run(t testing.TB, r *Reactor, f func(r *Reactor)) {
	t.Helper()
	if err := r.Run(f); err != nil {
		t.Fatal(err)
	}
}

// nextTurn returns when the turn that is running, with all it deferred, is over.
// Messages alone do not show that: one turn may take several.
func nextTurn(t testing.TB, r *Reactor) {
	t.Helper()
	done := make(chan struct{})
	run(t, r, func(r *Reactor) { r.Arm(&Timer{Func: func() { close(done) }}, 0) })
	await(t, done, "the next turn")
}

// await fails the test when done does not close.
func await(t testing.TB, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatalf("waited in vain for %s", what)
	}
}

func TestMessagesRunInOrderOnOneThread(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		if r.Engine() != c.Engine || r.Name() != "reactor" || r.Describe() == "" {
			t.Errorf("engine %s, name %q, %q", r.Engine(), r.Name(), r.Describe())
		}
		threads := map[int]bool{}
		var order []int
		for i := range 100 {
			r.Post(TaskFunc(func(*Reactor) {
				order = append(order, i)
				threads[unix.Gettid()] = true
			}))
		}
		run(t, r, func(*Reactor) {})
		if !slices.IsSorted(order) || len(order) != 100 || len(threads) != 1 || !threads[r.Stats().Thread] {
			t.Errorf("order %v on threads %v, want thread %d", order, threads, r.Stats().Thread)
		}
	})
}

func TestStoppedReactorTakesNothing(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(r.Stop)
		}
		wg.Wait()
		if r.Post(TaskFunc(func(*Reactor) { t.Error("ran") })) {
			t.Error("Post after Stop")
		}
		if err := r.Run(func(*Reactor) { t.Error("ran") }); !errors.Is(err, ErrStopped) {
			t.Errorf("Run after Stop: %v", err)
		}
	})
}

func TestStopRacesWithMessages(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.BufferBytes = 1
		for range 30 {
			r := begin(t, c)
			var wg sync.WaitGroup
			for i := range 4 {
				wg.Go(func() {
					for {
						ran := false
						err := r.Run(func(*Reactor) { ran = true })
						if err == nil && !ran {
							t.Error("Run says it ran and did not")
						}
						if err != nil {
							return
						}
						if i == 0 {
							time.Sleep(time.Microsecond) // others find it asleep
						}
					}
				})
			}
			time.Sleep(time.Millisecond)
			r.Stop()
			wg.Wait()
		}
	})
}

// Whoever has claimed a wake-up writes to the reactor's eventfd a moment later.
// The descriptor must still be the reactor's by then.
func TestStopWaitsForClaimedWakeUps(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		run(t, r, func(r *Reactor) { r.Arm(&Timer{Func: func() {}}, 30*time.Millisecond) })
		for !r.asleep.CompareAndSwap(true, false) { // as wake does
			time.Sleep(10 * time.Microsecond)
		}
		stopped := make(chan struct{})
		go func() { // ends with Stop
			r.Stop()
			close(stopped)
		}()
		select {
		case <-stopped:
			t.Error("stopped, and closed the descriptor that is about to be written")
			return
		case <-time.After(100 * time.Millisecond):
		}
		if _, err := unix.Write(r.wakeFD, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
			t.Error(err)
		}
		await(t, stopped, "Stop")
	})
}

func TestConfigErrorsLeaveNothing(t *testing.T) {
	testenv.CheckFDs(t)
	for want, c := range map[string]Config{
		"unknown engine": {Engine: "steam"}, "unknown poll mode": {Poll: "often"}, "at most": {IODepthMax: 1 << 20},
		"pin to CPU": {CPU: 4000}, "must be positive": {BufferBytes: -1},
	} {
		if _, err := Start(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %q", c, err, want)
		}
	}
}

func TestPinnedReactorStaysOnItsCPU(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.CPU = 1
		r := begin(t, c)
		run(t, r, func(*Reactor) {
			var set unix.CPUSet
			if err := unix.SchedGetaffinity(0, &set); err != nil || set.Count() != 1 || !set.IsSet(0) {
				t.Errorf("runs on %d CPUs: %v", set.Count(), err)
			}
		})
	})
}

func TestDeferredRunsOnceATurn(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		runs, chained := 0, 0
		d := &Deferred{Func: func() { runs++ }}
		done := make(chan struct{})
		var chain Deferred
		chain.Func = func() {
			if chained++; chained == 5*deferRounds { // more than fit into a turn
				close(done)
				return
			}
			r.Defer(&chain)
		}
		run(t, r, func(r *Reactor) {
			for range 10 {
				r.Defer(d)
			}
			if runs != 0 {
				t.Error("Defer ran it at once")
			}
			r.Defer(&chain)
		})
		await(t, done, "a chain of deferred functions")
		run(t, r, func(*Reactor) {
			if runs != 1 {
				t.Errorf("ran %d times, want once", runs)
			}
			r.Defer(d)
		})
		nextTurn(t, r)
		run(t, r, func(*Reactor) {
			if runs != 2 {
				t.Errorf("ran %d times, want twice", runs)
			}
		})
	})
}

func TestPollersRunEveryTurn(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		left := 1000
		done := make(chan struct{})
		p := &Poller{Poll: func() bool {
			if left == 0 {
				return false
			}
			if left--; left == 0 {
				close(done)
			}
			return true
		}}
		run(t, r, func(r *Reactor) { r.AddPoller(p) })
		await(t, done, "a poller")
		run(t, r, func(r *Reactor) { r.RemovePoller(p); r.RemovePoller(p) })

		run(t, r, func(r *Reactor) { r.NeedTurns() })
		before := r.Stats()
		time.Sleep(20 * time.Millisecond)
		if after := r.Stats(); after.Turns-before.Turns < 100 {
			t.Errorf("%d turns in 20ms while turns are needed", after.Turns-before.Turns)
		}
		run(t, r, func(r *Reactor) { r.ReleaseTurns() })
	})
}

func TestBuffersAreWaitedFor(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.BufferBytes = buf.ChunkSize
		r := begin(t, c)
		var b []byte
		woken := 0
		d := &Deferred{Func: func() { woken++ }}
		cancelled := &Deferred{Func: func() { t.Error("ran although it was cancelled") }}
		run(t, r, func(r *Reactor) {
			b = r.Buffers().Alloc(buf.ChunkSize)
			r.WaitBuffers(d)
			r.WaitBuffers(d)
			r.WaitBuffers(cancelled)
			r.CancelWait(cancelled)
		})
		run(t, r, func(r *Reactor) { r.FreeBuffer(b) })
		nextTurn(t, r)
		run(t, r, func(r *Reactor) {
			if woken != 1 {
				t.Errorf("woken %d times, want once", woken)
			}
			r.FreeBuffer(r.Buffers().Alloc(1))
		})
		nextTurn(t, r)
		run(t, r, func(*Reactor) {
			if woken != 1 {
				t.Errorf("woken %d times by one wait", woken)
			}
		})
	})
}

func TestMailboxFullIsSaid(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		hold, held := make(chan struct{}), make(chan struct{})
		r.Post(TaskFunc(func(*Reactor) { close(held); <-hold }))
		await(t, held, "the reactor")
		var ran atomic.Int64
		count := TaskFunc(func(*Reactor) { ran.Add(1) })
		accepted := int64(0)
		for r.TryPost(count) {
			accepted++
		}
		if accepted != mailboxCapacity {
			t.Errorf("%d messages fit, want %d", accepted, mailboxCapacity)
		}
		posted := make(chan struct{})
		go func() { // ends when there is room
			r.Post(count)
			close(posted)
		}()
		select {
		case <-posted:
			t.Error("Post did not wait for room")
		case <-time.After(5 * time.Millisecond):
		}
		close(hold)
		await(t, posted, "room in the mailbox")
		run(t, r, func(*Reactor) {})
		if ran.Load() != accepted+1 {
			t.Errorf("%d messages ran, want %d", ran.Load(), accepted+1)
		}
	})
}

// TestNoWakeUpIsLost sends from many goroutines to a reactor that falls asleep
// between messages; a lost wake-up leaves one of them waiting.
func TestNoWakeUpIsLost(t *testing.T) {
	for _, poll := range []PollMode{PollAuto, PollOff, PollBusy} {
		t.Run(string(poll), func(t *testing.T) {
			each(t, func(t *testing.T, c Config) {
				c.Poll = poll
				r := begin(t, c)
				const senders = 8
				rounds := 300
				if poll == PollBusy {
					rounds = 30 // it takes a CPU of two
				}
				done := make(chan struct{})
				var wg sync.WaitGroup
				for s := range senders {
					wg.Go(func() {
						rng := rand.New(rand.NewPCG(1, uint64(s)))
						for range rounds {
							burst := 1 + rng.IntN(20)
							got := make(chan struct{}, burst)
							for range burst {
								r.Post(TaskFunc(func(*Reactor) { got <- struct{}{} }))
							}
							for range burst {
								<-got
							}
							if rng.IntN(4) == 0 {
								time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond)
							}
						}
					})
				}
				go func() { wg.Wait(); close(done) }() // ends with the senders
				await(t, done, "all messages")
			})
		})
	}
}

func TestReactorsSendToEachOther(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		a, b := begin(t, c), begin(t, c)
		const count = 2000
		done := make(chan struct{})
		n := 0
		var ping, pong TaskFunc
		ping = func(*Reactor) {
			if !b.TryPost(pong) {
				t.Error("mailbox full")
			}
		}
		pong = func(*Reactor) {
			if n++; n == count {
				close(done)
			} else if !a.TryPost(ping) {
				t.Error("mailbox full")
			}
		}
		a.Post(ping)
		await(t, done, "the last message")
	})
}

func TestIdleReactorUsesNoCPU(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		file := tempFile(t, 1<<20)
		run(t, r, func(r *Reactor) { // it has known load
			if err := r.Reserve(1); err != nil {
				t.Error(err)
			}
		})
		for range 50 {
			if n := submit(t, r, &IO{Op: OpRead, FD: int(file.Fd()), Buf: make([]byte, 4096)}); n != 4096 {
				t.Fatalf("read: %d", n)
			}
		}
		time.Sleep(20 * time.Millisecond)
		used := func() (d time.Duration) {
			run(t, r, func(*Reactor) {
				var ts unix.Timespec
				if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
					t.Error(err)
				}
				d = time.Duration(ts.Nano())
			})
			return d
		}
		before, stats := used(), r.Stats()
		time.Sleep(time.Second)
		cpu, turns := used()-before, r.Stats().Turns-stats.Turns
		t.Logf("an idle second: %v of CPU, %d turns", cpu, turns)
		if cpu > 10*time.Millisecond || turns > 50 {
			t.Errorf("an idle second took %v of CPU in %d turns", cpu, turns)
		}
	})
}

func TestBusyReactorDoesNotSleep(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.Poll = PollBusy
		r := begin(t, c)
		time.Sleep(30 * time.Millisecond)
		if s := r.Stats(); s.SpinBudget <= 0 || s.Sleeps != 0 || s.Slept != 0 || s.Spun < time.Millisecond || s.Turns == 0 {
			t.Errorf("slept %v in %d sleeps, spun %v in %d turns", s.Slept, s.Sleeps, s.Spun, s.Turns)
		}
	})
}

func TestTimeIsAccountedFor(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		start := time.Now()
		for range 20 {
			run(t, r, func(*Reactor) {
				for busy := time.Now(); time.Since(busy) < time.Millisecond; {
				}
			})
			time.Sleep(2 * time.Millisecond)
		}
		run(t, r, func(*Reactor) {})
		s := r.Stats()
		sum, real := s.Busy+s.Spun+s.Slept, time.Since(start)
		if sum < real*7/10 || sum > real*12/10+10*time.Millisecond {
			t.Errorf("busy %v + spun %v + slept %v = %v in %v", s.Busy, s.Spun, s.Slept, sum, real)
		}
		if s.Busy < 19*time.Millisecond || s.Slept < 10*time.Millisecond || s.GapMax < time.Millisecond || s.Sleeps < 10 {
			t.Errorf("busy %v, slept %v in %d sleeps, longest turn %v", s.Busy, s.Slept, s.Sleeps, s.GapMax)
		}
		gaps := uint64(0)
		for _, n := range s.Gaps[19:] { // half a millisecond and more
			gaps += n
		}
		if gaps < 15 { // two that came together are one turn
			t.Errorf("%d long turns of 20", gaps)
		}
	})
}

func TestReserveHasABound(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.IODepthMax = 10
		r := begin(t, c)
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(7); err != nil {
				t.Error(err)
			}
			if err := r.Reserve(4); err == nil {
				t.Error("11 of 10 reserved")
			}
			if err := r.Reserve(3); err != nil {
				t.Error(err)
			}
			r.Release(7)
			if err := r.Reserve(7); err != nil {
				t.Error(err)
			}
		})
	})
}

func tempFile(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // a test's file
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// submit runs one operation and returns its result.
func submit(t testing.TB, r *Reactor, io *IO) int {
	t.Helper()
	done := make(chan struct{})
	submitting, times := false, 0
	io.Done = func(*IO) {
		if submitting {
			t.Error("completed inside SubmitIO")
		}
		if unix.Gettid() != r.Stats().Thread {
			t.Error("completed on another thread")
		}
		if times++; times == 1 {
			close(done)
		} else {
			t.Error("completed twice")
		}
	}
	run(t, r, func(r *Reactor) {
		submitting = true
		r.SubmitIO(io)
		submitting = false
	})
	await(t, done, "an operation")
	return io.Result
}

func TestOperationsOfFiles(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		f := tempFile(t, 1<<20)
		fd := int(f.Fd())
		var registered *File
		var arena []byte
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(4); err != nil {
				t.Error(err)
			}
			registered = r.AddFile(fd)
			arena = r.Buffers().Alloc(8192)
		})
		if registered.FD() != fd {
			t.Errorf("descriptor %d, want %d", registered.FD(), fd)
		}
		heap := bytes.Repeat([]byte{3}, 8192)
		for i := range arena {
			arena[i] = 4
		}
		back := make([]byte, 8192)
		for _, test := range []struct {
			name string
			io   IO
			want int
		}{
			{"write", IO{Op: OpWrite, FD: fd, Buf: heap, Offset: 4096}, 8192},
			{"write, durable", IO{Op: OpWrite, FD: fd, Buf: heap, Offset: 4096, RWFlags: unix.RWF_DSYNC}, 8192},
			{"write, registered", IO{Op: OpWrite, File: registered, Buf: arena, Offset: 1 << 16}, 8192},
			{"read", IO{Op: OpRead, FD: fd, Buf: back, Offset: 4096}, 8192},
			{"read, end of file", IO{Op: OpRead, FD: fd, Buf: back, Offset: 1<<20 - 100}, 100},
			{"read, past the end", IO{Op: OpRead, FD: fd, Buf: back, Offset: 2 << 20}, 0},
			{"fsync", IO{Op: OpFsync, FD: fd}, 0},
			{"fsync, registered", IO{Op: OpFsync, File: registered}, 0},
			{"fallocate", IO{Op: OpFallocate, FD: fd, Mode: unix.FALLOC_FL_KEEP_SIZE, Offset: 0, Length: 4096}, 0},
			{"function", IO{Op: OpFunc, Func: func() int { return 42 }}, 42},
			{"function, error", IO{Op: OpFunc, Func: func() int { return -int(unix.ENOENT) }}, -int(unix.ENOENT)},
			{"bad descriptor", IO{Op: OpRead, FD: 1 << 20, Buf: back}, -int(unix.EBADF)},
			{"bad offset", IO{Op: OpWrite, FD: fd, Buf: heap, Offset: -4096 - 1<<40}, -int(unix.EINVAL)},
		} {
			io := test.io
			if got := submit(t, r, &io); got != test.want {
				t.Errorf("%s: result %d, want %d", test.name, got, test.want)
			}
			if want := unix.Errno(max(0, -test.want)); io.Errno() != want {
				t.Errorf("%s: errno %v, want %v", test.name, io.Errno(), want)
			}
		}
		content, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content[4096:4096+8192], heap) || !bytes.Equal(content[1<<16:1<<16+8192], arena) {
			t.Error("the file holds other bytes")
		}
		clear(arena)
		if n := submit(t, r, &IO{Op: OpRead, File: registered, Buf: arena, Offset: 4096}); n != 8192 || !bytes.Equal(arena, heap) {
			t.Errorf("read into the arena: %d", n)
		}
		inline := IO{Op: OpRead, FD: fd, Buf: back[:10], Offset: 4096}
		if n := inline.Inline(); n != 10 {
			t.Errorf("inline read: %d", n)
		}
		nextTurn(t, r)
		nextTurn(t, r) // a rest lies between two turns
		if s := r.Stats(); s.Completions < 14 || s.ServiceTime <= 0 {
			t.Errorf("%d completions counted, service time %v", s.Completions, s.ServiceTime)
		}
		run(t, r, func(r *Reactor) {
			r.RemoveFile(registered)
			r.FreeBuffer(arena)
			r.Release(4)
		})
	})
}

// TestManyOperationsInFlight keeps the reserved depth full, with more operations
// than the ring has entries and the pool has threads.
func TestManyOperationsInFlight(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.Entries, c.Workers = 16, 4
		r := begin(t, c)
		f := tempFile(t, 4<<20)
		const depth, total = 200, 3000
		done := make(chan struct{})
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(depth); err != nil {
				t.Error(err)
			}
			began, ended := 0, 0
			next := func(io *IO) {
				io.Offset = int64(began%1000) * 4096
				if began++; began%50 == 0 {
					io.Op, io.Func = OpFunc, func() int { return 4096 }
				} else {
					io.Op = IOOp(began % 2)
				}
				r.SubmitIO(io)
			}
			for range depth {
				next(&IO{FD: int(f.Fd()), Buf: make([]byte, 4096), Done: func(io *IO) {
					if io.Result != 4096 {
						t.Errorf("operation %d: result %d", io.Op, io.Result)
					}
					if ended++; ended == total {
						close(done)
					} else if began < total {
						next(io)
					}
				}})
			}
		})
		await(t, done, "all operations")
	})
}

// Pages that the kernel holds as registered buffers must stay those that the
// process sees.
func TestTrimmedArenaStillReceivesReads(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		f := tempFile(t, 1<<20)
		want := bytes.Repeat([]byte{7}, 4096)
		if _, err := f.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		var b []byte
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(1); err != nil {
				t.Error(err)
			}
			a := r.Buffers()
			b = a.Alloc(4096)
			clear(b)
			r.FreeBuffer(b)
			a.Trim(0)
			b = a.Alloc(4096)
		})
		if n := submit(t, r, &IO{Op: OpRead, FD: int(f.Fd()), Buf: b}); n != 4096 || !bytes.Equal(b, want) {
			t.Errorf("read %d bytes into a trimmed arena; the first is %d, want 7", n, b[0])
		}
		run(t, r, func(r *Reactor) { r.FreeBuffer(b) })
	})
}

func TestRegisteredFilesRunOutQuietly(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		f := tempFile(t, 4096)
		var files []*File
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(1); err != nil {
				t.Error(err)
			}
			for range filesMax + 10 {
				files = append(files, r.AddFile(int(f.Fd())))
			}
		})
		for _, i := range []int{0, filesMax - 1, filesMax + 9} {
			if n := submit(t, r, &IO{Op: OpRead, File: files[i], Buf: make([]byte, 4096)}); n != 4096 {
				t.Errorf("file %d: read %d", i, n)
			}
		}
		run(t, r, func(r *Reactor) {
			for _, file := range files {
				r.RemoveFile(file)
			}
			again := r.AddFile(int(f.Fd()))
			if c.Engine == EngineRing && files[0].fixed != again.fixed && again.fixed < 0 {
				t.Error("places in the table did not come back")
			}
			r.RemoveFile(again)
		})
	})
}

func TestPlacesForBuffersOfDrivers(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		f := tempFile(t, 4096)
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(1); err != nil {
				t.Error(err)
			}
		})
		if c.Engine != EngineRing {
			run(t, r, func(r *Reactor) {
				if first, ok := r.AddBuffers(1); ok {
					t.Errorf("place %d of no table", first)
				}
			})
			return
		}
		var small int
		run(t, r, func(r *Reactor) {
			first, ok := r.AddBuffers(driverBuffersMax - 8)
			more, okMore := r.AddBuffers(8)
			if !ok || !okMore || first != int(r.arena.Limit()/buf.ChunkSize) || more != first+driverBuffersMax-8 {
				t.Errorf("places from %d and %d, %t, %t", first, more, ok, okMore)
			}
			if place, ok := r.AddBuffers(1); ok {
				t.Errorf("place %d of a full table", place)
			}
			r.RemoveBuffers(first, 16)
			if place, ok := r.AddBuffers(17); ok {
				t.Errorf("17 places in a row from %d, where 16 are free", place)
			}
			if small, ok = r.AddBuffers(16); !ok || small != first {
				t.Errorf("16 places from %d, %t, want %d", small, ok, first)
			}
		})
		// Nothing is registered there.
		if n := submit(t, r, &IO{Op: OpRead, FD: int(f.Fd()), Fixed: uint16(small) + 1, Length: 4096}); n != -int(unix.EFAULT) {
			t.Errorf("read into an empty place: %d", n)
		}
		// The arena's own buffers are beside them.
		var b []byte
		run(t, r, func(r *Reactor) { b = r.Buffers().Alloc(4096) })
		if n := submit(t, r, &IO{Op: OpRead, FD: int(f.Fd()), Buf: b}); n != 4096 {
			t.Errorf("read into the arena: %d", n)
		}
		run(t, r, func(r *Reactor) { r.FreeBuffer(b) })
	})
}

func TestReactorAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		f := tempFile(t, 1<<20)
		done := make(chan struct{}, 1)
		left := 0
		end := func() {
			if left--; left == 0 {
				done <- struct{}{}
			}
		}
		var ios []*IO
		for i := range 8 {
			ios = append(ios, &IO{Op: IOOp(i % 2), FD: int(f.Fd()), Buf: make([]byte, 4096), Offset: int64(i) * 4096, Done: func(*IO) { end() }})
		}
		ios = append(ios, &IO{Op: OpFunc, Func: func() int { return 0 }, Done: func(*IO) { end() }})
		var timers []*Timer
		for range 8 {
			timers = append(timers, &Timer{Func: end})
		}
		d := &Deferred{Func: end}
		round := TaskFunc(func(r *Reactor) {
			left = len(ios) + len(timers) + 1
			for _, io := range ios {
				r.SubmitIO(io)
			}
			for i, timer := range timers {
				r.Arm(timer, time.Hour)
				r.Arm(timer, time.Duration(i)*time.Microsecond)
			}
			r.Defer(d)
			r.FreeBuffer(r.Buffers().Alloc(4096))
		})
		var task Task = round
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(len(ios)); err != nil {
				t.Error(err)
			}
		})
		once := func() {
			r.Post(task)
			<-done
		}
		for range 50 { // lists and threads grow to their size
			once()
		}
		if n := testing.AllocsPerRun(100, once); n != 0 {
			t.Errorf("%v allocations in a round", n)
		}
	})
}

func TestSpinPolicy(t *testing.T) {
	start := func(mode PollMode) *idlePolicy {
		p, err := newIdlePolicy(mode)
		if err != nil {
			t.Fatal(err)
		}
		return &p
	}
	if _, err := newIdlePolicy("sometimes"); err == nil {
		t.Error("an unknown mode was taken")
	}
	if p := start(PollOff); p.budget(true) != 0 {
		t.Error("off spins")
	}
	if p := start(PollBusy); p.budget(false) <= 0 {
		t.Error("busy does not spin")
	}
	p := start(PollAuto)
	if p.budget(true) != 0 {
		t.Error("spins for a device it does not know")
	}
	p.served(10_000)
	if got := p.budget(true); got != 20_000 {
		t.Errorf("budget %d for a device of 10 µs, want twice that", got)
	}
	if p.budget(false) != 0 {
		t.Error("spins though nothing is asked of the device")
	}
	p.served(1_000_000_000) // one slow answer is not forgotten at once
	if p.service <= spinMax {
		t.Fatalf("mean %d", p.service)
	}
	if p.budget(true) != 0 {
		t.Error("spins for a slow device")
	}
	for range 200 {
		p.served(30_000)
	}
	if got := p.budget(true); got != spinMax {
		t.Errorf("budget %d, want the bound %d", got, spinMax)
	}
	for range spinMissesMax {
		p.spinMissed()
	}
	sleeps := 0
	for p.budget(true) == 0 {
		if sleeps++; sleeps > spinRetry {
			break
		}
	}
	if sleeps != spinRetry {
		t.Errorf("%d sleeps after spinning in vain, want %d", sleeps, spinRetry)
	}
	for range 10 * spinMissesMax {
		p.spinMissed()
		p.spinHit(20_000) // now and then it pays
	}
	if p.budget(true) == 0 {
		t.Error("spinning that pays was given up")
	}
}

func TestNapsFollowTheLengthOfSleeps(t *testing.T) {
	p, _ := newIdlePolicy(PollAuto) // a known mode
	for range 50 {
		p.slept(50_000)
	}
	if p.nap() == 0 {
		t.Error("no nap after short sleeps")
	}
	for range 50 {
		p.slept(int64(time.Second))
	}
	if p.nap() != 0 {
		t.Error("naps after long sleeps")
	}
	for range 50 {
		p.slept(50_000)
	}
	if p.nap() == 0 {
		t.Error("naps did not come back")
	}
}

// shortSleeps leaves a reactor that naps.
func shortSleeps(t *testing.T, r *Reactor) {
	for range 50 {
		run(t, r, func(*Reactor) {})
	}
}

// A nap is hidden from the Go scheduler: a collection waits for its end, which comes though
// nothing happens.
func TestACollectionWaitsForNoMoreThanANap(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.Poll = PollOff
		r := begin(t, c)
		for range 20 {
			shortSleeps(t, r)
			start := time.Now()
			runtime.GC()
			if took := time.Since(start); took > 5*time.Second {
				t.Fatalf("a collection took %v", took)
			}
		}
		run(t, r, func(r *Reactor) {
			if r.idle.nap() == 0 {
				t.Log("sleeps were too long here for naps")
			}
		})
	})
}

// Signals of the Go runtime end a nap too, but only every 10 ms.
func TestANapEndsByItself(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		shortest := time.Hour
		run(t, begin(t, c), func(r *Reactor) {
			for range 50 {
				start := time.Now()
				r.engine.nap(napMax)
				shortest = min(shortest, time.Since(start))
			}
		})
		if shortest > 5*napMax {
			t.Errorf("the shortest of 50 naps of 1 ms took %v", shortest)
		}
	})
}

func TestTimersFireInTheMiddleOfNaps(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.Poll = PollOff
		r := begin(t, c)
		for range 20 {
			shortSleeps(t, r)
			for _, after := range []time.Duration{100 * time.Microsecond, napMax / 2, napMax, 3 * napMax / 2, 2 * napMax, 5 * napMax} {
				fired := make(chan time.Duration, 1)
				run(t, r, func(r *Reactor) {
					armed := r.Clock()
					r.Arm(&Timer{Func: func() { fired <- time.Duration(r.Clock() - armed) }}, after)
				})
				select {
				case took := <-fired:
					if took < after {
						t.Fatalf("a timer of %v fired after %v", after, took)
					}
				case <-time.After(20 * time.Second):
					t.Fatalf("a timer of %v did not fire", after)
				}
			}
		}
	})
}

func TestLull(t *testing.T) {
	const long = 20 * time.Second
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		lull := func(d time.Duration) (took time.Duration) {
			done := make(chan time.Duration, 1)
			run(t, r, func(r *Reactor) {
				start := r.Clock()
				r.Lull(d)
				r.Arm(&Timer{Func: func() { done <- time.Duration(r.Clock() - start) }}, d+time.Microsecond)
			})
			return <-done
		}
		before := r.Stats()
		if took := lull(2 * time.Millisecond); took < 2*time.Millisecond {
			t.Errorf("a turn came %v after a lull of 2 ms was asked for", took)
		}
		nextTurn(t, r)
		if s := r.Stats(); s.Spun-before.Spun < time.Millisecond {
			t.Errorf("a lull of 2 ms counts as %v of spinning", s.Spun-before.Spun)
		}

		start := time.Now()
		run(t, r, func(r *Reactor) { r.Lull(long) })
		run(t, r, func(*Reactor) {}) // a message
		run(t, r, func(r *Reactor) { r.Lull(long) })
		r.Post(TaskFunc(func(*Reactor) {}))
		fired := make(chan struct{})
		run(t, r, func(r *Reactor) {
			r.Lull(long)
			r.Arm(&Timer{Func: func() { close(fired) }}, time.Millisecond)
		})
		await(t, fired, "a timer in a lull")
		file := tempFile(t, 4096)
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(1); err != nil {
				t.Error(err)
			}
		})
		read := make(chan struct{})
		run(t, r, func(r *Reactor) {
			r.SubmitIO(&IO{Op: OpRead, FD: int(file.Fd()), Buf: make([]byte, 4096), Done: func(*IO) { close(read) }})
			r.Lull(long)
		})
		await(t, read, "an operation")
		run(t, r, func(r *Reactor) { r.Lull(long) })
		r.Stop()
		if took := time.Since(start); took >= long {
			t.Errorf("messages, timers, operations and a stop took %v: a lull held them up", took)
		}
	})
	t.Run("off", func(t *testing.T) {
		r := begin(t, Config{Poll: PollOff, Log: slog.New(slog.DiscardHandler)})
		run(t, r, func(r *Reactor) { r.Lull(long) })
		nextTurn(t, r)
		if s := r.Stats(); s.Spun != 0 {
			t.Errorf("a reactor that does not poll spun %v in a lull", s.Spun)
		}
	})
}

func TestActivity(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		activity := func() (found uint64, idle time.Duration) {
			run(t, r, func(r *Reactor) { found, idle = r.Activity() })
			return found, idle
		}
		before, _ := activity()
		if after, _ := activity(); after <= before {
			t.Errorf("%d events found, then %d: a message is one", before, after)
		}
		reader, writer := socketpair(t)
		reported := make(chan time.Duration, 1)
		w := &Watch{FD: reader}
		w.Ready = func(uint32) {
			_, idle := r.Activity()
			_, _ = unix.Read(reader, make([]byte, 1)) // a byte is there
			reported <- idle
		}
		run(t, r, func(r *Reactor) {
			if err := r.AddWatch(w); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(30 * time.Millisecond)
		if _, err := unix.Write(writer, []byte{1}); err != nil {
			t.Fatal(err)
		}
		if idle := <-reported; idle < 15*time.Millisecond {
			t.Errorf("idle for %v after 30 ms of nothing", idle)
		}
		run(t, r, func(r *Reactor) { r.RemoveWatch(w) })
		closeFD(t, reader)
		closeFD(t, writer)
		var idle time.Duration
		done := make(chan struct{})
		run(t, r, func(r *Reactor) {
			time.Sleep(30 * time.Millisecond)
			r.Post(TaskFunc(func(r *Reactor) {
				_, idle = r.Activity()
				close(done)
			}))
		})
		await(t, done, "a message")
		if idle >= 15*time.Millisecond {
			t.Errorf("idle for %v after a turn that worked", idle)
		}
	})
}

func TestStatsAreReadWhileTheReactorRuns(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		c.Name = "seen"
		r := begin(t, c)
		last := uint64(0)
		for range 200 {
			run(t, r, func(*Reactor) {})
			s := r.Stats()
			if s.Name != "seen" || s.Engine != c.Engine || s.Turns < last {
				t.Fatalf("%+v after %d turns", s, last)
			}
			last = s.Turns
		}
	})
}

func ExampleReactor_Run() {
	r, err := Start(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Stop()
	_ = r.Run(func(r *Reactor) { fmt.Println("on", r.Name()) }) // it runs: nobody has stopped it
	// Output: on reactor
}

func TestCommandIsNoWorkThatKeepsTheReactorAwake(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		if r.Commands() && c.Engine == EngineEpoll {
			t.Error("epoll takes commands")
		}
		path := filepath.Join(t.TempDir(), "file")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }() // empty
		results := make(chan int, 1)
		io := &IO{Op: OpCommand, FD: int(f.Fd()), Mode: 1, Buf: make([]byte, CommandSize), Done: func(io *IO) { results <- io.Result }}
		run(t, r, func(r *Reactor) {
			if err := r.Reserve(1); err != nil {
				t.Error(err)
				return
			}
			r.SubmitIO(io)
			if r.inflight != 0 || r.commands != 1 {
				t.Errorf("%d operations and %d commands in flight", r.inflight, r.commands)
			}
			clear(io.Buf)
		})
		if got := <-results; got != -int(unix.EOPNOTSUPP) { // a plain file has no driver that takes any
			t.Errorf("result %d", got)
		}
		run(t, r, func(r *Reactor) {
			if r.commands != 0 {
				t.Errorf("%d commands in flight", r.commands)
			}
			r.Release(1)
		})
	})
}
