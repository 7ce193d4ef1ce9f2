package powerfail

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

const (
	sectorSize  = 512     // what a disk writes whole
	blockFiles  = 2       // files that are overwritten in place
	blockLength = 1 << 20 // of each
)

// text is the content of a file that is written once, or appended to.
type text struct {
	id   uint64
	size int
}

func (c text) bytes() []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], c.id)
	b := make([]byte, c.size)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b
}

// deedOn is what one step does to the files. Its number is its place in the history,
// from 1, and is what sectors carry that it writes.
type deedOn struct {
	what  string
	names map[string]*text // files afterwards; nil: no such file
	grows string           // the one that has any part of its new bytes until the step is done

	file    int // a block file
	sectors []span
	zero    bool // they become a hole

	made, gone string // a snapshot
}

// history is all that was done to the files in a directory, as long as one thing was
// done after the other and each was synced. Steps up to the number promised are to
// be found whatever happens; the last begun may be there in part.
type history struct {
	steps    []deedOn
	begun    atomic.Int64
	promised atomic.Int64
}

// begin notes a step before anything of it is done.
func (h *history) begin(d deedOn) int {
	h.steps = append(h.steps, d)
	return int(h.begun.Add(1))
}

// names are the files after step n.
func (h *history) names(n int) map[string]*text {
	all := map[string]*text{}
	for _, d := range h.steps[:n] {
		for name, c := range d.names {
			if c == nil {
				delete(all, name)
			} else {
				all[name] = c
			}
		}
	}
	return all
}

// check wants a directory to hold what is there after some step from first to last;
// step last may have been under way.
func (h *history) check(dir string, first, last int) error {
	last = min(last, len(h.steps))
	found, err := h.read(dir)
	if err != nil {
		return err
	}
	var best []string
	for n := first; n <= last; n++ {
		var grows string
		if n < last {
			grows = h.steps[n].grows
		}
		wrong := differences(found, h.names(n), h.names(min(n+1, len(h.steps))), grows)
		if len(wrong) == 0 {
			return h.checkBlocks(dir, first, last)
		}
		if best == nil || len(wrong) < len(best) {
			best = append(wrong, fmt.Sprintf("(compared with step %d of %d to %d)", n, first, last))
		}
	}
	for _, d := range h.steps[first:last] {
		best = append(best, fmt.Sprintf("(may have been under way: %s)", d.what))
	}
	return errors.New(strings.Join(best, "; "))
}

// read reads all files but the block files.
func (h *history) read(dir string) (map[string][]byte, error) {
	found := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == "noise" {
			return fs.SkipDir
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || d.IsDir() || strings.HasPrefix(name, "blocks-") || strings.HasSuffix(name, ".new") {
			return err
		}
		found[name], err = os.ReadFile(path)
		return err
	})
	return found, err
}

func differences(found map[string][]byte, want, next map[string]*text, grows string) (wrong []string) {
	for _, name := range slices.Sorted(maps.Keys(want)) {
		got, exists := found[name]
		c := want[name]
		switch {
		case !exists:
			wrong = append(wrong, fmt.Sprintf("%s is missing", name))
		case name == grows && len(got) >= c.size && len(got) <= next[name].size && bytes.Equal(got[:c.size], c.bytes()):
		case len(got) != c.size:
			wrong = append(wrong, fmt.Sprintf("%s has %d bytes, want %d", name, len(got), c.size))
		case !bytes.Equal(got, c.bytes()):
			wrong = append(wrong, fmt.Sprintf("%s has other bytes (all zero: %v)", name, len(bytes.Trim(got, "\x00")) == 0))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if want[name] == nil && (name != grows || len(found[name]) > next[name].size) {
			wrong = append(wrong, fmt.Sprintf("%s is there", name))
		}
	}
	return wrong
}

// fillSector makes the content of a sector of a block file that step n writes.
func fillSector(p []byte, file, sector, n int) {
	x := uint64(file)<<48 ^ uint64(sector)<<20 ^ uint64(n)
	binary.LittleEndian.PutUint64(p, uint64(n))
	for at := 8; at < sectorSize; at += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[at:], x)
	}
}

// checkBlocks wants each sector of the block files to be of a step that may have
// been the last on it.
func (h *history) checkBlocks(dir string, first, last int) error {
	var want [sectorSize]byte
	var wrong []error
	for file := range blockFiles {
		got, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("blocks-%d", file)))
		if err != nil || len(got) != blockLength {
			return fmt.Errorf("block file %d: %d bytes, %w", file, len(got), err)
		}
		allowed := make([][]int, blockLength/sectorSize) // steps; 0 for zeroes
		for s := range allowed {
			allowed[s] = []int{0}
		}
		for i, d := range h.steps[:last] {
			if d.file != file {
				continue
			}
			n := i + 1
			if d.zero {
				n = 0
			}
			for _, s := range d.sectors {
				for at := s.first; at < s.first+s.count; at++ {
					if i < first {
						allowed[at] = allowed[at][:0]
					}
					allowed[at] = append(allowed[at], n)
				}
			}
		}
		for at, steps := range allowed {
			sector := got[at*sectorSize:][:sectorSize]
			n := int(binary.LittleEndian.Uint64(sector))
			clear(want[:])
			if n != 0 {
				fillSector(want[:], file, at, n)
			}
			if !slices.Contains(steps, n) || !bytes.Equal(sector, want[:]) {
				wrong = append(wrong, fmt.Errorf("block file %d, sector %d: of step %d (whole: %v), want one of %v", file, at, n, bytes.Equal(sector, want[:]), steps))
			}
		}
	}
	if len(wrong) > 5 {
		wrong = append(wrong[:5], fmt.Errorf("and %d sectors more", len(wrong)-5))
	}
	return errors.Join(wrong...)
}

func TestHistoryKnowsWhatIsAllowed(t *testing.T) {
	dir := t.TempDir()
	h := &history{}
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	blocks := make([]byte, blockLength)
	write("blocks-0", blocks)
	write("blocks-1", blocks)
	one, two := &text{1, 100}, &text{1, 200}
	h.begin(deedOn{names: map[string]*text{"a": one}, grows: "a"})
	h.begin(deedOn{names: map[string]*text{"a": two}, grows: "a"})
	h.begin(deedOn{names: map[string]*text{"a": nil, "b": two}})
	h.begin(deedOn{file: 1, sectors: []span{{4, 2}}})
	check := func(good bool, first, last int) {
		t.Helper()
		if err := h.check(dir, first, last); (err == nil) != good {
			t.Errorf("steps %d to %d: %v", first, last, err)
		}
	}
	check(true, 0, 1)
	check(false, 1, 2)
	write("a", two.bytes()[:50])
	check(true, 0, 1)
	check(false, 1, 1)
	write("a", two.bytes()[:150])
	check(true, 1, 2)
	check(false, 2, 3)
	write("b", two.bytes())
	check(false, 2, 3) // both names
	if err := os.Remove(filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	check(true, 2, 3)
	check(false, 1, 2)
	check(false, 4, 4)
	fillSector(blocks[5*sectorSize:], 1, 5, 4)
	write("blocks-1", blocks)
	check(true, 3, 4) // half of it
	check(false, 3, 3)
	check(false, 4, 4)
	fillSector(blocks[4*sectorSize:], 1, 4, 4)
	write("blocks-1", blocks)
	check(true, 4, 4)
	blocks[5*sectorSize+100]++
	write("blocks-1", blocks)
	check(false, 3, 4)
}
