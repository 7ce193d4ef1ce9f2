//go:build linux

package reactor

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestTimersFireInOrderAndNotEarly(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		const count, seed = 200, 4
		rng := rand.New(rand.NewPCG(seed, 0))
		type firing struct{ due, at int64 }
		var fired []firing
		done := make(chan struct{})
		run(t, r, func(r *Reactor) {
			for i := range count {
				after := time.Duration(rng.IntN(30_000)) * time.Microsecond
				if i%10 == 0 {
					after = -time.Second // due at once
				}
				timer := &Timer{}
				due := r.clock() + int64(max(after, 0))
				timer.Func = func() {
					if timer.Armed() {
						t.Error("a timer that fires is armed")
					}
					if fired = append(fired, firing{due, r.clock()}); len(fired) == count {
						close(done)
					}
				}
				r.Arm(timer, after)
				if !timer.Armed() {
					t.Error("an armed timer is not")
				}
			}
		})
		await(t, done, "all timers")
		for i, f := range fired {
			if f.at < f.due {
				t.Errorf("fired %v early", time.Duration(f.due-f.at))
			}
			// Arm reads the clock a moment after the test does.
			if i > 0 && f.due < fired[i-1].due-int64(10*time.Millisecond) {
				t.Errorf("fired after one that was due %v later", time.Duration(fired[i-1].due-f.due))
			}
		}
	})
}

func TestTimersAreMovedAndDisarmed(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		never := &Timer{Func: func() { t.Error("a disarmed timer fired") }}
		times := 0
		again := &Timer{}
		done := make(chan struct{})
		again.Func = func() {
			if times++; times < 5 {
				r.Arm(again, time.Millisecond)
			}
		}
		var start int64
		moved := &Timer{Func: func() {
			if r.clock()-start < int64(20*time.Millisecond) {
				t.Error("a timer that was moved fired at its old time")
			}
			close(done)
		}}
		run(t, r, func(r *Reactor) {
			start = r.clock()
			r.Arm(never, time.Millisecond)
			r.Arm(again, 0)
			r.Arm(moved, time.Millisecond)
			r.Arm(moved, 20*time.Millisecond)
			r.Disarm(never)
			r.Disarm(never)
		})
		await(t, done, "the moved timer")
		run(t, r, func(*Reactor) {
			if times != 5 {
				t.Errorf("fired %d times, want 5", times)
			}
		})
	})
}

// A timer that arms itself at once again must not keep everything else out.
func TestEndlessTimerLetsOthersRun(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		var timer Timer
		timer.Func = func() { r.Arm(&timer, 0) }
		run(t, r, func(r *Reactor) { r.Arm(&timer, 0) })
		for range 50 {
			run(t, r, func(*Reactor) {})
		}
		run(t, r, func(r *Reactor) { r.Disarm(&timer) })
	})
}

// TestTimerHeapAgreesWithSorting drives the heap alone, by a clock of its own.
func TestTimerHeapAgreesWithSorting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &Reactor{start: time.Now()}
		model := map[*Timer]int64{}
		var fired []int64
		var timers []*Timer
		for range 12 {
			timer := &Timer{}
			timer.Func = func() {
				fired = append(fired, model[timer])
				delete(model, timer)
			}
			timers = append(timers, timer)
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			timer := timers[rapid.IntRange(0, len(timers)-1).Draw(t, "timer")]
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				r.Disarm(timer)
				delete(model, timer)
			case 1:
				now := r.clock() + rapid.Int64Range(0, 1000).Draw(t, "now")*int64(time.Second)
				fired = fired[:0]
				var want []int64
				for _, when := range model {
					if when <= now {
						want = append(want, when)
					}
				}
				slices.Sort(want)
				r.runTimers(now)
				if !slices.Equal(fired, want) {
					t.Fatalf("fired %v, want %v", fired, want)
				}
			default:
				r.Arm(timer, time.Duration(rapid.IntRange(-5, 1000).Draw(t, "after"))*time.Second)
				model[timer] = timer.when
			}
			for _, timer := range timers {
				if _, armed := model[timer]; armed != timer.Armed() {
					t.Fatalf("armed %t, want %t", timer.Armed(), armed)
				}
			}
			next := int64(-1)
			for _, when := range model {
				if next < 0 || when < next {
					next = when
				}
			}
			if got := r.untilTimer(0); got != next {
				t.Fatalf("next timer at %d, want %d", got, next)
			}
		}
	})
}
