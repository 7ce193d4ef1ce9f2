package pool

import (
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// lockWords is how many clusters of a volume can be locked apart from each other;
// further ones share these words.
const lockWords = 2048

// blockLocks keep changes of the same blocks apart, whatever queue they come from:
// a word a cluster, whose lower half marks the blocks that are being changed. Its
// upper half marks blocks somebody waits for, so that nobody who comes later gets
// them first.
//
// Nobody waits here: a piece that cannot have its blocks is parked by its queue and
// tries again when blocks were released. A piece holds the blocks of one cluster
// only, and waits for none while it has them, so no two wait for each other.
type blockLocks struct {
	words  [lockWords]atomic.Uint64
	parked atomic.Int64 // pieces that wait, of all queues
}

func (l *blockLocks) word(v uint32) *atomic.Uint64 { return &l.words[v%lockWords] }

// try takes blocks mask of cluster v. late says that the caller waits already.
func (l *blockLocks) try(v, mask uint32, late bool) bool {
	w := l.word(v)
	for {
		s := w.Load()
		if uint32(s)&mask != 0 || !late && uint32(s>>32)&mask != 0 {
			return false
		}
		n := s | uint64(mask)
		if late {
			n &^= uint64(mask) << 32
		}
		if w.CompareAndSwap(s, n) {
			return true
		}
	}
}

// widen takes the rest of a cluster of which mask is held; false: others have some.
func (l *blockLocks) widen(v, mask uint32) bool {
	w := l.word(v)
	for {
		s := w.Load()
		if uint32(s) != mask {
			return false
		}
		if w.CompareAndSwap(s, s|uint64(wholeMask)) {
			return true
		}
	}
}

// release gives blocks back; wake says that somebody waits.
func (l *blockLocks) release(v, mask uint32) (wake bool) {
	l.word(v).And(^uint64(mask))
	return l.parked.Load() > 0
}

// lock takes the piece's blocks, or parks it: then is called when it may try again.
func (c *piece) lock(then func(*piece)) bool {
	l := &c.q.v.locks
	if c.locked {
		return true
	}
	if l.try(c.v, c.mask, c.parked) {
		c.gotLock()
		return true
	}
	if !c.parked {
		c.parked = true
		l.parked.Add(1)
	}
	// Whoever releases looks at parked. What was released before we set it, we see
	// ourselves.
	l.word(c.v).Or(uint64(c.mask) << 32)
	c.q.waiting.Store(true)
	if l.try(c.v, c.mask, true) {
		c.gotLock()
		return true
	}
	c.then = then
	c.q.parked = append(c.q.parked, c)
	c.rest()
	return false
}

func (c *piece) gotLock() {
	c.locked = true
	if c.parked {
		c.parked = false
		c.q.v.locks.parked.Add(-1)
	}
}

func (c *piece) unlock() {
	if !c.locked {
		return
	}
	c.locked = false
	if c.q.v.locks.release(c.v, c.mask) {
		c.q.wakeWaiters()
	}
}

// wakeWaiters has every queue with parked pieces try them again.
func (q *queue) wakeWaiters() {
	for _, x := range *q.v.queues.Load() {
		switch {
		case !x.waiting.Load():
		case x == q:
			q.r.Defer(&q.retryLater)
		case x.woken.CompareAndSwap(false, true) && !x.r.TryPost(x):
			x.woken.Store(false)
			q.r.Defer(&q.wakeLater) // its mailbox is full
		}
	}
}

// RunTask implements [reactor.Task]: another queue has released blocks. The queue
// may have been closed since; nothing is parked then.
func (q *queue) RunTask(*reactor.Reactor) {
	q.woken.Store(false)
	q.retryLocks()
}

func (q *queue) retryLocks() {
	list := q.parked
	q.parked = q.retrying[:0]
	for i, c := range list {
		list[i] = nil
		c.unrest()
		c.then(c)
	}
	q.retrying = list[:0]
	if len(q.parked) == 0 {
		q.waiting.Store(false)
	}
}
