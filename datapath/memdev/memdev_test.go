package memdev

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func TestConformance(t *testing.T) {
	for _, test := range []struct {
		name   string
		config Config
	}{
		{"bytes", Config{Size: 9<<20 + 123, SizeMax: 16 << 20}},
		{"sectors", Config{Size: 8<<20 + 512, SizeMax: 16 << 20, MinIO: 512}},
		{"blocks", Config{Size: 8 << 20, SizeMax: 16 << 20, MinIO: 4096}},
	} {
		t.Run(test.name, func(t *testing.T) {
			open := func(c Config) func(t *testing.T) datapath.Device {
				return func(t *testing.T) datapath.Device {
					d, err := New(c)
					if err != nil {
						t.Fatal(err)
					}
					return d
				}
			}
			readOnly := test.config
			readOnly.ReadOnly = true
			devtest.Run(t, open(test.config), devtest.Options{
				DiscardZeroes: true,
				ReadOnly:      open(readOnly),
				Resize:        func(d datapath.Device, size uint64) error { return d.(*Device).Resize(size) },
			})
		})
	}
}

func TestStoreGivesPagesBack(t *testing.T) {
	s, err := NewStore(200 * PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	data := bytes.Repeat([]byte{7}, 3*PageSize)
	s.Write(data, PageSize/2) // four pages
	if got := s.Allocated(); got != 4*PageSize {
		t.Errorf("%d bytes allocated after a write to four pages", got)
	}
	b := make([]byte, 2*PageSize)
	if hole := s.Read(b, 100*PageSize); !hole || !bytes.Equal(b, make([]byte, len(b))) {
		t.Error("unwritten pages are no hole of zeros")
	}
	if hole := s.Read(b, 3*PageSize); hole {
		t.Error("a range with one written page is a hole")
	}
	s.Zero(0, 2*PageSize+10, false) // two whole pages and a bit
	if got := s.Allocated(); got != 2*PageSize {
		t.Errorf("%d bytes allocated after two pages were punched", got)
	}
	s.Read(b, 2*PageSize)
	if b[9] != 0 || b[10] != 7 {
		t.Errorf("around the end of the zeroed range: %d %d", b[9], b[10])
	}
	s.Write([]byte{9}, PageSize) // a punched page comes back empty
	s.Read(b[:4], PageSize-1)
	if !bytes.Equal(b[:4], []byte{0, 9, 0, 0}) {
		t.Errorf("a page written again after a punch holds %v", b[:4])
	}
	s.Zero(10*PageSize, 5*PageSize, true)
	if n, allocated := s.Run(10*PageSize+5, 100*PageSize); !allocated || n != 5*PageSize-5 {
		t.Errorf("run of kept zeros: %d, %t", n, allocated)
	}
	if n, allocated := s.Run(15*PageSize, 185*PageSize); allocated || n != 185*PageSize {
		t.Errorf("run to the end: %d, %t", n, allocated)
	}
}

func TestStoreRunsAgreeWithPages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const pages = 300
		s, err := NewStore(pages * PageSize)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }() // a mapping of ours
		var set [pages]bool
		for range rapid.IntRange(0, 40).Draw(t, "writes") {
			i := rapid.IntRange(0, pages-1).Draw(t, "page")
			s.Write([]byte{1}, uint64(i)*PageSize+3)
			set[i] = true
		}
		offset := rapid.Uint64Range(0, pages*PageSize-1).Draw(t, "offset")
		length := rapid.Uint64Range(1, pages*PageSize-offset).Draw(t, "length")
		want, state := uint64(0), set[offset/PageSize]
		for want < length && set[(offset+want)/PageSize] == state {
			want += PageSize - (offset+want)%PageSize
		}
		want = min(want, length)
		if n, allocated := s.Run(offset, length); n != want || allocated != state {
			t.Fatalf("run %d+%d: %d %t, want %d %t", offset, length, n, allocated, want, state)
		}
	})
}

func TestDevicesShareAStore(t *testing.T) {
	s, err := NewStore(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	for i := range 2 {
		d, err := New(Config{Size: 1 << 20, Store: s})
		if err != nil {
			t.Fatal(err)
		}
		c := devtest.NewClient(t, r, d, 4)
		if i == 0 {
			c.Write(4096, bytes.Repeat([]byte{5}, 4096))
		} else if got := c.Read(4096, 4096); got[4095] != 5 {
			t.Error("the second device does not see what the first wrote")
		}
		c.Close()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	var b [1]byte
	if s.Read(b[:], 5000); b[0] != 5 {
		t.Error("the store does not show what was written")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestShrinkForgets(t *testing.T) {
	d, err := New(Config{Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	d.Store().Write(bytes.Repeat([]byte{1}, 4<<20), 0)
	for _, size := range []uint64{1<<20 + 5, 4 << 20} {
		if err := d.Resize(size); err != nil || d.Info().Size != size {
			t.Fatalf("resize to %d: %v, %d", size, err, d.Info().Size)
		}
	}
	var b [2]byte
	if d.Store().Read(b[:], 1<<20+4); b != [2]byte{1, 0} {
		t.Errorf("around the old end: %v", b)
	}
	if d.Resize(0) == nil || d.Resize(1<<40) == nil {
		t.Error("an impossible size was taken")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestConfigErrors(t *testing.T) {
	s, err := NewStore(PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Config{{}, {Size: 1 << 50}, {Size: 1 << 20, MinIO: 3}, {Size: 1 << 20, MinIO: 8192}, {Size: 1 << 20, Store: s}} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
