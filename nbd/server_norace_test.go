//go:build !race

package nbd

// serverRace reports whether the race detector, which allocates, is compiled in.
const serverRace = false
