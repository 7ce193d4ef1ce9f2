// Package lint holds the rules of this repository that the compiler and
// staticcheck do not know, as tests: who may import whom and why, where unsafe
// may stand, what must be documented, seeded or named.
//
// It reads the source tree, all platforms and build tags at once, and needs
// neither the network nor the go command. Its tables, in imports_test.go, are
// the import policy: a new package gets a row there, and a reason with it.
package lint
