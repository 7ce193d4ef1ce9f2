// Package load decides what a load generator sends and keeps what it measured:
// the mix of operations, the offsets, and one histogram per operation. How a
// request reaches a device is the business of whoever drives it, so the same
// load runs over a socket or straight on a device.
package load

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/internal/histogram"
)

// Op is one kind of request.
type Op uint8

// The operations a load is made of.
const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpCount // number of operations, not one of them
)

// String names an operation as fio does.
func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	}
	return fmt.Sprintf("op %d", uint8(o))
}

// Pattern is what is sent, for one job of a load.
type Pattern struct {
	Random      bool   `json:"random"`       // random offsets, else sequential from the job's start
	ReadPercent int    `json:"read_percent"` // share of reads among reads and writes
	BlockBytes  int    `json:"block_bytes"`  // length of a request
	Depth       int    `json:"depth"`        // requests in flight per job
	Jobs        int    `json:"jobs"`         // connections or queues
	FlushEvery  int    `json:"flush_every"`  // a flush after so many writes; 0 sends none
	Seed        uint64 `json:"seed"`         // replays the offsets; job i uses Seed+i
	SizeBytes   uint64 `json:"size_bytes"`   // part of the device used; 0 is all of it
}

// The bounds of a pattern: what one job reserves at its start.
const (
	DepthMax      = 4096
	JobsMax       = 256
	BlockBytesMax = 32 << 20 // what an NBD server accepts at most
)

// Check tells whether the pattern can run on a device of deviceBytes.
func (p Pattern) Check(deviceBytes uint64) error {
	switch {
	case p.BlockBytes < 1 || p.BlockBytes > BlockBytesMax:
		return fmt.Errorf("load: block of %d bytes: want 1 to %d", p.BlockBytes, BlockBytesMax)
	case p.Depth < 1 || p.Depth > DepthMax:
		return fmt.Errorf("load: depth %d: want 1 to %d", p.Depth, DepthMax)
	case p.Jobs < 1 || p.Jobs > JobsMax:
		return fmt.Errorf("load: %d jobs: want 1 to %d", p.Jobs, JobsMax)
	case p.ReadPercent < 0 || p.ReadPercent > 100:
		return fmt.Errorf("load: %d %% reads: want 0 to 100", p.ReadPercent)
	case p.FlushEvery < 0:
		return errors.New("load: a flush after a negative number of writes")
	case p.SizeBytes > deviceBytes:
		return fmt.Errorf("load: size %d is beyond the device's %d bytes", p.SizeBytes, deviceBytes)
	case p.size(deviceBytes) < uint64(p.BlockBytes):
		return fmt.Errorf("load: %d bytes hold no block of %d", p.size(deviceBytes), p.BlockBytes)
	}
	return nil
}

func (p Pattern) size(deviceBytes uint64) uint64 {
	if p.SizeBytes != 0 {
		return p.SizeBytes
	}
	return deviceBytes
}

// Writes tells whether the pattern changes the device.
func (p Pattern) Writes() bool { return p.ReadPercent < 100 }

// Generator draws the requests of one job. One goroutine owns it.
type Generator struct {
	random     *rand.PCG
	sequential bool
	readBound  uint64 // a 32-bit draw below it is a read
	blockBytes uint64
	blockCount uint64
	next       uint64 // block of the next sequential request
	flushEvery int
	sinceFlush int
}

// NewGenerator makes the generator of job jobIndex on a device of deviceBytes.
// The pattern passed Check.
func NewGenerator(p Pattern, jobIndex int, deviceBytes uint64) *Generator {
	seed := p.Seed + uint64(jobIndex)
	g := &Generator{
		random:     rand.NewPCG(seed, 0x9e3779b97f4a7c15),
		sequential: !p.Random,
		readBound:  uint64(p.ReadPercent) * (1 << 32) / 100,
		blockBytes: uint64(p.BlockBytes),
		blockCount: p.size(deviceBytes) / uint64(p.BlockBytes),
		flushEvery: p.FlushEvery,
	}
	g.next = g.blockCount / uint64(p.Jobs) * uint64(jobIndex)
	return g
}

// Next gives the next request. A flush has no offset. It never allocates.
func (g *Generator) Next() (op Op, offset uint64) {
	if g.flushEvery > 0 && g.sinceFlush >= g.flushEvery {
		g.sinceFlush = 0
		return OpFlush, 0
	}
	draw := g.random.Uint64()
	op = OpRead
	if draw&(1<<32-1) >= g.readBound {
		op = OpWrite
		g.sinceFlush++
	}
	if g.sequential {
		offset = g.next * g.blockBytes
		if g.next++; g.next == g.blockCount {
			g.next = 0
		}
		return op, offset
	}
	// The high half of the draw picks the block when it can: one draw a request.
	if g.blockCount < 1<<32 {
		return op, (draw >> 32) * g.blockCount >> 32 * g.blockBytes
	}
	return op, g.random.Uint64() % g.blockCount * g.blockBytes
}

// Meter keeps what one job measured between Begin and End. One goroutine owns it.
type Meter struct {
	Latency [OpCount]histogram.Histogram // nanoseconds
	Bytes   [OpCount]uint64
	began   time.Time
	ended   time.Time
}

// Begin forgets the ramp and opens the window at now.
func (m *Meter) Begin(now time.Time) { *m = Meter{began: now} }

// End closes the window at now; a second End changes nothing.
func (m *Meter) End(now time.Time) {
	if m.ended.IsZero() {
		m.ended = now
	}
}

// Record counts one completed request.
func (m *Meter) Record(op Op, latency time.Duration, length int) {
	m.Latency[op].Record(uint64(max(latency, 0)))
	m.Bytes[op] += uint64(length)
}

// Window gives the measured window.
func (m *Meter) Window() (from, to time.Time) { return m.began, m.ended }
