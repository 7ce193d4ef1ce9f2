package nbd

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

// sessionModes are the forms of replies a server speaks.
var sessionModes = []Headers{HeadersSimple, HeadersStructured, HeadersExtended}

// onModes runs a test with each form of replies.
func onModes(t *testing.T, test func(*testing.T, Headers)) {
	for _, mode := range sessionModes {
		t.Run(mode.String(), func(t *testing.T) { test(t, mode) })
	}
}

// session is a client in transmission that checks every reply against the
// protocol document: which forms are allowed, what chunks may hold and cover, and
// that each reply ends exactly once.
type session struct {
	*rawConn
	mode     Headers
	size     uint64
	flags    TransmissionFlags
	contexts map[uint32]string
	pending  map[uint64][]*asked // by cookie, oldest first
	cookie   uint64              // of the last request of ask
	out      []byte              // requests kept for push
}

// asked is a request with what has been answered to it.
type asked struct {
	flags          CommandFlags
	command        Command
	cookie, offset uint64
	length         uint64 // of its effect
	ids            []uint32

	errno    Error
	errorsAt []uint64 // of ERROR_OFFSET chunks
	data     []byte   // of reads; holes are zeros
	covered  []span
	holes    uint64 // bytes in hole chunks
	chunks   int    // of content
	extents  map[uint32][]datapath.Extent
	done     bool
}

type span struct{ from, to uint64 }

// openSession negotiates an export with a form of replies and metadata contexts.
func (rig *serverRig) openSession(mode Headers, name string, contexts ...string) *session {
	rig.t.Helper()
	return newSession(rig.dial(), mode, name, contexts...)
}

func newSession(r *rawConn, mode Headers, name string, contexts ...string) *session {
	r.t.Helper()
	s := &session{rawConn: r, mode: mode, contexts: map[uint32]string{}, pending: map[uint64][]*asked{}}
	switch mode {
	case HeadersStructured:
		r.mustOption(optStructuredReply, nil)
	case HeadersExtended:
		r.mustOption(optExtendedHeaders, nil)
	}
	if len(contexts) > 0 {
		for context, id := range r.setContexts(name, contexts...) {
			s.contexts[id] = context
		}
		if len(s.contexts) != len(contexts) {
			r.t.Fatalf("contexts %v selected, %v asked for", s.contexts, contexts)
		}
	}
	s.size, s.flags = r.goExport(name)
	return s
}

// deadline gives everything from now on this much time.
func (s *session) deadline(d time.Duration) {
	s.t.Helper()
	if err := s.conn.SetDeadline(time.Now().Add(d)); err != nil {
		s.t.Fatal(err)
	}
}

// add queues a request with any fields for push.
func (s *session) add(a *asked, wireLength uint64, payload []byte) *asked {
	s.pending[a.cookie] = append(s.pending[a.cookie], a)
	s.out = appendRequest(s.out, s.mode == HeadersExtended, a.flags, a.command, a.cookie, a.offset, wireLength)
	s.out = append(s.out, payload...)
	if a.command == CommandRead && a.length <= payloadMax {
		a.data = make([]byte, a.length)
	}
	return a
}

// queue queues a well-framed request for push: a write in extended mode says
// that it has a payload.
func (s *session) queue(flags CommandFlags, command Command, offset, length uint64, payload []byte) *asked {
	s.cookie++
	if command == CommandWrite && s.mode == HeadersExtended {
		flags |= CommandFlagPayloadLen
	}
	return s.add(&asked{flags: flags, command: command, cookie: s.cookie, offset: offset, length: length}, length, payload)
}

// push sends what was queued, in one write.
func (s *session) push() {
	s.t.Helper()
	s.send(s.out)
	s.out = s.out[:0]
}

// ask sends one request and waits for the end of its reply, whatever else arrives
// before.
func (s *session) ask(flags CommandFlags, command Command, offset, length uint64, payload []byte) *asked {
	s.t.Helper()
	a := s.queue(flags, command, offset, length, payload)
	s.push()
	return s.wait(a)
}

func (s *session) wait(a *asked) *asked {
	s.t.Helper()
	for !a.done {
		s.next()
	}
	return a
}

// waitAll waits for the replies to everything asked.
func (s *session) waitAll() {
	s.t.Helper()
	for len(s.pending) > 0 {
		s.next()
	}
}

// write and read are ask for data that must succeed.
func (s *session) write(offset uint64, data []byte) {
	s.t.Helper()
	if a := s.ask(0, CommandWrite, offset, uint64(len(data)), data); a.errno != ErrnoOK {
		s.t.Fatalf("write of %d bytes at %d: %v", len(data), offset, a.errno)
	}
}

func (s *session) readAt(offset, length uint64) []byte {
	s.t.Helper()
	a := s.ask(0, CommandRead, offset, length, nil)
	if a.errno != ErrnoOK {
		s.t.Fatalf("read of %d bytes at %d: %v", length, offset, a.errno)
	}
	return a.data
}

// next reads one message and gives it to its request, which is returned.
func (s *session) next() *asked {
	s.t.Helper()
	head, err := s.in.Peek(4)
	if err != nil {
		s.t.Fatalf("waiting for replies to %d requests: %v", len(s.pending), err)
	}
	if binary.BigEndian.Uint32(head) == magicSimpleReply {
		errno, cookie := s.readSimpleReply()
		a := s.find(cookie)
		switch {
		case s.mode == HeadersExtended:
			s.t.Fatal("a simple reply, with extended headers")
		case s.mode == HeadersStructured && (a.command == CommandRead || a.command == CommandBlockStatus):
			s.t.Fatalf("a simple reply to command %d, with structured replies", a.command)
		}
		s.fail(a, errno)
		if a.command == CommandRead && errno == ErrnoOK {
			copy(a.data, s.read(len(a.data)))
			a.covered = append(a.covered, span{0, a.length})
		}
		s.end(a)
		return a
	}
	var chunk rawChunk
	switch s.mode {
	case HeadersSimple:
		s.t.Fatalf("a reply begins with % x", head)
	case HeadersStructured:
		chunk = s.readStructuredReply()
	case HeadersExtended:
		chunk = s.readExtendedReply()
	}
	a := s.find(chunk.cookie)
	if s.mode == HeadersExtended && chunk.offset != a.offset {
		s.t.Fatalf("chunk says offset %d, the request %d", chunk.offset, a.offset)
	}
	s.chunk(a, chunk)
	if chunk.done() {
		s.end(a)
	}
	return a
}

func (s *session) find(cookie uint64) *asked {
	s.t.Helper()
	list := s.pending[cookie]
	if len(list) == 0 {
		s.t.Fatalf("a reply with cookie %#x, for which nothing is asked", cookie)
	}
	return list[0]
}

// wireErrors are what a server may send (proto.md, "Error values").
var wireErrors = []Error{ErrnoOK, ErrnoPerm, ErrnoIO, ErrnoInvalid, ErrnoNoSpace, ErrnoOverflow, ErrnoNotSupported, ErrnoShutdown}

func (s *session) fail(a *asked, errno Error) {
	s.t.Helper()
	if !slices.Contains(wireErrors, errno) {
		s.t.Fatalf("error %d, which no server should send", errno)
	}
	if a.errno == ErrnoOK {
		a.errno = errno
	}
}

func (s *session) end(a *asked) {
	s.t.Helper()
	a.done = true
	if list := s.pending[a.cookie][1:]; len(list) > 0 {
		s.pending[a.cookie] = list
	} else {
		delete(s.pending, a.cookie)
	}
	if a.errno != ErrnoOK {
		return
	}
	switch a.command {
	case CommandRead:
		var sum uint64
		for _, c := range a.covered {
			sum += c.to - c.from
		}
		if sum != a.length { // they do not overlap
			s.t.Fatalf("a read of %d bytes was answered with %d", a.length, sum)
		}
	case CommandBlockStatus:
		want := len(s.contexts)
		if a.ids != nil {
			want = len(a.ids)
		}
		if len(a.extents) != want {
			s.t.Fatalf("a block status was answered for %d contexts, want %d", len(a.extents), want)
		}
	}
}

// cover notes content at [offset, offset+length) of the device.
func (s *session) cover(a *asked, offset, length uint64) {
	s.t.Helper()
	if offset < a.offset || length == 0 || length > a.length || offset-a.offset > a.length-length {
		s.t.Fatalf("%d bytes at %d in the reply to a read of %d at %d", length, offset, a.length, a.offset)
	}
	c := span{offset - a.offset, offset - a.offset + length}
	for _, o := range a.covered {
		if c.from < o.to && o.from < c.to {
			s.t.Fatalf("chunks of a read overlap: %v and %v", c, o)
		}
	}
	a.covered = append(a.covered, c)
	a.chunks++
}

func (s *session) chunk(a *asked, chunk rawChunk) {
	s.t.Helper()
	bad := func(why string) {
		s.t.Helper()
		s.t.Fatalf("command %d: chunk of type %#x, flags %#x, %d bytes: %s", a.command, chunk.kind, chunk.flags, len(chunk.payload), why)
	}
	if chunk.flags&^chunkFlagDone != 0 {
		bad("unknown flags")
	}
	p := chunk.payload
	switch chunk.kind {
	case chunkNone:
		if len(p) != 0 || !chunk.done() {
			bad("an empty chunk ends a reply")
		}
	case chunkOffsetData:
		if a.command != CommandRead || len(p) < 9 {
			bad("no data of a read")
		}
		offset := binary.BigEndian.Uint64(p)
		s.cover(a, offset, uint64(len(p)-8))
		copy(a.data[offset-a.offset:], p[8:])
	case chunkOffsetHole:
		if a.command != CommandRead || len(p) != 12 || a.flags&CommandFlagDF != 0 {
			bad("no hole of a read that may have one")
		}
		length := uint64(binary.BigEndian.Uint32(p[8:]))
		s.cover(a, binary.BigEndian.Uint64(p), length)
		a.holes += length
	case chunkBlockStatus, chunkBlockStatusExt:
		if a.command != CommandBlockStatus || (chunk.kind == chunkBlockStatusExt) != (s.mode == HeadersExtended) || len(p) < 4 {
			bad("no block status")
		}
		s.status(a, binary.BigEndian.Uint32(p), p[4:], bad)
	case chunkError, chunkErrorOffset:
		if len(p) < 6 {
			bad("no error")
		}
		n := int(binary.BigEndian.Uint16(p[4:]))
		rest := p[6:]
		if n > stringMax || len(rest) < n {
			bad("the message is too long")
		}
		rest = rest[n:]
		if chunk.kind == chunkErrorOffset {
			if len(rest) != 8 {
				bad("no offset behind the message")
			}
			at := binary.BigEndian.Uint64(rest)
			if at < a.offset || at-a.offset >= a.length {
				bad(fmt.Sprintf("error at %d", at))
			}
			a.errorsAt = append(a.errorsAt, at)
		} else if len(rest) != 0 {
			bad("bytes behind the message")
		}
		errno := Error(binary.BigEndian.Uint32(p))
		if errno == ErrnoOK {
			bad("an error of 0")
		}
		s.fail(a, errno)
	default:
		bad("unknown type")
	}
}

func (s *session) status(a *asked, id uint32, p []byte, bad func(string)) {
	s.t.Helper()
	if _, ok := s.contexts[id]; !ok || (a.ids != nil && !slices.Contains(a.ids, id)) {
		bad(fmt.Sprintf("context %d was not asked for", id))
	}
	if a.extents[id] != nil {
		bad(fmt.Sprintf("context %d comes twice", id))
	}
	size := 8
	if s.mode == HeadersExtended {
		size = 16
		if len(p) < 4 || int(binary.BigEndian.Uint32(p))*size != len(p)-4 {
			bad("the count of extents is wrong")
		}
		p = p[4:]
	}
	if len(p) == 0 || len(p)%size != 0 || len(p)/size > extentsMax {
		bad("no list of extents")
	}
	var list []datapath.Extent
	var sum uint64
	for ; len(p) > 0; p = p[size:] {
		e := datapath.Extent{Length: uint64(binary.BigEndian.Uint32(p)), State: uint64(binary.BigEndian.Uint32(p[4:]))}
		if size == 16 {
			e = datapath.Extent{Length: binary.BigEndian.Uint64(p), State: binary.BigEndian.Uint64(p[8:])}
		}
		if e.Length == 0 || sum >= a.length {
			bad("an extent that is empty, or past the range")
		}
		sum += e.Length
		list = append(list, e)
	}
	if a.flags&CommandFlagReqOne != 0 && (len(list) != 1 || sum > a.length) {
		bad("one extent was asked for")
	}
	if a.extents == nil {
		a.extents = map[uint32][]datapath.Extent{}
	}
	a.extents[id] = list
}

// disconnect says DISC and wants the server to close.
func (s *session) disconnect() {
	s.t.Helper()
	s.out = appendRequest(s.out, s.mode == HeadersExtended, 0, CommandDisconnect, 0, 0, 0)
	s.push()
	s.expectClosed()
}
