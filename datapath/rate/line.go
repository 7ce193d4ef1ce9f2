package rate

import "time"

// Line is who waits for a turn, in the order of their coming. It asks for the turn of
// the first only, and takes no memory once it is made.
//
// One owner at a time, a reactor; the Turns it asks may be those of many lines. Times
// are those of [Turns.Next]. A call that returns a wait above 0 has its owner call
// [Line.Leave] that long after, and at once when other Turns come into force.
type Line[T any] struct {
	places  []place[T] // a ring
	first   int        // index of the oldest
	count   int
	turn    int64  // when the oldest may go on
	charged *Turns // who was charged for turn; nil: nobody yet
}

type place[T any] struct {
	who   T
	bytes uint64
}

// NewLine makes a line of a fixed number of places. Who has it sees to it that no more wait.
func NewLine[T any](places int) Line[T] { return Line[T]{places: make([]place[T], places)} }

// Empty reports whether nobody waits.
func (l *Line[T]) Empty() bool { return l.count == 0 }

// Enter has who, charged for bytes, wait unless its turn is now. The wait is above 0 for
// the first in line. t may be nil, which is no rate, unless the line is empty.
func (l *Line[T]) Enter(t *Turns, now int64, who T, bytes uint64) (wait time.Duration, waits bool) {
	if l.count == 0 {
		turn := t.Next(now, bytes)
		if turn <= now {
			return 0, false
		}
		l.turn, l.charged = turn, t
		wait = time.Duration(turn - now)
	}
	l.places[(l.first+l.count)%len(l.places)] = place[T]{who, bytes}
	l.count++
	return wait, true
}

// Leave takes the oldest out of a line that is not empty, if its turn has come: the wait
// is 0 then. t is in force now, nil where there is no rate; whom other Turns than t gave
// its turn is measured anew.
func (l *Line[T]) Leave(t *Turns, now int64) (who T, wait time.Duration) {
	oldest := &l.places[l.first]
	if t != nil {
		if l.charged != t {
			l.turn, l.charged = t.Next(now, oldest.bytes), t
		}
		if l.turn > now {
			return who, time.Duration(l.turn - now)
		}
	}
	who, *oldest = oldest.who, place[T]{}
	l.charged = nil
	l.first = (l.first + 1) % len(l.places)
	l.count--
	return who, 0
}
