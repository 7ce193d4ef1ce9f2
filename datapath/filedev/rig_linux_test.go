package filedev

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

var engines = []reactor.EngineKind{reactor.EngineRing, reactor.EngineEpoll}

// onEngines runs f once for each engine of the reactor.
func onEngines(t *testing.T, f func(t *testing.T, engine reactor.EngineKind)) {
	t.Helper()
	for _, engine := range engines {
		t.Run(string(engine), func(t *testing.T) {
			if engine == reactor.EngineRing {
				testenv.RequireIOURing(t)
			}
			f(t, engine)
		})
	}
}

func startReactor(t testing.TB, c reactor.Config) *reactor.Reactor {
	t.Helper()
	c.Log = slog.New(slog.DiscardHandler)
	if c.Workers == 0 {
		c.Workers = 8
	}
	r, err := reactor.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	return r
}

// mustOpen opens a device that is closed, after its clients, at the end of the test.
func mustOpen(t testing.TB, path string, o Options) *Device {
	t.Helper()
	d, err := Open(path, o)
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

// client is a queue with what a test needs to use it.
type client struct {
	t     testing.TB
	d     *Device
	r     *reactor.Reactor
	queue datapath.Queue
}

func newClient(t testing.TB, d *Device, r *reactor.Reactor, depth int) *client {
	t.Helper()
	c := &client{t: t, d: d, r: r}
	var err error
	if e := r.Run(func(r *reactor.Reactor) { c.queue, err = datapath.Checked(d).OpenQueue(r, depth) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	t.Cleanup(func() {
		if c.queue == nil {
			return // closed by the test
		}
		if e := r.Run(func(*reactor.Reactor) { err = c.queue.Close() }); e != nil || err != nil {
			t.Error(e, err)
		}
	})
	return c
}

const requestWait = 20 * time.Second // a request not ended by then is lost

// do submits the requests together and waits for all of them. It sets Tag and Done.
func (c *client) do(requests ...*datapath.Request) {
	c.t.Helper()
	var left atomic.Int64
	left.Store(int64(len(requests)))
	all := make(chan struct{})
	for i, r := range requests {
		r.Tag = uint32(i)
		r.Status = 0xff
		r.Done = func(*datapath.Request) {
			if left.Add(-1) == 0 {
				close(all)
			}
		}
	}
	if err := c.r.Run(func(*reactor.Reactor) {
		for _, r := range requests {
			c.queue.Submit(r)
		}
	}); err != nil {
		c.t.Fatal(err)
	}
	select {
	case <-all:
	case <-time.After(requestWait):
		c.t.Fatalf("%d of %d requests did not end in %v", left.Load(), len(requests), requestWait)
	}
}

func (c *client) status(r *datapath.Request) datapath.Status {
	c.t.Helper()
	c.do(r)
	return r.Status
}

// want fails the test unless every request ends with status s.
func (c *client) want(s datapath.Status, requests ...*datapath.Request) {
	c.t.Helper()
	c.do(requests...)
	for _, r := range requests {
		if r.Status != s {
			c.t.Fatalf("%s of %d bytes at %d, flags %#x: %s, want %s", r.Op, r.Length, r.Offset, uint16(r.Flags), r.Status, s)
		}
	}
}

func (c *client) must(requests ...*datapath.Request) {
	c.t.Helper()
	c.want(datapath.StatusOK, requests...)
}

func write(offset uint64, data []byte) *datapath.Request {
	return &datapath.Request{Op: datapath.OpWrite, Offset: offset, Length: uint64(len(data)), Buf: data}
}

func writeFUA(offset uint64, data []byte) *datapath.Request {
	r := write(offset, data)
	r.Flags = datapath.FlagFUA
	return r
}

func read(offset, length uint64) *datapath.Request {
	return &datapath.Request{Op: datapath.OpRead, Offset: offset, Length: length, Buf: bytes.Repeat([]byte{0x5a}, int(length))}
}

func flush() *datapath.Request { return &datapath.Request{Op: datapath.OpFlush} }

func zeroes(offset, length uint64, flags datapath.Flags) *datapath.Request {
	return &datapath.Request{Op: datapath.OpWriteZeroes, Flags: flags, Offset: offset, Length: length}
}

func discard(offset, length uint64) *datapath.Request {
	return &datapath.Request{Op: datapath.OpDiscard, Offset: offset, Length: length}
}

// expect reads and compares.
func (c *client) expect(offset uint64, want []byte, when string) {
	c.t.Helper()
	r := read(offset, uint64(len(want)))
	c.must(r)
	if at := difference(r.Buf, want); at >= 0 {
		c.t.Fatalf("%s: byte %d of the device is %#02x, want %#02x", when, offset+uint64(at), r.Buf[at], want[at])
	}
}

func difference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// pattern is length bytes, none of them zero, that differ by seed and place.
func pattern(seed, length int) []byte {
	b := make([]byte, length)
	x := uint32(seed)*2654435761 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x) | 1
	}
	return b
}

// run runs a command that has to succeed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(testenv.RequireCommand(t, name, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// requireLoop skips t where there can be no loop devices.
func requireLoop(t testing.TB) {
	t.Helper()
	testenv.RequireRoot(t)
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		const what = "loop devices (/dev/loop-control)"
		if slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-root") {
			t.Fatalf("needs %s, which make test-root must provide", what)
		}
		t.Skipf("needs %s (make test-root does not skip it)", what)
	}
}

// loopDevice makes a block device of a file.
func loopDevice(t testing.TB, file string, sector int, options ...string) string {
	t.Helper()
	requireLoop(t)
	path := run(t, "losetup", append([]string{"--find", "--show", fmt.Sprintf("--sector-size=%d", sector), file}, options...)...)
	t.Cleanup(func() { run(t, "losetup", "--detach", path) })
	return path
}

// mount mounts a filesystem for the time of the test.
func mount(t testing.TB, args ...string) (dir string) {
	t.Helper()
	testenv.RequireRoot(t)
	dir = t.TempDir()
	run(t, "mount", append(args, dir)...)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// ext4 mounts a fresh ext4 of size bytes, and says on what device it is.
func ext4(t testing.TB, size int64) (dir, device string) {
	t.Helper()
	requireLoop(t)
	device = loopDevice(t, testenv.TempFileOn(t, testenv.TmpfsDir(t), size), 512)
	run(t, "mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard", device)
	return mount(t, device), device
}

// diskDir is a directory on a disk filesystem: one of memory as root, where
// fdatasync does not take its time, else the one for temporary files.
func diskDir(t testing.TB) string {
	t.Helper()
	if os.Geteuid() == 0 {
		if _, err := os.Stat("/dev/loop-control"); err == nil {
			dir, _ := ext4(t, 64<<20)
			return dir
		}
	}
	return t.TempDir()
}

// newFile makes a sparse file of size bytes.
func newFile(t testing.TB, dir string, size int64) string {
	t.Helper()
	return testenv.TempFileOn(t, dir, size)
}

// tempName is a name in a directory of the test's own.
func tempName(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "file")
}
