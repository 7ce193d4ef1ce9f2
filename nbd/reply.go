package nbd

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// segmentCount bounds the runs of bytes waiting to be sent: two for each piece
	// and one for each operation, at the largest depth.
	segmentCount = 1 << 11
	// iovMax is how many of them go out in one system call.
	iovMax = 256
)

// headerSpace takes n bytes of the scratch ring and queues them for sending.
// The bytes are in one run, joined to the segment before them where possible.
func (c *conn) headerSpace(n int) []byte {
	start := c.scratchHead + c.scratchUsed
	if start >= scratchSize {
		start -= scratchSize
	}
	wasted := 0
	if start+n > scratchSize { // no run across the end
		wasted = scratchSize - start
		start = 0
	}
	c.scratchUsed += n + wasted
	if c.segmentHead != c.segmentTail && start != 0 {
		last := &c.segments[(c.segmentTail-1)%segmentCount]
		if last.scratch > 0 && last.piece == nil {
			last.scratch += n
			m := len(last.data)
			last.data = last.data[:m+n]
			return last.data[m:]
		}
	}
	b := c.scratch[start : start+n : scratchSize]
	c.push(segment{data: b, scratch: n + wasted})
	return b
}

func (c *conn) push(s segment) {
	c.segments[c.segmentTail%segmentCount] = s
	c.segmentTail++
	c.reactor.Defer(&c.flushLater)
}

// popSegment drops the first segment and frees what it held.
func (c *conn) popSegment() {
	s := &c.segments[c.segmentHead%segmentCount]
	c.segmentHead++
	if s.scratch > 0 {
		c.scratchUsed -= s.scratch
		if c.scratchHead += s.scratch; c.scratchHead >= scratchSize {
			c.scratchHead -= scratchSize
		}
	}
	p, status := s.piece, s.status
	*s = segment{}
	if p != nil {
		c.freePiece(p)
	}
	if status {
		c.statusSent()
	}
	c.resume() // the room for headers may have been what was missing
}

// replyHeader writes the header of a structured or extended chunk.
//
//	structured: magic 4, flags 2, type 2, cookie 8, length 4
//	extended:   magic 4, flags 2, type 2, cookie 8, offset 8, length 8
func (c *conn) replyHeader(b []byte, o *op, flags, kind uint16, length uint64) []byte {
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], o.cookie)
	if c.extended {
		binary.BigEndian.PutUint32(b, magicExtendedReply)
		binary.BigEndian.PutUint64(b[16:], o.offset)
		binary.BigEndian.PutUint64(b[24:], length)
		return b[sizeExtendedReply:]
	}
	binary.BigEndian.PutUint32(b, magicStructuredReply)
	binary.BigEndian.PutUint32(b[16:], uint32(length))
	return b[sizeStructuredReply:]
}

// chunkSize is the size of a chunk's header.
func (c *conn) chunkSize() int {
	if c.extended {
		return sizeExtendedReply
	}
	return sizeStructuredReply
}

// simpleReply writes magic 4, error 4, cookie 8.
func (c *conn) simpleReply(o *op, errno Error) {
	b := c.headerSpace(sizeSimpleReply)
	binary.BigEndian.PutUint32(b, magicSimpleReply)
	binary.BigEndian.PutUint32(b[4:], uint32(errno))
	binary.BigEndian.PutUint64(b[8:], o.cookie)
}

// replyPlain ends an operation without data.
func (c *conn) replyPlain(o *op, errno Error) {
	if errno != ErrnoOK {
		c.counters.errors.Add(1)
	}
	switch {
	case !c.extended && (!c.structured || (o.command != CommandRead && o.command != CommandBlockStatus)):
		c.simpleReply(o, errno)
	case errno == ErrnoOK:
		c.replyHeader(c.headerSpace(c.chunkSize()), o, chunkFlagDone, chunkNone, 0)
	default:
		c.replyError(o, errno, chunkFlagDone)
	}
}

// replyError sends an ERROR chunk: error 4, message length 2.
func (c *conn) replyError(o *op, errno Error, flags uint16) {
	b := c.replyHeader(c.headerSpace(c.chunkSize()+6), o, flags, chunkError, 6)
	binary.BigEndian.PutUint32(b, uint32(errno))
	binary.BigEndian.PutUint16(b[4:], 0)
}

// readDone queues the reply of one piece of a read.
func (c *conn) readDone(o *op, p *piece, errno Error) {
	r := &p.request
	last := o.pending == 0 && o.next == o.length
	c.timeReply(p)
	if !c.structured {
		c.simpleReply(o, errno)
		if errno != ErrnoOK {
			c.counters.errors.Add(1)
			c.freePiece(p)
		} else {
			c.counters.read.Store(c.counters.read.Load() + r.Length)
			c.push(segment{data: r.Buf, piece: p})
		}
		c.freeOp(o)
		return
	}
	flags := uint16(0)
	if last {
		flags = chunkFlagDone
	}
	switch {
	case errno != ErrnoOK:
		// ERROR_OFFSET: error 4, message length 2, offset 8.
		c.counters.errors.Add(1)
		b := c.replyHeader(c.headerSpace(c.chunkSize()+14), o, flags, chunkErrorOffset, 14)
		binary.BigEndian.PutUint32(b, uint32(errno))
		binary.BigEndian.PutUint16(b[4:], 0)
		binary.BigEndian.PutUint64(b[6:], r.Offset)
		c.freePiece(p)
	case r.Zero && o.flags&CommandFlagDF == 0:
		// OFFSET_HOLE: offset 8, length 4.
		c.counters.read.Store(c.counters.read.Load() + r.Length)
		b := c.replyHeader(c.headerSpace(c.chunkSize()+12), o, flags, chunkOffsetHole, 12)
		binary.BigEndian.PutUint64(b, r.Offset)
		binary.BigEndian.PutUint32(b[8:], uint32(r.Length))
		c.freePiece(p)
	default:
		// OFFSET_DATA: offset 8, data.
		c.counters.read.Store(c.counters.read.Load() + r.Length)
		b := c.replyHeader(c.headerSpace(c.chunkSize()+8), o, flags, chunkOffsetData, 8+r.Length)
		binary.BigEndian.PutUint64(b, r.Offset)
		c.push(segment{data: r.Buf, piece: p})
	}
	if last {
		c.freeOp(o)
	}
}

// flush sends what is queued, as much as the socket takes.
func (c *conn) flush() {
	c.timeFlush()
	for !c.dead && !c.blockedSend && c.segmentHead != c.segmentTail {
		count, total := 0, 0
		for i := c.segmentHead; i != c.segmentTail && count < iovMax; i++ {
			data := c.segments[i%segmentCount].data
			if i == c.segmentHead {
				data = data[c.sent:]
			}
			c.iov[count].Base = &data[0]
			c.iov[count].SetLen(len(data))
			total += len(data)
			count++
		}
		n, errno := c.send(count)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			n = 0
		case errno != 0:
			if errno != unix.EPIPE && errno != unix.ECONNRESET {
				c.fail(fmt.Errorf("send: %w", errno))
			} else {
				c.kill()
			}
			return
		}
		c.progress += uint64(n)
		for left := n; left > 0; {
			rest := len(c.segments[c.segmentHead%segmentCount].data) - c.sent
			if left < rest {
				c.sent += left
				break
			}
			left -= rest
			c.sent = 0
			c.popSegment()
		}
		if n < total { // the socket is full
			c.blockedSend = true
			c.reactor.WantWrite(&c.watch)
			c.expectProgress()
		}
	}
	c.timeSent(false)
	c.closeIfDone()
}
