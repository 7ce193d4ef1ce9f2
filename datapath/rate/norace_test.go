//go:build !race

package rate

import "testing"

func TestLineAllocatesNothing(t *testing.T) {
	l := NewLine[*int](4)
	turns, now := New(Limits{RequestsPerSecond: 1, BurstRequests: 1}), int64(0)
	turns.Next(now, 0)
	who := new(int)
	if n := testing.AllocsPerRun(100, func() {
		l.Enter(turns, now, who, 4096)
		l.Enter(turns, now, who, 4096)
		for ; !l.Empty(); now += second {
			l.Leave(turns, now)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
