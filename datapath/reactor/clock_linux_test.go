package reactor

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestThreadCPU(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := threadCPU(unix.Gettid())
	if err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < 20*time.Millisecond; {
	}
	after, err := threadCPU(unix.Gettid())
	if err != nil || after <= before {
		t.Errorf("%v, then %v, %v", before, after, err)
	}
	if _, err := threadCPU(1 << 28); err == nil {
		t.Error("a thread that is not there has a clock")
	}
}

// TestWorkInsideSleepIsBusy: CPU time that neither turns nor spinning explain was used
// inside calls that wait.
func TestWorkInsideSleepIsBusy(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var s statistics
	s.thread.Store(int64(unix.Gettid()))
	cpu, err := threadCPU(unix.Gettid())
	if err != nil {
		t.Fatal(err)
	}
	busy, slept := s.split(0, 0, cpu+time.Hour)
	if busy < cpu || slept > time.Hour || busy+slept != cpu+time.Hour {
		t.Errorf("busy %v, slept %v of %v", busy, slept, cpu+time.Hour)
	}
	// A thread that waited for a CPU has less CPU time than its turns took; nothing
	// goes back.
	busy2, slept2 := s.split(cpu+time.Minute, 0, cpu+time.Hour)
	if busy2 < busy || slept2 < slept {
		t.Errorf("went back: busy %v after %v, slept %v after %v", busy2, busy, slept2, slept)
	}
	var later statistics // of a reactor whose thread had worked for others
	later.used.Store(int64(cpu + time.Hour))
	later.thread.Store(int64(unix.Gettid()))
	if busy, slept := later.split(0, 0, time.Second); busy != 0 || slept != time.Second {
		t.Errorf("another's work: busy %v, slept %v", busy, slept)
	}
	s.thread.Store(1 << 28)
	if _, slept := new(statistics).split(0, 0, 5); slept != 5 {
		t.Errorf("without a thread: slept %v", slept)
	}
}
