package buf

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

func arena(t interface {
	Fatal(...any)
	Cleanup(func())
}, limit int64) *Arena {
	a, err := NewArena(limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() }) // a test that fails leaves buffers
	return a
}

// model checks an arena against what it has handed out: every buffer is filled
// with its number, and any overlap shows as another number.
type model struct {
	a    *Arena
	live [][]byte
	tags []byte
	next byte
	used int64
}

// block is what a buffer of length bytes takes.
func block(length int) int64 {
	n := int64(PageSize)
	for n < int64(length) {
		n *= 2
	}
	return n
}

func (m *model) alloc(t interface{ Fatalf(string, ...any) }, length int) {
	b := m.a.Alloc(length)
	if length <= 0 || length > ChunkSize {
		if b != nil {
			t.Fatalf("got a buffer of %d bytes", length)
		}
		return
	}
	if b == nil {
		if m.used == 0 {
			t.Fatalf("no buffer of %d bytes in an empty arena of %d", length, m.a.Limit())
		}
		if m.used+block(length) <= m.a.Limit() && length <= PageSize {
			t.Fatalf("no page with %d of %d bytes used", m.used, m.a.Limit())
		}
		return
	}
	offset := m.a.offset(b)
	if len(b) != length || int64(cap(b)) != block(length) || offset%int(block(length)) != 0 {
		t.Fatalf("buffer of %d bytes: length %d, capacity %d, offset %d", length, len(b), cap(b), offset)
	}
	m.next++
	b = b[:cap(b)]
	fillWith(b, m.next)
	m.live, m.tags = append(m.live, b), append(m.tags, m.next)
	m.used += block(length)
	m.check(t)
}

func (m *model) free(t interface{ Fatalf(string, ...any) }, i int) {
	b := m.live[i]
	for at := 0; at < len(b); at += PageSize {
		if b[at] != m.tags[i] || b[at+PageSize-1] != m.tags[i] {
			t.Fatalf("a buffer of %d bytes was overwritten by another", len(b))
		}
	}
	m.used -= int64(cap(b))
	m.a.Free(b[:min(len(b), 1)])
	m.live, m.tags = append(m.live[:i], m.live[i+1:]...), append(m.tags[:i], m.tags[i+1:]...)
	m.check(t)
}

func (m *model) check(t interface{ Fatalf(string, ...any) }) {
	if m.a.Used() != m.used {
		t.Fatalf("%d bytes used, want %d", m.a.Used(), m.used)
	}
}

// rest frees everything and wants whole chunks again.
func (m *model) rest(t interface{ Fatalf(string, ...any) }) {
	for len(m.live) > 0 {
		m.free(t, len(m.live)-1)
	}
	for range m.a.Limit() / ChunkSize {
		m.alloc(t, ChunkSize)
	}
	if int64(len(m.live)) != m.a.Limit()/ChunkSize {
		t.Fatalf("%d whole chunks free, want %d: neighbours did not join", len(m.live), m.a.Limit()/ChunkSize)
	}
	for len(m.live) > 0 {
		m.free(t, len(m.live)-1)
	}
	if err := m.a.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// fillWith marks both ends of every page.
func fillWith(b []byte, tag byte) {
	for at := 0; at < len(b); at += PageSize {
		b[at], b[at+PageSize-1] = tag, tag
	}
}

func TestArenaAgreesWithModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{a: arena(t, rapid.Int64Range(1, 2*ChunkSize).Draw(t, "limit"))}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			if n := len(m.live); n > 0 && rapid.IntRange(0, 2).Draw(t, "free") == 0 {
				m.free(t, rapid.IntRange(0, n-1).Draw(t, "which"))
				continue
			}
			length := rapid.OneOf(rapid.IntRange(-1, 5*PageSize), rapid.IntRange(1, 256<<10), rapid.IntRange(1<<20, ChunkSize+1))
			m.alloc(t, length.Draw(t, "length"))
		}
		m.rest(t)
	})
}

// FuzzArena reads a script: two bytes a step, the first below 96 frees.
func FuzzArena(f *testing.F) {
	f.Add([]byte{200, 1, 255, 10, 0, 0, 130, 2})
	f.Add(bytes.Repeat([]byte{255, 255}, 20))
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 400 {
			return
		}
		m := &model{a: arena(t, ChunkSize)}
		for ; len(script) >= 2; script = script[2:] {
			what, n := script[0], int(script[1])
			switch {
			case what < 96:
				if len(m.live) > 0 {
					m.free(t, n%len(m.live))
				}
			case what < 224:
				m.alloc(t, (n+1)*int(what-95)*4)
			default:
				m.alloc(t, n*PageSize*4)
			}
		}
		m.rest(t)
	})
}

func TestPagesFillAnArenaExactly(t *testing.T) {
	a := arena(t, 2*ChunkSize)
	seen := map[int]bool{}
	var all [][]byte
	for b := a.Alloc(1); b != nil; b = a.Alloc(PageSize) {
		if seen[a.offset(b)] {
			t.Fatal("a page was handed out twice")
		}
		seen[a.offset(b)] = true
		all = append(all, b)
	}
	if len(all) != 2*ChunkSize/PageSize || a.Used() != a.Limit() {
		t.Errorf("%d pages, %d bytes used of %d", len(all), a.Used(), a.Limit())
	}
	a.Free(all[7])
	if b := a.Alloc(2 * PageSize); b != nil {
		t.Error("two pages from one")
	}
	if b := a.Alloc(PageSize); b == nil || a.offset(b) != a.offset(all[7]) {
		t.Error("the one free page was not found")
	}
}

func TestGrowthIsAnnouncedChunkByChunk(t *testing.T) {
	a := arena(t, 3*ChunkSize)
	var grown []int
	a.OnGrow = func(index int, memory []byte) {
		if len(memory) != ChunkSize || a.Chunk(memory) != index {
			t.Errorf("chunk %d: %d bytes, lies in %d", index, len(memory), a.Chunk(memory))
		}
		grown = append(grown, index)
	}
	first := a.Alloc(ChunkSize)
	if len(grown) != 1 {
		t.Errorf("grown %v after one chunk", grown)
	}
	a.Free(first)
	a.Free(a.Alloc(ChunkSize))
	b := a.Alloc(PageSize)
	c := a.Alloc(ChunkSize)
	if len(grown) != 2 || a.Chunk(b) != 0 || a.Chunk(c) != 1 {
		t.Errorf("grown %v, buffers in %d and %d", grown, a.Chunk(b), a.Chunk(c))
	}
	if a.Chunk(make([]byte, 10)) != -1 {
		t.Error("other memory has a chunk")
	}
}

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	f()
}

func TestWrongFreesStop(t *testing.T) {
	a := arena(t, ChunkSize)
	b := a.Alloc(3 * PageSize)
	mustPanic(t, "freeing other memory", func() { a.Free(make([]byte, PageSize)) })
	mustPanic(t, "freeing the middle of a page", func() { a.Free(b[1:]) })
	mustPanic(t, "freeing the middle of a buffer", func() { a.Free(b[PageSize:]) })
	a.Free(b)
	mustPanic(t, "freeing twice", func() { a.Free(b) })
}

func TestCloseRefusesWhileBuffersAreOut(t *testing.T) {
	a := arena(t, ChunkSize)
	b := a.Alloc(10)
	if a.Close() == nil {
		t.Error("closed with a buffer out")
	}
	a.Free(b)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := NewArena(0); err == nil {
		t.Error("an arena of nothing")
	}
}

func TestTrimKeepsWhatIsUsedKeptOrPinned(t *testing.T) {
	a := arena(t, 4*ChunkSize)
	var chunks [4][]byte
	for i := range chunks {
		chunks[i] = a.Alloc(ChunkSize)
		chunks[i][0] = byte(i + 1)
	}
	for i := range chunks {
		if i != 1 {
			a.Free(chunks[i])
		}
	}
	a.Pin(2)
	a.Trim(1)
	for i, want := range []byte{1, 2, 3, 0} { // kept, used, pinned, given back
		if got := chunks[i][0]; got != want {
			t.Errorf("chunk %d begins with %d after Trim, want %d", i, got, want)
		}
	}
	if b := a.Alloc(ChunkSize); b == nil {
		t.Error("a trimmed arena has no room")
	}
}

func TestAlignedSaysWhereABufferStarts(t *testing.T) {
	a := arena(t, ChunkSize)
	b := a.Alloc(2 * PageSize)
	if !Aligned(b, PageSize) || Aligned(b[512:], PageSize) || !Aligned(b[512:], 512) || Aligned(b[1:], 2) {
		t.Error("wrong")
	}
}

func TestArenaAllocatesNothing(t *testing.T) {
	a := arena(t, ChunkSize)
	a.Free(a.Alloc(1))
	n := testing.AllocsPerRun(100, func() {
		x, y := a.Alloc(PageSize), a.Alloc(128<<10)
		a.Free(x)
		a.Free(y)
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAllocFree(b *testing.B) {
	a := arena(b, 64<<20)
	for b.Loop() {
		a.Free(a.Alloc(PageSize))
	}
}
