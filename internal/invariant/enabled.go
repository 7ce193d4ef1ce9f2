//go:build invariants

package invariant

// Enabled reports whether the costly checks are compiled in (-tags invariants).
const Enabled = true
