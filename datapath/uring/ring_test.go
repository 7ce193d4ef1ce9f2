//go:build linux

package uring

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// open makes a ring that lives on the test's thread.
func open(t testing.TB, c Config) *Ring {
	t.Helper()
	testenv.RequireIOURing(t)
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	if c.Entries == 0 {
		c.Entries = 8
	}
	r, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// next waits for one completion and returns it.
func next(t testing.TB, r *Ring) CQE {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if c := r.Peek(); c != nil {
			done := *c
			r.Seen()
			return done
		}
		if err := r.Enter(1, int64(time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("no completion")
	return CQE{}
}

// mapped is memory outside the Go heap, as registered buffers must be.
func mapped(t testing.TB, size int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) }) // a mapping of ours
	return b
}

func file(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // a test's file
	return f
}

func TestEveryRungOfTheLadderServes(t *testing.T) {
	full := setupLadder
	defer func() { setupLadder = full }()
	for i := range full {
		setupLadder = full[i:]
		t.Run("", func(t *testing.T) {
			r := open(t, Config{})
			t.Logf("asked for %#x, got %#x", setupLadder[0], r.SetupFlags())
			roundTrip(t, r)
		})
	}
	t.Run("a rung the kernel does not know", func(t *testing.T) {
		setupLadder = append([]uint32{1 << 31}, full...)
		r := open(t, Config{})
		if r.SetupFlags()&(1<<31) != 0 {
			t.Error("the unknown flag is in force")
		}
		roundTrip(t, r)
	})
	t.Run("no rung at all", func(t *testing.T) {
		testenv.RequireIOURing(t)
		setupLadder = []uint32{1 << 31}
		if _, err := Open(Config{Entries: 8}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v, want %v", err, ErrUnsupported)
		}
	})
}

func roundTrip(t *testing.T, r *Ring) {
	t.Helper()
	for round := range uint64(100) {
		for i := range uint64(5) {
			s := r.SQE()
			s.Opcode, s.UserData = OpNop, round<<8|i
		}
		if n := r.Pending(); n != 5 {
			t.Fatalf("%d entries pending, want 5", n)
		}
		for i := range uint64(5) {
			if c := next(t, r); c.UserData != round<<8|i || c.Result != 0 {
				t.Fatalf("round %d: completion %+v, want %d", round, c, i)
			}
		}
		if r.Peek() != nil || r.Pending() != 0 {
			t.Fatal("something is left")
		}
	}
}

func TestFullRingGivesNoEntry(t *testing.T) {
	r := open(t, Config{Entries: 4})
	for i := range 4 {
		if r.SQE() == nil {
			t.Fatalf("no entry %d of 4", i)
		}
	}
	if r.SQE() != nil {
		t.Fatal("a fifth entry of four")
	}
	if err := r.Enter(0, 0); err != nil {
		t.Fatal(err)
	}
	if r.SQE() == nil {
		t.Error("no entry after Enter")
	}
	if r.CQEntries() < 16 {
		t.Errorf("%d completion entries, want four times 4", r.CQEntries())
	}
}

func TestMoreCompletionsThanTheRingHolds(t *testing.T) {
	r := open(t, Config{Entries: 8, CQEntries: 8})
	for i := range uint64(64) {
		s := r.SQE()
		s.Opcode, s.UserData = OpNop, i
		if err := r.Enter(0, 0); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(64) {
		if c := next(t, r); c.UserData != i {
			t.Fatalf("completion %d, want %d: one was dropped", c.UserData, i)
		}
	}
}

// An Enter that fails takes nothing; the next one must offer the entries again.
func TestEntriesOfAFailedEnterAreSubmittedByTheNext(t *testing.T) {
	r := open(t, Config{})
	for i := range uint64(3) {
		s := r.SQE()
		s.Opcode, s.UserData = OpNop, i
	}
	fd := r.fd
	r.fd = -1
	err := r.Enter(0, 0)
	r.fd = fd
	if err == nil {
		t.Fatal("Enter of no ring succeeded")
	}
	if n := r.Pending(); n != 3 {
		t.Errorf("%d entries pending, want 3", n)
	}
	for i := range uint64(3) {
		if c := next(t, r); c.UserData != i {
			t.Errorf("completion %d, want %d", c.UserData, i)
		}
	}
}

func TestFilesAreWrittenSyncedAndRead(t *testing.T) {
	r := open(t, Config{})
	f := file(t)
	want := bytes.Repeat([]byte{0xa5}, 8192)
	got := make([]byte, 8192)
	for _, step := range []struct {
		name   string
		entry  SQE
		result int32
	}{
		{"write", SQE{Opcode: OpWrite, Addr: Address(want), Length: 8192, Offset: 4096}, 8192},
		{"fsync", SQE{Opcode: OpFsync, OpFlags: FsyncDataSync}, 0},
		{"read", SQE{Opcode: OpRead, Addr: Address(got), Length: 8192, Offset: 4096}, 8192},
		{"read past the end", SQE{Opcode: OpRead, Addr: Address(got), Length: 8192, Offset: 1 << 20}, 0},
		{"bad descriptor", SQE{Opcode: OpRead, FD: -1, Addr: Address(got), Length: 8192}, -int32(unix.EBADF)},
		{"fallocate", SQE{Opcode: OpFallocate, Offset: 0, Addr: 1 << 20}, 0},
	} {
		if !r.Supports(step.entry.Opcode) {
			t.Fatalf("%s is not supported", step.name)
		}
		s := r.SQE()
		*s = step.entry
		s.UserData = 77
		if s.FD == 0 {
			s.FD = int32(f.Fd())
		}
		if c := next(t, r); c.Result != step.result || c.UserData != 77 {
			t.Errorf("%s: %+v, want result %d", step.name, c, step.result)
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("read other bytes than were written")
	}
	runtime.KeepAlive(want)
}

func TestRegisteredFilesAndBuffers(t *testing.T) {
	r := open(t, Config{})
	if err := r.RegisterFiles(4); err != nil {
		t.Skipf("needs Linux 5.19: %v", err)
	}
	if err := r.RegisterBuffers(4); err != nil {
		t.Skipf("needs Linux 5.19: %v", err)
	}
	f := file(t)
	memory := mapped(t, 1<<16)
	if err := r.UpdateFile(2, int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	if err := r.UpdateBuffer(3, memory); err != nil {
		t.Fatal(err)
	}
	move := func(op uint8, b []byte, index, file int) int32 {
		s := r.SQE()
		s.Opcode, s.Flags, s.FD, s.Addr, s.Length, s.BufIndex = op, SQEFixedFile, int32(file), Address(b), uint32(len(b)), uint16(index)
		return next(t, r).Result
	}
	copy(memory, "registered")
	if n := move(OpWriteFixed, memory[:10], 3, 2); n != 10 {
		t.Fatalf("write: %d", n)
	}
	if n := move(OpReadFixed, memory[4096:4106], 3, 2); n != 10 || string(memory[4096:4106]) != "registered" {
		t.Fatalf("read: %d, %q", n, memory[4096:4106])
	}
	if n := move(OpReadFixed, make([]byte, 10), 3, 2); n != -int32(unix.EFAULT) {
		t.Errorf("read into memory that is not registered: %d", n)
	}
	if n := move(OpReadFixed, memory[:10], 1, 2); n >= 0 {
		t.Errorf("read by an empty place of the table: %d", n)
	}
	if err := r.UpdateFile(2, -1); err != nil {
		t.Fatal(err)
	}
	if n := move(OpReadFixed, memory[:10], 3, 2); n != -int32(unix.EBADF) {
		t.Errorf("read of a file that was taken out: %d", n)
	}
	if err := r.UpdateFile(9, int(f.Fd())); err == nil {
		t.Error("a place beyond the table was filled")
	}
}

func TestLargeEntriesHaveACommandArea(t *testing.T) {
	r := open(t, Config{SQE128: true})
	if r.SetupFlags()&SetupSQE128 == 0 {
		t.Fatal("the ring has small entries")
	}
	for i := range uint64(20) {
		s := r.SQE()
		command := r.Command(s)
		if len(command) != 80 || !bytes.Equal(command, make([]byte, 80)) {
			t.Fatalf("command area of %d bytes, zero: %t", len(command), bytes.Equal(command, make([]byte, len(command))))
		}
		for k := range command {
			command[k] = 0xff // is gone when the entry comes round
		}
		clear(command[:16]) // part of what the kernel looks at
		s.Opcode, s.UserData = OpNop, i
		if c := next(t, r); c.UserData != i || c.Result != 0 {
			t.Fatalf("completion %+v, want %d", c, i)
		}
	}
	if small := open(t, Config{}); len(small.Command(small.SQE())) != 16 {
		t.Error("the command area of a small entry has not 16 bytes")
	}
}

func TestWaitEndsInTime(t *testing.T) {
	r := open(t, Config{})
	for _, timeout := range []time.Duration{0, 300 * time.Microsecond, 20 * time.Millisecond} {
		// A signal, such as the Go runtime sends for a collection, ends a wait early;
		// not every time.
		var took time.Duration
		for range 50 {
			start := time.Now()
			if err := r.Enter(1, int64(timeout)); err != nil {
				t.Fatal(err)
			}
			if took = time.Since(start); took >= timeout {
				break
			}
		}
		if took < timeout || took > timeout+2*time.Second {
			t.Errorf("a wait of %v took %v", timeout, took)
		}
	}
	start := time.Now()
	if err := r.Enter(0, -1); err != nil || time.Since(start) > time.Second {
		t.Errorf("a wait for nothing took %v: %v", time.Since(start), err)
	}
}

func TestOneTimeoutEndsANap(t *testing.T) {
	r := open(t, Config{})
	limit := 2 * time.Millisecond
rounds:
	for range 12 {
		s := r.SQE()
		r.Timeout(s, int64(limit))
		s.UserData = 7
		for i := range 3 { // ended by something else
			n := r.SQE()
			n.Opcode, n.UserData = OpNop, uint64(i+1)
			if err := r.Nap(); err != nil {
				t.Fatal(err)
			}
			if c := next(t, r); c.UserData == 7 && limit < 4*time.Second { // a slow machine: the time was over
				if c := next(t, r); c.UserData != uint64(i+1) {
					t.Fatalf("completion %+v", c)
				}
				limit *= 4
				continue rounds
			} else if c.UserData != uint64(i+1) {
				t.Fatalf("completion %+v", c)
			}
		}
		start := time.Now()
		for r.Peek() == nil { // signals of the Go runtime end naps, too
			if err := r.Nap(); err != nil {
				t.Fatal(err)
			}
		}
		if c := next(t, r); c.UserData != 7 || c.Result != -int32(unix.ETIME) || time.Since(start) > 10*time.Second {
			t.Fatalf("completion %+v after %v, want a timeout after %v", c, time.Since(start), limit)
		}
	}
}

func TestSignalsEndAWaitWithoutAnError(t *testing.T) {
	r := open(t, Config{})
	s := r.SQE() // submitted by the Enter that is interrupted
	s.Opcode, s.UserData = OpNop, 5
	if c := next(t, r); c.UserData != 5 {
		t.Fatalf("completion %+v", c)
	}
	thread := unix.Gettid()
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() { // ends by stop
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				_ = unix.Tgkill(unix.Getpid(), thread, unix.SIGURG) // the Go runtime ignores what it did not send
			}
		}
	}()
	for range 20 {
		if err := r.Enter(1, int64(50*time.Millisecond)); err != nil {
			t.Errorf("Enter: %v", err)
		}
	}
	close(stop)
	<-ended
}

func TestPollReportsEveryChange(t *testing.T) {
	r := open(t, Config{})
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = unix.Close(pair[0]), unix.Close(pair[1]) }() // sockets of ours
	s := r.SQE()
	s.Opcode, s.FD, s.OpFlags, s.Length, s.UserData = OpPollAdd, int32(pair[0]), unix.POLLIN, PollAddMulti, 9
	if err := r.Enter(0, 0); err != nil {
		t.Fatal(err)
	}
	var b [16]byte
	for range 3 {
		if _, err := unix.Write(pair[1], []byte("x")); err != nil {
			t.Fatal(err)
		}
		if c := next(t, r); c.UserData != 9 || c.Result&unix.POLLIN == 0 || c.Flags&CQEMore == 0 {
			t.Fatalf("completion %+v", c)
		}
		_, _ = unix.Read(pair[0], b[:]) // empties it
	}
	s = r.SQE()
	s.Opcode, s.Addr, s.UserData = OpPollRemove, 9, 10
	got := map[uint64]int32{}
	for len(got) < 2 {
		c := next(t, r)
		got[c.UserData] = c.Result
	}
	if got[9] != -int32(unix.ECANCELED) || got[10] != 0 {
		t.Errorf("after removal: %v", got)
	}
}

func TestRingLeavesNoDescriptor(t *testing.T) {
	testenv.CheckFDs(t)
	for range 20 {
		runtime.LockOSThread()
		r, err := Open(Config{Entries: 8})
		if err != nil {
			runtime.UnlockOSThread()
			testenv.RequireIOURing(t)
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	}
}

func TestRoundTripAllocatesNothing(t *testing.T) {
	r := open(t, Config{})
	n := testing.AllocsPerRun(200, func() {
		for range 4 {
			r.SQE().Opcode = OpNop
		}
		if err := r.Enter(4, int64(time.Second)); err != nil {
			t.Error(err)
		}
		for r.Peek() != nil {
			r.Seen()
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkNop(b *testing.B) {
	r := open(b, Config{})
	for b.Loop() {
		r.SQE().Opcode = OpNop
		if err := r.Enter(1, -1); err != nil {
			b.Fatal(err)
		}
		r.Seen()
	}
}
