package filter

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Trace remembers the last requests of every queue: what was asked, when, and
// how it ended. It is cheap enough to be left on.
//
// Each queue writes to a ring of its own, without locks; a dump reads the rings
// while they are written and skips a record that changes under it. The ring of a
// closed queue is kept, and used by the next queue that opens.
type Trace struct {
	datapath.Device // the device below; Close closes it

	start    time.Time
	records  int           // a queue; a power of two; immutable
	sequence atomic.Uint64 // requests submitted so far, over all queues

	mu    sync.Mutex
	rings []*traceRing // all; guarded by mu
	idle  []*traceRing // of closed queues; guarded by mu
}

// Record is one request as a Trace saw it. Records of one device are ordered by
// Sequence, the order of submission.
type Record struct {
	Sequence uint64
	Queue    int
	Op       datapath.Op
	Flags    datapath.Flags
	Offset   uint64
	Length   uint64
	Start    time.Duration // since the Trace was made
	Ended    bool          // else it is in flight, and what follows is not set
	Duration time.Duration
	Status   datapath.Status
}

// NewTrace remembers the last records requests of each queue, rounded up to a
// power of two.
func NewTrace(below datapath.Device, records int) *Trace {
	size := 1
	for size < records {
		size *= 2
	}
	return &Trace{Device: below, start: time.Now(), records: size}
}

// Unwrap is the device below.
func (d *Trace) Unwrap() datapath.Device { return d.Device }

// OpenQueue implements [datapath.Device].
func (d *Trace) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &traceQueue{dev: d, below: below, slots: make([]traceSlot, depth)}
	q.ended = q.end
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.idle); n > 0 {
		q.ring, d.idle = d.idle[n-1], d.idle[:n-1]
		return q, nil
	}
	q.ring = &traceRing{index: len(d.rings), cells: make([]traceCell, d.records)}
	d.rings = append(d.rings, q.ring)
	return q, nil
}

type traceRing struct {
	index int // immutable
	cells []traceCell
	next  uint64 // records written; owned by the reactor of the queue that uses the ring
}

// traceCell is a record that is written by one thread and read by others: while
// version is odd or changes, its words do not belong together.
type traceCell struct {
	version  atomic.Uint64
	sequence atomic.Uint64
	what     atomic.Uint64 // op, flags, status, ended
	offset   atomic.Uint64
	length   atomic.Uint64
	start    atomic.Int64
	duration atomic.Int64
}

const (
	whatFlagsShift  = 8
	whatStatusShift = 24
	whatEnded       = 1 << 32
)

type traceQueue struct {
	dev   *Trace                  // immutable
	below datapath.Queue          // immutable
	ended func(*datapath.Request) // immutable: end as a value, made once
	ring  *traceRing              // immutable

	slots []traceSlot // by tag; owned by the reactor
}

type traceSlot struct {
	done  func(*datapath.Request)
	cell  uint64 // index of the record among all of the ring
	start int64
}

// Submit implements [datapath.Queue].
func (q *traceQueue) Submit(r *datapath.Request) {
	s := &q.slots[r.Tag]
	s.done, s.cell, s.start = r.Done, q.ring.next, int64(time.Since(q.dev.start))
	r.Done = q.ended
	q.ring.next++
	c := &q.ring.cells[s.cell%uint64(len(q.ring.cells))]
	c.version.Add(1)
	c.sequence.Store(q.dev.sequence.Add(1))
	c.what.Store(uint64(r.Op) | uint64(r.Flags)<<whatFlagsShift)
	c.offset.Store(r.Offset)
	c.length.Store(r.Length)
	c.start.Store(s.start)
	c.version.Add(1)
	q.below.Submit(r)
}

func (q *traceQueue) end(r *datapath.Request) {
	s := &q.slots[r.Tag]
	if q.ring.next-s.cell <= uint64(len(q.ring.cells)) { // not overwritten meanwhile
		c := &q.ring.cells[s.cell%uint64(len(q.ring.cells))]
		c.version.Add(1)
		c.duration.Store(int64(time.Since(q.dev.start)) - s.start)
		c.what.Store(c.what.Load() | uint64(r.Status)<<whatStatusShift | whatEnded)
		c.version.Add(1)
	}
	r.Done = s.done
	s.done = nil
	r.Done(r)
}

// Close implements [datapath.Queue].
func (q *traceQueue) Close() error {
	err := q.below.Close()
	q.dev.mu.Lock()
	defer q.dev.mu.Unlock()
	q.dev.idle = append(q.dev.idle, q.ring)
	return err
}

// read copies the record out, or reports false when there is none to copy.
func (c *traceCell) read() (Record, bool) {
	before := c.version.Load()
	if before == 0 || before%2 == 1 {
		return Record{}, false
	}
	what := c.what.Load()
	r := Record{
		Sequence: c.sequence.Load(),
		Op:       datapath.Op(what),
		Flags:    datapath.Flags(what >> whatFlagsShift),
		Offset:   c.offset.Load(),
		Length:   c.length.Load(),
		Start:    time.Duration(c.start.Load()),
		Ended:    what&whatEnded != 0,
	}
	if r.Ended {
		r.Status = datapath.Status(what >> whatStatusShift)
		r.Duration = time.Duration(c.duration.Load())
	}
	return r, c.version.Load() == before
}

// Records are the requests remembered, in order of submission. Any goroutine.
func (d *Trace) Records() []Record {
	d.mu.Lock()
	rings := slices.Clone(d.rings)
	d.mu.Unlock()
	var all []Record
	for _, ring := range rings {
		for i := range ring.cells {
			if r, ok := ring.cells[i].read(); ok {
				r.Queue = ring.index
				all = append(all, r)
			}
		}
	}
	slices.SortFunc(all, func(a, b Record) int { return int(int64(a.Sequence - b.Sequence)) })
	return all
}

// flagNames name the flags in the order of their bits.
var flagNames = []string{"fua", "no-unmap", "fast-zero", "one-extent"}

func (r *Record) what() string {
	var b strings.Builder
	b.WriteString(r.Op.String())
	if r.Op != datapath.OpFlush {
		fmt.Fprintf(&b, " %d+%d", r.Offset, r.Length)
	}
	for i, name := range flagNames {
		if r.Flags>>i&1 == 1 {
			b.WriteString(" " + name)
		}
	}
	return b.String()
}

// String is the record as a line for people: start in seconds, queue, request,
// result.
func (r Record) String() string {
	result := "in flight"
	if r.Ended {
		result = fmt.Sprintf("%s in %v", r.Status, r.Duration)
	}
	return fmt.Sprintf("%.6f q%d %s: %s", r.Start.Seconds(), r.Queue, r.what(), result)
}

// WriteText writes the records as lines for people.
func (d *Trace) WriteText(w io.Writer) error {
	b := bufio.NewWriter(w)
	for _, r := range d.Records() {
		_, _ = fmt.Fprintln(b, r) // Flush reports what went wrong
	}
	return b.Flush()
}

// jsonRecord is a Record with names and units for other programs.
type jsonRecord struct {
	Sequence        uint64   `json:"sequence"`
	Queue           int      `json:"queue"`
	Op              string   `json:"op"`
	Flags           []string `json:"flags,omitempty"`
	Offset          uint64   `json:"offset"`
	Length          uint64   `json:"length"`
	StartSeconds    float64  `json:"start_seconds"`
	Status          string   `json:"status,omitempty"`
	DurationSeconds float64  `json:"duration_seconds,omitempty"`
}

// MarshalJSON implements json.Marshaler. A request in flight has no status.
func (r Record) MarshalJSON() ([]byte, error) {
	j := jsonRecord{
		Sequence: r.Sequence, Queue: r.Queue, Op: r.Op.String(), Offset: r.Offset, Length: r.Length,
		StartSeconds: r.Start.Seconds(),
	}
	for i, name := range flagNames {
		if r.Flags>>i&1 == 1 {
			j.Flags = append(j.Flags, name)
		}
	}
	if r.Ended {
		j.Status, j.DurationSeconds = r.Status.String(), r.Duration.Seconds()
	}
	return json.Marshal(j)
}

// WriteJSON writes the records as JSON, one a line.
func (d *Trace) WriteJSON(w io.Writer) error {
	b := bufio.NewWriter(w)
	encoder := json.NewEncoder(b)
	for _, r := range d.Records() {
		if err := encoder.Encode(r); err != nil {
			return fmt.Errorf("trace: %w", err)
		}
	}
	return b.Flush()
}

// Golden is the order of the changes and flushes remembered, one a line, without
// anything that differs between runs: the text to compare a commit's writes with.
// A request that failed says so.
func (d *Trace) Golden() string {
	var b strings.Builder
	for _, r := range d.Records() {
		switch r.Op {
		case datapath.OpWrite, datapath.OpFlush, datapath.OpDiscard, datapath.OpWriteZeroes:
		default:
			continue
		}
		b.WriteString(r.what())
		if !r.Ended {
			b.WriteString(": in flight")
		} else if r.Status != datapath.StatusOK {
			b.WriteString(": " + r.Status.String())
		}
		b.WriteByte('\n')
	}
	return b.String()
}
