package writelog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// encode writes a log as the kernel does.
type encode struct {
	b      []byte
	sector int
	count  uint64
}

func newEncode(sector int) *encode {
	return &encode{b: make([]byte, sector), sector: sector}
}

func (c *encode) entry(sector, sectors uint64, flags Flags, text string, data []byte) *encode {
	b := make([]byte, c.sector)
	binary.LittleEndian.PutUint64(b[0:], sector)
	binary.LittleEndian.PutUint64(b[8:], sectors)
	binary.LittleEndian.PutUint64(b[16:], uint64(flags))
	binary.LittleEndian.PutUint64(b[24:], uint64(len(text)))
	copy(b[entrySize:], text)
	c.b = append(append(c.b, b...), data...)
	c.count++
	return c
}

func (c *encode) bytes() []byte {
	binary.LittleEndian.PutUint64(c.b[0:], magic)
	binary.LittleEndian.PutUint64(c.b[8:], version)
	binary.LittleEndian.PutUint64(c.b[16:], c.count)
	binary.LittleEndian.PutUint32(c.b[24:], uint32(c.sector))
	return c.b
}

// script shows what is done to a device, a line each.
type script struct{ lines []string }

func (s *script) WriteAt(p []byte, offset int64) (int, error) {
	s.lines = append(s.lines, fmt.Sprintf("write %d %q", offset, slices.Compact(slices.Clone(p))))
	return len(p), nil
}

func (s *script) Discard(offset, length int64) error {
	s.lines = append(s.lines, fmt.Sprintf("discard %d+%d", offset, length))
	return nil
}

// sample is a log with an entry of every kind.
func sample(sector int) []byte {
	fill := func(b byte, sectors int) []byte { return bytes.Repeat([]byte{b}, sectors*sector) }
	return newEncode(sector).
		entry(8, 2, 0, "", append(fill('a', 1), fill('b', 1)...)).
		entry(0, 0, Flush, "", nil).
		entry(0, 0, Mark, "promise 1", nil).
		entry(100, 50, Discard, "", nil).
		entry(3, 1, FUA|Metadata, "", fill('c', 1)).
		entry(4, 1, Flush|FUA, "", fill('d', 1)).bytes()
}

func TestReadAndApply(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		l, err := Read(bytes.NewReader(sample(sector)))
		if err != nil {
			t.Fatal(err)
		}
		var durable []int
		s := &script{}
		for i := range l.Entries {
			if l.Entries[i].Durable() {
				durable = append(durable, i)
			}
			if err := l.Apply(s, &l.Entries[i]); err != nil {
				t.Error(err)
			}
		}
		at := func(n int) int { return n * sector }
		want := []string{
			fmt.Sprintf(`write %d "ab"`, at(8)), fmt.Sprintf("discard %d+%d", at(100), at(50)),
			fmt.Sprintf(`write %d "c"`, at(3)), fmt.Sprintf(`write %d "d"`, at(4)),
		}
		if !slices.Equal(s.lines, want) {
			t.Errorf("%q", s.lines)
		}
		if !slices.Equal(durable, []int{1, 4, 5}) || l.Entries[2].Text != "promise 1" || l.Entries[2].Writes() || !l.Entries[3].Writes() {
			t.Errorf("%v, %+v", durable, l.Entries)
		}
		s.lines = nil
		if err := l.ApplyPart(s, &l.Entries[0], int64(sector), int64(sector)); err != nil || !slices.Equal(s.lines, []string{fmt.Sprintf(`write %d "b"`, at(9))}) {
			t.Errorf("%v, %q", err, s.lines)
		}
	}
}

func TestReadRefusesWhatIsNoLog(t *testing.T) {
	patch := func(at int, value uint64) []byte {
		b := sample(512)
		binary.LittleEndian.PutUint64(b[at:], value)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":         nil,
		"short":         sample(512)[:20],
		"magic":         patch(0, 1),
		"version":       patch(8, 2),
		"count":         patch(16, entriesMax+1),
		"sector size":   patch(24, 1000),
		"no sectors":    patch(24, 0),
		"missing entry": patch(16, 7),
		"flags":         patch(512+16, 1<<9),
		"position":      patch(512, 1<<60),
		"long mark":     newEncode(512).entry(0, 0, Mark, strings.Repeat("x", 481), nil).bytes(),
		"mark and data": newEncode(512).entry(0, 1, Mark, "x", make([]byte, 512)).bytes(),
		"text, no mark": newEncode(512).entry(0, 0, Flush, "x", nil).bytes(),
	} {
		if _, err := Read(bytes.NewReader(b)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cut := sample(512)
	l, err := Read(bytes.NewReader(cut[:len(cut)-1])) // only data are missing
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Apply(&script{}, &l.Entries[5]); err == nil {
		t.Error("data beyond the end of the log were read")
	}
}

func FuzzRead(f *testing.F) {
	f.Add(sample(512))
	f.Add(sample(512)[:2000])
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Read(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Error(err)
			}
			return
		}
		for i := range l.Entries {
			if e := &l.Entries[i]; e.Offset < 0 || e.Length < 0 {
				t.Errorf("%+v", e)
			} else if e.Flags&Discard != 0 || e.Length < 1<<20 {
				_ = l.Apply(discarding{}, e) // data may be cut off
			}
		}
	})
}

type discarding struct{}

func (discarding) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (discarding) Discard(int64, int64) error             { return nil }
