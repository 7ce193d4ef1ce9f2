// Package buf is the memory that data passes through: an arena of page-aligned
// buffers outside the Go heap, so that the kernel may read and write them while
// the garbage collector neither scans nor moves anything.
//
// An arena belongs to one reactor. It reserves address space once and touches
// memory only as load asks for it, chunk by chunk, so that an idle process stays
// small. Within a chunk it is a buddy allocator: buffers are powers of two from
// one page to a whole chunk.
package buf

import (
	"fmt"
	"math/bits"

	"github.com/ncw/directio"
	"golang.org/x/sys/unix"
)

const (
	// PageSize is the smallest buffer and the alignment of all of them. It is at
	// least the block that direct I/O wants on every platform directio knows.
	PageSize = 4096
	// ChunkSize is the largest buffer, and the unit in which an arena grows and
	// registers memory with the kernel.
	ChunkSize = 4 << 20

	pageShift  = 12
	chunkPages = ChunkSize / PageSize
	orderCount = 11 // 4 KiB << 10 == 4 MiB
	noOrder    = 0xff
)

var _ [PageSize - directio.BlockSize]struct{} // a page satisfies directio's block rule

// Arena hands out buffers. It is used by one reactor only.
type Arena struct {
	memory []byte // the whole reservation; immutable
	chunks []chunk
	active int // chunks[:active] have been used

	limit int64 // bytes that may be handed out; immutable
	used  int64 // bytes handed out

	// OnGrow, when set, is called with each chunk before its first use, so that
	// the reactor can register it with the kernel.
	OnGrow func(index int, memory []byte)
}

type chunk struct {
	free      [orderCount]int16 // head of a list of free blocks by order, -1 for none
	next      [chunkPages]int16
	previous  [chunkPages]int16
	freeOrder [chunkPages]uint8 // order of the free block that begins at this page, or noOrder
	used      [chunkPages]uint8 // order of the used block that begins at this page, or noOrder
	largest   int               // an upper bound of the largest free order
	pinned    bool              // the kernel holds the pages themselves
}

// NewArena reserves address space for limit bytes, rounded up to whole chunks.
// No memory is touched.
func NewArena(limit int64) (*Arena, error) {
	if limit <= 0 {
		return nil, fmt.Errorf("buf: arena of %d bytes: must be positive", limit)
	}
	count := int((limit + ChunkSize - 1) / ChunkSize)
	memory, err := unix.Mmap(-1, 0, count*ChunkSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("buf: reserve %d bytes: %w", count*ChunkSize, err)
	}
	return &Arena{memory: memory, chunks: make([]chunk, count), limit: int64(count) * ChunkSize}, nil
}

// Close gives the memory back. Every buffer must have been freed.
func (a *Arena) Close() error {
	if a.used != 0 {
		return fmt.Errorf("buf: arena closed with %d bytes in use", a.used)
	}
	if a.memory == nil {
		return nil
	}
	memory := a.memory
	a.memory, a.chunks, a.active = nil, nil, 0
	return unix.Munmap(memory)
}

// Limit is the number of bytes the arena can hand out.
func (a *Arena) Limit() int64 { return a.limit }

// Used is the number of bytes handed out.
func (a *Arena) Used() int64 { return a.used }

func order(length int) int {
	if length <= PageSize {
		return 0
	}
	return bits.Len(uint((length - 1) >> pageShift))
}

// Alloc returns a page-aligned buffer of exactly length bytes, backed by the
// next power of two, or nil when the arena has no room for it now. Its content
// is whatever the last user left.
func (a *Arena) Alloc(length int) []byte {
	o := order(length)
	if length <= 0 || o >= orderCount {
		return nil
	}
	for i := range a.active {
		if b := a.take(i, o, length); b != nil {
			return b
		}
	}
	if a.active == len(a.chunks) {
		return nil
	}
	i := a.active
	a.active++
	a.chunks[i].init()
	if a.OnGrow != nil {
		a.OnGrow(i, a.memory[i*ChunkSize:(i+1)*ChunkSize:(i+1)*ChunkSize])
	}
	return a.take(i, o, length)
}

func (a *Arena) take(i, o, length int) []byte {
	page := a.chunks[i].take(o)
	if page < 0 {
		return nil
	}
	a.used += PageSize << o
	start := i*ChunkSize + page*PageSize
	return a.memory[start : start+length : start+PageSize<<o]
}

// Free gives back a buffer from Alloc, possibly resliced to another length but
// not to another start.
func (a *Arena) Free(b []byte) {
	offset := a.offset(b)
	if offset < 0 || offset%PageSize != 0 {
		panic("buf: Free of memory that is not this arena's")
	}
	o := a.chunks[offset/ChunkSize].release(offset % ChunkSize / PageSize)
	a.used -= PageSize << o
}

// Chunk says in which chunk b lies, or -1 when it is not this arena's memory.
func (a *Arena) Chunk(b []byte) int {
	offset := a.offset(b)
	if offset < 0 {
		return -1
	}
	return offset / ChunkSize
}

// Pin says that the kernel holds the pages of a chunk, as it does of registered
// buffers. Trim leaves them: the chunk would get new pages, the kernel would go
// on writing to the old ones.
func (a *Arena) Pin(index int) { a.chunks[index].pinned = true }

// Trim returns the memory of chunks that hold no buffer and are not pinned to the
// system, keeping the first keep chunks. The chunks stay usable.
func (a *Arena) Trim(keep int) {
	for i := keep; i < a.active; i++ {
		if c := &a.chunks[i]; c.free[orderCount-1] == 0 && !c.pinned {
			_ = unix.Madvise(a.memory[i*ChunkSize:(i+1)*ChunkSize], unix.MADV_DONTNEED) // best effort
		}
	}
}

func (c *chunk) init() {
	for o := range c.free {
		c.free[o] = -1
	}
	for p := range c.freeOrder {
		c.freeOrder[p], c.used[p] = noOrder, noOrder
	}
	c.push(0, orderCount-1)
	c.largest = orderCount - 1
}

func (c *chunk) push(page, o int) {
	head := c.free[o]
	c.next[page], c.previous[page] = head, -1
	if head >= 0 {
		c.previous[head] = int16(page)
	}
	c.free[o] = int16(page)
	c.freeOrder[page] = uint8(o)
}

func (c *chunk) remove(page int) {
	o := c.freeOrder[page]
	next, previous := c.next[page], c.previous[page]
	if previous >= 0 {
		c.next[previous] = next
	} else {
		c.free[o] = next
	}
	if next >= 0 {
		c.previous[next] = previous
	}
	c.freeOrder[page] = noOrder
}

func (c *chunk) take(o int) int {
	if o > c.largest {
		return -1
	}
	from := o
	for from < orderCount && c.free[from] < 0 {
		from++
	}
	if from == orderCount {
		c.largest = o - 1
		return -1
	}
	page := int(c.free[from])
	c.remove(page)
	for from > o {
		from--
		c.push(page+1<<from, from)
	}
	c.used[page] = uint8(o)
	return page
}

func (c *chunk) release(page int) int {
	o := int(c.used[page])
	if o == noOrder {
		panic("buf: Free of a buffer that is not in use")
	}
	c.used[page] = noOrder
	merged := o
	for merged < orderCount-1 {
		buddy := page ^ 1<<merged
		if c.freeOrder[buddy] != uint8(merged) {
			break
		}
		c.remove(buddy)
		page &^= 1 << merged
		merged++
	}
	c.push(page, merged)
	c.largest = max(c.largest, merged)
	return o
}
