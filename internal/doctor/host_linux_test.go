package doctor

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFilesOfThisHostLeaveNothing(t *testing.T) {
	dir := t.TempDir()
	if err := writable(dir); err != nil {
		t.Error(err)
	}
	fd, err := named(dir, 0)
	if err != nil || unix.Close(fd) != nil {
		t.Error(err)
	}
	// Whether these work is the file system's affair; that they end is ours.
	t.Logf("O_DIRECT: %v, sharing blocks: %v", writeDirect(dir), shareBlock(dir))
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("something was left: %v, %v", left, err)
	}
	none := filepath.Join(dir, "none")
	if f, err := filesystem(dir); err != nil || f.Size == 0 || f.Magic == 0 {
		t.Errorf("%+v, %v", f, err)
	}
	for name, look := range map[string]func(string) error{
		"writable": writable, "direct": writeDirect, "share": shareBlock,
		"named":      func(dir string) error { _, err := named(dir, 0); return err },
		"filesystem": func(dir string) error { _, err := filesystem(dir); return err },
		"read":       func(dir string) error { return readDisk(dir, make([]byte, 1)) },
		"daemon":     func(dir string) error { _, err := askDaemon(dir); return err },
	} {
		if err := look(none); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of nothing: %v", name, err)
		}
	}
	// A name that is taken: somebody else's look at the same directory.
	taken, err := os.Create(filepath.Join(dir, ".ashlar-doctor-"+strings.TrimSpace(pid())))
	if err != nil || taken.Close() != nil {
		t.Fatal(err)
	}
	if _, err := named(dir, 0); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a name that is taken: %v", err)
	}
}

func pid() string { s, _ := os.Readlink("/proc/self"); return s }

func TestReadDiskReadsTheBeginning(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	want := bytes.Repeat([]byte("x"), 100)
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if err := readDisk(path, b); err != nil || !bytes.Equal(b, want[:10]) {
		t.Errorf("%q, %v", b, err)
	}
	if err := readDisk(path, make([]byte, 200)); err == nil {
		t.Error("more was read than there is")
	}
}

func TestListenOnWhatIsInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // nobody came
	if err := listen(l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("in use: %v", err)
	}
	if err := listen("127.0.0.1:0"); err != nil {
		t.Error(err)
	}
	if err := listen("nonsense"); err == nil {
		t.Error("no address was listened on")
	}
}

type node struct {
	controlpb.UnimplementedNodeServer
}

func (node) Info(context.Context, *controlpb.InfoRequest) (*controlpb.InfoResponse, error) {
	return &controlpb.InfoResponse{Version: "v7"}, nil
}

func TestAskDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	server := grpc.NewServer()
	controlpb.RegisterNodeServer(server, node{})
	done := make(chan struct{})
	go func() { // ends with Stop
		defer close(done)
		_ = server.Serve(l) // the error of a listener that was closed
	}()
	if version, err := askDaemon(socket); err != nil || version != "v7" {
		t.Errorf("%q, %v", version, err)
	}
	server.Stop()
	<-done
	if _, err := askDaemon(socket); err == nil { // the file is there still
		t.Error("a daemon that is gone answers")
	}
}
