package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// Debian 12's libnbd and qemu do not know extended headers. These tests run the programs
// of Debian 13, which foreign-root.sh unpacks.

const (
	gib = 1 << 30

	foreignLimit       = 5 * time.Minute // to download and unpack them, the first time
	foreignUnreachable = 69              // exit code of foreign-root.sh without a mirror
)

// requireForeign has the programs of a newer Debian found before this one's. It skips t
// where they are not kept yet and cannot be downloaded.
func requireForeign(t *testing.T) {
	t.Helper()
	requireInterop(t)
	folder, err := foreignFolder()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == foreignUnreachable {
		t.Skipf("needs the programs of Debian 13 (make interop does not skip it where a mirror is in reach): %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", folder+":"+os.Getenv("PATH"))
}

// foreignFolder is where foreign-root.sh puts the programs. It asks once.
var foreignFolder = sync.OnceValues(func() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), foreignLimit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(ctx, "./foreign-root.sh")
	command.Stdout, command.Stderr = &stdout, &stderr
	command.WaitDelay = time.Second
	if err := command.Run(); err != nil {
		return "", fmt.Errorf("foreign-root.sh: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
})

// serveObserved starts an export of which the log tells about every connection; metrics
// is the URL of its metrics.
func serveObserved(t *testing.T, args ...string) (s *server, metrics string) {
	t.Helper()
	address := freeAddress(t)
	return serve(t, append([]string{"--log-level", "debug", "--metrics", address}, args...)...), "http://" + address + "/metrics"
}

// serveVolume starts a node with one thin volume of 12 GiB, which has a snapshot.
func serveVolume(t *testing.T) (s *server, metrics string) {
	t.Helper()
	address := freeAddress(t)
	s = newServer(t)
	s.socket = filepath.Join(s.dir, "socket")
	s.uri = s.named("data")
	control := filepath.Join(s.dir, "control")
	s.command = exec.Command(binary, "serve", "--data-dir", filepath.Join(s.dir, "node"), "--default-pool", "16GiB", "--socket", control,
		"--nbd-socket", s.socket, "--pid-file", s.pidFile, "--log-level", "debug", "--metrics", address, "--observe", "none")
	s.launch(t)
	t.Setenv("ASHLAR_SERVER", "unix://"+control)
	tool(t, binary, "volume", "create", "data", "--size", "12GiB")
	tool(t, binary, "snapshot", "create", "data@before")
	return s, "http://" + address + "/metrics"
}

var connectionLine = regexp.MustCompile(`(?m)^.* msg="nbd connection" .*$`)

// wantExtended wants all connections that s had, and at least one, to have used extended
// headers, by its own log.
func (s *server) wantExtended(t *testing.T) {
	t.Helper()
	lines := connectionLine.FindAllString(s.log.String(), -1)
	for _, line := range lines {
		if !strings.Contains(line, " extended=true ") {
			t.Errorf("without extended headers: %s", line)
		}
	}
	if len(lines) == 0 {
		t.Error("no connection in the server's log")
	}
}

// archipelago makes a sparse file with islands of random bytes, 1 MiB each.
func archipelago(t *testing.T, dir, name string, size int64, islands ...int64) string {
	t.Helper()
	path := sparse(t, dir, name, size)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	source := rand.NewChaCha8([32]byte{4, 5, 6})
	island := make([]byte, mib)
	for _, offset := range islands {
		_, _ = source.Read(island) // never fails
		if _, err := f.WriteAt(island, offset); err != nil {
			t.Error(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// largeSize and largeIslands have data, and holes of more than 4 GiB, beyond what 32 bits hold.
const largeSize = 11*gib + 4096

var largeIslands = []int64{0, 4*gib - mib/2, 5 * gib, 11*gib - mib}

// sameLarge compares two large files, or exports, without reading what both lack.
func sameLarge(t *testing.T, a, b string) {
	t.Helper()
	if out := tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", a, b); !strings.Contains(out, "Images are identical") {
		t.Errorf("%s and %s: %s", a, b, out)
	}
}

func TestExtendedHeadersByNbdsh(t *testing.T) {
	requireForeign(t)
	t.Run("file", func(t *testing.T) {
		s, metrics := serveObserved(t, sparse(t, scratch(t), "disk", 12*gib))
		script(t, "extended.py", s.uri, metrics, "base:allocation")
	})
	t.Run("volume", func(t *testing.T) {
		s, metrics := serveVolume(t)
		script(t, "extended.py", s.uri, metrics, "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:before")
	})
}

// TestNbdshOfDebian13 runs the scripts of Debian 12's libnbd with the newer one, which
// asks for extended headers by itself.
func TestNbdshOfDebian13(t *testing.T) {
	requireForeign(t)
	t.Run("commands", func(t *testing.T) {
		dir := scratch(t)
		file := sparse(t, dir, "disk", 8*gib)
		s, _ := serveObserved(t, file)
		readOnly := serve(t, "--read-only", sparse(t, dir, "ro", 16*mib))
		script(t, "commands.py", s.uri, readOnly.uri, file)
	})
	t.Run("commands on memory", func(t *testing.T) {
		s := serve(t, "--mem", "256MiB")
		readOnly := serve(t, "--read-only", "--mem", "16MiB")
		script(t, "commands.py", s.uri, readOnly.uri, "")
	})
	t.Run("negotiation", func(t *testing.T) {
		dir := scratch(t)
		s := serve(t, "first="+sparse(t, dir, "a", 64*mib), "second="+sparse(t, dir, "b", 32*mib))
		script(t, "negotiation.py", s.socket, "first", fmt.Sprint(64*mib), "second", fmt.Sprint(32*mib))
	})
}

func TestNbdinfoShowsExtendedHeaders(t *testing.T) {
	requireForeign(t)
	s, _ := serveObserved(t, archipelago(t, scratch(t), "disk", largeSize, largeIslands...))
	var info struct {
		Structured bool `json:"structured"`
		Extended   bool `json:"extended"`
		Exports    []struct {
			Size int64 `json:"export-size"`
		} `json:"exports"`
	}
	out := tool(t, "nbdinfo", "--json", s.uri)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !info.Structured || !info.Extended || len(info.Exports) != 1 || info.Exports[0].Size != largeSize {
		t.Errorf("unexpected:\n%s", out)
	}
	for _, what := range []string{"extended-headers", "structured-reply"} {
		tool(t, "nbdinfo", "--can", what, s.uri)
	}
	var extents []struct {
		Offset int64 `json:"offset"`
		Length int64 `json:"length"`
		Type   int   `json:"type"`
	}
	out = tool(t, "nbdinfo", "--map", "--json", s.uri)
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var end, longest int64
	for _, e := range extents {
		if e.Offset != end {
			t.Fatalf("extents do not follow each other:\n%s", out)
		}
		end += e.Length
		longest = max(longest, e.Length)
	}
	if end != largeSize || longest <= 4*gib {
		t.Errorf("the map ends at %d, its longest extent has %d bytes:\n%s", end, longest, out)
	}
	s.wantExtended(t)
}

func TestNbdcopyWithExtendedHeaders(t *testing.T) {
	requireForeign(t)
	for name, flags := range map[string][]string{
		"one connection":               {"--connections=1", "--flush"},
		"four connections":             {"--connections=4", "--flush"},
		"into what is known to be new": {"--destination-is-zero", "--flush"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := scratch(t)
			source := archipelago(t, dir, "source", largeSize, largeIslands...)
			disk, back := sparse(t, dir, "disk", largeSize), sparse(t, dir, "back", largeSize)
			s, _ := serveObserved(t, disk)
			o, _ := serveObserved(t, sparse(t, dir, "other", largeSize))
			tool(t, "nbdcopy", append(flags, source, s.uri)...)
			tool(t, "nbdcopy", append(flags, s.uri, o.uri)...)
			tool(t, "nbdcopy", append(flags, o.uri, back)...)
			sameLarge(t, source, s.uri)
			sameLarge(t, source, disk)
			sameLarge(t, source, back)
			s.wantExtended(t)
			o.wantExtended(t)
		})
	}
	t.Run("random data", func(t *testing.T) { // every byte compared, by a program that reads all
		const size = 96*mib + 4096
		dir := scratch(t)
		source, disk, back := patchwork(t, dir, "source", size), sparse(t, dir, "disk", size), filepath.Join(dir, "back")
		s, _ := serveObserved(t, disk)
		tool(t, "nbdcopy", "--connections=4", source, s.uri)
		tool(t, "nbdcopy", "--connections=4", s.uri, back)
		s.wantExtended(t)
		s.stop(t)
		same(t, source, disk)
		same(t, source, back)
	})
}

func TestQemuWithExtendedHeaders(t *testing.T) {
	requireForeign(t)
	dir := scratch(t)
	source := archipelago(t, dir, "source", largeSize, largeIslands...)
	disk, back := sparse(t, dir, "disk", largeSize), filepath.Join(dir, "back.qcow2")
	s, _ := serveObserved(t, disk)
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, s.uri)
	sameLarge(t, source, s.uri)
	sameLarge(t, source, disk)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri, back)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, back)

	var extents []struct {
		Start, Length int64
		Data, Zero    bool
	}
	out := tool(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri)
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var end, data, longest int64
	for _, e := range extents {
		if e.Start != end || e.Data == e.Zero {
			t.Fatalf("the map of a sparse file:\n%s", out)
		}
		end += e.Length
		if e.Data {
			data += e.Length
		}
		longest = max(longest, e.Length)
	}
	if want := int64(len(largeIslands)) * mib; end != largeSize || data < want || data > 2*want || longest <= 4*gib {
		t.Errorf("the map ends at %d, has %d bytes of data, its longest extent has %d:\n%s", end, data, longest, out)
	}

	for _, args := range [][]string{
		{"-c", "2000", "-d", "32", "-s", "4096", "-o", fmt.Sprint(6 * gib), "-w", "--pattern=85", "--flush-interval=100"},
		{"-c", "2000", "-d", "32", "-s", "4096", "-o", fmt.Sprint(6 * gib)},
	} {
		tool(t, "qemu-img", append(append([]string{"bench", "-f", "raw", "-t", "none"}, args...), s.uri)...)
	}
	out = tool(t, "qemu-io", "-f", "raw", "-t", "writeback", "-d", "unmap", "-c", "write -P 7 6442446848 8192", "-c", "write -z 6G 1G",
		"-c", "read -P 7 6442446848 4096", "-c", "read -P 0 6G 1M", "-c", "write -zu 7G 1G", "-c", "discard 8G 2047M", "-c", "flush",
		"-c", "write -f -P 9 9G 4096", "-c", "read -P 9 9G 4096", s.uri)
	if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io:\n%s", out)
	}
	s.wantExtended(t)
}

// TestExportOfQemuWithExtendedHeaders stands on qemu's server, the other one with extended
// headers: there our client speaks them, and libnbd to us above it.
func TestExportOfQemuWithExtendedHeaders(t *testing.T) {
	requireForeign(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", largeSize)
	trace := filepath.Join(dir, "trace")
	u := &upstream{name: "qemu-nbd", needs: "qemu-utils", args: func(socket, disk string) []string {
		return []string{"--persistent", "--shared=8", "--format=raw", "--discard=unmap", "--trace", "enable=nbd_negotiate_send_rep_len",
			"--trace", "enable=nbd_receive_request,file=" + trace, "--socket=" + socket, disk}
	}}
	u.start(t, dir, disk)
	defer u.kill()
	s, _ := serveObserved(t, "nbd+unix:///?socket="+u.socket)
	source := archipelago(t, dir, "source", largeSize, largeIslands...)
	tool(t, "nbdcopy", "--flush", source, s.uri)
	sameLarge(t, source, s.uri)
	tool(t, "nbdsh", "-u", s.uri, "-c", "h.zero(6 << 30, 4096)", "-c", "h.trim(5 << 30, 6 << 30)", "-c", "h.flush()",
		"-c", "assert bytes(h.pread(1 << 20, 5 << 30)) == bytes(1 << 20)")
	s.wantExtended(t)
	s.stop(t)
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"opt=11 (extended headers), type=1 (ack)", fmt.Sprint(6 * gib), fmt.Sprint(5 * gib)} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("qemu-nbd's trace has no %q:\n%.3000s", want, text)
		}
	}
}

// TestClientOnQemuOfDebian13 runs the tests of our client against others' servers with the
// newer qemu-nbd.
func TestClientOnQemuOfDebian13(t *testing.T) {
	requireForeign(t)
	out := tool(t, "go", "test", "-count=1", "-v", "-run", "^TestClientInterop", "../../nbd")
	if !strings.Contains(out, "headers extended") || !strings.Contains(out, "--- PASS: TestClientInteropModel/qemu-nbd/extended") {
		t.Errorf("extended headers were not used:\n%s", out)
	}
}
