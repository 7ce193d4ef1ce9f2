package observe

import (
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestWhatTheProgramsCost logs the time of each program per event, as the kernel
// measures it, with the clock readings of that measurement in it.
func TestWhatTheProgramsCost(t *testing.T) {
	f, _ := loopDevice(t, 16<<20)
	o := observing(t, Config{Groups: []string{GroupDisks, GroupReactors, GroupRings}, Threads: []int{unix.Gettid()}})
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Skipf("needs statistics of programs (CAP_SYS_ADMIN): %v", err)
	}
	defer func() { _ = stats.Close() }() // a descriptor
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b := aligned(t, 4096)
	for i := range 4000 {
		if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	for _, g := range o.groups {
		if g.collection == nil {
			continue
		}
		var names []string
		for name := range g.collection.Programs {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			s, err := g.collection.Programs[name].Stats()
			if err != nil {
				t.Fatal(err)
			}
			if s.RunCount > 0 {
				t.Logf("%s %s: %d events, %d ns each", g.name, name, s.RunCount, time.Duration(s.Runtime).Nanoseconds()/int64(s.RunCount))
			}
		}
	}
}
