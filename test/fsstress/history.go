package main

import (
	"bytes"
	"fmt"
	"strings"
)

// historyMax is how many steps are remembered: what a run of the suites takes, and then
// some; 40 bytes each.
const historyMax = 1 << 14

// history is the last steps, oldest overwritten first.
type history struct {
	steps [historyMax]step
	count uint64 // of all steps ever
}

func (h *history) add(s step) {
	h.steps[h.count%historyMax] = s
	h.count++
}

// drop takes back the last step, which came to nothing.
func (h *history) drop() { h.count-- }

// back calls visit with the steps from the last to the first that is remembered,
// until it returns false.
func (h *history) back(visit func(step) bool) {
	for i := h.count; i > 0 && h.count-i < historyMax; i-- {
		if !visit(h.steps[(i-1)%historyMax]) {
			return
		}
	}
}

// difference is the error of bytes that are not what was written.
type difference struct {
	seed   uint64
	at     step  // the step that found it
	offset int64 // of the first byte that differs
	length int64 // to the last one, in the range that was read
	text   string
}

func (d *difference) Error() string { return d.text }

// newDifference describes got, which should be want, read at offset by a step of s.
func newDifference(s *stress, at step, got, want []byte, offset int64) *difference {
	first, last := 0, len(got)-1
	for got[first] == want[first] {
		first++
	}
	for got[last] == want[last] {
		last--
	}
	d := &difference{seed: s.seed, at: at, offset: offset + int64(first), length: int64(last - first + 1)}
	shown := min(first+16, last+1)
	var text strings.Builder
	fmt.Fprintf(&text, "seed %d, %s: bytes %d to %d differ\n", d.seed, at, d.offset, d.offset+d.length-1)
	fmt.Fprintf(&text, "  found  %x: %s\n", got[first:shown], s.origin(got[first:last+1], d.offset))
	fmt.Fprintf(&text, "  wanted %x: %s\n", want[first:shown], s.origin(want[first:last+1], d.offset))
	fmt.Fprintf(&text, "the last steps that changed byte %d, last first:\n", d.offset)
	shownSteps := 0
	s.history.back(func(past step) bool {
		if past.covers(d.offset) {
			fmt.Fprintf(&text, "  %s\n", past)
			shownSteps++
		}
		return shownSteps < s.logMax
	})
	fmt.Fprintf(&text, "the last steps of all, last first:\n")
	shownSteps = 0
	s.history.back(func(past step) bool {
		fmt.Fprintf(&text, "  %s\n", past)
		shownSteps++
		return shownSteps < s.logMax
	})
	fmt.Fprintf(&text, "to repeat it: %s --steps %d %s", s.command, at.number+1, s.path)
	d.text = text.String()
	return d
}

// origin says which step made data at offset, going by its first bytes.
func (s *stress) origin(data []byte, offset int64) string {
	data = data[:min(len(data), 64)]
	if len(bytes.Trim(data, "\x00")) == 0 {
		return "zeroes"
	}
	who, made := "no step that is remembered wrote this here", make([]byte, len(data))
	s.history.back(func(past step) bool {
		if !past.kind.writes() || !past.covers(offset) {
			return true
		}
		// Where another step overwrote the end, the beginning tells.
		n := min(len(data), 8, int(past.offset+past.length-offset))
		fill(made[:n], s.seed, past.number, offset)
		if bytes.Equal(made[:n], data[:n]) {
			who = "of " + past.String()
			return false
		}
		return true
	})
	return who
}
