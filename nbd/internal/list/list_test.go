package list

import (
	"math/rand/v2"
	"slices"
	"testing"
)

type element struct {
	value       int
	here, there Link[element] // in two lists at once
}

func TestOrderIsThatOfPushes(t *testing.T) {
	var l, other List[element]
	if l.First() != nil || l.Pop() != nil {
		t.Error("an empty list has an element")
	}
	elements := make([]element, 4)
	for i := range elements {
		elements[i].value = i
		l.Push(&elements[i].here, &elements[i])
		other.Push(&elements[len(elements)-1-i].there, &elements[len(elements)-1-i])
	}
	l.Remove(&elements[0].here) // the first, one within, the last
	l.Remove(&elements[2].here)
	l.Remove(&elements[3].here)
	if first := l.First(); first != &elements[1] || first.here.Next() != nil || first.here.Prev() != nil {
		t.Errorf("left is %+v", first)
	}
	if elements[0].here.Next() != nil || elements[0].here.Prev() != nil {
		t.Error("an element that was taken out has neighbours")
	}
	l.Push(&elements[0].here, &elements[0])
	if elements[0].here.Prev() != &elements[1] || elements[1].here.Next() != &elements[0] {
		t.Error("an element that was taken out cannot be pushed again")
	}
	for i := len(elements) - 1; i >= 0; i-- {
		if got := other.Pop(); got != &elements[i] {
			t.Errorf("popped %+v, want element %d", got, i)
		}
	}
	if other.Pop() != nil {
		t.Error("more was popped than pushed")
	}
}

// TestAsASlice compares random steps with a slice.
func TestAsASlice(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	elements := make([]element, 16)
	var l List[element]
	var want []*element
	for range 10_000 {
		e := &elements[random.IntN(len(elements))]
		at := slices.Index(want, e)
		switch {
		case random.IntN(200) == 0:
			l, want = List[element]{}, nil
		case at < 0:
			l.Push(&e.here, e)
			want = append(want, e)
		case random.IntN(2) == 0:
			l.Remove(&e.here)
			want = slices.Delete(want, at, at+1)
		default:
			if got := l.Pop(); got != want[0] {
				t.Fatalf("seed %d: popped %p, want %p", seed, got, want[0])
			}
			want = want[1:]
		}
		var got []*element
		for e := l.First(); e != nil; e = e.here.Next() {
			got = append(got, e)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d: %d elements, want %d", seed, len(got), len(want))
		}
	}
}

func TestListsAllocateNothing(t *testing.T) {
	var l List[element]
	var e element
	if n := testing.AllocsPerRun(100, func() {
		l.Push(&e.here, &e)
		l.Pop()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
