package nbd

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	// receiveSize holds fifteen 4 KiB writes, or two thousand headers, of one read.
	receiveSize = 64 << 10
	// writeBatch is how much payload is taken before its replies go out. The client's
	// socket buffer holds some twenty writes of 4 KiB; taking all of them before
	// the first reply has client and server wait for each other in turn (4 KiB at
	// depth 32: 152k requests a second without a bound, 190k with this one).
	writeBatch = 24 << 10
	// requestBatch is how many requests are begun before replies go out, so that
	// client and server work side by side and not in turn.
	requestBatch = 16
	// pieceMax is the longest device request: longer ones are cut into pieces that
	// run side by side.
	pieceMax = 1 << 20
	// wholeMax is the longest simple reply taken from the arena; it has to be in
	// one piece. Longer ones get memory of their own.
	wholeMax = 4 << 20
	// reserveSize is each connection's own buffer: with it, it makes progress
	// however much others hold.
	reserveSize = 32 << 10
	// scratchSize holds the headers of replies until they are sent.
	scratchSize = 64 << 10
	// headerRoom is what the headers of one operation or piece may take of it.
	headerRoom = 64
	// receiveRounds is how many reads one connection gets before others have a turn.
	receiveRounds = 4
	// hugeMax bounds the replies above wholeMax that a server holds at once.
	hugeMax = 8
)

var errProtocol = errors.New("nbd: protocol violation")

// conn is one connection in transmission. It belongs to its reactor; only the
// fields of counters are read by others.
type conn struct {
	server   *Server
	export   *Export
	reactor  *reactor.Reactor
	queue    datapath.Queue
	info     datapath.Info
	id       uint64
	remote   string
	closed   chan struct{} // closed after everything has been given back
	watch    reactor.Watch
	contexts []string

	encrypted bool // goroutines carry the bytes

	structured bool // replies to reads are structured
	extended   bool // headers are extended
	immediate  bool // the device takes a write's data within Submit

	// Receiving. Bytes of rx[rxStart:rxEnd] are not parsed yet.
	rx        []byte
	rxStart   int
	rxEnd     int
	state     receiveState
	readable  bool   // the socket may have more
	hangup    bool   // the client's stream has an end, of which no other event will tell
	payloadOp *op    // of receivePayload and receiveStatus
	filling   *piece // the piece that payload goes to; nil: needs one
	filled    int    // bytes of it
	discard   int64  // bytes left to read away
	blocked   *op    // a read whose pieces wait for buffers
	begun     int    // requests begun in this call of receive
	taken     int    // bytes of payload given to the device in this call of receive
	stalled   bool   // receiving stopped for want of operations, pieces or memory

	// Operations of the client and pieces of them at the device.
	ops        []op
	freeOps    []*op
	pieces     []piece
	freePieces []*piece
	atDevice   int // pieces given to the queue and not completed
	bytes      int64
	reserve    []byte
	reserved   bool // the reserve is in use
	status     statusReply
	statusOps  []*op // block status requests that wait for their turn

	// Sending.
	segments    []segment // a ring
	segmentHead uint32
	segmentTail uint32
	sent        int // bytes of the first segment that are gone
	scratch     []byte
	scratchHead int // of what is in use: [head, head+used) modulo the size
	scratchUsed int
	wire
	blockedSend bool

	flushLater reactor.Deferred
	readLater  reactor.Deferred
	timer      reactor.Timer
	retry      reactor.Timer
	progress   uint64 // bytes moved in either direction
	seen       uint64 // progress when the timer was armed

	timing
	ending
	gathering

	leaving  bool // the client said DISC, or the server stops: finish, then close
	refusing bool // the server stops: new requests get ESHUTDOWN; see drain
	dead     bool // the socket is of no use any more

	counters connCounters
}

type receiveState uint8

const (
	receiveHeader  receiveState = iota
	receivePayload              // of a write
	receiveStatus               // of a block status with payload
	receiveDiscard              // of a request already answered
)

// connCounters are written by the reactor and read by anyone.
type connCounters struct {
	requests [datapath.OpCount]atomic.Uint64
	read     atomic.Uint64 // bytes
	written  atomic.Uint64 // bytes
	errors   atomic.Uint64
	inFlight atomic.Int64
}

// op is one request of the client.
type op struct {
	conn    *conn
	cookie  uint64
	offset  uint64
	length  uint64
	next    uint64 // bytes already given to pieces
	pending int    // pieces not completed
	command Command
	flags   CommandFlags
	errno   Error
	context int // block status: the next context
	chosen  uint64
	arrived int64 // nanoseconds, where requests are timed
	waited  int64 // nanoseconds that its bytes lay here for want of room
}

// piece is one request to the device: a whole operation or a piece of one.
type piece struct {
	conn    *conn
	op      *op
	request datapath.Request
	timing  datapath.Timing
	buffer  []byte
	source  bufferSource
}

type bufferSource uint8

const (
	bufferNone bufferSource = iota
	bufferArena
	bufferReserve
	bufferHuge
)

// segment is a run of bytes to send.
type segment struct {
	data    []byte
	piece   *piece // freed when sent
	scratch int    // bytes of the scratch ring given back when sent
	status  bool   // the block status buffer is free when sent
}

// start puts a negotiated connection on its reactor. It runs on that reactor.
func (c *conn) start() error {
	depth := c.server.config.Depth
	c.ops = make([]op, depth)
	c.freeOps = make([]*op, 0, depth)
	for i := depth - 1; i >= 0; i-- {
		c.ops[i].conn = c
		c.freeOps = append(c.freeOps, &c.ops[i])
	}
	c.pieces = make([]piece, depth)
	c.freePieces = make([]*piece, 0, depth)
	for i := depth - 1; i >= 0; i-- {
		p := &c.pieces[i]
		p.conn = c
		p.request.Tag = uint32(i)
		p.request.Done = func(*datapath.Request) { c.completed(p) }
		c.freePieces = append(c.freePieces, p)
	}
	c.immediate = c.info.Has(datapath.FeatureImmediate)
	c.rx = make([]byte, receiveSize)
	c.scratch = make([]byte, scratchSize)
	c.segments = make([]segment, segmentCount)
	c.statusOps = make([]*op, 0, depth)
	c.startTiming()
	c.startGathering()
	if len(c.contexts) > 0 {
		c.status.start(c)
	}
	var err error
	if c.reserve, err = unix.Mmap(-1, 0, reserveSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return fmt.Errorf("nbd: connection buffer: %w", err)
	}
	if c.queue, err = c.export.Device.OpenQueue(c.reactor, depth); err != nil {
		_ = unix.Munmap(c.reserve) // unused
		return fmt.Errorf("nbd: export %q: %w", c.export.Name, err)
	}
	c.flushLater.Func = c.flush
	c.readLater.Func = c.receive
	c.timer.Func = c.checkProgress
	c.retry.Func = c.retryStalled
	c.watch = reactor.Watch{FD: c.fd, Ready: c.ready}
	if err := c.reactor.AddWatch(&c.watch); err != nil {
		_ = c.queue.Close()        // unused
		_ = unix.Munmap(c.reserve) // unused
		return fmt.Errorf("nbd: %w", err)
	}
	c.readable = true
	c.caughtUp = c.reactor.Clock()
	c.reactor.Defer(&c.readLater)
	return nil
}

// ready is the reactor's report about the socket.
func (c *conn) ready(events uint32) {
	if c.dead {
		return
	}
	if events&unix.EPOLLOUT != 0 {
		c.blockedSend = false
		c.reactor.Defer(&c.flushLater)
	}
	if events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLRDHUP) != 0 {
		c.readable = true
		c.hangup = c.hangup || events&(unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLRDHUP) != 0
		c.receive()
		c.gather()
	}
}

// takePiece is a free piece, or nil.
func (c *conn) takePiece(o *op) *piece {
	n := len(c.freePieces) - 1
	if n < 0 {
		return nil
	}
	p := c.freePieces[n]
	c.freePieces = c.freePieces[:n]
	p.op = o
	p.request.Flags = 0
	return p
}

// takeBuffer gives p a buffer of up to length bytes, or at least one byte where
// whole is false. It fails when the connection has to wait, and sees to it that it
// will be woken.
func (c *conn) takeBuffer(p *piece, length int, whole bool) bool {
	if c.bytes+int64(length) <= c.server.config.BytesMax || c.bytes == 0 {
		if b := c.reactor.Buffers().Alloc(length); b != nil {
			p.buffer, p.source = b, bufferArena
			c.bytes += int64(length)
			return true
		}
		if length > wholeMax && c.server.takeHuge() {
			b, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err == nil {
				p.buffer, p.source = b, bufferHuge
				c.bytes += int64(length)
				return true
			}
			c.server.huge.Add(-1)
		}
	}
	if !c.reserved && (!whole || length <= reserveSize) {
		c.reserved = true
		p.buffer, p.source = c.reserve[:min(length, reserveSize)], bufferReserve
		return true
	}
	c.reactor.WaitBuffers(&c.readLater)
	if length > wholeMax && !c.retry.Armed() {
		c.reactor.Arm(&c.retry, time.Millisecond) // huge buffers may be freed on other reactors
	}
	return false
}

func (c *conn) giveBuffer(p *piece) {
	switch p.source {
	case bufferArena:
		c.bytes -= int64(len(p.buffer))
		c.reactor.FreeBuffer(p.buffer)
	case bufferReserve:
		c.reserved = false
	case bufferHuge:
		c.bytes -= int64(len(p.buffer))
		_ = unix.Munmap(p.buffer) // a mapping of ours
		c.server.huge.Add(-1)
	}
	p.buffer, p.source = nil, bufferNone
	p.request.Buf = nil
}

// freePiece makes p available, and lets receiving go on if it waited for that.
func (c *conn) freePiece(p *piece) {
	c.giveBuffer(p)
	p.op = nil
	c.freePieces = append(c.freePieces, p)
	if c.status.starved {
		c.status.starved = false
		c.nextStatus()
	}
	c.resume()
}

func (c *conn) freeOp(o *op) {
	c.freeOps = append(c.freeOps, o)
	c.counters.inFlight.Store(int64(len(c.ops) - len(c.freeOps)))
	c.resume()
}

func (c *conn) resume() {
	if c.stalled && !c.dead {
		c.stalled = false
		c.reactor.Defer(&c.readLater)
	}
}

// submit gives p to the device.
func (c *conn) submit(p *piece) {
	c.atDevice++
	c.timeSubmit(p)
	c.queue.Submit(&p.request)
}

// completed continues p's operation when the device is done with it.
func (c *conn) completed(p *piece) {
	c.atDevice--
	o := p.op
	o.pending--
	if c.dead {
		c.timeEnd(p)
		c.freePiece(p)
		c.finishIfIdle()
		return
	}
	status := p.request.Status
	errno := errnoOf(status)
	switch status {
	case datapath.StatusNotSupported:
		switch {
		case o.flags&CommandFlagFastZero != 0:
			errno = ErrnoNotSupported
		case o.command == CommandTrim || o.command == CommandCache:
			errno = ErrnoOK // hints
		}
	case datapath.StatusOverflow: // EOVERFLOW is for requests without payload, and no answer to a fast zero
		switch {
		case o.flags&CommandFlagFastZero != 0:
			errno = ErrnoNotSupported
		case o.command == CommandWrite:
			errno = ErrnoIO
		}
	}
	switch o.command {
	case CommandRead:
		c.readDone(o, p, errno)
		return
	case CommandBlockStatus:
		c.statusDone(o, p, errno)
		return
	}
	if errno != ErrnoOK && o.errno == ErrnoOK {
		o.errno = errno
	}
	if o.command == CommandWrite && errno == ErrnoOK {
		c.counters.written.Store(c.counters.written.Load() + p.request.Length)
	}
	if o.pending > 0 || o.next < o.length {
		c.timeEnd(p)
		c.freePiece(p)
		return
	}
	c.timeReply(p)
	c.freePiece(p)
	c.finish(o)
}

// finish replies to an operation that has no data.
func (c *conn) finish(o *op) {
	c.replyPlain(o, o.errno)
	c.freeOp(o)
}

// expectProgress has the client dropped if it does not move a byte for the
// stall timeout, in the middle of something.
func (c *conn) expectProgress() {
	if !c.timer.Armed() {
		c.seen = c.progress
		c.reactor.Arm(&c.timer, c.server.config.StallTimeout)
	}
}

// waiting reports whether the connection waits for its client to go on with what
// it began: to take replies, or to send the rest of a request.
func (c *conn) waiting() bool {
	return c.blockedSend || (!c.stalled && (c.state != receiveHeader || c.rxStart != c.rxEnd))
}

func (c *conn) checkProgress() {
	if c.dead || !c.waiting() {
		return
	}
	if c.progress == c.seen {
		c.fail(fmt.Errorf("no progress for %v", c.server.config.StallTimeout))
		return
	}
	c.expectProgress()
}

// retryStalled looks again for what others hold.
func (c *conn) retryStalled() { c.resume() }

// fail ends the connection for a reason worth a log line.
func (c *conn) fail(err error) {
	if !c.dead {
		c.server.log.Warn("nbd connection dropped", "export", c.export.Name, "connection", c.id, "remote", c.remote, "reason", err)
		c.kill()
	}
}

// kill stops all traffic. What is at the device runs to its end first.
func (c *conn) kill() {
	if c.dead {
		return
	}
	c.dead = true
	c.timeSent(true)
	c.reactor.CancelWait(&c.readLater)
	c.reactor.Disarm(&c.timer)
	c.reactor.Disarm(&c.retry)
	c.reactor.RemoveWatch(&c.watch)
	_ = unix.Shutdown(c.fd, unix.SHUT_RDWR) // the peer may be gone
	if p := c.filling; p != nil {
		c.filling = nil
		c.freePiece(p)
	}
	c.finishIfIdle()
}

// finishIfIdle gives everything back once nothing is at the device.
func (c *conn) finishIfIdle() {
	if c.atDevice > 0 || c.queue == nil {
		return
	}
	for c.segmentHead != c.segmentTail {
		c.popSegment()
	}
	if err := c.queue.Close(); err != nil {
		c.server.log.Error("nbd: closing a device queue", "export", c.export.Name, "error", err)
	}
	c.queue = nil
	_ = unix.Munmap(c.reserve) // a mapping of ours
	_ = unix.Close(c.fd)       // shut down before
	close(c.closed)
}

// drain finishes what has been received, refuses what comes, and closes.
//
// A client of simple replies gets no refusal: it is the kernel's, and to that
// ESHUTDOWN is an I/O error like any other (drivers/block/nbd.c, nbd_handle_reply),
// while it sends again on its next connection whatever was not answered.
func (c *conn) drain() {
	if c.dead {
		return
	}
	c.refusing = true
	c.leaving = c.leaving || !c.structured
	c.closeIfDone()
}

// closeIfDone closes a connection that is to end once it owes nothing.
func (c *conn) closeIfDone() {
	if (c.leaving || c.refusing) && !c.dead && len(c.freeOps) == len(c.ops) && c.segmentHead == c.segmentTail {
		c.kill()
	}
}
