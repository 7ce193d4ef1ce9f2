package devtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// loader runs requests at random on one queue. Its step chooses the next request
// of a free slot; its check looks at each that ended.
//
// All of it is owned by the reactor.
type loader struct {
	*client
	random   *rand.Rand
	slots    []*loadSlot
	free     []*loadSlot
	budget   int // requests still to begin
	inflight int
	err      error // the first thing wrong
	done     chan error

	step  func(s *loadSlot) bool  // fills in the request; false: nothing fits now
	check func(s *loadSlot) error // the request has ended
}

type loadSlot struct {
	datapath.Request
	memory  []byte // of Buf
	arena   bool   // memory is the arena's
	extents [8]datapath.Extent

	// History loads: a token and a value for each block.
	tokens [historyBlocksMax]int
	value  uint64
}

func newLoader(c *client, seed, stream uint64, budget int) *loader {
	l := &loader{client: c, random: rand.New(rand.NewPCG(seed, stream)), budget: budget, done: make(chan error, 1)}
	for i := range c.depth {
		s := &loadSlot{}
		s.Tag = uint32(i)
		s.Done = func(*datapath.Request) { l.finished(s) }
		l.slots = append(l.slots, s)
		l.free = append(l.free, s)
	}
	return l
}

// runLoaders runs them together and returns what went wrong first in each.
func runLoaders(loaders []*loader) error {
	for _, l := range loaders {
		if !l.reactor.Post(reactor.TaskFunc(func(*reactor.Reactor) { l.pump() })) {
			return reactor.ErrStopped
		}
	}
	var errs []error
	deadline := time.After(4 * requestWait)
	for _, l := range loaders {
		select {
		case err := <-l.done:
			errs = append(errs, err)
		case <-deadline:
			return fmt.Errorf("load did not end in %v", 4*requestWait)
		}
	}
	return errors.Join(errs...)
}

// pump begins as many requests as there is room for.
func (l *loader) pump() {
	for l.err == nil && l.budget > 0 && len(l.free) > 0 {
		s := l.free[len(l.free)-1]
		if !l.step(s) {
			break
		}
		l.free = l.free[:len(l.free)-1]
		l.budget--
		l.inflight++
		s.Status = 0xff
		l.submit(&s.Request)
	}
	if l.inflight == 0 && (l.budget == 0 || l.err != nil) {
		l.done <- l.err
	}
}

// buffer gives s memory of the arena or of the heap, with anything in it.
func (l *loader) buffer(s *loadSlot, length uint64) {
	if s.arena = l.random.IntN(4) != 0; s.arena {
		s.memory = l.reactor.Buffers().Alloc(int(length))
	}
	if s.memory == nil {
		s.arena, s.memory = false, make([]byte, length)
	}
	s.Buf = s.memory
	fill(s.Buf[:min(length, 64)], l.random.Uint64())
}

func (l *loader) finished(s *loadSlot) {
	l.ended(&s.Request)
	l.inflight--
	err := l.check(s)
	if err == nil && s.Status != datapath.StatusOK {
		err = fmt.Errorf("%s of %d bytes at %d: %s", s.Op, s.Length, s.Offset, s.Status)
	}
	if err != nil && l.err == nil {
		l.err = err
	}
	if s.memory != nil {
		fill(s.memory[:min(len(s.memory), 64)], 0xdead) // the device has let go of it
		if s.arena {
			l.reactor.FreeBuffer(s.memory)
		}
		s.memory, s.Buf = nil, nil
	}
	l.free = append(l.free, s)
	l.pump()
}

// modelLoad is a loader on a range of bytes of its own, which it models.
type modelLoad struct {
	*loader
	offset, unit uint64
	shadow       []byte
	known        []bool // false: discarded, anything may be there
	busy         []*loadSlot
}

func newModelLoad(c *client, offset, length, seed, stream uint64, budget int) *modelLoad {
	m := &modelLoad{
		loader: newLoader(c, seed, stream, budget),
		offset: offset, unit: c.g.unit(),
		shadow: make([]byte, length), known: make([]bool, length),
	}
	m.step, m.check = m.choose, m.verify
	return m
}

func (m *modelLoad) choose(s *loadSlot) bool {
	for range 20 {
		m.draw(s)
		if !m.conflicts(s) {
			break
		}
		if s.memory != nil && s.arena {
			m.reactor.FreeBuffer(s.memory)
		}
		s.memory, s.Buf, s.Length = nil, nil, 0
	}
	if s.Length == 0 && s.Op != datapath.OpFlush {
		return m.loader.inflight == 0 && m.choose(s) // the range is full of requests: wait for one
	}
	if s.Op == datapath.OpWrite {
		fill(s.Buf, m.random.Uint64())
		copy(m.shadow[s.Offset-m.offset:], s.Buf) // nothing else in flight touches it
	}
	m.busy = append(m.busy, s)
	return true
}

// draw chooses what and where.
func (m *modelLoad) draw(s *loadSlot) {
	info := &m.g.info
	s.Flags, s.Context, s.Extents = 0, "", nil
	total := uint64(len(m.shadow))
	switch n := m.random.IntN(100); {
	case n < 40:
		s.Op = datapath.OpRead
		s.Flags = datapath.Flags(m.random.IntN(4)/3) * datapath.FlagLend
	case n < 48 && info.Has(datapath.FeatureWriteZeroes):
		s.Op = datapath.OpWriteZeroes
		s.Flags = datapath.Flags(m.random.IntN(2)) * datapath.FlagNoUnmap
	case n < 54 && info.Has(datapath.FeatureDiscard):
		s.Op = datapath.OpDiscard
	case n < 58 && info.Has(datapath.FeatureExtents):
		s.Op, s.Context, s.Extents = datapath.OpExtents, datapath.ContextAllocation, s.extents[:0:1+m.random.IntN(len(s.extents))]
	case n < 60 && info.Has(datapath.FeatureCache):
		s.Op = datapath.OpCache
	case n < 64 && info.Has(datapath.FeatureFlush):
		s.Op, s.Offset, s.Length = datapath.OpFlush, 0, 0
		return
	default:
		s.Op = datapath.OpWrite
	}
	if s.Modifies() && info.Has(datapath.FeatureFUA) && m.random.IntN(10) == 0 {
		s.Flags |= datapath.FlagFUA
	}
	align, most := m.unit, uint64(16<<10)
	switch n := m.random.IntN(10); {
	case n < 4:
		align = max(align, datapath.BlockSize)
	case n < 6:
		most = 64
	case n == 9:
		align, most = max(align, datapath.BlockSize), total/4
	}
	if s.Op == datapath.OpRead || s.Op == datapath.OpWrite {
		most = min(most, m.g.largest())
	}
	most = max(min(most, total), align)
	s.Length = (m.random.Uint64N(most/align) + 1) * align
	at := m.random.Uint64N((total-s.Length)/m.unit+1) * m.unit
	if align > m.unit { // to a multiple in the device, when one fits
		if up := (m.offset+at+align-1)/align*align - m.offset; up+s.Length <= total {
			at = up
		}
	}
	s.Offset = m.offset + at
	if s.Op == datapath.OpRead || s.Op == datapath.OpWrite {
		m.buffer(s, s.Length)
	}
}

func (m *modelLoad) conflicts(s *loadSlot) bool {
	for _, b := range m.busy {
		if s.Offset < b.Offset+b.Length && b.Offset < s.Offset+s.Length && (s.Modifies() || b.Modifies()) {
			return true
		}
	}
	return false
}

func (m *modelLoad) verify(s *loadSlot) error {
	for i, b := range m.busy {
		if b == s {
			m.busy = append(m.busy[:i], m.busy[i+1:]...)
			break
		}
	}
	if s.Status != datapath.StatusOK || s.Op == datapath.OpFlush {
		return nil
	}
	at := s.Offset - m.offset
	shadow, known := m.shadow[at:at+s.Length], m.known[at:at+s.Length]
	set := func(to bool) {
		for i := range known {
			known[i] = to
		}
	}
	switch s.Op {
	case datapath.OpWrite:
		if !bytes.Equal(s.Buf, shadow) {
			return fmt.Errorf("a write of %d bytes at %d changed its buffer at byte %d", s.Length, s.Offset, difference(s.Buf, shadow))
		}
		if m.g.options.Forgets {
			clear(shadow)
		}
		set(true)
	case datapath.OpWriteZeroes:
		clear(shadow)
		set(true)
	case datapath.OpDiscard:
		clear(shadow)
		set(m.g.options.DiscardZeroes)
	case datapath.OpRead:
		if bytes.Equal(s.Buf, shadow) {
			break
		}
		for i, b := range s.Buf {
			if known[i] && b != shadow[i] {
				return fmt.Errorf("read of %d bytes at %d: byte %d is %#02x, want %#02x", s.Length, s.Offset, i, b, shadow[i])
			}
		}
	case datapath.OpExtents:
		i := uint64(0)
		for _, e := range s.Extents {
			for end := min(i+e.Length, s.Length); i < end; i++ {
				if e.State&datapath.ExtentZero != 0 && known[i] && shadow[i] != 0 {
					return fmt.Errorf("an extent that reads as zeros covers data at %d", s.Offset+i)
				}
			}
		}
	}
	return nil
}

// randomLoad runs modelled load from several queues, on neighbouring ranges whose
// borders share blocks where the device allows it, and reads all at the end.
func randomLoad(g *rig, seed uint64, budget int) error {
	const length = 256 << 10
	u := g.unit()
	var loads []*modelLoad
	var loaders []*loader
	offset := uint64(0)
	for i := range 2 * reactorCount {
		n := uint64(length)
		if u < datapath.BlockSize {
			n += max(u, 512/u*u+u) // the next range begins inside a block
		}
		m := newModelLoad(g.client(i, 4+i*3), offset, n, seed, uint64(i), budget)
		offset += n
		loads, loaders = append(loads, m), append(loaders, m.loader)
	}
	if err := runLoaders(loaders); err != nil {
		return err
	}
	c := g.client(0, 1)
	for _, m := range loads {
		got := c.read(m.offset, uint64(len(m.shadow)))
		for i, b := range got {
			if m.known[i] && b != m.shadow[i] {
				return fmt.Errorf("at rest: byte %d is %#02x, want %#02x", m.offset+uint64(i), b, m.shadow[i])
			}
		}
	}
	return nil
}

func testRandomLoad(g *rig) {
	seed := Seed(g)
	if err := randomLoad(g, seed, loadBudget); err != nil {
		g.Fatalf("seed %d: %v", seed, err)
	}
}

// Requests of one loader. The race detector costs ten times as much a byte.
var loadBudget = func() int {
	if raceEnabled {
		return 150
	}
	return 700
}()

const (
	historyBlocks    = 12 // few, so that requests meet
	historyBlocksMax = 4  // of one request
)

// fillBlock writes value into a block so that its parts can be told to belong
// together.
func fillBlock(b []byte, value uint64) {
	binary.LittleEndian.PutUint64(b, value)
	for i := 8; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], mix(value+uint64(i)))
	}
}

// blockValue is the value of a block written by fillBlock, whole false when its
// parts do not belong together.
func blockValue(b []byte) (value uint64, whole bool) {
	value = binary.LittleEndian.Uint64(b)
	for i := 8; i < len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:]) != mix(value+uint64(i)) {
			return value, false
		}
	}
	return value, true
}

// overlaps runs reads and writes of the same few blocks from several queues and
// checks each block's history.
func overlaps(g *rig, seed uint64, budget int) error {
	const size = datapath.BlockSize
	first := g.client(0, 1)
	b := make([]byte, size)
	fillBlock(b, 0)
	for i := range uint64(historyBlocks) {
		first.write(i*size, b)
	}
	var history History
	var loaders []*loader
	for i := range reactorCount {
		recorder := history.Recorder()
		l := newLoader(g.client(i, 6), seed, uint64(i), budget)
		written := uint64(i+1) << 32
		l.step = func(s *loadSlot) bool {
			blocks := 1 + l.random.Uint64N(historyBlocksMax)
			block := l.random.Uint64N(historyBlocks - blocks + 1)
			s.Op, s.Offset, s.Length = datapath.OpRead, block*size, blocks*size
			l.buffer(s, s.Length)
			if l.random.IntN(2) == 0 {
				s.Op = datapath.OpWrite
				written++
				s.value = written
			}
			for j := range blocks {
				if s.Op == datapath.OpWrite {
					fillBlock(s.Buf[j*size:(j+1)*size], s.value)
					s.tokens[j] = recorder.Write(block+j, s.value)
				} else {
					s.tokens[j] = recorder.Read(block + j)
				}
			}
			return true
		}
		l.check = func(s *loadSlot) error {
			if s.Status != datapath.StatusOK {
				return nil
			}
			for j := range s.Length / size {
				if s.Op == datapath.OpWrite {
					recorder.Wrote(s.tokens[j])
					continue
				}
				value, whole := blockValue(s.Buf[j*size : (j+1)*size])
				if !whole && !g.options.Forgets {
					return fmt.Errorf("block %d is torn: its first value is %#x", s.Offset/size+j, value)
				}
				recorder.Got(s.tokens[j], value)
			}
			return nil
		}
		loaders = append(loaders, l)
	}
	if err := runLoaders(loaders); err != nil {
		return err
	}
	if g.options.Forgets {
		return nil
	}
	return history.Check()
}

func testOverlaps(g *rig) {
	seed := Seed(g)
	if err := overlaps(g, seed, loadBudget); err != nil {
		g.Fatalf("seed %d: %v", seed, err)
	}
}
