package fuse_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// serveVariable makes the test binary a server that can be killed, see serve,
// keeperVariable a keeper at that socket, and hammerVariable a program that reads and
// writes that file for ever.
const (
	serveVariable  = "ASHLAR_FUSE_SERVE"
	keeperVariable = "ASHLAR_FUSE_KEEPER"
	hammerVariable = "ASHLAR_FUSE_HAMMER"
)

const wait = 60 * time.Second // for one step, on a loaded machine

func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv(serveVariable) != "":
		err = serve(os.Getenv(serveVariable))
	case os.Getenv(keeperVariable) != "":
		err = keep(os.Getenv(keeperVariable))
	case os.Getenv(hammerVariable) != "":
		err = hammer(os.Getenv(hammerVariable))
	case alone():
		goleak.VerifyTestMain(m)
	default:
		os.Exit(testenv.RunInNamespace())
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// alone tells whether the tests are in a mount namespace of their own, or need none.
func alone() bool {
	return testenv.InNamespace() || os.Geteuid() != 0 || slices.ContainsFunc(os.Args, func(s string) bool {
		return strings.HasPrefix(s, "-test.fuzz") && !strings.HasPrefix(s, "-test.fuzzcachedir")
	})
}

// keep is a keeper until standard input ends.
func keep(socket string) error {
	s, err := keeper.Start(keeper.Config{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	fmt.Println("listens")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return s.Close()
}

// hammer reads and writes a file from many threads until it is killed.
func hammer(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	failed := make(chan error)
	for i := range 16 {
		go func() { // ends with the process
			b := make([]byte, 128<<10)
			for {
				if _, err := f.ReadAt(b, int64(i)<<17); err != nil {
					failed <- err
				}
				if _, err := f.WriteAt(b, int64(i)<<17); err != nil {
					failed <- err
				}
			}
		}()
	}
	fmt.Println("begins")
	return <-failed
}

// serve exports a file until standard input ends: "start|recover NAME FILE DIR SOCKET QUEUES", SOCKET
// being - for none. It prints the device's path when it is served. What it then reads
// says how it ends: "detach", or else it stops the device.
func serve(what string) error {
	f := strings.Fields(what)
	verb, name, file, dir, socket := f[0], f[1], f[2], f[3], f[4]
	queues, err := strconv.Atoi(f[5])
	if err != nil {
		return err
	}
	d, err := openLocked(file)
	if err != nil {
		return err
	}
	c := fuse.Config{Device: d, Name: name, Dir: dir, Loop: fuse.AnyLoop, Queues: queues}
	for i := range queues {
		r, err := reactor.Start(reactor.Config{Name: "serve" + strconv.Itoa(i), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		c.Reactors = append(c.Reactors, r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if socket != "-" {
		if c.Keeper, err = keeper.Open(ctx, keeper.Options{Socket: socket}); err != nil {
			return err
		}
	}
	var t *fuse.Target
	if verb == "start" {
		t, err = fuse.Start(ctx, c)
	} else {
		t, err = fuse.Recover(ctx, c)
	}
	if err != nil {
		return err
	}
	fmt.Println(t.Path())
	line, _ := io.ReadAll(os.Stdin)
	if string(line) == "detach" {
		return t.Detach(ctx)
	}
	return t.Stop(ctx)
}

// openLocked opens a file once the process that had it is gone.
func openLocked(path string) (d *filedev.Device, err error) {
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		if d, err = filedev.Open(path, filedev.Options{}); err == nil || time.Now().After(deadline) {
			return d, err
		}
	}
}

func startProcess(t testing.TB, variable string) *testenv.Child {
	t.Helper()
	p := testenv.NewChild(variable)
	p.Start(t)
	return p
}

func startServer(t testing.TB, format string, args ...any) *testenv.Child {
	t.Helper()
	return startProcess(t, serveVariable+"="+fmt.Sprintf(format, args...))
}

// startKeeper runs a keeper in a process of its own until the end of the test.
func startKeeper(t testing.TB) (socket string, p *testenv.Child) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "keeper")
	p = startProcess(t, keeperVariable+"="+socket)
	t.Cleanup(p.EndAnyhow) // killed by a test, or ended
	return socket, p
}

func openKeeper(t testing.TB, socket string) *keeper.Client {
	t.Helper()
	k, err := keeper.Open(within(t), keeper.Options{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

func reactors(t testing.TB, n int, engine reactor.EngineKind) []*reactor.Reactor {
	t.Helper()
	var list []*reactor.Reactor
	for i := range n {
		r, err := reactor.Start(reactor.Config{Name: "r" + strconv.Itoa(i), Engine: engine, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Stop)
		list = append(list, r)
	}
	return list
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	t.Cleanup(cancel)
	return ctx
}

// require skips a test where there can be no device.
func require(t testing.TB) {
	t.Helper()
	testenv.RequireRoot(t)
	if err := fuse.Supported(); err != nil {
		t.Skipf("needs FUSE and loop devices: %v", err)
	}
}

// complete fills in what a test does not care about.
func complete(t testing.TB, c fuse.Config) fuse.Config {
	t.Helper()
	if c.Reactors == nil {
		c.Reactors = reactors(t, max(c.Queues, 1), reactor.EngineAuto)
	}
	if c.Dir == "" {
		c.Dir = t.TempDir()
	}
	if c.Name == "" {
		c.Name = testName(t)
	}
	return c
}

// testName is a name that no test that died has left a device of.
func testName(t testing.TB) string {
	return fmt.Sprintf("test/%d/%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", " "))
}

// start serves c until the end of the test.
func start(t testing.TB, c fuse.Config) *fuse.Target {
	t.Helper()
	require(t)
	c = complete(t, c)
	c.Device = datapath.Checked(c.Device) // the caller closes what is below
	target, err := fuse.Start(within(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, target) })
	return target
}

func stop(t testing.TB, target *fuse.Target) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if err := target.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func memory(t testing.TB, c memdev.Config) *memdev.Device {
	t.Helper()
	d, err := memdev.New(c)
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

// run runs a command and returns what it says.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryRun(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*wait)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

// openDevice opens a block device for direct I/O.
func openDevice(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // a test may have
	return f
}

func contextWithTimeout(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// startElsewhere mounts a device in another mount namespace until the function that it
// returns is called.
func startElsewhere(t testing.TB, device, where string) (end func()) {
	t.Helper()
	c := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `mount "$0" "$1" && echo mounted && read line; umount "$1"`, device, where)
	input, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var b [20]byte
	if n, _ := out.Read(b[:]); string(b[:n]) != "mounted\n" {
		t.Errorf("mount in another namespace: %q", b[:n])
	}
	return func() {
		_ = input.Close()
		_ = c.Wait() // seen by what follows
	}
}
