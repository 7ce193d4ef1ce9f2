// Package invariant stops the process when a fact that only a bug of ours can
// falsify turns out false.
//
// Conditions the world can cause (a bad request, a failing disk) are errors and
// never come here. Builds with -tags invariants also run the costly checks that
// are guarded by [Enabled]; release builds compile them away.
package invariant

import "fmt"

// Check panics with the formatted message when ok is false.
//
// It is meant for checks that are cheap enough for release builds. The
// arguments escape, so it does not belong on a zero-allocation path unless it
// is guarded by an if on the same condition.
func Check(ok bool, format string, args ...any) {
	if !ok {
		panic("invariant violated: " + fmt.Sprintf(format, args...))
	}
}
