package reactor

import (
	"testing"
	"time"
)

func TestASleepUnderWayCounts(t *testing.T) {
	r, err := Start(Config{Poll: PollOff})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	last := time.Duration(0)
	for deadline := time.Now().Add(10 * time.Second); last < 30*time.Millisecond; time.Sleep(time.Millisecond) {
		s := r.Stats()
		if s.Slept < last {
			t.Fatalf("slept %v, and before %v", s.Slept, last)
		}
		if last = s.Slept; time.Now().After(deadline) {
			t.Fatalf("a reactor without work has slept %v", last)
		}
	}
	if s := r.Stats(); s.Sleeps > 10 {
		t.Errorf("%d sleeps, though nothing woke it", s.Sleeps)
	}
}

func TestSleepsNeverCountTwice(t *testing.T) {
	r, err := Start(Config{Poll: PollOff})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = r.Run(func(*Reactor) {}) // runs until the test ends
			}
		}
	}()
	last, began := time.Duration(0), time.Now()
	for time.Since(began) < 100*time.Millisecond {
		s := r.Stats()
		if s.Slept < last {
			t.Errorf("slept %v, and before %v", s.Slept, last)
		}
		last = s.Slept
	}
	if now := r.Clock(); int64(last) > now {
		t.Errorf("slept %v of %v", last, time.Duration(now))
	}
	close(stop)
	<-stopped
}

func TestAnObservedServiceTimeGoesBeforeTheLearnedOne(t *testing.T) {
	p, err := newIdlePolicy(PollAuto)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		p.served(10_000)
	}
	if got := p.budget(true); got != 20_000 || p.serviceTime() != 10_000 {
		t.Errorf("learned: budget %d, service %d", got, p.serviceTime())
	}
	p.observed = 4_000
	if got := p.budget(true); got != 8_000 || p.serviceTime() != 4_000 {
		t.Errorf("observed: budget %d, service %d", got, p.serviceTime())
	}
	p.observed = spinMax + 1 // a slow disk: no spin helps
	if got := p.budget(true); got != 0 {
		t.Errorf("observed to be slow: budget %d", got)
	}
}

func TestObserveServiceReachesThePolicy(t *testing.T) {
	r, err := Start(Config{Poll: PollAuto})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	r.ObserveService(123 * time.Microsecond)
	for deadline := time.Now().Add(10 * time.Second); r.Stats().ServiceTime != 123*time.Microsecond; time.Sleep(time.Millisecond) {
		_ = r.Run(func(*Reactor) {}) // wakes it
		if time.Now().After(deadline) {
			t.Fatalf("service time %v", r.Stats().ServiceTime)
		}
	}
	r.ObserveService(-1)
	for deadline := time.Now().Add(10 * time.Second); r.Stats().ServiceTime != 0; time.Sleep(time.Millisecond) {
		_ = r.Run(func(*Reactor) {}) // as above
		if time.Now().After(deadline) {
			t.Fatalf("service time %v after the observation ended", r.Stats().ServiceTime)
		}
	}
}

func TestTheClockOfATurn(t *testing.T) {
	r, err := Start(Config{Poll: PollOff, CPU: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	if cpu, pinned := r.CPU(); cpu != 0 || !pinned {
		t.Errorf("pinned to %d: %t", cpu, pinned)
	}
	if err := r.Run(func(r *Reactor) {
		now := r.Tick()
		if r.Recent() != now || now < r.Now() {
			t.Errorf("recent %d, read %d, the turn began at %d", r.Recent(), now, r.Now())
		}
		time.Sleep(time.Millisecond)
		if r.Recent() != now {
			t.Error("the recent time moved without a reading")
		}
	}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		var recent, began int64
		_ = r.Run(func(r *Reactor) { recent, began = r.Recent(), r.Now() }) // another turn
		if recent >= began && recent > int64(time.Millisecond) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("recent %d in a turn of %d", recent, began)
		}
	}
}
