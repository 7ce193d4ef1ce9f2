package ublk_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/ublk"
)

// modes runs a test with user copy and without.
func modes(t *testing.T, f func(t *testing.T, plain bool)) {
	t.Helper()
	testenv.RequireUblk(t)
	for _, plain := range []bool{false, true} {
		name := "user copy"
		if plain {
			name = "plain buffers"
		}
		t.Run(name, func(t *testing.T) { f(t, plain) })
	}
}

func TestDeviceShowsWhatTheStoreSays(t *testing.T) {
	testenv.RequireUblk(t)
	if err := ublk.Supported(); err != nil {
		t.Fatal(err)
	}
	features, err := ublk.DriverFeatures()
	if err != nil {
		t.Fatal(err)
	}
	limit, err := ublk.DevicesMax()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("features %v, ublks_max %d", features.Names(), limit)
	d := memory(t, 64<<20)
	tag := ublk.TagOf("shown")
	target := start(t, ublk.Config{Device: d, ID: ublk.AnyID, Tag: tag})
	for name, want := range map[string]string{
		"size": strconv.Itoa(64 << 20 / 512), "ro": "0",
		"queue/logical_block_size": "512", "queue/physical_block_size": "4096", "queue/minimum_io_size": "4096",
		"queue/write_cache": "write back", "queue/fua": "1", "queue/discard_granularity": "4096", "queue/rotational": "0",
	} {
		if got := sysfs(t, target, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	list, err := ublk.List(within(t))
	if err != nil || len(list) != 1 {
		t.Fatalf("list: %+v, %v", list, err)
	}
	i := list[0]
	if i.Path() != target.Path() || i.State != ublk.StateLive || !i.Ours || i.Tag != tag || i.PID != os.Getpid() || i.Size != 64<<20 || i.Depth != 32 {
		t.Errorf("listed as %+v", i)
	}
}

func TestRandomIOAgreesWithWhatWasWritten(t *testing.T) {
	modes(t, func(t *testing.T, plain bool) {
		d := memory(t, 64<<20)
		target := start(t, ublk.Config{Device: d, ID: ublk.AnyID, PlainBuffers: plain})
		if got := target.Features().Has(ublk.FeatureUserCopy); got == plain {
			t.Errorf("user copy: %t", got)
		}
		verified(t, target.Path(), 8, 60, 1)
		s := target.Stats()
		if s.Errors != 0 || s.InFlight != 0 || s.Requests[datapath.OpWrite] == 0 {
			t.Errorf("statistics %+v", s)
		}
	})
}

func TestFourQueuesOnTwoReactors(t *testing.T) {
	modes(t, func(t *testing.T, plain bool) {
		d := memory(t, 64<<20)
		target := start(t, ublk.Config{Device: d, ID: ublk.AnyID, Queues: 4, Reactors: reactors(t, 2), PlainBuffers: plain})
		if want := min(4, runtime.NumCPU()); target.Queues() != want {
			t.Errorf("%d queues, want %d", target.Queues(), want)
		}
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				runtime.LockOSThread() // a queue is chosen by the CPU
				defer runtime.UnlockOSThread()
				var set unix.CPUSet
				set.Set(i % runtime.NumCPU())
				_ = unix.SchedSetaffinity(0, &set) // else queues are used as they come
				v := newVerifier(t, openDisk(t, target.Path()), uint64(i)*4<<20, 1024, 2)
				for range 40 {
					if err := v.step(); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		group.Wait()
	})
}

func TestFileSystemKeepsItsFiles(t *testing.T) {
	modes(t, func(t *testing.T, plain bool) {
		d := memory(t, 64<<20)
		target := start(t, ublk.Config{Device: d, ID: ublk.AnyID, PlainBuffers: plain})
		command(t, "mkfs.ext4", "-q", "-F", target.Path())
		dir := t.TempDir()
		command(t, "mount", target.Path(), dir)
		data := make([]byte, 3<<20)
		stamp(data, 0, 7)
		if err := os.WriteFile(filepath.Join(dir, "file"), data, 0o600); err != nil {
			t.Error(err)
		}
		if err := target.Stop(within(t)); !errors.Is(err, ublk.ErrInUse) || !strings.Contains(err.Error(), dir) {
			t.Errorf("stopped under a mount: %v", err)
		}
		command(t, "umount", dir)
		command(t, "fsck.ext4", "-f", "-n", target.Path())
		command(t, "mount", target.Path(), dir)
		got, err := os.ReadFile(filepath.Join(dir, "file"))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("the file came back with %d bytes, %v", len(got), err)
		}
		if err := os.Remove(filepath.Join(dir, "file")); err != nil {
			t.Error(err)
		}
		before := d.Store().Allocated()
		command(t, "sync", "-f", dir)
		command(t, "fstrim", dir)
		if after := d.Store().Allocated(); after > before-2<<20 {
			t.Errorf("fstrim: %d bytes allocated before, %d after", before, after)
		}
		command(t, "umount", dir)
	})
}

func TestDiscardWriteZeroesAndFlushReachTheStore(t *testing.T) {
	testenv.RequireUblk(t)
	d := memory(t, 32<<20)
	target := start(t, ublk.Config{Device: d, ID: ublk.AnyID})
	disk := openDisk(t, target.Path())
	b := aligned(t, 1<<20)
	stamp(b, 0, 9)
	for i := range int64(4) {
		if _, err := disk.file.WriteAt(b, i<<20); err != nil {
			t.Fatal(err)
		}
	}
	ioctl := func(request uint, offset, length uint64) {
		t.Helper()
		r := [2]uint64{offset, length}
		if err := blockIoctl(int(disk.file.Fd()), request, &r); err != nil {
			t.Fatal(err)
		}
	}
	zero := make([]byte, 1<<20)
	ioctl(unix.BLKDISCARD, 1<<20, 1<<20)
	ioctl(blkZeroOut, 2<<20, 1<<20)
	for i, want := range [][]byte{b, zero, zero, b} {
		got := aligned(t, 1<<20)
		if _, err := disk.file.ReadAt(got, int64(i)<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("MiB %d is not as expected (%v)", i, err)
		}
	}
	if err := disk.file.Sync(); err != nil {
		t.Error(err)
	}
	s := target.Stats()
	for _, op := range []datapath.Op{datapath.OpDiscard, datapath.OpWriteZeroes, datapath.OpFlush} {
		if s.Requests[op] == 0 {
			t.Errorf("no %s reached the store", op)
		}
	}
}

func TestErrorsOfTheStoreReachTheProgram(t *testing.T) {
	testenv.RequireUblk(t)
	fault, err := filter.NewFault(memory(t, 32<<20), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	target := start(t, ublk.Config{Device: fault, ID: ublk.AnyID})
	disk := openDisk(t, target.Path())
	b := aligned(t, 4096)
	for _, test := range []struct {
		status datapath.Status
		want   error
	}{
		{datapath.StatusIO, unix.EIO}, {datapath.StatusNoSpace, unix.ENOSPC}, {datapath.StatusCorrupt, unix.EIO},
		{datapath.StatusNotSupported, unix.EOPNOTSUPP},
	} {
		if err := fault.SetRules([]filter.FaultRule{{Offset: 16 << 20, Length: 4096, Status: test.status}}); err != nil {
			t.Fatal(err)
		}
		if _, err := disk.file.WriteAt(b, 16<<20); !errors.Is(err, test.want) {
			t.Errorf("write that ends with %q: %v, want %v", test.status, err, test.want)
		}
		if _, err := disk.file.ReadAt(b, 16<<20); !errors.Is(err, test.want) {
			t.Errorf("read that ends with %q: %v, want %v", test.status, err, test.want)
		}
		if _, err := disk.file.WriteAt(b, 8<<20); err != nil {
			t.Errorf("beside it: %v", err)
		}
	}
	if err := fault.SetRules(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.file.ReadAt(b, 16<<20); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	_ = disk.file.Close() // nothing is dirty past the page cache
}

func TestReadOnlyDeviceRefusesWrites(t *testing.T) {
	testenv.RequireUblk(t)
	target := start(t, ublk.Config{Device: memory(t, 32<<20), ID: ublk.AnyID, ReadOnly: true})
	if got := sysfs(t, target, "ro"); got != "1" {
		t.Errorf("ro is %q", got)
	}
	f, err := os.OpenFile(target.Path(), os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(make([]byte, 4096), 0)
		_ = f.Close() // nothing was written
	}
	if err == nil {
		t.Error("a write succeeded")
	}
}

func TestTwoDevicesComeAndGoOnOneReactor(t *testing.T) {
	testenv.RequireUblk(t)
	rs := reactors(t, 1)
	first := start(t, ublk.Config{Device: memory(t, 32<<20), ID: 5, Reactors: rs})
	if first.Path() != "/dev/ublkb5" {
		t.Errorf("path %s", first.Path())
	}
	if _, err := ublk.Start(within(t), ublk.Config{Device: memory(t, 32<<20), ID: 5, Reactors: rs}); !errors.Is(err, ublk.ErrExists) {
		t.Errorf("id taken: %v", err)
	}
	v := newVerifier(t, openDisk(t, first.Path()), 0, 1024, 3)
	for range 3 { // a device that goes while another's commands wait
		second, err := ublk.Start(within(t), ublk.Config{Device: memory(t, 32<<20), ID: ublk.AnyID, Reactors: rs, Depth: 16})
		if err != nil {
			t.Fatal(err)
		}
		if second.Path() == first.Path() {
			t.Error("two devices of one id")
		}
		w := newVerifier(t, openDisk(t, second.Path()), 0, 1024, 4)
		for range 10 {
			if err := errors.Join(v.step(), w.step()); err != nil {
				t.Fatal(err)
			}
		}
		_ = w.disk.file.Close() // nothing is dirty past the page cache
		began := time.Now()
		if err := second.Stop(within(t)); err != nil {
			t.Fatal(err)
		}
		t.Logf("removed in %v", time.Since(began))
		if _, err := os.Stat(second.Path()); err == nil {
			t.Errorf("%s is left behind", second.Path())
		}
	}
	if err := v.all(); err != nil {
		t.Error(err)
	}
}

func TestStopDoesNotWaitForProgramsThatHaveItOpen(t *testing.T) {
	testenv.RequireUblk(t)
	target := start(t, ublk.Config{Device: memory(t, 32<<20), ID: ublk.AnyID})
	v := newVerifier(t, openDisk(t, target.Path()), 0, 1024, 10)
	if err := v.step(); err != nil {
		t.Fatal(err)
	}
	if err := target.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := v.all(); err == nil {
		t.Error("a removed device answers")
	}
	if list, err := ublk.List(within(t)); err != nil || len(list) != 0 {
		t.Errorf("listed after removal: %+v, %v", list, err)
	}
	_ = v.disk.file.Close() // nothing is dirty past the page cache
}

func TestBuffersOfOneReactorAreSharedFairly(t *testing.T) {
	testenv.RequireUblk(t)
	r, err := reactor.Start(reactor.Config{Name: "small", Engine: reactor.EngineRing, BufferBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	target := start(t, ublk.Config{Device: memory(t, 64<<20), ID: ublk.AnyID, Reactors: []*reactor.Reactor{r}})
	var taken []byte // the whole arena but one page
	if err := r.Run(func(r *reactor.Reactor) { taken = r.Buffers().Alloc(4 << 20) }); err != nil || taken == nil {
		t.Fatal("arena", err)
	}
	t.Cleanup(func() { _ = r.Run(func(r *reactor.Reactor) { r.FreeBuffer(taken) }) }) // it runs
	verified(t, target.Path(), 8, 15, 5)
}

func TestResizeReachesTheKernelOrSaysWhyNot(t *testing.T) {
	testenv.RequireUblk(t)
	d := memory(t, 32<<20)
	target := start(t, ublk.Config{Device: d, ID: ublk.AnyID})
	if err := d.Resize(48 << 20); err != nil {
		t.Fatal(err)
	}
	err := target.Resize(within(t))
	if !target.Features().Has(ublk.FeatureUpdateSize) {
		if !errors.Is(err, ublk.ErrNoResize) {
			t.Errorf("resize: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := sysfs(t, target, "size"); got != strconv.Itoa(48<<20/512) {
		t.Errorf("size %s", got)
	}
	v := newVerifier(t, openDisk(t, target.Path()), 40<<20, 1024, 6)
	if err := v.step(); err != nil {
		t.Error(err)
	}
}

func TestEpollReactorIsRefused(t *testing.T) {
	r, err := reactor.Start(reactor.Config{Engine: reactor.EngineEpoll})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	_, err = ublk.Start(within(t), ublk.Config{Device: memory(t, 32<<20), ID: ublk.AnyID, Reactors: []*reactor.Reactor{r}})
	if !errors.Is(err, ublk.ErrUnsupported) {
		t.Errorf("start: %v", err)
	}
}

// kills is how often the server is killed: 5 times, or 50 in the long run.
func kills() int {
	if os.Getenv("ASHLAR_TEST_LONG") != "" {
		return 50
	}
	return 5
}

func TestKilledServerIsRecoveredWithoutAnError(t *testing.T) {
	modes(t, func(t *testing.T, plain bool) {
		path := testenv.TempFileOn(t, "/dev/shm", 64<<20)
		mode := "copy"
		if plain {
			mode = "plain"
		}
		s := startServer(t, fmt.Sprintf("start %s 2 killed %s", path, mode))
		id := s.id
		work := startLoad(t, id, 8)
		var longest time.Duration
		for n := range kills() {
			work.goOn()
			began := time.Now()
			s.Kill()
			if n == 0 { // nobody serves it, and it can be seen
				waitState(t, id, ublk.StateQuiesced)
			}
			s = startServer(t, fmt.Sprintf("recover %d %s killed", id, path))
			longest = max(longest, time.Since(began))
		}
		work.goOn()
		work.end()
		t.Logf("%d kills, %d steps, longest without a server %v", kills(), work.steps.Load(), longest)
		s.End(t, "stop")
	})
}

func waitState(t *testing.T, id int, want ublk.State) {
	t.Helper()
	for deadline := time.Now().Add(wait); ; time.Sleep(10 * time.Millisecond) {
		i, err := ublk.Find(within(t), id)
		if err != nil {
			t.Fatal(err)
		}
		if i.State == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("state %s, want %s", i.State, want)
		}
	}
}

func TestDetachedDeviceGoesOnInAnotherProcess(t *testing.T) {
	testenv.RequireUblk(t)
	path := testenv.TempFileOn(t, "/dev/shm", 64<<20)
	s := startServer(t, "start "+path+" 2 moved copy")
	id := s.id
	node := fmt.Sprintf("/dev/ublkb%d", id)
	command(t, "mkfs.ext4", "-q", "-F", node)
	dir := t.TempDir()
	command(t, "mount", node, dir)
	data := make([]byte, 1<<20)
	stamp(data, 0, 3)
	for n := range 3 {
		if err := os.WriteFile(filepath.Join(dir, "file"+strconv.Itoa(n)), data, 0o600); err != nil {
			t.Error(err)
		}
		began := time.Now()
		s.End(t, "detach")
		s = startServer(t, fmt.Sprintf("recover %d %s moved", id, path))
		t.Logf("handed over in %v", time.Since(began))
	}
	for n := range 3 {
		if got, err := os.ReadFile(filepath.Join(dir, "file"+strconv.Itoa(n))); err != nil || !bytes.Equal(got, data) {
			t.Errorf("file%d came back with %d bytes, %v", n, len(got), err)
		}
	}
	command(t, "umount", dir)
	command(t, "fsck.ext4", "-f", "-n", node)
	s.End(t, "stop")
}

func TestDetachedDeviceIsFreeOnceItsReactorsStop(t *testing.T) {
	modes(t, func(t *testing.T, plain bool) {
		d := memory(t, 64<<20)
		var rs []*reactor.Reactor
		for range 2 {
			r, err := reactor.Start(reactor.Config{Name: "first", Engine: reactor.EngineRing, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			rs = append(rs, r)
		}
		c := ublk.Config{Device: datapath.Checked(d), ID: ublk.AnyID, Reactors: rs, Depth: 32, PlainBuffers: plain}
		first, err := ublk.Start(within(t), c)
		if err != nil {
			t.Fatal(err)
		}
		v := newVerifier(t, openDisk(t, first.Path()), 0, 1024, 13)
		for range 20 {
			if err := v.step(); err != nil {
				t.Fatal(err)
			}
		}
		if err := first.Detach(within(t)); err != nil {
			t.Fatal(err)
		}
		if err := c.Device.Close(); err != nil { // every queue of it is closed
			t.Error(err)
		}
		step := make(chan error, 1)
		go func() { step <- v.step() }() // ends when the device is served again
		for _, r := range rs {
			r.Stop()
		}
		c = ublk.Config{Device: datapath.Checked(memoryOf(t, d)), ID: first.ID(), Reactors: reactors(t, 2)}
		second, err := ublk.Recover(within(t), c)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-step; err != nil {
			t.Error(err)
		}
		if err := v.all(); err != nil {
			t.Error(err)
		}
		_ = v.disk.file.Close() // nothing is dirty past the page cache
		if err := second.Stop(within(t)); err != nil {
			t.Error(err)
		}
	})
}

func TestRecoveryRefusesWhatIsNotItsOwn(t *testing.T) {
	testenv.RequireUblk(t)
	path := testenv.TempFileOn(t, "/dev/shm", 64<<20)
	s := startServer(t, "start "+path+" 1 mine copy")
	rs := reactors(t, 1)
	config := ublk.Config{Device: memory(t, 64<<20), ID: s.id, Reactors: rs, Tag: ublk.TagOf("mine")}
	if _, err := ublk.Recover(within(t), config); !errors.Is(err, ublk.ErrServed) {
		t.Errorf("recovery of a served device: %v", err)
	}
	if err := ublk.Remove(within(t), s.id); !errors.Is(err, ublk.ErrServed) {
		t.Errorf("removal of a served device: %v", err)
	}
	s.Kill()
	waitState(t, s.id, ublk.StateQuiesced)
	other := config
	other.Tag = ublk.TagOf("another")
	if _, err := ublk.Recover(within(t), other); err == nil || !strings.Contains(err.Error(), "tag") {
		t.Errorf("recovery of another volume's device: %v", err)
	}
	small := config
	small.Device = memory(t, 32<<20)
	if _, err := ublk.Recover(within(t), small); !errors.Is(err, ublk.ErrNoResize) {
		t.Errorf("recovery by a smaller store: %v", err)
	}
	large := config
	large.Device = memory(t, 96<<20)
	target, err := ublk.Recover(within(t), large)
	if err != nil {
		t.Fatalf("recovery by a store that has grown: %v", err)
	}
	want := 64 << 20
	if target.Features().Has(ublk.FeatureUpdateSize) {
		want = 96 << 20
	}
	if got := sysfs(t, target, "size"); got != strconv.Itoa(want/512) {
		t.Errorf("size %s", got)
	}
	if err := target.Stop(within(t)); err != nil {
		t.Error(err)
	}
	if _, err := ublk.Find(within(t), s.id); !errors.Is(err, ublk.ErrNotFound) {
		t.Errorf("after removal: %v", err)
	}
	if _, err := ublk.Recover(within(t), config); !errors.Is(err, ublk.ErrNotFound) {
		t.Errorf("recovery of no device: %v", err)
	}
}

func TestIdleDeviceTakesLittleMemoryAndNoTurns(t *testing.T) {
	testenv.RequireUblk(t)
	rs := reactors(t, 1)
	target := start(t, ublk.Config{Device: memory(t, 64<<20), ID: ublk.AnyID, Reactors: rs, Depth: 128})
	v := newVerifier(t, openDisk(t, target.Path()), 0, 1024, 9)
	for range 50 {
		if err := v.step(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(200 * time.Millisecond)
	before := rs[0].Stats()
	time.Sleep(time.Second)
	after := rs[0].Stats()
	if turns := after.Turns - before.Turns; turns > 20 {
		t.Errorf("%d turns in a second of idleness", turns)
	}
}

func TestRequestsAllocateNothing(t *testing.T) {
	modes(t, func(t *testing.T, plain bool) {
		target := start(t, ublk.Config{Device: memory(t, 64<<20), ID: ublk.AnyID, PlainBuffers: plain})
		disk := openDisk(t, target.Path())
		b := aligned(t, 4096)
		fd := int(disk.file.Fd())
		got := testing.AllocsPerRun(200, func() {
			if _, err := unix.Pwrite(fd, b, 8192); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Pread(fd, b, 8192); err != nil {
				t.Fatal(err)
			}
		})
		if got != 0 {
			t.Errorf("%v allocations per write and read", got)
		}
	})
}

func TestKilledServerUnderAFileSystem(t *testing.T) {
	testenv.RequireUblk(t)
	path := testenv.TempFileOn(t, "/dev/shm", 128<<20)
	s := startServer(t, "start "+path+" 2 mounted copy")
	id := s.id
	node := fmt.Sprintf("/dev/ublkb%d", id)
	command(t, "mkfs.ext4", "-q", "-F", node)
	dir := t.TempDir()
	command(t, "mount", "-o", "errors=remount-ro", node, dir)
	var stop atomic.Bool
	var files atomic.Int64
	var group sync.WaitGroup
	data := make([]byte, 256<<10)
	stamp(data, 0, 11)
	name := func(n int64) string { return filepath.Join(dir, "file"+strconv.FormatInt(n%40, 10)) }
	group.Go(func() {
		for !stop.Load() {
			if err := writeSynced(name(files.Load()), data); err != nil {
				t.Error(err)
				return
			}
			files.Add(1)
		}
	})
	for range kills() {
		for before := files.Load(); files.Load() < before+3 && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
		s.Kill()
		s = startServer(t, fmt.Sprintf("recover %d %s mounted", id, path))
	}
	stop.Store(true)
	group.Wait()
	for n := range min(files.Load(), 40) {
		if got, err := os.ReadFile(name(n)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("file %d came back with %d bytes, %v", n, len(got), err)
		}
	}
	mounts, _ := os.ReadFile("/proc/mounts") // an empty one fails the test
	if !strings.Contains(string(mounts), node+" "+dir+" ext4 rw,") {
		t.Errorf("not mounted for writing any more:\n%s", mounts)
	}
	command(t, "umount", dir)
	command(t, "fsck.ext4", "-f", "-n", node)
	t.Logf("%d kills, %d files", kills(), files.Load())
	s.End(t, "stop")
}

func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func TestRequestsWaitForAStoreThatShutsDown(t *testing.T) {
	testenv.RequireUblk(t)
	fault, err := filter.NewFault(memory(t, 32<<20), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	target := start(t, ublk.Config{Device: fault, ID: ublk.AnyID})
	disk := openDisk(t, target.Path())
	if err := fault.SetRules([]filter.FaultRule{{Offset: 16 << 20, Length: 4096, Status: datapath.StatusShutdown}}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	b := aligned(t, 4096)
	go func() { // ends with its request
		_, err := disk.file.WriteAt(b, 16<<20)
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Errorf("the request ended: %v", err)
	case <-time.After(time.Second):
	}
	if err := target.StopInUse(within(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("after removal: %v", err)
		}
	case <-time.After(wait):
		t.Error("the request outlives the device")
	}
	_ = disk.file.Close() // nothing is dirty past the page cache
}

func TestUnprivilegedServer(t *testing.T) {
	testenv.RequireUblk(t)
	const nobody = 65534
	path := testenv.TempFileOn(t, "/dev/shm", 32<<20)
	if err := errors.Join(os.Chown(path, nobody, nobody), os.Chmod("/dev/ublk-control", 0o666)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod("/dev/ublk-control", 0o600) }) // as it was; a guest's anyway
	var stop atomic.Bool
	var group sync.WaitGroup
	group.Go(func() { // what udev's rules would do
		for !stop.Load() {
			for _, pattern := range []string{"/dev/ublkc*", "/dev/ublkb*"} {
				nodes, _ := filepath.Glob(pattern) // the pattern is good
				for _, node := range nodes {
					_ = os.Chown(node, nobody, nobody) // it may go
				}
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	defer func() {
		stop.Store(true)
		group.Wait()
	}()
	s := startServerAs(t, "start "+path+" 1 nobody unprivileged", nobody)
	list, err := ublk.List(within(t))
	if err != nil || len(list) != 1 || list[0].UID != nobody || !list[0].Features.Has(ublk.FeatureUnprivileged) {
		t.Errorf("list: %+v, %v", list, err)
	}
	v := newVerifier(t, openDisk(t, fmt.Sprintf("/dev/ublkb%d", s.id)), 0, 1024, 12)
	for range 20 {
		if err := v.step(); err != nil {
			t.Error(err)
			break
		}
	}
	_ = v.disk.file.Close() // nothing is dirty past the page cache
	s.End(t, "stop")
}

func TestServerWithoutPermissionSaysWhatItNeeds(t *testing.T) {
	testenv.RequireUblk(t)
	path := testenv.TempFileOn(t, "/dev/shm", 32<<20)
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	s := newServer("start " + path + " 1 nobody copy")
	s.Command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := s.Command.Output()
	if err == nil || !strings.Contains(string(out), "needs root") {
		t.Errorf("it says %q, %v", out, err)
	}
}

// TestWithoutTheDriver runs where the driver is not loaded: make test-vm has a guest
// for it.
func TestWithoutTheDriver(t *testing.T) {
	if _, err := os.Stat("/dev/ublk-control"); err == nil {
		t.Skip("the driver is loaded (make test-vm also runs this without it)")
	}
	err := ublk.Supported()
	if !errors.Is(err, ublk.ErrUnsupported) || !strings.Contains(err.Error(), "needs Linux 6.0 and the ublk_drv module: modprobe ublk_drv") {
		t.Errorf("supported: %v", err)
	}
	if _, err := ublk.List(within(t)); !errors.Is(err, ublk.ErrUnsupported) {
		t.Errorf("list: %v", err)
	}
	testenv.RequireIOURing(t)
	if _, err := ublk.Start(within(t), ublk.Config{Device: memory(t, 32<<20), ID: ublk.AnyID, Reactors: reactors(t, 1)}); !errors.Is(err, ublk.ErrUnsupported) {
		t.Errorf("start: %v", err)
	}
}

func TestPlainNumbersOfCommandsForOldKernels(t *testing.T) {
	testenv.RequireUblk(t)
	ublk.PretendOld(true)
	t.Cleanup(func() { ublk.PretendOld(false) })
	c := ublk.Config{Device: memory(t, 32<<20), ID: ublk.AnyID, Reactors: reactors(t, 1)}
	if probe, err := ublk.Start(within(t), c); errors.Is(err, ublk.ErrUnsupported) {
		t.Skip("needs CONFIG_BLKDEV_UBLK_LEGACY_OPCODES, which Debian's kernels have")
	} else if err != nil {
		t.Fatal(err)
	} else if err := probe.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	target := start(t, c)
	if target.Features().Has(ublk.FeatureUserCopy) {
		t.Error("an old driver copies")
	}
	v := newVerifier(t, openDisk(t, target.Path()), 0, 1024, 14)
	for range 20 {
		if err := v.step(); err != nil {
			t.Fatal(err)
		}
	}
	_ = v.disk.file.Close() // nothing is dirty past the page cache
}

func TestFioVerifiesWhatItWrote(t *testing.T) {
	testenv.RequireUblk(t)
	fio := testenv.RequireCommand(t, "fio", "fio")
	target := start(t, ublk.Config{Device: memory(t, 64<<20), ID: ublk.AnyID, Queues: 2, Reactors: reactors(t, 2)})
	command(t, fio, "--name=verify", "--filename="+target.Path(), "--direct=1", "--ioengine=libaio", "--rw=randrw", "--bsrange=4k-128k",
		"--iodepth=16", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=15", "--output-format=terse")
}

// TestKilledRecoveries kills processes while they recover the device, too.
func TestKilledRecoveries(t *testing.T) {
	testenv.RequireUblk(t)
	path := testenv.TempFileOn(t, "/dev/shm", 64<<20)
	s := startServer(t, "start "+path+" 2 again copy")
	id := s.id
	var stop atomic.Bool
	var group sync.WaitGroup
	group.Go(func() {
		v := newVerifier(t, openDisk(t, fmt.Sprintf("/dev/ublkb%d", id)), 0, 1024, 16)
		for !stop.Load() {
			if err := v.step(); err != nil {
				t.Error(err)
				return
			}
		}
		_ = v.disk.file.Close() // nothing is dirty past the page cache
	})
	random := rand.New(rand.NewPCG(17, 17))
	s.Kill()
	for range 2 * kills() {
		half := newServer(fmt.Sprintf("recover %d %s again", id, path))
		_, err := half.Command.StdinPipe() // its end would be an order
		if err = errors.Join(err, half.Command.Start()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		half.Kill()
	}
	s = startServer(t, fmt.Sprintf("recover %d %s again", id, path))
	stop.Store(true)
	group.Wait()
	s.End(t, "stop")
}
