package nbd

import (
	"testing"
	"time"
)

// stream is a client that always has more to send: each look finds begun requests.
type stream struct {
	gathering
	reports uint64
}

func newStream() *stream {
	return &stream{gathering: gathering{needed: gatherAfter}}
}

func (s *stream) next(idle time.Duration, begun int) bool {
	s.reports++
	return s.look(s.reports-1, idle, begun, 0)
}

// untilLull is how many looks there are before one asks for a lull; -1: none of many does.
func (s *stream) untilLull(idle time.Duration, begun int) int {
	for n := range 4 * gatherAfterMax {
		if s.next(idle, begun) {
			return n
		}
	}
	return -1
}

func TestRequestsGatherOnlyInAStream(t *testing.T) {
	if n := newStream().untilLull(0, 2); n != gatherAfter-1 {
		t.Errorf("a stream gathers after %d looks, want %d", n, gatherAfter-1)
	}
	if n := newStream().untilLull(gatherIdle, 1); n != gatherAfter-1 {
		t.Errorf("a stream with short pauses gathers after %d looks, want %d", n, gatherAfter-1)
	}
	if n := newStream().untilLull(gatherIdle+1, 1); n >= 0 {
		t.Errorf("a client that answers replies is made to gather, after %d looks", n)
	}
	if n := newStream().untilLull(0, gatherEnough); n >= 0 {
		t.Errorf("requests gather after %d looks though each finds enough", n)
	}
	if n := newStream().untilLull(0, 0); n >= 0 {
		t.Errorf("halves of requests gather, after %d looks", n)
	}
	for what, look := range map[string]func(g *gathering, i uint64) bool{
		"writes":                 func(g *gathering, i uint64) bool { return g.look(i, 0, 1, 4096) },
		"beside others' work":    func(g *gathering, i uint64) bool { return g.look(2*i, 0, 1, 0) },
		"with a pause each time": func(g *gathering, i uint64) bool { return g.look(i, time.Duration(i%8)*gatherIdle, 1, 0) },
	} {
		g := &gathering{needed: gatherAfter}
		for i := range uint64(4 * gatherAfterMax) {
			if look(g, i) {
				t.Errorf("%s: gathered at look %d", what, i)
				break
			}
		}
	}
}

// After a lull comes the look that takes what has gathered, then the one that tells.
func TestAStarvedClientIsLeftAlone(t *testing.T) {
	s := newStream()
	needed := gatherAfter
	for s.needed < gatherAfterMax {
		n := s.untilLull(0, 2)
		if n != needed-1 {
			t.Fatalf("gathered after %d looks, want %d", n, needed-1)
		}
		if s.next(0, 4) {
			t.Fatal("a second lull before the replies of the first had an effect")
		}
		if s.next(1, 4) {
			t.Fatal("a client that had nothing left to send is made to gather")
		}
		if needed *= 2; s.needed != needed {
			t.Fatalf("%d looks are needed after a client was starved, want %d", s.needed, needed)
		}
	}
	s.untilLull(0, 2)
	s.next(0, 4)
	s.next(1, 4)
	if s.needed != gatherAfterMax {
		t.Errorf("%d looks are needed, more than %d", s.needed, gatherAfterMax)
	}
	quiet := newStream()
	quiet.untilLull(0, 2)
	if quiet.next(1, 4) || quiet.needed != 2*gatherAfter {
		t.Errorf("nothing came in a lull, and %d looks are needed, want %d", quiet.needed, 2*gatherAfter)
	}
	s.untilLull(0, 2)
	for needed = gatherAfterMax / 2; needed >= gatherAfter; needed /= 2 { // it has more in flight now
		if s.next(0, 4) {
			t.Fatal("a lull at the look that takes what has gathered")
		}
		if !s.next(0, 4) || s.needed != needed {
			t.Fatalf("after a lull that did no harm %d looks are needed, want %d and the next", s.needed, needed)
		}
	}
}
