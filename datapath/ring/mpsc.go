// Package ring holds the bounded queues that carry work between threads.
//
// A queue's memory is fixed when it is made; pushing and popping allocate
// nothing and take no lock. What a full queue means is the caller's business.
package ring

import (
	"fmt"
	"sync/atomic"
)

// MPSC is a bounded queue with many producers and one consumer, after D.
// Vyukov's bounded queue: each cell carries a sequence number that says whose
// turn it is.
type MPSC[T any] struct {
	mask  uint64    // immutable
	cells []cell[T] // immutable slice; cells are owned by whoever their sequence names

	_    [48]byte // keeps producers and the consumer on different cache lines
	tail atomic.Uint64
	_    [56]byte
	head atomic.Uint64 // written by the consumer only
}

type cell[T any] struct {
	sequence atomic.Uint64
	value    T
}

// NewMPSC makes a queue for capacity values; capacity is a power of two.
func NewMPSC[T any](capacity int) *MPSC[T] {
	if capacity < 2 || capacity&(capacity-1) != 0 {
		panic(fmt.Sprintf("ring: capacity %d is not a power of two >= 2", capacity))
	}
	q := &MPSC[T]{mask: uint64(capacity - 1), cells: make([]cell[T], capacity)}
	for i := range q.cells {
		q.cells[i].sequence.Store(uint64(i))
	}
	return q
}

// Push appends v and reports whether there was room. Any goroutine may call it.
func (q *MPSC[T]) Push(v T) bool {
	position := q.tail.Load()
	for {
		c := &q.cells[position&q.mask]
		switch turn := int64(c.sequence.Load() - position); {
		case turn == 0:
			if q.tail.CompareAndSwap(position, position+1) {
				c.value = v
				c.sequence.Store(position + 1)
				return true
			}
			position = q.tail.Load()
		case turn < 0:
			return false
		default:
			position = q.tail.Load()
		}
	}
}

// Pop takes the oldest value. Only the consumer may call it. It reports false
// when the queue is empty or its oldest push is still under way.
func (q *MPSC[T]) Pop() (v T, ok bool) {
	position := q.head.Load()
	c := &q.cells[position&q.mask]
	if c.sequence.Load() != position+1 {
		return v, false
	}
	v = c.value
	var zero T
	c.value = zero
	c.sequence.Store(position + q.mask + 1)
	q.head.Store(position + 1)
	return v, true
}

// Empty reports whether Pop would find nothing. Only the consumer gets an exact
// answer.
func (q *MPSC[T]) Empty() bool {
	position := q.head.Load()
	return q.cells[position&q.mask].sequence.Load() != position+1
}

// Len is the number of values in the queue, as seen at one moment.
func (q *MPSC[T]) Len() int {
	if n := int64(q.tail.Load() - q.head.Load()); n > 0 {
		return int(n)
	}
	return 0
}
