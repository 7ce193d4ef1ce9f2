package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// patient is a pool whose disks fall ill, and the events it tells of.
type patient struct {
	*rig
	mem    []*memdisk.Disk
	faults []*filter.Fault
	data   []byte   // of volume v
	sealed []byte   // of v@s
	doubts [][2]int // ranges of v that a failed write has left old or new

	mu     sync.Mutex
	events []Event
}

// newPatient makes a pool with a volume v of 2 MiB and a snapshot v@s of it, and
// closes it.
func newPatient(t testing.TB, disks int) *patient {
	t.Helper()
	x := &patient{}
	var devices []datapath.Device
	for range disks {
		m := memory(24 << 20)
		f, err := filter.NewFault(m, filter.FaultConfig{Lying: true})
		if err != nil {
			t.Fatal(err)
		}
		x.mem, x.faults = append(x.mem, m), append(x.faults, f)
		devices = append(devices, f)
	}
	x.rig = newRig(t, 2, devices...)
	x.config.Event = func(e Event) {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.events = append(x.events, e)
	}
	x.open()
	d := x.volume("v", 2<<20)
	q := x.port(d)
	x.data = make([]byte, 2<<20)
	for i := range x.data {
		x.data[i] = byte(i>>12)*7 | 1
	}
	x.must(q, datapath.OpWrite, 0, x.data)
	x.sealed = slices.Clone(x.data)
	if _, err := x.pool.CreateSnapshot("v", "s", nil); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(x.data); i += 5 * blockSize {
		x.data[i] = 0xee
		x.must(q, datapath.OpWrite, uint64(i), x.data[i:i+blockSize])
	}
	x.release(d, q)
	x.close()
	return x
}

func (x *patient) port(d datapath.Device) *port {
	x.Helper()
	q, err := openPort(x.r, d, 8)
	if err != nil {
		x.Fatal(err)
	}
	return q
}

func (x *patient) must(q *port, op datapath.Op, offset uint64, b []byte) {
	x.Helper()
	if s, err := q.one(op, 0, offset, b, uint64(len(b))); err != nil || s != datapath.StatusOK {
		x.Fatalf("%v at %d: %v %v", op, offset, s, err)
	}
}

func (x *patient) release(d datapath.Device, q *port) {
	x.Helper()
	if err := errors.Join(q.close(), d.Close()); err != nil {
		x.Error(err)
	}
}

// told counts the events of a kind.
func (x *patient) told(kind EventKind) (n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, e := range x.events {
		if e.Kind == kind && e.Message != "" {
			n++
		}
	}
	return n
}

// reads reads both volumes block by block; what is read must be right. It returns
// how many blocks could not be read.
func (x *patient) reads() (failed int) {
	x.Helper()
	for _, o := range []struct {
		name string
		open func() (datapath.Device, error)
		want []byte
	}{
		{"v", func() (datapath.Device, error) { return x.pool.OpenVolume("v") }, x.data},
		{"v@s", func() (datapath.Device, error) { return x.pool.OpenSnapshot("v", "s") }, x.sealed},
	} {
		d, err := o.open()
		if err != nil {
			failed += len(o.want) / blockSize
			continue
		}
		q := x.port(d)
		for at := 0; at < len(o.want); at += blockSize {
			got := make([]byte, blockSize)
			s, err := q.one(datapath.OpRead, 0, uint64(at), got, blockSize)
			switch {
			case err != nil:
				x.Fatal(err)
			case s != datapath.StatusOK:
				failed++
			case !bytes.Equal(got, o.want[at:at+blockSize]) && !(o.name == "v" && x.doubtful(at)):
				x.Fatalf("%s: block %d is wrong: %#x, want %#x", o.name, at/blockSize, got[0], o.want[at])
			}
		}
		x.release(d, q)
	}
	return failed
}

func (x *patient) doubtful(at int) bool {
	for _, d := range x.doubts {
		if at < d[1] && d[0] < at+blockSize {
			return true
		}
	}
	return false
}

// tryOpen opens the pool, which may fail.
func (x *patient) tryOpen() error {
	p, err := Open(x.config)
	x.pool = p
	return err
}

// places are where the structures of the pool lie on disk 0.
type places struct {
	supers, zones, sums, maps, layers []uint64 // of pairs but for supers, which are pages
	data                              []uint64 // of blocks of v
	journal                           uint64
}

func (x *patient) places() (l places) {
	x.open()
	defer x.close()
	p := x.pool
	size := p.super.members[0].size
	l.supers = []uint64{0, pageSize, size - pairSize, size - pageSize}
	l.journal = p.journal.offset
	for _, z := range *p.zones.Load() {
		if z.disk.index == 0 {
			l.zones = append(l.zones, z.start)
		}
	}
	seen := map[uint32]bool{}
	for _, y := range p.layers {
		if d, at := p.pairAddress(y.pair); d.index == 0 {
			l.layers = append(l.layers, at)
		}
		y.pages(func(m *mapPage) bool {
			if d, at := p.pairAddress(m.pair); d.index == 0 {
				l.maps = append(l.maps, at)
			}
			return true
		})
		y.each(0, func(_ uint32, e entry) bool {
			c := e.cluster()
			if d, at := p.address(c); c != noCluster && d.index == 0 {
				for b := range uint64(clusterBlocks) {
					if e.mask()&(1<<b) != 0 {
						l.data = append(l.data, at+b*blockSize)
					}
				}
				_, index, _ := p.region(c)
				if !seen[index] {
					seen[index] = true
					l.sums = append(l.sums, p.sumsOffset(p.zoneOf(c), index))
				}
			}
			return true
		})
	}
	return l
}

// harm is how a page is damaged.
var harms = map[string]func(d *memdisk.Disk, at uint64){
	"rot":           func(d *memdisk.Disk, at uint64) { d.Corrupt(at, pageSize, at) },
	"bad sector":    func(d *memdisk.Disk, at uint64) { d.BadSector(at+512, 512) },
	"zeros":         func(d *memdisk.Disk, at uint64) { d.Poke(at, make([]byte, pageSize)) },
	"another block": func(d *memdisk.Disk, at uint64) { d.Poke(at, bytes.Repeat([]byte{0x77}, pageSize)) },
}

// TestOneDamagedCopyIsHealed damages one copy of each structure that has two. The
// pool says so, serves everything, and has healed the copy when it is closed: then
// the other one may be damaged.
func TestOneDamagedCopyIsHealed(t *testing.T) {
	for name, harm := range harms {
		t.Run(name, func(t *testing.T) {
			x := newPatient(t, 1)
			l := x.places()
			for what, list := range map[string][]uint64{"superblock": {l.supers[0], l.supers[1]}, "zone page": l.zones, "map page": l.maps, "layer": l.layers, "checksums": l.sums} {
				for round := range uint64(2) {
					x.events = nil
					for _, at := range list {
						if what != "superblock" {
							at += round * pageSize
						} else if round == 1 {
							at = x.mem[0].Info().Size&^(clusterSize-1) - pairSize + at
						}
						harm(x.mem[0], at)
					}
					if err := x.tryOpen(); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					if n := x.reads(); n > 0 {
						t.Errorf("%s: %d blocks cannot be read", what, n)
					}
					if n := x.told(EventRepaired); n == 0 {
						t.Errorf("%s: copy %d was damaged, and nobody told", what, round)
					}
					d, err := x.pool.OpenVolume("v")
					if err != nil {
						t.Fatal(err)
					}
					q := x.port(d)
					x.must(q, datapath.OpWrite, 0, x.data[:8*blockSize])
					x.release(d, q)
					x.close()
				}
			}
		})
	}
}

// TestDamageBeyondCopiesIsAnErrorThatNamesIt damages both copies.
func TestDamageBeyondCopiesIsAnErrorThatNamesIt(t *testing.T) {
	for name, harm := range harms {
		t.Run(name, func(t *testing.T) {
			for what, places := range map[string]func(l places) []uint64{
				"superblock": func(l places) []uint64 { return l.supers },
				"zone page":  func(l places) []uint64 { return []uint64{l.zones[0], l.zones[0] + pageSize} },
				"map page":   func(l places) []uint64 { return []uint64{l.maps[0], l.maps[0] + pageSize} },
				"layer":      func(l places) []uint64 { return []uint64{l.layers[0], l.layers[0] + pageSize} },
			} {
				x := newPatient(t, 1)
				for _, at := range places(x.places()) {
					harm(x.mem[0], at)
				}
				err := x.tryOpen()
				if err == nil {
					t.Errorf("%s: both copies are damaged, and the pool opens", what)
					x.close()
					continue
				}
				var io *DiskError
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotPool) && !errors.As(err, &io) || !strings.Contains(err.Error(), "mem0") {
					t.Errorf("%s: the error does not say enough: %v", what, err)
				}
			}
		})
	}
}

// TestDamagedDataIsNeverServed damages data and both copies of checksums.
func TestDamagedDataIsNeverServed(t *testing.T) {
	for name, harm := range harms {
		t.Run(name, func(t *testing.T) {
			x := newPatient(t, 1)
			l := x.places()
			for i, at := range l.data {
				if i%9 == 0 {
					harm(x.mem[0], at)
				}
			}
			x.open()
			if n, m := x.reads(), (len(l.data)+8)/9; n < m {
				t.Errorf("%d blocks were damaged, %d could not be read", m, n)
			}
			if name != "bad sector" && x.told(EventCorrupt) == 0 || name == "bad sector" && x.told(EventIO) == 0 {
				t.Error("nobody told")
			}
			j, err := x.pool.Scrub(1 << 40)
			if err != nil {
				t.Fatal(err)
			}
			if j, err = x.pool.WaitJob(t.Context(), j.ID); err != nil || j.Found == 0 {
				t.Errorf("the scrub found nothing: %+v %v", j, err)
			}
			// Whole blocks can be written again, and are good then.
			d, err := x.pool.OpenVolume("v")
			if err != nil {
				t.Fatal(err)
			}
			q := x.port(d)
			x.must(q, datapath.OpWrite, 0, x.data)
			got := make([]byte, len(x.data))
			x.must(q, datapath.OpRead, 0, got)
			if !bytes.Equal(got, x.data) {
				t.Error("what was written again is wrong")
			}
			x.release(d, q)
			x.close()
			for _, at := range l.sums {
				harm(x.mem[0], at)
				harm(x.mem[0], at+pageSize)
			}
			if err := x.tryOpen(); err == nil {
				x.reads()
				_ = x.pool.Close() // of a pool that has lost something
			}
		})
	}
}

// TestAFailedFlushIsSticky fails one flush, in the data path, and one in the
// committer.
func TestAFailedFlushIsSticky(t *testing.T) {
	for _, unsettled := range []bool{false, true} {
		x := newPatient(t, 1)
		x.open()
		d, err := x.pool.OpenVolume("v")
		if err != nil {
			t.Fatal(err)
		}
		q := x.port(d)
		x.must(q, datapath.OpRead, 0, make([]byte, blockSize))
		if unsettled {
			if s, err := q.one(datapath.OpDiscard, 0, 1<<20, nil, clusterSize); err != nil || s != datapath.StatusOK {
				t.Fatal(s, err)
			}
			clear(x.data[1<<20:][:clusterSize])
		}
		if err := x.faults[0].SetRules([]filter.FaultRule{{Ops: []datapath.Op{datapath.OpFlush}, Count: 1, Transient: true}}); err != nil {
			t.Fatal(err)
		}
		for i, want := range []datapath.Status{datapath.StatusIO, datapath.StatusIO} {
			if s, err := q.one(datapath.OpFlush, 0, 0, nil, 0); err != nil || s != want {
				t.Errorf("flush %d: %v %v", i, s, err)
			}
		}
		if s, err := q.one(datapath.OpWrite, 0, 0, x.data[:blockSize], blockSize); err != nil || s != datapath.StatusIO {
			t.Errorf("a write to a stopped pool: %v %v", s, err)
		}
		if i := x.pool.Info(); i.State != StateStopped || i.Reason == "" || x.told(EventStopped) != 1 {
			t.Errorf("state %s, %q, told %d times", i.State, i.Reason, x.told(EventStopped))
		}
		if _, err := x.pool.CreateSnapshot("v", "late", nil); !errors.Is(err, ErrStopped) {
			t.Errorf("snapshot of a stopped pool: %v", err)
		}
		if n := x.reads(); n > 0 {
			t.Errorf("%d blocks of a stopped pool cannot be read", n)
		}
		x.release(d, q)
		within(t, time.Minute, "Close", func() { _ = x.pool.Close() }) // says that it has stopped, or not
	}
}

// TestEveryRequestOfADiskFailsOnce runs a story again and again; in run n, request n
// of the disk fails, by itself or with all that follow. Whatever is acknowledged is
// right, nothing hangs, and the pool opens again with all that was flushed.
func TestEveryRequestOfADiskFailsOnce(t *testing.T) {
	step := uint64(19)
	if longTests {
		step = 1
	}
	for _, rule := range []filter.FaultRule{
		{Count: 1}, {}, {Count: 1, Action: filter.FaultPartial},
		{Ops: []datapath.Op{datapath.OpWrite}, Count: 1}, {Ops: []datapath.Op{datapath.OpFlush}, Count: 1, Transient: true},
		{Ops: []datapath.Op{datapath.OpRead}, Count: 1}, {Ops: []datapath.Op{datapath.OpWrite}, Status: datapath.StatusNoSpace},
	} {
		base := newPatient(t, 1)
		image := base.mem[0]
		for n := uint64(0); ; n += step {
			m := image.Clone()
			f, err := filter.NewFault(m, filter.FaultConfig{Seed: n})
			if err != nil {
				t.Fatal(err)
			}
			x := &patient{rig: &rig{TB: t, r: base.r}, mem: []*memdisk.Disk{m}, faults: []*filter.Fault{f}, data: slices.Clone(base.data), sealed: base.sealed}
			x.disks = []Disk{{Path: "mem0", Device: f}}
			x.config = Config{Disks: x.disks, Reactor: x.r, Manual: true, Log: quiet(), SumCacheBytes: pageSize}
			rule.After = n
			if err := f.SetRules([]filter.FaultRule{rule}); err != nil {
				t.Fatal(err)
			}
			if err := x.tryOpen(); err == nil {
				x.story(fmt.Sprintf("rule %+v", rule))
				within(t, time.Minute, "Close", func() { _ = x.pool.Close() }) // may have stopped
			}
			struck := f.Struck()
			x.disks[0].Device = m
			x.config.Disks = x.disks
			if err := x.tryOpen(); err != nil {
				t.Fatalf("rule %+v: after it: %v", rule, err)
			}
			if failed := x.reads(); failed > 0 {
				t.Fatalf("rule %+v: after it: %d blocks cannot be read", rule, failed)
			}
			x.close()
			if struck == 0 {
				break
			}
		}
	}
}

// story changes the pool in many ways, each of which may fail. It keeps data up to
// date, and gives up on blocks it cannot be sure of.
func (x *patient) story(when string) {
	x.Helper()
	d, err := x.pool.OpenVolume("v")
	if err != nil {
		x.Fatal(err)
	}
	q := x.port(d)
	write := func(at, n int, with byte) {
		b := bytes.Repeat([]byte{with}, n)
		s, err := q.one(datapath.OpWrite, datapath.FlagFUA, uint64(at), b, uint64(n))
		if err != nil {
			x.Fatalf("%s: %v", when, err)
		}
		if s == datapath.StatusOK {
			copy(x.data[at:], b)
			return
		}
		// Each block is old or new.
		for i := at / blockSize; i <= (at+n-1)/blockSize; i++ {
			from, to := max(i*blockSize, at), min((i+1)*blockSize, at+n)
			got := make([]byte, to-from)
			s, err := q.one(datapath.OpRead, 0, uint64(from), got, uint64(to-from))
			if err != nil {
				x.Fatal(err)
			}
			if s == datapath.StatusOK && bytes.Equal(got, b[:to-from]) {
				x.data = slices.Clone(x.data)
				copy(x.data[from:], got)
				// It may be the old one again when the pool is opened; a story has one write a block.
				x.unsure(from, to)
			} else if s != datapath.StatusOK {
				x.unsure(from, to)
			} else if !bytes.Equal(got, x.data[from:to]) {
				x.Fatalf("%s: a write failed and block %d is neither old nor new", when, i)
			} else {
				x.unsure(from, to)
			}
		}
	}
	write(blockSize, blockSize, 0x11)
	write(3*clusterSize+100, 3000, 0x22)
	write(5*clusterSize, 2*clusterSize, 0x33)
	_, errSnap := x.pool.CreateSnapshot("v", "t", nil)
	write(9*clusterSize, 3*blockSize, 0x44)
	_ = x.pool.Maintain() // may fail
	write(9*clusterSize+clusterSize/2, blockSize, 0x55)
	if errSnap == nil {
		_, _ = x.pool.DeleteSnapshot("v", "t") // may fail
	}
	_ = x.pool.Maintain() // merges; may fail
	write(11*clusterSize, clusterSize, 0x66)
	x.release(d, q)
}

// unsure takes blocks out of what is compared after the story: they become what the
// volume says next.
func (x *patient) unsure(from, to int) { x.doubts = append(x.doubts, [2]int{from, to}) }

// TestLostAndMisdirectedWrites loses or misdirects one write of a story. What is read
// then is right or fails; a lost write of data may show the data before it only when
// the pool could not know, which is while its region is dirty over a crash.
func TestLostAndMisdirectedWrites(t *testing.T) {
	count := 25
	if longTests {
		count = 600
	}
	for _, misdirect := range []bool{false, true} {
		base := newPatient(t, 1)
		for n := range count {
			m := base.mem[0].Clone()
			x := &patient{rig: &rig{TB: t, r: base.r}, mem: []*memdisk.Disk{m}, data: slices.Clone(base.data), sealed: base.sealed}
			x.config = Config{Disks: []Disk{{Path: "mem0", Device: m}}, Reactor: x.r, Manual: true, Log: quiet(), SumCacheBytes: pageSize}
			left := n
			hit := func(e memdisk.Event) bool { left--; return left == -1 }
			if misdirect {
				m.Misdirect(uint64(n*977)*blockSize%(20<<20), hit)
			} else {
				m.LoseWrite(hit)
			}
			if x.tryOpen() != nil {
				continue
			}
			x.story("a write was lost")
			m.LoseWrite(nil)
			within(t, time.Minute, "Close", func() { _ = x.pool.Close() }) // may have stopped
			if err := x.tryOpen(); err != nil {
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotPool) {
					t.Errorf("write %d: %v", n, err)
				}
				continue
			}
			x.reads()
			_ = x.pool.Close() // of a pool that has lost something
		}
	}
}

func TestTheDiskVanishes(t *testing.T) {
	x := newPatient(t, 2)
	x.open()
	d, err := x.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	q := x.port(d)
	x.mem[1].Vanish()
	if x.reads() == 0 {
		t.Error("a disk is gone, and all can be read")
	}
	if s, err := q.one(datapath.OpFlush, 0, 0, nil, 0); err != nil || s != datapath.StatusIO {
		t.Errorf("flush: %v %v", s, err)
	}
	if x.told(EventIO) == 0 || x.told(EventStopped) != 1 {
		t.Error("nobody told")
	}
	x.mem[1].Return()
	if n := x.reads(); n > 0 {
		t.Errorf("the disk is back, and %d blocks cannot be read", n)
	}
	x.release(d, q)
	within(t, time.Minute, "Close", func() { _ = x.pool.Close() }) // it has stopped
	x.mem[0].CrashLose()
	x.mem[1].CrashLose()
	x.open()
	if n := x.reads(); n > 0 {
		t.Errorf("%d blocks cannot be read", n)
	}
	x.close()
}

func TestWrongSetsOfDisksAreRefused(t *testing.T) {
	x := newPatient(t, 3)
	all := x.config.Disks
	other := newPatient(t, 1)
	try := func(what string, want error, disks ...Disk) {
		t.Helper()
		x.config.Disks = disks
		err := x.tryOpen()
		if err == nil {
			t.Errorf("%s: the pool opens", what)
			x.close()
		} else if want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var missing *MissingError
	try("one is missing", nil, all[0], all[2])
	if err := x.tryOpen(); !errors.As(err, &missing) || len(missing.Missing) != 1 || missing.Missing[0].Index != 1 {
		t.Errorf("one is missing: %v", err)
	}
	try("a copy", ErrInvalid, all[0], all[1], all[2], Disk{Path: "copy", Device: x.mem[1].Clone()})
	try("of another pool", ErrInvalid, all[0], all[1], all[2], other.config.Disks[0])
	try("empty", ErrNotPool, all[0], all[1], all[2], Disk{Path: "empty", Device: memory(8 << 20)})
	try("none", ErrNotPool)
	short := x.mem[2].Clone()
	short.Truncate(20 << 20)
	try("short", ErrCorrupt, all[0], all[1], Disk{Path: "short", Device: short})
	x.config.Disks = []Disk{all[2], all[0], all[1]}
	x.open()
	if n := x.reads(); n > 0 {
		t.Errorf("%d blocks cannot be read", n)
	}
	x.close()

	// Read-only, without one of them: what can be read is right.
	for _, gone := range []int{1, 2} {
		x.config.Disks, x.config.ReadOnly = slices.Delete(slices.Clone(all), gone, gone+1), true
		if err := x.tryOpen(); err != nil {
			t.Fatal(err)
		}
		if x.reads() == 0 {
			t.Error("a disk is missing, and all can be read")
		}
		x.close()
	}
}

// TestDamageInTheJournal tells a torn tail from damage in the middle.
func TestDamageInTheJournal(t *testing.T) {
	for _, crashLog := range []bool{false, true} {
		base := newPatient(t, 1)
		if crashLog {
			base.config.CrashLog = t.TempDir() + "/pending"
		}
		base.open()
		d, err := base.pool.OpenVolume("v")
		if err != nil {
			t.Fatal(err)
		}
		q := base.port(d)
		first := base.pool.journal.next.Load()
		for i := range 6 {
			b := bytes.Repeat([]byte{byte(0x80 + i)}, blockSize)
			at := i*clusterSize + 7*blockSize
			base.must(q, datapath.OpWrite, uint64(at), b)
			copy(base.data[at:], b)
			if s, err := q.one(datapath.OpDiscard, 0, uint64(14*clusterSize+i*blockSize), nil, blockSize); err != nil || s != datapath.StatusOK {
				t.Fatal(s, err)
			}
			clear(base.data[14*clusterSize+i*blockSize:][:blockSize])
			if s, err := q.one(datapath.OpFlush, 0, 0, nil, 0); err != nil || s != datapath.StatusOK {
				t.Fatal(s, err)
			}
		}
		last := base.pool.journal.next.Load()
		base.release(d, q)
		base.pool.fail(errors.New("killed by the test"))
		if err := base.pool.Close(); err != nil {
			t.Fatal(err)
		}
		base.mem[0].CrashLose()
		if base.config.CrashLog != "" {
			_ = os.Remove(base.config.CrashLog) // power was lost
		}
		for lsn := first; lsn < last; lsn++ {
			for name, harm := range harms {
				m := base.mem[0].Clone()
				harm(m, labelSize+lsn%(512<<10/pageSize)*pageSize)
				x := &patient{rig: &rig{TB: t, r: base.r}, mem: []*memdisk.Disk{m}, data: base.data, sealed: base.sealed}
				x.config = Config{Disks: []Disk{{Path: "mem0", Device: m}}, Reactor: x.r, Manual: true, Log: quiet()}
				err := x.tryOpen()
				switch {
				case lsn < last-1 && err == nil:
					t.Errorf("%s of the group at LSN %d of %d to %d: the pool opens", name, lsn, first, last)
					_ = x.pool.Close() // of a pool that has lost something
				case lsn < last-1:
					var io *DiskError
					if !errors.Is(err, ErrCorrupt) && !errors.As(err, &io) {
						t.Errorf("%s of the group at LSN %d: %v", name, lsn, err)
					}
				case err == nil: // looks like a torn tail, and nothing can tell
					x.close()
				}
			}
		}
	}
}

// TestMapsOnAMissingDiskAreNotTakenForHoles has the metadata on the disk that is
// missing: what its volumes hold is unknown then, and not zeros.
func TestMapsOnAMissingDiskAreNotTakenForHoles(t *testing.T) {
	for _, crash := range []bool{false, true} {
		x := newPatient(t, 2)
		x.open()
		for _, name := range []string{"a", "b"} {
			x.pool.pairs = nil // the next page of metadata needs a cluster
			x.pool.alloc.next = 1
			if name == "b" {
				x.pool.alloc.next = 0
			}
			d := x.volume(name, 70<<20) // its map has two pages
			q := x.port(d)
			x.must(q, datapath.OpWrite, 0, x.sealed)
			if name == "b" {
				if err := x.pool.checkpoint(); err != nil {
					t.Fatal(err)
				}
				x.pool.pairs = nil
				x.pool.alloc.next = 1
			}
			x.must(q, datapath.OpWrite, 65<<20, x.sealed[:1<<20])
			if err := x.pool.checkpoint(); err != nil {
				t.Fatal(err)
			}
			x.must(q, datapath.OpWrite, 66<<20, x.sealed[:1<<20])
			if s, err := q.one(datapath.OpFlush, 0, 0, nil, 0); err != nil || s != datapath.StatusOK {
				t.Fatal(s, err)
			}
			x.release(d, q)
		}
		if crash {
			x.pool.fail(errors.New("killed by the test"))
			if err := x.pool.Close(); err != nil {
				t.Fatal(err)
			}
		} else {
			x.close()
		}
		x.config.Disks, x.config.ReadOnly = x.config.Disks[:1], true
		if err := x.tryOpen(); err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("open: %v", err)
			}
			continue
		}
		for _, name := range []string{"a", "b"} {
			d, err := x.pool.OpenVolume(name)
			if errors.Is(err, ErrNotFound) {
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			q := x.port(d)
			for _, run := range [][2]int{{0, len(x.sealed)}, {65 << 20, 1 << 20}, {66 << 20, 1 << 20}} {
				for at := 0; at < run[1]; at += blockSize {
					got := make([]byte, blockSize)
					r := &datapath.Request{Op: datapath.OpRead, Offset: uint64(run[0] + at), Length: blockSize, Buf: got}
					if err := q.do(r); err != nil {
						t.Fatal(err)
					}
					if r.Status == datapath.StatusOK && !bytes.Equal(got, x.sealed[at:at+blockSize]) {
						t.Fatalf("crash %t: %s: a block at %d is %#x, want %#x or an error", crash, name, run[0]+at, got[0], x.sealed[at])
					}
				}
			}
			x.release(d, q)
		}
		x.close()
	}
}

// TestRecordOfALayerOnAMissingDisk: what stands on the layer is there, and reads of it
// are right or fail.
func TestRecordOfALayerOnAMissingDisk(t *testing.T) {
	x := newPatient(t, 2)
	x.open()
	meta := func(disk int) { // the next pages of metadata are to lie on this disk
		x.pool.pairs = nil
		x.pool.alloc.next = disk
	}
	d := x.volume("w", 8<<20)
	q := x.port(d)
	x.must(q, datapath.OpWrite, 0, x.sealed[:1<<20])
	if _, err := x.pool.CreateSnapshot("w", "s", nil); err != nil {
		t.Fatal(err)
	}
	meta(1)
	x.pool.applyMu.Lock() // of the layers that are stale, the snapshot alone, with its map
	old := x.pool.volumes["w"].head.Load().parent.Load()
	layers, pages := x.pool.staleLayers, x.pool.stale
	x.pool.staleLayers, x.pool.stale = []*layer{old}, nil
	x.pool.applyMu.Unlock()
	for _, l := range layers {
		l.recChange = l != old
	}
	old.recChange = true
	if err := x.pool.checkpoint(); err != nil {
		t.Fatal(err)
	}
	x.pool.applyMu.Lock()
	for _, l := range layers {
		if l != old {
			x.pool.staleLayers = append(x.pool.staleLayers, l)
		}
	}
	x.pool.stale = append(x.pool.stale, pages...)
	x.pool.applyMu.Unlock()
	x.must(q, datapath.OpWrite, 4<<20, x.sealed[:64<<10])
	meta(0)
	if err := x.pool.checkpoint(); err != nil {
		t.Fatal(err)
	}
	if at, _ := x.pool.pairAddress(old.pair); at.index != 1 {
		t.Fatalf("the record lies on disk %d", at.index)
	}
	x.release(d, q)
	x.close()
	x.config.Disks, x.config.ReadOnly = x.config.Disks[:1], true
	if err := x.tryOpen(); err != nil {
		t.Fatal(err)
	}
	if s, err := x.pool.Snapshots("w"); err != nil || len(s) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	d, err := x.pool.OpenVolume("w")
	if err != nil {
		t.Fatal(err)
	}
	q = x.port(d)
	read, failed := 0, 0
	for at := uint64(0); at < 1<<20; at += blockSize {
		got := alignedBytes(blockSize)
		switch s, err := q.one(datapath.OpRead, 0, at, got, blockSize); {
		case err != nil:
			t.Fatal(err)
		case s == datapath.StatusIO:
			failed++
		case s != datapath.StatusOK || !bytes.Equal(got, x.sealed[at:at+blockSize]):
			t.Fatalf("at %d: %v, or wrong data", at, s)
		default:
			read++
		}
	}
	if s, err := q.one(datapath.OpRead, 0, 6<<20, alignedBytes(blockSize), blockSize); err != nil || s == datapath.StatusOK && read == 0 {
		t.Errorf("what the layer may hold reads as zeros: %v, %v", s, err)
	}
	t.Logf("%d blocks were read, %d are lost", read, failed)
	x.release(d, q)
	x.close()
}
