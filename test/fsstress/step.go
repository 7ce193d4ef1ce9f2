package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
)

// kind is what a step does.
type kind uint8

const (
	write kind = iota
	read
	directWrite
	directRead
	mappedWrite
	mappedRead
	truncate
	punch
	zero
	allocate
	discard
	flush
	forget
	reopen
	compare
	kindCount
)

var kindNames = [kindCount]string{"write", "read", "direct-write", "direct-read", "mapped-write", "mapped-read",
	"truncate", "punch", "zero", "allocate", "discard", "fsync", "forget", "reopen", "compare"}

func (k kind) String() string { return kindNames[k] }

// writes tells whether steps of this kind put new bytes where they point.
func (k kind) writes() bool { return k == write || k == directWrite || k == mappedWrite }

func parseKind(name string) (kind, error) {
	i := slices.Index(kindNames[:], name)
	if i < 0 {
		return 0, fmt.Errorf("no kind of step %q; there are %q", name, kindNames)
	}
	return kind(i), nil
}

// Of a hundred steps, how many are of a kind: of a file and of a block device, which
// keeps its size.
var (
	fileWeights = [kindCount]int{write: 18, read: 12, directWrite: 10, directRead: 6, mappedWrite: 10, mappedRead: 6,
		truncate: 8, punch: 6, zero: 6, allocate: 4, flush: 4, forget: 4, reopen: 4, compare: 2}
	blockWeights = [kindCount]int{write: 20, read: 12, directWrite: 16, directRead: 10, mappedWrite: 8, mappedRead: 4,
		punch: 6, zero: 6, discard: 6, flush: 4, forget: 4, reopen: 2, compare: 2}
)

// align is the unit of direct I/O and of ranges of a device: the largest logical
// block there is.
const align = 4096

// step is one operation. Offsets and lengths are bytes; for truncate, offset is the
// new size.
type step struct {
	number         uint64
	kind           kind
	offset, length int64
	variant        bool // of a mapped write: synced at once; of an allocation: the size stays; of a truncation: a near size
}

func (s step) String() string {
	switch s.kind {
	case truncate:
		return fmt.Sprintf("step %d: truncate to %d", s.number, s.offset)
	case flush, forget, reopen, compare:
		return fmt.Sprintf("step %d: %s", s.number, s.kind)
	}
	return fmt.Sprintf("step %d: %s %d bytes at %d", s.number, s.kind, s.length, s.offset)
}

// covers tells whether the step changed the byte at offset.
func (s step) covers(offset int64) bool {
	switch s.kind {
	case truncate:
		return offset >= s.offset
	case punch, zero, discard:
	default:
		if !s.kind.writes() {
			return false
		}
	}
	return offset >= s.offset && offset < s.offset+s.length
}

// chooser picks steps. Equal choosers pick equal steps for equal sizes.
type chooser struct {
	seed      uint64
	block     bool
	sizeMax   int64
	lengthMax int64
}

// choose returns step number of a file with size bytes now. A length of 0 means that
// there is nothing to do it to.
func (c chooser) choose(number uint64, size int64) step {
	random := rand.New(rand.NewPCG(c.seed, number))
	s := step{number: number, kind: c.kind(random), variant: random.IntN(2) == 0}
	limit, unit := size, int64(1)
	switch s.kind {
	case truncate:
		s.offset = random.Int64N(c.sizeMax + 1)
		if s.variant { // stay near, so that files are not short most of the time
			s.offset = min(c.sizeMax, max(0, size+random.Int64N(2*c.lengthMax)-c.lengthMax))
		}
		return s
	case flush, forget, reopen, compare:
		return s
	case write, allocate:
		limit = c.sizeMax
	case directWrite:
		limit, unit = c.sizeMax, align
	case directRead:
		unit = align
	}
	if c.block && (s.kind == punch || s.kind == zero || s.kind == discard) {
		unit = align
	}
	units := (limit + unit - 1) / unit
	if units == 0 {
		return s
	}
	first := random.Int64N(units)
	s.offset = first * unit
	s.length = unit * (1 + random.Int64N(min(units-first, max(1, c.lengthMax/unit))))
	return s
}

func (c chooser) kind(random *rand.Rand) kind {
	weights := &fileWeights
	if c.block {
		weights = &blockWeights
	}
	n := random.IntN(100)
	for k, weight := range weights {
		if n -= weight; n < 0 {
			return kind(k)
		}
	}
	return compare
}

// fill makes p what step number writes at offset: each byte is a function of the seed, the step
// and its place.
func fill(p []byte, seed, number uint64, offset int64) {
	stream := mix(seed ^ number<<20)
	at := uint64(offset)
	word := mix(stream + at/8)
	for i := range p {
		if at%8 == 0 {
			word = mix(stream + at/8)
		}
		p[i] = byte(word >> (at % 8 * 8))
		at++
	}
}

// mix spreads x over 64 bits (the finalizer of SplitMix64).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
