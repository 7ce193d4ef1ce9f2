package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// nbdkit starts nbdkit with the given arguments on a unix socket until the end
// of the test.
func nbdkit(t testing.TB, arguments ...string) (socket string) {
	t.Helper()
	path := testenv.RequireCommand(t, "nbdkit", "nbdkit")
	socket = filepath.Join(t.TempDir(), "nbdkit.sock")
	startPeer(t, socket, exec.Command(path, append([]string{"--foreground", "--unix", socket}, arguments...)...))
	return socket
}

// qemuNBD starts qemu-nbd with the given arguments on a unix socket until the
// end of the test.
func qemuNBD(t testing.TB, arguments ...string) (socket string) {
	t.Helper()
	path := testenv.RequireCommand(t, "qemu-nbd", "qemu-utils")
	socket = filepath.Join(t.TempDir(), "qemu.sock")
	startPeer(t, socket, exec.Command(path, append([]string{"--persistent", "--shared=0", "--socket", socket}, arguments...)...))
	return socket
}

// startPeer starts a server and waits until its socket takes connections.
func startPeer(t testing.TB, socket string, cmd *exec.Cmd) {
	t.Helper()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { // ends with the process
		_ = cmd.Wait() // it is killed
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // may have ended
		<-ended
		if t.Failed() && output.Len() > 0 {
			t.Logf("%s: %s", filepath.Base(cmd.Path), output.String())
		}
	})
	for deadline := time.Now().Add(rawTimeout); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close() // it was a knock
			return
		}
		select {
		case <-ended:
			t.Fatalf("%s ended: %s", cmd.Path, output.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %v", cmd.Path, err)
		}
	}
}

// TestClientInteropModel runs the random model against real servers.
func TestClientInteropModel(t *testing.T) {
	const size = 4 << 20
	for _, tt := range []struct {
		name  string
		start func(t *testing.T) string
	}{
		{"nbdkit", func(t *testing.T) string { return nbdkit(t, "memory", "4M") }},
		{"qemu-nbd", func(t *testing.T) string {
			return qemuNBD(t, "--format=raw", "--cache=writeback", testenv.TempFileOn(t, t.TempDir(), size))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, wish := range []Headers{HeadersExtended, HeadersSimple} {
				t.Run(wish.String(), func(t *testing.T) {
					checkClientGoroutines(t)
					seed := uint64(time.Now().UnixNano())
					t.Logf("seed %d", seed)
					c := dialFake(t, tt.start(t), Options{Headers: wish, Depth: 24})
					if c.Size() != size {
						t.Fatalf("size %d", c.Size())
					}
					t.Logf("headers %s, flags %#x, info %+v", c.Headers(), c.Flags(), c.Info())
					if wish == HeadersSimple && c.Headers() != HeadersSimple || wish == HeadersExtended && c.Headers() == HeadersSimple {
						t.Errorf("headers %s", c.Headers())
					}
					runModel(t, c, make([]byte, size), seed, 32, 60)
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

func TestClientInteropCommands(t *testing.T) {
	for name, socket := range map[string]string{
		"nbdkit":   nbdkit(t, "memory", "1M"),
		"qemu-nbd": qemuNBD(t, "--format=raw", "--discard=unmap", testenv.TempFileOn(t, t.TempDir(), 1<<20)),
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			c := dialFake(t, socket, Options{MetaContexts: []string{ContextAllocation, "base:absent"}})
			if len(c.Contexts()) != 1 || c.Contexts()[0].Name != ContextAllocation {
				t.Fatalf("contexts %v", c.Contexts())
			}
			if err := c.Write(ctx, bytes.Repeat([]byte{1}, 256<<10), 256<<10, CommandFlagFUA); err != nil {
				t.Fatal(err)
			}
			statuses, err := c.BlockStatus(ctx, 0, 1<<20, 0)
			if err != nil || len(statuses) != 1 {
				t.Fatal(statuses, err)
			}
			extents := statuses[0].Extents
			if len(extents) != 3 || extents[0].Length != 256<<10 || extents[0].State != 3 || extents[1].Length != 256<<10 || extents[1].State != 0 || extents[2].Length != 512<<10 {
				t.Errorf("extents %v", extents)
			}
			one, err := c.BlockStatus(ctx, 128<<10, 512, CommandFlagReqOne)
			if err != nil || fmt.Sprint(one[0].Extents) != "[{512 3}]" {
				t.Errorf("one extent: %v %v", one, err)
			}
			for name, err := range map[string]error{
				"df":    c.Read(ctx, make([]byte, 64<<10), 224<<10, CommandFlagDF),
				"zero":  c.WriteZeroes(ctx, 256<<10, 4096, CommandFlagNoHole|CommandFlagFUA),
				"trim":  c.Trim(ctx, 256<<10, 64<<10, 0),
				"cache": c.Cache(ctx, 0, 1<<20, 0),
				"flush": c.Flush(ctx),
			} {
				if err != nil && !(errors.Is(err, ErrNotAdvertised) && name == "cache") {
					t.Errorf("%s: %v", name, err)
				}
			}
			info, err := Info(ctx, "unix", socket, Options{})
			if err != nil || info.Size != 1<<20 || len(info.Contexts) == 0 || info.Contexts[0] != ContextAllocation {
				t.Errorf("Info: %+v %v", info, err)
			}
			old := dialFake(t, socket, Options{ExportNameOnly: true})
			if err := old.Read(ctx, make([]byte, 512), 0, 0); err != nil || old.Headers() != HeadersSimple || old.Size() != 1<<20 {
				t.Errorf("EXPORT_NAME: %v, headers %s, size %d", err, old.Headers(), old.Size())
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestClientInteropBigReads reads more than one payload from nbdkit's pattern,
// in which every 8 bytes are their own offset.
func TestClientInteropBigReads(t *testing.T) {
	const offset, size = 8 << 20, 40 << 20
	c := dialFake(t, nbdkit(t, "pattern", "64M"), Options{})
	p := make([]byte, size)
	if n, err := c.ReadAt(p, offset); n != size || err != nil {
		t.Fatal(n, err)
	}
	for i := 0; i < size; i += 8 {
		if got := binary.BigEndian.Uint64(p[i:]); got != uint64(offset+i) {
			t.Fatalf("at %d: %d", offset+i, got)
		}
	}
}

func TestClientInteropErrors(t *testing.T) {
	c := dialFake(t, nbdkit(t, "--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%", "error-pwrite=ENOSPC", "error-pwrite-rate=50%"), Options{})
	for range 10 {
		err := c.Read(t.Context(), make([]byte, 4096), 4096, 0)
		if refusal := new(CommandError); !errors.As(err, &refusal) || refusal.Errno != ErrnoIO || !errors.Is(err, syscall.EIO) {
			t.Fatalf("read: %v", err)
		}
	}
	failed := 0
	for range 100 {
		err := c.Write(t.Context(), make([]byte, 4096), 4096, 0)
		if err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("write: %v", err)
		}
		if err != nil {
			failed++
		}
	}
	if failed == 0 || failed == 100 {
		t.Errorf("%d of 100 writes failed, at a rate of 50%%", failed)
	}

	readOnly := nbdkit(t, "--readonly", "memory", "1M")
	if err := dialFake(t, readOnly, Options{}).Write(t.Context(), []byte{1}, 0, 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("write to read-only: %v", err)
	}
	unchecked := dialFake(t, readOnly, Options{Unchecked: true})
	for name, tt := range map[string]struct {
		err  error
		want Error
	}{
		"write to read-only": {unchecked.Write(t.Context(), make([]byte, 512), 0, 0), ErrnoPerm},
		"read past the end":  {unchecked.Read(t.Context(), make([]byte, 512), 1<<20, 0), ErrnoInvalid},
		"unknown flag":       {unchecked.Read(t.Context(), make([]byte, 512), 0, CommandFlagReqOne), ErrnoInvalid},
	} {
		if !errors.Is(tt.err, tt.want) {
			t.Errorf("%s: %v, want %v", name, tt.err, tt.want)
		}
	}
	if err := unchecked.Read(t.Context(), make([]byte, 512), 0, 0); err != nil {
		t.Errorf("after the refusals: %v", err)
	}
}

func TestClientInteropOldServers(t *testing.T) {
	for _, tt := range []struct {
		name      string
		arguments []string
		headers   Headers
		want      string
	}{
		{"no structured replies", []string{"--no-sr"}, HeadersSimple, ""},
		{"no handshake flags", []string{"--mask-handshake=0"}, HeadersSimple, ""},
		{"no fixed newstyle", []string{"--mask-handshake=2"}, HeadersSimple, ""},
		{"oldstyle", []string{"--oldstyle"}, 0, "oldstyle"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Dial(t.Context(), "unix", nbdkit(t, append(tt.arguments, "memory", "1M")...), Options{})
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Write(t.Context(), []byte("word"), 0, 0); err != nil || c.Headers() != tt.headers {
				t.Errorf("%v, headers %s", err, c.Headers())
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestClientInteropExports(t *testing.T) {
	socket := qemuNBD(t, "--format=raw", "--export-name=disk", "--description=a disk", "--read-only", testenv.TempFileOn(t, t.TempDir(), 1<<20))
	exports, err := List(t.Context(), "unix", socket, Options{})
	if err != nil || fmt.Sprint(exports) != "[{disk a disk}]" {
		t.Errorf("List: %v %v", exports, err)
	}
	info, err := Info(t.Context(), "unix", socket, Options{Export: "disk"})
	if err != nil || info.Name != "disk" || info.Description != "a disk" || info.Flags&FlagReadOnly == 0 || info.BlockMin == 0 {
		t.Errorf("Info: %+v %v", info, err)
	}
	_, err = DialURI(t.Context(), "nbd+unix:///absent?socket="+socket, Options{MetaContexts: []string{ContextAllocation}})
	if refusal := new(OptionError); !errors.As(err, &refusal) || optionReply(refusal.Reply) != repErrUnknown {
		t.Errorf("unknown export: %v", err)
	}
	c, err := DialURI(t.Context(), "nbd+unix:///disk?socket="+socket, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestClientInteropDirtyBitmap(t *testing.T) {
	qemuImg := testenv.RequireCommand(t, "qemu-img", "qemu-utils")
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	for _, arguments := range [][]string{{"create", "-q", "-f", "qcow2", image, "1M"}, {"bitmap", "--add", image, "b0"}} {
		if out, err := exec.Command(qemuImg, arguments...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v %s", arguments, err, out)
		}
	}
	const bitmap = "qemu:dirty-bitmap:b0"
	socket := qemuNBD(t, "--format=qcow2", "--read-only", "--bitmap=b0", "--allocation-depth", image)
	c := dialFake(t, socket, Options{MetaContexts: []string{bitmap, ContextAllocation, "qemu:allocation-depth"}})
	if len(c.Contexts()) != 3 {
		t.Fatalf("contexts %v", c.Contexts())
	}
	statuses, err := c.BlockStatus(t.Context(), 0, 1<<20, 0)
	if err != nil || len(statuses) != 3 {
		t.Fatal(statuses, err)
	}
	for _, status := range statuses {
		if len(status.Extents) != 1 || status.Extents[0].Length != 1<<20 {
			t.Errorf("context %d: %v", status.ID, status.Extents)
		}
	}
}

func TestClientInteropTLS(t *testing.T) {
	path := testenv.RequireCommand(t, "nbdkit", "nbdkit")
	if out, err := exec.Command(path, "--dump-config").Output(); err != nil || !bytes.Contains(out, []byte("tls=yes")) {
		t.Skipf("needs nbdkit with TLS (%v)", err)
	}
	pki := clientCertificates(t)
	socket := nbdkit(t, "--tls=require", "--tls-certificates="+pki.dir, "--tls-verify-peer", "memory", "1M")
	uri := "nbds+unix:///?socket=" + socket

	c, err := DialURI(t.Context(), uri+"&tls-hostname=localhost&tls-certificates="+pki.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !c.TLS() || c.Headers() == HeadersSimple {
		t.Errorf("TLS %v, headers %s", c.TLS(), c.Headers())
	}
	runModel(t, c, make([]byte, 1<<20), 1, 16, 30)
	if err := c.Close(); err != nil {
		t.Error(err)
	}

	withoutClient := filepath.Join(pki.dir, "roots")
	if err := os.Mkdir(withoutClient, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(pki.dir, "ca-cert.pem"), filepath.Join(withoutClient, "ca-cert.pem")); err != nil {
		t.Fatal(err)
	}
	for name, uri := range map[string]string{
		"without a certificate": uri + "&tls-certificates=" + withoutClient,
		"wrong name":            uri + "&tls-hostname=other.example&tls-certificates=" + pki.dir,
		"other authority":       uri + "&tls-certificates=" + pki.dir + "/other",
		"plaintext":             "nbd+unix:///?socket=" + socket,
	} {
		if c, err := DialURI(t.Context(), uri, Options{}); err == nil {
			_ = c.Close() // the failure is that it exists
			t.Errorf("%s: the server or the client should refuse", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}

	plain := nbdkit(t, "--tls=off", "memory", "1M")
	if _, err := DialURI(t.Context(), "nbds+unix:///?socket="+plain, Options{}); !errors.Is(err, ErrDowngrade) {
		t.Errorf("server without TLS: %v", err)
	}
	if c, err := DialURI(t.Context(), "nbd+unix:///?socket="+plain+"&tls-certificates="+pki.dir, Options{}); err != nil || c.TLS() {
		t.Errorf("opportunistic: %v", err)
	} else if err := c.Close(); err != nil {
		t.Error(err)
	}
	raw := rawDial(t, "unix", socket, clientFixedNewstyle)
	if kind := raw.optionResult(optGo, rawInfo("")); kind != repErrTLSRequired {
		t.Errorf("GO before TLS: reply %#x", uint32(kind))
	}
	raw.startTLS(&tls.Config{ServerName: "localhost", RootCAs: pki.roots, Certificates: []tls.Certificate{pki.client}})
	raw.goExport("")
}

// BenchmarkClient reads and writes over a unix socket to nbdkit's memory.
func BenchmarkClient(b *testing.B) {
	socket := nbdkit(b, "memory", "64M")
	for _, command := range []Command{CommandRead, CommandWrite} {
		for _, size := range []int{4 << 10, 128 << 10} {
			for _, depth := range []int{1, 32} {
				b.Run(fmt.Sprintf("%s/%dKiB/depth%d", clientCommandNames[command], size>>10, depth), func(b *testing.B) {
					c, err := Dial(b.Context(), "unix", socket, Options{Depth: depth})
					if err != nil {
						b.Fatal(err)
					}
					b.SetBytes(int64(size))
					b.ReportAllocs()
					ended := make(chan *Request, depth)
					requests := make([]Request, depth)
					n := 0
					for ; n < min(depth, b.N); n++ {
						r := &requests[n]
						*r = Request{Command: command, Offset: uint64(n * size), Length: uint64(size), Buf: make([]byte, size), Done: func(r *Request) { ended <- r }}
						c.Submit(r)
					}
					for range b.N {
						r := <-ended
						if r.Err != nil {
							b.Fatal(r.Err)
						}
						if n < b.N {
							n++
							c.Submit(r)
						}
					}
					if err := c.Close(); err != nil {
						b.Fatal(err)
					}
				})
			}
		}
	}
}
