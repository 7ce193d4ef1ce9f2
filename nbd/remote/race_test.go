//go:build race

package remote

// raceEnabled reports whether the race detector, which allocates, is compiled in.
const raceEnabled = true
