package memdisk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const sector = sectorDefault

// rig is a disk, or several, and a queue on each.
type rig struct {
	*testing.T
	*Group
	reactor *reactor.Reactor
	clients []*devtest.Client
}

func newRig(t *testing.T, configs ...Config) *rig {
	t.Helper()
	g := &rig{T: t, Group: NewGroup(configs...), reactor: devtest.Reactors(t, reactor.EngineAuto, 1)[0]}
	g.open()
	t.Cleanup(g.close)
	return g
}

func (g *rig) open() {
	for _, d := range g.Disks() {
		g.clients = append(g.clients, devtest.NewClient(g.T, g.reactor, d, 64))
	}
}

func (g *rig) close() {
	for _, c := range g.clients {
		c.Close()
	}
	g.clients = nil
}

func write(offset uint64, data []byte, flags datapath.Flags) *datapath.Request {
	return &datapath.Request{Op: datapath.OpWrite, Flags: flags, Offset: offset, Length: uint64(len(data)), Buf: data}
}

func read(offset, length uint64) *datapath.Request {
	return &datapath.Request{Op: datapath.OpRead, Offset: offset, Length: length, Buf: make([]byte, length)}
}

func flush() *datapath.Request { return &datapath.Request{Op: datapath.OpFlush} }

func zero(offset, length uint64, flags datapath.Flags) *datapath.Request {
	return &datapath.Request{Op: datapath.OpWriteZeroes, Flags: flags, Offset: offset, Length: length}
}

// must does the requests in one turn on disk 0 and wants them to succeed.
func (g *rig) must(requests ...*datapath.Request) {
	g.Helper()
	g.clients[0].Do(requests...)
	for _, r := range requests {
		if r.Status != datapath.StatusOK {
			g.Fatalf("%s of %d bytes at %d: %s", r.Op, r.Length, r.Offset, r.Status)
		}
	}
}

// want does one request and wants its status.
func (g *rig) want(r *datapath.Request, s datapath.Status) {
	g.Helper()
	g.clients[0].Do(r)
	if r.Status != s {
		g.Errorf("%s of %d bytes at %d: %s, want %s", r.Op, r.Length, r.Offset, r.Status, s)
	}
}

// letters is n sectors of one letter.
func letters(letter byte, n int) []byte { return bytes.Repeat([]byte{letter}, n*sector) }

// text is the first byte of each sector, "." for zero; it fails where a sector is
// not one byte all over.
func text(t testing.TB, content []byte) string {
	t.Helper()
	var s []byte
	for b := range slices.Chunk(content, sector) {
		if bytes.Count(b, b[:1]) != len(b) {
			t.Fatalf("sector %d is torn inside", len(s))
		}
		if b[0] == 0 {
			b = []byte{'.'}
		}
		s = append(s, b[0])
	}
	return string(s)
}

func TestConformance(t *testing.T) {
	for _, test := range []struct {
		name   string
		config Config
	}{
		{"sectors", Config{Size: 8<<20 + 512}},
		{"bytes", Config{Size: 9<<20 + 123, AnyIO: true, Shuffle: true, Sector: 4096}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if raceEnabled && test.name == "bytes" {
				t.Skip("with the race detector one disk runs the suite")
			}
			devtest.Run(t, func(*testing.T) datapath.Device { return New(test.config) }, devtest.Options{
				DiscardZeroes: true,
				ReadOnly: func(*testing.T) datapath.Device {
					c := test.config
					c.ReadOnly = true
					return New(c)
				},
				Resize: func(d datapath.Device, size uint64) error {
					d.(*Disk).Truncate(size)
					return nil
				},
				Crash: func(_ *testing.T, d datapath.Device) datapath.Device {
					d.(*Disk).CrashLose()
					return d
				},
			})
		})
	}
}

func TestDurableIsNeverLost(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 4), 0))
	g.must(zero(sector, sector, 0))
	g.must(flush())
	g.must(write(8*sector, letters('f', 2), datapath.FlagFUA))
	if got := text(t, d.Durable(0, 10*sector)); got != "a.aa....ff" {
		t.Errorf("durable: %s", got)
	}
	g.must(write(0, letters('b', 4), 0)) // and this one may be lost
	if got := text(t, d.Durable(0, 4*sector)); got != "a.aa" {
		t.Errorf("durable: %s", got)
	}
	g.close()
	for seed := range uint64(200) {
		c := d.Clone()
		c.Crash(seed)
		got := text(t, c.Bytes(0, 10*sector))
		for i, allowed := range []string{"ab", ".b", "ab", "ab", ".", ".", ".", ".", "f", "f"} {
			if !bytes.ContainsRune([]byte(allowed), rune(got[i])) {
				t.Fatalf("seed %d: sector %d of %s", seed, i, got)
			}
		}
		c.CrashLose()
		if again := text(t, c.Bytes(0, 10*sector)); again != got {
			t.Fatalf("seed %d: %s before and %s after a second crash", seed, got, again)
		}
	}
	d.CrashKeep()
	if got := text(t, d.Bytes(0, 4*sector)); got != "bbbb" {
		t.Errorf("a crash of the process left %s", got)
	}
	d.CrashLose()
	if got := text(t, d.Bytes(0, 4*sector)); got != "a.aa" {
		t.Errorf("a crash of the process made writes durable: %s", got)
	}
	g.open()
	g.must(write(0, letters('c', 1), 0)) // and the disk still works
	if got := text(t, g.clients[0].Read(0, 4*sector)); got != "c.aa" {
		t.Errorf("after crashes: %s", got)
	}
}

func TestFlushDoesNotCoverWhatIsInFlight(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 1), 0), flush()) // one turn: the flush is submitted before the write completes
	if got := text(t, d.Durable(0, sector)); got != "." {
		t.Errorf("a flush covered a write that was in flight: %s", got)
	}
	if got := text(t, d.Bytes(0, sector)); got != "a" {
		t.Errorf("visible: %s", got)
	}
	g.must(flush(), write(sector, letters('b', 1), 0))
	if got := text(t, d.Durable(0, 2*sector)); got != "a." {
		t.Errorf("durable after the second flush: %s", got)
	}
}

func TestFUACoversOnlyItself(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 4), 0))
	g.must(write(sector, letters('f', 1), datapath.FlagFUA))
	g.must(write(2*sector, letters('b', 1), 0))
	g.close()
	seen := make(map[string]bool)
	for seed := range uint64(400) {
		c := d.Clone()
		c.Crash(seed)
		got := text(t, c.Bytes(0, 4*sector))
		if got[1] != 'f' {
			t.Fatalf("seed %d: %s: an older write came back over one with FUA", seed, got)
		}
		seen[got] = true
	}
	// a's four sectors are kept or not, each, the second never; b is, or not.
	if len(seen) != 2*3*2 {
		t.Errorf("400 crashes left %d images, want all 12: %v", len(seen), seen)
	}
	d.CrashLose()
	if got := text(t, d.Bytes(0, 4*sector)); got != ".f.." {
		t.Errorf("after losing all that may be: %s", got)
	}
}

func TestTornOnlyAtSectors(t *testing.T) {
	for _, size := range []int{512, 4096} {
		d := New(Config{Size: 1 << 20, Sector: size, AnyIO: true})
		old := bytes.Repeat([]byte{'o'}, 1<<16)
		d.Poke(0, old)
		const offset, length = 700, 40000
		r := write(offset, bytes.Repeat([]byte{'n'}, length), 0)
		order, _ := d.submit(r)
		d.end(r.Op, order)
		torn := 0
		for seed := range uint64(200) {
			c := d.Clone()
			c.Crash(seed)
			got := c.Bytes(0, 1<<16)
			for i := range got {
				inside := i >= offset && i < offset+length
				if !inside && got[i] != 'o' {
					t.Fatalf("byte %d, outside of the write, changed", i)
				}
				if inside && i > offset && i%size != 0 && got[i] != got[i-1] {
					t.Fatalf("sector size %d, seed %d: torn at %d", size, seed, i)
				}
			}
			if got[offset] != got[offset+length-1] || bytes.Count(got, []byte{'n'})%length != 0 {
				torn++
			}
		}
		if torn == 0 {
			t.Error("no crash tore the write")
		}
	}
}

func TestCrashIsTheSameBySeed(t *testing.T) {
	make := func(diskSeed, seed uint64) []byte {
		d := New(Config{Size: 1 << 20, Seed: diskSeed})
		for i := range uint64(50) {
			order, _ := d.submit(write(i*7%40*sector, letters(byte(i+1), 5), 0))
			d.end(datapath.OpWrite, order)
		}
		d.Crash(seed)
		return d.Bytes(0, 1<<20)
	}
	if !bytes.Equal(make(1, 2), make(1, 2)) {
		t.Error("one seed, two crashes")
	}
	if bytes.Equal(make(1, 2), make(1, 3)) || bytes.Equal(make(1, 2), make(2, 2)) {
		t.Error("seeds do not matter")
	}
}

func TestSparseTerabyte(t *testing.T) {
	g := newRig(t, Config{Size: 1 << 40})
	d := g.Disk(0)
	for _, offset := range []uint64{0, 1<<40 - 4096, 1<<39 + 512, 77 << 30} {
		g.must(write(offset, letters('x', 3), 0))
	}
	g.must(zero(4096, 1<<40-8192, 0))
	for offset, want := range map[uint64]string{0: "xxx.", 1<<40 - 4096: "xxx.", 1 << 39: "....", 77 << 30: "...."} {
		if got := text(t, d.Bytes(offset, 4*sector)); got != want {
			t.Errorf("at %d: %s, want %s", offset, got, want)
		}
	}
	g.must(flush())
	g.close()
	for seed := range uint64(20) {
		c := d.Clone()
		cl := devtest.NewClient(t, g.reactor, c, 4)
		cl.Do(zero(0, 1<<40, 0))
		cl.Close()
		c.Crash(seed)
	}
	if got := text(t, d.Bytes(0, 4*sector)); got != "xxx." {
		t.Errorf("a clone changed its origin: %s", got)
	}
}

func TestContentAgreesWithBytes(t *testing.T) {
	const size = 3 << 20
	var c content
	want := make([]byte, size)
	type frozen struct {
		snapshot
		want []byte
	}
	var old []frozen
	state := uint64(1)
	random := func(n uint64) uint64 { state = mix(state); return state % n }
	for i := range 400 {
		offset := random(size)
		length := min(1+random(1<<(4+random(18))), size-offset)
		if i%3 == 0 {
			offset, length = offset/pageSize*pageSize, length/pageSize*pageSize
		}
		if random(3) == 0 {
			c.zero(offset, length)
			clear(want[offset : offset+length])
		} else {
			data := bytes.Repeat([]byte{byte(i)}, int(length))
			c.write(data, offset)
			copy(want[offset:], data)
		}
		if i%40 == 0 {
			old = append(old, frozen{c.freeze(), slices.Clone(want)})
		}
		if i%40 == 20 { // a fork that writes leaves the snapshot alone
			f := old[len(old)-1].fork()
			f.zero(0, size)
			f.write([]byte{1}, random(size))
		}
	}
	old = append(old, frozen{c.freeze(), want})
	got := make([]byte, size)
	for i, f := range old {
		fork := f.fork()
		fork.read(got, 0)
		if !bytes.Equal(got, f.want) {
			t.Errorf("snapshot %d holds other bytes", i)
		}
	}
}

func TestCloneTakesItsOwnWay(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 2), 0))
	c := d.Clone()
	other := devtest.NewClient(t, g.reactor, c, 4)
	other.Write(0, letters('c', 1))
	g.must(write(sector, letters('d', 1), 0))
	if a, b := text(t, d.Bytes(0, 2*sector)), text(t, c.Bytes(0, 2*sector)); a != "ad" || b != "ca" {
		t.Errorf("origin %s, clone %s", a, b)
	}
	other.Flush()
	if a, b := text(t, d.Durable(0, 2*sector)), text(t, c.Durable(0, 2*sector)); a != ".." || b != "ca" {
		t.Errorf("durable: origin %s, clone %s", a, b)
	}
	other.Close()
}

func TestCloneHasTheDataOfChangesAndEndsThem(t *testing.T) {
	d := New(Config{Size: 64 * sector})
	do := func(d *Disk, r *datapath.Request) {
		order, _ := d.submit(r)
		d.end(r.Op, order)
	}
	order, _ := d.submit(write(0, letters('a', 1), 0))
	c := d.Clone() // the write is in flight
	d.end(datapath.OpWrite, order)
	do(d, flush())
	for range 1000 { // into the memory a's data had, if that were free
		do(d, write(0, letters('b', 1), 0))
		do(d, flush())
	}
	do(c, flush())
	if a, b := text(t, c.Durable(0, sector)), text(t, d.Durable(0, sector)); a != "a" || b != "b" {
		t.Errorf("clone %s, origin %s", a, b)
	}
	// The same for a trace.
	base := d.StartTrace()
	do(d, write(0, letters('c', 1), 0))
	do(d, flush())
	for range 1000 {
		do(d, write(sector, letters('d', 1), 0))
		do(d, flush())
	}
	trace := d.StopTrace()
	if trace[0].Data[0] != 'c' {
		t.Errorf("the trace's data changed to %c", trace[0].Data[0])
	}
	for im := range base.Images(trace[:3], ImageOptions{Only: func(c Cut) bool { return c.Index == 3 }}) {
		if got := text(t, im.Disk().Bytes(0, sector)); got != "c" {
			t.Errorf("%s: %s", im, got)
		}
	}
}

func TestStatsCount(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	g.must(write(0, letters('a', 4), datapath.FlagFUA), write(0, letters('a', 1), 0), read(0, sector), flush(),
		zero(0, 2*sector, datapath.FlagFUA), &datapath.Request{Op: datapath.OpDiscard, Length: 3 * sector})
	g.want(&datapath.Request{Op: datapath.OpCache, Length: sector}, datapath.StatusNotSupported)
	want := Stats{Reads: 1, ReadBytes: 512, Writes: 2, WriteBytes: 2560, Zeroes: 1, ZeroBytes: 1024, Discards: 1, DiscardBytes: 1536,
		Flushes: 1, FUA: 2, Failed: 1}
	if got := d.ResetStats(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := d.Stats(); got != (Stats{}) {
		t.Errorf("after the reset: %+v", got)
	}
}

func TestShuffleReordersCompletions(t *testing.T) {
	orders := make(map[string]bool)
	for seed := range uint64(10) {
		g := newRig(t, Config{Size: 1 << 20, Seed: seed, Shuffle: true})
		var ended []int
		done := make(chan struct{}, 8)
		var q datapath.Queue
		g.clients[0].Run(func() {
			var err error
			q, err = g.Disk(0).OpenQueue(g.reactor, 8)
			if err != nil {
				t.Error(err)
				return
			}
			for i := range 8 {
				r := write(uint64(i)*sector, letters('a', 1), 0)
				r.Tag = uint32(i)
				r.Done = func(*datapath.Request) {
					ended = append(ended, i)
					done <- struct{}{}
				}
				q.Submit(r)
			}
		})
		for range 8 {
			<-done
		}
		g.clients[0].Run(func() { _ = q.Close() }) // it cannot fail
		orders[fmt.Sprint(ended)] = true
	}
	if len(orders) < 5 {
		t.Errorf("%d orders in 10 seeds", len(orders))
	}
}

func BenchmarkWrite4KiB(b *testing.B) {
	d := New(Config{Size: 64 << 20})
	data := make([]byte, 4096)
	r := write(0, data, 0)
	f := flush()
	b.SetBytes(4096)
	for i := 0; b.Loop(); i++ {
		binary.LittleEndian.PutUint64(data, uint64(i))
		r.Offset = uint64(i*17) % (16 << 10) * 4096
		order, _ := d.submit(r)
		d.end(r.Op, order)
		if i%16 == 15 {
			order, _ = d.submit(f)
			d.end(f.Op, order)
		}
	}
}
