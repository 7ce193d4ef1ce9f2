package fuse

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	// segmentSize holds a few of the longest requests, or hundreds of small ones, so
	// that few bytes at its end are left over.
	segmentSize = 2 << 20
	segmentsMax = 8 // of a reactor; with them 16 MiB of writes are on their way
)

// inbox is the memory of a reactor that /dev/fuse is read into, shared by its queues,
// since a read ends before the next begins. Nobody knows before whether a read brings
// a write of 4 KiB or of 1 MiB: it goes to the free end of a segment, and as much of
// that as the write's data takes stays taken until the write is done.
//
// It is owned by the reactor.
type inbox struct {
	reactor  *reactor.Reactor // immutable
	users    int              // queues; under inboxesMu
	current  *segment
	segments []*segment
	stalled  []*queue // waiting for room
	spare    []byte   // of a read for which the arena has no room; see takeBuffer
	lent     bool     // spare is in use
	starved  []*queue // waiting for spare
}

// segment is a piece of the reactor's arena.
type segment struct {
	memory []byte
	used   int // bytes from the start
	taken  int // writes whose data is in it
}

var (
	inboxesMu sync.Mutex // held for a moment when a queue is made or closed
	inboxes   = map[*reactor.Reactor]*inbox{}
)

// useInbox returns the reactor's inbox. Reactor only.
func useInbox(r *reactor.Reactor) (*inbox, error) {
	inboxesMu.Lock()
	defer inboxesMu.Unlock()
	b := inboxes[r]
	if b == nil {
		b = &inbox{reactor: r, segments: make([]*segment, 0, segmentsMax)}
		if b.spare = r.Buffers().Alloc(ioMaxLimit); b.spare == nil {
			return nil, errNoRoom(r)
		}
		if b.current = b.grow(); b.current == nil {
			r.FreeBuffer(b.spare)
			return nil, errNoRoom(r)
		}
		inboxes[r] = b
	}
	b.users++
	return b, nil
}

func errNoRoom(r *reactor.Reactor) error {
	return fmt.Errorf("fuse: reactor %s: no room for %d bytes in its buffer arena of %d", r.Name(), segmentSize+ioMaxLimit, r.Buffers().Limit())
}

// leastUsed chooses count reactors that have the fewest queues.
func leastUsed(reactors []*reactor.Reactor, count int) []*reactor.Reactor {
	inboxesMu.Lock()
	defer inboxesMu.Unlock()
	used := func(r *reactor.Reactor) int {
		if b := inboxes[r]; b != nil {
			return b.users
		}
		return 0
	}
	list := slices.Clone(reactors)
	slices.SortStableFunc(list, func(a, b *reactor.Reactor) int { return used(a) - used(b) })
	return list[:count]
}

// leave is the end of a queue's use. Reactor only.
func (b *inbox) leave(q *queue) {
	b.forget(q)
	inboxesMu.Lock()
	b.users--
	users := b.users
	if users == 0 {
		delete(inboxes, b.reactor)
	}
	inboxesMu.Unlock()
	if users > 0 {
		return
	}
	for _, s := range b.segments {
		b.free(s)
	}
	b.segments, b.current = nil, nil
	b.reactor.FreeBuffer(b.spare)
}

// grow adds a segment, or returns nil.
func (b *inbox) grow() *segment {
	if len(b.segments) == segmentsMax {
		return nil
	}
	memory := b.reactor.Buffers().Alloc(segmentSize)
	if memory == nil {
		return nil
	}
	// In place, and to stay so: a fault while the process is being killed would fail
	// a request. Where it may not be locked, swapping it out is all there is to fear.
	_ = unix.Mlock(memory)
	for i := 0; i < len(memory); i += pageSize {
		memory[i] = 0
	}
	s := &segment{memory: memory}
	b.segments = append(b.segments, s)
	return s
}

func (b *inbox) free(s *segment) {
	_ = unix.Munlock(s.memory) // as above
	b.reactor.FreeBuffer(s.memory)
}

// room returns at least length bytes of b.current, or nil when there are none now.
func (b *inbox) room(length int) []byte {
	s := b.current
	if s.taken == 0 {
		s.used = 0 // the same memory again, which is in the CPU's cache
	}
	if len(s.memory)-s.used >= length {
		return s.memory[s.used : s.used+length]
	}
	for _, s := range b.segments {
		if s.taken == 0 {
			s.used = 0
			b.current = s
			return s.memory[:length]
		}
	}
	if s = b.grow(); s == nil {
		return nil
	}
	b.current = s
	return s.memory[:length]
}

// keep takes the first length bytes of what room returned.
func (b *inbox) keep(length int) *segment {
	s := b.current
	s.used += (length + pageSize - 1) &^ (pageSize - 1)
	s.taken++
	return s
}

// give undoes one keep.
func (b *inbox) give(s *segment) {
	if s.taken--; s.taken > 0 {
		return
	}
	for _, q := range b.stalled {
		b.reactor.Defer(&q.pull)
	}
	clear(b.stalled)
	if len(b.stalled) > 0 || s == b.current {
		b.stalled = b.stalled[:0]
		return
	}
	for i, other := range b.segments { // more than the load needs now
		if other == s {
			b.segments = append(b.segments[:i], b.segments[i+1:]...)
			b.free(s)
			return
		}
	}
}

// wait has q pull again when there is room.
func (b *inbox) wait(q *queue) {
	if !slices.Contains(b.stalled, q) {
		b.stalled = append(b.stalled, q)
	}
}

// takeBuffer returns memory for a read, or nil, and then has q begin again when there
// may be some.
func (b *inbox) takeBuffer(q *queue, length int) []byte {
	buffer := b.reactor.Buffers().Alloc(length)
	switch {
	case buffer != nil:
		return buffer
	case !b.lent:
		b.lent = true // reads make progress however much others hold
		return b.spare[:length]
	case !slices.Contains(b.starved, q):
		b.starved = append(b.starved, q)
	}
	b.reactor.WaitBuffers(&q.retry)
	return nil
}

func (b *inbox) giveBuffer(buffer []byte) {
	if &buffer[0] != &b.spare[0] {
		b.reactor.FreeBuffer(buffer)
		return
	}
	b.lent = false
	for _, q := range b.starved {
		b.reactor.Defer(&q.retry)
	}
	clear(b.starved)
	b.starved = b.starved[:0]
}

func (b *inbox) forget(q *queue) {
	is := func(other *queue) bool { return other == q }
	b.stalled = slices.DeleteFunc(b.stalled, is)
	b.starved = slices.DeleteFunc(b.starved, is)
}

// newPage maps a page of memory that is in place.
func newPage() ([]byte, error) {
	page, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, errors.Join(errors.New("fuse: a page for headers"), err)
	}
	_ = unix.Mlock(page) // see grow
	page[0] = 0
	return page, nil
}
