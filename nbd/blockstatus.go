package nbd

import (
	"encoding/binary"
	"math"

	"github.com/ashlar-storage/ashlar/datapath"
)

// statusExtents is how many extents one reply of ours carries at most. Clients
// ask again for what it leaves out.
const statusExtents = 4096

// statusReply is the one block status request a connection answers at a time;
// others wait in statusOps. Its memory exists only where contexts were selected.
type statusReply struct {
	op      *op
	extents []datapath.Extent
	out     []byte
	sending bool
	starved bool // waits for a free piece
}

func (s *statusReply) start(c *conn) {
	s.extents = make([]datapath.Extent, 0, statusExtents)
	s.out = make([]byte, 8+16*statusExtents)
}

// statusPayload takes the payload of a block status: effect length 8, context ids
// 4 each. A bad one is refused; it has been consumed.
func (c *conn) statusPayload(o *op, b []byte) {
	o.length = binary.BigEndian.Uint64(b)
	for b = b[8:]; len(b) > 0; b = b[4:] {
		id := binary.BigEndian.Uint32(b)
		bit := uint64(1) << (id - 1)
		if id == 0 || int(id) > len(c.contexts) || o.chosen&bit != 0 {
			o.errno = ErrnoInvalid
			c.finish(o)
			return
		}
		o.chosen |= bit
	}
	r := datapath.Request{Op: datapath.OpExtents, Offset: o.offset, Length: o.length}
	if o.errno = c.validateRange(&r); o.errno == ErrnoOK && o.length == 0 {
		o.errno = ErrnoInvalid
	}
	if o.errno != ErrnoOK {
		c.finish(o)
		return
	}
	c.startStatus(o)
}

// startStatus answers o for each chosen context, or queues it behind another.
func (c *conn) startStatus(o *op) {
	if o.chosen == 0 {
		o.chosen = 1<<len(c.contexts) - 1
	}
	c.statusOps = append(c.statusOps, o)
	if c.status.op == nil { // else the one under way leads to the next
		c.nextStatus()
	}
}

func (c *conn) nextStatus() {
	s := &c.status
	if s.sending || c.dead {
		return
	}
	if s.op == nil {
		if len(c.statusOps) == 0 {
			return
		}
		s.op = c.statusOps[0]
		c.statusOps = c.statusOps[:copy(c.statusOps, c.statusOps[1:])]
	}
	o := s.op
	for o.chosen&(1<<o.context) == 0 {
		o.context++
	}
	name := c.contexts[o.context]
	if name == ContextAllocation && !c.info.Has(datapath.FeatureExtents) {
		s.extents = append(s.extents[:0], datapath.Extent{Length: o.length})
		c.sendStatus(o)
		return
	}
	p := c.takePiece(o)
	if p == nil {
		s.starved = true
		return
	}
	r := &p.request
	r.Op, r.Buf, r.Flags = datapath.OpExtents, nil, deviceFlags(o.flags)
	r.Offset, r.Length, r.Context, r.Extents = o.offset, o.length, name, s.extents[:0]
	o.pending++
	c.submit(p)
}

// statusDone takes the device's answer for one context.
func (c *conn) statusDone(o *op, p *piece, errno Error) {
	c.status.extents = p.request.Extents
	p.request.Extents = nil
	c.timeReply(p)
	c.freePiece(p)
	if errno == ErrnoOK && len(c.status.extents) == 0 {
		errno = ErrnoIO
	}
	if errno != ErrnoOK {
		c.status.op = nil
		o.errno = errno
		c.finish(o)
		c.nextStatus()
		return
	}
	c.sendStatus(o)
}

// sendStatus queues the chunk of one context: id 4, then length 4 and state 4
// each; with extended headers id 4, count 4, then length 8 and state 8 each.
func (c *conn) sendStatus(o *op) {
	s := &c.status
	count := c.trimExtents(o)
	id := uint32(o.context) + 1
	o.context++
	flags := uint16(0)
	if o.chosen>>o.context == 0 {
		flags = chunkFlagDone
	}
	b := s.out[:0]
	b = binary.BigEndian.AppendUint32(b, id)
	kind := chunkBlockStatus
	if c.extended {
		kind = chunkBlockStatusExt
		b = binary.BigEndian.AppendUint32(b, uint32(count))
	}
	for _, e := range s.extents[:count] {
		if c.extended {
			b = binary.BigEndian.AppendUint64(b, e.Length)
			b = binary.BigEndian.AppendUint64(b, e.State)
		} else {
			b = binary.BigEndian.AppendUint32(b, uint32(e.Length))
			b = binary.BigEndian.AppendUint32(b, uint32(e.State))
		}
	}
	c.replyHeader(c.headerSpace(c.chunkSize()), o, flags, kind, uint64(len(b)))
	s.sending = true
	c.push(segment{data: b, status: true})
	if flags == chunkFlagDone {
		s.op = nil
		c.freeOp(o)
	}
}

// trimExtents joins neighbours of one state, cuts the list at the end of the
// request, and says how many extents are left. All arithmetic is in 64 bits, and
// a compact request is shorter than 4 GiB, so no length is cut short.
func (c *conn) trimExtents(o *op) int {
	list := c.status.extents
	count, covered := 0, uint64(0)
	for _, e := range list {
		e.Length = min(e.Length, o.length-covered)
		if e.Length == 0 {
			break
		}
		covered += e.Length
		if !c.extended {
			e.State = min(e.State, math.MaxUint32)
		}
		if count > 0 && list[count-1].State == e.State {
			list[count-1].Length += e.Length
			continue
		}
		list[count] = e
		count++
	}
	if o.flags&CommandFlagReqOne != 0 {
		count = min(count, 1)
	}
	return count
}

// statusSent frees the buffer and goes on with the next context or request.
func (c *conn) statusSent() {
	c.status.sending = false
	c.nextStatus()
}
