package remote

import (
	"fmt"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
	"github.com/ashlar-storage/ashlar/nbd/internal/list"
)

type nbdRequest = nbd.LinkRequest

// phase is how far a session has come.
type phase uint8

const (
	phaseAway    phase = iota // there is no session
	phaseReplay               // acknowledged, unflushed changes are written again
	phaseSettle               // the old connections get time to end
	phaseReissue              // changes that were on the wire are sent again
	phaseOnline               // everything goes
)

// core is the one owner of all requests and connections of a device. Everything
// runs on its reactor.
type core struct {
	device *Device
	phase  phase

	links    []*nbd.Link
	next     int    // whose turn it is
	sessions uint64 // adopted
	served   bool   // the session has answered something

	all       list.List[slot] // every request that has not ended, in the order of arrival
	todo      list.List[slot] // those of all that wait for a wire, and for nothing else
	unended   int
	held      int // those that wait for an overlapping change
	wired     int // those on a wire, the core's own included
	reissuing int // phaseReissue: not answered yet

	retention   retention
	replay      replay
	flush       slot // the core's own, to make room in the retention
	flushWanted bool
	flushFailed bool // sticky: no flush can be promised any more

	lostAt int64 // when the session before this one ended
	settle reactor.Timer

	failing string // why requests end at once; "" if they do not

	tick     reactor.Timer // armed while anything has not ended
	tickTime time.Duration
	moved    int64  // when a request ended last, or the first arrived
	heard    int64  // when bytes came last, or the first request was sent
	received uint64 // bytes, when the timer ran last
}

// start makes the core ready for its first session.
func (c *core) start(d *Device) error {
	c.device = d
	info := d.info.Load()
	if info.Has(datapath.FeatureFlush) && !info.ReadOnly {
		if err := c.retention.open(d.config.RetainBytes); err != nil {
			return err
		}
	}
	c.replay.init(c)
	c.flush.up = &datapath.Request{Op: datapath.OpFlush}
	c.flush.wire.Done = func(*nbdRequest) { c.answered(&c.flush) }
	c.tick.Func = c.watch
	c.settle.Func = c.advance
	c.tickTime = max(min(d.config.StallTimeout, d.config.DeadTimeout)/8, time.Millisecond)
	return nil
}

// close ends the session. No request is left.
func (c *core) close() {
	c.phase = phaseAway
	if c.device != nil {
		c.device.reactor.Disarm(&c.tick)
		c.device.reactor.Disarm(&c.settle)
	}
	for _, l := range c.links {
		if c.wired == 0 {
			l.Close()
		} else {
			l.Cut()
		}
	}
	if c.device != nil {
		c.device.bury(c.links)
	}
	c.links = nil
	c.retention.close()
}

// adopt begins a session on links, or refuses them.
func (c *core) adopt(links []*nbd.Link) error {
	d := c.device
	if reason := d.check(links[0]); reason != "" {
		_ = d.abandon(links) // it does not fail
		c.refuse(reason)
		return fmt.Errorf("remote: %s: %s", d.config.URI, reason)
	}
	for i, l := range links {
		if err := l.Start(d.reactor, c.lost); err != nil {
			for _, l := range links[:i] {
				l.Cut()
			}
			_ = d.abandon(links[i:]) // it does not fail
			d.bury(links[:i])
			c.stillAway(err)
			return err
		}
	}
	c.links, c.next, c.served = links, 0, false
	c.received, c.heard = 0, d.reactor.Now()
	c.sessions++
	if size := describe(d.config.URI, links[0]).Size; size != d.info.Load().Size {
		d.log.Info("remote size", "from", d.info.Load().Size, "to", size)
		info := *d.info.Load()
		info.Size = size
		d.info.Store(&info)
	}
	c.phase = phaseReplay
	c.replay.begin()
	c.advance()
	return nil
}

// advance goes on to the next phase when one is over.
func (c *core) advance() {
	if c.phase == phaseReplay && c.replay.run() {
		c.phase = phaseSettle
	}
	if c.phase == phaseSettle {
		if wait := c.lostAt + int64(c.device.config.resend) - c.device.reactor.Clock(); wait > 0 && c.anySent() {
			c.device.reactor.Arm(&c.settle, time.Duration(wait))
			return
		}
		c.phase = phaseReissue
		c.reissuing = 0
		for s := c.all.First(); s != nil; s = s.order.Next() {
			if s.sent && s.up.Modifies() {
				c.reissuing++
				c.send(s)
			}
		}
	}
	if c.phase == phaseReissue && c.reissuing == 0 {
		c.phase = phaseOnline
		c.failing = ""
		c.setState(Online, "")
		c.pump()
	}
}

// anySent reports whether a change was on a wire that is gone.
func (c *core) anySent() bool {
	for s := c.all.First(); s != nil; s = s.order.Next() {
		if s.sent && s.up.Modifies() {
			return true
		}
	}
	return false
}

// arrived takes over a request.
func (c *core) arrived(s *slot) {
	s.at, s.mark, s.status = 0, 0, datapath.StatusOK
	s.sent, s.wired, s.held, s.reserved, s.zero = false, false, false, false, true
	if c.failing != "" || s.up.Op == datapath.OpFlush && c.flushFailed {
		s.status = datapath.StatusIO
		s.queue.give(s)
		return
	}
	if c.unended == 0 {
		c.moved = c.device.reactor.Now()
		c.arm()
	}
	c.unended++
	c.all.Push(&s.order, s)
	if s.up.Modifies() && c.overlapped(s) {
		s.held = true
		c.held++
		return
	}
	c.todo.Push(&s.todo, s)
}

// overlapped reports whether an earlier change of the same bytes has not ended.
func (c *core) overlapped(s *slot) bool {
	for e := s.order.Prev(); e != nil; e = e.order.Prev() {
		if e.up.Modifies() && e.overlaps(s) {
			return true
		}
	}
	return false
}

// letGo frees requests that waited for one that has ended.
func (c *core) letGo() {
	for s := c.all.First(); s != nil && c.held > 0; s = s.order.Next() {
		if s.held && !c.overlapped(s) {
			s.held = false
			c.held--
			c.todo.Push(&s.todo, s)
		}
	}
}

// pump sends what may be sent.
func (c *core) pump() {
	for c.phase == phaseOnline && c.todo.First() != nil {
		s := c.todo.First()
		if s.up.Modifies() && c.retention.on() && !s.reserved {
			if !c.retention.reserve(s.up) {
				c.flushWanted = true
				break
			}
			s.reserved = true
		}
		c.todo.Pop()
		c.send(s)
	}
	if c.flushWanted && c.phase == phaseOnline && !c.flush.wired && !c.retention.empty() {
		c.flushWanted = false
		c.flush.at = 0
		c.send(&c.flush)
	}
}

// send gives the next piece of s to a link.
func (c *core) send(s *slot) {
	l := c.links[c.next]
	if c.next++; c.next == len(c.links) {
		c.next = 0
	}
	s.fill(l, uint64(c.device.info.Load().MinIO))
	if s.up.Op == datapath.OpFlush {
		s.mark = c.retention.entryTail
	}
	if c.wired == 0 {
		c.heard = c.device.reactor.Now()
		c.arm()
	}
	s.sent, s.wired = true, true
	c.wired++
	l.Submit(&s.wire)
}

// answered takes the server's answer to a piece.
func (c *core) answered(s *slot) {
	if s.wire.Errno == nbd.ErrnoShutdown { // it will be asked again, on another connection
		c.lost(fmt.Errorf("the server is shutting down"))
		return
	}
	c.wired--
	s.wired = false
	c.served = true
	c.moved = c.device.reactor.Now()
	status := statusOf(s.wire.Errno)
	s.zero = s.zero && s.wire.Zero
	if s.at += s.wire.Length; status == datapath.StatusOK && s.at < s.up.Length && s.up.Op != datapath.OpExtents {
		c.send(s)
		return
	}
	switch {
	case s == &c.flush:
		c.flushed(s, status)
		c.pump()
	case s.queue == nil:
		c.replay.answered(s, status)
	default:
		c.end(s, status)
	}
}

// end hands a request back.
func (c *core) end(s *slot, status datapath.Status) {
	switch {
	case s.up.Op == datapath.OpFlush:
		if c.flushed(s, status); c.flushFailed {
			status = datapath.StatusIO
		}
	case s.reserved && !c.retention.on(): // a flush has failed meanwhile
	case s.reserved && status == datapath.StatusOK:
		c.retention.add(s.up)
		c.flushWanted = c.flushWanted || c.retention.crowded()
	case s.reserved:
		c.retention.release(s.up)
		c.flushWanted = true // what lies there now must not be replaced by what is older
	}
	c.all.Remove(&s.order)
	c.unended--
	if c.held > 0 && s.up.Modifies() {
		c.letGo()
	}
	reissued := c.phase == phaseReissue && s.up.Modifies()
	s.status = status
	s.queue.give(s) // from here on it is the queue's
	if reissued {
		c.reissuing--
		c.advance()
		return
	}
	c.pump()
}

// flushed notes the result of a flush. A failed one is final: the server may have
// dropped the data, and a later one would succeed without it.
func (c *core) flushed(s *slot, status datapath.Status) {
	switch {
	case c.flushFailed:
	case status == datapath.StatusOK:
		c.retention.forget(s.mark)
	default:
		c.flushFailed = true
		c.device.log.Error("remote flush failed: no later flush of this device succeeds", "status", status)
		c.retention.close()
	}
}

// lost ends the session: what is on the wire is kept for the next one.
func (c *core) lost(err error) {
	if c.phase == phaseAway {
		return
	}
	c.phase = phaseAway
	c.lostAt = c.device.reactor.Clock()
	c.device.reactor.Disarm(&c.settle)
	for _, l := range c.links {
		l.Cut()
	}
	c.device.bury(c.links)
	c.links, c.wired = nil, 0
	c.flush.wired = false
	c.replay.end()
	c.todo = list.List[slot]{}
	for s := c.all.First(); s != nil; s = s.order.Next() {
		s.wired, s.at, s.zero = false, 0, true
		if !s.held && !(s.sent && s.up.Modifies()) { // those go first, see advance
			c.todo.Push(&s.todo, s)
		}
	}
	if c.failing == "" {
		c.setState(Waiting, err.Error())
	}
	c.reconnect()
}

// reconnect asks the connector for a session.
func (c *core) reconnect() {
	select {
	case c.device.want <- c.served:
	default: // it has been asked already
	}
}

// stillAway notes why there is no session yet.
func (c *core) stillAway(err error) {
	if c.failing == "" {
		c.setState(Waiting, err.Error())
	}
}

// refuse has requests fail until a session is good.
func (c *core) refuse(reason string) {
	c.failing = reason
	c.setState(Failed, reason)
	c.failAll(datapath.StatusIO)
}

// failAll ends every request. What was acknowledged is kept.
func (c *core) failAll(status datapath.Status) {
	c.todo = list.List[slot]{}
	c.held = 0
	for s := c.all.First(); s != nil; s = c.all.First() {
		c.all.Remove(&s.order)
		c.unended--
		if s.reserved && c.retention.on() {
			c.retention.release(s.up)
		}
		s.status = status
		s.queue.give(s)
	}
}

func (c *core) arm() {
	if !c.tick.Armed() {
		c.device.reactor.Arm(&c.tick, c.tickTime)
	}
}

// watch runs while anything has not ended and looks for a server that is silent,
// and for requests that have waited too long.
func (c *core) watch() {
	if c.unended == 0 && c.wired == 0 {
		return
	}
	now := c.device.reactor.Now()
	received := uint64(0)
	for _, l := range c.links {
		received += l.Received()
	}
	if received != c.received {
		c.received, c.heard = received, now
	}
	if c.wired > 0 && now-c.heard >= int64(c.device.config.StallTimeout) {
		c.lost(fmt.Errorf("the server has not answered for %v", c.device.config.StallTimeout))
	}
	if c.unended > 0 && now-c.moved >= int64(c.device.config.DeadTimeout) {
		c.lost(fmt.Errorf("the server is silent"))
		c.refuse(fmt.Sprintf("nothing was answered for %v: %s", c.device.config.DeadTimeout, c.device.State().Reason))
	}
	if c.unended > 0 || c.wired > 0 {
		c.arm()
	}
}
