package filedev

import "sync/atomic"

const (
	// regionSize is what one lock covers: a request of 128 KiB takes eight of
	// them, and a read-modify-write rarely meets anything but its neighbours.
	regionSize  = 16 << 10
	regionShift = 14
	regionCount = 4096 // further regions share these, 64 MiB apart

	// syncRegion is one more lock, after all the others in order: who holds it
	// may call fdatasync.
	syncRegion = regionCount

	// holdersMax bounds the requests of a device, so that 16 bits hold each count
	// of a lock.
	holdersMax = 1<<16 - 1
)

// lockKind says who may be in a region together: any number of lockRead, any
// number of lockWrite, or a single lockAlone.
type lockKind uint64

const (
	lockRead lockKind = iota
	lockWrite
	lockAlone
)

// regionLocks keep apart what must not happen at once to the same blocks, on any
// queue: in direct mode a read-modify-write and everything else that changes
// them, in the other modes reads and changes, because the page cache tears a
// page that is read and written together.
//
// Each lock is first come, first served: who does not fit in draws a ticket, and
// nobody passes him. A request takes its regions in ascending order, holding
// those it has, so that no two wait for each other; it holds nothing else that
// another request waits for while it holds or awaits a region.
//
// Inline mode, where a write may not wait, uses version, beginWrite and endWrite
// instead: a read notices that a write was under way, and is done again.
//
// Nobody waits here. A request that cannot have its regions is parked by its
// queue; take and release tell when parked requests have to be woken.
type regionLocks struct {
	// By bits: 0-15 how many are in; 16-17 of which kind; 32-47 the ticket that is
	// next to go in; 48-63 the next ticket to be drawn. In inline mode: 0-15 how
	// many writes are under way; 16-63 how many have ended.
	regions [regionCount + 1]atomic.Uint64
}

const (
	lockKindShift    = 16
	lockServingShift = 32
	lockNextShift    = 48
)

// hold is what one request holds and awaits. The zero value holds nothing.
type hold struct {
	kind    lockKind
	first   uint32 // region
	count   uint32
	wrapped uint32 // how many of them, the last of the range, come first in order
	taken   uint32
	ticket  uint16 // for region taken, when queued
	queued  bool
}

// want makes h, which holds nothing, a claim on [offset, offset+length).
func (h *hold) want(offset, length uint64, kind lockKind) {
	first := offset >> regionShift
	count := min((offset+length-1)>>regionShift-first+1, regionCount)
	first %= regionCount
	*h = hold{kind: kind, first: uint32(first), count: uint32(count)}
	if end := first + count; end > regionCount {
		h.wrapped = uint32(end - regionCount)
	}
}

// wantSync makes h, which holds nothing, a claim on syncRegion.
func (h *hold) wantSync() { *h = hold{kind: lockAlone, first: syncRegion, count: 1} }

// region is the i-th region of h in ascending order.
func (h *hold) region(i uint32) uint32 {
	if i < h.wrapped {
		return i
	}
	return h.first + i - h.wrapped
}

// take takes regions of h until it has them all or has to wait for one. wake says
// that someone else may be able to go on now, whether or not h is held.
func (l *regionLocks) take(h *hold) (held, wake bool) {
	for h.taken < h.count {
		word := &l.regions[h.region(h.taken)]
		for {
			v := word.Load()
			serving, next := uint16(v>>lockServingShift), uint16(v>>lockNextShift)
			in := v & holdersMax
			fits := in == 0 || lockKind(v>>lockKindShift&3) == h.kind && h.kind != lockAlone
			entered := v&^(3<<lockKindShift) + 1 + uint64(h.kind)<<lockKindShift
			switch {
			case h.queued && (serving != h.ticket || !fits):
				return false, wake
			case h.queued:
				entered &^= holdersMax << lockServingShift
				entered |= uint64(serving+1) << lockServingShift
				if !word.CompareAndSwap(v, entered) {
					continue
				}
				h.queued = false
				wake = wake || serving+1 != next // who comes next may fit in too
			case fits && serving == next:
				if !word.CompareAndSwap(v, entered) {
					continue
				}
			default:
				if word.CompareAndSwap(v, v+1<<lockNextShift) {
					h.ticket, h.queued = next, true
					return false, wake
				}
				continue
			}
			break
		}
		h.taken++
	}
	return true, wake
}

// release gives back what h holds. wake says that someone waits for it.
func (l *regionLocks) release(h *hold) (wake bool) {
	for i := range h.taken {
		v := l.regions[h.region(i)].Add(^uint64(0))
		wake = wake || v&holdersMax == 0 && uint16(v>>lockServingShift) != uint16(v>>lockNextShift)
	}
	*h = hold{}
	return wake
}

// beginWrite notes that the range is about to change.
func (l *regionLocks) beginWrite(offset, length uint64) {
	var h hold
	h.want(offset, length, lockWrite)
	for i := range h.count {
		l.regions[h.region(i)].Add(1)
	}
}

// endWrite notes that it has changed.
func (l *regionLocks) endWrite(offset, length uint64) {
	var h hold
	h.want(offset, length, lockWrite)
	for i := range h.count {
		l.regions[h.region(i)].Add(1<<lockKindShift - 1)
	}
}

// version changes with every write to the range; still says that none is under
// way.
func (l *regionLocks) version(offset, length uint64) (version uint64, still bool) {
	var h hold
	h.want(offset, length, lockRead)
	for i := range h.count {
		v := l.regions[h.region(i)].Load()
		if v&holdersMax != 0 {
			return 0, false
		}
		version += v >> lockKindShift
	}
	return version, true
}
