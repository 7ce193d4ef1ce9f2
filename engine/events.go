package engine

import (
	"context"
	"sync"

	"github.com/ashlar-storage/ashlar/engine/pool"
)

// The kinds of events the engine adds to those of package pool.
const (
	EventOpened    pool.EventKind = "opened"    // a pool is open
	EventNotOpened pool.EventKind = "not-open"  // a pool could not be opened; Message says why
	EventClosed    pool.EventKind = "closed"    // a pool was closed or destroyed
	EventAmbiguous pool.EventKind = "ambiguous" // two pools have a volume of one name
)

// eventsMax is how many events are kept: some hundred KiB, and more than anyone
// reads back. The log has all of them.
const eventsMax = 1024

// Event is an event with its place in the order in which the node saw them.
type Event struct {
	Sequence uint64 // 1 for the first since the engine was opened
	pool.Event
}

// eventLog keeps the last events. A reader has a place in it and no memory of its
// own, so that a slow reader holds up nobody and only misses what was overwritten.
type eventLog struct {
	mu     sync.Mutex
	last   uint64 // sequence of the newest; 0 while there is none
	ring   [eventsMax]Event
	counts map[pool.EventKind]uint64
	more   chan struct{} // closed, and made anew, with each event
}

func (l *eventLog) add(event pool.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	l.ring[l.last%eventsMax] = Event{l.last, event}
	if l.counts == nil {
		l.counts = make(map[pool.EventKind]uint64)
	}
	l.counts[event.Kind]++
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

// after returns what is kept of the events after a sequence, oldest first, how
// many of them are lost, and a channel that is closed when there are more.
func (l *eventLog) after(sequence uint64) (events []Event, lost uint64, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	sequence = min(sequence, l.last)
	if l.last-sequence > eventsMax {
		lost = l.last - sequence - eventsMax
		sequence += lost
	}
	for s := sequence + 1; s <= l.last; s++ {
		events = append(events, l.ring[s%eventsMax])
	}
	if l.more == nil {
		l.more = make(chan struct{})
	}
	return events, lost, l.more
}

// Events returns the kept events after a sequence (0: all), oldest first.
func (e *Engine) Events(after uint64) []Event {
	events, _, _ := e.events.after(after)
	return events
}

// EventCounts is how many events there were of each kind since the engine was opened.
func (e *Engine) EventCounts() map[pool.EventKind]uint64 {
	e.events.mu.Lock()
	defer e.events.mu.Unlock()
	counts := make(map[pool.EventKind]uint64, len(e.events.counts))
	for kind, n := range e.events.counts {
		counts[kind] = n
	}
	return counts
}

// Subscription is a reader's place in the events. One goroutine uses it.
type Subscription struct {
	engine *Engine
	at     uint64
	ready  []Event
	lost   uint64
}

// Subscribe begins after a sequence; with 0, with the oldest event that is kept.
// There is nothing to close.
func (e *Engine) Subscribe(after uint64) *Subscription { return &Subscription{engine: e, at: after} }

// SubscribeNew begins with the next event.
func (e *Engine) SubscribeNew() *Subscription {
	e.events.mu.Lock()
	defer e.events.mu.Unlock()
	return &Subscription{engine: e, at: e.events.last}
}

// Next waits for the next event. lost is how many events before it were
// overwritten before this reader came.
//
// Errors: that of ctx; ErrClosed when the engine is closed and everything is read.
func (s *Subscription) Next(ctx context.Context) (event Event, lost uint64, err error) {
	for len(s.ready) == 0 {
		var more <-chan struct{}
		s.ready, s.lost, more = s.engine.events.after(s.at)
		if len(s.ready) > 0 {
			break
		}
		select {
		case <-more:
		case <-ctx.Done():
			return Event{}, 0, ctx.Err()
		case <-s.engine.gone:
			if s.ready, s.lost, _ = s.engine.events.after(s.at); len(s.ready) == 0 {
				return Event{}, 0, ErrClosed
			}
		}
	}
	event, lost = s.ready[0], s.lost
	s.ready, s.lost, s.at = s.ready[1:], 0, event.Sequence
	return event, lost, nil
}
