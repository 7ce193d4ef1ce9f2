package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// options say what a run does.
type options struct {
	seed      uint64
	steps     uint64 // at least so many
	until     string // go on until this file exists; empty: do not
	sizeMax   int64  // bytes of the file or device that are used
	lengthMax int64  // of one operation
	check     bool   // compare everything after each step
	without   [kindCount]bool
	logMax    int    // steps a difference shows
	command   string // that repeats the run, without the number of steps and the path
	path      string
}

// stress is a target and what it should hold.
type stress struct {
	options
	target target
	choose chooser

	want    []byte // what target holds: its size and all its bytes
	data    []byte // of the step at hand, lengthMax long
	history history
	counts  [kindCount]uint64
	lacks   [kindCount]bool // not supported here
}

// newStress returns a stress of t. A file begins empty, a device with what is on it.
func newStress(t target, o options) (*stress, error) {
	s := &stress{options: o, target: t}
	size, err := t.size()
	if err != nil {
		return nil, err
	}
	if t.block() {
		s.sizeMax = min(s.sizeMax, size) / align * align
		s.want = make([]byte, s.sizeMax)
		if _, err := t.read(s.want, 0, cached); err != nil {
			return nil, err
		}
	} else {
		s.want = make([]byte, 0, s.sizeMax)
		if err := t.resize(0); err != nil {
			return nil, err
		}
	}
	s.lengthMax = min(s.lengthMax, s.sizeMax)
	if s.lengthMax < align {
		return nil, fmt.Errorf("%d bytes are too few; at least %d", s.lengthMax, align)
	}
	s.choose = chooser{seed: s.seed, block: t.block(), sizeMax: s.sizeMax, lengthMax: s.lengthMax}
	s.data = make([]byte, s.lengthMax+align)
	return s, nil
}

// run does the steps, and compares everything at the end with what the device holds.
func (s *stress) run() error {
	number := uint64(0)
	for ; number < s.steps || !s.mayEnd(number); number++ {
		if err := s.step(s.choose.choose(number, int64(len(s.want)))); err != nil {
			return err
		}
	}
	return s.compareStored(step{number: number, kind: compare})
}

// mayEnd tells whether the file that ends the run exists. It looks seldom.
func (s *stress) mayEnd(number uint64) bool {
	if s.until == "" {
		return true
	}
	if number%16 != 0 {
		return false
	}
	_, err := os.Stat(s.until)
	return !errors.Is(err, fs.ErrNotExist)
}

// step does one step, unless there is nothing to do it to, it is left out, or the target lacks it.
func (s *stress) step(at step) error {
	if s.without[at.kind] || at.length == 0 && at.kind < flush && at.kind != truncate {
		return nil
	}
	s.history.add(at)
	s.counts[at.kind]++
	err := s.do(at)
	if errors.Is(err, errors.ErrUnsupported) {
		s.history.drop()
		s.lacks[at.kind] = true
		err = nil
	}
	if err == nil && s.check {
		err = s.compareStored(at)
	}
	if err == nil {
		return nil
	}
	if d := new(difference); errors.As(err, &d) {
		return err
	}
	return fmt.Errorf("seed %d, %s: %w", s.seed, at, err)
}

func (s *stress) do(at step) error {
	offset, end := at.offset, at.offset+at.length
	switch at.kind {
	case write:
		return s.write(at, cached)
	case directWrite:
		return s.write(at, direct)
	case mappedWrite:
		return s.write(at, mapped)
	case read:
		return s.read(at, offset, at.length, cached)
	case directRead:
		return s.read(at, offset, at.length, direct)
	case mappedRead:
		return s.read(at, offset, at.length, mapped)
	case truncate:
		if err := s.target.resize(offset); err != nil {
			return err
		}
		s.resize(offset)
	case punch, zero:
		// The kernel drops the pages of a device before it knows whether the device
		// can do it, and what was only in them is gone.
		if s.target.block() {
			if err := s.target.sync(); err != nil {
				return err
			}
		}
		act := s.target.punch
		if at.kind == zero {
			act = s.target.zero
		}
		if err := act(offset, at.length); err != nil {
			return err
		}
		clear(s.want[offset:end])
	case allocate:
		if err := s.target.allocate(offset, at.length, at.variant); err != nil {
			return err
		}
		if !at.variant && end > int64(len(s.want)) {
			s.resize(end)
		}
	case discard:
		return s.discard(at)
	case flush:
		return s.target.sync()
	case forget:
		return s.target.forget()
	case reopen:
		return s.target.reopen()
	case compare:
		return s.compare(at)
	}
	return nil
}

// resize makes what is wanted size bytes long, with zeroes where there was nothing.
func (s *stress) resize(size int64) {
	had := int64(len(s.want))
	s.want = s.want[:size]
	if size > had {
		clear(s.want[had:])
	}
}

func (s *stress) write(at step, how access) error {
	data := s.data[:at.length]
	fill(data, s.seed, at.number, at.offset)
	if err := s.target.write(data, at.offset, how); err != nil {
		return err
	}
	if end := at.offset + at.length; end > int64(len(s.want)) {
		s.resize(end)
	}
	copy(s.want[at.offset:], data)
	if how == mapped && at.variant {
		return s.target.sync()
	}
	return nil
}

func (s *stress) read(at step, offset, length int64, how access) error {
	got := s.data[:length]
	n, err := s.target.read(got, offset, how)
	if err != nil {
		return err
	}
	want := s.want[offset:min(offset+length, int64(len(s.want)))]
	if n != len(want) {
		return fmt.Errorf("%d bytes are there, want %d", n, len(want))
	}
	return s.differ(at, got[:n], offset)
}

// discard has a range discarded, and takes what is there then as what is wanted:
// each block as it was or zeroes.
func (s *stress) discard(at step) error {
	if err := s.target.sync(); err != nil { // the pages of the range are dropped
		return err
	}
	if err := s.target.discard(at.offset, at.length); err != nil {
		return err
	}
	got := s.data[:at.length]
	if _, err := s.target.read(got, at.offset, cached); err != nil {
		return err
	}
	for i := int64(0); i < at.length; i += align {
		block, want := got[i:i+align], s.want[at.offset+i:at.offset+i+align]
		if bytes.Count(block, []byte{0}) == align {
			clear(want)
		} else if err := s.differ(at, block, at.offset+i); err != nil {
			return err
		}
	}
	return nil
}

// compare compares all of the target.
func (s *stress) compare(at step) error {
	size, err := s.target.size()
	if err != nil {
		return err
	}
	if !s.target.block() && size != int64(len(s.want)) {
		return fmt.Errorf("the file has %d bytes, want %d", size, len(s.want))
	}
	for offset := int64(0); offset < int64(len(s.want)); offset += s.lengthMax {
		if err := s.read(at, offset, s.lengthMax, cached); err != nil {
			return err
		}
	}
	return nil
}

// compareStored compares what the device holds, not what is in memory.
func (s *stress) compareStored(at step) error {
	if err := s.target.forget(); err != nil {
		return fmt.Errorf("seed %d, %s: %w", s.seed, at, err)
	}
	return s.compare(at)
}

// differ returns a difference when got, read at offset, is not what is wanted.
func (s *stress) differ(at step, got []byte, offset int64) error {
	want := s.want[offset : offset+int64(len(got))]
	if bytes.Equal(got, want) {
		return nil
	}
	return newDifference(s, at, got, want, offset)
}

// summary says what was done in how long.
func (s *stress) summary(took time.Duration) string {
	var text bytes.Buffer
	total := uint64(0)
	for _, n := range s.counts {
		total += n
	}
	fmt.Fprintf(&text, "seed %d: %d steps in %.1f s", s.seed, total, took.Seconds())
	for k, n := range s.counts {
		switch {
		case s.lacks[k]:
			fmt.Fprintf(&text, ", %s not supported", kind(k))
		case n > 0:
			fmt.Fprintf(&text, ", %d %s", n, kind(k))
		}
	}
	return text.String()
}
