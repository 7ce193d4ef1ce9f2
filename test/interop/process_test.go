package interop

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestNbdClientListsExports(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	a, b := sparse(t, dir, "a", 4*mib), sparse(t, dir, "b", 4*mib)
	check := func(t *testing.T, args ...string) {
		out := tool(t, "nbd-client", args...)
		for _, name := range []string{"one", "two"} {
			if !strings.Contains(out, name) {
				t.Errorf("nbd-client -l does not show %s:\n%s", name, out)
			}
		}
	}
	t.Run("tcp", func(t *testing.T) {
		_, address := serveTCP(t, "one="+a, "two="+b)
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		check(t, "-l", host, port)
	})
	t.Run("unix", func(t *testing.T) {
		s := serve(t, "one="+a, "two="+b)
		check(t, "-unix", s.socket, "-l")
	})
}

func TestStdio(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 4*mib)
	code := fmt.Sprintf(`
h.connect_command([%q, "export", "--stdio", %q])
h.pwrite(b"stdio" * 1000, 12345)
h.flush()
assert bytes(h.pread(5000, 12345)) == b"stdio" * 1000
print(h.get_size())
h.shutdown()`, binary, disk)
	if got := strings.TrimSpace(tool(t, "nbdsh", "-c", code)); got != strconv.Itoa(4*mib) {
		t.Errorf("nbdsh prints %q", got)
	}
	text, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if string(text[12345:17345]) != strings.Repeat("stdio", 1000) {
		t.Error("the file does not hold what was written")
	}
}

func TestSocketActivationByLibnbd(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 4*mib)
	code := fmt.Sprintf(`
h.connect_systemd_socket_activation([%q, "export", %q])
h.pwrite(b"x" * 512, 0)
print(h.get_size())
h.shutdown()`, binary, disk)
	if got := strings.TrimSpace(tool(t, "nbdsh", "-c", code)); got != strconv.Itoa(4*mib) {
		t.Errorf("nbdsh prints %q", got)
	}
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", "--", "[", binary, "export", disk, "]")); got != strconv.Itoa(4*mib) {
		t.Errorf("nbdinfo prints %q", got)
	}
}

func TestSocketActivationByHand(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := newServer(t)
	s.socket = filepath.Join(s.dir, "socket")
	s.uri = s.named("")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // the server has the socket now
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	// LISTEN_PID must be the server's own, which a shell knows before it becomes
	// the server.
	s.command = exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"`, "sh",
		binary, "export", "--pid-file", s.pidFile, "--verbose", sparse(t, dir, "disk", 4*mib))
	s.command.ExtraFiles = []*os.File{f} // becomes descriptor 3
	s.launch(t)
	_, _ = l.Close(), f.Close() // nothing was accepted here
	for range 3 {               // a listening socket, not a connection
		if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", s.uri)); got != strconv.Itoa(4*mib) {
			t.Errorf("size %q", got)
		}
	}
}

func TestRunCommand(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 4*mib)
	out := tool(t, binary, "export", "--socket", filepath.Join(dir, "s"), "--run", `nbdinfo --size "$uri"`, disk)
	if strings.TrimSpace(out) != strconv.Itoa(4*mib) {
		t.Errorf("prints %q", out)
	}
	err := exec.Command(binary, "export", "--socket", filepath.Join(dir, "s2"), "--run", "exit 7", disk).Run()
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() != 7 {
		t.Errorf("the command's exit status 7 came out as %v", err)
	}
}

func TestEndRemovesSocketAndPidFile(t *testing.T) {
	requireInterop(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		s := serve(t, "--null", "1GiB")
		text, err := os.ReadFile(s.pidFile)
		if err != nil || strings.TrimSpace(string(text)) != strconv.Itoa(s.command.Process.Pid) {
			t.Errorf("pid file holds %q, %v; want %d", text, err, s.command.Process.Pid)
		}
		if err := s.command.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.ended:
		case <-time.After(stopLimit):
			t.Fatalf("no end after %v", sig)
		}
		if s.err != nil {
			t.Errorf("after %v it ended with %v", sig, s.err)
			s.err = nil
		}
		for _, path := range []string{s.socket, s.pidFile} {
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("%s is left after %v (%v)", path, sig, err)
			}
		}
	}
}

func TestRestartAfterKill(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 4*mib)
	s := serve(t, disk)
	tool(t, "nbdsh", "-u", s.uri, "-c", `h.pwrite(b"k" * 4096, 0)`) // acknowledged, so it outlives the process
	if err := s.command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-s.ended
	s.err = nil // it was killed
	// The socket, the pid file and the lock of the dead process are in the way,
	// and none of them may stop the next.
	again := newServer(t)
	again.socket, again.uri, again.pidFile = s.socket, s.uri, s.pidFile
	if err := os.Remove(s.pidFile); err != nil {
		t.Fatal(err) // the helper takes it for readiness
	}
	again.start(t, "--socket", again.socket, disk)
	tool(t, "nbdsh", "-u", again.uri, "-c", `assert bytes(h.pread(4096, 0)) == b"k" * 4096`)
}

func TestEndServesRequestsInFlight(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 256*mib)
	s := serve(t, disk)
	// A client with a long queue, and SIGTERM in the middle of it: what was
	// acknowledged must be in the file.
	code := fmt.Sprintf(`
import os, signal
acknowledged = []
def done(i):
    def completed(error):
        if error.value == 0:
            acknowledged.append(i)
        return 1
    return completed
for i in range(200):
    h.aio_pwrite(bytes([i + 1]) * 1048576, i * 1048576, completion=done(i))
    if i == 100:
        os.kill(%d, signal.SIGTERM)
try:
    while h.aio_in_flight() > 0:
        h.poll(-1)
except nbd.Error:
    pass
print(" ".join(map(str, acknowledged)))`, s.command.Process.Pid)
	out := tool(t, "nbdsh", "-u", s.uri, "-c", code)
	s.stop(t)
	acknowledged := strings.Fields(out)
	if len(acknowledged) == 0 {
		t.Error("nothing was acknowledged")
	}
	text, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range acknowledged {
		i, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		block := text[i*mib : (i+1)*mib]
		if strings.Trim(string(block), string([]byte{byte(i + 1)})) != "" {
			t.Errorf("write %d was acknowledged and is not in the file", i)
		}
	}
}

func TestEndWithClientsInEveryState(t *testing.T) {
	requireInterop(t)
	s := serve(t, "--null", "1GiB")
	for _, greeting := range []string{"", "\x00\x00\x00\x03", "\x00\x00\x00\x03IHAVEOPT", "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x00\x10\x00half"} {
		c, err := net.Dial("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }() // it was only to be in the way
		if _, err := c.Write([]byte(greeting)); err != nil {
			t.Fatal(err)
		}
	}
	idle := exec.Command("nbdsh", "-u", s.uri, "-c", "import time; print('ready', flush=True); time.sleep(60)")
	out, err := idle.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := idle.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = idle.Process.Kill() // it sleeps
		_ = idle.Wait()         // killed
	}()
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s.stop(t)
	if took := time.Since(begin); took > stopLimit/2 {
		t.Errorf("ending took %v", took)
	}
}

func TestErrorsAreOneSentence(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 4*mib)
	s := serve(t, disk)
	for name, tt := range map[string]struct {
		args  []string
		names string // what the message must name
	}{
		"no such file":        {[]string{"--socket", filepath.Join(dir, "x"), filepath.Join(dir, "absent")}, "absent"},
		"a directory":         {[]string{"--socket", filepath.Join(dir, "x"), dir}, dir},
		"nothing to export":   {[]string{"--socket", filepath.Join(dir, "x")}, "name a file"},
		"bad size":            {[]string{"--socket", filepath.Join(dir, "x"), "--mem", "4KB"}, "KiB"},
		"bad flag":            {[]string{"--sokcet", "x", disk}, "sokcet"},
		"bad poll":            {[]string{"--socket", filepath.Join(dir, "x"), "--poll", "maybe", disk}, "maybe"},
		"bad cpus":            {[]string{"--socket", filepath.Join(dir, "x"), "--pin", "3-1", disk}, "3-1"},
		"tls without a cert":  {[]string{"--socket", filepath.Join(dir, "x"), "--tls", "require", disk}, "tls-cert"},
		"socket in use":       {[]string{"--socket", s.socket, disk}, s.socket},
		"no directory for it": {[]string{"--socket", filepath.Join(dir, "no", "x"), disk}, filepath.Join(dir, "no")},
		"socket path too long": {
			[]string{"--socket", filepath.Join(dir, strings.Repeat("l", 120)), disk}, "lll"},
	} {
		t.Run(name, func(t *testing.T) {
			command := exec.Command(binary, append([]string{"export"}, tt.args...)...)
			timer := time.AfterFunc(readyLimit, func() { _ = command.Process.Kill() }) // it should have ended
			defer timer.Stop()
			out, err := command.CombinedOutput()
			if err == nil {
				t.Fatal("it succeeded")
			}
			text := strings.TrimSpace(string(out))
			if !strings.Contains(text, tt.names) {
				t.Errorf("the message does not name %q:\n%s", tt.names, text)
			}
			if strings.Contains(text, "goroutine ") || strings.Count(text, "\n") > 3 {
				t.Errorf("not one sentence:\n%s", text)
			}
		})
	}
}
