//go:build race

package devtest

// raceEnabled reports whether the race detector, which allocates, is compiled in.
const raceEnabled = true
