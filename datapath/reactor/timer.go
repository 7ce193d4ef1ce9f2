package reactor

import (
	"container/heap"
	"time"
)

// Timer runs a function on the reactor at a later time. It is made once and may
// be armed again and again without allocation.
type Timer struct {
	Func func()

	when  int64 // nanoseconds on the reactor's clock
	index int   // 1 + position in the heap, 0 when not armed
}

// Armed reports whether the timer is waiting to fire.
func (t *Timer) Armed() bool { return t.index != 0 }

// Arm makes t fire once, d from now; an armed timer is moved. Reactor only.
func (r *Reactor) Arm(t *Timer, d time.Duration) {
	t.when = r.clock() + int64(max(d, 0))
	if t.index != 0 {
		heap.Fix(&r.timers, t.index-1)
		return
	}
	heap.Push(&r.timers, t)
}

// Disarm makes t not fire. Reactor only.
func (r *Reactor) Disarm(t *Timer) {
	if t.index != 0 {
		heap.Remove(&r.timers, t.index-1)
	}
}

func (r *Reactor) runTimers(now int64) (ran bool) {
	for len(r.timers) > 0 && r.timers[0].when <= now {
		t := heap.Pop(&r.timers).(*Timer)
		t.Func()
		ran = true
	}
	return ran
}

// untilTimer is how long the reactor may sleep, in nanoseconds; negative when no
// timer is armed.
func (r *Reactor) untilTimer(now int64) int64 {
	if len(r.timers) == 0 {
		return -1
	}
	return max(r.timers[0].when-now, 0)
}

type timerHeap []*Timer

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].when < h[j].when }
func (h timerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i+1, j+1
}

func (h *timerHeap) Push(x any) {
	t := x.(*Timer)
	*h = append(*h, t)
	t.index = len(*h)
}

func (h *timerHeap) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	t.index = 0
	return t
}
