package nbd

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/internal/invariant"
	"github.com/ashlar-storage/ashlar/nbd/internal/list"
)

// Request is one command to the server. Its maker owns it and may use it again
// and again; between Submit and Done it and Buf belong to the client. The zero
// value with a Command and a Done is a request.
type Request struct {
	Command Command
	Flags   CommandFlags // PayloadLen is set by the client where it belongs
	Offset  uint64       // bytes; 0 for a flush
	Length  uint64       // bytes; 0 for a flush
	Buf     []byte       // of reads and writes, with len(Buf) == Length; else nil

	// ContextIDs narrow a block status to some of the negotiated contexts. Empty
	// means all of them; else the server must have FlagBlockStatusPayload.
	ContextIDs []uint32
	// Statuses receive the result of a block status, one for each context, in the
	// order the server sent them. The client appends to Statuses[:0] and to the
	// Extents[:0] it finds beyond the length, so that a reused Request allocates
	// nothing.
	Statuses []ContextStatus

	// Done is called exactly once per Submit, on a goroutine of the client and
	// never inside Submit. It must not block: no reply is read meanwhile. It may
	// submit.
	Done func(*Request)
	Err  error // the result: valid inside and after Done

	// Guarded by the client's mu.
	state  requestState
	slot   uint32 // in requestSent
	result error  // in a list: what it will end with, if already known
	link   list.Link[Request]
}

type requestState uint8

const (
	requestIdle   requestState = iota // its owner's
	requestQueued                     // in Client.queue
	requestSent                       // in a slot
)

// ContextStatus is a run of extents in one metadata context, from the Offset of
// the request on.
type ContextStatus struct {
	ID      uint32
	Extents []datapath.Extent
}

// clientQueue is a list of requests: of those that wait, or that the writer will end.
type clientQueue = list.List[Request]

// clientSlot is a request on the wire. Its cookie is its index in the low half
// and a generation in the high half, so that a reply to a request of the past is
// noticed.
type clientSlot struct {
	// Guarded by mu. The fields down to wanted do not change while the slot is in use.
	inUse   bool
	cookie  uint64
	command Command
	flags   CommandFlags
	offset  uint64
	length  uint64
	wanted  uint64   // block status: bit i for contexts[i]
	r       *Request // nil when it was abandoned; stable while touched
	held    bool     // the writer's batch refers to r.Buf
	touched bool     // the reader fills r
	ended   bool     // the reply is complete; the writer will end r when it lets go

	// Owned by the reader while the slot is in use.
	err     error // the first error chunk, and the result
	covered clientCoverage
	content int    // chunks with content of a read
	seen    uint64 // block status: bit i for contexts[i]
}

// Submit queues r. It never blocks; more requests than the client's Depth wait
// in the queue.
//
// Ownership: r and r.Buf belong to the client until r.Done runs.
// Context: any goroutine, a Done function too.
// Completion: r.Done runs exactly once, on a goroutine of the client, never
// inside Submit.
// Order: requests are sent in the order they were submitted in; they end in any
// order, and the server may carry them out in any order.
// Durability: as the server promises: a write is durable after a later flush, or
// with CommandFlagFUA.
// Errors: r.Err is nil; a *CommandError for this request alone; one of
// ErrNotAdvertised, ErrOutside, ErrTooLong, ErrUnaligned, ErrReadOnly and
// ErrRequest, with nothing sent; or what the client died of, with the request's
// effect unknown.
func (c *Client) Submit(r *Request) {
	refusal := c.check(r)
	c.mu.Lock()
	if r.state != requestIdle || r.Done == nil {
		c.mu.Unlock()
		invariant.Check(false, "nbd client: request submitted in state %d, or without Done", r.state)
	}
	if refusal == nil && c.closing {
		refusal = ErrClientClosed
	}
	r.state, r.result = requestQueued, refusal
	c.queue.Push(&r.link, r)
	switch {
	case !c.stopped:
		c.wake.Signal()
	case !c.draining:
		c.draining = true
		go c.drain() // ends when the queue is empty, which it soon is: nothing is sent any more
	}
	c.mu.Unlock()
}

// drain ends requests submitted after the writer ended.
func (c *Client) drain() {
	for {
		c.mu.Lock()
		r := c.queue.Pop()
		if r == nil {
			c.draining = false
			c.mu.Unlock()
			return
		}
		err := r.result
		if err == nil {
			err = c.err
		}
		r.state = requestIdle
		c.mu.Unlock()
		finishRequest(r, err)
	}
}

// finishRequest ends a request that is in no list and no slot any more. It is
// the one exit of every request.
func finishRequest(r *Request, err error) {
	r.Err = err
	r.Done(r)
}

// check refuses what may not be sent. The result is one of the sentinel errors:
// nothing is allocated.
func (c *Client) check(r *Request) error {
	switch r.Command {
	case CommandRead, CommandWrite:
		if uint64(len(r.Buf)) != r.Length || len(r.ContextIDs) != 0 {
			return ErrRequest
		}
	case CommandDisconnect: // is Shutdown's
		return ErrRequest
	case CommandBlockStatus:
		if len(r.Buf) != 0 {
			return ErrRequest
		}
		if len(r.ContextIDs) != 0 && (c.info.Flags&FlagBlockStatusPayload == 0 || c.headers != HeadersExtended) {
			return ErrNotAdvertised
		}
		if _, ok := c.contextBits(r.ContextIDs); !ok {
			return ErrRequest
		}
	default:
		if len(r.Buf) != 0 || len(r.ContextIDs) != 0 {
			return ErrRequest
		}
	}
	if r.Length > math.MaxUint32 && (c.headers != HeadersExtended || len(r.Buf) != 0) {
		return ErrTooLong
	}
	if c.options.Unchecked {
		return nil
	}
	if err := c.checkAdvertised(r); err != nil {
		return err
	}
	return c.checkRange(r)
}

// clientCommandRules say what each command needs of the server and which flags fit it.
// FUA fits all (proto.md, "Command flags").
var clientCommandRules = [...]struct {
	needs  TransmissionFlags
	flags  CommandFlags
	writes bool
}{
	CommandRead:        {0, CommandFlagDF, false},
	CommandWrite:       {0, 0, true},
	CommandDisconnect:  {},
	CommandFlush:       {FlagSendFlush, 0, false},
	CommandTrim:        {FlagSendTrim, 0, true},
	CommandCache:       {FlagSendCache, 0, false},
	CommandWriteZeroes: {FlagSendWriteZeroes, CommandFlagNoHole | CommandFlagFastZero, true},
	CommandBlockStatus: {0, CommandFlagReqOne, false},
}

// clientFlagNeeds say what the server must advertise for a flag.
var clientFlagNeeds = [...]struct {
	flag  CommandFlags
	needs TransmissionFlags
}{{CommandFlagFUA, FlagSendFUA}, {CommandFlagDF, FlagSendDF}, {CommandFlagFastZero, FlagSendFastZero}}

func (c *Client) checkAdvertised(r *Request) error {
	if int(r.Command) >= len(clientCommandRules) {
		return ErrNotAdvertised
	}
	rule := &clientCommandRules[r.Command]
	if rule.writes && c.info.Flags&FlagReadOnly != 0 {
		return ErrReadOnly
	}
	if rule.needs&^c.info.Flags != 0 || r.Flags&^(rule.flags|CommandFlagFUA) != 0 {
		return ErrNotAdvertised
	}
	for _, f := range clientFlagNeeds {
		if r.Flags&f.flag != 0 && c.info.Flags&f.needs == 0 {
			return ErrNotAdvertised
		}
	}
	if r.Command == CommandBlockStatus && len(c.contexts) == 0 {
		return ErrNotAdvertised
	}
	return nil
}

func (c *Client) checkRange(r *Request) error {
	if r.Command == CommandFlush {
		if r.Offset != 0 || r.Length != 0 {
			return ErrRequest
		}
		return nil
	}
	if r.Length == 0 { // has no meaning (proto.md, "Request types")
		return ErrRequest
	}
	if r.Offset > c.info.Size || r.Length > c.info.Size-r.Offset {
		return ErrOutside
	}
	if len(r.Buf) > int(c.PayloadMax()) {
		return ErrTooLong
	}
	if least := uint64(c.info.BlockMin); least > 1 && (r.Offset|r.Length)&(least-1) != 0 {
		return ErrUnaligned
	}
	return nil
}

// contextBits gives the set of contexts that ids name; all for none. It fails on
// an id that is unknown or appears twice.
func (c *Client) contextBits(ids []uint32) (set uint64, ok bool) {
	if len(ids) == 0 {
		return 1<<len(c.contexts) - 1, true // a shift by 64 gives 0, and 0-1 all bits
	}
	for _, id := range ids {
		i := c.contextIndex(id)
		if i < 0 || set&(1<<i) != 0 {
			return 0, false
		}
		set |= 1 << i
	}
	return set, true
}

func (c *Client) contextIndex(id uint32) int {
	for i := range c.contexts {
		if c.contexts[i].ID == id {
			return i
		}
	}
	return -1
}

// takeSlotLocked puts r on the wire.
func (c *Client) takeSlotLocked(r *Request) *clientSlot {
	index := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	c.busy++
	s := &c.slots[index]
	s.inUse = true
	s.cookie = (s.cookie>>32+1)<<32 | uint64(index)
	s.command, s.flags, s.offset, s.length, s.r = r.Command, r.Flags, r.Offset, r.Length, r
	s.held, s.touched, s.ended = false, false, false
	s.err, s.content, s.seen, s.wanted = nil, 0, 0, 0
	s.covered.reset()
	if r.Command == CommandBlockStatus {
		s.wanted, _ = c.contextBits(r.ContextIDs) // checked by Submit
		r.Statuses = r.Statuses[:0]
	}
	r.state, r.slot = requestSent, index
	return s
}

// freeSlotLocked takes a request off the wire. It returns nil when it was
// abandoned.
func (c *Client) freeSlotLocked(s *clientSlot) *Request {
	r := s.r
	s.inUse, s.r = false, nil
	c.free = append(c.free, uint32(s.cookie))
	c.busy--
	if r != nil {
		r.state = requestIdle
	}
	if c.queue.First() != nil || c.closing {
		c.wake.Signal()
	}
	return r
}

// abandon gives r back without its Done and reports true, or reports false when
// it cannot: Done is about to run, or the transfer of its data has begun.
func (c *Client) abandon(r *Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r.state {
	case requestQueued:
		c.queue.Remove(&r.link)
		r.state = requestIdle
		c.wake.Signal() // the writer may be closing and wait for the last request
		return true
	case requestSent:
		s := &c.slots[r.slot]
		if s.held || s.touched {
			return false
		}
		s.r = nil // the slot stays until the reply has come; its data is read away
		r.state = requestIdle
		return true
	}
	return false
}

// write is the writer goroutine: it sends what is queued until the client is
// dead or closed, and then ends every request that is left.
func (c *Client) write() {
	defer close(c.writerDone)
	for c.gather() {
		c.finishAll(&c.out.refused)
		if err := c.out.send(c.conn); err != nil {
			c.writeFailed(err)
			break
		}
		c.letGo()
	}
	c.finishAll(&c.out.refused)
	<-c.readerDone // nobody fills a buffer any more
	c.mu.Lock()
	for i := range c.slots {
		if s := &c.slots[i]; s.inUse {
			if r := c.freeSlotLocked(s); r != nil {
				r.result = nil
				c.out.refused.Push(&r.link, r)
			}
		}
	}
	c.mu.Unlock()
	c.finishAll(&c.out.refused)
	for {
		c.mu.Lock()
		r := c.queue.Pop()
		if r == nil {
			c.stopped = true
			c.mu.Unlock()
			return
		}
		r.state = requestIdle
		c.mu.Unlock()
		c.out.refused.Push(&r.link, r)
		c.finishAll(&c.out.refused)
	}
}

// writeFailed kills the client, after the reader had its chance to find a better
// cause: a server that hangs up may have said why.
func (c *Client) writeFailed(err error) {
	timer := time.NewTimer(clientCancelGrace)
	defer timer.Stop()
	select {
	case <-c.readerDone:
	case <-timer.C:
	}
	c.fail(fmt.Errorf("nbd: write: %w", err))
}

// finishAll ends the requests of a list of the writer, with their result or,
// when they have none, with what the client died of.
func (c *Client) finishAll(l *clientQueue) {
	for r := l.Pop(); r != nil; r = l.Pop() {
		err := r.result
		if err == nil {
			err = c.Err()
		}
		finishRequest(r, err)
	}
}

// gather waits for work and fills the batch. It reports false when the client is
// dead, if need be by closing it.
func (c *Client) gather() bool {
	c.out.reset()
	c.mu.Lock()
	for {
		if c.err != nil {
			c.mu.Unlock()
			return false
		}
		for r := c.queue.First(); r != nil; r = c.queue.First() {
			if r.result != nil {
				c.queue.Remove(&r.link)
				r.state = requestIdle
				c.out.refused.Push(&r.link, r)
				continue
			}
			if len(c.free) == 0 || !c.out.fits(r, c.tls) {
				break
			}
			c.queue.Remove(&r.link)
			s := c.takeSlotLocked(r)
			s.held = c.out.add(s, r, c.headers == HeadersExtended, c.tls)
		}
		if !c.out.empty() {
			c.mu.Unlock()
			return true
		}
		if c.closing && c.queue.First() == nil && c.busy == 0 {
			break
		}
		c.wake.Wait()
	}
	c.mu.Unlock()
	c.goodbye()
	return false
}

// goodbye sends DISC and closes. The server owes no reply to it.
func (c *Client) goodbye() {
	c.die(ErrClientClosed) // so that the server's hanging up is no loss
	c.out.head = appendRequest(c.out.head, c.headers == HeadersExtended, 0, CommandDisconnect, 0, 0, 0)
	err := c.out.send(c.conn)
	if t, ok := c.conn.(interface{ CloseWrite() error }); ok && err == nil {
		_ = t.CloseWrite() // ends the stream in order: close_notify over TLS
	}
	_ = clientCloseConn(c.conn) // all that matters has been received
}

// letGo gives up the buffers of the batch that was sent, and ends requests whose
// reply was complete before.
func (c *Client) letGo() {
	if len(c.out.held) == 0 {
		return
	}
	c.mu.Lock()
	for _, index := range c.out.held {
		s := &c.slots[index]
		s.held = false
		if !s.ended {
			continue
		}
		result := s.err
		if r := c.freeSlotLocked(s); r != nil {
			r.result = result
			c.out.ended.Push(&r.link, r)
		}
	}
	c.mu.Unlock()
	for r := c.out.ended.Pop(); r != nil; r = c.out.ended.Pop() {
		finishRequest(r, r.result)
	}
}

// appendRequest appends the header of a request.
//
//	compact   extended
//	 0  4      0  4     magic
//	 4  2      4  2     flags
//	 6  2      6  2     command
//	 8  8      8  8     cookie
//	16  8     16  8     offset
//	24  4     24  8     length: of the effect, or of the payload when there is one
func appendRequest(b []byte, extended bool, flags CommandFlags, command Command, cookie, offset, length uint64) []byte {
	magic := magicRequest
	if extended {
		magic = magicRequestExtended
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	b = binary.BigEndian.AppendUint16(b, uint16(command))
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	if extended {
		return binary.BigEndian.AppendUint64(b, length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(length))
}
