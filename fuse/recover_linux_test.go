package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestKilledRecoveries kills processes while they recover the device, too, and the
// keeper while they serve. Programs that use it see nothing of it.
func TestKilledRecoveries(t *testing.T) {
	require(t)
	requireResend(t)
	random := rand.New(rand.NewPCG(seed(t), 0))
	file := testenv.TempFileOn(t, t.TempDir(), 64<<20)
	dir := t.TempDir()
	socket := filepath.Join(t.TempDir(), "keeper")
	k := startProcess(t, keeperVariable+"="+socket)
	arguments := fmt.Sprintf("%s %s %s %s 2", strings.ReplaceAll(testName(t), " ", "-"), file, dir, socket)
	s := startServer(t, "start %s", arguments)
	var group sync.WaitGroup
	var over atomic.Bool
	path := s.Said
	for i := range 4 {
		group.Go(func() {
			for round := uint64(0); !over.Load(); round++ {
				if err := load(t, path, int64(i)*8<<20, 8<<20, 256<<10, round, 40); err != nil {
					t.Errorf("part %d, round %d: %v", i, round, err)
					return
				}
			}
		})
	}
	for i := range 2 * kills() {
		time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
		if i%3 == 2 { // while a server lives, a keeper may go
			k.Kill()
			k = startProcess(t, keeperVariable+"="+socket)
			waitForEntry(t, socket)
		}
		s.Kill()
		for range random.IntN(3) { // these do not get far
			half := testenv.NewChild(serveVariable + "=recover " + arguments)
			if err := half.Command.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(random.IntN(40)) * time.Millisecond)
			half.Kill()
		}
		s = startServer(t, "recover %s", arguments)
		if s.Said != path {
			t.Fatalf("recovered as %s, was %s", s.Said, path)
		}
	}
	over.Store(true)
	group.Wait()
	s.End(t, "stop")
	k.EndAnyhow()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// waitForEntry waits until a new keeper has what the old one had.
func waitForEntry(t testing.TB, socket string) {
	t.Helper()
	c := openKeeper(t, socket)
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		if list, err := c.List(within(t)); err == nil && len(list) > 0 && list[0].Owned {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not put its device again")
		}
	}
	_ = c.Close() // nothing is its own
}

func TestDetachedDeviceGoesOnElsewhere(t *testing.T) {
	require(t)
	requireResend(t)
	testenv.CheckFDs(t)
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	d := memory(t, memdev.Config{Size: 64 << 20, SizeMax: 128 << 20})
	c := complete(t, fuse.Config{Device: d, Loop: fuse.AnyLoop, Keeper: k})
	target := start(t, c)
	if !target.Kept() {
		t.Fatal("not kept")
	}
	info, err := fuse.Find(within(t), c.Name, k)
	if err != nil || info.State != fuse.StateServed || info.PID != os.Getpid() {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := fuse.Start(within(t), c); !errors.Is(err, fuse.ErrExists) {
		t.Errorf("a second of its name: %v", err)
	}
	other := openKeeper(t, socket)
	second := c
	second.Keeper = other
	if _, err := fuse.Start(within(t), second); !errors.Is(err, fuse.ErrExists) {
		t.Errorf("a second of its name from another process: %v", err)
	}
	if err := fuse.Remove(within(t), c.Name, other); !errors.Is(err, fuse.ErrServed) {
		t.Errorf("removal of what is served: %v", err)
	}

	var group sync.WaitGroup
	var over atomic.Bool
	path := target.Path()
	for i := range 4 {
		group.Go(func() {
			for round := uint64(0); !over.Load(); round++ {
				if err := load(t, path, int64(i)*4<<20, 4<<20, 256<<10, round, 30); err != nil {
					t.Errorf("part %d, round %d: %v", i, round, err)
					return
				}
			}
		})
	}
	for range 10 {
		if err := target.Detach(within(t)); err != nil {
			t.Fatal(err)
		}
		if err := target.Detach(within(t)); err != nil {
			t.Errorf("again: %v", err)
		}
		if info, err := fuse.Find(within(t), c.Name, k); err != nil || info.State != fuse.StateWaiting {
			t.Errorf("%+v, %v", info, err)
		}
		if _, err := fuse.Start(within(t), c); !errors.Is(err, fuse.ErrExists) {
			t.Errorf("a new one of its name while it waits: %v", err)
		}
		if target, err = fuse.Recover(within(t), c); err != nil {
			t.Fatal(err)
		}
		if target.Path() != path {
			t.Fatalf("recovered as %s", target.Path())
		}
	}
	if err := target.Detach(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := d.Resize(128 << 20); err != nil { // by whoever has the store
		t.Fatal(err)
	}
	if target, err = fuse.Recover(within(t), c); err != nil {
		t.Fatal(err)
	}
	if got := sysfs(t, target, "size"); got != fmt.Sprint(128<<20/512) {
		t.Errorf("size %s", got)
	}
	over.Store(true)
	group.Wait()
	stop(t, target)
	if list, err := k.List(within(t)); err != nil || len(list) != 0 {
		t.Errorf("the keeper holds %+v, %v", list, err)
	}
}

func TestRecoveryRefusesWhatDoesNotFit(t *testing.T) {
	require(t)
	requireResend(t)
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	d := memory(t, memdev.Config{Size: 64 << 20, MinIO: 512})
	c := complete(t, fuse.Config{Device: d, Loop: fuse.AnyLoop, Keeper: k, BlockSize: 512})
	if _, err := fuse.Recover(within(t), c); !errors.Is(err, fuse.ErrNotFound) {
		t.Errorf("nothing there: %v", err)
	}
	if err := fuse.Remove(within(t), c.Name, k); !errors.Is(err, fuse.ErrNotFound) {
		t.Errorf("removal of nothing: %v", err)
	}
	target := start(t, c)
	other := openKeeper(t, socket)
	second := c
	second.Keeper = other
	ctx, cancel := contextWithTimeout(2 * time.Second)
	defer cancel()
	if _, err := fuse.Recover(ctx, second); !errors.Is(err, fuse.ErrServed) {
		t.Errorf("of what is served: %v", err)
	}
	if err := target.Detach(within(t)); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(c *fuse.Config)
		want   error
	}{
		"no keeper":       {func(c *fuse.Config) { c.Keeper = nil }, nil},
		"no device":       {func(c *fuse.Config) { c.Device = nil }, nil},
		"a smaller store": {func(c *fuse.Config) { c.Device = memory(t, memdev.Config{Size: 32 << 20}) }, fuse.ErrMismatch},
		"larger blocks": {func(c *fuse.Config) {
			c.Device, c.BlockSize = memory(t, memdev.Config{Size: 64 << 20, MinIO: 4096}), 4096
		}, fuse.ErrMismatch},
		"a read-only one":  {func(c *fuse.Config) { c.Device = memory(t, memdev.Config{Size: 64 << 20, ReadOnly: true}) }, fuse.ErrMismatch},
		"shorter requests": {func(c *fuse.Config) { c.Device = &shorter{d} }, fuse.ErrMismatch},
		"no queue":         {func(c *fuse.Config) { c.Device = &failing{d} }, nil},
	} {
		wrong := c
		tt.change(&wrong)
		if _, err := fuse.Recover(within(t), wrong); err == nil || (tt.want != nil && !errors.Is(err, tt.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	target, err := fuse.Recover(within(t), c) // none of that harmed it
	if err != nil {
		t.Fatal(err)
	}
	loads(t, target.Path(), 1, 1<<20, 64<<10, 20)
	stop(t, target)

	if err := k.Put(within(t), c.Name, []byte("what is this"), int(openDevNull(t).Fd())); err != nil {
		t.Fatal(err)
	}
	if err := k.Release(within(t), c.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := fuse.Recover(within(t), c); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("a state of another version: %v", err)
	}
	if err := k.Remove(within(t), c.Name); err != nil {
		t.Error(err)
	}
}

func openDevNull(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// shorter is a device that takes short requests only.
type shorter struct{ datapath.Device }

func (d *shorter) Info() datapath.Info {
	i := d.Device.Info()
	i.MaxIO = 4096
	return i
}

func TestRequestsWaitForAStoreThatShutsDown(t *testing.T) {
	require(t)
	requireResend(t)
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	fault, err := filter.NewFault(memory(t, memdev.Config{Size: 32 << 20}), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	c := complete(t, fuse.Config{Device: fault, Loop: fuse.AnyLoop, Keeper: k})
	target := start(t, c)
	f := openDevice(t, target.Path())
	if err := fault.SetRules([]filter.FaultRule{{Status: datapath.StatusShutdown}}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	b := aligned(t, 4096)
	b[0] = 7
	go func() { // ends with its request
		_, err := f.WriteAt(b, 16<<20)
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("the request ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := target.Detach(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := fault.SetRules(nil); err != nil { // the store is back
		t.Fatal(err)
	}
	if target, err = fuse.Recover(within(t), c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, target) })
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(wait):
		t.Fatal("the request did not come again")
	}
	back := aligned(t, 4096)
	if _, err := f.ReadAt(back, 16<<20); err != nil || back[0] != 7 {
		t.Errorf("%d, %v", back[0], err)
	}
	// A device that is given up ends what waits for its store, so that it can go.
	if err := fault.SetRules([]filter.FaultRule{{Status: datapath.StatusShutdown}}); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with its request
		_, err := f.WriteAt(b, 16<<20)
		_ = f.Close() // so that the device is free
		ended <- err
	}()
	for deadline := time.Now().Add(wait); fault.Struck() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no request came")
		}
	}
	stop(t, target)
	if err := <-ended; !errors.Is(err, unix.EIO) {
		t.Errorf("what the store had not done: %v", err)
	}
}

// TestServerThatDiesWithoutAKeeper leaves a dead device: its requests fail. It goes when
// nobody uses it any more, and a new one can have its name.
func TestServerThatDiesWithoutAKeeper(t *testing.T) {
	require(t)
	testenv.RequireCommand(t, "mkfs.ext4", "e2fsprogs")
	file := testenv.TempFileOn(t, t.TempDir(), 64<<20)
	dir, where := t.TempDir(), t.TempDir()
	name := strings.ReplaceAll(testName(t), " ", "-")
	s := startServer(t, "start %s %s %s - 1", name, file, dir)
	run(t, "mkfs.ext4", "-q", "-F", s.Said)
	run(t, "mount", s.Said, where)
	s.Kill()
	if err := os.WriteFile(where+"/x", make([]byte, 1<<20), 0o600); err == nil {
		f, err := os.Open(where + "/x")
		if err == nil {
			err = f.Sync()
			_ = f.Close() // seen by Sync
		}
		if err == nil {
			t.Error("a dead device takes writes")
		}
	}
	c := complete(t, fuse.Config{Device: memory(t, memdev.Config{Size: 1 << 20}), Loop: fuse.AnyLoop, Name: name, Dir: dir})
	if _, err := fuse.Start(within(t), c); !errors.Is(err, fuse.ErrInUse) || !strings.Contains(err.Error(), where) {
		t.Errorf("a new device over one that is mounted: %v", err)
	}
	if err := fuse.Remove(within(t), name, nil); !errors.Is(err, fuse.ErrInUse) {
		t.Errorf("removal of one that is mounted: %v", err)
	}
	run(t, "umount", where)
	target := start(t, c) // removes it
	if err := fuse.Remove(within(t), name, nil); !errors.Is(err, fuse.ErrServed) {
		t.Errorf("removal of one that is served: %v", err)
	}
	if _, err := fuse.Start(within(t), c); !errors.Is(err, fuse.ErrExists) {
		t.Errorf("a second: %v", err)
	}
	if err := target.Detach(within(t)); !errors.Is(err, fuse.ErrNoResend) {
		t.Errorf("detach without a keeper: %v", err)
	}
	stop(t, target)

	s = startServer(t, "start %s %s %s - 1", name, file, dir)
	s.Kill()
	if err := fuse.Remove(within(t), name, nil); err != nil {
		t.Errorf("removal of a dead one: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestDeviceThatWaitsIsRemovedOnRequest takes away a device nobody will recover.
func TestDeviceThatWaitsIsRemovedOnRequest(t *testing.T) {
	require(t)
	requireResend(t)
	testenv.RequireCommand(t, "mkfs.ext4", "e2fsprogs")
	file := testenv.TempFileOn(t, t.TempDir(), 64<<20)
	dir, where := t.TempDir(), t.TempDir()
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	name := strings.ReplaceAll(testName(t), " ", "-")
	arguments := fmt.Sprintf("%s %s %s %s 1", name, file, dir, socket)
	s := startServer(t, "start %s", arguments)
	run(t, "mkfs.ext4", "-q", "-F", s.Said)
	run(t, "mount", s.Said, where)
	s.Kill()
	waitState(t, name, k, fuse.StateWaiting)
	if err := fuse.Remove(within(t), name, k); !errors.Is(err, fuse.ErrInUse) || !strings.Contains(err.Error(), where) {
		t.Errorf("mounted: %v", err)
	}
	s = startServer(t, "recover %s", arguments) // the refusal harmed nothing
	run(t, "umount", where)
	s.Kill()
	waitState(t, name, k, fuse.StateWaiting)
	if err := fuse.Remove(within(t), name, k); err != nil {
		t.Error(err)
	}
	if _, err := fuse.Find(within(t), name, k); !errors.Is(err, fuse.ErrNotFound) {
		t.Errorf("afterwards: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func waitState(t testing.TB, name string, k *keeper.Client, want fuse.State) {
	t.Helper()
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		info, err := fuse.Find(within(t), name, k)
		if err == nil && info.State == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v, %v; want %s", info, err, want)
		}
	}
}

// TestBrokenConnectionIsDead breaks a connection as its operator can.
func TestBrokenConnectionIsDead(t *testing.T) {
	require(t)
	requireResend(t)
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	c := complete(t, fuse.Config{Device: memory(t, memdev.Config{Size: 32 << 20}), Loop: fuse.AnyLoop, Keeper: k, Queues: 2})
	target := start(t, c)
	if err := unix.Unmount(target.File(), unix.MNT_FORCE); !errors.Is(err, unix.EBUSY) {
		t.Errorf("forced unmount: %v", err)
	}
	for deadline := time.Now().Add(wait); !target.Stats().Gone; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server does not notice")
		}
	}
	f, err := os.OpenFile(target.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(aligned(t, 4096), 0); err == nil {
		t.Error("a read succeeded")
	}
	_ = f.Close()
	if err := target.Detach(within(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := fuse.Recover(within(t), c); !errors.Is(err, fuse.ErrDead) {
		t.Errorf("recovery: %v", err)
	}
	next := start(t, c) // over the dead one
	loads(t, next.Path(), 1, 1<<20, 64<<10, 20)
}

// TestMountThatIsNotSeen is a daemon in another mount namespace than its predecessor's:
// the loop device tells whose it is.
func TestMountThatIsNotSeen(t *testing.T) {
	require(t)
	requireResend(t)
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	c := complete(t, fuse.Config{Device: memory(t, memdev.Config{Size: 32 << 20}), Loop: fuse.AnyLoop, Keeper: k})
	target := start(t, c)
	file := target.File()
	if err := target.Detach(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	info, err := fuse.Find(within(t), c.Name, k)
	if err != nil || info.Loop != target.Loop() || info.File != "" || info.Name != c.Name {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err := fuse.Find(within(t), c.Name, nil); err != nil || info.Loop != target.Loop() {
		t.Errorf("without a keeper: %+v, %v", info, err)
	}
	if err := fuse.Remove(within(t), c.Name, nil); !errors.Is(err, fuse.ErrServed) {
		t.Errorf("removal of what waits, by somebody who does not know its keeper: %v", err)
	}
	if target, err = fuse.Recover(within(t), c); err != nil {
		t.Fatal(err)
	}
	if err := fuse.Remove(within(t), c.Name, nil); !errors.Is(err, fuse.ErrServed) {
		t.Errorf("removal of what is served, as well: %v", err)
	}
	loads(t, target.Path(), 2, 1<<20, 64<<10, 20)
	if err := target.Resize(within(t)); err == nil {
		t.Error("resized without a way to the file")
	}
	stop(t, target)
	if _, err := fuse.Find(within(t), c.Name, k); !errors.Is(err, fuse.ErrNotFound) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestDeadLoopDeviceWhoseMountIsNotSeen is what is left of a server without a keeper, in
// a container that is gone.
func TestDeadLoopDeviceWhoseMountIsNotSeen(t *testing.T) {
	require(t)
	file := testenv.TempFileOn(t, t.TempDir(), 16<<20)
	dir := t.TempDir()
	name := strings.ReplaceAll(testName(t), " ", "-")
	s := startServer(t, "start %s %s %s - 1", name, file, dir)
	info, err := fuse.Find(within(t), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(info.File, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if err := fuse.Remove(within(t), name, nil); err != nil {
		t.Error(err)
	}
	if _, err := fuse.Find(within(t), name, nil); !errors.Is(err, fuse.ErrNotFound) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestInterruptedStartIsFinishedByRecovery has a keeper with a connection whose process
// died before it made the loop device.
func TestInterruptedStartIsFinishedByRecovery(t *testing.T) {
	require(t)
	requireResend(t)
	socket, _ := startKeeper(t)
	k := openKeeper(t, socket)
	c := complete(t, fuse.Config{Device: memory(t, memdev.Config{Size: 32 << 20}), Loop: fuse.AnyLoop, Keeper: k})
	target := start(t, c)
	loop := target.Path()
	run(t, "losetup", "-d", loop)
	if err := target.Detach(within(t)); err != nil {
		t.Fatal(err)
	}
	target, err := fuse.Recover(within(t), c)
	if err != nil {
		t.Fatal(err)
	}
	loads(t, target.Path(), 2, 1<<20, 64<<10, 20)
	stop(t, target)
}

// inNamespace runs this test binary as a server in a mount namespace with a /dev of its
// own, made by a script, and returns what it says.
func inNamespace(t testing.TB, script, user string) string {
	t.Helper()
	file := testenv.TempFileOn(t, t.TempDir(), 16<<20)
	dir := t.TempDir()
	for _, path := range []string{filepath.Dir(filepath.Dir(file)), filepath.Dir(file), dir, file} { // the user is not root
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script+"\nexec "+user+" "+self)
	c.Env = append(os.Environ(), fmt.Sprintf("%s=start %s %s %s - 1", serveVariable, strings.ReplaceAll(testName(t), " ", "-"), file, dir))
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = c.Process.Kill() })
	defer stop()
	out, _ := c.CombinedOutput() // the error is in it
	return string(out)
}

func TestMissingPartsOfTheSystemAreNamed(t *testing.T) {
	require(t)
	for name, tt := range map[string]struct{ script, user, want string }{
		"no FUSE":           {"mount -t tmpfs none /dev", "", "modprobe fuse"},
		"no loop":           {"mount -t tmpfs none /dev && mknod /dev/fuse c 10 229", "", "modprobe loop"},
		"no right to FUSE":  {"mount -t tmpfs none /dev && mknod -m 600 /dev/fuse c 10 229 && chmod 755 /dev", "setpriv --reuid=65534 --clear-groups", "needs root"},
		"no right to loop":  {"mount -t tmpfs none /dev && mknod -m 666 /dev/fuse c 10 229 && mknod -m 600 /dev/loop-control c 10 237 && chmod 755 /dev", "setpriv --reuid=65534 --clear-groups", "needs root"},
		"no right to mount": {"true", "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin", "CAP_SYS_ADMIN"},
		"no node":           {"mount -t tmpfs none /dev && mknod /dev/fuse c 10 229 && mknod /dev/loop-control c 10 237 && mknod /dev/null c 1 3", "", "/dev/loop"}, // it is made
	} {
		t.Run(name, func(t *testing.T) {
			if got := inNamespace(t, tt.script, tt.user); !strings.Contains(got, tt.want) || strings.Contains(got, "error") != (name != "no node") {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
	script := "mount -t tmpfs none /dev && mknod /dev/fuse c 10 229 && mknod /dev/loop-control c 10 237 && mknod /dev/null c 1 3\n" +
		"for i in $(seq 0 99); do echo stale >/dev/loop$i; done"
	if got := inNamespace(t, script, ""); !strings.Contains(got, "mknod /dev/loop") {
		t.Errorf("stale nodes: %q", got)
	}
}

func TestCommandOfAKeeperThatIsNotThereIsReported(t *testing.T) {
	require(t)
	requireResend(t)
	socket, p := startKeeper(t)
	k, err := keeper.Open(within(t), keeper.Options{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	p.Kill()
	c := complete(t, fuse.Config{Device: memory(t, memdev.Config{Size: 1 << 20}), Loop: fuse.AnyLoop, Keeper: k})
	if _, err := fuse.Start(within(t), c); !errors.Is(err, keeper.ErrAway) {
		t.Errorf("start: %v", err)
	}
	if _, err := fuse.Recover(within(t), c); !errors.Is(err, keeper.ErrAway) {
		t.Errorf("recovery: %v", err)
	}
	if _, err := fuse.List(within(t), k); !errors.Is(err, keeper.ErrAway) {
		t.Errorf("list: %v", err)
	}
}
