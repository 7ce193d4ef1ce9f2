package nbd

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// linkSender is the sending half of a [Link], owned by its reactor.
type linkSender struct {
	ring       []uint32 // slots being sent, in order
	sendHead   uint32   // the first of them, modulo the size
	sendTail   uint32
	sent       int // bytes of the first that are gone
	blocked    bool
	flushLater reactor.Deferred
}

// flush puts waiting requests on the wire and sends as much as the socket takes.
func (l *Link) flush() {
	for !l.dead && !l.blocked {
		for l.waiting.first != nil && len(l.free) > 0 {
			s := l.take()
			l.ring[l.sendTail%uint32(len(l.ring))] = uint32(s.cookie)
			l.sendTail++
		}
		if l.sendHead == l.sendTail {
			return
		}
		count, total := l.gather()
		n, errno := l.send(count)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			n = 0
		case errno != 0:
			l.die(fmt.Errorf("nbd: send: %w", errno))
			return
		}
		l.advance(n)
		if n < total {
			l.blocked = true
			l.reactor.WantWrite(&l.watch)
		}
	}
}

// gather fills the vector with what is to be sent.
func (l *Link) gather() (count, total int) {
	skip := l.sent
	add := func(b []byte) {
		if skip >= len(b) {
			skip -= len(b)
			return
		}
		b = b[skip:]
		skip = 0
		l.iov[count].Base = &b[0]
		l.iov[count].SetLen(len(b))
		count++
		total += len(b)
	}
	for i := l.sendHead; i != l.sendTail && count+2 <= iovMax; i++ {
		s := &l.slots[l.ring[i%uint32(len(l.ring))]]
		add(s.header[:l.headerSize()])
		if s.command == CommandWrite {
			add(s.request.Buf)
		}
	}
	return count, total
}

func (l *Link) headerSize() int {
	if l.headers == HeadersExtended {
		return sizeRequestExtended
	}
	return sizeRequest
}

// advance notes that n bytes are gone, and lets go of requests that are all sent.
func (l *Link) advance(n int) {
	for n > 0 {
		s := &l.slots[l.ring[l.sendHead%uint32(len(l.ring))]]
		size := l.headerSize()
		if s.command == CommandWrite {
			size += int(s.length)
		}
		if left := size - l.sent; n < left {
			l.sent += n
			return
		} else {
			n -= left
		}
		l.sent = 0
		l.sendHead++
		s.sending = false
		if s.replied {
			l.finish(s)
		}
		if l.dead { // by what Done did
			return
		}
	}
}
