package filedev

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	bounceCount = 8        // unaligned requests served at once per queue; more wait for one of these
	bounceSize  = 32 << 10 // a window of one; a power of two
)

// bouncer serves one request whose offset, length or memory does not suit direct
// I/O, window by window: it reads the enclosing blocks, copies out or in, and
// for a change writes them back, all under the lock of their regions.
//
// The ragged end of a file whose size is no multiple of the blocks is a window of
// its own, which goes through the page cache. No direct I/O ever touches those
// bytes, but the page they lie in has others, so it is kept apart from changes of
// that region too.
type bouncer struct {
	q      *queue
	s      *slot
	io     reactor.IO
	memory []byte
	hold   hold

	start, end uint64 // the enclosing blocks of this window
	from, to   uint64 // the request's bytes in it
	moved      int    // bytes of the enclosing blocks done in this phase
	phase      bouncePhase
	volatile   bool // something was written that FUA has still to make durable
}

type bouncePhase uint8

const (
	bounceRead bouncePhase = iota
	bounceWrite
)

func (q *queue) openBouncers() error {
	memory, err := unix.Mmap(-1, 0, bounceCount*bounceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("bounce buffers: %w", err)
	}
	if err := q.r.Reserve(bounceCount); err != nil {
		return errors.Join(err, unix.Munmap(memory))
	}
	q.bounceMem = memory
	q.bouncers = make([]bouncer, bounceCount)
	q.freeBounce = make([]*bouncer, 0, bounceCount)
	for i := range q.bouncers {
		b := &q.bouncers[i]
		b.q, b.memory = q, memory[i*bounceSize:(i+1)*bounceSize]
		b.io.Done = func(*reactor.IO) { b.done() }
		q.freeBounce = append(q.freeBounce, b)
	}
	return nil
}

func (q *queue) closeBouncers() error {
	if q.bounceMem == nil {
		return nil
	}
	memory := q.bounceMem
	q.bounceMem = nil
	q.r.Release(bounceCount)
	return unix.Munmap(memory)
}

// bounce serves s through a bouncer, now or when one is free.
func (q *queue) bounce(s *slot) {
	q.waitBounce = append(q.waitBounce, s)
	if len(q.waitBounce) == 1 {
		q.startBounces()
	}
}

// startBounces gives free bouncers to those who wait, in order.
func (q *queue) startBounces() {
	for len(q.waitBounce) > 0 && len(q.freeBounce) > 0 {
		n := len(q.freeBounce) - 1
		b := q.freeBounce[n]
		q.freeBounce = q.freeBounce[:n]
		s := takeFirst(&q.waitBounce)
		b.s, s.b = s, b
		b.volatile = false
		s.moved = 0
		b.window()
	}
}

// window begins the next window: at most bounceSize, and the ragged end apart.
func (b *bouncer) window() {
	r, d := b.s.r, b.q.d
	mask := uint64(d.align - 1)
	b.from = r.Offset + uint64(b.s.moved)
	b.start = b.from &^ mask
	limit := b.start&^(bounceSize-1) + bounceSize
	if aligned := d.aligned.Load(); b.start < aligned {
		limit = min(limit, aligned)
	} else {
		limit = d.size.Load()
	}
	b.to = min(r.Offset+r.Length, limit)
	b.end = min((b.to+mask)&^mask, limit)
	b.phase, b.moved = bounceRead, 0
	switch {
	case r.Op != datapath.OpRead:
		b.hold.want(b.start, b.end-b.start, lockAlone)
	case b.ragged() || d.tears: // the page cache does, too
		b.hold.want(b.start, b.end-b.start, lockRead)
	}
	b.s.startWindow()
}

// ragged reports whether the window is the end of the file that direct I/O cannot
// reach.
func (b *bouncer) ragged() bool { return b.start >= b.q.d.aligned.Load() }

// startWindow begins the window of the bouncer of s when it has its regions and a
// place in the disk's queue.
func (s *slot) startWindow() {
	q := s.q
	if !q.lock(s, &s.b.hold, (*slot).startWindow) {
		return
	}
	if len(q.waitPlace) > 0 || !q.takePlace() {
		q.parkForPlace(s, (*slot).placedWindow)
		return
	}
	s.placedWindow()
}

func (s *slot) placedWindow() {
	b := s.b
	if s.r.Op != datapath.OpRead && b.from == b.start && b.to == b.end {
		b.merge() // every byte is new: nothing to read
	}
	b.submit()
}

// submit begins or continues the window's present phase; its place in the kernel
// is taken.
func (b *bouncer) submit() {
	d := b.q.d
	b.io.Op, b.io.RWFlags, b.io.File = reactor.OpRead, 0, b.q.file
	if b.ragged() {
		b.io.File = b.q.tail
	}
	if b.phase == bounceWrite {
		b.io.Op = reactor.OpWrite
		if !b.ragged() {
			b.io.RWFlags = d.writeFlags(b.s.r)
		}
	}
	b.io.Buf, b.io.Offset = b.memory[b.moved:b.end-b.start], int64(b.start)+int64(b.moved)
	b.q.r.SubmitIO(&b.io)
}

// merge puts the request's bytes into the window and turns to writing.
func (b *bouncer) merge() {
	part := b.memory[b.from-b.start : b.to-b.start]
	if b.s.r.Op == datapath.OpWriteZeroes {
		clear(part)
	} else {
		copy(part, b.s.r.Buf[b.s.moved:])
	}
	b.phase, b.moved = bounceWrite, 0
}

func (b *bouncer) done() {
	q := b.q
	q.leavePlace()
	b.advance(b.s)
	q.startBounces()
	q.retryPlaces()
}

func (b *bouncer) advance(s *slot) {
	n, d := b.io.Result, b.q.d
	durable := b.io.RWFlags&unix.RWF_DSYNC != 0
	switch {
	case again(n):
		b.again()
		return
	case durable && unsupported(n):
		d.noDsync.Store(true)
		b.again()
		return
	case durable && n <= 0:
		b.finish(d.syncFailure(n))
		return
	case n > 0 && n < len(b.io.Buf):
		if !b.ragged() {
			n &^= d.align - 1
		}
		if n > 0 {
			b.volatile = b.volatile || b.phase == bounceWrite && !durable
			b.moved += n
			b.again()
			return
		}
	}
	if n <= 0 {
		b.finish(d.failure(b.io.Op, n))
		return
	}
	if b.phase == bounceRead && s.r.Op != datapath.OpRead {
		b.merge()
		b.again()
		return
	}
	if s.r.Op == datapath.OpRead {
		copy(s.r.Buf[s.moved:], b.memory[b.from-b.start:b.to-b.start])
	} else {
		b.volatile = b.volatile || !durable
	}
	s.moved += int(b.to - b.from)
	b.q.unlock(&b.hold)
	if uint64(s.moved) < s.r.Length {
		b.window()
		return
	}
	b.finish(datapath.StatusOK)
}

// again submits the present phase once more, with a place as it had before.
func (b *bouncer) again() {
	b.q.inFlight++
	b.q.d.inFlight.Add(1)
	b.submit()
}

// finish ends the request and frees the bouncer.
func (b *bouncer) finish(status datapath.Status) {
	q, s := b.q, b.s
	q.unlock(&b.hold)
	b.s, s.b = nil, nil
	q.freeBounce = append(q.freeBounce, b)
	if status == datapath.StatusOK && b.volatile && s.r.Flags&datapath.FlagFUA != 0 {
		q.sync(s)
		return
	}
	s.r.Complete(status)
}
