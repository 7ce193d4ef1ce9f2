package filedev

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestTruncatedFileNeverGivesZeros cuts a file short under an open device.
func TestTruncatedFileNeverGivesZeros(t *testing.T) {
	for _, access := range []Access{AccessDirect, AccessBuffered, AccessInline} {
		for _, cut := range []int64{512 << 10, 512<<10 + 100, 512<<10 - 511, 1<<20 + 76} {
			t.Run(fmt.Sprintf("%s, to %d", access, cut), func(t *testing.T) {
				onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
					const size = 1<<20 + 77
					dir := diskDir(t)
					if access == AccessInline {
						dir = testenv.TmpfsDir(t)
					}
					file := newFile(t, dir, size)
					d := mustOpen(t, file, Options{Access: access})
					c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 4)
					data := pattern(1, size)
					c.must(write(0, data))
					c.must(flush())
					if err := os.Truncate(file, cut); err != nil {
						t.Fatal(err)
					}
					whole := uint64(cut) &^ 4095
					c.expect(0, data[:whole], "before the cut")
					if whole+8192 <= size {
						r := read(whole+4096, 4096)
						r.Buf = directBlock(4096)
						c.want(datapath.StatusIO, r)
					}
					c.want(datapath.StatusIO, read(size-1, 1))
					c.want(datapath.StatusIO, read(whole-4096, size-whole+4096))
					r := read(whole-4096, (size-whole+4096)&^4095)
					r.Buf = directBlock(len(r.Buf))
					if uint64(cut) < r.Offset+r.Length {
						c.want(datapath.StatusIO, r)
					}
					// From here on it is known.
					c.want(datapath.StatusIO, write(size-1, data[:1]))
					c.want(datapath.StatusIO, write(512<<10, data[:8192]))
					c.want(datapath.StatusIO, zeroes(0, size, 0))
					c.want(datapath.StatusIO, flush())
					c.expect(0, data[:whole], "before the cut, later")
					if s, err := os.Stat(file); err != nil || s.Size() != cut {
						t.Errorf("the file was made longer again: %v %v", s.Size(), err)
					}
				})
			})
		}
	}
}

// TestReadModifyWritePastTheEndOfATruncatedFile finds out by its read.
func TestReadModifyWritePastTheEndOfATruncatedFile(t *testing.T) {
	file := newFile(t, diskDir(t), 1<<20)
	d := mustOpen(t, file, Options{Access: AccessDirect})
	c := newClient(t, d, startReactor(t, reactor.Config{}), 1)
	if err := os.Truncate(file, 4096); err != nil {
		t.Fatal(err)
	}
	c.want(datapath.StatusIO, write(512<<10+5, pattern(1, 100)))
	c.want(datapath.StatusIO, write(512<<10, pattern(1, 8192)))
	if s, err := os.Stat(file); err != nil || s.Size() != 4096 {
		t.Errorf("the file was made longer again: %v %v", s.Size(), err)
	}
}

// fill takes all space of a filesystem and gives back the file that has it.
func fillUp(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // its content is of no use
	for _, size := range []int{64 << 10, 4 << 10} {
		for {
			if _, err := f.Write(pattern(1, size)); err != nil {
				break
			}
		}
		_ = f.Sync() // what is delayed is allocated
	}
	return name
}

func TestFullFilesystem(t *testing.T) {
	for _, test := range []struct {
		name string
		dir  func(t *testing.T) string
		o    Options
	}{
		{"ext4, direct", func(t *testing.T) string { dir, _ := ext4(t, 8<<20); return dir }, Options{Access: AccessDirect}},
		{"ext4, buffered", func(t *testing.T) string { dir, _ := ext4(t, 8<<20); return dir }, Options{Access: AccessBuffered}},
		{"tmpfs", func(t *testing.T) string { return mount(t, "-t", "tmpfs", "-o", "size=8m", "tmpfs") }, Options{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				const size = 32 << 20
				dir := test.dir(t)
				d := mustOpen(t, newFile(t, dir, size), test.o)
				c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 8)
				data := pattern(1, 1<<20)
				c.must(write(1<<20, data), write(20<<20, data[:4096]))
				c.must(flush())
				filler := fillUp(t, dir)
				for i, r := range []*datapath.Request{
					write(8<<20, pattern(2, 4096)),
					writeFUA(9<<20, pattern(3, 4096)),
					write(10<<20, pattern(4, 1<<20)),
					write(11<<20+5, pattern(5, 100)),
					write(2<<20-4096, pattern(6, 256<<10)), // begins in what is allocated
					zeroes(12<<20, 1<<20, datapath.FlagNoUnmap),
				} {
					if r.Op == datapath.OpWrite && r.Offset%4096 == 0 {
						b := directBlock(len(r.Buf))
						copy(b, r.Buf)
						r.Buf = b
					}
					if s := c.status(r); s != datapath.StatusNoSpace {
						t.Errorf("request %d, %s of %d bytes at %d: %s, want %s", i, r.Op, r.Length, r.Offset, s, datapath.StatusNoSpace)
					}
				}
				c.expect(1<<20, data[:1<<20-4096], "written before")
				c.expect(20<<20, data[:4096], "written before")
				c.expect(8<<20, make([]byte, 4096), "what did not fit")
				again := pattern(7, 1<<20-4096)
				c.must(write(1<<20, again))
				c.must(write(1<<20+77, again[77:1000])) // in place
				c.must(writeFUA(20<<20, data[4096:8192]))
				c.must(flush())
				c.expect(1<<20, again, "written in place")
				if err := os.Remove(filler); err != nil {
					t.Fatal(err)
				}
				c.must(flush())
				c.must(write(10<<20, data))
				c.must(flush())
				c.expect(10<<20, data, "written when there was space again")
			})
		})
	}
}

// failingDisk is a disk that can be made to fail writes, and reads of its second
// half: a loop device on a file in memory that is sealed and cut short.
func failingDisk(t *testing.T) (path string, failWrites, failReads func()) {
	requireLoop(t)
	const size = 8 << 20
	fd, err := unix.MemfdCreate("failing disk", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) }) // memory
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	path = loopDevice(t, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), 4096)
	return path,
		func() {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
				t.Fatal(err)
			}
		},
		func() {
			if err := unix.Ftruncate(fd, size/2); err != nil {
				t.Fatal(err)
			}
		}
}

func TestFailingDisk(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		disk, failWrites, failReads := failingDisk(t)
		c := newClient(t, mustOpen(t, disk, Options{}), startReactor(t, reactor.Config{Engine: engine}), 8)
		data := directBlock(8 << 20)
		copy(data, pattern(1, 8<<20))
		c.must(write(0, data))
		failReads()
		for _, r := range []*datapath.Request{read(5<<20, 4096), read(5<<20+100, 500), write(5<<20+100, data[:500])} {
			c.want(datapath.StatusIO, r)
		}
		c.expect(0, data[:4<<20], "the half that can be read")
		c.must(flush())
		failWrites()
		c.want(datapath.StatusIO, write(1<<20, data[:64<<10]))
		c.want(datapath.StatusIO, write(1<<20+100, data[:500]))
		c.want(datapath.StatusIO, zeroes(1<<20+100, 500, 0))
		c.must(flush()) // a failed write was reported; it fails no flush
		c.expect(1<<20, data[1<<20:2<<20], "after failed writes")
		// A FUA is a flush, too.
		c.want(datapath.StatusIO, writeFUA(1<<20, data[:4096]))
		c.want(datapath.StatusIO, flush())
		c.want(datapath.StatusIO, writeFUA(8192, data[:4096]))
		c.expect(0, data[:4<<20], "after a failed FUA")
	})
}

// TestFailedFlushIsSticky has the kernel lose what it had accepted. It reports
// that once; the device goes on.
func TestFailedFlushIsSticky(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		disk, failWrites, _ := failingDisk(t)
		d := mustOpen(t, disk, Options{Access: AccessBuffered})
		var clients []*client
		for range 3 {
			clients = append(clients, newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 8))
		}
		c := clients[0]
		c.must(write(0, pattern(1, 4096)))
		c.must(flush())
		c.must(write(4<<20, pattern(2, 64<<10))) // into the page cache
		failWrites()
		// All that are under way together fail: one of them heard it from the kernel.
		c.want(datapath.StatusIO, flush(), flush(), flush(), flush())
		if err := unix.Fdatasync(int(d.file.Fd())); err != nil {
			t.Errorf("the kernel told twice: %v", err)
		}
		for i, c := range clients {
			for range 2 {
				if s := c.status(flush()); s != datapath.StatusIO {
					t.Errorf("queue %d: flush after a failed flush: %s", i, s)
				}
				if s := c.status(writeFUA(0, pattern(3, 4096))); s != datapath.StatusIO {
					t.Errorf("queue %d: FUA after a failed flush: %s", i, s)
				}
				if s := c.status(zeroes(0, 4096, datapath.FlagFUA)); s != datapath.StatusIO {
					t.Errorf("queue %d: write-zeroes with FUA after a failed flush: %s", i, s)
				}
			}
			c.must(write(0, pattern(3, 4096)))
		}
	})
}

// TestFailedFlushIsHeardOnEveryQueue flushes from all queues at the same time.
func TestFailedFlushIsHeardOnEveryQueue(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		disk, failWrites, _ := failingDisk(t)
		d := mustOpen(t, disk, Options{Access: AccessBuffered})
		var clients []*client
		for range 3 {
			clients = append(clients, newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 8))
		}
		clients[0].must(write(4<<20, pattern(2, 64<<10)))
		failWrites()
		statuses := make(chan []datapath.Status, len(clients))
		for _, c := range clients {
			go func() { // ends after its flushes
				requests := []*datapath.Request{flush(), flush(), flush()}
				c.do(requests...)
				var all []datapath.Status
				for _, r := range requests {
					all = append(all, r.Status)
				}
				statuses <- all
			}()
		}
		for range clients {
			for _, s := range <-statuses {
				if s != datapath.StatusIO {
					t.Errorf("flush: %s", s)
				}
			}
		}
	})
}

func TestFlushesUnderWayTogetherAreOne(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := mustOpen(t, newFile(t, diskDir(t), 1<<20), Options{Access: AccessDirect})
		c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 16)
		var requests []*datapath.Request
		for range 16 {
			requests = append(requests, flush())
		}
		before := d.syncs.Load()
		c.must(requests...)
		if n := d.syncs.Load() - before; n != 2 { // the first had begun when the others came
			t.Errorf("16 flushes took %d calls of fdatasync, want 2", n)
		}
	})
}

func TestFUAWithoutDSYNC(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := mustOpen(t, newFile(t, diskDir(t), 1<<20+50), Options{Access: AccessDirect})
		c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 8)
		block := directBlock(4096)
		for _, test := range []struct {
			name  string
			r     *datapath.Request
			dsync uint64 // calls of fdatasync where the kernel has RWF_DSYNC
		}{
			{"whole block", writeFUA(4096, block), 0},
			{"piece", writeFUA(5, pattern(1, 100)), 0},
			{"ragged end", writeFUA(1<<20+3, pattern(2, 20)), 1},
			{"across the ragged end", writeFUA(1<<20-100, pattern(3, 120)), 1},
			{"zeroes", zeroes(8192, 4096, datapath.FlagFUA), 1},
		} {
			for without, want := range []uint64{test.dsync, 1} {
				d.noDsync.Store(without == 1)
				before := d.syncs.Load()
				c.must(test.r)
				if n := d.syncs.Load() - before; n != want {
					t.Errorf("%s, RWF_DSYNC missing: %t: %d calls of fdatasync, want %d", test.name, without == 1, n, want)
				}
			}
		}
	})
}

func TestOperationsInFlightAreBounded(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		const most, queues, depth, rounds = 3, 3, 16, 40
		d := mustOpen(t, newFile(t, diskDir(t), 1<<20), Options{Access: AccessDirect, InFlightMax: most})
		errs := make(chan error, queues)
		for range queues {
			c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), depth)
			var requests []*datapath.Request
			for i := range depth {
				requests = append(requests, read(uint64(i)*4096, 4096))
				requests[i].Buf = directBlock(4096)
				if i%3 == 0 {
					requests[i].Offset += 7 // through a bouncer
				}
			}
			n := c.round(requests)
			for i := range requests {
				done := requests[i].Done
				requests[i].Done = func(r *datapath.Request) {
					if in := d.inFlight.Load(); in > most+queues {
						n.failed = datapath.Status(100)
					}
					done(r)
				}
			}
			go func() { // ends after its rounds
				for range rounds {
					n.run()
				}
				if n.failed != datapath.StatusOK {
					errs <- fmt.Errorf("status %d: 100 for too many in flight", n.failed)
					return
				}
				errs <- nil
			}()
		}
		for range queues {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if in := d.inFlight.Load(); in != 0 {
			t.Errorf("%d operations counted at rest", in)
		}
	})
}

// TestLargestLengths uses a file of more bytes than 32 bits count.
func TestLargestLengths(t *testing.T) {
	const size = 6<<40 + 4096 + 5
	for _, access := range []Access{AccessDirect, AccessBuffered, AccessInline} {
		t.Run(string(access), func(t *testing.T) {
			dir := t.TempDir()
			if access == AccessInline {
				dir = testenv.TmpfsDir(t)
			}
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				d := mustOpen(t, newFile(t, dir, size), Options{Access: access})
				c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 4)
				data := pattern(1, 8192+5)
				for _, offset := range []uint64{0, math.MaxUint32 - 100, 5 << 40, size - 8192 - 5} {
					c.must(write(offset, data))
					c.expect(offset, data, "far out")
				}
				r := &datapath.Request{Op: datapath.OpExtents, Offset: 1 << 20, Length: size - 1<<20, Context: datapath.ContextAllocation, Extents: make([]datapath.Extent, 0, 32)}
				c.must(r)
				var covered uint64
				for _, e := range r.Extents {
					covered += e.Length
				}
				if covered != r.Length {
					t.Errorf("extents cover %d bytes of %d: %v", covered, r.Length, r.Extents)
				}
				c.must(discard(1, size-1))
				c.must(zeroes(0, size, 0))
				c.must(zeroes(3, size-3, datapath.FlagFastZero))
				for _, offset := range []uint64{0, 5 << 40, size - 8192 - 5} {
					c.expect(offset, make([]byte, len(data)), "zeroed")
				}
			})
		})
	}
}

// TestZeroesWhereTheDiskHasNoCommandForIt uses a loop device on ramfs, which can
// neither punch holes nor zero ranges.
func TestZeroesWhereTheDiskHasNoCommandForIt(t *testing.T) {
	requireLoop(t)
	for _, access := range []Access{AccessDirect, AccessBuffered} {
		t.Run(string(access), func(t *testing.T) {
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				dir := mount(t, "-t", "ramfs", "ramfs")
				d := mustOpen(t, loopDevice(t, newFile(t, dir, 4<<20), 4096), Options{Access: access})
				c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 4)
				i := d.Info()
				if i.Features&(datapath.FeatureDiscard|datapath.FeatureFastZero) != 0 || !i.Has(datapath.FeatureWriteZeroes) {
					t.Fatalf("features %#x", i.Features)
				}
				data := pattern(1, 4<<20)
				for _, fast := range []datapath.Flags{datapath.FlagFastZero, datapath.FlagFastZero | datapath.FlagNoUnmap} {
					c.must(write(0, data))
					c.want(datapath.StatusNotSupported, zeroes(0, 1<<20, fast), zeroes(77, 1000, fast), discard(0, 1<<20))
					c.expect(0, data, "after what was not supported")
				}
				for _, at := range [][2]int{{0, 4 << 20}, {4096, 2<<20 + 8192}, {512, 512}, {77, 1<<20 + 1}} {
					for _, flags := range []datapath.Flags{0, datapath.FlagNoUnmap, datapath.FlagFUA} {
						want := append([]byte(nil), data...)
						c.must(write(0, data))
						c.must(zeroes(uint64(at[0]), uint64(at[1]), flags))
						clear(want[at[0] : at[0]+at[1]])
						c.expect(0, want, fmt.Sprintf("zeroed %d+%d, flags %#x", at[0], at[1], uint16(flags)))
					}
				}
			})
		})
	}
}

func allocated(t *testing.T, file string) int64 {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Stat(file, &s); err != nil {
		t.Fatal(err)
	}
	return s.Blocks * 512
}

func TestDiscardGivesSpaceBack(t *testing.T) {
	const size = 4 << 20
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		r := startReactor(t, reactor.Config{Engine: engine})
		check := func(t *testing.T, path, file string) {
			d := mustOpen(t, path, Options{})
			c := newClient(t, d, r, 4)
			c.must(write(0, pattern(1, size)))
			c.must(flush())
			before := allocated(t, file)
			c.must(discard(1<<20+1, 2<<20))
			if n := before - allocated(t, file); n < 2<<20-64<<10 {
				t.Errorf("a discard of 2 MiB gave back %d bytes", n)
			}
			c.must(discard(5, 100)) // less than a sector
			c.expect(105, pattern(1, size)[105:1<<20+1], "before the discard")
			c.expect(3<<20+1, pattern(1, size)[3<<20+1:], "behind the discard")
			c.must(write(0, pattern(1, size)))
			c.must(zeroes(1<<20, 1<<20, 0))
			if n := before - allocated(t, file); n < 1<<20-64<<10 {
				t.Errorf("1 MiB of zeros gave back %d bytes", n)
			}
			c.must(zeroes(1<<20, 1<<20, datapath.FlagNoUnmap))
			if n := before - allocated(t, file); n > 64<<10 {
				t.Errorf("1 MiB of zeros with FlagNoUnmap left %d bytes unallocated", n)
			}
		}
		t.Run("file", func(t *testing.T) {
			file := newFile(t, diskDir(t), size)
			check(t, file, file)
		})
		t.Run("tmpfs", func(t *testing.T) {
			file := newFile(t, testenv.TmpfsDir(t), size)
			check(t, file, file)
		})
		t.Run("disk", func(t *testing.T) {
			requireLoop(t)
			file := newFile(t, diskDir(t), size)
			check(t, loopDevice(t, file, 4096), file)
		})
	})
}

func TestExtentsTellSpaceSetAsideFromHoles(t *testing.T) {
	const hole, zero = datapath.ExtentHole | datapath.ExtentZero, datapath.ExtentZero
	d := mustOpen(t, newFile(t, diskDir(t), 4<<20+5), Options{Access: AccessDirect})
	c := newClient(t, d, startReactor(t, reactor.Config{}), 1)
	c.must(write(1<<20, directBlock(1<<20)))
	c.must(zeroes(1<<20+256<<10, 512<<10, datapath.FlagNoUnmap))
	c.must(zeroes(3<<20, 256<<10, datapath.FlagNoUnmap))
	c.must(flush())
	for _, test := range []struct {
		offset uint64
		places int
		want   []datapath.Extent
	}{
		{0, 8, []datapath.Extent{
			{Length: 1 << 20, State: hole}, {Length: 256 << 10}, {Length: 512 << 10, State: zero}, {Length: 256 << 10},
			{Length: 1 << 20, State: hole}, {Length: 256 << 10, State: zero}, {Length: 768<<10 + 5, State: hole}}},
		{1<<20 + 300<<10, 2, []datapath.Extent{{Length: 468 << 10, State: zero}, {Length: 256 << 10}}},
		{4 << 20, 8, []datapath.Extent{{Length: 5, State: hole}}},
	} {
		r := &datapath.Request{Op: datapath.OpExtents, Offset: test.offset, Length: d.size.Load() - test.offset, Context: datapath.ContextAllocation, Extents: make([]datapath.Extent, 0, test.places)}
		c.must(r)
		if fmt.Sprint(r.Extents) != fmt.Sprint(test.want) {
			t.Errorf("from %d: %v, want %v", test.offset, r.Extents, test.want)
		}
	}
	r := &datapath.Request{Op: datapath.OpExtents, Length: 4096, Context: datapath.ContextAllocation}
	c.want(datapath.StatusInvalid, r) // no room for one
}

// TestLentPagesAreTheFile reads by pages lent instead of copied.
func TestLentPagesAreTheFile(t *testing.T) {
	const size = 2<<20 + 777
	d := mustOpen(t, newFile(t, testenv.TmpfsDir(t), size), Options{})
	c := newClient(t, d, startReactor(t, reactor.Config{}), 4)
	lent := func(offset, length uint64, want []byte, isLent bool) {
		t.Helper()
		r := read(offset, length)
		own := &r.Buf[0]
		r.Flags = datapath.FlagLend
		c.must(r)
		if (&r.Buf[0] != own) != isLent {
			t.Errorf("%d bytes at %d lent: %t", length, offset, !isLent)
		}
		if at := difference(r.Buf, want); at >= 0 || uint64(len(r.Buf)) != length {
			t.Errorf("%d bytes at %d differ at byte %d", length, offset, at)
		}
	}
	const length = 2 * lendMin
	data := pattern(1, 4*length)
	c.must(write(0, data))
	lent(0, 4*length, data, true)
	lent(1000, length, data[1000:1000+length], true)
	lent(8*length, length, make([]byte, length), false) // a hole stays one
	c.must(write(size-length, data[:length]))
	lent(size-length, length, data[:length], false) // the ragged end
	c.must(zeroes(length, length, 0))
	lent(length, length, make([]byte, length), false)
	c.must(zeroes(length, length, datapath.FlagNoUnmap)) // which writes them
	lent(length, length, make([]byte, length), true)
	c.must(write(length+500, data[:10]))
	want := make([]byte, length)
	copy(want[500:], data[:10])
	lent(length, length, want, true)
	if n := allocated(t, d.path); n > 6*length {
		t.Errorf("%d bytes are allocated", n)
	}
	if err := os.Truncate(d.path, 8192); err != nil {
		t.Fatal(err)
	}
	r := read(length, length)
	r.Flags = datapath.FlagLend
	c.want(datapath.StatusIO, r)
}
