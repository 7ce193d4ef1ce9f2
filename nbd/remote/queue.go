package remote

import (
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/datapath/ring"
)

// doorbell tells another reactor, once however often it is rung, that a ring holds
// something.
type doorbell struct {
	from, to *reactor.Reactor
	answer   func() // empties the ring; on to
	rung     atomic.Bool
	again    reactor.Deferred
}

func (b *doorbell) init(from, to *reactor.Reactor, answer func()) {
	b.from, b.to, b.answer = from, to, answer
	b.again.Func = b.post
}

// ring is called on from, after the push.
func (b *doorbell) ring() {
	if !b.rung.Swap(true) {
		b.post()
	}
}

func (b *doorbell) post() {
	if !b.to.TryPost(b) {
		b.from.Defer(&b.again) // its mailbox is full: it has work, and looks soon
	}
}

// RunTask implements [reactor.Task].
func (b *doorbell) RunTask(*reactor.Reactor) {
	b.rung.Store(false)
	b.answer()
}

// queue is one reactor's path to the core.
type queue struct {
	device      *Device
	reactor     *reactor.Reactor
	slots       []slot // by tag
	completions datapath.Completions

	toCore, toQueue         *ring.MPSC[*slot]
	coreDoorbell, queueBell doorbell
}

// OpenQueue implements [datapath.Device].
func (d *Device) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	if depth <= 0 {
		return nil, fmt.Errorf("remote: a queue of depth %d", depth)
	}
	capacity := 2 << bits.Len(uint(depth-1)) // a power of two, above depth
	q := &queue{
		device: d, reactor: r, slots: make([]slot, depth),
		toCore: ring.NewMPSC[*slot](capacity), toQueue: ring.NewMPSC[*slot](capacity),
	}
	for i := range q.slots {
		s := &q.slots[i]
		s.queue = q
		s.wire.Done = func(*nbdRequest) { d.core.answered(s) }
	}
	q.completions.Init(r, depth)
	q.coreDoorbell.init(r, d.reactor, q.arrive)
	q.queueBell.init(d.reactor, r, q.complete)
	return q, nil
}

// Submit implements [datapath.Queue].
func (q *queue) Submit(r *datapath.Request) {
	if status, answered := q.refuse(r); answered {
		q.completions.Add(r, status)
		return
	}
	r.MarkRecent(datapath.StageDevice, q.reactor)
	s := &q.slots[r.Tag]
	s.up = r
	q.toCore.Push(s) // it holds depth
	q.coreDoorbell.ring()
}

// needs are the features of operations that are not always served.
var needs = [datapath.OpCount]datapath.Features{
	datapath.OpFlush: datapath.FeatureFlush, datapath.OpDiscard: datapath.FeatureDiscard, datapath.OpWriteZeroes: datapath.FeatureWriteZeroes,
	datapath.OpCache: datapath.FeatureCache, datapath.OpExtents: datapath.FeatureExtents,
}

// refuse answers what is not for the server.
func (q *queue) refuse(r *datapath.Request) (status datapath.Status, answered bool) {
	info := q.device.info.Load()
	switch {
	case r.Op >= datapath.OpCount || !info.Has(needs[r.Op]),
		r.Flags&datapath.FlagFastZero != 0 && !info.Has(datapath.FeatureFastZero),
		r.Modifies() && r.Flags&datapath.FlagFUA != 0 && !info.Has(datapath.FeatureFUA):
		return datapath.StatusNotSupported, true
	case r.Op == datapath.OpExtents && (cap(r.Extents) == 0 || r.Length == 0 || !slices.Contains(info.Contexts, r.Context)):
		return datapath.StatusInvalid, true
	case r.Op != datapath.OpFlush && r.Length == 0:
		return datapath.StatusOK, true // nothing to do, and no meaning on the wire
	case r.Op == datapath.OpWrite && r.Length > ioMax: // does not keep to MaxIO
		return datapath.StatusInvalid, true
	}
	return 0, false
}

// arrive takes requests over. It runs on the core's reactor.
func (q *queue) arrive() {
	for {
		s, ok := q.toCore.Pop()
		if !ok {
			break
		}
		q.device.core.arrived(s)
	}
	q.device.core.pump()
}

// give hands an ended request back. It runs on the core's reactor.
func (q *queue) give(s *slot) {
	q.toQueue.Push(s) // it holds depth
	q.queueBell.ring()
}

// complete ends what the core handed back. It runs on the queue's reactor.
func (q *queue) complete() {
	for {
		s, ok := q.toQueue.Pop()
		if !ok {
			return
		}
		r := s.up
		s.up = nil
		r.Zero = s.zero && r.Op == datapath.OpRead && s.status == datapath.StatusOK
		if r.Op == datapath.OpExtents && s.status == datapath.StatusOK {
			r.Extents = s.wire.Extents
		}
		r.Complete(s.status)
	}
}

// Close implements [datapath.Queue].
func (q *queue) Close() error { return nil }
