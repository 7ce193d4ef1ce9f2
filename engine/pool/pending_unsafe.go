package pool

import (
	"sync/atomic"
	"unsafe"
)

// words is memory as words that other threads may look at.
//
// The memory is a mapping of the kernel's, aligned to pages, and outlives the
// result.
func words(b []byte) []atomic.Uint64 {
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}
