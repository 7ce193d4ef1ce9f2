package pool

import (
	"sync"
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	// lockWords is how many clusters of a volume can be locked apart from each other;
	// further ones share these words.
	lockWords = 2048
	// lockLines is how many lists those who wait are spread over.
	lockLines = 64
)

// blockLocks keep changes of the same blocks apart, whatever queue they come from:
// a word a cluster, whose lower half marks the blocks that are being changed. Its
// upper half marks the blocks somebody waits for.
//
// Who comes later never overtakes: blocks in the upper half are not given to those
// who come, and among those who wait the first that came is served first, as far as
// they want the same blocks. Blocks are handed from one owner to the next, so that
// nobody takes them in between. A piece holds the blocks of one cluster only, and
// waits for none while it has them, so no two wait for each other.
type blockLocks struct {
	words [lockWords]atomic.Uint64 // the lower half by whoever takes or releases; the upper with the line's mu
	lines [lockLines]lockLine
}

// lockLine is who waits for the blocks of some words, in the order of their coming.
type lockLine struct {
	mu          sync.Mutex // guards what follows, and the upper halves of its words
	first, last *lockWait
}

// lockWait is a place in a line.
type lockWait struct {
	word    *atomic.Uint64
	mask    uint32
	next    *lockWait     // in the line; after that, in a list of those who were served
	piece   *piece        // who waits, or
	granted chan struct{} // a goroutine, which hears here; holds one
}

func (l *blockLocks) word(v uint32) *atomic.Uint64 { return &l.words[v%lockWords] }
func (l *blockLocks) line(v uint32) *lockLine      { return &l.lines[v%lockLines] }

// takeFree takes blocks that nobody has and nobody waits for.
func takeFree(w *atomic.Uint64, mask uint32) bool {
	for {
		s := w.Load()
		if (uint32(s)|uint32(s>>32))&mask != 0 {
			return false
		}
		if w.CompareAndSwap(s, s|uint64(mask)) {
			return true
		}
	}
}

// try takes blocks mask of cluster v if that can be done at once.
func (l *blockLocks) try(v, mask uint32) bool { return takeFree(l.word(v), mask) }

// take takes blocks mask of cluster v, or puts w at the end of the line: then the
// blocks are w's when it is served.
func (l *blockLocks) take(v, mask uint32, w *lockWait) bool {
	word := l.word(v)
	if takeFree(word, mask) {
		return true
	}
	line := l.line(v)
	line.mu.Lock()
	defer line.mu.Unlock()
	for {
		// Whoever releases looks at the upper half in the same step. What was released
		// before it is set here, is seen here.
		s := word.Load()
		if (uint32(s)|uint32(s>>32))&mask == 0 {
			if word.CompareAndSwap(s, s|uint64(mask)) {
				return true
			}
		} else if word.CompareAndSwap(s, s|uint64(mask)<<32) {
			break
		}
	}
	w.word, w.mask, w.next = word, mask, nil
	if line.last == nil {
		line.first = w
	} else {
		line.last.next = w
	}
	line.last = w
	return false
}

// widen takes the rest of a cluster of which mask is held; false: others have some.
// It does not wait, and those who wait are not delayed: what was widened is released
// before the caller does anything else.
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

// release gives blocks back. Those in the list it returns have been served: each has
// its blocks now, and has to be told.
func (l *blockLocks) release(v, mask uint32) *lockWait {
	word := l.word(v)
	if old := word.And(^uint64(mask)); uint32(old>>32)&mask == 0 {
		return nil
	}
	line := l.line(v)
	line.mu.Lock()
	defer line.mu.Unlock()
	var served, tail, before *lockWait
	waiting := uint32(0) // blocks that somebody earlier in the line waits for still
	for w := line.first; w != nil; {
		next := w.next
		if w.word != word || w.mask&waiting != 0 || !hand(word, w.mask) {
			if w.word == word {
				waiting |= w.mask
			}
			before, w = w, next
			continue
		}
		if before == nil {
			line.first = next
		} else {
			before.next = next
		}
		if line.last == w {
			line.last = before
		}
		w.next = nil
		if tail == nil {
			served = w
		} else {
			tail.next = w
		}
		tail, w = w, next
	}
	for {
		s := word.Load()
		if word.CompareAndSwap(s, uint64(waiting)<<32|uint64(uint32(s))) {
			return served
		}
	}
}

// hand takes blocks for one who waits for them. Nobody else can meanwhile.
func hand(w *atomic.Uint64, mask uint32) bool {
	for {
		s := w.Load()
		if uint32(s)&mask != 0 {
			return false
		}
		if w.CompareAndSwap(s, s|uint64(mask)) {
			return true
		}
	}
}

// waitWhole takes all blocks of cluster v for a goroutine, which holds no others.
func (l *blockLocks) waitWhole(v uint32) {
	w := &lockWait{granted: make(chan struct{}, 1)}
	if !l.take(v, wholeMask, w) {
		<-w.granted // the pieces before it end
	}
}

// releaseWhole gives back what waitWhole took. Any goroutine.
func (v *volume) releaseWhole(cluster uint32) {
	v.serve(v.locks.release(cluster, wholeMask), func(x *queue) {
		if x.woken.CompareAndSwap(false, true) {
			x.r.Post(x)
		}
	})
}

// serve tells those who were served; wake has their queues look.
func (v *volume) serve(w *lockWait, wake func(*queue)) {
	for w != nil {
		next := w.next
		if w.piece == nil {
			w.granted <- struct{}{}
		} else {
			q := w.piece.q
			q.served.push(w)
			wake(q)
		}
		w = next
	}
}

// lock takes the piece's blocks, or has it wait for them: then is called when it has
// them.
func (c *piece) lock(then func(*piece)) bool {
	if c.locked {
		return true
	}
	// Before it can be served.
	c.then, c.turn.piece = then, c
	if c.q.v.locks.take(c.v, c.mask, &c.turn) {
		c.locked = true
		return true
	}
	c.rest()
	return false
}

func (c *piece) unlock() {
	if c.locked {
		c.locked = false
		c.q.tell(c.q.v.locks.release(c.v, c.mask))
	}
}

// tell tells those who were served.
func (q *queue) tell(served *lockWait) {
	if served != nil {
		q.v.serve(served, q.wake)
	}
}

// wake has a queue of the same volume look for what it waited for. q's reactor.
func (q *queue) wake(x *queue) {
	switch {
	case x == q:
		q.r.Defer(&q.goOn)
	case x.woken.CompareAndSwap(false, true) && !x.r.TryPost(x):
		x.woken.Store(false)
		q.r.Defer(&q.wakeLater) // its mailbox is full
	}
}

// wakeOthers has every queue look that something has come for.
func (q *queue) wakeOthers() {
	for _, x := range *q.v.queues.Load() {
		if x != q && (x.served.some() || x.turns.some()) {
			q.wake(x)
		}
	}
}

// RunTask implements [reactor.Task]: another thread has served somebody of this
// queue, or changed its rate. The queue may have been closed since; nobody waits then.
func (q *queue) RunTask(*reactor.Reactor) {
	q.woken.Store(false)
	q.takeTurns()
	q.releaseThrottled() // the rate may be another
}

// takeTurns goes on with pieces that have their blocks now, and with requests whose
// turn has come.
func (q *queue) takeTurns() {
	for w := q.served.all(); w != nil; {
		next := w.next
		c := w.piece
		c.locked = true
		c.unrest()
		c.then(c)
		w = next
	}
	for s := q.turns.all(); s != nil; {
		next := s.behind
		q.begin(s)
		s = next
	}
}

// linked is what a handover holds: it has room for a link of its own.
type linked[T any] interface {
	*T
	link() **T
}

// handover is a list that any thread adds to and one empties.
type handover[T any, P linked[T]] struct{ last atomic.Pointer[T] }

func (h *handover[T, P]) push(x *T) {
	for {
		last := h.last.Load()
		*P(x).link() = last
		if h.last.CompareAndSwap(last, x) {
			return
		}
	}
}

func (h *handover[T, P]) some() bool { return h.last.Load() != nil }

// all empties the list; what was added first comes first.
func (h *handover[T, P]) all() (first *T) {
	for x := h.last.Swap(nil); x != nil; {
		link := P(x).link()
		x, *link, first = *link, first, x
	}
	return first
}

func (w *lockWait) link() **lockWait { return &w.next }
func (s *slot) link() **slot         { return &s.behind }
