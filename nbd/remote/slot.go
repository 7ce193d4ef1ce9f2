package remote

import (
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/nbd"
	"github.com/ashlar-storage/ashlar/nbd/internal/list"
)

// slot is one request from its arrival at the core to its end. All but up and
// queue belong to the core while the request is with it.
type slot struct {
	queue *queue            // immutable; nil: one of the core's own
	up    *datapath.Request // the request
	wire  nbd.LinkRequest   // a piece of it
	at    uint64            // bytes that the server has answered for
	mark  uint64            // flush: the entries it covers end here

	sent     bool // it was on a wire at some time: the server may have done it
	wired    bool // it is on a wire now
	held     bool // an earlier change of the same bytes has not ended
	reserved bool // room is set aside in the retention
	zero     bool // all pieces so far were holes
	status   datapath.Status

	order list.Link[slot] // in core.all
	todo  list.Link[slot] // in core.todo
}

func (s *slot) overlaps(o *slot) bool {
	return s.up.Offset < o.up.Offset+o.up.Length && o.up.Offset < s.up.Offset+s.up.Length
}

// commands are the operations in the server's language.
var commands = [datapath.OpCount]nbd.Command{
	datapath.OpRead: nbd.CommandRead, datapath.OpWrite: nbd.CommandWrite, datapath.OpFlush: nbd.CommandFlush,
	datapath.OpDiscard: nbd.CommandTrim, datapath.OpWriteZeroes: nbd.CommandWriteZeroes, datapath.OpCache: nbd.CommandCache,
	datapath.OpExtents: nbd.CommandBlockStatus,
}

// fill makes the next piece of the request.
func (s *slot) fill(l *nbd.Link, alignment uint64) {
	r, w := s.up, &s.wire
	w.Command, w.Flags, w.Buf = commands[r.Op], 0, nil
	w.Offset, w.Length = r.Offset+s.at, r.Length-s.at
	most := l.EffectMax()
	if r.Op == datapath.OpRead || r.Op == datapath.OpWrite {
		most = uint64(l.PayloadMax())
	}
	if w.Length > most {
		w.Length = most - most%alignment
	}
	switch r.Op {
	case datapath.OpRead, datapath.OpWrite:
		w.Buf = r.Buf[s.at:][:w.Length]
	case datapath.OpExtents:
		w.Context, w.Extents = contextIndex(l, r.Context), r.Extents[:0]
		if r.Flags&datapath.FlagOneExtent != 0 {
			w.Flags |= nbd.CommandFlagReqOne
		}
	case datapath.OpWriteZeroes:
		if r.Flags&datapath.FlagNoUnmap != 0 {
			w.Flags |= nbd.CommandFlagNoHole
		}
		if r.Flags&datapath.FlagFastZero != 0 {
			w.Flags |= nbd.CommandFlagFastZero
		}
	}
	if r.Modifies() && r.Flags&datapath.FlagFUA != 0 {
		w.Flags |= nbd.CommandFlagFUA
	}
}

// statusOf is what an answer of the server means (proto.md, "Error values").
func statusOf(e nbd.Error) datapath.Status {
	switch e {
	case nbd.ErrnoOK:
		return datapath.StatusOK
	case nbd.ErrnoPerm:
		return datapath.StatusReadOnly
	case nbd.ErrnoNoSpace:
		return datapath.StatusNoSpace
	case nbd.ErrnoOverflow:
		return datapath.StatusOverflow
	case nbd.ErrnoNotSupported:
		return datapath.StatusNotSupported
	case nbd.ErrnoIO, nbd.ErrnoNoMem:
		return datapath.StatusIO
	}
	return datapath.StatusInvalid // what an unknown number means, too
}
