package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These tests need a kernel with the nbd driver, root, and nobody else's devices:
// test/vm runs this test binary in User Mode Linux with the variables below.
const (
	guestBinary  = "ASHLAR_GUEST_BINARY"  // path of ashlar; without it the tests are skipped
	guestDir     = "ASHLAR_GUEST_DIR"     // on a file system with room
	guestConnect = "ASHLAR_GUEST_CONNECT" // this process attaches the socket named, and ends
	guestWeak    = "ASHLAR_GUEST_WEAK"    // it gives up CAP_SYS_ADMIN before
	guestLong    = "ASHLAR_TEST_LONG"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(guestConnect); socket != "" {
		if err := connectAndLeave(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func connectAndLeave(socket string) error {
	if os.Getenv(guestWeak) != "" {
		runtime.LockOSThread() // capabilities are a thread's; this one ends with the process
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		if err := unix.Capget(&header, &sets[0]); err != nil {
			return err
		}
		sets[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		sets[0].Permitted &^= 1 << unix.CAP_SYS_ADMIN
		if err := unix.Capset(&header, &sets[0]); err != nil {
			return err
		}
	}
	d, err := Open(Options{})
	if err != nil {
		return err
	}
	device, err := d.Connect(context.Background(), Config{Dial: Unix(socket), Export: "data", Backend: "left/behind"})
	if err != nil {
		return err
	}
	fmt.Println(device.Path)
	return d.Close()
}

// guest is a server with one volume, in the guest.
type guest struct {
	t       *testing.T
	binary  string
	dir     string
	socket  string // for NBD
	control string
	driver  *Driver

	mu     sync.Mutex
	server *exec.Cmd // guarded by mu
	log    bytes.Buffer
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	binary := os.Getenv(guestBinary)
	if binary == "" {
		t.Skip("needs a guest kernel with nbd (make test-uml runs it)")
	}
	dir, err := os.MkdirTemp(os.Getenv(guestDir), "attach-*")
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, binary: binary, dir: dir, socket: filepath.Join(dir, "nbd.sock"), control: filepath.Join(dir, "control.sock")}
	if g.driver, err = Open(Options{}); err != nil {
		t.Fatal(err)
	}
	g.shell("dmesg -C") // only what this test causes counts
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the server:\n%s", g.log.String())
			kernel, _ := exec.Command("sh", "-c", "dmesg | tail -n 40").CombinedOutput() // for reading
			t.Logf("the kernel:\n%s", kernel)
		}
		g.clear()
		g.kill()
		if err := g.driver.Close(); err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(dir) // in a guest that ends soon
	})
	return g
}

// clear detaches what a test that failed has left.
func (g *guest) clear() {
	devices, err := g.driver.List()
	if err != nil {
		g.t.Error(err)
	}
	for _, device := range devices {
		g.t.Errorf("left attached: %+v", device)
		for _, dir := range device.Mounts {
			_ = unix.Unmount(dir, unix.MNT_DETACH) // see Disconnect
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := g.driver.Disconnect(ctx, device.Index, DisconnectOptions{Force: true}); err != nil {
			g.t.Error(err)
		}
		cancel()
	}
}

// serve starts the daemon; the first time it has a volume made.
func (g *guest) serve(args ...string) {
	g.t.Helper()
	g.start(append([]string{"serve", "--data-dir", g.dir + "/node", "--socket", g.control, "--nbd-socket", g.socket,
		"--default-pool", "512MiB"}, args...)...)
}

func (g *guest) start(args ...string) {
	g.t.Helper()
	c := exec.Command(g.binary, args...)
	c.Stdout, c.Stderr = &g.log, &g.log
	if err := c.Start(); err != nil {
		g.t.Error(err)
		return
	}
	g.mu.Lock()
	g.server = c
	g.mu.Unlock()
}

// kill ends the daemon as a crash would.
func (g *guest) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.server != nil {
		_ = g.server.Process.Kill() // it may have ended
		_ = g.server.Wait()         // by that signal
		g.server = nil
	}
}

// ask runs a command of ashlar against the daemon.
func (g *guest) ask(args ...string) []byte {
	g.t.Helper()
	out, err := g.try(args...)
	if err != nil {
		g.t.Fatalf("ashlar %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (g *guest) try(args ...string) ([]byte, error) {
	c := exec.Command(g.binary, args...)
	c.Env = append(os.Environ(), "ASHLAR_SERVER=unix://"+g.control)
	return c.CombinedOutput()
}

func (g *guest) volume(size string) {
	g.t.Helper()
	eventually(g.t, "the daemon answers", func() bool { _, err := g.try("volume", "list"); return err == nil })
	g.ask("volume", "create", "data", "--size", size)
}

func (g *guest) config() Config {
	return Config{Dial: Unix(g.socket), Export: "data", BlockSize: 4096, RetryAfter: 2 * time.Second, DeadTimeout: 2 * time.Minute}
}

func (g *guest) connect(c Config) Device {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	device, err := g.driver.Connect(ctx, c)
	if err != nil {
		g.t.Fatal(err)
	}
	return device
}

func (g *guest) disconnect(index Index) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := g.driver.Disconnect(ctx, index, DisconnectOptions{}); err != nil {
		g.t.Error(err)
	}
}

// keep runs Keep until the test ends or stop is called.
func (g *guest) keep(index Index, c Config) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.driver.Keep(ctx, index, c) }() // ends with ctx
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			g.t.Errorf("Keep ended with %v", err)
		}
	})
	g.t.Cleanup(stop)
	return stop
}

func (g *guest) shell(format string, args ...any) string {
	g.t.Helper()
	text := fmt.Sprintf(format, args...)
	out, err := exec.Command("sh", "-ec", text).CombinedOutput()
	if err != nil {
		g.t.Fatalf("%s: %v\n%s", text, err, out)
	}
	return string(out)
}

func (g *guest) mkfs(fs, path string) {
	g.t.Helper()
	g.shell("%s %s", map[string]string{"ext4": "mkfs.ext4 -q -F -E nodiscard", "xfs": "mkfs.xfs -q -f -K"}[fs], path)
}

// mount mounts a device and unmounts it at the end, if it still is.
func (g *guest) mount(path string, options ...string) string {
	g.t.Helper()
	dir := filepath.Join(g.dir, "mnt of "+filepath.Base(path)) // with a blank, as people have
	if err := os.MkdirAll(dir, 0o755); err != nil {
		g.t.Fatal(err)
	}
	g.shell("mount %s %s '%s'", strings.Join(options, " "), path, dir)
	g.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // mostly not mounted any more
	return dir
}

func (g *guest) unmount(dir string) {
	g.t.Helper()
	if err := unix.Unmount(dir, 0); err != nil {
		g.t.Errorf("unmount %s: %v", dir, err)
	}
}

func (g *guest) check(fs, path string) {
	g.t.Helper()
	g.shell("%s %s 2>&1", map[string]string{"ext4": "e2fsck -fn", "xfs": "xfs_repair -n"}[fs], path)
}

// quiet fails the test when the kernel saw an error.
func (g *guest) quiet() {
	g.t.Helper()
	if out, _ := exec.Command("sh", "-c", `dmesg | grep -iE 'I/O error|remount|corrupt|shut(ting)? ?down file|Buffer I/O'`).Output(); len(out) > 0 {
		g.t.Errorf("the kernel complained:\n%s", out)
	}
}

// probe writes and syncs a file again and again, as a database does its log, and
// returns the longest it took.
func (g *guest) probe(path string) (stop func() (longest time.Duration, count int)) {
	var end atomic.Bool
	done := make(chan struct{})
	var longest time.Duration
	var count int
	go func() { // ends when end is set
		defer close(done)
		f, err := os.Create(path)
		if err != nil {
			g.t.Error(err)
			return
		}
		defer f.Close()
		block := make([]byte, 4096)
		for !end.Load() {
			began := time.Now()
			_, err := f.WriteAt(block, int64(count%16)*4096)
			if err = errors.Join(err, f.Sync()); err != nil {
				g.t.Errorf("after %v: %v", time.Since(began), err)
				return
			}
			longest = max(longest, time.Since(began))
			count++
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return func() (time.Duration, int) {
		end.Store(true)
		<-done
		return longest, count
	}
}

func (g *guest) load(dir string, end *atomic.Bool) (passes int, err error) {
	for !end.Load() {
		out, err := exec.Command("fio", "--name=verify", "--directory="+dir, "--size=24M", "--rw=randwrite", "--bsrange=4k-64k", "--ioengine=libaio",
			"--iodepth=16", "--direct=1", "--fsync=64", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0",
			"--continue_on_error=none", "--eta=never", fmt.Sprintf("--randseed=%d", passes)).CombinedOutput()
		if err != nil {
			return passes, fmt.Errorf("%w\n%s", err, out)
		}
		passes++
	}
	return passes, nil
}

func TestGuestRestartsUnderLoad(t *testing.T) {
	kills := 5
	if os.Getenv(guestLong) == "1" {
		kills = 50
	}
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			g := newGuest(t)
			g.restarts(fs, g.config(), kills, (*guest).kill)
		})
	}
}

func TestGuestRestartsWithOneConnection(t *testing.T) {
	g := newGuest(t)
	c := g.config()
	c.Connections, c.RetryAfter = 1, 0
	g.restarts("ext4", c, 5, (*guest).kill)
}

// restarts ends the daemon and starts it again, under load on a file system.
func (g *guest) restarts(fs string, c Config, count int, end func(*guest)) {
	t := g.t
	g.serve()
	g.volume("400MiB")
	device := g.connect(c)
	stop := g.keep(device.Index, c)
	g.mkfs(fs, device.Path)
	dir := g.mount(device.Path)

	var over atomic.Bool
	loaded := make(chan error, 1)
	passes := 0
	go func() { // ends when over is set
		n, err := g.load(dir, &over)
		passes = n
		loaded <- err
	}()
	ended := g.probe(filepath.Join(dir, "probe"))
	random := rand.New(rand.NewPCG(1, 2))
	for range count {
		time.Sleep(time.Duration(500+random.IntN(2500)) * time.Millisecond)
		end(g)
		time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
		g.serve()
		if t.Failed() {
			break
		}
	}
	over.Store(true)
	if err := <-loaded; err != nil {
		t.Errorf("fio: %v", err)
	}
	longest, probes := ended()
	t.Logf("%s: %d restarts under %d passes of fio; %d synced writes, the longest took %v", fs, count, passes, probes, longest)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Flags&unix.ST_RDONLY != 0 {
		t.Errorf("the file system is read-only: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "last"), []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
	g.unmount(dir)
	g.check(fs, device.Path)
	stop()
	g.disconnect(device.Index)
	g.quiet()
}

func TestGuestGracefulRestartsUnderLoad(t *testing.T) {
	g := newGuest(t)
	g.restarts("ext4", g.config(), 5, (*guest).terminate)
}

func TestGuestSeesANewSize(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	device := g.connect(g.config())
	stop := g.keep(device.Index, g.config())
	g.mkfs("ext4", device.Path)
	dir := g.mount(device.Path)
	g.ask("volume", "resize", "data", "--size", "128MiB")
	grown, err := g.driver.Resize(device.Index, 128<<20)
	if err != nil || grown.Size != 128<<20 {
		t.Errorf("%d bytes, %v", grown.Size, err)
	}
	if got := strings.TrimSpace(g.shell("blockdev --getsize64 %s", device.Path)); got != "134217728" {
		t.Errorf("the kernel has %s bytes", got)
	}
	g.shell("resize2fs %s 2>&1", device.Path)
	if _, err := g.driver.Resize(device.Index, 64<<20); !errors.Is(err, ErrMismatch) {
		t.Errorf("shrinking: %v", err)
	}

	// A size that changes while the server restarts comes with the connections.
	g.ask("volume", "resize", "data", "--size", "160MiB")
	g.kill()
	g.serve()
	eventually(t, "the new size", func() bool {
		device, err = g.driver.Status(device.Index)
		return err == nil && device.Size == 160<<20
	})
	g.shell("resize2fs %s 2>&1", device.Path)
	if err := os.WriteFile(filepath.Join(dir, "a"), make([]byte, 130<<20), 0o600); err != nil {
		t.Error(err)
	}
	g.shell("sync -f '%s'", dir)
	g.unmount(dir)
	g.check("ext4", device.Path)
	stop()
	g.disconnect(device.Index)
	g.quiet()
}

func TestGuestRefusesToDetachWhatIsUsed(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	want := Index(7)
	config := g.config()
	config.Index = &want
	device := g.connect(config)
	if device.Path != "/dev/nbd7" || device.Backend != "data" || device.Size != 64<<20 || device.BlockSize != 4096 || !device.Cached || !device.Discard {
		t.Errorf("%+v", device)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := g.driver.Connect(ctx, config); !errors.As(err, new(*AttachedError)) {
		t.Errorf("attached twice: %v", err)
	}
	config.Backend = "other"
	if _, err := g.driver.Connect(ctx, config); !errors.As(err, new(*InUseError)) {
		t.Errorf("an index that is taken: %v", err)
	}
	if free, err := g.driver.FreeIndex(7); err != nil || free != 8 {
		t.Errorf("free: %v, %v", free, err)
	}
	g.mkfs("ext4", device.Path)
	dir := g.mount(device.Path)
	for _, o := range []DisconnectOptions{{}, {Force: true}} {
		busy := new(BusyError)
		if err := g.driver.Disconnect(ctx, device.Index, o); !errors.As(err, &busy) || len(busy.Device.Mounts) != 1 || busy.Device.Mounts[0] != dir {
			t.Errorf("detached while mounted: %v", err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("still here"), 0o600); err != nil {
		t.Error(err)
	}
	g.unmount(dir)

	claimedByOther, err := claimDevice(device.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.driver.Disconnect(ctx, device.Index, DisconnectOptions{}); !errors.As(err, new(*BusyError)) {
		t.Errorf("detached while claimed: %v", err)
	}
	_ = claimedByOther.Close() // nothing was written

	// What was written to the node and not synced is at the server after a detach.
	f, err := os.OpenFile(device.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("unsynced"), 32<<20); err != nil {
		t.Error(err)
	}
	_ = f.Close() // not synced, on purpose
	g.disconnect(device.Index)
	if err := g.driver.Disconnect(ctx, device.Index, DisconnectOptions{}); !errors.Is(err, ErrNotAttached) {
		t.Errorf("detached twice: %v", err)
	}

	config = g.config()
	config.ReadOnly = true
	device = g.connect(config)
	if !device.ReadOnly {
		t.Errorf("%+v", device)
	}
	if f, err = os.Open(device.Path); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8)
	if _, err := f.ReadAt(got, 32<<20); err != nil && err != io.EOF || string(got) != "unsynced" {
		t.Errorf("%q, %v", got, err)
	}
	_ = f.Close() // read only
	if err := os.WriteFile(device.Path, []byte("x"), 0); err == nil {
		t.Error("a read-only device was written to")
	}
	dir = g.mount(device.Path, "-o", "ro")
	if b, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(b) != "still here" {
		t.Errorf("%q, %v", b, err)
	}
	g.unmount(dir)
	g.disconnect(device.Index)
	g.quiet()
}

func TestGuestListsWhatAProcessLeft(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self)
	c.Env = append(os.Environ(), guestConnect+"="+g.socket)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	device, err := g.driver.Find("left/behind")
	if err != nil || !strings.HasSuffix(strings.TrimSpace(string(out)), device.Path) || device.PID != c.Process.Pid {
		t.Fatalf("%+v, %v; the process said %s", device, err, out)
	}
	// A Keep that begins after the connections died restores them all the same.
	g.kill()
	g.serve()
	config := g.config()
	config.Backend = "left/behind"
	stop := g.keep(device.Index, config)
	g.shell("dd if=/dev/urandom of=%s bs=1M count=8 oflag=direct 2>&1", device.Path)
	stop()
	g.disconnect(device.Index)
	if devices, err := g.driver.List(); err != nil || len(devices) != 0 {
		t.Errorf("%v, %v", devices, err)
	}
	g.quiet()
}

func TestGuestTrimReachesThePool(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("256MiB")
	device := g.connect(g.config())
	g.mkfs("ext4", device.Path)
	dir := g.mount(device.Path)
	used := func() uint64 {
		var v struct {
			Allocated json.Number `json:"allocated_bytes"`
		}
		out := g.ask("volume", "show", "data", "--output", "json")
		if err := json.Unmarshal(out, &v); err != nil || v.Allocated == "" {
			t.Fatalf("%v\n%s", err, out)
		}
		n, err := v.Allocated.Int64()
		if err != nil {
			t.Fatal(err)
		}
		return uint64(n)
	}
	if err := os.WriteFile(filepath.Join(dir, "big"), bytes.Repeat([]byte{7}, 100<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	g.shell("sync -f '%s'", dir)
	full := used()
	if err := os.Remove(filepath.Join(dir, "big")); err != nil {
		t.Fatal(err)
	}
	g.shell("sync -f '%s'; fstrim '%[1]s'; sync -f '%[1]s'", dir)
	empty := used()
	t.Logf("%d MiB in use with the file, %d after fstrim", full>>20, empty>>20)
	if full < 100<<20 || empty > full-90<<20 {
		t.Errorf("fstrim gave nothing back")
	}
	g.unmount(dir)
	g.disconnect(device.Index)
	g.quiet()
}

func TestGuestDetachesFromADeadServer(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	device := g.connect(g.config())
	f, err := os.OpenFile(device.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	g.kill()
	if _, err := f.WriteAt(make([]byte, 1<<20), 0); err != nil { // into the page cache
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if err := g.driver.Disconnect(ctx, device.Index, DisconnectOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("detached although the server has not got everything: %v", err)
	}
	if _, err := g.driver.Status(device.Index); err != nil {
		t.Errorf("it is not attached any more: %v", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	closed := make(chan error, 1)
	go func() { closed <- f.Close() }() // waits for the pages; ends with the device
	if err := g.driver.Disconnect(ctx, device.Index, DisconnectOptions{Force: true}); err != nil {
		t.Errorf("force: %v", err)
	}
	<-closed // with an error or without: the pages are lost
	if _, err := g.driver.Status(device.Index); !errors.Is(err, ErrNotAttached) {
		t.Errorf("still attached: %v", err)
	}
}

// TestGuestFailsAfterTheDeadTimeout has nobody bring the server back in time.
func TestGuestFailsAfterTheDeadTimeout(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	c := g.config()
	c.DeadTimeout, c.RetryAfter = 2*time.Second, time.Second
	device := g.connect(c)
	g.kill()
	began := time.Now()
	out, err := exec.Command("dd", "if="+device.Path, "of=/dev/null", "bs=4k", "count=1", "iflag=direct").CombinedOutput()
	took := time.Since(began)
	if err == nil || took < 1500*time.Millisecond || took > 30*time.Second {
		t.Errorf("after %v: %v\n%s", took, err, out)
	}
	t.Logf("I/O failed after %v", took)
	g.serve()
	stop := g.keep(device.Index, c) // late is better than never
	eventually(t, "it works again", func() bool {
		return exec.Command("dd", "if="+device.Path, "of=/dev/null", "bs=4k", "count=1", "iflag=direct").Run() == nil
	})
	stop()
	g.disconnect(device.Index)
}

// TestGuestWaitsWithoutEnd: with Never a request waits for as long as the kernel can
// count, and not for no time at all.
func TestGuestWaitsWithoutEnd(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	c := g.config()
	c.DeadTimeout, c.RetryAfter = Never, time.Second
	device := g.connect(c)
	g.kill()
	read := make(chan error, 1)
	go func() { // ends with the read
		read <- exec.Command("dd", "if="+device.Path, "of=/dev/null", "bs=4k", "count=1", "iflag=direct").Run()
	}()
	select {
	case err := <-read:
		t.Errorf("it did not wait: %v", err)
	case <-time.After(10 * time.Second):
	}
	g.serve()
	stop := g.keep(device.Index, c)
	if err := <-read; err != nil {
		t.Error(err)
	}
	stop()
	g.disconnect(device.Index)
}

func TestGuestRefusesAStaleNode(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	g.shell("rm /dev/nbd3; mknod /dev/nbd3 b 7 0")
	c := g.config()
	c.Index = new(Index)
	*c.Index = 3
	stale := new(StaleNodeError)
	if _, err := g.driver.Connect(context.Background(), c); !errors.As(err, &stale) || stale.Have != "7:0" {
		t.Errorf("%v", err)
	}
	if devices, err := g.driver.List(); err != nil || len(devices) != 0 {
		t.Errorf("%v, %v", devices, err)
	}
	g.shell("rm /dev/nbd3; mknod /dev/nbd3 b %s", strings.Replace(stale.Want, ":", " ", 1)) // as the error says
	g.disconnect(g.connect(c).Index)

	// An index the kernel has no device for is made.
	*c.Index = 100
	device := g.connect(c)
	if device.Path != "/dev/nbd100" {
		t.Errorf("%+v", device)
	}
	g.disconnect(device.Index)
	g.quiet()
}

func TestGuestNamesWhatIsMissing(t *testing.T) {
	g := newGuest(t)
	g.serve()
	g.volume("64MiB")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self)
	c.Env = append(os.Environ(), guestConnect+"="+g.socket, guestWeak+"=1")
	if out, err := c.CombinedOutput(); err == nil || !strings.Contains(string(out), ErrPermission.Error()) {
		t.Errorf("without CAP_SYS_ADMIN: %v\n%s", err, out)
	}
	g.shell("modprobe -r nbd")
	if _, err := Open(Options{}); !errors.Is(err, ErrNoDriver) {
		t.Errorf("without the module: %v", err)
	}
	g.shell("modprobe nbd") // as the error says
	d, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.driver.Close(); err != nil {
		t.Error(err)
	}
	g.driver = d // the family has another id now
}

// eventually waits for what takes a moment.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

// TestGuestSeesNoErrorOfADrain has requests in flight at a slow device whenever the
// server is told to stop: what arrives while it drains must come back to the next
// server.
func TestGuestSeesNoErrorOfADrain(t *testing.T) {
	g := newGuest(t)
	image := filepath.Join(g.dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	serve := func() {
		g.start("export", "--socket", g.socket, "--name", "data", "--delay", "20ms", image)
	}
	serve()
	g.listens()
	device := g.connect(g.config())
	stop := g.keep(device.Index, g.config())
	load := exec.Command("fio", "--name=full", "--filename="+device.Path, "--rw=randrw", "--bs=4k", "--ioengine=libaio", "--iodepth=32", "--direct=1",
		"--eta=never", "--time_based", "--runtime=20")
	var out bytes.Buffer
	load.Stdout, load.Stderr = &out, &out
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- load.Wait() }() // ends with fio
	restarts := 0
	for running := true; running; {
		select {
		case err := <-ended:
			running = false
			if err != nil {
				t.Errorf("fio ended after %d restarts: %v\n%s", restarts, err, out.String())
			}
		case <-time.After(time.Second):
			g.terminate()
			serve()
			restarts++
		}
	}
	t.Logf("%d restarts", restarts)
	stop()
	g.disconnect(device.Index)
	g.quiet()
}

// listens waits until the server does: SIGTERM before that ends it without a word.
func (g *guest) listens() {
	g.t.Helper()
	eventually(g.t, "the server listens", func() bool {
		conn, err := Unix(g.socket)(context.Background())
		if err == nil {
			_ = conn.Close() // nothing was said
		}
		return err == nil
	})
}

// terminate ends the daemon as a service manager does.
func (g *guest) terminate() {
	g.t.Helper()
	g.listens()
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = g.server.Process.Signal(syscall.SIGTERM) // it lives
	if err := g.server.Wait(); err != nil {
		g.t.Errorf("the server: %v", err)
	}
}
