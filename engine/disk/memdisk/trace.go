package memdisk

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ashlar-storage/ashlar/datapath"
)

// What an [Event] can be beside a write, write-zeroes, discard or flush.
const (
	OpMark   = datapath.OpCount + iota // a Mark; Label and Mark are set
	OpPoke                             // Poke or Corrupt: durable at once
	OpResize                           // Truncate: durable at once; Length is the size
)

// Event is one line of a trace: a change or flush, when it was submitted, or
// something a test did. Requests that failed and reads are not in a trace.
//
// Ownership: Data is shared with the disk and with images; it is read only.
type Event struct {
	Seq    uint64 // one more than that of the event before
	Disk   int    // in the group
	Op     datapath.Op
	Offset uint64
	Length uint64
	FUA    bool
	Data   []byte // of a write or poke

	// Ended is the Seq of the last event before the completion: the request had
	// completed when event Ended+1 was submitted. 0: it is in flight.
	Ended uint64

	Lost   bool   // acknowledged and not stored, see LoseWrite
	Stored uint64 // the offset it went to; Offset unless it was misdirected

	Label string // of a mark
	Mark  int    // of a mark: how many there are up to it
}

// String is the event as a line of a script: "write 4096 @ 8192 fua", "flush",
// "mark LABEL". The disk is not in it.
func (e Event) String() string {
	var s string
	switch e.Op {
	case datapath.OpFlush:
		return "flush"
	case OpMark:
		return "mark " + e.Label
	case OpResize:
		return fmt.Sprintf("resize %d", e.Length)
	case OpPoke:
		return fmt.Sprintf("poke %d @ %d", e.Length, e.Offset)
	default:
		s = fmt.Sprintf("%s %d @ %d", e.Op, e.Length, e.Offset)
	}
	if e.FUA {
		s += " fua"
	}
	if e.Lost {
		s += " lost"
	} else if e.Stored != e.Offset {
		s += fmt.Sprintf(" stored @ %d", e.Stored)
	}
	return s
}

// Script is a trace as text, one event a line, for golden tests. When it tells of
// several disks each line but marks begins with "disk N: ".
func Script(trace []Event) string {
	several := slices.ContainsFunc(trace, func(e Event) bool { return e.Disk != 0 })
	var b strings.Builder
	for _, e := range trace {
		if several && e.Op != OpMark {
			fmt.Fprintf(&b, "disk %d: ", e.Disk)
		}
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// StartTrace forgets the last trace and records from now on. It returns a clone
// of the group as it is now, the base of the trace's images. No request should be
// in flight: one that is counts in images as completed without FUA.
func (g *Group) StartTrace() (base *Group) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tracing, g.trace, g.marks = true, []Event{}, 0
	return g.cloneLocked()
}

// StopTrace stops recording and returns the trace.
func (g *Group) StopTrace() []Event {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tracing = false
	return slices.Clone(g.trace)
}

// Trace is what was recorded since StartTrace, oldest first.
func (g *Group) Trace() []Event {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.trace)
}

// Mark puts a mark into the trace and returns its number, from 1 on. What had
// completed before is complete in every image that knows of the mark. Without a
// trace it does nothing.
func (g *Group) Mark(label string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.tracing {
		return 0
	}
	g.marks++
	g.endLocked(g.recordLocked(Event{Op: OpMark, Label: label, Mark: g.marks}))
	return g.marks
}

// recordLocked gives an event its number and puts it into the trace, if there is
// one.
func (g *Group) recordLocked(e Event) uint64 {
	g.clock++
	if g.tracing {
		e.Seq = g.clock
		g.trace = append(g.trace, e)
	}
	return g.clock
}

// endLocked notes that an event has completed.
func (g *Group) endLocked(order uint64) {
	if !g.tracing || len(g.trace) == 0 || order < g.trace[0].Seq {
		return
	}
	g.trace[order-g.trace[0].Seq].Ended = g.clock
}

// StartTrace is [Group.StartTrace] of the disk's group; the base is this disk's
// clone in the clone of the group.
func (d *Disk) StartTrace() (base *Disk) { return d.group.StartTrace().disks[d.index] }

// StopTrace is [Group.StopTrace] of the disk's group.
func (d *Disk) StopTrace() []Event { return d.group.StopTrace() }

// Trace is [Group.Trace] of the disk's group.
func (d *Disk) Trace() []Event { return d.group.Trace() }

// Mark is [Group.Mark] of the disk's group.
func (d *Disk) Mark(label string) int { return d.group.Mark(label) }
