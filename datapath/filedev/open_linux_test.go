package filedev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// impatient shortens the wait for a file that is held.
func impatient(t *testing.T) {
	before := lockPatience
	lockPatience = 50 * time.Millisecond
	t.Cleanup(func() { lockPatience = before })
}

// refuses wants Open to fail with an error that names the path and says each of
// the words.
func refuses(t *testing.T, path string, o Options, words ...string) error {
	t.Helper()
	d, err := Open(path, o)
	if err == nil {
		_ = d.Close() // the test has failed
		t.Fatalf("%s was opened", path)
	}
	for _, word := range append(words, path) {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
	return err
}

func TestOpenRefusesWhatCannotBeServed(t *testing.T) {
	testenv.CheckFDs(t)
	impatient(t)
	name := tempName(t)
	if err := refuses(t, name, Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v is not fs.ErrNotExist", err)
	}
	refuses(t, t.TempDir(), Options{}, "directory", "only regular files and block devices")
	refuses(t, "/dev/null", Options{}, "character device")
	fifo := tempName(t)
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, fifo, Options{}, "pipe")
	for _, size := range []int64{0, 511} {
		refuses(t, newFile(t, t.TempDir(), size), Options{}, fmt.Sprintf("holds %d bytes", size), "truncate")
	}
	file := newFile(t, t.TempDir(), 4096)
	refuses(t, file, Options{Access: "fast"}, `"fast"`, "auto, direct, inline, buffered")
	refuses(t, file, Options{InFlightMax: -1}, "must not be negative")
}

func TestOpenRefusesAFileThatIsServed(t *testing.T) {
	testenv.CheckFDs(t)
	impatient(t)
	for _, access := range []Access{AccessAuto, AccessBuffered, AccessInline} {
		file := newFile(t, t.TempDir(), 1<<20)
		for _, first := range []bool{false, true} {
			d, err := Open(file, Options{Access: access, ReadOnly: first})
			if err != nil {
				t.Fatal(err)
			}
			for _, second := range []bool{false, true} {
				if first && second {
					e, err := Open(file, Options{Access: access, ReadOnly: true})
					if err != nil {
						t.Fatalf("read-only twice: %v", err)
					}
					_ = e.Close() // read-only
					continue
				}
				refuses(t, file, Options{Access: access, ReadOnly: second}, "another process has it open", "lock")
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestOpenWaitsForAFileThatIsLetGo(t *testing.T) {
	file := newFile(t, t.TempDir(), 1<<20)
	d, err := Open(file, Options{})
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends by itself
		time.Sleep(100 * time.Millisecond)
		_ = d.Close() // nothing written
	}()
	e, err := Open(file, Options{})
	if err != nil {
		t.Fatal(err)
	}
	_ = e.Close() // nothing written
}

// asNobody runs f on a thread without root's permissions.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() { // ends with f, and its thread with it
		runtime.LockOSThread()
		if os.Geteuid() == 0 {
			if err := unix.Setfsuid(65534); err != nil {
				done <- err
				return
			}
		}
		f()
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestOpenSaysWhenAFileMayNotBeWritten(t *testing.T) {
	dir, err := os.MkdirTemp("", "ashlar-test-") // its parents can be searched by all
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a directory for tests
	file := newFile(t, dir, 1<<20)
	for name, mode := range map[string]fs.FileMode{dir: 0o755, file: 0o444} {
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	asNobody(t, func() {
		d, err := Open(file, Options{})
		if err == nil {
			_ = d.Close() // the test has failed
		}
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "--read-only") {
			t.Errorf("opening a file that may only be read: %v", err)
		}
		if d, err = Open(file, Options{ReadOnly: true}); err != nil {
			t.Errorf("read-only: %v", err)
		} else {
			_ = d.Close() // read-only
		}
	})
	if err := os.Chmod(file, 0); err != nil {
		t.Fatal(err)
	}
	asNobody(t, func() {
		if _, err := Open(file, Options{ReadOnly: true}); !errors.Is(err, fs.ErrPermission) || strings.Contains(err.Error(), "--read-only") {
			t.Errorf("opening a file that may not be read: %v", err)
		}
	})
}

func TestOpenRefusesABlockDeviceInUse(t *testing.T) {
	impatient(t)
	_, device := ext4(t, 8<<20)
	refuses(t, device, Options{}, "in use", "mounted")
	d, err := Open(device, Options{ReadOnly: true})
	if err != nil {
		t.Fatalf("read-only: %v", err)
	}
	_ = d.Close() // read-only

	device = loopDevice(t, newFile(t, t.TempDir(), 8<<20), 512)
	mustOpen(t, device, Options{})
	refuses(t, device, Options{}, "in use")
	refuses(t, device, Options{ReadOnly: true}, "another process has it open")
	if err := unix.Mount(device, t.TempDir(), "ext4", 0, ""); err != unix.EBUSY {
		t.Errorf("a device that is served was mounted: %v", err)
	}
}

func TestOpenOfAReadOnlyBlockDevice(t *testing.T) {
	device := loopDevice(t, newFile(t, t.TempDir(), 8<<20), 512, "--read-only")
	refuses(t, device, Options{}, "write-protected", "--read-only")
	d := mustOpen(t, device, Options{ReadOnly: true})
	c := newClient(t, d, startReactor(t, reactor.Config{}), 1)
	c.expect(0, make([]byte, 4096), "an empty device")
}

func TestAccessIsChosenByTheFile(t *testing.T) {
	disk, memory := diskDir(t), testenv.TmpfsDir(t)
	for _, test := range []struct {
		dir       string
		ask, want Access
	}{
		{disk, "", AccessDirect},
		{disk, AccessDirect, AccessDirect},
		{disk, AccessBuffered, AccessBuffered},
		{disk, AccessInline, AccessInline},
		{memory, AccessAuto, AccessInline},
		{memory, AccessBuffered, AccessBuffered},
	} {
		d, err := Open(newFile(t, test.dir, 1<<20), Options{Access: test.ask})
		if err != nil {
			t.Fatal(err)
		}
		way, reason := d.Access()
		if way != test.want || reason == "" {
			t.Errorf("%s in %s: %s (%s), want %s", test.ask, test.dir, way, reason, test.want)
		}
		if d.InFlightMax() < 1 || d.Path() == "" {
			t.Errorf("at most %d in flight, path %q", d.InFlightMax(), d.Path())
		}
		i := d.Info()
		if got, want := i.Has(datapath.FeatureCache), way == AccessBuffered; got != want {
			t.Errorf("%s: cache %t", way, got)
		}
		if got, want := i.Has(datapath.FeatureImmediate), way == AccessInline; got != want {
			t.Errorf("%s: immediate %t", way, got)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	// Linux 6.6 has O_DIRECT on tmpfs; before, it is refused.
	d, err := Open(newFile(t, memory, 1<<20), Options{Access: AccessDirect})
	if err != nil {
		if !strings.Contains(err.Error(), "direct I/O does not work here") || !strings.Contains(err.Error(), "--access buffered") {
			t.Errorf("direct on tmpfs: %v", err)
		}
		return
	}
	if way, _ := d.Access(); way != AccessDirect {
		t.Errorf("direct on tmpfs: %s", way)
	}
	_ = d.Close() // nothing written
}

// TestFilesystemWithoutDirectIO uses ramfs, which has none.
func TestFilesystemWithoutDirectIO(t *testing.T) {
	dir := mount(t, "-t", "ramfs", "ramfs")
	file := newFile(t, dir, 1<<20)
	if d := mustOpen(t, file, Options{}); d.access != AccessInline {
		t.Errorf("a file in memory: %s", d.access)
	}
	refuses(t, newFile(t, dir, 1<<20), Options{Access: AccessDirect}, "direct I/O does not work here", "--access buffered")
}

func TestOpenQueueReservesOrFails(t *testing.T) {
	for _, access := range []Access{AccessDirect, AccessBuffered} {
		t.Run(string(access), func(t *testing.T) {
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				const most = 40
				d := mustOpen(t, newFile(t, t.TempDir(), 1<<20), Options{Access: access})
				r := startReactor(t, reactor.Config{Engine: engine, IODepthMax: most})
				own := 0 // operations a queue needs beyond its depth
				if access == AccessDirect {
					own = bounceCount
				}
				fails := func(r *reactor.Reactor, depth int, word string) {
					t.Helper()
					_, err := d.OpenQueue(r, depth)
					if err == nil || !strings.Contains(err.Error(), word) || !strings.Contains(err.Error(), d.path) {
						t.Errorf("a queue of depth %d: %v", depth, err)
					}
				}
				if err := r.Run(func(r *reactor.Reactor) {
					for range 300 { // more often than there are places for registered files
						fails(r, most+1, "exceed the bound")
						fails(r, most-own+1, "exceed the bound")
						fails(r, 0, "at least 1")
						q, err := d.OpenQueue(r, most-own)
						if err != nil {
							t.Error(err)
							return
						}
						fails(r, 1, "exceed the bound")
						if err := q.Close(); err != nil {
							t.Error(err)
						}
					}
				}); err != nil {
					t.Fatal(err)
				}
				if n := len(*d.queues.Load()); n != 0 || d.depth != 0 {
					t.Errorf("%d queues of depth %d left", n, d.depth)
				}
			})
		})
	}
}

func TestQueuesOfADeviceAreBounded(t *testing.T) {
	d := mustOpen(t, newFile(t, testenv.TmpfsDir(t), 1<<20), Options{})
	for i := range 3 {
		r := startReactor(t, reactor.Config{Engine: reactor.EngineEpoll, IODepthMax: 1 << 15})
		if err := r.Run(func(r *reactor.Reactor) {
			depth := 1 << 15
			if i == 1 {
				depth--
			}
			q, err := d.OpenQueue(r, depth)
			if (err == nil) != (i < 2) {
				t.Errorf("queue %d of depth %d: %v", i, depth, err)
			}
			if err == nil {
				t.Cleanup(func() {
					if err := r.Run(func(*reactor.Reactor) { _ = q.Close() }); err != nil { // nothing in flight
						t.Error(err)
					}
				})
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestQueueIsClosedInsideItsLastCompletion(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		for _, o := range []Options{{Access: AccessDirect, InFlightMax: 1}, {Access: AccessBuffered, InFlightMax: 1}, {Access: AccessInline}} {
			d := mustOpen(t, newFile(t, diskDir(t), 1<<20), o)
			r := startReactor(t, reactor.Config{Engine: engine})
			other := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 16)
			for range 20 {
				const depth = 16
				done := make(chan error, 1)
				if err := r.Run(func(r *reactor.Reactor) {
					q, err := datapath.Checked(d).OpenQueue(r, depth)
					if err != nil {
						done <- err
						return
					}
					left := depth
					for i := range depth {
						request := write(uint64(i*1000), pattern(i, 1000)) // wait for bouncers, regions and places
						if i%4 == 3 {
							request = write(uint64(i/4)*4096, directBlock(4096))
						}
						request.Tag = uint32(i)
						request.Done = func(*datapath.Request) {
							if left--; left == 0 {
								done <- q.Close()
							}
						}
						q.Submit(request)
					}
				}); err != nil {
					t.Fatal(err)
				}
				other.must(write(100, pattern(1, 300)), write(8192, directBlock(4096)))
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func TestDeviceClosesItsFiles(t *testing.T) {
	testenv.CheckFDs(t)
	for _, access := range []Access{AccessDirect, AccessBuffered, AccessInline} {
		d, err := Open(filepath.Clean(newFile(t, t.TempDir(), 1<<20)), Options{Access: access})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}
