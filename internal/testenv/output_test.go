package testenv

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

func TestOutputKeepsWhatAllWrite(t *testing.T) {
	var o Output
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() {
			for range 100 {
				fmt.Fprintf(&o, "line of %d\n", i)
				_ = o.String()
			}
		})
	}
	group.Wait()
	if n := strings.Count(o.String(), "\n"); n != 400 {
		t.Errorf("%d lines, want 400", n)
	}
	if n, rest := len(o.Take()), o.String(); n != 400*len("line of 0\n") || rest != "" {
		t.Errorf("%d bytes taken, left is %q", n, rest)
	}
}
