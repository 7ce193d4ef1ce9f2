package ring

import (
	"runtime"
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

func TestQueueAgreesWithASlice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		capacity := 1 << rapid.IntRange(1, 5).Draw(t, "capacity")
		q := NewMPSC[int](capacity)
		var model []int
		next := 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "push") {
				next++
				if got, want := q.Push(next), len(model) < capacity; got != want {
					t.Fatalf("push onto %d of %d: %t", len(model), capacity, got)
				} else if got {
					model = append(model, next)
				}
			} else {
				v, ok := q.Pop()
				if ok != (len(model) > 0) || ok && v != model[0] {
					t.Fatalf("pop gave %d, %t, want the first of %v", v, ok, model)
				}
				model = model[min(1, len(model)):]
			}
			if q.Len() != len(model) || q.Empty() != (len(model) == 0) {
				t.Fatalf("length %d, empty %t, want %d", q.Len(), q.Empty(), len(model))
			}
		}
	})
}

func TestEveryProducersValuesArriveOnceInItsOrder(t *testing.T) {
	const producers, each = 8, 5000
	for _, capacity := range []int{2, 64, 1024} {
		q := NewMPSC[[2]int](capacity)
		var wg sync.WaitGroup
		for p := range producers {
			wg.Go(func() {
				for i := range each {
					for !q.Push([2]int{p, i}) {
						runtime.Gosched()
					}
				}
			})
		}
		var next [producers]int
		for n := 0; n < producers*each; {
			v, ok := q.Pop()
			if !ok {
				runtime.Gosched()
				continue
			}
			if v[1] != next[v[0]] {
				t.Fatalf("capacity %d: producer %d: value %d, want %d", capacity, v[0], v[1], next[v[0]])
			}
			next[v[0]]++
			n++
		}
		wg.Wait()
		if v, ok := q.Pop(); ok || !q.Empty() {
			t.Errorf("%v is left", v)
		}
	}
}

func TestPoppedValuesAreForgotten(t *testing.T) {
	q := NewMPSC[*int](2)
	q.Push(new(int))
	q.Pop()
	for i := range q.cells {
		if q.cells[i].value != nil {
			t.Errorf("cell %d keeps a value", i)
		}
	}
}

func TestCapacityIsAPowerOfTwo(t *testing.T) {
	for _, capacity := range []int{-2, 0, 1, 3, 6, 1000} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("capacity %d was taken", capacity)
				}
			}()
			NewMPSC[int](capacity)
		}()
	}
}

func TestQueueAllocatesNothing(t *testing.T) {
	q := NewMPSC[*int](64)
	v := new(int)
	n := testing.AllocsPerRun(100, func() {
		for range 64 {
			q.Push(v)
		}
		for range 64 {
			q.Pop()
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzQueue pushes on a set bit and pops on a clear one.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{0xff, 0x0f, 0xaa})
	f.Fuzz(func(t *testing.T, script []byte) {
		q := NewMPSC[int](8)
		var model []int
		for i, b := range script {
			for bit := range 8 {
				if b>>bit&1 == 1 {
					if q.Push(i*8 + bit) {
						model = append(model, i*8+bit)
					}
				} else if v, ok := q.Pop(); ok {
					if len(model) == 0 || v != model[0] {
						t.Fatalf("popped %d, want the first of %v", v, model)
					}
					model = model[1:]
				} else if len(model) != 0 {
					t.Fatal("empty too soon")
				}
			}
		}
		var rest []int
		for v, ok := q.Pop(); ok; v, ok = q.Pop() {
			rest = append(rest, v)
		}
		if !slices.Equal(rest, model) {
			t.Fatalf("left %v, want %v", rest, model)
		}
	})
}

func BenchmarkPushPop(b *testing.B) {
	q := NewMPSC[*int](1024)
	v := new(int)
	for b.Loop() {
		q.Push(v)
		q.Pop()
	}
}
