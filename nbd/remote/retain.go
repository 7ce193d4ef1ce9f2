package remote

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
)

// entriesMax bounds the changes retained at once: as many as 4 KiB writes fill the
// default memory.
const entriesMax = 1 << 14

// retained is one acknowledged change that no flush has covered.
type retained struct {
	op     datapath.Op
	flags  datapath.Flags
	offset uint64
	length uint64
	data   uint64 // where its data begins, counted from the first byte ever retained
}

// retention keeps acknowledged changes, in the order they were acknowledged in,
// until a flush has covered them. Its memory is one ring of bytes, mapped when it
// opens and used by the kernel only as far as it is written.
//
// Owned by the core.
type retention struct {
	memory  []byte // size is a multiple of every block size, so is each cut at its end
	entries []retained

	// Counted from the first entry and byte ever retained.
	entryHead, entryTail uint64
	dataHead, dataTail   uint64
	// Reserved for changes that are on their way to the server.
	entriesReserved uint64
	dataReserved    uint64
}

func (t *retention) open(size int) (err error) {
	size &^= 1<<16 - 1 // the largest minimum block size of the protocol
	if t.memory, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
		return fmt.Errorf("remote: memory for unflushed data: %w", err)
	}
	t.entries = make([]retained, entriesMax)
	return nil
}

// close forgets everything.
func (t *retention) close() {
	if t.memory != nil {
		_ = unix.Munmap(t.memory) // a mapping of ours
	}
	*t = retention{}
}

// on reports whether changes are retained at all.
func (t *retention) on() bool { return t.memory != nil }

func (t *retention) empty() bool { return t.entryHead == t.entryTail }

// crowded reports that a flush should make room, long before it has to.
func (t *retention) crowded() bool {
	return 2*(t.dataTail-t.dataHead) > uint64(len(t.memory)) || 2*(t.entryTail-t.entryHead) > entriesMax
}

func dataLength(r *datapath.Request) uint64 {
	if r.Op == datapath.OpWrite {
		return r.Length
	}
	return 0
}

// reserve sets room aside for r, if there is any.
func (t *retention) reserve(r *datapath.Request) bool {
	n := dataLength(r)
	if t.entryTail-t.entryHead+t.entriesReserved >= entriesMax || t.dataTail-t.dataHead+t.dataReserved+n > uint64(len(t.memory)) {
		return false
	}
	t.entriesReserved++
	t.dataReserved += n
	return true
}

// release gives back what was reserved for r.
func (t *retention) release(r *datapath.Request) {
	t.entriesReserved--
	t.dataReserved -= dataLength(r)
}

// add retains r, which the server has acknowledged, in the room reserved for it.
func (t *retention) add(r *datapath.Request) {
	t.release(r)
	if r.Flags&datapath.FlagFUA != 0 && t.empty() { // durable, and nothing older can be written over it
		return
	}
	t.entries[t.entryTail%entriesMax] = retained{op: r.Op, flags: r.Flags & datapath.FlagNoUnmap, offset: r.Offset, length: r.Length, data: t.dataTail}
	t.entryTail++
	if r.Op == datapath.OpWrite {
		at := t.dataTail % uint64(len(t.memory))
		n := copy(t.memory[at:], r.Buf)
		copy(t.memory, r.Buf[n:])
		t.dataTail += r.Length
	}
}

// forget drops the entries before the one counted end: a flush that was sent after
// they were acknowledged has succeeded.
func (t *retention) forget(end uint64) {
	if end <= t.entryHead {
		return
	}
	t.entryHead = end
	t.dataHead = t.dataTail
	if !t.empty() {
		t.dataHead = t.entries[t.entryHead%entriesMax].data
		return
	}
	// From the start, so that few pages serve who flushes often.
	t.dataHead, t.dataTail = 0, 0
}

// piece is the first part of an entry, from skip bytes on, that lies in one run of
// memory.
func (t *retention) piece(entry, skip uint64) (r datapath.Request) {
	e := &t.entries[entry%entriesMax]
	r = datapath.Request{Op: e.op, Flags: e.flags, Offset: e.offset + skip, Length: e.length - skip}
	if e.op == datapath.OpWrite {
		at := (e.data + skip) % uint64(len(t.memory))
		r.Length = min(r.Length, uint64(len(t.memory))-at)
		r.Buf = t.memory[at:][:r.Length]
	}
	return r
}
