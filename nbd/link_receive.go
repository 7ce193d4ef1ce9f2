package nbd

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// linkReceiver is the receiving half of a [Link], owned by its reactor: a decoder
// that goes on wherever the bytes ended.
type linkReceiver struct {
	rx             []byte // rx[rxStart:rxEnd] is not decoded yet
	rxStart, rxEnd int
	received       uint64
	readable       bool // the socket may have more
	hangup         bool // the stream has an end, of which no other event will tell
	readLater      reactor.Deferred

	state linkState
	slot  *linkSlot   // whose reply is being decoded
	chunk clientChunk // of it
	last  bool        // the reply ends with what is being decoded
	at    uint64      // linkData: place in Buf. linkExtents: bytes covered so far
	left  uint64      // linkData, linkSkip: bytes; linkExtents: descriptors
	keep  bool        // linkExtents: they are of the context asked for
}

type linkState uint8

const (
	linkHeader  linkState = iota // of a simple reply or a chunk
	linkHead                     // the part of a chunk with a fixed size
	linkData                     // bytes of a read
	linkExtents                  // descriptors of a block status
	linkSkip                     // the tail of a chunk nobody needs
)

// ready is the reactor's report about the socket.
func (l *Link) ready(events uint32) {
	if l.dead {
		return
	}
	if events&unix.EPOLLOUT != 0 {
		l.blocked = false
		l.reactor.Defer(&l.flushLater)
	}
	if events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLRDHUP) != 0 {
		l.readable = true
		l.hangup = l.hangup || events&(unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLRDHUP) != 0
		l.receive()
	}
}

// receive reads and decodes until the socket is empty or others are due.
func (l *Link) receive() {
	for range receiveRounds {
		if l.dead || !l.readable {
			return
		}
		if err := l.read(); err != nil {
			l.die(err)
			return
		}
		if err := l.decode(); err != nil {
			l.die(err)
			return
		}
	}
	l.reactor.Defer(&l.readLater)
}

// read takes bytes from the socket: first to the read that is under way, then to
// the receive buffer, in one call.
func (l *Link) read() error {
	if l.rxStart > 0 {
		l.rxEnd = copy(l.rx, l.rx[l.rxStart:l.rxEnd])
		l.rxStart = 0
	}
	var head []byte
	if l.state == linkData && l.rxEnd == 0 {
		head = l.slot.request.Buf[l.at:][:l.left]
	}
	space := l.rx[l.rxEnd:]
	n, errno := l.receiveInto(head, space)
	switch {
	case errno == unix.EAGAIN:
		l.readable = false
		return nil
	case errno == unix.EINTR:
		return nil
	case errno != 0:
		return fmt.Errorf("nbd: receive: %w", errno)
	case n == 0:
		if l.state == linkHeader && l.rxStart == l.rxEnd {
			return ErrServerLeft
		}
		return fmt.Errorf("nbd: receive: %w", io.ErrUnexpectedEOF)
	}
	l.received += uint64(n)
	if n < len(head)+len(space) && !l.hangup {
		l.readable = false // emptied; the next byte is reported
	}
	m := min(n, len(head))
	l.at += uint64(m)
	l.left -= uint64(m)
	l.rxEnd += n - m
	return nil
}

// decode consumes what was read. It ends with nil when it needs more.
func (l *Link) decode() error {
	for !l.dead {
		in := l.rx[l.rxStart:l.rxEnd]
		switch l.state {
		case linkHeader:
			n, err := l.decodeHeader(in)
			if n == 0 || err != nil {
				return err
			}
			l.rxStart += n
		case linkHead:
			n := l.headSize()
			if len(in) < n {
				return nil
			}
			l.rxStart += n // n is within in, whatever decodeHead finds
			if err := l.decodeHead(in[:n]); err != nil {
				return err
			}
		case linkData:
			n := min(uint64(len(in)), l.left)
			copy(l.slot.request.Buf[l.at:], in[:n])
			l.consume(n)
			if l.left > 0 {
				return nil
			}
			if err := l.endChunk(); err != nil {
				return err
			}
		case linkSkip:
			l.consume(min(uint64(len(in)), l.left))
			if l.left > 0 {
				return nil
			}
			if err := l.endChunk(); err != nil {
				return err
			}
		case linkExtents:
			if err := l.decodeExtents(in); err != nil || l.state == linkExtents {
				return err
			}
		}
	}
	return nil
}

func (l *Link) consume(n uint64) {
	l.rxStart += int(n)
	l.at += n
	l.left -= n
}

// decodeHeader takes the header of a simple reply or of a chunk, laid out as at
// Client.readReply. It returns 0 when there are too few bytes.
func (l *Link) decodeHeader(in []byte) (n int, err error) {
	if len(in) < sizeSimpleReply {
		return 0, nil
	}
	magic, cookie := binary.BigEndian.Uint32(in), binary.BigEndian.Uint64(in[8:])
	switch {
	case magic == magicSimpleReply && l.headers != HeadersExtended:
		if err := l.find(cookie); err != nil {
			return 0, err
		}
		return sizeSimpleReply, l.decodeSimple(Error(binary.BigEndian.Uint32(in[4:])))
	case magic == magicStructuredReply && l.headers == HeadersStructured:
		n = sizeStructuredReply
	case magic == magicExtendedReply && l.headers == HeadersExtended:
		n = sizeExtendedReply
	default:
		return 0, violationf("a reply begins with %#x, with %s headers", magic, l.headers)
	}
	if len(in) < n {
		return 0, nil
	}
	if err := l.find(cookie); err != nil {
		return 0, err
	}
	c := clientChunk{flags: binary.BigEndian.Uint16(in[4:]), kind: binary.BigEndian.Uint16(in[6:])}
	if c.done = c.flags&chunkFlagDone != 0; n == sizeStructuredReply {
		c.length = uint64(binary.BigEndian.Uint32(in[16:]))
	} else {
		c.length = binary.BigEndian.Uint64(in[24:])
		if offset := binary.BigEndian.Uint64(in[16:]); offset != l.slot.offset {
			return 0, violationf("a reply for offset %d to a request at %d", offset, l.slot.offset)
		}
	}
	l.chunk, l.last = c, c.done
	return n, l.beginChunk()
}

// find has the slot that a reply belongs to.
func (l *Link) find(cookie uint64) error {
	index := cookie & (1<<32 - 1)
	if index >= uint64(len(l.slots)) {
		return violationf("a reply with the unknown cookie %#x", cookie)
	}
	if l.slot = &l.slots[index]; !l.slot.inUse || l.slot.replied || l.slot.cookie != cookie {
		return violationf("a reply with the unknown cookie %#x", cookie)
	}
	return nil
}

// decodeSimple takes a simple reply; the data of a read follows it.
func (l *Link) decodeSimple(errno Error) error {
	s := l.slot
	switch {
	case s.command == CommandRead && l.headers != HeadersSimple:
		return violationf("a simple reply to a read, with structured headers")
	case s.content != 0 || s.seen != 0:
		return violationf("a simple reply behind chunks")
	case errno != ErrnoOK:
		s.errno = errno
	case s.command == CommandRead:
		_ = s.covered.add(0, s.length) // the first, so it overlaps nothing
		l.last = true
		l.state, l.at, l.left = linkData, 0, s.length
		return nil
	case s.command == CommandBlockStatus:
		return violationf("a simple reply to a successful block status")
	}
	l.state = linkHeader
	l.finish(s)
	return nil
}

// beginChunk checks a chunk's header against its request before anything of it is
// taken.
func (l *Link) beginChunk() error {
	s, c := l.slot, l.chunk
	l.state = linkHead
	switch {
	case c.kind&chunkErrorBit != 0:
		if fixed := errorFixed(c.kind); c.length < fixed || c.length > clientErrorChunkMax || knownError(c.kind) && c.length > fixed+stringMax {
			return violationf("an error chunk of %d bytes", c.length)
		}
	case c.kind == chunkNone:
		if c.length != 0 || !c.done {
			return violationf("an empty chunk with %d bytes, or not the last of its reply", c.length)
		}
		return l.endChunk()
	case c.kind == chunkOffsetData && s.command == CommandRead:
		if c.length < 9 || c.length-8 > s.length {
			return violationf("a data chunk of %d bytes in reply to a read of %d", c.length, s.length)
		}
	case c.kind == chunkOffsetHole && s.command == CommandRead:
		if c.length != 12 {
			return violationf("a hole chunk of %d bytes (want 12)", c.length)
		}
	case c.kind == chunkBlockStatus && s.command == CommandBlockStatus,
		c.kind == chunkBlockStatusExt && s.command == CommandBlockStatus && l.headers == HeadersExtended:
		fixed, each := extentSizes(c.kind)
		if c.length < fixed+each || (c.length-fixed)%each != 0 || (c.length-fixed)/each > extentsMax {
			return violationf("a block status chunk of %d bytes", c.length)
		}
	default:
		return violationf("a chunk of type %d in reply to command %d", c.kind, s.command)
	}
	return nil
}

func knownError(kind uint16) bool { return kind == chunkError || kind == chunkErrorOffset }

func errorFixed(kind uint16) uint64 {
	if kind == chunkErrorOffset {
		return 14
	}
	return 6
}

// extentSizes are the sizes of a block status chunk's head and of one descriptor.
func extentSizes(kind uint16) (fixed, each uint64) {
	if kind == chunkBlockStatusExt {
		return 8, 16
	}
	return 4, 8
}

// headSize is how many bytes of the chunk are decoded at once.
func (l *Link) headSize() int {
	switch kind := l.chunk.kind; {
	case knownError(kind):
		return int(l.chunk.length)
	case kind&chunkErrorBit != 0:
		return 6
	case kind == chunkOffsetHole:
		return 12
	case kind == chunkBlockStatus || kind == chunkBlockStatusExt:
		fixed, _ := extentSizes(kind)
		return int(fixed)
	}
	return 8
}

func (l *Link) decodeHead(b []byte) error {
	s := l.slot
	switch kind := l.chunk.kind; {
	case kind&chunkErrorBit != 0:
		return l.decodeError(b)
	case kind == chunkOffsetHole:
		length := uint64(binary.BigEndian.Uint32(b[8:]))
		if length == 0 {
			return violationf("an empty hole")
		}
		at, err := s.cover(binary.BigEndian.Uint64(b), length)
		if err != nil {
			return err
		}
		clear(s.request.Buf[at : at+length])
		s.holes += length
		return l.endChunk()
	case kind == chunkOffsetData:
		at, err := s.cover(binary.BigEndian.Uint64(b), l.chunk.length-8)
		if err != nil {
			return err
		}
		l.state, l.at, l.left = linkData, at, l.chunk.length-8
		return nil
	}
	fixed, each := extentSizes(l.chunk.kind)
	count := (l.chunk.length - fixed) / each
	if fixed == 8 {
		if n := uint64(binary.BigEndian.Uint32(b[4:])); n != 0 && n != count {
			return violationf("a block status chunk with %d descriptors that says %d", count, n)
		}
	}
	id := binary.BigEndian.Uint32(b)
	i := l.contextIndex(id)
	if i < 0 || s.seen&(1<<i) != 0 {
		return violationf("a block status for context %d, unknown or for the second time", id)
	}
	s.seen |= 1 << i
	if s.flags&CommandFlagReqOne != 0 && count != 1 {
		return violationf("%d extents in reply to a request for one", count)
	}
	l.state, l.at, l.left, l.keep = linkExtents, 0, count, i == s.request.Context
	return nil
}

func (l *Link) contextIndex(id uint32) int {
	for i := range l.contexts {
		if l.contexts[i].ID == id {
			return i
		}
	}
	return -1
}

// decodeError takes what is laid out at Client.readErrorChunk. The first error of
// a reply counts; its message is not kept.
func (l *Link) decodeError(b []byte) error {
	s, c := l.slot, l.chunk
	errno, message, fixed := Error(binary.BigEndian.Uint32(b)), uint64(binary.BigEndian.Uint16(b[4:])), errorFixed(c.kind)
	if message > stringMax || message > c.length-fixed || knownError(c.kind) && message != c.length-fixed {
		return violationf("an error chunk of %d bytes with a message of %d", c.length, message)
	}
	if errno == ErrnoOK {
		return violationf("an error chunk without an error")
	}
	if c.kind == chunkErrorOffset {
		if offset := binary.BigEndian.Uint64(b[6+message:]); offset < s.offset || offset-s.offset >= max(s.length, 1) {
			return violationf("an error at %d in reply to a request of %d bytes at %d", offset, s.length, s.offset)
		}
	}
	if s.errno == ErrnoOK {
		s.errno = errno
	}
	if l.left = c.length - uint64(len(b)); l.left > 0 {
		l.state = linkSkip
		return nil
	}
	return l.endChunk()
}

// decodeExtents takes as many descriptors as there are: length, then state, each
// u32 or u64.
func (l *Link) decodeExtents(in []byte) error {
	s := l.slot
	_, each := extentSizes(l.chunk.kind)
	// The last extent may run past the request, but what is past the export does
	// not exist.
	limit := s.length
	if s.offset < l.info.Size {
		limit = max(limit, l.info.Size-s.offset)
	}
	for ; l.left > 0; l.left-- {
		if uint64(len(in)) < each {
			return nil
		}
		if l.at >= s.length {
			return violationf("a block status goes on past the end of its request")
		}
		e := datapath.Extent{Length: uint64(binary.BigEndian.Uint32(in)), State: uint64(binary.BigEndian.Uint32(in[4:]))}
		if each == 16 {
			e = datapath.Extent{Length: binary.BigEndian.Uint64(in), State: binary.BigEndian.Uint64(in[8:])}
		}
		in = in[each:]
		l.rxStart += int(each)
		if e.Length == 0 || s.flags&CommandFlagReqOne != 0 && e.Length > s.length {
			return violationf("an extent of %d bytes in reply to a request for %d", e.Length, s.length)
		}
		e.Length = min(e.Length, limit-l.at)
		l.at += e.Length
		if q := s.request; l.keep && len(q.Extents) < cap(q.Extents) {
			q.Extents = append(q.Extents, e)
		}
	}
	return l.endChunk()
}

// endChunk goes on to the next reply, and ends the request with the last chunk.
func (l *Link) endChunk() error {
	l.state = linkHeader
	if !l.last {
		return nil
	}
	s := l.slot
	if s.errno == ErrnoOK {
		if err := s.checkComplete(); err != nil {
			return err
		}
	}
	l.finish(s)
	return nil
}
