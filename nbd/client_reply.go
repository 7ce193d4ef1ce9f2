package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ashlar-storage/ashlar/datapath"
)

// clientErrorChunkMax bounds error chunks of kinds we do not know: a known one
// is at most 6 + 4096 + 8 bytes.
const clientErrorChunkMax = 64 << 10

// clientChunk is the header of one chunk of a reply.
type clientChunk struct {
	flags, kind uint16
	length      uint64 // bytes of payload
	done        bool
}

// read is the reader goroutine: it takes replies until the connection fails, is
// closed, or the server breaks the protocol.
func (c *Client) read() {
	defer close(c.readerDone)
	c.fail(c.readReplies())
}

// readReplies returns why it stopped, which is never nil.
func (c *Client) readReplies() error {
	for {
		err := c.readReply()
		if err == nil {
			continue
		}
		if broken := new(ViolationError); errors.As(err, &broken) {
			return err
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // we did not ask the server to leave
		}
		return fmt.Errorf("nbd: read: %w", err)
	}
}

// readReply takes one simple reply or one chunk.
//
//	simple   structured   extended
//	 0  4      0  4         0  4     magic
//	           4  2         4  2     flags
//	           6  2         6  2     type
//	 4  4                            error
//	 8  8      8  8         8  8     cookie
//	                       16  8     offset of the request
//	          16  4        24  8     length of the payload
func (c *Client) readReply() error {
	header := c.scratch[:sizeSimpleReply]
	if _, err := io.ReadFull(c.in, header); err != nil {
		return err
	}
	magic := binary.BigEndian.Uint32(header)
	cookie := binary.BigEndian.Uint64(header[8:])
	switch {
	case magic == magicSimpleReply && c.headers != HeadersExtended:
		return c.readSimple(Error(binary.BigEndian.Uint32(header[4:])), cookie)
	case magic == magicStructuredReply && c.headers == HeadersStructured, magic == magicExtendedReply && c.headers == HeadersExtended:
	default:
		return violationf("a reply begins with %#x, with %s headers", magic, c.headers)
	}
	chunk := clientChunk{flags: binary.BigEndian.Uint16(header[4:]), kind: binary.BigEndian.Uint16(header[6:])}
	chunk.done = chunk.flags&chunkFlagDone != 0
	s, err := c.touch(cookie)
	if err != nil {
		return err
	}
	if c.headers == HeadersExtended {
		rest := c.scratch[:sizeExtendedReply-sizeSimpleReply]
		if _, err := io.ReadFull(c.in, rest); err != nil {
			return err
		}
		chunk.length = binary.BigEndian.Uint64(rest[8:])
		if offset := binary.BigEndian.Uint64(rest); offset != s.offset {
			return violationf("a reply for offset %d to a request at %d", offset, s.offset)
		}
	} else {
		rest := c.scratch[:sizeStructuredReply-sizeSimpleReply]
		if _, err := io.ReadFull(c.in, rest); err != nil {
			return err
		}
		chunk.length = uint64(binary.BigEndian.Uint32(rest))
	}
	if err := c.readChunk(s, chunk); err != nil {
		return err
	}
	if !chunk.done {
		c.untouch(s)
		return nil
	}
	if s.err == nil {
		if err := s.checkComplete(); err != nil {
			return err
		}
	}
	c.end(s)
	return nil
}

// touch finds the request a reply belongs to, and keeps it from being abandoned
// while its data is read.
func (c *Client) touch(cookie uint64) (*clientSlot, error) {
	index := cookie & (1<<32 - 1)
	if index >= uint64(len(c.slots)) {
		return nil, violationf("a reply with the unknown cookie %#x", cookie)
	}
	s := &c.slots[index]
	c.mu.Lock()
	known := s.inUse && !s.ended && s.cookie == cookie
	s.touched = s.touched || known
	c.mu.Unlock()
	if !known {
		return nil, violationf("a reply with the unknown cookie %#x", cookie)
	}
	return s, nil
}

func (c *Client) untouch(s *clientSlot) {
	c.mu.Lock()
	s.touched = false
	c.mu.Unlock()
}

// end completes a request whose reply has arrived.
func (c *Client) end(s *clientSlot) {
	c.mu.Lock()
	s.touched = false
	if s.held { // the server did not wait for all of the data
		s.ended = true
		c.mu.Unlock()
		return
	}
	result := s.err
	r := c.freeSlotLocked(s)
	c.mu.Unlock()
	if r != nil {
		finishRequest(r, result)
	}
}

// readSimple takes what follows a simple reply: the data of a successful read.
func (c *Client) readSimple(errno Error, cookie uint64) error {
	s, err := c.touch(cookie)
	if err != nil {
		return err
	}
	switch {
	case s.command == CommandRead && c.headers != HeadersSimple:
		return violationf("a simple reply to a read, with structured headers")
	case errno != ErrnoOK:
		s.err = &CommandError{Command: s.command, Errno: errno}
	case s.command == CommandRead:
		if err := c.readData(s, 0, s.length); err != nil {
			return err
		}
	case s.command == CommandBlockStatus:
		return violationf("a simple reply to a successful block status")
	}
	if s.content != 0 || s.seen != 0 {
		return violationf("a simple reply behind chunks")
	}
	c.end(s)
	return nil
}

// readData fills the buffer of a read, from the byte at on.
func (c *Client) readData(s *clientSlot, at, length uint64) error {
	if s.r == nil {
		return c.skip(length)
	}
	_, err := io.ReadFull(c.in, s.r.Buf[at:at+length])
	return err
}

// skip reads data of an abandoned request away.
func (c *Client) skip(length uint64) error {
	for length > 0 {
		n := min(length, 1<<30)
		if _, err := c.in.Discard(int(n)); err != nil {
			return err
		}
		length -= n
	}
	return nil
}

// readChunk takes the payload of a chunk. Every length is checked against the
// request before anything is read.
func (c *Client) readChunk(s *clientSlot, chunk clientChunk) error {
	switch {
	case chunk.kind&chunkErrorBit != 0:
		return c.readErrorChunk(s, chunk)
	case chunk.kind == chunkNone:
		if chunk.length != 0 || !chunk.done {
			return violationf("an empty chunk with %d bytes, or not the last of its reply", chunk.length)
		}
		return nil
	case chunk.kind == chunkOffsetData && s.command == CommandRead:
		return c.readDataChunk(s, chunk)
	case chunk.kind == chunkOffsetHole && s.command == CommandRead:
		return c.readHoleChunk(s, chunk)
	case chunk.kind == chunkBlockStatus && s.command == CommandBlockStatus,
		chunk.kind == chunkBlockStatusExt && s.command == CommandBlockStatus && c.headers == HeadersExtended:
		return c.readStatusChunk(s, chunk)
	}
	return violationf("a chunk of type %d in reply to command %d", chunk.kind, s.command)
}

// readDataChunk takes offset u64 and data.
func (c *Client) readDataChunk(s *clientSlot, chunk clientChunk) error {
	if chunk.length < 9 || chunk.length-8 > s.length {
		return violationf("a data chunk of %d bytes in reply to a read of %d", chunk.length, s.length)
	}
	head := c.scratch[:8]
	if _, err := io.ReadFull(c.in, head); err != nil {
		return err
	}
	length := chunk.length - 8
	at, err := s.cover(binary.BigEndian.Uint64(head), length)
	if err != nil {
		return err
	}
	return c.readData(s, at, length)
}

// readHoleChunk takes offset u64 and length u32 of a range that reads as zeros.
func (c *Client) readHoleChunk(s *clientSlot, chunk clientChunk) error {
	if chunk.length != 12 {
		return violationf("a hole chunk of %d bytes (want 12)", chunk.length)
	}
	head := c.scratch[:12]
	if _, err := io.ReadFull(c.in, head); err != nil {
		return err
	}
	length := uint64(binary.BigEndian.Uint32(head[8:]))
	if length == 0 {
		return violationf("an empty hole")
	}
	at, err := s.cover(binary.BigEndian.Uint64(head), length)
	if err != nil {
		return err
	}
	if s.r != nil {
		clear(s.r.Buf[at : at+length])
	}
	return nil
}

// cover notes that length bytes of a read arrive for offset, and gives their
// place in its buffer.
func (s *clientSlot) cover(offset, length uint64) (at uint64, err error) {
	if offset < s.offset || offset-s.offset > s.length || length > s.length-(offset-s.offset) {
		return 0, violationf("data for %d bytes at %d in reply to a read of %d at %d", length, offset, s.length, s.offset)
	}
	s.content++
	if s.content > 1 && s.flags&CommandFlagDF != 0 {
		return 0, violationf("more than one chunk in reply to a read with DF")
	}
	at = offset - s.offset
	if !s.covered.add(at, at+length) {
		return 0, violationf("data for %d bytes at %d arrived twice or in too small pieces", length, offset)
	}
	return at, nil
}

// checkComplete verifies a reply without an error when it ends.
func (s *clientSlot) checkComplete() error {
	if s.command == CommandRead && !s.covered.complete(0, s.length) {
		return violationf("the reply to a read of %d bytes at %d ends before its data does", s.length, s.offset)
	}
	if s.seen != s.wanted {
		return violationf("the reply to a block status lacks a context")
	}
	return nil
}

// readErrorChunk takes error u32, message length u16, message, and the offset
// u64 where it has one. The first error of a reply counts.
func (c *Client) readErrorChunk(s *clientSlot, chunk clientChunk) error {
	fixed := uint64(6)
	if chunk.kind == chunkErrorOffset {
		fixed = 14
	}
	if chunk.length < fixed || chunk.length > clientErrorChunkMax {
		return violationf("an error chunk of %d bytes", chunk.length)
	}
	payload, err := c.in.Peek(int(chunk.length)) // the buffer is larger
	if err != nil {
		return err
	}
	errno := Error(binary.BigEndian.Uint32(payload))
	message := uint64(binary.BigEndian.Uint16(payload[4:]))
	known := chunk.kind == chunkError || chunk.kind == chunkErrorOffset
	if message > stringMax || message > chunk.length-fixed || known && message != chunk.length-fixed {
		return violationf("an error chunk of %d bytes with a message of %d", chunk.length, message)
	}
	if errno == ErrnoOK {
		return violationf("an error chunk without an error")
	}
	e := &CommandError{Command: s.command, Errno: errno, Message: string(payload[6 : 6+message])}
	if chunk.kind == chunkErrorOffset {
		e.Located, e.Offset = true, binary.BigEndian.Uint64(payload[6+message:])
		if e.Offset < s.offset || e.Offset-s.offset >= max(s.length, 1) {
			return violationf("an error at %d in reply to a request of %d bytes at %d", e.Offset, s.length, s.offset)
		}
	}
	if s.err == nil {
		s.err = e
	}
	_, err = c.in.Discard(int(chunk.length))
	return err
}

// readStatusChunk takes the extents of one context: id u32, then descriptors of
// length u32 and state u32; or id u32, count u32 (0 for "see the length"), then
// descriptors of length u64 and state u64.
func (c *Client) readStatusChunk(s *clientSlot, chunk clientChunk) error {
	fixed, each := uint64(4), uint64(8)
	if chunk.kind == chunkBlockStatusExt {
		fixed, each = 8, 16
	}
	if chunk.length < fixed+each || (chunk.length-fixed)%each != 0 || (chunk.length-fixed)/each > extentsMax {
		return violationf("a block status chunk of %d bytes", chunk.length)
	}
	count := (chunk.length - fixed) / each
	head := c.scratch[:fixed]
	if _, err := io.ReadFull(c.in, head); err != nil {
		return err
	}
	if fixed == 8 {
		if n := uint64(binary.BigEndian.Uint32(head[4:])); n != 0 && n != count {
			return violationf("a block status chunk with %d descriptors that says %d", count, n)
		}
	}
	id := binary.BigEndian.Uint32(head)
	i := c.contextIndex(id)
	if i < 0 || s.wanted&(1<<i) == 0 {
		return violationf("a block status for context %d, which was not asked for", id)
	}
	if s.seen&(1<<i) != 0 {
		return violationf("a second block status for context %d", id)
	}
	s.seen |= 1 << i
	if s.flags&CommandFlagReqOne != 0 && count != 1 {
		return violationf("%d extents in reply to a request for one", count)
	}
	return c.readExtents(s, id, count, each)
}

func (c *Client) readExtents(s *clientSlot, id uint32, count, each uint64) error {
	var status *ContextStatus // nil when abandoned
	if s.r != nil {
		status = s.r.nextStatus()
		status.ID = id
	}
	// The last extent may run past the request, but what is past the export does
	// not exist.
	limit := s.length
	if s.offset < c.info.Size {
		limit = max(limit, c.info.Size-s.offset)
	}
	for at := uint64(0); count > 0; count-- {
		if at >= s.length {
			return violationf("a block status goes on past the end of its request")
		}
		b := c.scratch[:each]
		if _, err := io.ReadFull(c.in, b); err != nil {
			return err
		}
		var extent datapath.Extent
		if each == 16 {
			extent = datapath.Extent{Length: binary.BigEndian.Uint64(b), State: binary.BigEndian.Uint64(b[8:])}
		} else {
			extent = datapath.Extent{Length: uint64(binary.BigEndian.Uint32(b)), State: uint64(binary.BigEndian.Uint32(b[4:]))}
		}
		if extent.Length == 0 {
			return violationf("an extent of length 0")
		}
		if s.flags&CommandFlagReqOne != 0 && extent.Length > s.length {
			return violationf("one extent of %d bytes in reply to a request for %d", extent.Length, s.length)
		}
		extent.Length = min(extent.Length, limit-at)
		at += extent.Length
		if status != nil {
			status.Extents = append(status.Extents, extent)
		}
	}
	return nil
}

// nextStatus lengthens Statuses by one and keeps the memory it finds there.
func (r *Request) nextStatus() *ContextStatus {
	n := len(r.Statuses)
	if n < cap(r.Statuses) {
		r.Statuses = r.Statuses[:n+1]
	} else {
		r.Statuses = append(r.Statuses, ContextStatus{})
	}
	status := &r.Statuses[n]
	status.Extents = status.Extents[:0]
	return status
}
