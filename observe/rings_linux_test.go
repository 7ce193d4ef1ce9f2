package observe

import (
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath/uring"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// throughRing has requests done by a ring of ours, one after the other; entry makes each.
func throughRing(t *testing.T, requests int, entry func(i int, fd int32, b []byte) uring.SQE) {
	t.Helper()
	f, err := os.OpenFile(testenv.TempFileOn(t, t.TempDir(), 1<<20), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // it is thrown away
	runtime.LockOSThread()           // a ring is its thread's
	defer runtime.UnlockOSThread()
	ring, err := uring.Open(uring.Config{Entries: 8})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ring.Close() }() // all has completed
	b := aligned(t, 4096)
	for i := range requests {
		*ring.SQE() = entry(i, int32(f.Fd()), b)
		for deadline := time.Now().Add(patience); ring.Peek() == nil; {
			if err := ring.Enter(1, int64(time.Second)); err != nil {
				t.Fatal(err)
			}
			if time.Now().After(deadline) {
				t.Fatal("no completion")
			}
		}
		if c := ring.Peek(); c.Result < 0 {
			t.Fatalf("request %d: %d", i, c.Result)
		}
		ring.Seen()
	}
}

func ringWrite(fd int32, b []byte) uring.SQE {
	return uring.SQE{Opcode: uring.OpWrite, FD: fd, Addr: uring.Address(b), Length: 4096}
}

func TestRequestsOfOurRingsAreCountedByKind(t *testing.T) {
	testenv.RequireIOURing(t)
	o := observing(t, Config{Groups: []string{GroupRings}})
	throughRing(t, 150, func(i int, fd int32, b []byte) uring.SQE {
		if i%3 == 0 {
			return uring.SQE{Opcode: uring.OpFsync, FD: fd}
		}
		return ringWrite(fd, b)
	})
	s := o.Snapshot()
	for kind, want := range map[string]uint64{"write": 100, "sync": 50} {
		i := slices.IndexFunc(s.Rings, func(r Ring) bool { return r.Kind == kind })
		if i < 0 {
			t.Errorf("%s: nothing was counted", kind)
			continue
		}
		r := s.Rings[i]
		if r.Submitted != want || r.Time.Count() != want {
			t.Errorf("%s: %d submitted, %d completed; want %d", kind, r.Submitted, r.Time.Count(), want)
		}
		plausible(t, kind, &r.Time)
	}
}
