package pool

import (
	"fmt"
	"sync/atomic"

	"github.com/ashlar-storage/ashlar/datapath"
)

// journal is a ring of blocks on disk 0. A group of records begins at the block
// its LSN says, modulo the ring; it never wraps. One group is written at a time,
// with FUA, so only the last can be torn.
type journal struct {
	disk   *disk
	offset uint64
	blocks uint64

	// Owned by the committer.
	records []byte // scratch
	buffer  []byte // of one group
	epoch   uint32

	next  atomic.Uint64 // LSN of the next group; written by the committer
	prev  atomic.Uint32 // checksum of the group before
	tail  atomic.Uint64 // LSN at which replay would begin; written by the checkpointer
	count atomic.Uint64 // groups written since open
}

func (j *journal) capacity() uint64 { return j.blocks * pageSize }
func (j *journal) used() uint64     { return (j.next.Load() - j.tail.Load()) * pageSize }

// room makes sure that need bytes of records can be written, by a checkpoint if
// need be. Committer, without locks.
func (j *journal) room(p *Pool, need uint64) error {
	need += need/8 + 2*groupBlocksMax*pageSize/8
	if c := j.capacity(); need > c/2 {
		need = c / 2
	}
	for range 3 {
		if j.used()+need <= j.capacity() {
			return nil
		}
		if err := p.checkpoint(); err != nil {
			return err
		}
	}
	if j.used()+need <= j.capacity() {
		return nil
	}
	return fmt.Errorf("the journal of %d bytes is full", j.capacity())
}

// chunkMax is how many bytes of records one transaction may have.
func (j *journal) chunkMax() int {
	return min(groupBlocksMax*pageSize, int(j.capacity()/4)&^(pageSize-1)) - groupHeaderSize
}

// append writes chunks, each within one group. The data they speak of is durable.
func (j *journal) append(p *Pool, chunks [][]byte, pending uint64) error {
	limit := j.chunkMax() + groupHeaderSize
	if len(j.buffer) < limit {
		j.buffer = alignedBytes(limit)
	}
	n := groupHeaderSize
	for i, c := range chunks {
		if len(c)+groupHeaderSize > limit {
			return fmt.Errorf("a transaction of %d bytes is too large for a journal of %d", len(c), j.capacity())
		}
		if n+len(c) > limit {
			if err := j.write(p, n, p.settled.Load()); err != nil {
				return err
			}
			n = groupHeaderSize
		}
		n += copy(j.buffer[n:], c)
		if i == len(chunks)-1 {
			return j.write(p, n, pending)
		}
	}
	return nil
}

// write writes the first n bytes of the buffer as a group.
func (j *journal) write(p *Pool, n int, pending uint64) error {
	size := (n + pageSize - 1) &^ (pageSize - 1)
	next := j.next.Load()
	if rest := j.blocks - next%j.blocks; uint64(size/pageSize) > rest {
		// Fill what is left of the ring: only the first block is written, its length
		// says where to go on.
		pad := alignedBytes(pageSize)
		copy(pad[groupHeaderSize:], appendRecord(nil, recordPad, uint32(rest)))
		if err := j.put(p, pad, groupHeader{length: 8, pending: p.settled.Load()}, rest); err != nil {
			return err
		}
	}
	clear(j.buffer[n:size])
	return j.put(p, j.buffer[:size], groupHeader{length: uint32(n - groupHeaderSize), pending: pending}, uint64(size/pageSize))
}

func (j *journal) put(p *Pool, b []byte, h groupHeader, advance uint64) error {
	next := j.next.Load()
	if next+advance-j.tail.Load() > j.blocks {
		return fmt.Errorf("the journal of %d bytes is full", j.capacity()) // rather than lose what replay begins with
	}
	h.epoch, h.lsn, h.durable, h.prev = j.epoch, next, next, j.prev.Load()
	h.seal(b, p.id)
	if err := j.disk.write(b, j.offset+next%j.blocks*pageSize, datapath.FlagFUA); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	j.prev.Store(h.crc)
	j.next.Store(next + advance)
	j.count.Add(1)
	if p.pending != nil { // it is when the changes of the last run are committed
		p.pending.lsn.Store(next + advance)
	}
	return nil
}

// replay reads the groups from the checkpoint on and gives their records to
// apply. It leaves next and prev behind the last good one.
//
// A group that is not good is the torn tail of a crash if nothing later is there.
// If a later group says that everything before it was durable, the journal is
// damaged, and nothing is cut off.
func (j *journal) replay(p *Pool, s *superblock, apply func(recordType, []byte) error) (pending uint64, groups int, err error) {
	next, prev, epoch := s.checkpoint, s.checkpointCRC, uint32(0)
	buffer := alignedBytes(groupBlocksMax * pageSize)
	for groups = 0; ; groups++ {
		at := next % j.blocks
		if next-s.checkpoint >= j.blocks {
			break
		}
		head := buffer[:pageSize]
		if err := j.disk.read(head, j.offset+at*pageSize); err != nil {
			return 0, groups, fmt.Errorf("journal: %w", err)
		}
		h, ok := decodeGroupHeader(head, p.id)
		good := ok && h.lsn == next && h.prev == prev && h.epoch >= epoch && h.epoch <= s.epoch && uint64(h.blocks) <= j.blocks-at
		var body []byte
		if good {
			body = buffer[:int(h.blocks)*pageSize]
			if len(body) > pageSize {
				if err := j.disk.read(body[pageSize:], j.offset+(at+1)*pageSize); err != nil {
					return 0, groups, fmt.Errorf("journal: %w", err)
				}
			}
			good = checksum(body[8:]) == h.crc
		}
		if !good {
			if err := j.provenTail(p, s, next); err != nil {
				return 0, groups, err
			}
			break
		}
		advance := uint64(h.blocks)
		if err := eachRecord(body[groupHeaderSize:groupHeaderSize+h.length], func(t recordType, b []byte) error {
			if t == recordPad {
				if len(b) != 4 || uint64(le.Uint32(b)) != j.blocks-at {
					return fmt.Errorf("journal: padding at LSN %d: %w", next, ErrCorrupt)
				}
				advance = uint64(le.Uint32(b))
				return nil
			}
			return apply(t, b)
		}); err != nil {
			return 0, groups, fmt.Errorf("journal: group at LSN %d: %w", next, err)
		}
		pending = max(pending, h.pending)
		prev, epoch = h.crc, h.epoch
		next += advance
	}
	j.next.Store(next)
	j.prev.Store(prev)
	j.tail.Store(s.checkpoint)
	return pending, groups, nil
}

// provenTail looks for a group that was written when the one at LSN bad was
// durable already.
func (j *journal) provenTail(p *Pool, s *superblock, bad uint64) error {
	const step = 64
	b := alignedBytes(step * pageSize)
	for at := uint64(0); at < j.blocks; at += step {
		n := min(step, j.blocks-at)
		if err := j.disk.readPages(b[:n*pageSize], j.offset+at*pageSize); err != nil {
			clear(b[:n*pageSize]) // proves nothing
		}
		for i := range n {
			h, ok := decodeGroupHeader(b[i*pageSize:(i+1)*pageSize], p.id)
			// A group of a later run than the superblock knows of proves that the newest
			// superblock is lost.
			later := h.epoch > s.epoch
			if !ok || h.lsn%j.blocks != at+i || !later && (h.lsn <= bad || h.durable <= bad || h.lsn-bad >= j.blocks) {
				continue
			}
			// Only a whole group proves anything.
			group := alignedBytes(int(h.blocks) * pageSize)
			if at+i+uint64(h.blocks) > j.blocks || j.disk.read(group, j.offset+(at+i)*pageSize) != nil || checksum(group[8:]) != h.crc {
				continue
			}
			if later {
				return fmt.Errorf("journal: the group at LSN %d is of run %d of the pool, the superblock of run %d: the newest superblock is lost: %w", h.lsn, h.epoch, s.epoch, ErrCorrupt)
			}
			return fmt.Errorf("journal: the group at LSN %d is damaged, though a later one at %d shows that it had been written: %w", bad, h.lsn, ErrCorrupt)
		}
	}
	return nil
}
