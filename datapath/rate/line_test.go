package rate

import (
	"testing"
	"time"
)

const second = int64(time.Second)

// enter has somebody wait, or not.
func enter(t *testing.T, l *Line[string], turns *Turns, now int64, who string, bytes uint64, want time.Duration, waits bool) {
	t.Helper()
	if wait, ok := l.Enter(turns, now, who, bytes); wait != want || ok != waits {
		t.Errorf("%s enters at %v: waits %v (%v), want %v (%v)", who, time.Duration(now), wait, ok, want, waits)
	}
}

// leave expects who to go on, or the first to wait.
func leave(t *testing.T, l *Line[string], turns *Turns, now int64, who string, want time.Duration) {
	t.Helper()
	if got, wait := l.Leave(turns, now); got != who || wait != want {
		t.Errorf("at %v %q leaves, the next waits %v; want %q, %v", time.Duration(now), got, wait, who, want)
	}
}

func TestLineKeepsTheOrder(t *testing.T) {
	turns := New(Limits{RequestsPerSecond: 1, BurstRequests: 1})
	l := NewLine[string](3)
	enter(t, &l, turns, 0, "a", 0, 0, false)
	enter(t, &l, turns, 0, "b", 0, time.Second, true)
	enter(t, &l, turns, 0, "c", 0, 0, true)
	enter(t, &l, turns, 0, "d", 0, 0, true)
	leave(t, &l, turns, second/2, "", time.Second/2)
	leave(t, &l, turns, second, "b", 0)
	leave(t, &l, turns, second, "", time.Second)
	enter(t, &l, turns, second, "e", 0, 0, true) // in the place of b
	leave(t, &l, turns, 2*second, "c", 0)
	leave(t, &l, turns, 2*second, "", time.Second)
	leave(t, &l, turns, 3*second, "d", 0)
	leave(t, &l, turns, 4*second, "e", 0)
	if !l.Empty() {
		t.Error("somebody is left")
	}
	enter(t, &l, turns, 4*second, "f", 0, time.Second, true) // e was charged
}

func TestLineIsMeasuredAnewByOtherTurns(t *testing.T) {
	slow, fast := New(Limits{BytesPerSecond: 1, BurstBytes: 1}), New(Limits{BytesPerSecond: 1000, BurstBytes: 1})
	l := NewLine[string](2)
	enter(t, &l, slow, 0, "a", 3600, 0, false) // larger than the burst: who comes next pays
	enter(t, &l, slow, 0, "b", 1000, 3599*time.Second, true)
	enter(t, &l, slow, 0, "c", 1000, 0, true)
	leave(t, &l, fast, second, "b", 0)
	leave(t, &l, fast, second, "", time.Second-time.Millisecond)
	leave(t, &l, nil, second, "c", 0) // no rate any more
}

func TestLineEntersWithoutRateBehindOthers(t *testing.T) {
	l := NewLine[string](2)
	turns := New(Limits{RequestsPerSecond: 1, BurstRequests: 1})
	enter(t, &l, turns, 0, "a", 0, 0, false)
	enter(t, &l, turns, 0, "b", 0, time.Second, true)
	enter(t, &l, nil, 0, "c", 0, 0, true)
	leave(t, &l, nil, 0, "b", 0)
	leave(t, &l, nil, 0, "c", 0)
}
