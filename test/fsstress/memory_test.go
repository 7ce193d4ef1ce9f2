package main

import (
	"errors"
	"slices"
)

const pageSize = 4096

// memory is a target with a page cache over a device, and faults.
type memory struct {
	device bool
	stored []byte
	dirty  map[int64][]byte // pages that the device does not have yet
	clean  map[int64][]byte // pages that it has

	writebacks int
	fault      fault
	err        error // what every operation fails with
}

// fault is what a memory does wrong, once, at a time of its choice.
type fault struct {
	after      int                                                // write-backs that go well
	write      func(m *memory, page int64, data []byte)           // instead of a write-back
	punch      bool                                               // holes are not made
	shrink     bool                                               // what truncation cut off is there again after growth
	read       func(m *memory, p []byte, offset int64)            // after each read from the device
	directRead func(m *memory, p []byte, offset int64, n int) int // how much a direct read returns
}

func newMemory(size int64, device bool) *memory {
	m := &memory{device: device, dirty: map[int64][]byte{}, clean: map[int64][]byte{}}
	if device {
		m.stored = make([]byte, size)
	}
	return m
}

func (m *memory) block() bool          { return m.device }
func (m *memory) size() (int64, error) { return int64(len(m.stored)), m.err }

// page returns the cached page, read from the device when need be.
func (m *memory) page(number int64) []byte {
	if p := m.dirty[number]; p != nil {
		return p
	}
	p := m.clean[number]
	if p == nil {
		p = make([]byte, pageSize)
		if at := number * pageSize; at < int64(len(m.stored)) {
			copy(p, m.stored[at:])
		}
		if m.fault.read != nil {
			m.fault.read(m, p, number*pageSize)
		}
		m.clean[number] = p
	}
	return p
}

func (m *memory) read(p []byte, offset int64, how access) (int, error) {
	if how == direct {
		m.writeBack()
		m.clean = map[int64][]byte{}
	}
	n := max(0, min(len(p), int(int64(len(m.stored))-offset)))
	for done := 0; done < n; {
		at := offset + int64(done)
		done += copy(p[done:n], m.page(at / pageSize)[at%pageSize:])
	}
	if how == direct && m.fault.directRead != nil {
		n = m.fault.directRead(m, p, offset, n)
	}
	return n, m.err
}

func (m *memory) write(p []byte, offset int64, how access) error {
	if grow := offset + int64(len(p)) - int64(len(m.stored)); grow > 0 {
		m.stored = append(m.stored, make([]byte, grow)...)
	}
	for done := 0; done < len(p); {
		at := offset + int64(done)
		page := m.page(at / pageSize)
		done += copy(page[at%pageSize:], p[done:])
		m.dirty[at/pageSize] = page
	}
	if how == direct {
		m.writeBack()
	}
	return m.err
}

// writeBack writes the dirty pages, in order.
func (m *memory) writeBack() {
	var numbers []int64
	for number := range m.dirty {
		numbers = append(numbers, number)
	}
	slices.Sort(numbers)
	for _, number := range numbers {
		page := m.dirty[number]
		m.clean[number] = page
		m.writebacks++
		if m.writebacks == m.fault.after+1 && m.fault.write != nil {
			m.fault.write(m, number*pageSize, page)
			continue
		}
		if at := number * pageSize; at < int64(len(m.stored)) {
			copy(m.stored[at:], page)
		}
	}
	m.dirty = map[int64][]byte{}
}

func (m *memory) resize(size int64) error {
	m.writeBack()
	m.clean = map[int64][]byte{}
	old := int64(len(m.stored))
	if size <= old {
		m.stored = m.stored[:size]
		return m.err
	}
	if m.fault.shrink && int64(cap(m.stored)) >= size {
		m.stored = m.stored[:size]
	} else {
		m.stored = append(m.stored, make([]byte, size-old)...)
	}
	return m.err
}

func (m *memory) punch(offset, length int64) error {
	if m.fault.punch {
		return nil
	}
	return m.zero(offset, length)
}

func (m *memory) zero(offset, length int64) error {
	m.writeBack()
	m.clean = map[int64][]byte{}
	clear(m.stored[min(offset, int64(len(m.stored))):min(offset+length, int64(len(m.stored)))])
	return m.err
}

func (m *memory) allocate(offset, length int64, keepSize bool) error {
	if end := offset + length; !keepSize && end > int64(len(m.stored)) {
		return m.resize(end)
	}
	return m.err
}

func (m *memory) discard(offset, length int64) error {
	if !m.device {
		return errors.ErrUnsupported
	}
	if offset/pageSize%2 == 0 { // a discard is advice
		return m.err
	}
	return m.zero(offset, length)
}

func (m *memory) sync() error   { m.writeBack(); return m.err }
func (m *memory) forget() error { m.writeBack(); m.clean = map[int64][]byte{}; return m.err }
func (m *memory) reopen() error { return m.err }
func (m *memory) close() error  { return m.err }
