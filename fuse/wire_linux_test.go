package fuse

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// wireCall is a request as the kernel writes it.
func wireCall(op uint32, body []byte, data int) []byte {
	b := make([]byte, headerInSize, headerInSize+len(body)+data)
	binary.NativeEndian.PutUint32(b[4:], op)
	binary.NativeEndian.PutUint64(b[8:], 77)
	binary.NativeEndian.PutUint64(b[16:], rootNode)
	b = append(b, body...)
	b = append(b, make([]byte, data)...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func wireRange(offset uint64, length uint32) []byte {
	b := make([]byte, 40)
	binary.NativeEndian.PutUint64(b[8:], offset)
	binary.NativeEndian.PutUint32(b[16:], length)
	return b
}

func decodeAll(b []byte) (c call, err error) {
	err = c.decode(b[:min(len(b), headSize)], len(b))
	return c, err
}

func TestCallsAreTakenApart(t *testing.T) {
	fallocate := make([]byte, 32)
	binary.NativeEndian.PutUint64(fallocate[8:], 1<<40)
	binary.NativeEndian.PutUint64(fallocate[16:], 1<<33)
	binary.NativeEndian.PutUint32(fallocate[24:], fallocKeep|fallocPunch)
	for name, tt := range map[string]struct {
		bytes []byte
		want  call
	}{
		"read":      {wireCall(opRead, wireRange(1<<41, 4096), 0), call{op: opRead, offset: 1 << 41, length: 4096}},
		"write":     {wireCall(opWrite, wireRange(8192, 512), 512), call{op: opWrite, offset: 8192, length: 512}},
		"fallocate": {wireCall(opFallocate, fallocate, 0), call{op: opFallocate, offset: 1 << 40, length: 1 << 33, mode: 3}},
		"fsync":     {wireCall(opFsync, make([]byte, 16), 0), call{op: opFsync}},
		"statfs":    {wireCall(opStatfs, nil, 0), call{op: opStatfs}},
		"a name":    {wireCall(opLookup, []byte(strings.Repeat("n", 250)+"\x00"), 0), call{op: opLookup}},
	} {
		tt.want.unique, tt.want.node = 77, rootNode
		if got, err := decodeAll(tt.bytes); err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tt.want)
		}
	}
}

func TestWhatIsNoCallIsRefused(t *testing.T) {
	read := wireCall(opRead, wireRange(0, 4096), 0)
	wrong := append([]byte(nil), read...)
	wrong[0]++
	for name, b := range map[string][]byte{
		"nothing":                nil,
		"half a header":          read[:20],
		"another length":         wrong,
		"a read cut off":         wireCall(opRead, wireRange(0, 4096)[:16], 0),
		"a write with less data": wireCall(opWrite, wireRange(0, 4096), 512),
		"a write with more data": wireCall(opWrite, wireRange(0, 512), 4096),
		"a fallocate cut off":    wireCall(opFallocate, make([]byte, 16), 0),
	} {
		if _, err := decodeAll(b); !errors.Is(err, errWire) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{"short": make([]byte, 12), "extended and short": {7, 0, 0, 0, 31, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40}} {
		var i initIn
		if err := i.decode(b); !errors.Is(err, errWire) {
			t.Errorf("INIT, %s: %v", name, err)
		}
	}
}

func TestGreetingNeedsAKernelThatFits(t *testing.T) {
	hello := func(major, minor uint32, flags uint64) []byte {
		b := make([]byte, initInSize)
		binary.NativeEndian.PutUint32(b, major)
		binary.NativeEndian.PutUint32(b[4:], minor)
		binary.NativeEndian.PutUint32(b[12:], uint32(flags))
		binary.NativeEndian.PutUint32(b[16:], uint32(flags>>32))
		return wireCall(opInit, b, 0)
	}
	const all = 1<<64 - 1
	for name, b := range map[string][]byte{
		"another major": hello(8, 0, all), "too old": hello(7, 27, all), "no max_pages": hello(7, 40, initExtended),
		"something else": wireCall(opStatfs, nil, 0), "not a call": {1}, "cut off": wireCall(opInit, make([]byte, 8), 0),
		"the answer is not taken": hello(7, 40, all),
	} {
		s := session{ioMax: ioMaxDefault}
		if err := s.greeted(-1, b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s := session{ioMax: ioMaxDefault}
	_ = s.greeted(-1, hello(7, 45, all)) // there is nobody to take the answer
	if s.minor != protocolMinor || s.flags != initWanted || !s.resends() {
		t.Errorf("%+v", s)
	}
	_ = s.greeted(-1, hello(7, 39, all)) // as above
	if s.minor != 39 || s.resends() {
		t.Errorf("an old kernel: %+v", s)
	}
}

func TestRecoveryNeedsLinux69(t *testing.T) {
	for release, want := range map[string]bool{"6.9.0": true, "6.18.44-fc-v595": true, "7.0": true, "6.8.12-generic": false, "5.15.0": false, "what": false} {
		if err := recoverableRelease(release); (err == nil) != want || (err != nil && !errors.Is(err, ErrNoResend)) {
			t.Errorf("%s: %v", release, err)
		}
	}
}

func TestSessionsComeBack(t *testing.T) {
	want := session{minor: 40, flags: initWanted, background: 128, ioMax: 1 << 20, block: 512, readOnly: true, connection: 1 << 19, file: "/run/x"}
	var got session
	if err := got.decode(want.encode()); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	good := want.encode()
	for name, change := range map[string]func(b []byte) []byte{
		"short":               func(b []byte) []byte { return b[:sessionSize-1] },
		"another version":     func(b []byte) []byte { b[0]++; return b },
		"a path cut off":      func(b []byte) []byte { return b[:len(b)-1] },
		"no blocks":           func(b []byte) []byte { b[21] = 0; return b },
		"requests of nothing": func(b []byte) []byte { clear(b[16:20]); return b },
	} {
		if err := got.decode(change(append([]byte(nil), good...))); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestConfigurationsThatCannotBeAreRefused(t *testing.T) {
	d, err := memdev.New(memdev.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	small, err := memdev.New(memdev.Config{Size: 1 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = small.Close() })
	good := Config{Device: d, Reactors: []*reactor.Reactor{nil}, Name: "n", Dir: "/d", Loop: AnyLoop}
	c := good
	if err := c.check(); err != nil || c.Queues != 1 || c.Depth != depthDefault || c.IOMax != ioMaxDefault || c.BlockSize != blockDefault {
		t.Errorf("%+v, %v", c, err)
	}
	for name, change := range map[string]func(c *Config){
		"no device":       func(c *Config) { c.Device = nil },
		"no reactor":      func(c *Config) { c.Reactors = nil },
		"no name":         func(c *Config) { c.Name = "" },
		"a long name":     func(c *Config) { c.Name = strings.Repeat("n", nameMax+1) },
		"a bad name":      func(c *Config) { c.Name = "a\nb" },
		"no directory":    func(c *Config) { c.Dir = "" },
		"relative":        func(c *Config) { c.Dir = "d" },
		"a bad loop":      func(c *Config) { c.Loop = -2 },
		"a large loop":    func(c *Config) { c.Loop = loopsMax },
		"too many queues": func(c *Config) { c.Queues = 2 },
		"no queues":       func(c *Config) { c.Queues = -1 },
		"depth":           func(c *Config) { c.Depth = depthMax + 1 },
		"I/O too short":   func(c *Config) { c.IOMax = 512 },
		"I/O too long":    func(c *Config) { c.IOMax = 2 << 20 },
		"blocks":          func(c *Config) { c.BlockSize = 1000 },
		"large blocks":    func(c *Config) { c.BlockSize = 8192 },
		"a small device":  func(c *Config) { c.Device = small },
	} {
		c := good
		change(&c)
		if c.check() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestNamesBecomeFilesAndLoopNames(t *testing.T) {
	seenFiles, seenLoops := map[string]string{}, map[string]string{}
	long := strings.Repeat("long/", 60)
	for _, name := range []string{"v", "pool/v", "pool%2fv", ".", "..", ".hidden", "a b", "ü", "pool/v@snap", "nbd://host/x", long + "1", long + "2", "\\x"} {
		f, l := fileName(name), loopName(name)
		if f == "" || len(f) > 255 || strings.ContainsAny(f, "/\\ \x00") || strings.HasPrefix(f, ".") {
			t.Errorf("%q is file %q", name, f)
		}
		if len(l) > 63 || !strings.HasPrefix(l, loopMark) {
			t.Errorf("%q is loop name %q", name, l)
		}
		if other, ok := seenFiles[f]; ok {
			t.Errorf("%q and %q are one file, %q", name, other, f)
		}
		if other, ok := seenLoops[l]; ok {
			t.Errorf("%q and %q have one loop name, %q", name, other, l)
		}
		seenFiles[f], seenLoops[l] = name, name
	}
}

func TestMountsAreReadAsTheKernelWritesThem(t *testing.T) {
	const table = `27 1 254:0 / / rw - ext4 /dev/vda rw
43 27 0:39 / /run/a\040b/pool%2fv rw,noatime shared:5 - fuse.ashlar pool/v\0401 rw,user_id=0
44 27 0:39 / /elsewhere rw - fuse.ashlar pool/v\0401 rw
45 27 0:40 / /run/x rw - fuse.other y rw
46 27 0:41 /sub /run/y rw - fuse.ashlar y rw
47 27 x:y / /run/y rw - fuse.ashlar y rw
48 27 7:3 / /mnt/m rw - ext4 /dev/loop3 rw
49 27 0:50 / /mnt/b rw - btrfs /dev/loop3 rw
50 27 7:3 / /mnt/m rw - ext4 /dev/loop3 rw
nonsense
`
	got := parseMounts(table)
	if len(got) != 1 || got[0] != (mounted{name: "pool/v 1", file: "/run/a b/pool%2fv", connection: 39}) {
		t.Errorf("%+v", got)
	}
	if where := mountsOf(table, []string{"7:3"}, []string{"/dev/loop3"}); strings.Join(where, " ") != "/mnt/m /mnt/b" {
		t.Errorf("%v", where)
	}
}

func FuzzCall(f *testing.F) {
	f.Add(wireCall(opRead, wireRange(4096, 4096), 0))
	f.Add(wireCall(opWrite, wireRange(0, 16), 16))
	f.Add(wireCall(opFallocate, make([]byte, 32), 0))
	f.Add(wireCall(opInit, make([]byte, initInSize), 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeAll(b)
		if err != nil {
			return
		}
		if len(b) < headerInSize || (c.op == opWrite && c.length != uint64(len(b)-headSize)) {
			t.Errorf("%x became %+v", b, c)
		}
		var i initIn
		_ = i.decode(b[headerInSize:]) // any bytes
	})
}

func FuzzSession(f *testing.F) {
	s := session{ioMax: ioMaxDefault, block: 4096, file: "/x"}
	f.Add(s.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		var s session
		if s.decode(b) == nil && string(s.encode()) != string(b) {
			t.Errorf("%x came back as %x", b, s.encode())
		}
	})
}

func FuzzMounts(f *testing.F) {
	f.Add("43 27 0:39 / /run/a\\040b rw - fuse.ashlar v rw\n")
	f.Fuzz(func(_ *testing.T, table string) {
		_ = parseMounts(table)
		_ = mountsOf(table, []string{"7:0"}, []string{"/dev/loop0"})
	})
}
