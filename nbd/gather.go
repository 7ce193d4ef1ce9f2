package nbd

import "time"

const (
	// gatherTime is how long to let requests gather: what a client of depth 32 takes to
	// send seven (4 KiB reads by fio, 4.2 µs each). Shorter gains less, longer leaves it
	// without replies.
	gatherTime = 30 * time.Microsecond
	// gatherEnough is how many requests of one look need no gathering.
	gatherEnough = 8
	// gatherIdle is how long a look may find nothing in a stream. It is less than what a
	// client takes from a reply to its next request.
	gatherIdle = 6 * time.Microsecond
	// gatherAfter and gatherAfterMax bound the looks in a row that find requests before
	// it is tried.
	gatherAfter    = 8
	gatherAfterMax = 1 << 14
)

// gathering finds out that a client sends faster than the server looks, but one request
// at a time, and lets some gather.
//
// A client that keeps many requests in flight sends the next as it takes each reply. The
// server, which is done sooner, finds one or two of them each time it looks, and pays the
// looking and the reply's system call for one or two (5.5 µs of CPU a read, where 3.6 do for
// eight), and the client is slower for it. So it does not look for a while.
//
// The client must have more in flight than gathers, or it waits for replies meanwhile. That
// shows in the look that ends the lull, and in the one that follows the replies: if either finds
// nothing, the client had nothing left to send, and gathering is tried half as often.
type gathering struct {
	looks  int // in a row, without idling, with nobody else's work, that found requests
	needed int // of them before it is tried; 0: never
	state  gatherState
	found  uint64 // what the reactor will have found before the next look if nobody else has work
}

type gatherState uint8

const (
	gatherNone    gatherState = iota
	gatherLull                // the next look takes what has gathered
	gatherReplied             // the next look tells whether the client had more
)

// startGathering: the replies must leave in the turn in which the requests came, by this
// thread, or there is no use in waiting for more.
func (c *conn) startGathering() {
	if c.immediate && !c.encrypted {
		c.needed = gatherAfter
	}
}

// gather is called when receive has taken what was reported, and may ask the reactor for a
// lull.
func (c *conn) gather() {
	found, idle := c.reactor.Activity()
	if c.needed > 0 && c.look(found, idle, c.begun, c.taken) {
		c.reactor.Lull(gatherTime)
	}
}

// look learns from one look at the socket, and reports whether the next should wait.
// found and idle are the reactor's Activity; begun are the requests that were found, taken
// the bytes of writes among them: a client's writes fill its socket, so that it waits sooner,
// and they gather by themselves.
func (g *gathering) look(found uint64, idle time.Duration, begun, taken int) bool {
	stream := idle <= gatherIdle && found == g.found && taken == 0 && begun > 0
	g.found = found + 1
	state := g.state
	g.state = gatherNone
	switch {
	case state != gatherNone && idle > 0:
		g.looks, g.needed = 0, min(2*g.needed, gatherAfterMax)
		return false
	case state == gatherReplied:
		g.needed = max(g.needed/2, gatherAfter)
	}
	if !stream {
		g.looks = 0
		return false
	}
	if state == gatherLull {
		g.state = gatherReplied
		return false
	}
	if g.looks++; g.looks < g.needed || begun >= gatherEnough {
		return false
	}
	g.state = gatherLull
	return true
}
