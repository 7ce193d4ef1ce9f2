package csi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	nodeID = "node-1"
)

// Bounds that end a test which waits for something that does not come.
const (
	startLimit = 60 * time.Second
	stopLimit  = 60 * time.Second
	callLimit  = 5 * time.Minute
)

var program = "../../bin/ashlar" // made absolute by TestMain

func TestMain(m *testing.M) {
	if path := os.Getenv("ASHLAR_BINARY"); path != "" {
		program = path
	}
	if path, err := filepath.Abs(program); err == nil {
		program = path
	}
	if err := os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:"+os.Getenv("PATH")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if os.Getenv("ASHLAR_CSI") == "1" && os.Geteuid() == 0 && !testenv.InNamespace() {
		os.Exit(testenv.RunInNamespace())
	}
	os.Exit(m.Run())
}

// require skips t outside make test-csi.
func require(t *testing.T) {
	t.Helper()
	if os.Getenv("ASHLAR_CSI") != "1" {
		t.Skip("needs bin/ashlar, root, and loop and FUSE devices (make test-csi does not skip it)")
	}
	testenv.RequireRoot(t)
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v; make test-csi builds it", err)
	}
}

// process is a running ashlar.
type process struct {
	name    string
	command *exec.Cmd
	log     string        // path
	ended   chan struct{} // closed when the process has been waited for
	err     error         // of Wait; read after ended
}

// launch starts ashlar with arguments; its log is appended to name.log in dir.
func launch(t *testing.T, dir, name string, args ...string) *process {
	t.Helper()
	p := &process{name: name, log: filepath.Join(dir, name+".log"), ended: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	p.command = exec.Command(program, args...)
	p.command.Stdout, p.command.Stderr = log, log
	p.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = p.command.Start()
	_ = log.Close() // the process has it
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		p.err = p.command.Wait()
		close(p.ended)
	}()
	return p
}

// end sends a signal and waits for the process.
func (p *process) end(t *testing.T, s syscall.Signal) {
	t.Helper()
	select {
	case <-p.ended:
		if s == syscall.SIGTERM {
			t.Errorf("%s has ended before: %v", p.name, p.err)
		}
		return
	default:
	}
	_ = p.command.Process.Signal(s) // it may end meanwhile
	select {
	case <-p.ended:
		if s == syscall.SIGTERM && p.err != nil {
			t.Errorf("%s ended with: %v", p.name, p.err)
		}
	case <-time.After(stopLimit):
		_ = p.command.Process.Kill()
		<-p.ended
		t.Errorf("%s does not end", p.name)
	}
}

// world is a node: a daemon, a driver, and a directory for both.
type world struct {
	t   *testing.T
	dir string

	mu     sync.Mutex // guards the processes
	daemon *process
	driver *process

	conn *grpc.ClientConn
	spec.IdentityClient
	spec.ControllerClient
	spec.GroupControllerClient
	spec.NodeClient
	spec.SnapshotMetadataClient

	succeeded atomic.Int64 // calls

	free uint64 // bytes of the pool when it was empty
}

// newWorld starts a node whose pool has size bytes, and at the end wants it to be
// as empty as it was.
func newWorld(t *testing.T, size string) *world {
	t.Helper()
	require(t)
	dir, err := os.MkdirTemp("/var/tmp", "ashlar-csi-") // short enough for sockets, and no tmpfs
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir}
	t.Cleanup(func() {
		if !t.Failed() {
			_ = os.RemoveAll(dir) // nothing of value
		} else {
			t.Logf("logs stay in %s", dir)
			_ = os.RemoveAll(filepath.Join(dir, "data")) // of the size of a pool
		}
	})
	w.daemon = w.startDaemon("--default-pool", size)
	w.driver = w.startDriver()
	t.Cleanup(w.close)
	w.conn, err = grpc.NewClient("unix://"+w.path("csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.2, MaxDelay: 500 * time.Millisecond}}))
	if err != nil {
		t.Fatal(err)
	}
	w.IdentityClient, w.ControllerClient, w.GroupControllerClient = spec.NewIdentityClient(w.conn), spec.NewControllerClient(w.conn), spec.NewGroupControllerClient(w.conn)
	w.NodeClient, w.SnapshotMetadataClient = spec.NewNodeClient(w.conn), spec.NewSnapshotMetadataClient(w.conn)
	w.free = w.poolFree()
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) startDaemon(more ...string) *process {
	w.t.Helper()
	p := launch(w.t, w.dir, "serve", append([]string{"serve", "--data-dir", w.path("data"), "--socket", w.path("control.sock"),
		"--nbd-socket", w.path("nbd.sock"), "--log-level", "info"}, more...)...)
	w.until("the daemon answers", p, func() bool {
		return exec.Command(program, "pool", "list", "--server", "unix://"+w.path("control.sock")).Run() == nil
	})
	return p
}

func (w *world) startDriver() *process {
	w.t.Helper()
	p := launch(w.t, w.dir, "csi", "csi", "--endpoint", "unix://"+w.path("csi.sock"), "--control-socket", w.path("control.sock"),
		"--node-id", nodeID, "--kubelet-dir", w.path("kubelet"), "--log-level", "debug")
	w.until("the driver listens", p, func() bool {
		s, err := os.Stat(w.path("csi.sock"))
		return err == nil && s.Mode()&os.ModeSocket != 0
	})
	return p
}

// until waits for something that a process does.
func (w *world) until(what string, p *process, done func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(startLimit); !done(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-p.ended:
			text, _ := os.ReadFile(p.log) // shown as far as there
			w.t.Fatalf("%s ended before %s: %v\n%s", p.name, what, p.err, text)
		default:
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("gave up waiting until %s", what)
		}
	}
}

// killDriver kills the driver, and starts it again.
func (w *world) killDriver() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.driver.end(w.t, syscall.SIGKILL)
	_ = os.Remove(w.path("csi.sock")) // so that startDriver sees the new one
	w.driver = w.startDriver()
}

// killDaemon kills the daemon, and starts it again.
func (w *world) killDaemon() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.daemon.end(w.t, syscall.SIGKILL)
	w.daemon = w.startDaemon()
}

// close ends the node and wants nothing to be left.
func (w *world) close() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.t.Failed() {
		w.checkEmpty()
	}
	w.driver.end(w.t, syscall.SIGTERM)
	if w.conn != nil {
		_ = w.conn.Close() // nothing is asked any more
	}
	if w.t.Failed() {
		w.sweep()
	}
	w.daemon.end(w.t, syscall.SIGTERM)
	w.endKeepers()
}

// endKeepers ends what holds the FUSE connections for the daemon; it would end by
// itself, a while after the last device has gone.
func (w *world) endKeepers() {
	w.t.Helper()
	lists, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(w.t, err)
	for _, path := range lists {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "fuse-keeper") || !strings.Contains(string(text), w.dir) {
			continue // ended, or somebody else's
		}
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		must(w.t, err)
		_ = syscall.Kill(id, syscall.SIGKILL) // it may have ended
	}
}

// sweep takes away what a failed test left mounted, so that the next is not disturbed.
func (w *world) sweep() {
	for range 3 {
		for _, m := range w.mounts() {
			if !strings.Contains(m, w.path("data")) {
				_ = syscall.Unmount(m, 0)
			}
		}
	}
	if exec.Command(program, "pool", "list", "--server", "unix://"+w.path("control.sock")).Run() != nil {
		return // without a daemon, the devices listed would be those of the host
	}
	var list struct{ Items []struct{ Path string } }
	if text, err := exec.Command(program, "devices", "--server", "unix://"+w.path("control.sock"), "--output", "json").Output(); err == nil && json.Unmarshal(text, &list) == nil {
		for _, d := range list.Items {
			_ = exec.Command(program, "detach", d.Path, "--server", "unix://"+w.path("control.sock")).Run()
		}
	}
}

// ashlar runs the command line against the daemon, and gives what it prints as JSON.
func (w *world) ashlar(into any, args ...string) {
	w.t.Helper()
	text := w.tool(program, append(args, "--server", "unix://"+w.path("control.sock"), "--output", "json")...)
	if into != nil {
		if err := json.Unmarshal([]byte(text), into); err != nil {
			w.t.Fatalf("ashlar %v: %v in %s", args, err, text)
		}
	}
}

// tool runs somebody's program and gives what it prints.
func (w *world) tool(name string, args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), callLimit)
	if errors.Is(w.t.Context().Err(), context.Canceled) { // in a clean-up
		ctx, cancel = context.WithTimeout(context.Background(), callLimit)
	}
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	var said bytes.Buffer
	c.Stderr = &said
	out, err := c.Output()
	if err != nil {
		w.t.Fatalf("%s %v: %v: %s", name, args, err, said.String())
	}
	return string(out)
}

// mounts lists the mount points whose path or device has to do with this node.
func (w *world) mounts() []string {
	w.t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		w.t.Fatal(err)
	}
	var list []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); strings.Contains(line, w.dir) {
			list = append([]string{f[4]}, list...) // the last first
		}
	}
	return list
}

type items[T any] struct{ Items []T }

// number reads an integer, which JSON has as a number or in quotes.
type number uint64

func (n *number) UnmarshalJSON(text []byte) error {
	return json.Unmarshal(bytes.Trim(text, `"`), (*uint64)(n))
}

// poolFree is how many bytes of the pool are free.
func (w *world) poolFree() uint64 {
	w.t.Helper()
	var l items[struct {
		FreeBytes number `json:"free_bytes"`
	}]
	w.ashlar(&l, "pool", "list")
	if len(l.Items) != 1 {
		w.t.Fatalf("there are %d pools", len(l.Items))
	}
	return uint64(l.Items[0].FreeBytes)
}

type volumeItem struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
	Limits struct {
		IOPS      number `json:"iops"`
		Bandwidth number `json:"bandwidth_bytes"`
	} `json:"limits"`
}

func (w *world) volumeItems() []volumeItem {
	w.t.Helper()
	var l items[volumeItem]
	w.ashlar(&l, "volume", "list")
	return l.Items
}

// metadataSlack is what a pool may keep of its own after volumes came and went.
const metadataSlack = 32 * mib

// checkEmpty wants no volumes, snapshots, devices, mounts, and the space back.
func (w *world) checkEmpty() {
	w.t.Helper()
	var snapshots items[map[string]any]
	var devices items[struct{ Path, Volume string }]
	if v := w.volumeItems(); len(v) > 0 {
		w.t.Errorf("%d volumes are left: %v", len(v), v)
	}
	if w.ashlar(&snapshots, "snapshot", "list"); len(snapshots.Items) > 0 {
		w.t.Errorf("snapshots are left: %v", snapshots.Items)
	}
	w.ashlar(&devices, "devices")
	for _, d := range devices.Items {
		if d.Volume != "" { // without, it is another daemon's
			w.t.Errorf("device %s of volume %s is left", d.Path, d.Volume)
		}
	}
	for _, m := range w.mounts() {
		if !strings.HasPrefix(m, w.path("data")) { // the daemon's own
			w.t.Errorf("%s is left mounted", m)
		}
	}
	if out := w.tool("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"); strings.Contains(out, w.dir) {
		w.t.Errorf("loop devices are left:\n%s", out)
	}
	deadline := time.Now().Add(startLimit) // freeing goes on after a delete
	for free := w.poolFree(); free+metadataSlack < w.free; free = w.poolFree() {
		if time.Now().After(deadline) {
			w.t.Errorf("%d of %d bytes that were free are free again", free, w.free)
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
}
