package observe

import (
	"math"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/observe/bpf"
)

func TestRequestsOfADiskAreCountedExactly(t *testing.T) {
	bothWays(t, requestsOfADiskAreCountedExactly)
}

func requestsOfADiskAreCountedExactly(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 64<<20)
	o := observing(Config{Groups: []string{GroupDisks}})
	const reads, writes, flushes, discards = 200, 300, 50, 20
	b := aligned(t, 8192)
	before := disk(o.Snapshot(), number)
	began := time.Now()
	for i := range writes {
		if _, err := f.WriteAt(b, int64(i)*8192); err != nil {
			t.Fatal(err)
		}
		if i < flushes {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range reads {
		if _, err := f.ReadAt(b[:4096], int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	for i := range discards {
		if err := discard(f, uint64(i)<<20, 64<<10); err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(began)
	s := o.Snapshot()
	after := disk(s, number)
	if after.Name == "" || after.operation("read").Depth+after.operation("write").Depth != 0 {
		t.Errorf("the disk is %q, with %d requests in flight after the last one", after.Name, after.Depth)
	}
	for _, want := range []struct {
		operation    string
		count, bytes uint64
		bucket       int
		more         bool // others may read too: a new device is looked at
	}{
		{"read", reads, reads * 4096, 3, true},
		{"write", writes, writes * 8192, 4, false},
		{"flush", flushes, 0, 0, false},
		{"discard", discards, discards * 64 << 10, 7, false},
	} {
		was, is := before.operation(want.operation), after.operation(want.operation)
		count, bytes, sizes := is.Count-was.Count, is.Bytes-was.Bytes, is.Sizes[want.bucket]-was.Sizes[want.bucket]
		is.Queue.Sub(&was.Queue)
		is.Service.Sub(&was.Service)
		if o.timed && count < want.count { // of some the kernel does not report the end, and these are then not counted
			want.bytes -= (want.count - count) * want.bytes / want.count
			want.count = max(count, want.count*9/10)
		}
		missed := count - is.Service.Count() // likewise, and they are
		if missed > count/10 || is.Service.Count() > count {
			t.Errorf("%s: %d requests, %d service times", want.operation, count, is.Service.Count())
		}
		if count != want.count && !(want.more && count > want.count) || sizes+missed < want.count ||
			missed == 0 && count == want.count && bytes != want.bytes {
			t.Errorf("%s: %d requests, %d bytes, %d of that size, %d without an end; want %d, %d", want.operation, count, bytes, sizes, missed, want.count, want.bytes)
		}
		if is.Errors != 0 || is.Depth != 0 && missed == 0 {
			t.Errorf("%s: %d errors, %d in flight", want.operation, is.Errors, is.Depth)
		}
		if is.Queue.Count() > count+is.Requeues {
			t.Errorf("%s: %d requests, %d queue times", want.operation, count, is.Queue.Count())
		}
		plausible(t, want.operation+" service", &is.Service)
		plausible(t, want.operation+" queue", &is.Queue)
		if sum := time.Duration(is.Service.Sum); sum <= 0 || !want.more && sum > took {
			t.Errorf("%s: one after the other, in %v, they took %v", want.operation, took, sum)
		}
		t.Logf("%s: queue p50 %v, service p50 %v p99 %v", want.operation, is.Queue.Quantile(0.5), is.Service.Quantile(0.5), is.Service.Quantile(0.99))
	}
	if s.Missed != 0 {
		t.Logf("%d events were missed", s.Missed)
	}
}

func TestDepthIsSeenAndGoesBackToNothing(t *testing.T) { bothWays(t, depthIsSeenAndGoesBackToNothing) }

func depthIsSeenAndGoesBackToNothing(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 64<<20)
	o := observing(Config{Groups: []string{GroupDisks}})
	var stop sync.WaitGroup
	quit := make(chan struct{})
	for i := range 4 {
		b := aligned(t, 1<<20)
		stop.Go(func() { // ends with quit
			for {
				select {
				case <-quit:
					return
				default:
				}
				if _, err := f.WriteAt(b, int64(i)<<20); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wait(t, "a request in flight", func() bool { return disk(o.Snapshot(), number).Depth > 0 })
	close(quit)
	stop.Wait()
	wait(t, "no request in flight", func() bool { return disk(o.Snapshot(), number).Depth == 0 })
}

func TestFailedRequestsAreErrors(t *testing.T) { bothWays(t, failedRequestsAreErrors) }

func failedRequestsAreErrors(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 1<<20)
	o := observing(Config{Groups: []string{GroupDisks}})
	cutBacking(t, number, 0) // reads behind its end fail
	if _, err := f.ReadAt(aligned(t, 4096), 8192); err == nil {
		t.Skip("needs a loop driver that fails reads behind the end of its file")
	}
	if r := disk(o.Snapshot(), number).operation("read"); r.Errors == 0 || r.Errors > r.Count || r.Depth != 0 {
		t.Errorf("%d errors of %d reads, %d in flight", r.Errors, r.Count, r.Depth)
	}
}

// TestARequestThatEndsInParts reads across the end of a loop device's file: the driver
// ends the part that is there, hands the request back, and fails the rest.
func TestARequestThatEndsInParts(t *testing.T) { bothWays(t, aRequestThatEndsInParts) }

func aRequestThatEndsInParts(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 1<<20)
	o := observing(Config{Groups: []string{GroupDisks}, Disks: []Number{number}})
	cutBacking(t, number, 4096)
	before := disk(o.Snapshot(), number).operation("read")
	if _, err := f.ReadAt(aligned(t, 16384), 0); err == nil {
		t.Skip("needs a loop driver that fails reads behind the end of its file")
	}
	after := disk(o.Snapshot(), number).operation("read")
	if count, failed, back := after.Count-before.Count, after.Errors-before.Errors, after.Requeues-before.Requeues; count != 1 || failed != 1 || back == 0 {
		t.Errorf("%d reads, %d of them failed, handed back %d times; want one of each", count, failed, back)
	}
	if bytes := after.Bytes - before.Bytes; bytes != 0 || after.Depth != 0 {
		t.Errorf("%d bytes were read, %d reads are in flight", bytes, after.Depth)
	}
}

// cutBacking cuts the file of a loop device.
func cutBacking(t *testing.T, n Number, size int64) {
	t.Helper()
	backing, err := os.ReadFile("/sys/dev/block/" + n.String() + "/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(string(backing[:len(backing)-1]), size); err != nil {
		t.Fatal(err)
	}
}

// TestAWriteWithAFlushIsOneWrite writes through the cache of a disk: the kernel reports
// the end of such a write twice.
func TestAWriteWithAFlushIsOneWrite(t *testing.T) { bothWays(t, aWriteWithAFlushIsOneWrite) }

func aWriteWithAFlushIsOneWrite(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 1<<20)
	o := observing(Config{Groups: []string{GroupDisks}, Disks: []Number{number}})
	through, err := os.OpenFile(f.Name(), os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = through.Close() }() // all of it is on the disk
	const writes = 20
	b := aligned(t, 8192)
	for i := range writes {
		if _, err := through.WriteAt(b, int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	d := disk(o.Snapshot(), number)
	w, flushes := d.operation("write"), d.operation("flush")
	if w.Count > writes || w.Count < writes*9/10 || w.Bytes > writes*8192 || w.Sizes[4] < writes*9/10 || w.Errors != 0 || d.Depth != 0 {
		t.Errorf("%d writes of %d bytes, %d of that size, %d failed, %d in flight; want %d writes of %d bytes", w.Count, w.Bytes, w.Sizes[4], w.Errors, d.Depth, writes, writes*8192)
	}
	if flushes.Count < writes*9/10 || flushes.Bytes != 0 || flushes.Sizes[0] > flushes.Count {
		t.Errorf("%d flushes of %d bytes, want one after each of %d writes", flushes.Count, flushes.Bytes, writes)
	}
	plausible(t, "write", &w.Service)
	plausible(t, "flush", &flushes.Service)
}

func TestOnlyNamedDisksAreCounted(t *testing.T) { bothWays(t, onlyNamedDisksAreCounted) }

func onlyNamedDisksAreCounted(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 1<<20)
	g, other := loopDevice(t, 1<<20)
	o := observing(Config{Groups: []string{GroupDisks}, Disks: []Number{number}})
	write := func() {
		t.Helper()
		for _, file := range []*os.File{f, g} {
			if _, err := file.WriteAt(aligned(t, 4096), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	write()
	s := o.Snapshot()
	if a, b := disk(s, number).operation("write").Count, disk(s, other).operation("write").Count; a != 1 || b != 0 {
		t.Errorf("%d writes of the disk, %d of another", a, b)
	}
	if err := o.SetDisks([]Number{other}); err != nil {
		t.Fatal(err)
	}
	write()
	s = o.Snapshot()
	if a, b := disk(s, number).operation("write").Count, disk(s, other).operation("write").Count; a != 1 || b != 1 {
		t.Errorf("%d writes of the disk, %d of another, want 1 of each", a, b)
	}
	if err := o.SetDisks(nil); err != nil {
		t.Fatal(err)
	}
	write()
	s = o.Snapshot()
	if a, b := disk(s, number).operation("write").Count, disk(s, other).operation("write").Count; a != 2 || b != 2 {
		t.Errorf("%d writes of the disk, %d of another, want 2 of each", a, b)
	}
	if err := o.SetDisks([]Number{{Major: 1 << 20}}); err == nil {
		t.Error("a number that cannot be was taken")
	}
}

func TestServiceTimeIsThatOfRecentRequests(t *testing.T) {
	bothWays(t, serviceTimeIsThatOfRecentRequests)
}

func serviceTimeIsThatOfRecentRequests(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 8<<20)
	o := observing(Config{Groups: []string{GroupDisks}})
	if d, ok := o.ServiceTime(4095, 1); ok || d != 0 {
		t.Errorf("a disk that is not there needs %v", d)
	}
	o.serviceAge = 0
	b := aligned(t, 4096)
	write := func(n int) {
		t.Helper()
		for i := range n {
			if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(serviceCount)
	first, ok := o.ServiceTime(number.Major, number.Minor)
	if whole := disk(o.Snapshot(), number).operation("write").Service; !ok || first < whole.Quantile(0)/2 || first > 2*whole.Quantile(1) {
		t.Errorf("median %v, %v; all are between %v and %v", first, ok, whole.Quantile(0), whole.Quantile(1))
	}
	again, _ := o.ServiceTime(number.Major, number.Minor) // nothing has happened since
	if again != first {
		t.Errorf("%v, and without a request since then %v", first, again)
	}
	o.serviceAge = time.Hour
	write(2 * serviceCount)
	if again, _ = o.ServiceTime(number.Major, number.Minor); again != first {
		t.Errorf("%v, and within the hour %v", first, again)
	}
	if n := testing.AllocsPerRun(100, func() { o.ServiceTime(number.Major, number.Minor) }); n != 0 && !raceEnabled {
		t.Errorf("an answer that is known takes %v allocations", n)
	}
	for i := range uint32(watchedMax + 10) {
		o.ServiceTime(4000, i)
	}
	if len(o.services) > watchedMax {
		t.Errorf("%d disks are remembered", len(o.services))
	}
}

func TestADiskThatWentIsForgotten(t *testing.T) { bothWays(t, aDiskThatWentIsForgotten) }

func aDiskThatWentIsForgotten(t *testing.T, observing func(Config) *Observer) {
	f, number := loopDevice(t, 1<<20)
	root := t.TempDir()
	if err := os.MkdirAll(root+"/sys/dev/block", 0o755); err != nil {
		t.Fatal(err)
	}
	o := observing(Config{Groups: []string{GroupDisks}})
	if _, err := f.WriteAt(aligned(t, 4096), 0); err != nil {
		t.Fatal(err)
	}
	name := disk(o.Snapshot(), number).Name
	if name == "" {
		t.Fatal("the disk is not there")
	}
	if err := os.MkdirAll(root+"/sys/class/block/"+name, 0o755); err != nil {
		t.Fatal(err)
	}
	kept := o.kernel.root
	o.kernel.root = root // where it has a name and no number, as a path of a multipath device
	if d := disk(o.Snapshot(), number); d.Name != name || d.operation("write").Count != 1 {
		t.Errorf("without a number it is %q", d.Name)
	}
	if err := os.Symlink("../../devices/virtual/block/sdz", root+"/sys/dev/block/"+number.String()); err != nil {
		t.Fatal(err)
	}
	if d := disk(o.Snapshot(), number); d.Name != "sdz" {
		t.Errorf("its number is that of sdz, and it is %q", d.Name)
	}
	for _, path := range []string{"/sys/class/block/" + name, "/sys/dev/block/" + number.String()} {
		if err := os.Remove(root + path); err != nil {
			t.Fatal(err)
		}
	}
	if d := disk(o.Snapshot(), number); d.Name != "" {
		t.Errorf("it went, and is still there as %q", d.Name)
	}
	o.kernel.root = kept
	if _, err := f.WriteAt(aligned(t, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if n := disk(o.Snapshot(), number).operation("write").Count; n != 1 {
		t.Errorf("a disk that came again has %d writes, want 1", n)
	}
	o.kernel.root = t.TempDir() // no sysfs at all: nobody knows, so all stay
	if d := disk(o.Snapshot(), number); d.Name != name {
		t.Errorf("without sysfs it is %q", d.Name)
	}
}

func TestSnapshotsAllocateLittle(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates (make test runs it without)")
	}
	f, number := loopDevice(t, 1<<20)
	o := observing(t, Config{Groups: []string{GroupDisks, GroupReactors, GroupRings}, Disks: []Number{number}, Threads: []int{unix.Gettid()}})
	if _, err := f.WriteAt(aligned(t, 4096), 0); err != nil {
		t.Fatal(err)
	}
	// A disk, an operation, a thread, seven kinds of ring requests, the misses of 11
	// programs: each a system call with its buffer. It must not grow with the requests.
	if n := testing.AllocsPerRun(50, func() { o.Snapshot() }); n > 250 {
		t.Errorf("a snapshot takes %v allocations", n)
	} else {
		t.Logf("a snapshot takes %v allocations", n)
	}
}

func TestDepthIsNoMoreThanTheKernelsOwn(t *testing.T) {
	n := Number{8, 16}
	for _, tt := range []struct {
		inflight, iostats    string
		reads, writes, flush uint64
	}{
		{"       3        5\n", "1\n", 3, 5, math.MaxUint64},
		{"0 0\n", "1\n", 0, 0, math.MaxUint64},
		{"0 0\n", "0\n", math.MaxUint64, math.MaxUint64, math.MaxUint64}, // nothing is counted
		{"much\n", "1\n", math.MaxUint64, math.MaxUint64, math.MaxUint64},
		{"", "", math.MaxUint64, math.MaxUint64, math.MaxUint64},
	} {
		k := kernel{root: t.TempDir()}
		dir := k.root + "/sys/dev/block/" + n.String()
		if err := os.MkdirAll(dir+"/queue", 0o755); err != nil {
			t.Fatal(err)
		}
		for path, text := range map[string]string{"/inflight": tt.inflight, "/queue/iostats": tt.iostats} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(dir+path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		most := k.inFlight(n)
		for operation, want := range map[string]uint64{"read": tt.reads, "write": tt.writes, "discard": tt.writes, "flush": tt.flush} {
			if got := most(operation); got != want {
				t.Errorf("%q, %q: %s: %d, want %d", tt.inflight, tt.iostats, operation, got, want)
			}
		}
	}
}

func TestCompletionsThatWereNotReported(t *testing.T) {
	cpus := make([]operation, 2)
	cpus[0].Issued, cpus[0].Done, cpus[0].Bytes = 10, 3, 3*512
	cpus[1].Done, cpus[1].Requeued, cpus[1].Lost, cpus[1].LostBytes = 4, 1, 1, 512
	cpus[1].HandedBack = 2 // before the programs kept the times: they are not in what was issued
	d := sumOperation("write", cpus)
	if d.Depth != 1 || d.Count != 9 || d.Requeues != 3 || d.Bytes != 4*512 {
		t.Errorf("%d in flight of %d, %d handed back, %d bytes", d.Depth, d.Count, d.Requeues, d.Bytes)
	}
	cpus[1].Done = 20 // what another CPU counted meanwhile
	if d := sumOperation("write", cpus); d.Depth != 0 || d.Count != 24 {
		t.Errorf("%d in flight of %d", d.Depth, d.Count)
	}
}

// TestRequestsWithoutASlot gives the programs room for hardly a request: all are
// counted, and those whose end nobody can tell count as missed.
func TestRequestsWithoutASlot(t *testing.T) {
	f, number := loopDevice(t, 4<<20)
	testenv.RequireBPF(t)
	k := keeping(t, "1", "0")
	k.edit = func(g string, s *ebpf.CollectionSpec) {
		if g == GroupDisks {
			s.Maps[bpf.DisksMapFlights].MaxEntries = 1
		}
	}
	o := with(t, Config{Groups: []string{GroupDisks}, Disks: []Number{number}}, k)
	const writes = 100
	b := aligned(t, 4096)
	for i := range writes {
		if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	s := o.Snapshot()
	d := disk(s, number).operation("write")
	if d.Count != writes || d.Bytes != writes*4096 || d.Depth != 0 {
		t.Errorf("%d writes, %d bytes, %d in flight; want %d writes", d.Count, d.Bytes, d.Depth, writes)
	}
	if n := d.Service.Count(); n > writes/2 || s.Missed < writes-n {
		t.Errorf("%d service times without a place for them, %d requests missed", n, s.Missed)
	}
}

func TestPlacesAreReadAsTheProgramsPackThem(t *testing.T) {
	for _, x := range []place{{}, {7, 1<<32 - 1, 4, false}, {1023, 8<<20 | 1, 1, true}} {
		if got := unpack(x.index, x.pack()); got != x {
			t.Errorf("%+v became %+v", x, got)
		}
	}
}

// TestQueueTimeFromInsertions takes the statistics of a disk away: the programs see
// when requests were inserted into its scheduler.
func TestQueueTimeFromInsertions(t *testing.T) {
	f, number := loopDevice(t, 4<<20)
	testenv.RequireBPF(t)
	queue := "/sys/dev/block/" + number.String() + "/queue/"
	if err := os.WriteFile(queue+"scheduler", []byte("mq-deadline"), 0); err != nil {
		t.Skipf("needs the scheduler mq-deadline: %v", err)
	}
	if err := os.WriteFile(queue+"iostats", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // it would outlive the file
		_ = os.WriteFile(queue+"iostats", []byte("1"), 0)
	})
	o := observing(t, Config{Groups: []string{GroupDisks}, Disks: []Number{number}})
	const writes = 50
	b := aligned(t, 4096)
	for i := range writes {
		if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	d := disk(o.Snapshot(), number).operation("write")
	if n := d.Queue.Count(); d.Count != writes || n < writes*9/10 || n > writes {
		t.Errorf("%d writes, %d queue times; want %d of each", d.Count, n, writes)
	}
	plausible(t, "queue", &d.Queue)
}

// TestTimesThatTheKernelStopsKeeping switches the statistics of a disk off, which leaves
// its requests without times: the programs keep them from there on, and no count is lost.
func TestTimesThatTheKernelStopsKeeping(t *testing.T) {
	f, number := loopDevice(t, 4<<20)
	testenv.RequireBPF(t)
	queue := "/sys/dev/block/" + number.String() + "/queue/"
	set := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(queue+file, []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	set("scheduler", "none") // one would ask for times too
	t.Cleanup(func() {       // it would outlive the file
		_ = os.WriteFile(queue+"iostats", []byte("1"), 0)
	})
	o := with(t, Config{Groups: []string{GroupDisks}, Disks: []Number{number}}, keeping(t, "1", "2000"))
	if !o.timed {
		t.Fatal("the kernel does not keep the times")
	}
	b := aligned(t, 4096)
	write := func(n int) DiskOperation {
		t.Helper()
		for i := range n {
			if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
				t.Fatal(err)
			}
		}
		return disk(o.Snapshot(), number).operation("write")
	}
	const writes = 50
	d := write(writes)
	first := d.Count // the kernel does not report the end of some
	if first > writes || first < writes*9/10 || d.Bytes != first*4096 || d.Service.Count() != first {
		t.Fatalf("%d writes of %d bytes, %d of them with times, want %d", d.Count, d.Bytes, d.Service.Count(), writes)
	}
	set("iostats", "0")
	if d = write(writes); d.Count > 2*writes || d.Count < first+writes*9/10 {
		t.Errorf("%d writes, want %d", d.Count, 2*writes)
	}
	second := d.Count
	if o.timed || reason(o.Unobserved(), GroupDisks) != "" {
		t.Fatalf("requests had no times, and the programs do not keep them: %q", reason(o.Unobserved(), GroupDisks))
	}
	if n := d.Queue.Count(); n != first {
		t.Errorf("%d of %d writes have a queue time, and half of them began unseen", n, d.Count)
	}
	set("iostats", "1")
	d = write(writes)
	if d.Count != second+writes || d.Bytes > d.Count*4096 || d.Depth != 0 || d.Errors != 0 {
		t.Errorf("%d writes of %d bytes, %d failed, %d in flight, want %d writes", d.Count, d.Bytes, d.Errors, d.Depth, 3*writes)
	}
	if n, q := d.Service.Count(), d.Queue.Count(); n < d.Count*9/10 || n > d.Count || q < 2*writes*9/10 || q > 2*writes {
		t.Errorf("%d service times and %d queue times of %d writes", n, q, d.Count)
	}
	plausible(t, "service", &d.Service)
	plausible(t, "queue", &d.Queue)
}

func TestDepthsThatTheKernelCounts(t *testing.T) {
	counts := func(reads, writes uint64) func(string) uint64 {
		return func(operation string) uint64 {
			if operation == "read" {
				return reads
			}
			return writes
		}
	}
	for _, tt := range []struct {
		reads, writes uint64
		operations    []string
		want          []uint64
	}{
		{3, 5, []string{"read", "write", "flush", "discard"}, []uint64{3, 5, 0, 0}},
		{3, 5, []string{"discard", "write-zeroes"}, []uint64{5, 0}},
		{3, 5, []string{"flush"}, []uint64{0}},
		{math.MaxUint64, math.MaxUint64, []string{"read", "write"}, []uint64{0, 0}}, // nobody knows
	} {
		var list []DiskOperation
		for _, name := range tt.operations {
			list = append(list, DiskOperation{Operation: name})
		}
		setDepths(list, counts(tt.reads, tt.writes))
		for i, want := range tt.want {
			if list[i].Depth != want {
				t.Errorf("%v: %d of %s, want %d", tt.operations, list[i].Depth, list[i].Operation, want)
			}
		}
	}
}
