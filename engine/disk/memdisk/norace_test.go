//go:build !race

package memdisk

// raceEnabled reports whether the race detector, which is slow, is compiled in.
const raceEnabled = false
