package devtest

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestHistoryOfOneRegister(t *testing.T) {
	w := func(v uint64, start, end int64) Operation {
		return Operation{Write: true, Value: v, Start: start, End: end}
	}
	r := func(v uint64, start, end int64) Operation { return Operation{Value: v, Start: start, End: end} }
	for _, test := range []struct {
		name       string
		operations []Operation
		want       string // part of the error, "" for none
	}{
		{"first content", []Operation{r(0, 1, 2), w(1, 3, 4), r(1, 5, 6)}, ""},
		{"read overlaps write, old", []Operation{w(1, 1, 4), r(0, 2, 3)}, ""},
		{"read overlaps write, new", []Operation{w(1, 1, 4), r(1, 2, 3)}, ""},
		{"lost write", []Operation{w(1, 1, 2), r(0, 3, 4)}, "another"},
		{"stale read", []Operation{w(1, 1, 2), w(2, 3, 4), r(1, 5, 6)}, "another"},
		{"new then old", []Operation{w(1, 1, 10), r(1, 2, 3), r(0, 4, 5)}, "another"},
		{"values swing", []Operation{w(1, 1, 2), w(2, 1, 2), r(1, 3, 4), r(2, 5, 6)}, "another"},
		{"from the future", []Operation{r(1, 1, 2), w(1, 3, 4)}, "before it was written"},
		{"from nowhere", []Operation{r(9, 1, 2)}, "nobody"},
		{"not unique", []Operation{w(1, 1, 2), w(1, 3, 4)}, "not one write's"},
		{"failed write never seen", []Operation{w(1, 1, EndUnknown), r(0, 2, 3), r(0, 4, 5)}, ""},
		{"failed write seen late", []Operation{w(1, 1, EndUnknown), r(0, 2, 3), r(1, 4, 5), r(1, 6, 7)}, ""},
		{"failed write comes and goes", []Operation{w(1, 1, EndUnknown), r(1, 2, 3), r(0, 4, 5)}, "another"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := checkRegister(test.operations)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// ordered tries every order: the definition itself.
func ordered(left []Operation, value uint64) bool {
	if len(left) == 0 {
		return true
	}
	firstEnd := int64(EndUnknown)
	for _, o := range left {
		firstEnd = min(firstEnd, o.End)
	}
	if firstEnd == EndUnknown {
		return true // what is left are failed writes, which need not have happened
	}
	for i, o := range left {
		if o.Start > firstEnd || !o.Write && o.Value != value {
			continue
		}
		next := value
		if o.Write {
			next = o.Value
		}
		rest := append(append([]Operation{}, left[:i]...), left[i+1:]...)
		if ordered(rest, next) {
			return true
		}
	}
	return false
}

func TestHistoryAgreesWithTryingEveryOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		count := rapid.IntRange(1, 7).Draw(t, "count")
		times := rapid.Permutation(sequence(2*count)).Draw(t, "times")
		var operations []Operation
		writes := uint64(0)
		for i := range count {
			a, b := times[2*i], times[2*i+1]
			o := Operation{Start: int64(min(a, b)) + 1, End: int64(max(a, b)) + 1, Recorder: i}
			if o.Write = rapid.Bool().Draw(t, "write"); o.Write {
				writes++
				o.Value = writes
				if rapid.IntRange(0, 5).Draw(t, "failed") == 0 {
					o.End = EndUnknown
				}
			}
			operations = append(operations, o)
		}
		for i := range operations {
			if o := &operations[i]; !o.Write {
				o.Value = rapid.Uint64Range(0, writes).Draw(t, "value")
			}
		}
		err := checkRegister(operations)
		if want := ordered(operations, 0); want != (err == nil) {
			t.Fatalf("%v\nhas an order: %t, checked: %v", operations, want, err)
		}
	})
}

func sequence(n int) []int {
	s := make([]int, n)
	for i := range s {
		s[i] = i
	}
	return s
}

func TestHistoryNamesTheBlock(t *testing.T) {
	var h History
	a, b := h.Recorder(), h.Recorder()
	a.Wrote(a.Write(7, 1))
	b.Got(b.Read(7), 0)
	a.Wrote(a.Write(8, 1))
	b.Got(b.Read(8), 1)
	err := h.Check()
	if err == nil || !strings.Contains(err.Error(), "block 7") || strings.Contains(err.Error(), "block 8") {
		t.Errorf("got %v, want an error about block 7 only", err)
	}
}
