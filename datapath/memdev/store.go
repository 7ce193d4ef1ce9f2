package memdev

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// PageSize is the unit in which a store takes memory and gives it back, and
	// in which it reports extents. It is small enough that a test of a few MiB
	// sees holes, large enough that the map of 1 TiB is 2 MiB.
	PageSize = 64 << 10

	lockCount = 256 // locks shared by all pages; more than reactors times pages of one request
)

// Store is the memory behind one or more devices: address space reserved once,
// in which the kernel provides memory page by page as it is written. All of it
// lies outside the Go heap.
//
// A Store is safe for use from any goroutine. Each page's bytes change under
// that page's lock, so two requests that overlap leave every page, and so every
// block, as one of them wrote it.
type Store struct {
	memory    []byte          // the reservation; immutable
	allocated []atomic.Uint64 // one bit a page; a bit changes under its page's lock
	pages     atomic.Int64    // bits set in allocated

	locks [lockCount]pageLock
}

type pageLock struct {
	mu sync.RWMutex // guards the bytes and bits of the pages i with i % lockCount equal to its index
	_  [40]byte     // a cache line each
}

// NewStore reserves address space for size bytes, rounded up to whole pages. No
// memory is touched.
func NewStore(size uint64) (*Store, error) {
	if size == 0 || size > 1<<46 { // half of what a process can map
		return nil, fmt.Errorf("memdev: store of %d bytes: must be between 1 B and 64 TiB", size)
	}
	count := (size + PageSize - 1) / PageSize
	memory, err := unix.Mmap(-1, 0, int(count*PageSize), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("memdev: reserve %d bytes: %w", count*PageSize, err)
	}
	return &Store{memory: memory, allocated: make([]atomic.Uint64, (count+63)/64)}, nil
}

// Close gives the memory back. Every device on it is closed.
func (s *Store) Close() error {
	memory := s.memory
	s.memory = nil
	if memory == nil {
		return nil
	}
	return unix.Munmap(memory)
}

// Size is the number of bytes the store can hold.
func (s *Store) Size() uint64 { return uint64(len(s.memory)) }

// Allocated is the number of bytes for which the store holds memory.
func (s *Store) Allocated() uint64 { return uint64(s.pages.Load()) * PageSize }

// Read fills b with the bytes at offset and reports whether all of them are
// unallocated.
func (s *Store) Read(b []byte, offset uint64) (hole bool) {
	hole = true
	for len(b) > 0 {
		page := offset / PageSize
		n := piece(offset, uint64(len(b)))
		mu := &s.locks[page%lockCount].mu
		mu.RLock()
		if s.isAllocated(page) {
			copy(b[:n], s.memory[offset:offset+n])
			hole = false
		} else {
			clear(b[:n])
		}
		mu.RUnlock()
		b, offset = b[n:], offset+n
	}
	return hole
}

// Write stores b at offset.
func (s *Store) Write(b []byte, offset uint64) {
	for len(b) > 0 {
		page := offset / PageSize
		n := piece(offset, uint64(len(b)))
		mu := &s.locks[page%lockCount].mu
		mu.Lock()
		s.allocateLocked(page)
		copy(s.memory[offset:offset+n], b[:n])
		mu.Unlock()
		b, offset = b[n:], offset+n
	}
}

// Zero makes a range read as zeros. Whole pages go back to the system unless
// keep is set; then the range is allocated afterwards.
func (s *Store) Zero(offset, length uint64, keep bool) {
	for length > 0 {
		page := offset / PageSize
		n := piece(offset, length)
		mu := &s.locks[page%lockCount].mu
		mu.Lock()
		switch {
		case keep:
			s.allocateLocked(page)
			clear(s.memory[offset : offset+n])
		case !s.isAllocated(page):
		case n == PageSize && unix.Madvise(s.memory[offset:offset+n], unix.MADV_DONTNEED) == nil:
			s.allocated[page/64].And(^(1 << (page % 64)))
			s.pages.Add(-1)
		default:
			clear(s.memory[offset : offset+n])
		}
		mu.Unlock()
		offset, length = offset+n, length-n
	}
}

// Run is the length of the run of pages from offset on that are in the same
// state, at most length, and whether they are allocated.
func (s *Store) Run(offset, length uint64) (n uint64, allocated bool) {
	page := offset / PageSize
	allocated = s.isAllocated(page)
	end := offset + length
	for offset < end {
		page = offset / PageSize
		word := s.allocated[page/64].Load()
		if page%64 == 0 && word == 0 && !allocated { // most of a sparse store
			offset = (page + 64) * PageSize
			n = min(offset, end) - (end - length)
			continue
		}
		if word>>(page%64)&1 == 1 != allocated {
			break
		}
		offset = (page + 1) * PageSize
		n = min(offset, end) - (end - length)
	}
	return n, allocated
}

func (s *Store) isAllocated(page uint64) bool {
	return s.allocated[page/64].Load()>>(page%64)&1 == 1
}

func (s *Store) allocateLocked(page uint64) {
	if !s.isAllocated(page) {
		s.allocated[page/64].Or(1 << (page % 64))
		s.pages.Add(1)
	}
}

// piece is how much of a range lies in its first page.
func piece(offset, length uint64) uint64 { return min(length, PageSize-offset%PageSize) }
