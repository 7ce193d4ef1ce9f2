package fuse_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// sysfs reads an attribute of a loop device.
func sysfs(t testing.TB, target *fuse.Target, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/%s", target.Loop(), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// aligned is memory for direct I/O.
func aligned(t testing.TB, length int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

func TestDeviceShowsWhatTheStoreSays(t *testing.T) {
	require(t)
	name := testName(t) + " volume@snap " + strings.Repeat("é", 40)
	dir := t.TempDir()
	for _, tt := range []struct {
		config fuse.Config
		size   uint64 // bytes of the store
		blocks string
	}{
		{fuse.Config{}, 32<<20 + 512, "4096"},
		{fuse.Config{BlockSize: 512, ReadOnly: true}, 32<<20 + 512, "512"},
	} {
		tt.config.Device = memory(t, memdev.Config{Size: tt.size})
		tt.config.Name, tt.config.Dir, tt.config.Loop = name, dir, fuse.AnyLoop
		target := start(t, tt.config)
		block, _ := strconv.Atoi(tt.blocks)
		size := tt.size &^ uint64(block-1)
		readOnly := "0"
		if tt.config.ReadOnly {
			readOnly = "1"
		}
		for attribute, want := range map[string]string{
			"size": strconv.FormatUint(size/512, 10), "queue/logical_block_size": tt.blocks, "ro": readOnly,
			"loop/dio": "1", "loop/backing_file": target.File(),
		} {
			if got := sysfs(t, target, attribute); got != want {
				t.Errorf("%s is %s, want %s", attribute, got, want)
			}
		}
		if !tt.config.ReadOnly {
			if got := sysfs(t, target, "queue/write_cache"); got != "write back" {
				t.Errorf("write cache: %s", got)
			}
			if got := sysfs(t, target, "queue/discard_max_bytes"); got == "0" {
				t.Error("no discards")
			}
		}
		info, err := fuse.Find(within(t), name, nil)
		if err != nil || info.Name != name || info.Loop != target.Loop() || info.Path() != target.Path() || info.File != target.File() ||
			info.Size != size || info.BlockSize != uint32(block) || info.ReadOnly != tt.config.ReadOnly || info.Connection != target.Connection() || info.State != fuse.StateUnknown {
			t.Errorf("found %+v, %v", info, err)
		}
		if target.Queues() != 1 || target.Depth() != 128 || target.Kept() {
			t.Errorf("%d queues, depth %d", target.Queues(), target.Depth())
		}
		stop(t, target)
		stop(t, target) // once is enough
		if _, err := fuse.Find(within(t), name, nil); !errors.Is(err, fuse.ErrNotFound) {
			t.Errorf("afterwards: %v", err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	}
}

// TestKernelsDeviceKeepsTheRulesOfADevice runs the suite of devices on the kernel's
// block device, and so through the kernel and back.
func TestKernelsDeviceKeepsTheRulesOfADevice(t *testing.T) {
	for _, engine := range []reactor.EngineKind{reactor.EngineRing, reactor.EngineEpoll} {
		t.Run(string(engine), func(t *testing.T) {
			require(t)
			target := start(t, fuse.Config{
				Device: memory(t, memdev.Config{Size: 6 << 20}), Loop: fuse.AnyLoop, Reactors: reactors(t, 2, engine), Queues: 2,
			})
			open := func(readOnly bool) func(t *testing.T) datapath.Device {
				return func(t *testing.T) datapath.Device {
					d, err := filedev.Open(target.Path(), filedev.Options{ReadOnly: readOnly})
					if err != nil {
						t.Fatal(err)
					}
					return d
				}
			}
			devtest.Run(t, open(false), devtest.Options{Engines: []reactor.EngineKind{engine}, ReadOnly: open(true)})
		})
	}
}

// load writes, reads and zeroes at random on a part of a device that is its own, many
// requests at a time, and compares with what it knows.
func load(t testing.TB, path string, offset, length int64, ioMax int, seed uint64, steps int) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // past the page cache
	model := make([]byte, length)
	b := aligned(t, ioMax)
	r := rand.New(rand.NewPCG(seed, 7))
	if _, err := f.ReadAt(b[:min(int64(ioMax), length)], offset); err != nil {
		return err
	}
	for at := int64(0); at < length; at += int64(ioMax) {
		n := min(int64(ioMax), length-at)
		clear(b[:n])
		if _, err := f.WriteAt(b[:n], offset+at); err != nil {
			return err
		}
	}
	for step := range steps {
		n := (1 + r.Int64N(int64(ioMax)/4096)) * 4096
		if step%2 == 0 {
			n = 4096
		}
		at := r.Int64N((length-n)/4096+1) * 4096
		switch r.IntN(8) {
		case 0:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset+at, n)
			clear(model[at : at+n])
		case 1:
			err = f.Sync()
		case 2, 3, 4:
			for i := 0; i < int(n); i += 8 {
				b[i], b[i+1], b[i+7] = byte(step), byte(i>>12), byte(r.Uint32())
			}
			_, err = f.WriteAt(b[:n], offset+at)
			copy(model[at:], b[:n])
		default:
			if _, err = f.ReadAt(b[:n], offset+at); err == nil && !bytes.Equal(b[:n], model[at:at+n]) {
				err = fmt.Errorf("step %d: %d bytes at %d are not what was written", step, n, offset+at)
			}
		}
		if err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
	}
	for at := int64(0); at < length; at += int64(ioMax) {
		n := min(int64(ioMax), length-at)
		if _, err := f.ReadAt(b[:n], offset+at); err != nil {
			return err
		}
		if !bytes.Equal(b[:n], model[at:at+n]) {
			return fmt.Errorf("at the end: %d bytes at %d are not what was written", n, offset+at)
		}
	}
	return nil
}

// loads runs loads side by side.
func loads(t testing.TB, path string, count int, length int64, ioMax, steps int) {
	t.Helper()
	s := seed(t)
	var group sync.WaitGroup
	for i := range count {
		group.Go(func() {
			if err := load(t, path, int64(i)*length, length, ioMax, s+uint64(i), steps); err != nil {
				t.Errorf("part %d: %v", i, err)
			}
		})
	}
	group.Wait()
}

func TestRandomIOAgreesWithWhatWasWritten(t *testing.T) {
	for name, tt := range map[string]struct {
		engine reactor.EngineKind
		queues int
		config fuse.Config
	}{
		"one queue":     {reactor.EngineRing, 1, fuse.Config{}},
		"two queues":    {reactor.EngineRing, 2, fuse.Config{IOMax: 64 << 10}},
		"epoll":         {reactor.EngineEpoll, 2, fuse.Config{IOMax: 1 << 20}},
		"two at a time": {reactor.EngineRing, 1, fuse.Config{Depth: 2, IOMax: 4096}},
		"blocks of 512": {reactor.EngineRing, 1, fuse.Config{BlockSize: 512}},
	} {
		t.Run(name, func(t *testing.T) {
			require(t)
			tt.config.Device = filter.NewDelay(memory(t, memdev.Config{Size: 64 << 20}), filter.DelayConfig{})
			tt.config.Loop, tt.config.Queues, tt.config.Reactors = fuse.AnyLoop, tt.queues, reactors(t, tt.queues, tt.engine)
			target := start(t, tt.config)
			loads(t, target.Path(), 8, 8<<20, 1<<20, 150)
			if s := target.Stats(); s.Errors != 0 || s.InFlight != 0 || s.Read == 0 || s.Written == 0 || s.Gone {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestFioVerifiesWhatItWrote(t *testing.T) {
	require(t)
	fio := testenv.RequireCommand(t, "fio", "fio")
	target := start(t, fuse.Config{Device: memory(t, memdev.Config{Size: 64 << 20}), Loop: fuse.AnyLoop, Queues: 2})
	run(t, fio, "--name=verify", "--filename="+target.Path(), "--direct=1", "--ioengine=libaio", "--rw=randrw", "--bsrange=4k-512k",
		"--iodepth=32", "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=15", "--output-format=terse")
}

func TestDiscardWriteZeroesAndFlushReachTheStore(t *testing.T) {
	require(t)
	target := start(t, fuse.Config{Device: memory(t, memdev.Config{Size: 32 << 20}), Loop: fuse.AnyLoop})
	f := openDevice(t, target.Path())
	b := aligned(t, 4096)
	fill := func() {
		for i := range b {
			b[i] = 0xa5
		}
		for at := range int64(4) {
			if _, err := f.WriteAt(b, 1<<20+at*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, zero := range map[string]func(offset, length uint64) error{
		"discard": func(offset, length uint64) error { return blockIoctl(f, unix.BLKDISCARD, offset, length) },
		"zeroes":  func(offset, length uint64) error { return blockIoctl(f, unix.BLKZEROOUT, offset, length) },
		"keeping": func(offset, length uint64) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(offset), int64(length))
		},
	} {
		fill()
		before := target.Stats().Requests[datapath.OpWriteZeroes]
		if err := zero(1<<20, 3*4096); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if after := target.Stats().Requests[datapath.OpWriteZeroes]; after == before {
			t.Errorf("%s did not reach the store", name)
		}
		for at := range int64(4) {
			if _, err := f.ReadAt(b, 1<<20+at*4096); err != nil {
				t.Fatal(err)
			}
			want := byte(0)
			if at == 3 {
				want = 0xa5
			}
			if b[0] != want || b[4095] != want {
				t.Errorf("%s: block %d has %#x", name, at, b[0])
			}
		}
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if target.Stats().Requests[datapath.OpFlush] == 0 {
		t.Error("no flush reached the store")
	}
	if err := zeroWhole(f, 32<<20); err != nil { // in one piece
		t.Error(err)
	}
}

func zeroWhole(f *os.File, size uint64) error { return blockIoctl(f, unix.BLKDISCARD, 0, size) }

// without is a device that lacks features.
type without struct {
	datapath.Device
	features datapath.Features
}

func (d *without) Info() datapath.Info {
	i := d.Device.Info()
	i.Features &^= d.features
	return i
}

func TestStoreWithoutWriteZeroesAndFlush(t *testing.T) {
	require(t)
	d := &without{memory(t, memdev.Config{Size: 32 << 20}), datapath.FeatureWriteZeroes | datapath.FeatureFastZero | datapath.FeatureFlush | datapath.FeatureFUA}
	target := start(t, fuse.Config{Device: d, Loop: fuse.AnyLoop})
	f := openDevice(t, target.Path())
	b := aligned(t, 4096)
	b[0] = 1
	if _, err := f.WriteAt(b, 4096); err != nil {
		t.Fatal(err)
	}
	if err := blockIoctl(f, unix.BLKDISCARD, 4096, 4096); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("discard, which need not do anything: %v", err)
	}
	if err := blockIoctl(f, unix.BLKZEROOUT, 4096, 4096); err != nil { // the kernel writes zeros
		t.Error(err)
	}
	if _, err := f.ReadAt(b, 4096); err != nil || b[0] != 0 {
		t.Errorf("%v, %d", err, b[0])
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if n := target.Stats().Requests[datapath.OpFlush]; n != 0 {
		t.Errorf("%d flushes", n)
	}
}

func TestErrorsOfTheStoreReachTheProgram(t *testing.T) {
	require(t)
	fault, err := filter.NewFault(memory(t, memdev.Config{Size: 32 << 20}), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	target := start(t, fuse.Config{Device: fault, Loop: fuse.AnyLoop})
	f := openDevice(t, target.Path())
	b := aligned(t, 4096)
	for _, tt := range []struct {
		status datapath.Status
		want   error
	}{
		{datapath.StatusIO, unix.EIO}, {datapath.StatusNoSpace, unix.ENOSPC}, {datapath.StatusCorrupt, unix.EIO},
		{datapath.StatusShutdown, unix.EIO}, // nobody could recover it
	} {
		if err := fault.SetRules([]filter.FaultRule{{Offset: 16 << 20, Length: 4096, Status: tt.status}}); err != nil {
			t.Fatal(err)
		}
		// The loop driver makes EIO of most errors (lo_rw_aio_complete).
		if _, err := f.WriteAt(b, 16<<20); !errors.Is(err, tt.want) && !errors.Is(err, unix.EIO) {
			t.Errorf("write that ends with %q: %v, want %v", tt.status, err, tt.want)
		}
		if _, err := f.ReadAt(b, 16<<20); !errors.Is(err, tt.want) && !errors.Is(err, unix.EIO) {
			t.Errorf("read that ends with %q: %v, want %v", tt.status, err, tt.want)
		}
		if _, err := f.WriteAt(b, 8<<20); err != nil {
			t.Errorf("beside it: %v", err)
		}
	}
	if err := fault.SetRules(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(b, 16<<20); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if s := target.Stats(); s.Errors == 0 {
		t.Errorf("%+v", s)
	}
}

func TestReadOnlyDeviceRefusesWrites(t *testing.T) {
	require(t)
	for name, c := range map[string]fuse.Config{
		"asked": {Device: memory(t, memdev.Config{Size: 32 << 20}), ReadOnly: true},
		"store": {Device: memory(t, memdev.Config{Size: 32 << 20, ReadOnly: true})},
	} {
		c.Loop, c.Name = fuse.AnyLoop, testName(t)+name
		target := start(t, c)
		f, err := os.OpenFile(target.Path(), os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(make([]byte, 4096), 0)
			_ = f.Close() // nothing was written
		}
		if err == nil {
			t.Errorf("%s: a write succeeded", name)
		}
	}
}

// wantNoPoll checks that the kernel does not ask the server about polling: were it to, the
// runtime of Go, which polls what a program opens, could stop this process for good.
func wantNoPoll(t *testing.T, target *fuse.Target) {
	t.Helper()
	fd, err := unix.Open(target.File(), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }() // nothing is written
	asked := target.Stats().Control
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); n != 1 || err != nil {
		t.Errorf("poll: %d, %v", n, err)
	}
	if now := target.Stats().Control; now != asked {
		t.Errorf("%d questions of the kernel for one poll", now-asked)
	}
}

func TestFileItselfAnswersAsAFileDoes(t *testing.T) {
	require(t)
	store := memory(t, memdev.Config{Size: 1<<20 + 4096})
	target := start(t, fuse.Config{Device: store, Loop: fuse.AnyLoop})
	wantNoPoll(t, target)
	f, err := os.OpenFile(target.File(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // a test may have
	if info, err := f.Stat(); err != nil || info.Size() != 1<<20+4096 || info.Mode().Perm() != 0o600 || !info.Mode().IsRegular() {
		t.Errorf("%v, %v", info, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(target.File(), &fs); err != nil || fs.Bsize != 4096 || fs.Blocks != 257 {
		t.Errorf("%+v, %v", fs, err)
	}
	if _, err := f.WriteAt([]byte("a few bytes"), 4093); err != nil {
		t.Error(err)
	}
	b := make([]byte, 4<<20)
	if n, err := f.ReadAt(b, 4090); n != 1<<20+6 || !errors.Is(err, io.EOF) || string(b[3:14]) != "a few bytes" {
		t.Errorf("read %d, %v, %q", n, err, b[3:14])
	}
	if _, err := f.WriteAt(make([]byte, 8192), 1<<20); err == nil {
		t.Error("a write past the end succeeded")
	}
	for name, err := range map[string]error{
		"truncate": f.Truncate(0), "grow": f.Truncate(1 << 30), "chmod": f.Chmod(0o644),
		"allocate": unix.Fallocate(int(f.Fd()), 0, 0, 4096), "in it": os.WriteFile(target.File()+"/x", nil, 0o600),
		"attribute": unix.Setxattr(target.File(), "user.x", []byte("y"), 0),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if s := target.Stats(); s.Control == 0 {
		t.Errorf("%+v", s)
	}
}

func TestManyDevicesShareTheReactorsAndTheirMemory(t *testing.T) {
	require(t)
	var rs []*reactor.Reactor
	for i := range 2 {
		r, err := reactor.Start(reactor.Config{Name: "small" + strconv.Itoa(i), BufferBytes: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Stop)
		rs = append(rs, r)
	}
	var targets []*fuse.Target
	dir := t.TempDir()
	for i := range 4 {
		targets = append(targets, start(t, fuse.Config{
			Device: memory(t, memdev.Config{Size: 16 << 20}), Loop: fuse.AnyLoop, Reactors: rs, Dir: dir, Name: testName(t) + strconv.Itoa(i), IOMax: 1 << 20,
		}))
	}
	if list, err := fuse.List(within(t), nil); err != nil || len(list) < 4 {
		t.Errorf("%+v, %v", list, err)
	}
	var taken [][]byte // all that the queues do not hold
	for _, r := range rs {
		if err := r.Run(func(r *reactor.Reactor) {
			for size := 1 << 20; size >= 4096; size /= 2 {
				for b := r.Buffers().Alloc(size); b != nil; b = r.Buffers().Alloc(size) {
					taken = append(taken, b)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		mine := taken
		taken = nil
		t.Cleanup(func() {
			_ = r.Run(func(r *reactor.Reactor) { // it runs
				for _, b := range mine {
					r.FreeBuffer(b)
				}
			})
		})
	}
	var group sync.WaitGroup
	for _, target := range targets {
		group.Go(func() { loads(t, target.Path(), 4, 2<<20, 1<<20, 40) })
	}
	group.Wait()
	for i := len(targets) - 1; i >= 0; i-- {
		stop(t, targets[i])
	}
}

func TestReactorWithoutMemoryIsRefused(t *testing.T) {
	require(t)
	r, err := reactor.Start(reactor.Config{Name: "full", BufferBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	for _, left := range []int{0, 2 << 20, 1 << 20} { // with 1 MiB free there is no segment, and so on
		var taken []byte
		if err := r.Run(func(r *reactor.Reactor) { taken = r.Buffers().Alloc(4<<20 - left) }); err != nil {
			t.Fatal(err)
		}
		if left == 1<<20 { // a buddy: 3 MiB are 4
			_ = r.Run(func(r *reactor.Reactor) { r.FreeBuffer(taken); taken = r.Buffers().Alloc(2 << 20) })
			var more []byte
			_ = r.Run(func(r *reactor.Reactor) { more = r.Buffers().Alloc(1 << 20) })
			t.Cleanup(func() { _ = r.Run(func(r *reactor.Reactor) { r.FreeBuffer(more) }) })
		}
		_, err := fuse.Start(within(t), complete(t, fuse.Config{Device: memory(t, memdev.Config{Size: 1 << 20}), Loop: fuse.AnyLoop, Reactors: []*reactor.Reactor{r}}))
		if err == nil || !strings.Contains(err.Error(), "arena") {
			t.Errorf("%d bytes left: %v", left, err)
		}
		_ = r.Run(func(r *reactor.Reactor) { r.FreeBuffer(taken) })
	}
}

// failing is a device that has no queues to give.
type failing struct{ datapath.Device }

func (*failing) OpenQueue(*reactor.Reactor, int) (datapath.Queue, error) {
	return nil, errors.New("no queue")
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	require(t)
	testenv.CheckFDs(t)
	d := memory(t, memdev.Config{Size: 1 << 20})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken := start(t, fuse.Config{Device: memory(t, memdev.Config{Size: 1 << 20}), Loop: fuse.AnyLoop, Name: testName(t) + "other"})
	stopped := reactors(t, 1, reactor.EngineAuto)
	stopped[0].Stop()
	for name, tt := range map[string]struct {
		config fuse.Config
		want   error
	}{
		"no configuration": {fuse.Config{}, nil},
		"no queue":         {fuse.Config{Device: &failing{d}, Loop: fuse.AnyLoop}, nil},
		"a file for a dir": {fuse.Config{Device: d, Loop: fuse.AnyLoop, Dir: file}, nil},
		"a taken device":   {fuse.Config{Device: d, Loop: taken.Loop()}, fuse.ErrInUse},
		"a dead reactor":   {fuse.Config{Device: d, Loop: fuse.AnyLoop, Reactors: stopped}, reactor.ErrStopped},
	} {
		c := complete(t, tt.config)
		if target, err := fuse.Start(within(t), c); err == nil || (tt.want != nil && !errors.Is(err, tt.want)) {
			t.Errorf("%s: %v, %v", name, target, err)
		}
		if _, err := fuse.Find(within(t), c.Name, nil); !errors.Is(err, fuse.ErrNotFound) {
			t.Errorf("%s: afterwards %v", name, err)
		}
	}
}

func TestLoopDeviceOfChoice(t *testing.T) {
	require(t)
	target := start(t, fuse.Config{Device: memory(t, memdev.Config{Size: 1 << 20}), Loop: 777})
	if target.Path() != "/dev/loop777" {
		t.Error(target.Path())
	}
}

func TestResizeReachesTheFileSystem(t *testing.T) {
	require(t)
	testenv.RequireCommand(t, "mkfs.xfs", "xfsprogs")
	d := memory(t, memdev.Config{Size: 320 << 20, SizeMax: 640 << 20})
	target := start(t, fuse.Config{Device: d, Loop: fuse.AnyLoop})
	run(t, "mkfs.xfs", "-q", target.Path())
	where := t.TempDir()
	run(t, "mount", target.Path(), where)
	t.Cleanup(func() { _, _ = tryRun("umount", where) }) // done below
	if err := d.Resize(640 << 20); err != nil {
		t.Fatal(err)
	}
	if err := target.Resize(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := sysfs(t, target, "size"); got != strconv.Itoa(640<<20/512) {
		t.Errorf("size %s", got)
	}
	run(t, "xfs_growfs", where)
	var fs unix.Statfs_t
	if err := unix.Statfs(where, &fs); err != nil || fs.Blocks*uint64(fs.Bsize) < 500<<20 {
		t.Errorf("%d blocks, %v", fs.Blocks, err)
	}
	if err := os.WriteFile(where+"/large", make([]byte, 400<<20), 0o600); err != nil {
		t.Error(err)
	}
	run(t, "umount", where)
	run(t, "xfs_repair", "-n", target.Path())
	stop(t, target)
	if err := target.Resize(within(t)); err != nil {
		t.Errorf("of a device that is gone: %v", err)
	}
}

func TestTrimmedFileSystemGivesSpaceBack(t *testing.T) {
	for _, tt := range []struct{ name, pack string }{{"ext4", "e2fsprogs"}, {"xfs", "xfsprogs"}} {
		t.Run(tt.name, func(t *testing.T) {
			require(t)
			testenv.RequireCommand(t, "mkfs."+tt.name, tt.pack)
			file := testenv.TempFileOn(t, t.TempDir(), 512<<20)
			d, err := filedev.Open(file, filedev.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = d.Close() }) // after the device
			target := start(t, fuse.Config{Device: d, Loop: fuse.AnyLoop})
			run(t, "mkfs."+tt.name, "-q", target.Path())
			where := t.TempDir()
			run(t, "mount", target.Path(), where)
			t.Cleanup(func() { _, _ = tryRun("umount", where) }) // done below
			if err := os.WriteFile(where+"/large", bytes.Repeat([]byte("ashlar"), 16<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "sync", "-f", where)
			full := allocated(t, file)
			if full < 80<<20 {
				t.Fatalf("%d bytes allocated with a file of 96 MiB", full)
			}
			if err := os.Remove(where + "/large"); err != nil {
				t.Fatal(err)
			}
			run(t, "sync", "-f", where)
			for deadline := time.Now().Add(wait); ; time.Sleep(50 * time.Millisecond) {
				run(t, "fstrim", where)
				rest := allocated(t, file)
				if rest <= full-80<<20 {
					break
				}
				if time.Now().After(deadline) { // xfs frees what is removed a little later
					t.Fatalf("%d bytes allocated before, %d after", full, rest)
				}
			}
			run(t, "umount", where)
		})
	}
}

func allocated(t testing.TB, file string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestUsedDeviceIsNotRemoved(t *testing.T) {
	require(t)
	testenv.RequireCommand(t, "mkfs.ext4", "e2fsprogs")
	target := start(t, fuse.Config{Device: memory(t, memdev.Config{Size: 64 << 20}), Loop: fuse.AnyLoop})
	run(t, "mkfs.ext4", "-q", "-F", target.Path())
	where := filepath.Join(t.TempDir(), "a place")
	if err := os.Mkdir(where, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", target.Path(), where)
	if err := target.Stop(within(t)); !errors.Is(err, fuse.ErrInUse) || !strings.Contains(err.Error(), where) {
		t.Errorf("mounted: %v", err)
	}
	info, err := fuse.Find(within(t), testName(t), nil)
	if err != nil || len(info.Mounts) != 1 || info.Mounts[0] != where {
		t.Errorf("%+v, %v", info, err)
	}
	if err := os.WriteFile(where+"/x", []byte("it is served on"), 0o600); err != nil {
		t.Error(err)
	}
	run(t, "umount", where)

	// Mounted where this process does not see it: the process that has it is named.
	elsewhere := startElsewhere(t, target.Path(), where)
	if err := target.Stop(within(t)); !errors.Is(err, fuse.ErrInUse) || !strings.Contains(err.Error(), where+" (of process") {
		t.Errorf("mounted in another mount namespace: %v", err)
	}
	elsewhere()

	run(t, "mkswap", target.Path())
	if out, err := tryRun("swapon", target.Path()); err == nil {
		if err := target.Stop(within(t)); !errors.Is(err, fuse.ErrInUse) || !strings.Contains(err.Error(), "swap") {
			t.Errorf("as swap: %v", err)
		}
		run(t, "swapoff", target.Path())
	} else {
		t.Logf("no swap here: %s", out)
	}

	f, err := os.OpenFile(target.Path(), os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Stop(within(t)); !errors.Is(err, fuse.ErrInUse) {
		t.Errorf("held: %v", err)
	}
	_ = f.Close()

	f, err = os.Open(target.File())
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Stop(within(t)); !errors.Is(err, fuse.ErrInUse) || !strings.Contains(err.Error(), target.File()) {
		t.Errorf("its file is open: %v", err)
	}
	_ = f.Close()
	stop(t, target)
}

func TestProgramThatIsKilledTakesItsRequestsWithIt(t *testing.T) {
	require(t)
	delay := filter.NewDelay(memory(t, memdev.Config{Size: 32 << 20}), filter.DelayConfig{})
	delay.Set(datapath.OpRead, filter.Latency{Fixed: 20 * time.Millisecond})
	delay.Set(datapath.OpWrite, filter.Latency{Fixed: 20 * time.Millisecond})
	target := start(t, fuse.Config{Device: delay, Loop: fuse.AnyLoop})
	for range 10 {
		p := startProcess(t, hammerVariable+"="+target.File()) // whose requests the kernel gives up
		time.Sleep(5 * time.Millisecond)
		p.Kill()
	}
	delay.Set(datapath.OpRead, filter.Latency{})
	delay.Set(datapath.OpWrite, filter.Latency{})
	loads(t, target.Path(), 2, 2<<20, 1<<18, 30)
	if s := target.Stats(); s.InFlight != 0 || s.Gone {
		t.Errorf("%+v", s)
	}
}

func TestStopDoesNotWaitForAStoreThatHangs(t *testing.T) {
	require(t)
	fault, err := filter.NewFault(memory(t, memdev.Config{Size: 32 << 20}), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	target := start(t, fuse.Config{Device: fault, Loop: fuse.AnyLoop})
	if err := fault.SetRules([]filter.FaultRule{{Offset: 0, Length: 32 << 20, Action: filter.FaultHang}}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(target.Path(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil { // into the page cache
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { // ends when the store goes on
		_ = f.Close()
		close(closed)
	}()
	for deadline := time.Now().Add(wait); fault.Hanging() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is written back")
		}
	}
	ctx, cancel := contextWithTimeout(100 * time.Millisecond)
	defer cancel()
	if err := target.Stop(ctx); err == nil {
		t.Error("stopped with a write on its way")
	}
	if err := fault.SetRules(nil); err != nil {
		t.Fatal(err)
	}
	fault.Release()
	<-closed
	stop(t, target)
}
