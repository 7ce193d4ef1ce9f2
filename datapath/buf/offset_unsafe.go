package buf

import "unsafe"

// offset is where b starts in the arena, in bytes, or -1 when it is other
// memory.
func (a *Arena) offset(b []byte) int {
	if len(a.memory) == 0 {
		return -1
	}
	d := uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(a.memory)))
	if d >= uintptr(len(a.memory)) {
		return -1
	}
	return int(d)
}
