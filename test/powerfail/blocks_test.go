package powerfail

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
)

const blockSize = 4096

// stamp counts what the exerciser of a volume saw: submissions, replies, calls.
type stamp uint64

// change is one request on one block. Its content is the block's number and seq, or
// zeroes.
type change struct {
	seq   stamp // when it was submitted; names the content
	acked stamp // when its reply was read; 0: never
	zero  bool
}

// blocks is what the blocks of a volume may hold after the daemon was killed: what
// was acknowledged last, or what was in flight then. One request at most is in
// flight for a block.
type blocks struct {
	now     stamp
	changes [][]change // of each block since the last settle, whose result is the first
	busy    []bool     // a change is in flight
}

func newBlocks(count int) *blocks {
	b := &blocks{now: 1}
	b.grow(count)
	return b
}

func (b *blocks) tick() stamp { b.now++; return b.now }

// grow adds blocks that were never written.
func (b *blocks) grow(count int) {
	for len(b.changes) < count {
		b.changes, b.busy = append(b.changes, []change{{zero: true, acked: 1}}), append(b.busy, false)
	}
}

// submit notes a request on count blocks.
func (b *blocks) submit(first, count int, zero bool) stamp {
	seq := b.tick()
	for i := first; i < first+count; i++ {
		b.busy[i] = true
		b.changes[i] = append(b.changes[i], change{seq: seq, zero: zero})
	}
	return seq
}

// ack notes its reply.
func (b *blocks) ack(first, count int) {
	now := b.tick()
	for i := first; i < first+count; i++ {
		b.busy[i] = false
		b.changes[i][len(b.changes[i])-1].acked = now
	}
}

// fill makes the content of block i that change seq writes.
func fill(p []byte, i int, seq stamp) {
	x := uint64(i)<<32 ^ uint64(seq)
	binary.LittleEndian.PutUint64(p[0:], uint64(i))
	binary.LittleEndian.PutUint64(p[8:], uint64(seq))
	for at := 16; at < blockSize; at += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[at:], x)
	}
}

// content says which change a block holds; zeroes are seq 0.
func content(p []byte, i int) (stamp, error) {
	if !slices.ContainsFunc(p, func(c byte) bool { return c != 0 }) {
		return 0, nil
	}
	seq := stamp(binary.LittleEndian.Uint64(p[8:]))
	var want [blockSize]byte
	fill(want[:], i, seq)
	if n := binary.LittleEndian.Uint64(p); n != uint64(i) {
		return 0, fmt.Errorf("block %d holds what begins as block %d, change %d", i, n, seq)
	}
	for at := range want {
		if p[at] != want[at] {
			return 0, fmt.Errorf("block %d begins as change %d, but byte %d differs", i, seq, at)
		}
	}
	return seq, nil
}

// holds reports whether c is what content calls seq.
func (c *change) holds(seq stamp) bool { return seq == c.seq || c.zero && seq == 0 }

// settle compares a volume after a restart, and takes what is there as what must be
// there from now on. It returns an error for each block that may not be as it is.
func (b *blocks) settle(data []byte) (wrong []error) {
	for i := range b.changes {
		seq, err := content(data[i*blockSize:][:blockSize], i)
		all := b.changes[i]
		allowed := all[len(all)-1:]
		if b.busy[i] {
			allowed = all[len(all)-2:]
		}
		at := slices.IndexFunc(allowed, func(c change) bool { return c.holds(seq) })
		if err == nil && at < 0 {
			err = fmt.Errorf("block %d holds change %d; allowed: %+v, before: %+v", i, seq, allowed, all[:len(all)-len(allowed)])
		}
		if err != nil {
			wrong, at = append(wrong, err), 0
		}
		kept := allowed[at]
		kept.acked = max(kept.acked, 1)
		b.changes[i], b.busy[i] = append(all[:0], kept), false
	}
	return wrong
}

// cut compares a snapshot that was being taken from the moment begun on, and until
// done (0: until the daemon died): it must be the volume at one point in the order
// of its writes. Call it before settle.
func (b *blocks) cut(data []byte, begun, done stamp) error {
	if done == 0 {
		done = b.now + 1
	}
	earliest, latest := begun, done        // the point lies between
	var from, to int                       // blocks that say so
	for i := range len(data) / blockSize { // it may have grown since
		seq, err := content(data[i*blockSize:][:blockSize], i)
		if err != nil {
			return err
		}
		all := b.changes[i]
		fits := false
		var in, out stamp
		for k := range all {
			if !all[k].holds(seq) || all[k].seq > done {
				continue
			}
			next := done // when it was certainly replaced
			if k+1 < len(all) && all[k+1].acked != 0 {
				next = all[k+1].acked
			}
			if next >= begun {
				fits, in, out = true, all[k].seq, next
				break
			}
		}
		if !fits {
			return fmt.Errorf("block %d holds change %d; taken between %d and %d; changes: %+v", i, seq, begun, done, all)
		}
		if seq == 0 { // which zeroes these are is not known, so they bound nothing
			continue
		}
		if in > earliest {
			earliest, from = in, i
		}
		if out < latest {
			latest, to = out, i
		}
	}
	if earliest > latest {
		return fmt.Errorf("it is of no one moment: change %d of block %d is in it, and one of block %d that had its reply at %d is not", earliest, from, to, latest)
	}
	return nil
}

func TestBlocksKnowWhatIsAllowed(t *testing.T) {
	image := func(seqs ...stamp) []byte {
		data := make([]byte, len(seqs)*blockSize)
		for i, seq := range seqs {
			if seq != 0 {
				fill(data[i*blockSize:][:blockSize], i, seq)
			}
		}
		return data
	}
	wrong := func(b *blocks, seqs ...stamp) int {
		return len(b.settle(image(seqs...)))
	}
	build := func() (b *blocks, first, second stamp) {
		b = newBlocks(2)
		first = b.submit(0, 2, false)
		b.ack(0, 2)
		second = b.submit(0, 1, false)
		return b, first, second
	}
	b, first, second := build()
	if wrong(b, first, first) != 0 || wrong(b, second, first) != 1 {
		t.Error("what was there once may change")
	}
	if b, first, second = build(); wrong(b, second, first) != 0 {
		t.Error("a write in flight may have happened")
	}
	if b, first, _ = build(); wrong(b, 0, first) != 1 || wrong(b, first, 99) != 1 {
		t.Error("an acknowledged write may not be lost")
	}
	b, first, second = build()
	begun := b.now
	b.ack(0, 1)
	third := b.submit(1, 1, false) // after the reply of second
	for _, tt := range []struct {
		seqs []stamp
		good bool
	}{
		{[]stamp{first, first}, true}, {[]stamp{second, first}, true}, {[]stamp{second, third}, true},
		{[]stamp{first, third}, false}, {[]stamp{0, first}, false},
	} {
		if err := b.cut(image(tt.seqs...), begun, 0); (err == nil) != tt.good {
			t.Errorf("%v: %v", tt.seqs, err)
		}
	}
}
