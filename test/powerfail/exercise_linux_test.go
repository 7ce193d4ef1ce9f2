package powerfail

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	filesMax   = 24
	appendMax  = 48 << 10
	noiseFiles = 12
)

// exerciser does things to the files in a directory, one after the other, each
// synced before the next, and writes its history.
type exerciser struct {
	*history
	dir    string
	random *rand.Rand
	files  map[string]*text
	next   uint64

	promise func(step int) error // hears of each step that is durable; may be nil
}

func newExerciser(dir string, random *rand.Rand) (*exerciser, error) {
	e := &exerciser{history: &history{}, dir: dir, random: random, files: map[string]*text{}}
	var errs []error
	for _, d := range []string{"", "d0", "d1", "d2", "noise"} {
		errs = append(errs, os.Mkdir(filepath.Join(dir, d), 0o700))
	}
	for i := range blockFiles {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("blocks-%d", i)))
		if err == nil {
			err = errors.Join(f.Truncate(blockLength), f.Sync(), f.Close())
		}
		errs = append(errs, err)
	}
	return e, errors.Join(append(errs, syncDir(dir), syncDir(filepath.Dir(dir)))...)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (e *exerciser) path(name string) string { return filepath.Join(e.dir, name) }

// do notes a step, does it, and promises it.
func (e *exerciser) do(d deedOn, act func() error) error {
	n := e.begin(d)
	if err := act(); err != nil {
		return fmt.Errorf("step %d: %s: %w", n, d.what, err)
	}
	for name, c := range d.names {
		if c == nil {
			delete(e.files, name)
		} else {
			e.files[name] = c
		}
	}
	e.promised.Store(int64(n))
	if e.promise == nil {
		return nil
	}
	return e.promise(n)
}

func (e *exerciser) step() error {
	have := slices.Sorted(maps.Keys(e.files))
	pick := func() string { return have[e.random.IntN(len(have))] }
	for {
		switch n := e.random.IntN(100); {
		case n < 20 && len(have) < filesMax:
			return e.create()
		case n >= 20 && n < 35 && len(have) > 0:
			return e.replace(pick())
		case n >= 35 && n < 45 && len(have) > 0:
			return e.extend(pick())
		case n >= 45 && n < 55 && len(have) > 0:
			return e.rename(pick())
		case n >= 55 && n < 65 && len(have) > filesMax/3:
			return e.remove(pick())
		case n >= 65 && n < 95:
			return e.overwrite()
		case n >= 95 && n < 98:
			return e.punch()
		case n >= 98:
			return e.trim()
		}
	}
}

func (e *exerciser) name() string {
	e.next++
	return fmt.Sprintf("d%d/f%d", e.random.IntN(3), e.next)
}

func (e *exerciser) text() *text {
	e.next++
	return &text{id: e.next, size: 1 + e.random.IntN(appendMax)}
}

// write writes b to a file, from offset, and syncs it.
func write(path string, flags int, b []byte, offset int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, offset)
	if err == nil && flags&os.O_SYNC == 0 {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (e *exerciser) create() error {
	name, c := e.name(), e.text()
	return e.do(deedOn{what: "create " + name, names: map[string]*text{name: c}, grows: name}, func() error {
		return errors.Join(write(e.path(name), os.O_CREATE|os.O_EXCL, c.bytes(), 0), syncDir(filepath.Dir(e.path(name))))
	})
}

// replace puts another file in the place of one, as careful programs do.
func (e *exerciser) replace(name string) error {
	c := e.text()
	return e.do(deedOn{what: "replace " + name, names: map[string]*text{name: c}}, func() error {
		if err := write(e.path(name)+".new", os.O_CREATE|os.O_TRUNC, c.bytes(), 0); err != nil {
			return err
		}
		return errors.Join(os.Rename(e.path(name)+".new", e.path(name)), syncDir(filepath.Dir(e.path(name))))
	})
}

func (e *exerciser) extend(name string) error {
	was := e.files[name]
	c := &text{id: was.id, size: was.size + 1 + e.random.IntN(appendMax)}
	return e.do(deedOn{what: "append to " + name, names: map[string]*text{name: c}, grows: name}, func() error {
		return write(e.path(name), 0, c.bytes()[was.size:], int64(was.size))
	})
}

func (e *exerciser) rename(from string) error {
	to := e.name()
	return e.do(deedOn{what: "rename " + from + " " + to, names: map[string]*text{from: nil, to: e.files[from]}}, func() error {
		return errors.Join(os.Rename(e.path(from), e.path(to)), syncDir(filepath.Dir(e.path(to))), syncDir(filepath.Dir(e.path(from))))
	})
}

func (e *exerciser) remove(name string) error {
	return e.do(deedOn{what: "remove " + name, names: map[string]*text{name: nil}}, func() error {
		return errors.Join(os.Remove(e.path(name)), syncDir(filepath.Dir(e.path(name))))
	})
}

func (e *exerciser) spans(most int) (all []span) {
	for range 1 + e.random.IntN(4) {
		first := e.random.IntN(blockLength / sectorSize)
		all = append(all, span{first, min(1+e.random.IntN(most), blockLength/sectorSize-first)})
	}
	return all
}

// overwrite writes ranges of a block file in place: with fsync, or each with O_SYNC.
func (e *exerciser) overwrite() error {
	d := deedOn{file: e.random.IntN(blockFiles), sectors: e.spans(64)}
	path, flags := e.path(fmt.Sprintf("blocks-%d", d.file)), 0
	if e.random.IntN(3) == 0 {
		flags = os.O_SYNC
	}
	d.what = fmt.Sprintf("write %v of %s", d.sectors, path)
	return e.do(d, func() error {
		f, err := os.OpenFile(path, os.O_WRONLY|flags, 0)
		if err != nil {
			return err
		}
		for _, s := range d.sectors {
			b := make([]byte, s.count*sectorSize)
			for i := range s.count {
				fillSector(b[i*sectorSize:], d.file, s.first+i, len(e.steps))
			}
			if _, err = f.WriteAt(b, int64(s.first)*sectorSize); err != nil {
				break
			}
		}
		if err == nil && flags == 0 {
			err = f.Sync()
		}
		return errors.Join(err, f.Close())
	})
}

func (e *exerciser) punch() error {
	d := deedOn{file: e.random.IntN(blockFiles), sectors: e.spans(256), zero: true}
	path := e.path(fmt.Sprintf("blocks-%d", d.file))
	d.what = fmt.Sprintf("punch %v of %s", d.sectors, path)
	return e.do(d, func() error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		for _, s := range d.sectors {
			if err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(s.first)*sectorSize, int64(s.count)*sectorSize); err != nil {
				break
			}
		}
		return errors.Join(err, f.Sync(), f.Close())
	})
}

// trim tells the device what the file system does not use.
func (e *exerciser) trim() error {
	return e.do(deedOn{what: "trim"}, func() error { return run("fstrim", filepath.Dir(e.dir)) })
}

// noise writes and removes files nobody is promised, until stop is closed or the
// file system fails.
func (e *exerciser) noise(stop <-chan struct{}, random *rand.Rand) {
	for n := uint64(0); ; n++ {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(random.IntN(20)) * time.Millisecond):
		}
		path := e.path(fmt.Sprintf("noise/%d", random.IntN(noiseFiles)))
		var err error
		if random.IntN(4) == 0 {
			err = os.Remove(path)
		} else {
			err = os.WriteFile(path, (&text{n, 1 + random.IntN(256<<10)}).bytes(), 0o600)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return
		}
	}
}
