package filedev

import (
	"math/rand/v2"
	"testing"
)

func wanted(offset, length uint64, kind lockKind) *hold {
	h := &hold{}
	h.want(offset, length, kind)
	return h
}

func TestLockKinds(t *testing.T) {
	for _, test := range []struct {
		held, asked lockKind
		together    bool
	}{
		{lockRead, lockRead, true},
		{lockWrite, lockWrite, true},
		{lockRead, lockWrite, false},
		{lockWrite, lockRead, false},
		{lockAlone, lockAlone, false},
		{lockAlone, lockWrite, false},
		{lockWrite, lockAlone, false},
		{lockAlone, lockRead, false},
		{lockRead, lockAlone, false},
	} {
		var l regionLocks
		a, b := wanted(0, 4096, test.held), wanted(4096, 512, test.asked)
		if held, _ := l.take(a); !held {
			t.Fatalf("kind %d: a free region was not to be had", test.held)
		}
		if held, _ := l.take(b); held != test.together {
			t.Errorf("kind %d beside kind %d: %t, want %t", test.asked, test.held, held, test.together)
		}
		if !test.together {
			if wake := l.release(a); !wake {
				t.Errorf("kind %d beside kind %d: its release wakes nobody", test.asked, test.held)
			}
			if held, _ := l.take(b); !held {
				t.Errorf("kind %d after kind %d: not to be had", test.asked, test.held)
			}
		}
	}
}

func TestLockIsFirstComeFirstServed(t *testing.T) {
	var l regionLocks
	first := wanted(0, 1, lockWrite)
	l.take(first)
	// A read-modify-write waits; nobody who came later passes it, though it would fit.
	queue := []*hold{wanted(0, 1, lockAlone), wanted(0, 1, lockWrite), wanted(0, 1, lockWrite), wanted(0, 1, lockAlone)}
	for i, h := range queue {
		if held, _ := l.take(h); held {
			t.Fatalf("waiter %d did not have to wait", i)
		}
	}
	check := func(when string, want ...bool) {
		t.Helper()
		for i := len(queue) - 1; i >= 0; i-- { // in whatever order they try
			l.take(queue[i])
		}
		for i, h := range queue {
			if held, _ := l.take(h); held != want[i] {
				t.Fatalf("%s: waiter %d holds: %t, want %t", when, i, held, want[i])
			}
		}
	}
	check("nothing released", false, false, false, false)
	l.release(first)
	check("first released", true, false, false, false)
	queue[0], first = &hold{}, queue[0]
	l.release(first)
	queue[0].want(0, 1, lockWrite) // comes again, last
	l.take(queue[0])
	check("the lone one released", false, true, true, false)
	l.release(queue[1])
	check("one of two writes released", false, true, true, false)
}

func TestLockOfWrappedRangeIsTakenInAscendingOrder(t *testing.T) {
	for _, test := range []struct{ offset, length uint64 }{
		{0, 1},
		{(regionCount - 3) * regionSize, 10 * regionSize},
		{(3*regionCount - 1) * regionSize, regionSize},
		{5*regionSize - 1, 2},
		{7 * regionSize, 1 << 50},
		{1<<63 - 4096, 4096},
	} {
		h := wanted(test.offset, test.length, lockWrite)
		seen := make(map[uint32]bool)
		for i := range h.count {
			region := h.region(i)
			if i > 0 && region <= h.region(i-1) || region >= regionCount {
				t.Fatalf("%d+%d: region %d after %d", test.offset, test.length, region, h.region(i-1))
			}
			seen[region] = true
		}
		for offset := test.offset; offset-test.offset < test.length && offset-test.offset < regionCount*regionSize; offset += regionSize {
			if !seen[uint32(offset>>regionShift%regionCount)] {
				t.Fatalf("%d+%d: region of %d is not locked", test.offset, test.length, offset)
			}
		}
	}
}

// TestLockAlwaysGoesOn takes and releases at random, also in ranges that overlap
// in part, and wants nobody to wait for ever.
func TestLockAlwaysGoesOn(t *testing.T) {
	const seed, rounds = 1, 20000
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var l regionLocks
	holds := make([]*hold, 40)
	full := make([]bool, len(holds))
	served := 0
	for range rounds {
		i := random.IntN(len(holds))
		switch h := holds[i]; {
		case h == nil:
			holds[i] = wanted(random.Uint64N(12)*regionSize, 1+random.Uint64N(4*regionSize), lockKind(random.IntN(3)))
		case full[i]:
			l.release(h)
			holds[i], full[i] = nil, false
			served++
		default:
			full[i], _ = l.take(h)
		}
	}
	for left := true; left; { // everyone who waits is served by and by
		left = false
		progress := false
		for i, h := range holds {
			if h == nil {
				continue
			}
			left = true
			if held, _ := l.take(h); held {
				l.release(h)
				holds[i], progress = nil, true
			}
		}
		if left && !progress {
			t.Fatal("those who are left wait for each other")
		}
	}
	if served < rounds/100 {
		t.Errorf("%d served in %d rounds", served, rounds)
	}
	for i := range l.regions {
		if v := l.regions[i].Load(); v&holdersMax != 0 || uint16(v>>lockServingShift) != uint16(v>>lockNextShift) {
			t.Errorf("region %d is left as %#x", i, v)
		}
	}
}
