package ublk_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/ublk"
)

// The guest of make test-vm-new has two disks of 1 GiB that nobody needs.
const (
	rawDisk        = "/dev/vda"
	fileSystemDisk = "/dev/vdb"
)

// requireZeroCopy skips t where the driver does not go without copies, or there is no
// disk to try it on.
func requireZeroCopy(t testing.TB) {
	t.Helper()
	testenv.RequireUblk(t)
	features, err := ublk.DriverFeatures()
	if err != nil {
		t.Fatal(err)
	}
	_, missing := os.Stat(fileSystemDisk)
	if features.Has(ublk.ZeroCopyFeatures) && missing == nil {
		return
	}
	const needs = "needs Linux 7.0 and the disks " + rawDisk + " and " + fileSystemDisk
	if slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm-new") {
		t.Fatal(needs)
	}
	t.Skip(needs + " (make test-vm-new does not skip it)")
}

// blankDisk zeroes the beginning of the raw disk.
func blankDisk(t testing.TB) {
	t.Helper()
	d := openDisk(t, rawDisk)
	r := [2]uint64{0, 64 << 20}
	if err := errors.Join(blockIoctl(int(d.file.Fd()), blkZeroOut, &r), d.file.Close()); err != nil {
		t.Fatal(err)
	}
}

// onDisk is a device on a file or disk, closed at the end of the test.
func onDisk(t testing.TB, path string, access filedev.Access) *filedev.Device {
	t.Helper()
	d, err := filedev.Open(path, filedev.Options{Access: access})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// fileOnDisk is a file of size bytes in a file system on the other disk.
func fileOnDisk(t testing.TB, size int64) string {
	t.Helper()
	command(t, "mkfs.ext4", "-q", "-F", fileSystemDisk)
	dir := t.TempDir()
	command(t, "mount", fileSystemDisk, dir)
	t.Cleanup(func() { command(t, "umount", dir) })
	path := filepath.Join(dir, "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantPassed wants every read and write of target to have gone without a copy.
func wantPassed(t testing.TB, target *ublk.Target) {
	t.Helper()
	s := target.Stats()
	if err := target.Copies(); err != nil || s.Passed == 0 || s.Passed != s.Requests[datapath.OpRead]+s.Requests[datapath.OpWrite] || s.Errors != 0 {
		t.Errorf("not all without a copy (%v): %+v", err, s)
	}
}

func TestBytesGoPastTheServer(t *testing.T) {
	requireZeroCopy(t)
	blankDisk(t)
	target := start(t, ublk.Config{Device: onDisk(t, rawDisk, ""), ID: ublk.AnyID, Queues: 2, Reactors: reactors(t, 2)})
	var group sync.WaitGroup
	verifiers := make([]*verifier, 8)
	for i := range verifiers {
		verifiers[i] = newVerifier(t, openDisk(t, target.Path()), uint64(i)*4<<20, 1024, 21)
		group.Go(func() {
			for range 60 {
				if err := verifiers[i].step(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	wantPassed(t, target)
	f, err := os.OpenFile(rawDisk, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range verifiers { // what is on the disk itself
		_ = v.disk.file.Close() // nothing is dirty past the page cache
		v.disk.file = f
		if err := v.all(); err != nil {
			t.Error(err)
		}
	}
	_ = f.Close() // read-only
}

// TestMemoryOfAnyShapeGoesPastTheServer writes and reads from pieces of memory that begin
// within pages and have odd lengths.
func TestMemoryOfAnyShapeGoesPastTheServer(t *testing.T) {
	requireZeroCopy(t)
	blankDisk(t)
	target := start(t, ublk.Config{Device: onDisk(t, rawDisk, ""), ID: ublk.AnyID})
	fd := int(openDisk(t, target.Path()).file.Fd())
	out, in := aligned(t, 64<<10), aligned(t, 64<<10)
	for n, shape := range [][]int{{512}, {512, 3584}, {1536, 512, 4096, 2048}, {4096, 512}, {32 << 10, 1024, 4608}} {
		offset := int64(n+1)<<20 + 512*int64(n)
		stamp(out, uint64(offset), uint64(n))
		clear(in)
		var from, to [][]byte
		at := 512
		for _, length := range shape {
			from, to = append(from, out[at:at+length]), append(to, in[at:at+length])
			at += length + 512
		}
		total := 0
		for _, length := range shape {
			total += length
		}
		if w, err := unix.Pwritev(fd, from, offset); err != nil || w != total {
			t.Errorf("%v: wrote %d, %v", shape, w, err)
		}
		if r, err := unix.Preadv(fd, to, offset); err != nil || r != total {
			t.Errorf("%v: read %d, %v", shape, r, err)
		}
		for i := range from {
			if !bytes.Equal(from[i], to[i]) {
				t.Errorf("%v: piece %d came back changed", shape, i)
			}
		}
	}
	if s := target.Stats(); s.Passed == 0 || s.Errors != 0 {
		t.Errorf("statistics %+v", s)
	}
}

func TestFioVerifiesWhatWentPastTheServer(t *testing.T) {
	requireZeroCopy(t)
	fio := testenv.RequireCommand(t, "fio", "fio")
	target := start(t, ublk.Config{Device: onDisk(t, rawDisk, ""), ID: ublk.AnyID, Queues: 2, Reactors: reactors(t, 2)})
	command(t, fio, "--name=verify", "--filename="+target.Path(), "--direct=1", "--ioengine=libaio", "--rw=randrw", "--bsrange=4k-128k",
		"--iodepth=16", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=22", "--output-format=terse")
	wantPassed(t, target)
}

func TestFileSystemOnAFilePastTheServer(t *testing.T) {
	requireZeroCopy(t)
	path := fileOnDisk(t, 64<<20)
	d := onDisk(t, path, "")
	target := start(t, ublk.Config{Device: d, ID: ublk.AnyID})
	command(t, "mkfs.ext4", "-q", "-F", target.Path())
	dir := t.TempDir()
	command(t, "mount", target.Path(), dir)
	data := make([]byte, 3<<20)
	stamp(data, 0, 23)
	if err := os.WriteFile(filepath.Join(dir, "file"), data, 0o600); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Truncate(path, 96<<20), d.Measure(), target.Resize(within(t))); err != nil {
		t.Error(err)
	}
	command(t, "resize2fs", target.Path())
	command(t, "umount", dir)
	command(t, "fsck.ext4", "-f", "-n", target.Path())
	command(t, "mount", target.Path(), dir)
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file came back with %d bytes, %v", len(got), err)
	}
	command(t, "umount", dir)
	wantPassed(t, target)
}

func TestWhatCannotGoPastTheServerIsCopied(t *testing.T) {
	requireZeroCopy(t)
	fill := func(r *reactor.Reactor) { _, _ = r.AddBuffers(4096) } // the whole table; the ring ends with the test
	for _, test := range []struct {
		name, reason string
		config       func(t *testing.T) ublk.Config
	}{
		{"as asked", "as asked", func(t *testing.T) ublk.Config {
			return ublk.Config{Device: onDisk(t, rawDisk, ""), Copy: true}
		}},
		{"plain buffers", "plain buffers", func(t *testing.T) ublk.Config {
			return ublk.Config{Device: onDisk(t, rawDisk, ""), PlainBuffers: true}
		}},
		{"a store that works on bytes", "works on the bytes", func(t *testing.T) ublk.Config {
			return ublk.Config{Device: memory(t, 64<<20)}
		}},
		{"a layer in between", "works on the bytes", func(t *testing.T) ublk.Config {
			return ublk.Config{Device: filter.NewTrace(onDisk(t, rawDisk, ""), 16)}
		}},
		{"the page cache", "past the page cache", func(t *testing.T) ublk.Config {
			return ublk.Config{Device: onDisk(t, rawDisk, filedev.AccessBuffered)}
		}},
		{"a file in memory", "past the page cache", func(t *testing.T) ublk.Config {
			return ublk.Config{Device: onDisk(t, testenv.TempFileOn(t, "/dev/shm", 64<<20), "")}
		}},
		{"a full table", "table of registered buffers", func(t *testing.T) ublk.Config {
			rs := reactors(t, 1)
			if err := rs[0].Run(fill); err != nil {
				t.Fatal(err)
			}
			return ublk.Config{Device: onDisk(t, rawDisk, ""), Reactors: rs}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			blankDisk(t)
			c := test.config(t)
			c.ID = ublk.AnyID
			target := start(t, c)
			if err := target.Copies(); err == nil || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("copies because %v", err)
			}
			v := newVerifier(t, openDisk(t, target.Path()), 0, 1024, 24)
			for range 20 {
				if err := v.step(); err != nil {
					t.Fatal(err)
				}
			}
			_ = v.disk.file.Close() // nothing is dirty past the page cache
			if s := target.Stats(); s.Passed != 0 || s.Errors != 0 {
				t.Errorf("statistics %+v", s)
			}
		})
	}
}

// picky ends requests whose bytes it would have to see inside the kernel with a status,
// while it is set to one.
type picky struct {
	datapath.Device
	every  atomic.Int32 // of so many one; 0: none
	status atomic.Uint32
}

func (p *picky) FixedBuffers() (int, error) { return datapath.FixedBuffersOf(p.Device) }

func (p *picky) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := p.Device.OpenQueue(r, depth)
	return &pickyQueue{Queue: below, p: p, r: r}, err
}

type pickyQueue struct {
	datapath.Queue
	p     *picky
	r     *reactor.Reactor
	count int32
}

func (q *pickyQueue) Submit(r *datapath.Request) {
	q.count++
	if n := q.p.every.Load(); n > 0 && r.Fixed != 0 && q.count%n == 0 {
		q.r.Defer(&reactor.Deferred{Func: func() { r.Complete(datapath.Status(q.p.status.Load())) }})
		return
	}
	q.Queue.Submit(r)
}

func TestRequestThatTheStoreCannotTakeIsCopied(t *testing.T) {
	requireZeroCopy(t)
	blankDisk(t)
	p := &picky{Device: onDisk(t, rawDisk, "")}
	p.status.Store(uint32(datapath.StatusNotSupported))
	p.every.Store(2)
	counted := filter.NewStats(p, filter.StatsConfig{})
	target := start(t, ublk.Config{Device: counted, ID: ublk.AnyID})
	verified(t, target.Path(), 4, 40, 25)
	s, c := target.Stats(), counted.Snapshot()
	for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite} {
		if o := c.Op(op); o.Count != s.Requests[op] || o.Errors != 0 || o.InFlight != 0 || o.Latency.Count != o.Count {
			t.Errorf("%s is counted as %d, %d errors, %d in flight, %d measured, of %d", op, o.Count, o.Errors, o.InFlight, o.Latency.Count, s.Requests[op])
		}
	}
	p.status.Store(uint32(datapath.StatusIO)) // which is the answer
	p.every.Store(1)
	disk := openDisk(t, target.Path())
	b := aligned(t, 4096)
	if _, err := disk.file.WriteAt(b, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("write that fails: %v", err)
	}
	if _, err := disk.file.ReadAt(b, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read that fails: %v", err)
	}
	_ = disk.file.Close() // nothing is dirty past the page cache
	if s.Errors != 0 || s.Passed == 0 || s.Passed >= s.Requests[datapath.OpRead]+s.Requests[datapath.OpWrite] {
		t.Errorf("statistics %+v", s)
	}
}

// TestHeldRequestsLeaveTheirMemory leaves a device whose requests wait for the store to
// another server in the same process, while the first one's rings live.
func TestHeldRequestsLeaveTheirMemory(t *testing.T) {
	requireZeroCopy(t)
	blankDisk(t)
	d, err := filedev.Open(rawDisk, filedev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := &picky{Device: d}
	p.status.Store(uint32(datapath.StatusShutdown))
	c := ublk.Config{Device: datapath.Checked(p), ID: ublk.AnyID, Reactors: reactors(t, 1), Depth: 32}
	first, err := ublk.Start(within(t), c)
	if err != nil {
		t.Fatal(err)
	}
	v := newVerifier(t, openDisk(t, first.Path()), 0, 1024, 26)
	for range 10 {
		if err := v.step(); err != nil {
			t.Fatal(err)
		}
	}
	p.every.Store(1)
	step := make(chan error, 1)
	go func() { step <- v.step() }() // ends when the device is served again
	select {
	case err := <-step:
		t.Fatalf("the request ended: %v", err)
	case <-time.After(time.Second): // it is held
	}
	if err := errors.Join(first.Detach(within(t)), c.Device.Close()); err != nil {
		t.Fatal(err)
	}
	second, err := ublk.Recover(within(t), ublk.Config{Device: datapath.Checked(onDisk(t, rawDisk, "")), ID: first.ID(), Reactors: reactors(t, 1)})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-step; err != nil {
		t.Error(err)
	}
	for range 10 {
		if err := v.step(); err != nil {
			t.Fatal(err)
		}
	}
	wantPassed(t, second)
	_ = v.disk.file.Close() // nothing is dirty past the page cache
	if err := second.Stop(within(t)); err != nil {
		t.Error(err)
	}
}

func TestKilledServerWhoseBytesWentPastIt(t *testing.T) {
	requireZeroCopy(t)
	blankDisk(t)
	s := startServer(t, "start "+rawDisk+" 2 past copy")
	id := s.id
	work := startLoad(t, id, 27)
	var longest time.Duration
	for n := range 2 * kills() {
		work.goOn()
		began := time.Now()
		s.Kill()
		how := ""
		if n%3 == 1 {
			how = " copying" // a server that cannot do without
		}
		s = startServer(t, fmt.Sprintf("recover %d %s past%s", id, rawDisk, how))
		longest = max(longest, time.Since(began))
	}
	for range 2 {
		work.goOn()
		s.End(t, "detach")
		s = startServer(t, fmt.Sprintf("recover %d %s past", id, rawDisk))
	}
	work.end()
	t.Logf("%d kills, %d steps, longest without a server %v", 2*kills(), work.steps.Load(), longest)
	s.End(t, "stop")
}

func TestRequestsPastTheServerAllocateNothing(t *testing.T) {
	requireZeroCopy(t)
	target := start(t, ublk.Config{Device: onDisk(t, rawDisk, ""), ID: ublk.AnyID})
	fd := int(openDisk(t, target.Path()).file.Fd())
	b := aligned(t, 4096)
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
	wantPassed(t, target)
}

// TestPlacesComeBack starts and removes more devices than the table has room for.
func TestPlacesComeBack(t *testing.T) {
	requireZeroCopy(t)
	d := onDisk(t, rawDisk, "")
	r, err := reactor.Start(reactor.Config{Name: "one", Engine: reactor.EngineRing, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	for n := range 6 {
		target, err := ublk.Start(within(t), ublk.Config{Device: d, ID: ublk.AnyID, Reactors: []*reactor.Reactor{r}, Depth: 1024})
		if err != nil {
			t.Fatal(err)
		}
		disk := openDisk(t, target.Path())
		if _, err := disk.file.ReadAt(aligned(t, 4096), 0); err != nil {
			t.Error(err)
		}
		_ = disk.file.Close() // read only
		if err := target.Copies(); err != nil {
			t.Errorf("device %d: %v", n, err)
		}
		if err := target.Stop(within(t)); err != nil {
			t.Fatal(err)
		}
	}
}
