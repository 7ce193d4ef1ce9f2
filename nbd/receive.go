package nbd

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
)

// request is a decoded request header.
type request struct {
	flags   CommandFlags
	command Command
	cookie  uint64
	offset  uint64
	length  uint64
}

// parseRequest decodes a compact (28 bytes) or extended (32 bytes) header. It
// reports false for a wrong magic, after which the stream cannot be followed.
//
//	offset size compact | extended
//	     0    4 magic
//	     4    2 command flags
//	     6    2 command
//	     8    8 cookie
//	    16    8 offset
//	    24    4 length  | 24 8 length
func parseRequest(b []byte, extended bool) (q request, ok bool) {
	magic := binary.BigEndian.Uint32(b)
	q.flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	q.command = Command(binary.BigEndian.Uint16(b[6:]))
	q.cookie = binary.BigEndian.Uint64(b[8:])
	q.offset = binary.BigEndian.Uint64(b[16:])
	if extended {
		q.length = binary.BigEndian.Uint64(b[24:])
		return q, magic == magicRequestExtended
	}
	q.length = uint64(binary.BigEndian.Uint32(b[24:]))
	return q, magic == magicRequest
}

// receive reads and parses until the socket is empty, resources run out, or
// others are due.
func (c *conn) receive() {
	c.stalled = false // whoever called has something new; parse says when it is not enough
	c.timeRound()
	c.begun, c.taken = 0, 0
	if !c.dead && c.lookForEnd() {
		return
	}
	for range receiveRounds {
		if c.dead || !c.parse() {
			return
		}
		if !c.readable {
			c.notBehind()
			if c.waiting() {
				c.expectProgress()
			}
			return
		}
		if !c.read() {
			return
		}
	}
	c.reactor.Defer(&c.readLater)
}

// read takes bytes from the socket: first to the payload that is under way, then
// to the receive buffer, in one call. It reports whether the connection lives.
func (c *conn) read() bool {
	if c.rxStart > 0 {
		c.rxEnd = copy(c.rx, c.rx[c.rxStart:c.rxEnd])
		c.rxStart = 0
	}
	var head []byte
	if c.state == receivePayload && c.filling != nil {
		head = c.filling.buffer[c.filled:]
	}
	space := c.rx[c.rxEnd:]
	n, errno := c.receiveInto(head, space)
	switch {
	case errno == unix.EAGAIN:
		c.readable = false
		return true
	case errno == unix.EINTR:
		return true
	case errno != 0:
		if errno != unix.ECONNRESET && errno != unix.EPIPE {
			c.fail(fmt.Errorf("receive: %w", errno))
			return false
		}
		c.kill()
		return false
	case n == 0:
		c.hungUp()
		return false
	}
	c.timeRead()
	c.progress += uint64(n)
	if n < len(head)+len(space) && !c.hangup {
		c.readable = false // emptied; the next byte is reported
	}
	m := min(n, len(head))
	c.filled += m
	c.rxEnd += n - m
	return true
}

// hungUp handles the client's end of stream. A client that said nothing
// incomplete gets its replies, as if it had sent DISC.
func (c *conn) hungUp() {
	c.readable = false
	if c.state != receiveHeader || c.rxStart != c.rxEnd {
		c.server.log.Debug("nbd client left in the middle of a request", "export", c.export.Name, "connection", c.id, "remote", c.remote)
		c.kill()
		return
	}
	c.leaving = true
	c.closeIfDone()
}

// parse consumes what has been read. It reports false when it cannot go on now:
// whoever frees what it needs calls receive again.
func (c *conn) parse() bool {
	if o := c.blocked; o != nil {
		if !c.proceed(o) {
			return c.stall()
		}
		c.blocked = nil
	}
	for {
		switch c.state {
		case receivePayload:
			done, ok := c.payload()
			if !ok {
				return c.stall()
			}
			if !done {
				return true
			}
		case receiveStatus:
			if c.rxEnd-c.rxStart < int(c.payloadOp.length) {
				return true
			}
			b := c.rx[c.rxStart : c.rxStart+int(c.payloadOp.length)]
			c.rxStart += len(b)
			c.state = receiveHeader
			c.statusPayload(c.payloadOp, b)
		case receiveDiscard:
			n := min(int64(c.rxEnd-c.rxStart), c.discard)
			c.rxStart += int(n)
			if c.discard -= n; c.discard > 0 {
				return true
			}
			c.state = receiveHeader
			c.finish(c.payloadOp)
		case receiveHeader:
			size := sizeRequest
			if c.extended {
				size = sizeRequestExtended
			}
			if c.leaving || c.rxEnd-c.rxStart < size {
				return !c.leaving
			}
			if len(c.freeOps) == 0 || !c.headersFit() {
				return c.stall()
			}
			if c.begun == requestBatch || c.taken >= writeBatch {
				c.reactor.Defer(&c.readLater)
				return false
			}
			q, ok := parseRequest(c.rx[c.rxStart:], c.extended)
			if !ok {
				c.fail(fmt.Errorf("%w: request magic", errProtocol))
				return false
			}
			c.rxStart += size
			c.begun++
			if !c.begin(&q) {
				return false
			}
		}
		if c.dead {
			return false
		}
	}
}

// headersFit reports whether the scratch ring has room for the headers of all that
// is begun and of one more operation or piece.
func (c *conn) headersFit() bool {
	return c.scratchUsed+(2*len(c.ops)-len(c.freeOps)-len(c.freePieces)+1)*headerRoom <= scratchSize
}

// stall stops receiving until something is freed.
func (c *conn) stall() bool {
	if !c.dead {
		c.stalled = true
		c.timeStall()
	}
	return false
}

// commandFlags are the flags each command may carry, before what the export
// advertises is looked at (proto.md, "Command flags").
var commandFlags = [...]CommandFlags{
	CommandRead:        CommandFlagFUA | CommandFlagDF,
	CommandWrite:       CommandFlagFUA | CommandFlagPayloadLen,
	CommandFlush:       CommandFlagFUA,
	CommandTrim:        CommandFlagFUA,
	CommandCache:       CommandFlagFUA,
	CommandWriteZeroes: CommandFlagFUA | CommandFlagNoHole | CommandFlagFastZero,
	CommandBlockStatus: CommandFlagFUA | CommandFlagReqOne | CommandFlagPayloadLen,
}

var commandOps = [...]datapath.Op{
	CommandRead:        datapath.OpRead,
	CommandWrite:       datapath.OpWrite,
	CommandFlush:       datapath.OpFlush,
	CommandTrim:        datapath.OpDiscard,
	CommandCache:       datapath.OpCache,
	CommandWriteZeroes: datapath.OpWriteZeroes,
	CommandBlockStatus: datapath.OpExtents,
}

// begin starts one request. It reports whether parsing goes on.
func (c *conn) begin(q *request) bool {
	if q.command == CommandDisconnect {
		c.leaving = true
		c.closeIfDone()
		return false
	}
	n := len(c.freeOps) - 1
	o := c.freeOps[n]
	c.freeOps = c.freeOps[:n]
	c.counters.inFlight.Store(int64(len(c.ops) - n))
	*o = op{conn: c, cookie: q.cookie, offset: q.offset, length: q.length, command: q.command, flags: q.flags}
	c.timeBegin(o)

	if c.ended && o.changes() {
		c.dropOld()
		return false
	}
	payload := q.command == CommandWrite
	if c.extended && q.flags&CommandFlagPayloadLen != 0 {
		payload = true
	}
	if payload && q.length > payloadMax {
		c.fail(fmt.Errorf("%w: payload of %d bytes", errProtocol, q.length))
		return false
	}
	o.errno = c.validate(o)
	if o.errno == ErrnoOK && int(q.command) < len(commandOps) {
		count := &c.counters.requests[commandOps[q.command]]
		count.Store(count.Load() + 1)
	}
	switch {
	case o.errno != ErrnoOK && payload:
		return c.discardPayload(o)
	case o.errno != ErrnoOK:
		c.finish(o)
		return true
	}
	switch q.command {
	case CommandRead:
		if q.length == 0 {
			c.finish(o)
			return true
		}
		return c.proceedOrStall(o)
	case CommandWrite:
		if q.length == 0 {
			c.finish(o)
			return true
		}
		c.state, c.payloadOp, c.filling, c.filled = receivePayload, o, nil, 0
	case CommandBlockStatus:
		if payload {
			c.state, c.payloadOp = receiveStatus, o
			return true
		}
		c.startStatus(o)
	default:
		if (o.length == 0 && o.command != CommandFlush) || (o.command == CommandCache && !c.info.Has(datapath.FeatureCache)) {
			c.finish(o)
			return true
		}
		return c.proceedOrStall(o)
	}
	return true
}

func (c *conn) proceedOrStall(o *op) bool {
	if c.proceed(o) {
		return true
	}
	c.blocked = o
	return c.stall()
}

// proceed gives the device what it has not been given of o. It reports false
// when there is no room for the next piece.
func (c *conn) proceed(o *op) bool {
	if o.command == CommandRead {
		return c.readPieces(o)
	}
	p := c.takePiece(o)
	if p == nil {
		return false
	}
	r := &p.request
	r.Op, r.Buf, r.Flags = commandOps[o.command], nil, deviceFlags(o.flags)
	r.Offset, r.Length = o.offset, o.length
	o.next = o.length
	o.pending++
	c.submit(p)
	return true
}

// discardPayload reads the payload of a refused request away, then answers.
func (c *conn) discardPayload(o *op) bool {
	c.state, c.payloadOp, c.discard = receiveDiscard, o, int64(o.length)
	return true
}

// validate says how a request has to be answered before the device sees it.
func (c *conn) validate(o *op) Error {
	if c.refusing {
		return ErrnoShutdown
	}
	if int(o.command) >= len(commandFlags) || o.command == CommandDisconnect {
		return ErrnoInvalid
	}
	r := datapath.Request{Op: commandOps[o.command], Offset: o.offset, Length: o.length}
	if r.Modifies() && c.info.ReadOnly {
		return ErrnoPerm
	}
	allowed := commandFlags[o.command]
	if !c.info.Has(datapath.FeatureFUA) {
		allowed &^= CommandFlagFUA
	}
	if !c.info.Has(datapath.FeatureFastZero) {
		allowed &^= CommandFlagFastZero
	}
	if !c.structured {
		allowed &^= CommandFlagDF
	}
	if !c.extended || (o.command == CommandBlockStatus && len(c.contexts) == 0) {
		allowed &^= CommandFlagPayloadLen
	}
	if o.flags&^allowed != 0 {
		return ErrnoInvalid
	}
	switch o.command {
	case CommandFlush:
		if o.offset != 0 || o.length != 0 || !c.info.Has(datapath.FeatureFlush) {
			return ErrnoInvalid
		}
		return ErrnoOK
	case CommandTrim:
		if !c.info.Has(datapath.FeatureDiscard) {
			return ErrnoInvalid
		}
	case CommandWriteZeroes:
		if !c.info.Has(datapath.FeatureWriteZeroes) {
			return ErrnoInvalid
		}
	case CommandBlockStatus:
		if len(c.contexts) == 0 {
			return ErrnoInvalid
		}
		if o.flags&CommandFlagPayloadLen != 0 {
			// The length is that of the payload: an effect length and the ids.
			if o.length < 12 || (o.length-8)%4 != 0 || o.length > 8+4*contextsMax {
				return ErrnoInvalid
			}
			return ErrnoOK
		}
		if o.length == 0 {
			return ErrnoInvalid
		}
	case CommandRead:
		if o.length > payloadMax {
			return ErrnoInvalid
		}
		if o.flags&CommandFlagDF != 0 && o.length > pieceMax {
			return ErrnoOverflow
		}
	}
	return c.validateRange(&r)
}

// validateRange checks a range against the device, and once more against its
// present size if it has grown since.
func (c *conn) validateRange(r *datapath.Request) Error {
	status := datapath.Validate(&c.info, r)
	if status != datapath.StatusOK {
		if now := c.export.info(); now.Size != c.info.Size {
			c.info = now
			status = datapath.Validate(&c.info, r)
		}
	}
	return errnoOf(status)
}

// readPieces starts the pieces of a read that are not started yet. It reports
// false when there is no room for the next one.
func (c *conn) readPieces(o *op) bool {
	for o.next < o.length {
		left := o.length - o.next
		whole := !c.structured || o.flags&CommandFlagDF != 0
		if !whole {
			left = datapath.PieceLength(o.offset+o.next, left, pieceMax)
		}
		if !c.headersFit() { // pieces that turn out to be holes leave nothing else to wait for
			return false
		}
		p := c.takePiece(o)
		if p == nil {
			return false
		}
		if !c.takeBuffer(p, int(left), whole) {
			c.freePieces = append(c.freePieces, p)
			return false
		}
		r := &p.request
		r.Op, r.Buf, r.Flags = datapath.OpRead, p.buffer, datapath.FlagLend
		r.Offset, r.Length = o.offset+o.next, uint64(len(p.buffer))
		o.next += r.Length
		o.pending++
		c.submit(p)
	}
	return true
}

// payload moves received bytes into the pieces of a write. done says that the
// payload is complete; !ok that there is no room for the next piece.
func (c *conn) payload() (done, ok bool) {
	o := c.payloadOp
	for {
		if c.filling == nil {
			left := datapath.PieceLength(o.offset+o.next, o.length-o.next, pieceMax)
			p := c.takePiece(o)
			if p == nil {
				return false, false
			}
			if c.immediate && uint64(c.rxEnd-c.rxStart) >= left {
				// All here, and taken before Submit returns: from where it lies.
				b := c.rx[c.rxStart : c.rxStart+int(left)]
				c.rxStart += int(left)
				if c.submitWrite(o, p, b) {
					return true, true
				}
				continue
			}
			if !c.takeBuffer(p, int(left), false) {
				c.freePieces = append(c.freePieces, p)
				return false, false
			}
			c.filling, c.filled = p, 0
		}
		p := c.filling
		n := copy(p.buffer[c.filled:], c.rx[c.rxStart:c.rxEnd])
		c.rxStart += n
		c.filled += n
		if c.filled < len(p.buffer) {
			return false, true
		}
		c.filling = nil
		if c.submitWrite(o, p, p.buffer) {
			return true, true
		}
	}
}

// submitWrite gives the device the next piece of a write and reports whether it
// was the last.
func (c *conn) submitWrite(o *op, p *piece, data []byte) (last bool) {
	r := &p.request
	r.Op, r.Buf, r.Flags = datapath.OpWrite, data, deviceFlags(o.flags)
	r.Offset, r.Length = o.offset+o.next, uint64(len(data))
	o.next += r.Length
	o.pending++
	last = o.next == o.length
	if last {
		c.state = receiveHeader
	}
	c.taken += len(data)
	c.submit(p)
	return last
}

func deviceFlags(f CommandFlags) (flags datapath.Flags) {
	if f&CommandFlagFUA != 0 {
		flags |= datapath.FlagFUA
	}
	if f&CommandFlagNoHole != 0 {
		flags |= datapath.FlagNoUnmap
	}
	if f&CommandFlagFastZero != 0 {
		flags |= datapath.FlagFastZero
	}
	if f&CommandFlagReqOne != 0 {
		flags |= datapath.FlagOneExtent
	}
	return flags
}
