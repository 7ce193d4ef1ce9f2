// go-nbd has its ioctls for no other architecture without cgo.

//go:build linux && amd64

package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gonbd "github.com/pojntfx/go-nbd/pkg/client"
)

// The rest of go-nbd's client is a way to the kernel's driver, by ioctl: this test needs
// a kernel that has it, root, and nobody else's devices. test/vm runs it in User Mode
// Linux with these variables, as it does with the tests of package attach.
const (
	guestBinary = "ASHLAR_GUEST_BINARY" // path of ashlar; without it the test is skipped
	guestDir    = "ASHLAR_GUEST_DIR"    // on a file system with room
	guestDevice = "/dev/nbd0"

	guestWait = 30 * time.Second // for what takes milliseconds on a machine that is not emulated
)

// guestExport is bin/ashlar with an export named "disk", of a file, and one named "empty".
type guestExport struct {
	file   string
	socket string
	tcp    string
	log    string // path
}

func startGuestExport(t *testing.T, content []byte) *guestExport {
	t.Helper()
	binary := os.Getenv(guestBinary)
	if binary == "" {
		t.Skip("needs a guest kernel with nbd (make test-uml runs it)")
	}
	// A signal that meets NBD_DO_IT as it begins to wait shuts the sockets down, and the call
	// is made again: EBUSY (drivers/block/nbd.c, nbd_start_device_ioctl). go-nbd does not
	// block signals, so Go's must not come: those by which it preempts.
	if off := "asyncpreemptoff=1"; !strings.Contains(os.Getenv("GODEBUG"), off) {
		t.Setenv("GODEBUG", off)
		t.Fatal(syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
	}
	dir, err := os.MkdirTemp(os.Getenv(guestDir), "gonbd-")
	if err != nil {
		t.Fatal(err)
	}
	e := &guestExport{file: filepath.Join(dir, "disk"), socket: filepath.Join(dir, "s"), tcp: "127.0.0.1:10899", log: filepath.Join(dir, "log")}
	if err := os.WriteFile(e.file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(e.log)
	if err != nil {
		t.Fatal(err)
	}
	pid := filepath.Join(dir, "pid")
	command := exec.Command(binary, "export", "--socket", e.socket, "--listen", e.tcp, "--pid-file", pid, "--log-level", "debug", "disk="+e.file)
	command.Stdout, command.Stderr = log, log
	if err := errors.Join(command.Start(), log.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(command.Process.Signal(syscall.SIGTERM), command.Wait()); err != nil {
			t.Errorf("the server: %v", err)
		}
		if t.Failed() {
			said, _ := os.ReadFile(e.log) // for reading
			t.Logf("the server's output:\n%s", said)
			kernel, _ := exec.Command("sh", "-c", "dmesg | tail -n 40").CombinedOutput() // for reading
			t.Logf("the kernel:\n%s", kernel)
		}
		_ = os.RemoveAll(dir) // in a guest that ends soon
	})
	guestEventually(t, "the server is ready", func() bool { b, err := os.ReadFile(pid); return err == nil && len(b) > 0 })
	return e
}

func guestEventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(guestWait); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", guestWait, what)
		}
	}
}

// said counts a text in the server's log.
func (e *guestExport) said(t *testing.T, text string) int {
	t.Helper()
	b, err := os.ReadFile(e.log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), text)
}

// attached has go-nbd attach an export as guestDevice, and runs use meanwhile.
func (e *guestExport) attached(t *testing.T, network, address string, options gonbd.Options, use func(device *os.File)) error {
	t.Helper()
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }() // the kernel had it
	control, err := os.OpenFile(guestDevice, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = control.Close() }() // for ioctls only
	connected, ended := make(chan struct{}), make(chan error, 1)
	options.OnConnected = sync.OnceFunc(func() { close(connected) })
	go func() { ended <- gonbd.Connect(conn, control, &options) }() // ends with Disconnect
	select {
	case <-connected:
	case err := <-ended: // the device has the socket, and goes on waiting for the size
		return errors.Join(err, gonbd.Disconnect(control))
	case <-time.After(guestWait):
		t.Fatalf("go-nbd: not connected within %v", guestWait)
	}
	device, err := os.OpenFile(guestDevice, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	use(device)
	if err := errors.Join(device.Sync(), device.Close()); err != nil {
		t.Error(err)
	}
	if err := gonbd.Disconnect(control); err != nil {
		t.Errorf("go-nbd: Disconnect: %v", err)
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(guestWait):
		t.Fatalf("go-nbd: Connect goes on %v after Disconnect", guestWait)
	}
	return nil
}

// TestGuestGoNBDClientAttaches attaches our export with go-nbd's client, writes from several
// goroutines, and compares: through the device, in the file, and through the next device.
func TestGuestGoNBDClientAttaches(t *testing.T) {
	const size, block = 32 << 20, 4096
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	want := make([]byte, size)
	_, _ = random.Read(want) // never fails
	e := startGuestExport(t, want)
	for round, way := range []struct {
		network, address string
		blockSize        uint32 // 0: what the server prefers
	}{
		{"unix", e.socket, 0},
		{"unix", e.socket, 512},
		{"tcp", e.tcp, 4096},
	} {
		name := fmt.Sprintf("%s, blocks of %d", way.network, way.blockSize)
		err := e.attached(t, way.network, way.address, gonbd.Options{ExportName: "disk", BlockSize: way.blockSize}, func(device *os.File) {
			if got, err := device.Seek(0, io.SeekEnd); err != nil || got != size {
				t.Errorf("%s: size %d, %v", name, got, err)
			}
			got := make([]byte, size)
			if _, err := device.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: what is read first is not what the file holds (%v)", name, err)
			}
			const writers = 4 // each has a part of its own
			var running sync.WaitGroup
			for w := range writers {
				chooser := rand.New(rand.NewPCG(seed, uint64(round*writers+w)))
				running.Go(func() {
					part := want[w*size/writers:][:size/writers]
					for range 200 {
						length := 1 + chooser.IntN(64<<10)
						offset := chooser.IntN(len(part) - length)
						for i := range length {
							part[offset+i] = byte(chooser.Uint32())
						}
						if _, err := device.WriteAt(part[offset:offset+length], int64(w*size/writers+offset)); err != nil {
							t.Errorf("%s: %v", name, err)
							return
						}
					}
				})
			}
			running.Wait()
			if err := device.Sync(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if got, err := os.ReadFile(e.file); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: the file does not hold what was written (%v)", name, err)
			}
		})
		if err != nil {
			t.Errorf("%s: go-nbd ended with %v", name, err)
		}
		guestEventually(t, "the server sees the client leave", func() bool { return e.said(t, `msg="nbd connection ended"`) == round+1 })
	}
	if n := e.said(t, "structured=false extended=false"); n != 3 {
		t.Errorf("%d connections with simple replies, want 3", n)
	}
	for name, tt := range map[string]struct {
		options gonbd.Options
		want    error
	}{
		"an unknown export":             {gonbd.Options{ExportName: "absent"}, gonbd.ErrUnknownErr},
		"a block size above the bounds": {gonbd.Options{ExportName: "disk", BlockSize: 64 << 20}, gonbd.ErrUnsupportedServerBlockSize},
	} {
		err := e.attached(t, "unix", e.socket, tt.options, func(*os.File) { t.Errorf("%s: attached", name) })
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: go-nbd ended with %v, want %v", name, err, tt.want)
		}
	}
	if got, err := os.ReadFile(e.file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("in the end the file does not hold what was written (%v)", err)
	}
}
