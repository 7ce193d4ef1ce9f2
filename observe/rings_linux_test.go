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

func TestRequestsOfOurRingsAreCountedByKind(t *testing.T) {
	testenv.RequireIOURing(t)
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
	o := observing(t, Config{Groups: []string{GroupRings}})
	b := aligned(t, 4096)
	for i := range 150 {
		s := ring.SQE()
		*s = uring.SQE{Opcode: uring.OpWrite, FD: int32(f.Fd()), Addr: uring.Address(b), Length: 4096}
		if i%3 == 0 {
			*s = uring.SQE{Opcode: uring.OpFsync, FD: int32(f.Fd())}
		}
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
