//go:build !race

package fuse_test

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse"
)

func TestRequestsAllocateNothing(t *testing.T) {
	for _, engine := range []reactor.EngineKind{reactor.EngineRing, reactor.EngineEpoll} {
		t.Run(string(engine), func(t *testing.T) {
			require(t)
			d := memory(t, memdev.Config{Size: 64 << 20})
			timed := filter.NewStats(d, filter.StatsConfig{})
			c := complete(t, fuse.Config{Device: timed, Loop: fuse.AnyLoop, Reactors: reactors(t, 1, engine)})
			target, err := fuse.Start(within(t), c)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { stop(t, target) })
			f := openDevice(t, target.Path())
			b := aligned(t, 64<<10)
			fd := int(f.Fd())
			once := func() {
				if _, err := unix.Pwrite(fd, b, 8192); err != nil {
					t.Fatal(err)
				}
				if _, err := unix.Pread(fd, b[:4096], 8192); err != nil {
					t.Fatal(err)
				}
				if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err != nil {
					t.Fatal(err)
				}
				if err := unix.Fdatasync(fd); err != nil {
					t.Fatal(err)
				}
			}
			if got := testing.AllocsPerRun(300, once); got != 0 {
				t.Errorf("%v allocations for a write, a read, a discard and a flush", got)
			}
		})
	}
}

// TestIdleDevicesTakeLittle is not run under the race detector, which has memory of its
// own for all memory.
func TestIdleDevicesTakeLittle(t *testing.T) {
	require(t)
	const count = 110
	rs := reactors(t, 2, reactor.EngineAuto)
	dir := t.TempDir()
	before := resident(t)
	var targets []*fuse.Target
	var first, last time.Duration
	for i := range count {
		began := time.Now()
		targets = append(targets, start(t, fuse.Config{
			Device: memory(t, memdev.Config{Size: 16 << 20}), Loop: fuse.AnyLoop, Reactors: rs, Dir: dir, Name: testName(t) + strconv.Itoa(i),
		}))
		took := time.Since(began)
		if i < 10 {
			first += took
		} else if i >= count-10 {
			last += took
		}
	}
	for _, target := range targets { // each has been used
		f := openDevice(t, target.Path())
		b := aligned(t, 64<<10)
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		_ = f.Close() // nothing is dirty past the page cache
	}
	per := (resident(t) - before) / count
	t.Logf("%d KiB of resident memory for a device with one queue of 128; attach: %v, the last ten %v", per>>10, first/10, last/10)
	if per > 1<<20 {
		t.Errorf("%d bytes for an idle device", per)
	}
	list, err := fuse.List(within(t), nil)
	if err != nil || len(list) < count {
		t.Errorf("%d listed, %v", len(list), err)
	}
	time.Sleep(200 * time.Millisecond)
	turns := rs[0].Stats().Turns + rs[1].Stats().Turns
	time.Sleep(time.Second)
	if turns = rs[0].Stats().Turns + rs[1].Stats().Turns - turns; turns > 50 {
		t.Errorf("%d turns in a second of idleness", turns)
	}
}

// resident is the process's resident memory in bytes.
func resident(t testing.TB) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
