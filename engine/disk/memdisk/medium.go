package memdisk

import (
	"cmp"
	"slices"

	"github.com/ashlar-storage/ashlar/datapath"
)

// span is the bytes from, up to and without, to.
type span struct{ from, to uint64 }

// change is one write, discard or write-zeroes that may still be lost, or one
// that is durable while an older one is not.
type change struct {
	order   uint64      // its event's number; the order in which reads see changes
	op      datapath.Op // of the request
	offset  uint64
	length  uint64
	data    []byte // nil: zeros; never changed
	fua     bool
	ended   uint64 // the number of the last event before its completion; 0: in flight
	durable bool
}

func (c *change) span() span { return span{c.offset, c.offset + c.length} }

// apply does the part s of c.
func (c *change) apply(to *content, s span) {
	if s.from >= s.to {
		return
	}
	if c.data == nil {
		to.zero(s.from, s.to-s.from)
		return
	}
	to.write(c.data[s.from-c.offset:s.to-c.offset], s.from)
}

// medium is what survives: durable content, and the log of changes since. A live
// disk and the replay of a trace run the same medium.
type medium struct {
	durable content
	log     []change // by order; the first is not durable
}

func (m *medium) add(c change) {
	m.log = append(m.log, c)
	if c.durable {
		m.settle()
	}
}

// end is told that the change with that order has completed, when the last event
// was now. It reports whether something became durable.
func (m *medium) end(order, now uint64) bool {
	i, found := slices.BinarySearchFunc(m.log, order, func(c change, order uint64) int { return cmp.Compare(c.order, order) })
	if !found {
		return false // it was never stored
	}
	m.log[i].ended = now
	if !m.log[i].fua {
		return false
	}
	m.log[i].durable = true
	m.settle()
	return true
}

// flush is told that the flush with that order has completed: what had completed
// when it was submitted is durable. It reports whether something became so.
func (m *medium) flush(order uint64) (changed bool) {
	for i := range m.log {
		c := &m.log[i]
		if c.ended != 0 && c.ended < order && !c.durable {
			c.durable, changed = true, true
		}
	}
	m.settle()
	return changed
}

// settle moves durable changes into the durable content, up to the first that is
// not: an older change may not come back over them.
func (m *medium) settle() {
	n := 0
	for n < len(m.log) && m.log[n].durable {
		m.log[n].apply(&m.durable, m.log[n].span())
		n++
	}
	if n > 0 {
		m.log = slices.Delete(m.log, 0, n)
	}
}

// cut makes everything past size gone.
func (m *medium) cut(size, old uint64) {
	if size >= old {
		return
	}
	m.durable.zero(size, old-size)
	for i := range m.log {
		c := &m.log[i]
		if c.offset+c.length <= size {
			continue
		}
		c.offset = min(c.offset, size)
		c.length = size - c.offset
		if c.data != nil {
			c.data = c.data[:c.length]
		}
	}
}

// pick is a change of the log that a crash keeps, whole or in parts.
type pick struct {
	disk  int    // in the group
	index int    // in the log
	torn  bool   // else the whole change
	parts []span // of the change, when torn
}

// resolve gives c, the durable content before log, what a crash leaves of log:
// all that is durable, and of the rest what is picked, in the order of picks.
func resolve(c *content, log []change, picks []pick) {
	for i := range log {
		if log[i].durable {
			log[i].apply(c, log[i].span())
		}
	}
	for _, p := range picks {
		parts := p.parts
		if !p.torn {
			parts = []span{log[p.index].span()}
		}
		for later := p.index + 1; later < len(log); later++ {
			if log[later].durable {
				parts = without(parts, log[later].span())
			}
		}
		for _, s := range parts {
			log[p.index].apply(c, s)
		}
	}
}

// without is parts less s. It does not change parts.
func without(parts []span, s span) []span {
	if !slices.ContainsFunc(parts, func(p span) bool { return p.from < s.to && s.from < p.to }) {
		return parts
	}
	var left []span
	for _, p := range parts {
		if p.from >= s.to || s.from >= p.to {
			left = append(left, p)
			continue
		}
		if p.from < s.from {
			left = append(left, span{p.from, s.from})
		}
		if s.to < p.to {
			left = append(left, span{s.to, p.to})
		}
	}
	return left
}
