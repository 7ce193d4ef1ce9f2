package devtest

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// History records reads and writes of blocks from many places and says whether
// they could have come from one register a block: whether there is one order of
// all operations on a block, in keeping with their real times, in which every
// read returns the last value written.
//
// Every write of a block stores a value of its own. That makes the check exact
// and fast (P. Gibbons, E. Korach, "Testing Shared Memories", 1997, section 4.2):
// a write and the reads that return it must lie together in the order, so it is
// enough that no two such groups have to be in each other's way.
type History struct {
	clock atomic.Int64

	mu        sync.Mutex
	recorders []*Recorder // guarded by mu
}

// Operation is one read or write of one block.
type Operation struct {
	Recorder   int
	Write      bool
	Block      uint64
	Value      uint64 // written or read; 0 is what the block held before every write
	Start, End int64  // on the history's clock; End is EndUnknown when it is not known to have happened
}

// EndUnknown is the End of an operation whose result is not known: a write that
// failed or is in flight may have happened, may happen later, or never.
const EndUnknown = math.MaxInt64

// String is the operation for people.
func (o Operation) String() string {
	kind, end := "read", fmt.Sprint(o.End)
	if o.Write {
		kind = "write"
	}
	if o.End == EndUnknown {
		end = "?"
	}
	return fmt.Sprintf("[%d,%s] recorder %d: %s of block %d, value %#x", o.Start, end, o.Recorder, kind, o.Block, o.Value)
}

// Recorder is the history of one goroutine or reactor.
type Recorder struct {
	history    *History
	index      int
	operations []Operation
}

// Recorder makes a recorder. Any goroutine.
func (h *History) Recorder() *Recorder {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := &Recorder{history: h, index: len(h.recorders)}
	h.recorders = append(h.recorders, r)
	return r
}

// Write begins a write of value, which no other write of the block stores and is
// not 0. It is called before the write is submitted.
func (r *Recorder) Write(block, value uint64) (token int) {
	return r.begin(Operation{Recorder: r.index, Write: true, Block: block, Value: value})
}

// Read begins a read of a block. It is called before the read is submitted.
func (r *Recorder) Read(block uint64) (token int) {
	return r.begin(Operation{Recorder: r.index, Block: block})
}

func (r *Recorder) begin(o Operation) int {
	o.Start, o.End = r.history.clock.Add(1), EndUnknown
	r.operations = append(r.operations, o)
	return len(r.operations) - 1
}

// Wrote ends a write that succeeded. A write that failed is not ended.
func (r *Recorder) Wrote(token int) { r.operations[token].End = r.history.clock.Add(1) }

// Got ends a read that succeeded with the value it returned. A read that failed
// is not ended.
func (r *Recorder) Got(token int, value uint64) {
	r.operations[token].Value = value
	r.operations[token].End = r.history.clock.Add(1)
}

// Operations are all operations recorded. The recorders rest.
func (h *History) Operations() []Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []Operation
	for _, r := range h.recorders {
		all = append(all, r.operations...)
	}
	return all
}

// Check reports every block whose operations have no such order. The recorders
// rest.
func (h *History) Check() error {
	blocks := make(map[uint64][]Operation)
	for _, o := range h.Operations() {
		blocks[o.Block] = append(blocks[o.Block], o)
	}
	var errs []error
	for _, operations := range blocks {
		if err := checkRegister(operations); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// cluster is a write and the reads that returned it. All of it lies together in
// any order that explains the history: from minEnd, the first end, to maxStart,
// the last start, the block surely held the value if minEnd < maxStart.
type cluster struct {
	write            Operation
	witness          Operation // the one with the last start
	reads            int
	minEnd, maxStart int64
}

func (c *cluster) forward() bool { return c.minEnd < c.maxStart }

func checkRegister(operations []Operation) error {
	clusters := map[uint64]*cluster{}
	for _, o := range operations {
		if !o.Write {
			continue
		}
		if c := clusters[o.Value]; c != nil || o.Value == 0 {
			return fmt.Errorf("history: value %#x is not one write's alone: %v", o.Value, o)
		}
		clusters[o.Value] = &cluster{write: o, witness: o, minEnd: o.End, maxStart: o.Start}
	}
	before := Operation{Recorder: -1, Write: true, Start: -1, End: 0} // the first content, written before the clock ran
	clusters[0] = &cluster{write: before, witness: before, minEnd: before.End, maxStart: before.Start}
	for _, o := range operations {
		if o.Write || o.End == EndUnknown {
			continue
		}
		c := clusters[o.Value]
		if c == nil {
			return fmt.Errorf("history: a value nobody wrote was read: %v", o)
		}
		if o.End < c.write.Start {
			return fmt.Errorf("history: read before it was written:\n\t%v\n\t%v", o, c.write)
		}
		c.reads++
		c.minEnd = min(c.minEnd, o.End)
		if o.Start > c.maxStart {
			c.maxStart, c.witness = o.Start, o
		}
	}
	var forward, backward []*cluster
	for _, c := range clusters {
		switch {
		case c.write.End == EndUnknown && c.reads == 0: // may never have happened
		case c.forward():
			forward = append(forward, c)
		default:
			backward = append(backward, c)
		}
	}
	slices.SortFunc(forward, func(a, b *cluster) int { return int(a.minEnd - b.minEnd) })
	for i := 1; i < len(forward); i++ {
		if a, b := forward[i-1], forward[i]; b.minEnd < a.maxStart {
			return conflict(a, b)
		}
	}
	for _, b := range backward {
		// The forward clusters do not overlap, so only the last that began before b can hold it.
		i, _ := slices.BinarySearchFunc(forward, b.maxStart, func(c *cluster, at int64) int { return int(c.minEnd - at) })
		if i > 0 && b.minEnd < forward[i-1].maxStart {
			return conflict(forward[i-1], b)
		}
	}
	return nil
}

func conflict(a, b *cluster) error {
	return fmt.Errorf("history: the block held one value between the ends of two operations that know of another:"+
		"\n\t%v\n\t%v\nand\n\t%v\n\t%v", a.write, a.witness, b.write, b.witness)
}
