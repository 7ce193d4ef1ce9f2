//go:build race

package observe

// raceEnabled reports whether the race detector, which allocates, is compiled in.
const raceEnabled = true
