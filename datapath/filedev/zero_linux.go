package filedev

import (
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRange = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE

	// zeroPiece is what one write of zeros covers where fallocate cannot zero.
	zeroPiece = 1 << 20
)

// zero begins a discard or write-zeroes: fallocate first, and where that is not
// to be had, a discard does nothing and write-zeroes writes zeros.
func (q *queue) zero(s *slot) {
	r := s.r
	if r.Op == datapath.OpWriteZeroes && (q.d.noZero.Load() || q.zeroesSlowly(r)) {
		q.writeZeroes(s)
		return
	}
	offset, length := r.Offset, r.Length
	if q.d.block { // whole sectors only
		mask := uint64(q.d.sector - 1)
		start, end := (offset+mask)&^mask, (offset+length)&^mask
		switch {
		case r.Op == datapath.OpDiscard && start >= end:
			q.later(s, datapath.StatusOK)
			return
		case r.Op == datapath.OpDiscard:
			offset, length = start, end-start
		case offset&mask != 0 || length&mask != 0:
			q.writeZeroes(s)
			return
		}
	}
	q.d.lender.punched(offset, length)
	s.io.Op = reactor.OpFallocate
	s.io.File = q.file
	s.io.Offset, s.io.Length = int64(offset), int64(length)
	s.io.Mode = punchHole
	switch {
	case r.Op == datapath.OpDiscard && q.d.block:
		// Punching a hole zeroes: where the disk cannot unmap and promise zeros, it
		// writes them.
		s.io.Op = reactor.OpFunc
	case r.Op == datapath.OpWriteZeroes && r.Flags&datapath.FlagNoUnmap != 0:
		s.io.Mode = zeroRange
	}
	q.wantChange(s)
	s.startZero()
}

// zeroesSlowly reports whether r asks for fast zeros that the kernel would write
// one by one: for a disk without a command to zero it does, unless it may unmap.
func (q *queue) zeroesSlowly(r *datapath.Request) bool {
	const fast = datapath.FlagFastZero | datapath.FlagNoUnmap
	return q.d.block && !q.d.zeroes && r.Flags&fast == fast
}

// wantChange claims the range of s for a change of whole blocks. In inline mode
// nothing is claimed: a read may see some of a block zeroed that is being zeroed.
func (q *queue) wantChange(s *slot) {
	if q.d.access != AccessInline {
		s.hold.want(s.r.Offset, s.r.Length, lockWrite)
	}
}

// startZero begins the fallocate, or parks.
func (s *slot) startZero() {
	if s.q.lock(s, &s.hold, (*slot).startZero) {
		s.q.submitNow(s)
	}
}

// zeroDone continues after fallocate, a write of zeros, or the fdatasync of a FUA.
func (q *queue) zeroDone(s *slot) {
	n := s.io.Result
	switch {
	case s.io.Op == reactor.OpWrite:
		q.zeroWritten(s, n)
		return
	case n == 0:
	case again(n):
		q.submitNow(s)
		return
	case unsupported(n) || q.d.block && n == -int(unix.EINVAL):
		if s.r.Op == datapath.OpDiscard {
			break // a hint; the device cannot take it
		}
		if s.io.Mode == punchHole {
			q.d.noZero.Store(true)
		}
		// Where a range cannot be zeroed in place (tmpfs and others), punching would
		// also read back as zeros, but give up the space the client asked to keep.
		q.writeZeroes(s)
		return
	default:
		q.end(s, datapath.StatusOfErrno(unix.Errno(-n)))
		return
	}
	q.d.lender.punched(s.r.Offset, s.r.Length) // a read may have found them in the meantime
	q.zeroed(s)
}

// zeroed ends s, after an fdatasync if it asked for one.
func (q *queue) zeroed(s *slot) {
	if s.r.Flags&datapath.FlagFUA == 0 {
		q.end(s, datapath.StatusOK)
		return
	}
	q.unlock(&s.hold)
	q.sync(s)
}

// writeZeroes writes zeros over the range of s, piece by piece. It may be called
// inside Submit, and after a fallocate, with the range still held.
func (q *queue) writeZeroes(s *slot) {
	if s.r.Flags&datapath.FlagFastZero != 0 {
		q.unlock(&s.hold)
		q.later(s, datapath.StatusNotSupported)
		return
	}
	if q.d.access == AccessDirect && (s.r.Offset|s.r.Length)&uint64(q.d.align-1) != 0 {
		q.unlock(&s.hold)
		q.bounce(s)
		return
	}
	if s.hold.taken == 0 {
		q.wantChange(s)
	}
	s.startZeroWrite()
}

func (s *slot) startZeroWrite() {
	if s.q.lock(s, &s.hold, (*slot).startZeroWrite) {
		s.q.writeZeroPiece(s)
	}
}

func (q *queue) writeZeroPiece(s *slot) {
	s.io.Op, s.io.File, s.io.RWFlags = reactor.OpWrite, q.file, 0
	left := s.r.Length - uint64(s.moved)
	s.io.Buf = zeroBytes[:min(left, zeroPiece)]
	s.io.Offset = int64(s.r.Offset) + int64(s.moved)
	q.submit(s)
}

func (q *queue) zeroWritten(s *slot, n int) {
	switch {
	case again(n):
		n = 0
	case n < len(s.io.Buf):
		if n > 0 {
			n &^= q.d.align - 1
		}
		if n <= 0 {
			q.end(s, q.d.failure(s.io.Op, n))
			return
		}
	}
	if s.moved += n; uint64(s.moved) < s.r.Length {
		q.writeZeroPiece(s)
		return
	}
	q.d.lender.written(s.r.Offset, s.r.Length)
	q.zeroed(s)
}

// zeroBytes are page-aligned zeros outside the Go heap, shared by all and never
// written.
var zeroBytes = func() []byte {
	b, err := unix.Mmap(-1, 0, zeroPiece, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic("filedev: no memory for zeros: " + err.Error())
	}
	return b
}()
