package csi

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// formatSpaceMax is what a pool may give for a filesystem that has just been made on a
// volume of 100 GiB: superblocks, group descriptors and bitmaps, and of xfs its log of
// 64 MiB, which mkfs.xfs writes.
const formatSpaceMax = 96 * mib

// TestFormattingALargeVolumeTakesLittle stages a new volume of 100 GiB, which is far
// more than the pool has: a filesystem on a volume that nobody wrote to needs no zeros.
func TestFormattingALargeVolumeTakesLittle(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			w := newWorld(t, "4GiB")
			v := w.volume("large", mountCapability(fs))
			must(t, v.create(100*gib, nil))
			began := time.Now()
			must(t, v.stage())
			took := time.Since(began)
			var s unix.Statfs_t
			must(t, unix.Statfs(v.staging, &s))
			if size := s.Blocks * uint64(s.Bsize); size < 90*gib {
				t.Errorf("the filesystem has %d bytes", size)
			}
			staged := w.free - w.poolFree()
			time.Sleep(lazySeconds * time.Second) // what the kernel initializes when it is mounted
			used := w.free - w.poolFree()
			t.Logf("%s on 100 GiB: staged in %v, %d MiB taken, %d MiB after %d s", fs, took.Round(time.Millisecond), staged/mib, used/mib, lazySeconds)
			if used > formatSpaceMax {
				t.Errorf("the new filesystem takes %d MiB of the pool", used/mib)
			}
			must(t, v.unstage(), v.delete())
		})
	}
}

// lazySeconds is time for the kernel's lazy initialization of ext4 to show itself.
const lazySeconds = 10
