package observe

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const patience = 60 * time.Second // for machines that are emulated, or busy

// real is the kernel the tests run on.
func real() kernel { return kernel{types: btf.LoadKernelSpec, root: "/"} }

// keeping is the same kernel with one disk in its list: so the programs keep the times of
// requests themselves, or leave it to the kernel.
func keeping(t testing.TB, iostats, throttling string) kernel {
	t.Helper()
	k := real()
	k.root = t.TempDir()
	queue := filepath.Join(k.root, "sys/block/vda/queue")
	err := errors.Join(os.MkdirAll(queue, 0o755), os.Mkdir(filepath.Join(queue, "../mq"), 0o755),
		os.WriteFile(filepath.Join(queue, "../size"), []byte("2048\n"), 0o644),
		os.WriteFile(filepath.Join(queue, "iostats"), []byte(iostats+"\n"), 0o644),
		os.WriteFile(filepath.Join(queue, "wbt_lat_usec"), []byte(throttling+"\n"), 0o644))
	for _, name := range []string{"dev", "class", "module"} {
		err = errors.Join(err, os.Symlink("/sys/"+name, filepath.Join(k.root, "sys", name)))
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// bothWays runs a test of disks with the times of the kernel and with those of the
// programs.
func bothWays(t *testing.T, test func(*testing.T, func(Config) *Observer)) {
	t.Helper()
	for _, way := range []struct {
		name, throttling string
		timed            bool
	}{{"times of the kernel", "2000", true}, {"times of the programs", "0", false}} {
		t.Run(way.name, func(t *testing.T) {
			testenv.RequireRoot(t)
			testenv.RequireBPF(t)
			if way.timed {
				if b, err := os.ReadFile("/sys/block/loop0/queue/wbt_lat_usec"); err != nil || string(b) == "0\n" {
					missing(t, "writeback throttling of loop devices")
				}
			}
			var o *Observer
			test(t, func(c Config) *Observer {
				t.Helper()
				o = with(t, c, keeping(t, "1", way.throttling))
				if o.timed != way.timed {
					t.Fatalf("the kernel keeps the times: %v", o.timed)
				}
				return o
			})
			if o != nil && o.timed != way.timed {
				t.Error("requests without times were seen")
			}
		})
	}
}

// observing starts an observer of some groups, which must load.
func observing(t testing.TB, c Config) *Observer {
	t.Helper()
	testenv.RequireBPF(t)
	return with(t, c, real())
}

// with is an observer on a kernel that may be another one. It times every request.
func with(t testing.TB, c Config, k kernel) *Observer {
	t.Helper()
	c.Every = true
	return started(t, c, k)
}

// started is an observer with just this configuration.
func started(t testing.TB, c Config, k kernel) *Observer {
	t.Helper()
	c.Log = slog.New(slog.DiscardHandler)
	o, err := start(c, k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, u := range o.Unobserved() {
		for _, wanted := range c.Groups {
			if u.What == wanted && k.edit == nil {
				t.Fatalf("%s: %s", u.What, u.Reason)
			}
		}
	}
	return o
}

// missing skips t; it fails where make test-vm has promised what is missing.
func missing(t testing.TB, what string) {
	t.Helper()
	if slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm") {
		t.Fatalf("needs %s, which make test-vm must provide", what)
	}
	t.Skipf("needs %s (make test-vm does not skip it)", what)
}

// wait polls until condition holds.
func wait(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// loopDevice is a block device on a file, opened for direct I/O.
func loopDevice(t testing.TB, size int64) (*os.File, Number) {
	t.Helper()
	testenv.RequireRoot(t)
	backing, err := os.OpenFile(testenv.TempFileOn(t, "/var/tmp", size), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = backing.Close() }() // the loop device has it
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		missing(t, fmt.Sprintf("loop devices (%v)", err))
	}
	defer func() { _ = control.Close() }() // nothing was written
	for range 20 {                         // another one may be faster
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("/dev", "loop"+itoa(n))
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			missing(t, fmt.Sprintf("loop devices (%v)", err))
		}
		if err := unix.IoctlLoopConfigure(int(f.Fd()), &unix.LoopConfig{Fd: uint32(backing.Fd())}); err != nil {
			_ = f.Close() // nothing was written
			continue
		}
		t.Cleanup(func() {
			if _, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD); err != nil {
				t.Error(err)
			}
			_ = f.Close() // what it wrote goes with its file
		})
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return f, Number{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	}
	t.Fatal("no loop device is free")
	return nil, Number{}
}

func itoa(n int) string {
	var b strings.Builder
	if n >= 10 {
		b.WriteString(itoa(n / 10))
	}
	b.WriteByte(byte('0' + n%10))
	return b.String()
}

// aligned is memory for direct I/O.
func aligned(t testing.TB, size int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) }) // nobody has it any more
	return b
}

// disk finds a disk in a snapshot; one without requests is not in it.
func disk(s *Snapshot, n Number) Disk {
	for _, d := range s.Disks {
		if d.Number == n {
			return d
		}
	}
	return Disk{Number: n}
}

func (d Disk) operation(name string) DiskOperation {
	for _, o := range d.Operations {
		if o.Operation == name {
			return o
		}
	}
	return DiskOperation{Operation: name}
}

// plausible checks that a histogram's buckets can have its sum: what the programs and
// Go think of them is the same.
func plausible(t testing.TB, what string, h *Histogram) {
	t.Helper()
	var least, most time.Duration
	for i, n := range h.Counts {
		if i > 0 {
			least += time.Duration(n) * Upper(i-1)
		}
		most += time.Duration(n) * Upper(i)
	}
	if sum := time.Duration(h.Sum); h.Counts[BucketCount-1] == 0 && (sum < least || sum > most) {
		t.Errorf("%s: the sum is %v, the buckets allow %v to %v", what, sum, least, most)
	}
}
