package pool

import (
	"sync"
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath"
)

// changeOrder keeps overlapping changes of a volume in the order of their coming,
// where locks alone cannot: a lock orders those who have come to it, and a change of
// many clusters comes to the last of them long after the first. So does one that is
// held back while a snapshot is taken.
//
// A change that comes to all its locks inside Submit, as nearly all do, is not in
// here, and looks at busy only. Any other has a place in the list until it has come
// to its last lock. Who overlaps with an earlier place waits, and has touched nothing
// then; who has begun waits for locks only. So nobody waits for one who came later.
type changeOrder struct {
	busy atomic.Int64 // places in the list

	mu          sync.Mutex // guards what follows, and the place of each slot
	first, last *slot      // in the order of their coming
}

// orderPlace is the place of a change. Guarded by changeOrder.mu, but for listed.
type orderPlace struct {
	before, after *slot
	from, to      uint64 // bytes, whole blocks
	waits         bool   // for an earlier one
	held          bool   // until its queue's pause ends
	listed        bool   // it has one; owned by the reactor
}

// overlaps reports whether two places overlap.
func (x *orderPlace) overlaps(y *orderPlace) bool { return x.from < y.to && y.from < x.to }

// enter gives a change that has come its place. It reports whether the change may
// begin; if not, its queue gets it when it may. lasting says that the change keeps
// the place while it comes to its locks; held that it may not begin before free.
func (o *changeOrder) enter(s *slot, lasting, held bool) bool {
	s.place = orderPlace{from: s.r.Offset &^ (blockSize - 1), to: (s.end + blockSize - 1) &^ (blockSize - 1)}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.busy.Add(1) // before the list is looked at: who comes while this one does, looks at it
	s.place.waits, s.place.held = o.blocked(s, o.first), held
	if !s.place.waits && !lasting && !held {
		o.busy.Add(-1)
		return true
	}
	s.place.listed = true
	if s.place.before = o.last; o.last == nil {
		o.first = s
	} else {
		o.last.place.after = s
	}
	o.last = s
	return !s.place.waits && !held
}

// blocked reports whether one from x on and before s overlaps with s. mu is held.
func (o *changeOrder) blocked(s, x *slot) bool {
	for ; x != nil && x != s; x = x.place.after {
		if x.place.overlaps(&s.place) {
			return true
		}
	}
	return false
}

// hold keeps a change that may begin from doing so, until free. It keeps its place.
func (o *changeOrder) hold(s *slot) {
	o.mu.Lock()
	s.place.held = true
	o.mu.Unlock()
}

// free undoes hold and reports whether the change may begin; if not, its queue gets
// it when it may.
func (o *changeOrder) free(s *slot) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	s.place.held = false
	s.place.waits = o.blocked(s, o.first)
	return !s.place.waits
}

// leave gives up the place of a change that has come to all its locks. Those in the
// list it returns may begin.
func (o *changeOrder) leave(s *slot) (turns *slot) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if s.place.before == nil {
		o.first = s.place.after
	} else {
		s.place.before.place.after = s.place.after
	}
	if s.place.after == nil {
		o.last = s.place.before
	} else {
		s.place.after.place.before = s.place.before
	}
	s.place.listed = false
	o.busy.Add(-1)
	var tail *slot
	for x := s.place.after; x != nil; x = x.place.after {
		if !x.place.waits || x.place.held || !x.place.overlaps(&s.place) || o.blocked(x, o.first) {
			continue
		}
		x.place.waits = false
		x.behind = nil
		if tail == nil {
			turns = x
		} else {
			tail.behind = x
		}
		tail = x
	}
	return turns
}

// comesAtOnce reports whether a change comes to all its locks inside Submit.
func (s *slot) comesAtOnce() bool {
	r := s.r
	first, last := r.Offset/blockSize, (s.end-1)/blockSize
	if r.Length == 0 || first == last {
		return true
	}
	if clusters := last/clusterBlocks - first/clusterBlocks + 1; r.Op == datapath.OpWrite {
		// A piece a cluster, and one for each end that is a part of a block.
		return clusters+2 <= uint64(len(s.q.free))+1 || (r.Offset|r.Length)%blockSize == 0 && clusters <= uint64(len(s.q.free))+1
	} else { // zeros are written one cluster after the other
		return clusters == 1 && (r.Offset|r.Length)%blockSize == 0
	}
}

// submitChange begins a change, or gives it its place in the order of them.
func (q *queue) submitChange(s *slot) {
	if q.v.readOnly || q.p.config.ReadOnly {
		s.status = datapath.StatusReadOnly
	} else if q.p.failure.Load() != nil {
		s.status = datapath.StatusIO
	}
	if s.status != datapath.StatusOK {
		q.modifying++
		s.finish()
		return
	}
	o := &q.v.order
	if q.paused || o.busy.Load() != 0 || !s.comesAtOnce() {
		if !o.enter(s, !s.comesAtOnce(), q.paused) {
			q.active[s.parity].Add(-1) // it has touched nothing, and others may wait for the end of the epoch
			if q.paused {
				q.held = append(q.held, s)
			}
			return
		}
	}
	q.modifying++
	s.advance()
}

// begin goes on with a change whose turn has come.
func (q *queue) begin(s *slot) {
	if q.paused {
		q.v.order.hold(s)
		q.held = append(q.held, s)
		return
	}
	s.parity = q.enter()
	q.modifying++
	if q.p.failure.Load() != nil {
		s.fail(datapath.StatusIO)
	}
	s.advance()
}

// cameToLocks gives up the place of a change that has come to the last of its locks,
// or will not.
func (s *slot) cameToLocks() {
	q := s.q
	for x := q.v.order.leave(s); x != nil; {
		next := x.behind
		x.q.turns.push(x)
		q.wake(x.q)
		x = next
	}
}

// resume lets changes go on. Reactor.
func (q *queue) resume() {
	q.paused = false
	for _, s := range q.held {
		if q.v.order.free(s) {
			q.begin(s)
		}
	}
	clear(q.held)
	q.held = q.held[:0]
}
