//go:build !race

package fuse_test

import (
	"testing"

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
