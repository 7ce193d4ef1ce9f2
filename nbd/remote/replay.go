package remote

import (
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath"
)

// replaySlots is how many retained changes are written again at once.
const replaySlots = 32

// replay writes retained changes again, in the order they were acknowledged in as
// far as they overlap. Owned by the core.
type replay struct {
	core     *core
	slots    [replaySlots]slot
	requests [replaySlots]datapath.Request
	busy     [replaySlots]bool
	inflight int
	entry    uint64 // the next to send
	skip     uint64 // bytes of it that are sent
}

func (p *replay) init(c *core) {
	p.core = c
	for i := range p.slots {
		s := &p.slots[i]
		s.up = &p.requests[i]
		s.wire.Done = func(*nbdRequest) { c.answered(s) }
	}
}

// begin starts over with the oldest change.
func (p *replay) begin() { p.entry, p.skip = p.core.retention.entryHead, 0 }

// end forgets what is on the wire: the wire is gone.
func (p *replay) end() {
	p.inflight = 0
	p.busy = [replaySlots]bool{}
}

// run sends as much as it may and reports whether all has been written.
func (p *replay) run() (done bool) {
	t := &p.core.retention
	for p.entry < t.entryTail {
		i := p.freeSlot()
		if i < 0 {
			return false
		}
		s := &p.slots[i]
		p.requests[i] = t.piece(p.entry, p.skip)
		if p.overlapped(s) {
			return false
		}
		if p.skip += s.up.Length; p.skip == t.entries[p.entry%entriesMax].length {
			p.entry, p.skip = p.entry+1, 0
		}
		p.busy[i] = true
		p.inflight++
		s.at = 0
		p.core.send(s)
	}
	return p.inflight == 0
}

func (p *replay) freeSlot() int {
	for i, busy := range p.busy {
		if !busy {
			return i
		}
	}
	return -1
}

func (p *replay) overlapped(s *slot) bool {
	for i := range p.slots {
		if p.busy[i] && p.slots[i].overlaps(s) {
			return true
		}
	}
	return false
}

// answered takes the server's answer. A change it acknowledged once and refuses now
// cannot be had again elsewhere: nothing else may be served as if it were there.
func (p *replay) answered(s *slot, status datapath.Status) {
	for i := range p.slots {
		if s == &p.slots[i] {
			p.busy[i] = false
			p.inflight--
		}
	}
	if status != datapath.StatusOK && s.up.Op != datapath.OpDiscard { // a discard promises no content
		reason := fmt.Sprintf("the server came back and refuses a %s of %d bytes at %d that it had acknowledged: %s", s.up.Op, s.up.Length, s.up.Offset, status)
		p.core.served = false // no hurry to see it again
		p.core.lost(fmt.Errorf("%s", reason))
		p.core.refuse(reason)
		return
	}
	p.core.advance()
}
