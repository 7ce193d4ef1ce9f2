package buf

import "unsafe"

// Aligned reports whether b starts at a multiple of alignment, a power of two.
func Aligned(b []byte, alignment int) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(alignment-1) == 0
}
