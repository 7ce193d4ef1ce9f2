package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/observe"
)

func TestKernelHistogramsKeepTheirBuckets(t *testing.T) {
	var h observe.Histogram
	h.Counts[0], h.Counts[9], h.Counts[observe.BucketCount-1], h.Sum = 1, 2, 3, 4
	m := kernelHistogram(&h)
	if m.Count != 6 || m.SumNs != 4 || !slices.Equal(m.Counts, []uint64{1, 2, 3}) {
		t.Fatalf("%v", m)
	}
	if m.LowerNs[0] != 0 || m.UpperNs[0] != 128 || m.LowerNs[1] != 1152 || m.UpperNs[1] != 1280 || m.UpperNs[2] != 1<<35 {
		t.Errorf("%v to %v", m.LowerNs, m.UpperNs)
	}
	if m := kernelHistogram(&observe.Histogram{}); m.Count != 0 || len(m.Counts) != 0 {
		t.Errorf("empty: %v", m)
	}
}

func TestDisksOfTheKernelBecomeMessages(t *testing.T) {
	d := &observe.Disk{Name: "sda", Number: observe.Number{Major: 8}, Depth: 3, Merges: 4, Operations: []observe.DiskOperation{{Operation: "write", Count: 5, Errors: 6, Bytes: 7}}}
	m := diskMessage(d, []string{"fast"})
	if m.Name != "sda" || m.Major != 8 || m.Minor != 0 || m.QueueDepth != 3 || m.Merges != 4 || !slices.Equal(m.Pools, []string{"fast"}) {
		t.Errorf("%v", m)
	}
	if o := m.Operations[0]; o.Operation != "write" || o.Count != 5 || o.Errors != 6 || o.Bytes != 7 || o.Queue == nil || o.Service == nil {
		t.Errorf("%v", o)
	}
}

// sysfs makes a file system with devices, by number: sda (8:0) with sda1 (8:1), md0
// (9:0) of sda1 and sdb (8:16), dm-0 (253:0) on md0, dm-1 (253:1) on itself.
func sysfs(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for path, number := range map[string]string{
		"devices/sda": "8:0", "devices/sda/sda1": "8:1", "devices/sdb": "8:16", "devices/md0": "9:0", "devices/dm-0": "253:0", "devices/dm-1": "253:1",
	} {
		dir := filepath.Join(root, "sys", path)
		if err := os.MkdirAll(filepath.Join(dir, "slaves"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "dev"), []byte(number+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(root, "sys/dev/block"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(dir, filepath.Join(root, "sys/dev/block", number)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "sys/devices/sda/sda1/partition"), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for above, below := range map[string][]string{"md0": {"sda/sda1", "sdb"}, "dm-0": {"md0"}, "dm-1": {"dm-1"}} {
		for _, b := range below {
			if err := os.Symlink(filepath.Join(root, "sys/devices", b), filepath.Join(root, "sys/devices", above, "slaves", filepath.Base(b))); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

func TestDisksAreFoundUnderWhatLiesOnThem(t *testing.T) {
	root := sysfs(t)
	sda, sdb := observe.Number{Major: 8}, observe.Number{Major: 8, Minor: 16}
	for _, tt := range []struct {
		name string
		from observe.Number
		want []observe.Number
	}{
		{"a disk", sda, []observe.Number{sda}},
		{"a partition", observe.Number{Major: 8, Minor: 1}, []observe.Number{sda}},
		{"a RAID of a partition and a disk", observe.Number{Major: 9}, []observe.Number{sda, sdb}},
		{"a volume on it", observe.Number{Major: 253}, []observe.Number{sda, sdb}},
		{"a volume on itself", observe.Number{Major: 253, Minor: 1}, nil},
		{"what is not there", observe.Number{Major: 7}, nil},
	} {
		if got := disksBelow(tt.from, root, stackMax); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if err := os.Remove(filepath.Join(root, "sys/devices/sda/dev")); err != nil {
		t.Fatal(err)
	}
	if got := disksBelow(observe.Number{Major: 8, Minor: 1}, root, stackMax); got != nil {
		t.Errorf("a partition of a disk without a number: %v", got)
	}
	if got := disksUnder(filepath.Join(root, "not-there"), "/"); got != nil {
		t.Errorf("a file that is not there: %v", got)
	}
}

func TestMountsAreFoundByTheLongestPath(t *testing.T) {
	root, dir := t.TempDir(), t.TempDir()
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	text := "22 1 254:0 / / rw - ext4 /dev/root rw\n" +
		"23 22 0:40 / " + dir + " rw shared:5 - btrfs /dev/sdz rw\n" +
		"24 22 0:41 / " + dir + "x rw - tmpfs tmpfs rw\n" +
		"broken\n25 22 - x\n"
	if err := os.MkdirAll(filepath.Join(root, "proc/self"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := mountSource(dir, root); got != "/dev/sdz" {
		t.Errorf("the mount point: %q", got)
	}
	if got := mountSource("/", root); got != "/dev/root" {
		t.Errorf("/: %q", got)
	}
	if got := mountSource(filepath.Join(dir, "not-there"), root); got != "" {
		t.Errorf("a file that is not there: %q", got)
	}
	if got := mountSource(dir, t.TempDir()); got != "" {
		t.Errorf("without /proc: %q", got)
	}
}

func TestPoolsAreNamedAtTheirDisks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	device := func(path string, present bool) engine.PoolDevice {
		return engine.PoolDevice{Path: path, Present: present}
	}
	a := engine.PoolInfo{Devices: []engine.PoolDevice{device(file, true), device(file, true), device("/not-there", true)}}
	b := engine.PoolInfo{Devices: []engine.PoolDevice{device(file, true), device(file, false)}}
	a.Name, b.Name = "a", "b"
	under := disksUnder(file, "/")
	got := poolDisks([]engine.PoolInfo{a, b}, "/")
	if len(got) != len(under) {
		t.Fatalf("%v, want %v", got, under)
	}
	for _, n := range under { // none, where temporary files are in memory
		if !slices.Equal(got[n], []string{"a", "b"}) {
			t.Errorf("%v has %v", n, got[n])
		}
	}
}

// watching is a kernelObserver of one reactor, told of disks every few milliseconds.
func watching(t *testing.T, disks map[observe.Number][]string) *kernelObserver {
	t.Helper()
	testenv.RequireBPF(t)
	c := ReactorConfig{Reactors: 1}
	reactors, err := c.start(slog.New(slog.DiscardHandler))
	t.Cleanup(func() { stopReactors(reactors) })
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	k := &kernelObserver{
		load:     func() (*observe.Observer, error) { return observe.Start(observe.Config{Log: log}) },
		reactors: reactors, log: log, disks: func() map[observe.Number][]string { return disks }, every: 5 * time.Millisecond,
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	go k.run() // ends with close
	t.Cleanup(func() {
		if err := k.close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

// eventually polls, with patience for busy machines.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// diskWrites has something on a disk under path written, if there is one.
func diskWrites(t *testing.T) (under []observe.Number, write func()) {
	t.Helper()
	path := testenv.TempFileOn(t, "/var/tmp", 1<<20)
	if under = disksUnder(path, "/"); len(under) == 0 {
		t.Skip("needs a disk under /var/tmp")
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // it is thrown away
	return under, func() {
		if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
}

// turn wakes a reactor.
func turn(t *testing.T, r *reactor.Reactor) {
	t.Helper()
	if err := r.Run(func(*reactor.Reactor) {}); err != nil {
		t.Fatal(err)
	}
}

func TestStatsHaveWhatTheKernelSaw(t *testing.T) {
	testenv.RequireRoot(t)
	under, write := diskWrites(t)
	k := watching(t, map[observe.Number][]string{under[0]: {"fast"}})
	var _ diskObserver = k
	threads := []int{k.reactors[0].Stats().Thread}
	eventually(t, "a disk with writes, and a reactor that slept", func() bool {
		write()
		turn(t, k.reactors[0])
		reply := &controlpb.StatsResponse{Reactors: []*controlpb.ReactorStats{{}}}
		k.observe(reply, threads)
		i := slices.IndexFunc(reply.Disks, func(d *controlpb.DiskStats) bool {
			return d.Major == under[0].Major && d.Minor == under[0].Minor
		})
		if i < 0 || !slices.Equal(reply.Disks[i].Pools, []string{"fast"}) || len(reply.Unobserved) == 0 {
			return false
		}
		j := slices.IndexFunc(reply.Disks[i].Operations, func(o *controlpb.DiskOperationStats) bool { return o.Operation == "write" })
		return j >= 0 && reply.Disks[i].Operations[j].Service.Count > 0 && reply.Reactors[0].OffCpu.GetCount() > 0 && reply.Reactors[0].Wakeup.GetCount() > 0
	})
}

func TestReactorsAreToldWhatTheFastestDiskNeeds(t *testing.T) {
	testenv.RequireRoot(t)
	under, write := diskWrites(t)
	k := watching(t, map[observe.Number][]string{under[0]: {"fast"}, {Major: 4095}: {"gone"}})
	eventually(t, "a service time that the reactor has", func() bool {
		write()
		turn(t, k.reactors[0])
		return k.reactors[0].Stats().ServiceTime > 0
	})
}

func TestKernelMetricsCanBeGathered(t *testing.T) {
	testenv.RequireRoot(t)
	_, write := diskWrites(t)
	k := watching(t, nil)
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(k.collector()); err != nil {
		t.Fatal(err)
	}
	wanted := []string{"disk_queue_seconds", "disk_service_seconds", "disk_request_bytes", "disk_errors_total", "disk_merges_total", "disk_requeues_total",
		"disk_requests_in_flight", "reactor_off_cpu_seconds", "reactor_cpu_wait_seconds", "reactor_wakeup_seconds", "observe_up", "observe_missed_total"}
	eventually(t, "all metrics", func() bool {
		write()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range families {
			names = append(names, f.GetName())
		}
		return !slices.ContainsFunc(wanted, func(w string) bool { return !slices.Contains(names, w) })
	})
}

func TestWhatIsNotLoadedIsUnobserved(t *testing.T) {
	broken := errors.New("broken")
	var log strings.Builder
	k := &kernelObserver{
		load: func() (*observe.Observer, error) { return nil, broken }, log: slog.New(slog.NewTextHandler(&log, nil)),
		disks: func() map[observe.Number][]string { return nil }, quit: make(chan struct{}), done: make(chan struct{}),
	}
	if s := k.snapshot(); len(s.Unobserved) != 5 || !strings.Contains(s.Unobserved[0].Reason, "not loaded yet") {
		t.Errorf("before: %v", s.Unobserved)
	}
	go k.run() // ends at once: nothing can be loaded
	<-k.done
	reply := &controlpb.StatsResponse{}
	k.observe(reply, []int{1})
	if len(reply.Unobserved) != 5 || reply.Unobserved[0].Reason != "broken" || !strings.Contains(log.String(), "broken") {
		t.Errorf("%v, %s", reply.Unobserved, log.String())
	}
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(k.collector()); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Gather(); err != nil {
		t.Error(err)
	}
	if err := k.close(); err != nil {
		t.Error(err)
	}
}

func TestSizesAreCountedUpToTheirBounds(t *testing.T) {
	o := observe.DiskOperation{Sizes: [16]uint64{0: 1, 3: 2, 15: 4}}
	b := sizeBuckets(&o)
	if len(b) != 15 || b[512] != 1 || b[2048] != 1 || b[4096] != 3 || b[8<<20] != 3 {
		t.Errorf("%v", b)
	}
}
