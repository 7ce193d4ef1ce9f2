package nbd

import "github.com/ashlar-storage/ashlar/datapath"

// repliesMax is how many requests may be timed to the moment their reply is sent. It
// is what a turn answers at most in most cases; others count as sent when they are
// queued for it.
const repliesMax = 128

// timing is what a connection needs to time its requests by stage. It belongs to
// the reactor.
type timing struct {
	timed     bool  // the device records it; else nothing here is used
	readAt    int64 // when the bytes that are parsed came
	roundAt   int64 // when this call of receive began, or read last
	stalledAt int64 // since when a payload waits for room; 0: none does

	replies []timedReply // queued for sending, oldest first
	queued  int          // of these, those whose tail is set
}

// timedReply is a reply on its way to the socket.
type timedReply struct {
	timing datapath.Timing
	tail   uint32 // it is gone when segmentHead has come here
}

func (c *conn) startTiming() {
	if c.timed = c.info.Has(datapath.FeatureTimed); c.timed {
		c.replies = make([]timedReply, 0, min(repliesMax, len(c.ops)))
	}
}

// timeRound notes that parsing begins or goes on.
func (c *conn) timeRound() {
	if !c.timed {
		return
	}
	c.roundAt = max(c.reactor.Recent(), c.readAt)
	if c.stalledAt != 0 {
		if c.payloadOp != nil {
			c.payloadOp.waited += c.roundAt - c.stalledAt
		}
		c.stalledAt = 0
	}
}

// timeRead notes that bytes came from the socket.
func (c *conn) timeRead() {
	if c.timed {
		c.readAt = c.reactor.Tick()
		c.roundAt = c.readAt
	}
}

// timeBegin notes the arrival of a request: with the bytes that are parsed, which
// may have waited for room since.
func (c *conn) timeBegin(o *op) {
	if c.timed {
		o.arrived, o.waited = c.readAt, c.roundAt-c.readAt
	}
}

// timeStall notes that the payload of a write waits for room.
func (c *conn) timeStall() {
	if c.timed && c.state == receivePayload {
		c.stalledAt = c.reactor.Tick()
	}
}

// timeSubmit starts the clock of a piece. Of a write, what came in since the request
// arrived is its payload, unless there was no room for it.
func (c *conn) timeSubmit(p *piece) {
	if !c.timed {
		return
	}
	t, o := &p.timing, p.op
	p.request.Timing = t
	t.Begin(datapath.StageReceive, o.arrived)
	if o.command == CommandWrite {
		if o.waited > 0 {
			t.Enter(datapath.StageQueue, o.arrived)
			t.Enter(datapath.StageReceive, o.arrived+o.waited)
		}
		t.Enter(datapath.StageQueue, c.readAt)
		return
	}
	t.Enter(datapath.StageQueue, o.arrived)
}

// timeReply notes that the reply to p is queued, or will be in this callback.
func (c *conn) timeReply(p *piece) {
	switch {
	case !c.timed:
	case len(c.replies) == cap(c.replies):
		p.timing.End(c.reactor.Recent())
	default:
		c.replies = append(c.replies, timedReply{timing: p.timing})
	}
}

// timeEnd ends the timing of a piece that has no reply of its own.
func (c *conn) timeEnd(p *piece) {
	if c.timed {
		p.timing.End(c.reactor.Recent())
	}
}

// timeFlush notes what is queued before it is sent.
func (c *conn) timeFlush() {
	for ; c.queued < len(c.replies); c.queued++ {
		c.replies[c.queued].tail = c.segmentTail
	}
}

// timeSent ends the timing of the replies that are gone, or of all.
func (c *conn) timeSent(all bool) {
	if len(c.replies) == 0 {
		return
	}
	n, now := 0, c.reactor.Tick()
	for n < len(c.replies) && (all || n < c.queued && int32(c.segmentHead-c.replies[n].tail) >= 0) {
		c.replies[n].timing.End(now)
		n++
	}
	c.replies = c.replies[:copy(c.replies, c.replies[n:])]
	c.queued = max(c.queued-n, 0)
}
