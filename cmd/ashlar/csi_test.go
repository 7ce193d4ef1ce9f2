package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

func TestWrongCSICommandLinesEndWithTwo(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"more"}, `"more" is too much: ashlar csi takes no argument`},
		{[]string{"--mode", "both"}, "controller, node or all"},
		{[]string{"--endpoint", "127.0.0.1:1"}, "unix:///PATH"},
		{[]string{"--endpoint", "relative"}, "endpoint"},
		{[]string{"--control-socket", "host:1"}, "must be a unix socket"},
		{[]string{"--control-socket", "relative"}, "--control-socket"},
		{[]string{"--node-id", "a/b"}, "node id"},
		{[]string{"--kubelet-dir", "here"}, "absolute"},
		{[]string{"--registration-socket", "here"}, "--registration-socket"},
		{[]string{"--registration-socket", "/here", "--mode", "controller"}, "nothing to register"},
		{[]string{"--kubelet-endpoint", "/here"}, "--registration-socket"},
		{[]string{"--timeout", "0s"}, "--timeout"},
		{[]string{"--log-level", "loud"}, "--log-level"},
	} {
		args := append([]string{"csi", "--endpoint", "unix://" + dir + "/csi.sock", "--node-id", "n"}, c.args...)
		code, _, stderr := ashlar(t, args...)
		if code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("ashlar %q: exit code %d\n%s", args, code, stderr)
		}
	}
}

func TestCSIThatCannotListenEndsWithOne(t *testing.T) {
	file := testenv.SparseFile(t, filepath.Join(t.TempDir(), "file"), 1)
	for _, args := range [][]string{
		{"csi", "--endpoint", "unix://" + file},
		{"csi", "--endpoint", "unix://" + file + "-2", "--metrics", "192.0.2.1:1"},
	} {
		if code, _, stderr := ashlar(t, args...); code != exitFailure || stderr == "" {
			t.Errorf("ashlar %q: exit code %d\n%s", args, code, stderr)
		}
	}
}

// TestCSIServesWithoutADaemonAndEnds starts a driver that has no daemon yet.
func TestCSIServesWithoutADaemonAndEnds(t *testing.T) {
	dir, err := os.MkdirTemp("", "csi-") // short enough for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // nothing of value
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil { // the port stays free for the moment it takes
		t.Fatal(err)
	}
	c := command(t, "csi", "--endpoint", "unix://"+dir+"/csi.sock", "--control-socket", dir+"/control.sock", "--metrics", address, "--verbose")
	var stderr strings.Builder
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := os.Stat(dir + "/csi.sock")
		var reply *http.Response
		if err == nil {
			reply, err = http.Get(fmt.Sprintf("http://%s/healthz", address))
		}
		if err == nil {
			text, _ := io.ReadAll(reply.Body)
			_ = reply.Body.Close() // read to its end
			if reply.StatusCode != http.StatusOK || strings.TrimSpace(string(text)) != "ok" {
				t.Errorf("/healthz: %s %q", reply.Status, text)
			}
			break
		}
		if time.Now().After(deadline) {
			_ = c.Process.Kill()
			_ = c.Wait()
			t.Fatalf("the driver does not serve: %v\n%s", err, stderr.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Errorf("the driver ended with %v\n%s", err, stderr.String())
	}
	if _, err := os.Stat(dir + "/csi.sock"); err == nil {
		t.Error("the socket stays")
	}
}
