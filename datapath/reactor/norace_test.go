//go:build !race

package reactor

// raceEnabled reports whether the race detector, which allocates, is compiled in.
const raceEnabled = false
