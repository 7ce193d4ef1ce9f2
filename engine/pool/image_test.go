package pool

import (
	"bytes"
	"compress/gzip"
	"flag"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

var rewrite = flag.Bool("rewrite", false, "renew what lies in testdata, but for images of old formats that exist")

// story makes a pool with some of everything, and knows what has to be in it. With
// a nil rig it only knows.
type story struct {
	t        *testing.T
	g        *rig
	contents map[string][]byte // by VOLUME or VOLUME@SNAPSHOT
}

func newStory(t *testing.T, g *rig) *story { return &story{t, g, map[string][]byte{}} }

// imageFill is content that says where it belongs.
func imageFill(length int, seed byte) []byte {
	b := make([]byte, length)
	for i := range b {
		b[i] = seed + byte(i/512)
	}
	return b
}

// on runs f with a client of a volume.
func (s *story) on(volume string, f func(c *devtest.Client)) {
	s.t.Helper()
	if s.g == nil {
		return
	}
	d, err := s.g.pool.OpenVolume(volume)
	if err != nil {
		s.t.Fatal(err)
	}
	c := devtest.NewClient(s.t, s.g.r, d, 4)
	f(c)
	c.Close()
	if err := d.Close(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *story) pool(f func(p *Pool) error) {
	s.t.Helper()
	if s.g == nil {
		return
	}
	if err := f(s.g.pool); err != nil {
		s.t.Fatal(err)
	}
}

func (s *story) create(spec VolumeSpec) {
	s.pool(func(p *Pool) error { _, err := p.CreateVolume(spec); return err })
	s.contents[spec.Name] = make([]byte, min(spec.Size, 4<<20)) // nothing is written further on
}

func (s *story) write(volume string, offset, length int, seed byte) {
	data := imageFill(length, seed)
	s.on(volume, func(c *devtest.Client) { c.Write(uint64(offset), data) })
	copy(s.contents[volume][offset:], data)
}

func (s *story) discard(volume string, offset, length int) {
	s.on(volume, func(c *devtest.Client) {
		c.Do(&datapath.Request{Op: datapath.OpDiscard, Offset: uint64(offset), Length: uint64(length)})
	})
	clear(s.contents[volume][offset : offset+length])
}

func (s *story) flush(volume string) { s.on(volume, (*devtest.Client).Flush) }

func (s *story) snapshot(volume, name string) {
	s.pool(func(p *Pool) error {
		_, err := p.CreateSnapshot(volume, name, map[string]string{"by": "test"})
		return err
	})
	s.contents[volume+"@"+name] = bytes.Clone(s.contents[volume])
}

func (s *story) deleteSnapshot(volume, name string) {
	s.pool(func(p *Pool) error { _, err := p.DeleteSnapshot(volume, name); return err })
	delete(s.contents, volume+"@"+name)
}

func (s *story) clone(volume, snapshot, name string, size int) {
	s.pool(func(p *Pool) error {
		_, err := p.Clone(volume, snapshot, VolumeSpec{Name: name, Size: uint64(size)})
		return err
	})
	s.contents[name] = make([]byte, size)
	copy(s.contents[name], s.contents[volume+"@"+snapshot])
}

func (s *story) resize(volume string, size int) {
	s.pool(func(p *Pool) error { return p.Resize(volume, uint64(size)) })
	s.contents[volume] = append(s.contents[volume], make([]byte, size-len(s.contents[volume]))...)
}

func (s *story) maintain() { s.pool((*Pool).Maintain) }

// settled is a pool at rest: snapshots, a clone of one that is deleted, holes.
func (s *story) settled() {
	s.create(VolumeSpec{Name: "data", Size: 2<<20 + 12<<10, Labels: map[string]string{"app": "db", "tier": "1"}})
	s.create(VolumeSpec{Name: "thick", Size: 512 << 10, Thick: true})
	s.create(VolumeSpec{Name: "empty", Size: 1 << 40})
	s.write("data", 0, 256<<10, 1)
	s.write("data", 2<<20, 12<<10, 2)
	s.write("thick", 64<<10, 128<<10, 3)
	s.snapshot("data", "one")
	s.write("data", 64<<10, 8<<10, 4)
	s.clone("data", "one", "copy", 3<<20)
	s.write("copy", 128<<10, 64<<10, 5)
	s.write("copy", 3<<20-4096, 4096, 6)
	s.snapshot("data", "two")
	s.discard("data", 0, 32<<10)
	s.discard("data", 128<<10, 128<<10)
	s.write("data", 1<<20, 4096, 7)
	s.snapshot("data", "three")
	s.deleteSnapshot("data", "two")
	s.deleteSnapshot("data", "one") // copy and three stand on it
	s.maintain()
}

// unsettled goes on after settled, with changes of every kind that only the journal
// has.
func (s *story) unsettled() {
	s.resize("data", 3<<20)
	s.write("data", 3<<20-16<<10, 16<<10, 8)
	s.write("thick", 64<<10, 4096, 9)
	s.discard("copy", 128<<10, 16<<10)
	s.create(VolumeSpec{Name: "late", Size: 256 << 10})
	s.write("late", 100<<10, 60<<10, 10)
	s.snapshot("late", "last")
	s.write("late", 0, 4096, 11)
	s.deleteSnapshot("data", "three")
	s.flush("late")
}

// verify compares the pool with what has to be in it.
func (s *story) verify(g *rig) {
	s.t.Helper()
	var names []string
	for _, v := range g.pool.Volumes() {
		names = append(names, v.Name)
	}
	snapshots, err := g.pool.Snapshots("")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, x := range snapshots {
		names = append(names, x.Volume+"@"+x.Name)
	}
	slices.Sort(names)
	if want := slices.Sorted(maps.Keys(s.contents)); !slices.Equal(names, want) {
		s.t.Fatalf("volumes and snapshots %q, want %q", names, want)
	}
	for _, name := range names {
		open := func() (datapath.Device, error) { return g.pool.OpenVolume(name) }
		if volume, snapshot, ok := strings.Cut(name, "@"); ok {
			open = func() (datapath.Device, error) { return g.pool.OpenSnapshot(volume, snapshot) }
		}
		d, err := open()
		if err != nil {
			s.t.Fatal(err)
		}
		c := devtest.NewClient(s.t, g.r, d, 1)
		want := s.contents[name]
		for at := 0; at < len(want); at += 64 << 10 {
			n := min(64<<10, len(want)-at)
			if got := c.Read(uint64(at), uint64(n)); !bytes.Equal(got, want[at:at+n]) {
				s.t.Errorf("%s: the %d bytes at %d are not what was written", name, n, at)
			}
		}
		c.Close()
		if err := d.Close(); err != nil {
			s.t.Fatal(err)
		}
	}
}

// imageSize has room for two zones of two regions, and a short third.
const imageSize = 22 << 20

// makeImage makes the pool of the images in testdata on a disk.
func makeImage(t *testing.T, crashed bool) *memdisk.Disk {
	d := memory(imageSize)
	g := newRig(t, 2, d)
	g.open()
	s := newStory(t, g)
	s.settled()
	if crashed {
		s.unsettled()
		image := d.Clone()
		image.CrashLose()
		g.close()
		return image
	}
	g.close()
	return d
}

func saveImage(t *testing.T, path string, d *memdisk.Disk) {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err == nil {
		_, err = z.Write(d.Bytes(0, d.Info().Size))
	}
	if err == nil {
		err = z.Close()
	}
	if err == nil {
		err = os.WriteFile(path, b.Bytes(), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// loadImage makes a disk of an image in testdata.
func loadImage(t testing.TB, path string) *memdisk.Disk {
	t.Helper()
	b := testenv.Unpack(t, path)
	d := memory(uint64(len(b)))
	for at := 0; at < len(b); at += pageSize {
		if page := b[at : at+pageSize]; !bytes.Equal(page, make([]byte, pageSize)) {
			d.Poke(uint64(at), page)
		}
	}
	return d
}

const (
	imageV1        = "testdata/format-v1.img.gz"
	imageV1Crashed = "testdata/format-v1-crashed.img.gz"
)

// TestOldFormatsOpen opens images of pools as they were written by the first
// program of each format: one closed in order, one with a journal to replay and
// regions to distrust. `go test ./engine/pool -run OldFormats -rewrite` makes
// those that are not there; one that is there is never made again, for it stands
// for pools that people have.
func TestOldFormatsOpen(t *testing.T) {
	for _, tt := range []struct {
		path    string
		crashed bool
	}{{imageV1, false}, {imageV1Crashed, true}} {
		t.Run(tt.path, func(t *testing.T) {
			if _, err := os.Stat(tt.path); *rewrite && os.IsNotExist(err) {
				saveImage(t, tt.path, makeImage(t, tt.crashed))
			}
			d := loadImage(t, tt.path)
			want := newStory(t, nil)
			want.settled()
			if tt.crashed {
				want.unsettled()
			}
			g := &rig{TB: t, r: devtest.Reactors(t, "auto", 1)[0], disks: []Disk{{"mem0", d}}}
			g.config = Config{Disks: g.disks, Reactor: g.r, Manual: true, Log: quiet()}
			r := g.checkDisks(CheckConfig{Data: true})
			if r.Bad > 0 || !r.Complete || r.Clean == tt.crashed {
				t.Errorf("before: %+v", r)
			}
			g.config.ReadOnly = true
			g.open()
			want.verify(g)
			g.close()
			g.config.ReadOnly = false
			g.open()
			want.verify(g)
			if err := g.pool.Maintain(); err != nil {
				t.Fatal(err)
			}
			want.verify(g)
			g.close()
			if r := g.checkDisks(CheckConfig{Data: true}); len(r.Findings) > 0 {
				t.Errorf("after: %+v", r)
			}
		})
	}
}
