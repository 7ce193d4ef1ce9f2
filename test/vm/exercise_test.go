package vm

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	exerciseSize  = 8 << 20 // largest size of the file; several extents, quick to compare
	exerciseSteps = 2000
	exerciseSeeds = 2
)

// TestExerciseFile drives one file through random writes, reads, truncations,
// holes, mapped writes and forgotten pages, and compares every read with
// a copy kept in memory. ASHLAR_VM_DIR names the directory, else it is a
// temporary one; in the guest it lies on a device that Ashlar serves.
func TestExerciseFile(t *testing.T) {
	dir := os.Getenv("ASHLAR_VM_DIR")
	steps := exerciseSteps
	if dir == "" {
		dir, steps = t.TempDir(), exerciseSteps/40 // only to keep the exerciser itself honest
	}
	for seed := range uint64(exerciseSeeds) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			exercise(t, filepath.Join(dir, fmt.Sprintf("exercise-%d", seed)), seed, steps)
		})
	}
}

// exerciser is a file and what it should hold.
type exerciser struct {
	t      *testing.T
	f      *os.File
	want   []byte
	random *rand.Rand
	last   string // what the step was, for the failure
}

func exercise(t *testing.T, path string, seed uint64, steps int) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	e := &exerciser{t: t, f: f, random: rand.New(rand.NewPCG(seed, 1))}
	defer func() { _ = e.f.Close() }() // closed with a check below, when all went well
	for step := range steps {
		switch n := e.random.IntN(100); {
		case n < 40:
			e.write()
		case n < 60:
			e.read()
		case n < 70:
			e.punch()
		case n < 78:
			e.truncate()
		case n < 88:
			e.mapped()
		case n < 93:
			e.sync()
		case n < 97:
			e.forget()
		default:
			e.compare()
		}
		if t.Failed() {
			t.Fatalf("seed %d, step %d: %s", seed, step, e.last)
		}
	}
	e.forget()
	e.compare()
	if err := e.f.Close(); err != nil {
		t.Error(err)
	}
}

// span picks a range below limit.
func (e *exerciser) span(limit int) (offset, length int) {
	if limit == 0 {
		return 0, 0
	}
	offset = e.random.IntN(limit)
	return offset, 1 + e.random.IntN(min(limit-offset, 128<<10))
}

func (e *exerciser) check(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Error(err)
	}
}

func (e *exerciser) write() {
	offset, length := e.span(exerciseSize)
	e.last = fmt.Sprintf("write %d at %d", length, offset)
	data := make([]byte, length)
	for i := range data {
		data[i] = byte(e.random.Uint32())
	}
	_, err := e.f.WriteAt(data, int64(offset))
	e.check(err)
	if grow := offset + length - len(e.want); grow > 0 {
		e.want = append(e.want, make([]byte, grow)...)
	}
	copy(e.want[offset:], data)
}

func (e *exerciser) read() {
	offset, length := e.span(len(e.want))
	e.last = fmt.Sprintf("read %d at %d", length, offset)
	got := make([]byte, length)
	_, err := e.f.ReadAt(got, int64(offset))
	e.check(err)
	e.differ(got, offset)
}

func (e *exerciser) differ(got []byte, offset int) {
	want := e.want[offset : offset+len(got)]
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			e.t.Errorf("byte %d is %#x, want %#x", offset+i, got[i], want[i])
			return
		}
	}
}

func (e *exerciser) punch() {
	offset, length := e.span(len(e.want))
	mode, name := uint32(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE), "punch"
	if e.random.IntN(2) == 0 {
		mode, name = unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, "zero"
	}
	e.last = fmt.Sprintf("%s %d at %d", name, length, offset)
	if length == 0 {
		return
	}
	err := unix.Fallocate(int(e.f.Fd()), mode, int64(offset), int64(length))
	if err == unix.EOPNOTSUPP {
		return // tmpfs has no zero range
	}
	e.check(err)
	clear(e.want[offset : offset+length])
}

func (e *exerciser) truncate() {
	size := e.random.IntN(exerciseSize)
	e.last = fmt.Sprintf("truncate to %d", size)
	e.check(e.f.Truncate(int64(size)))
	if size <= len(e.want) {
		e.want = e.want[:size]
	} else {
		e.want = append(e.want, make([]byte, size-len(e.want))...)
	}
}

func (e *exerciser) mapped() {
	offset, length := e.span(len(e.want))
	e.last = fmt.Sprintf("mapped write %d at %d", length, offset)
	if length == 0 {
		return
	}
	memory, err := unix.Mmap(int(e.f.Fd()), 0, len(e.want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		e.t.Error(err)
		return
	}
	e.differ(memory[offset:offset+length], offset)
	for i := offset; i < offset+length; i++ {
		memory[i] ^= 0x5a
		e.want[i] ^= 0x5a
	}
	if e.random.IntN(2) == 0 {
		e.check(unix.Msync(memory, unix.MS_SYNC))
	}
	e.check(unix.Munmap(memory))
}

func (e *exerciser) sync() {
	e.last = "fsync"
	e.check(e.f.Sync())
}

// forget drops the file's clean pages, so that the next reads come from the
// device.
func (e *exerciser) forget() {
	e.last = "sync, forget pages, reopen"
	e.check(e.f.Sync())
	e.check(unix.Fadvise(int(e.f.Fd()), 0, 0, unix.FADV_DONTNEED))
	path := e.f.Name()
	e.check(e.f.Close())
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		e.t.Fatal(err)
	}
	e.f = f
}

func (e *exerciser) compare() {
	e.last = "compare all"
	got, err := io.ReadAll(io.NewSectionReader(e.f, 0, exerciseSize+1))
	e.check(err)
	if len(got) != len(e.want) {
		e.t.Errorf("the file has %d bytes, want %d", len(got), len(e.want))
		return
	}
	e.differ(got, 0)
}
