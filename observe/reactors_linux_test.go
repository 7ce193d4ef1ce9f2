package observe

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// thread runs f on a thread of its own, which is not used again.
func thread(t testing.TB, f func(id int)) (wait func()) {
	done := make(chan struct{})
	go func() { // ends with f
		runtime.LockOSThread()
		defer close(done)
		f(unix.Gettid())
	}()
	return func() {
		t.Helper()
		select {
		case <-done:
		case <-time.After(patience):
			t.Fatal("a thread does not end")
		}
	}
}

func TestSleepsAndWakeUpsOfAThread(t *testing.T) {
	o := observing(t, Config{Groups: []string{GroupReactors}})
	const sleeps, length = 100, 2 * time.Millisecond
	var id int
	thread(t, func(own int) {
		id = own
		if err := o.SetThreads([]int{own}); err != nil {
			t.Error(err)
			return
		}
		for range sleeps {
			s := unix.NsecToTimespec(int64(length))
			_ = unix.Nanosleep(&s, nil) // a signal may end it early
		}
	})()
	s := o.Snapshot()
	if len(s.Threads) != 1 || s.Threads[0].ID != id {
		t.Fatalf("threads: %+v", s.Threads)
	}
	r := &s.Threads[0]
	// A thread that is woken before it has gone to sleep does not leave its CPU.
	blocked := r.OffCPU.Count() - r.Waiting.Count()
	if blocked < sleeps*9/10 || r.Wakeup.Count() < sleeps*9/10 || r.Wakeup.Count() > blocked {
		t.Errorf("%d sleeps were seen as %d, with %d wake-ups", sleeps, blocked, r.Wakeup.Count())
	}
	if sum := time.Duration(r.OffCPU.Sum); sum < sleeps*length*9/10 {
		t.Errorf("%d sleeps of %v took %v", sleeps, length, sum)
	}
	if p50 := r.OffCPU.Quantile(0.5); p50 < length/2 {
		t.Errorf("half of them took up to %v", p50)
	}
	plausible(t, "off the CPU", &r.OffCPU)
	plausible(t, "wake-up", &r.Wakeup)
	t.Logf("off the CPU p50 %v, wake-up p50 %v p99 %v", r.OffCPU.Quantile(0.5), r.Wakeup.Quantile(0.5), r.Wakeup.Quantile(0.99))

	if err := o.SetThreads([]int{1 << 20}); err != nil { // one that is not there is no error
		t.Fatal(err)
	}
	if s := o.Snapshot(); len(s.Threads) != 1 || s.Threads[0].OffCPU.Count() != 0 {
		t.Errorf("after another thread was named: %+v", s.Threads)
	}
	if err := o.SetThreads([]int{-1}); err == nil {
		t.Error("a thread that cannot be was taken")
	}
}

func TestWaitingForACPUIsToldFromSleeping(t *testing.T) {
	o := observing(t, Config{Groups: []string{GroupReactors}})
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !allowed.IsSet(cpu) {
		cpu++
	}
	var quit atomic.Bool
	ids := make(chan int, 2)
	spin := func(id int) {
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			t.Error(err)
		}
		ids <- id
		for !quit.Load() {
			runtime.KeepAlive(id) // busy
		}
	}
	a, b := thread(t, spin), thread(t, spin)
	if err := o.SetThreads([]int{<-ids, <-ids}); err != nil {
		t.Fatal(err)
	}
	wait(t, "two threads on one CPU waiting for each other", func() bool {
		s := o.Snapshot()
		return s.Threads[0].Waiting.Count() > 5 && s.Threads[1].Waiting.Count() > 5
	})
	quit.Store(true)
	a()
	b()
	for _, r := range o.Snapshot().Threads {
		if r.Waiting.Count() > r.OffCPU.Count() || r.Waiting.Sum > r.OffCPU.Sum {
			t.Errorf("thread %d waited %d times of %d off its CPU", r.ID, r.Waiting.Count(), r.OffCPU.Count())
		}
		plausible(t, "waiting", &r.Waiting)
	}
}
