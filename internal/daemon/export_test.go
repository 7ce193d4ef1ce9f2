package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd"
)

// checkLeaks fails t when it leaves goroutines or descriptors. Call it first.
func checkLeaks(t testing.TB) {
	t.Helper()
	testenv.CheckFDs(t)
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func TestStartExportUndoesWhatItBegan(t *testing.T) {
	dir := t.TempDir()
	file := testenv.SparseFile(t, filepath.Join(dir, "disk.img"), 1<<20)
	memory := Source{Name: "m", Memory: 1 << 20}
	for name, c := range map[string]struct {
		config ExportConfig
		want   string
	}{
		"missing file":   {ExportConfig{Sources: []Source{memory, {Name: "f", Path: file}, {Name: "g", Path: filepath.Join(dir, "missing")}}}, "missing"},
		"directory":      {ExportConfig{Sources: []Source{memory, {Name: "d", Path: dir}}}, dir},
		"no server":      {ExportConfig{Sources: []Source{memory, {Name: "r", URI: "nbd+unix:///?socket=" + filepath.Join(dir, "missing")}}}, "missing"},
		"a name twice":   {ExportConfig{Sources: []Source{memory, memory}}, "taken"},
		"a name too bad": {ExportConfig{Sources: []Source{{Name: "a\x00b", Memory: 1 << 20}}}, "NUL"},
		"too few CPUs":   {ExportConfig{Sources: []Source{memory}, Reactors: 3, CPUs: []int{0}}, "CPU"},
		"no such CPU":    {ExportConfig{Sources: []Source{memory, {Name: "f", Path: file}}, CPUs: []int{0, 1000}}, "1000"},
		"unknown engine": {ExportConfig{Sources: []Source{memory}, Engine: "steam"}, "steam"},
		"unknown poll":   {ExportConfig{Sources: []Source{memory}, Poll: "always"}, "always"},
		"depth":          {ExportConfig{Sources: []Source{memory}, Depth: 1000}, "depth"},
		"TLS":            {ExportConfig{Sources: []Source{memory}, TLS: nbd.TLSForced}, "TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			c.config.Log = quiet()
			if _, err := StartExport(c.config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want a word about %s", err, c.want)
			}
		})
	}
}

// startExport exports a source on a socket, until the test stops it.
func startExport(t *testing.T, source Source, dead time.Duration) (e *Exporter, socket string) {
	t.Helper()
	e, err := StartExport(ExportConfig{Sources: []Source{source}, DeadTimeout: dead, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(t.TempDir(), "nbd.sock")
	l, err := ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = e.Server.Serve(l) }() // ends with Stop
	return e, socket
}

func TestExporterServesEverySource(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	e, err := StartExport(ExportConfig{
		Sources: []Source{
			{Name: "file", Path: testenv.SparseFile(t, filepath.Join(dir, "disk.img"), 1<<20)},
			{Name: "memory", Memory: 2 << 20}, {Name: "null", Null: 3 << 20},
		},
		Reactors: 2, Poll: reactor.PollOff, Log: quiet(),
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := ListenUnix(filepath.Join(dir, "nbd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- e.Server.Serve(l) }() // ends with Stop
	var clients []*nbd.Client
	for name, size := range map[string]uint64{"": 1 << 20, "file": 1 << 20, "memory": 2 << 20, "null": 3 << 20} {
		c, err := nbd.Dial(t.Context(), "unix", l.Addr().String(), nbd.Options{Export: name})
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
		if c.Size() != size {
			t.Errorf("%q: size %d, want %d", name, c.Size(), size)
		}
		if err := errors.Join(c.Write(t.Context(), make([]byte, 4096), size-4096, 0), c.Read(t.Context(), make([]byte, 4096), 0, 0), c.Flush(t.Context())); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	registry := prometheus.NewPedanticRegistry() // checks what is collected against what is described
	for _, c := range e.Collectors() {
		if err := registry.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Error(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			values[f.GetName()] += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	if values["nbd_written_bytes_total"] != 4*4096 || values["nbd_read_bytes_total"] != 4*4096 || values["nbd_requests_total"] != 12 || values["nbd_connections"] != 4 {
		t.Errorf("%v", values)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := e.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := <-served; !errors.Is(err, nbd.ErrServerClosed) {
		t.Error(err)
	}
	for _, c := range clients {
		<-c.Done()
		_ = c.Close() // its server is gone
	}
}

func TestListenUnix(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = ListenUnix(path); err != nil {
		t.Fatalf("stale: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	file := testenv.SparseFile(t, filepath.Join(dir, "file"), 10)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "no socket", dir: "no socket", link: "no socket", filepath.Join(dir, "no/where"): "no/where", filepath.Join(dir, strings.Repeat("x", 120)): "xxx"} {
		if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Size() != 10 {
		t.Errorf("the file was touched: %v", err)
	}
}

func TestListenTCP(t *testing.T) {
	checkLeaks(t)
	for _, c := range []struct {
		address             string
		encrypted, insecure bool
		want                string // "" for success
	}{
		{"127.0.0.1:0", false, false, ""},
		{"localhost:0", false, false, ""},
		{"127.9.8.7:0", false, false, ""},
		{"0.0.0.0:0", true, false, ""},
		{"0.0.0.0:0", false, true, ""},
		{"0.0.0.0:0", false, false, "plain text"},
		{":0", false, false, "plain text"},
		{"[::]:0", false, false, "plain text"},
		{"192.0.2.1:10809", false, false, "plain text"},
		{"192.0.2.1:10809", true, false, "192.0.2.1"}, // not an address of this host
		{"127.0.0.1", false, false, "127.0.0.1"},
		{"127.0.0.1:no-such-service", false, false, "no-such-service"},
		{"127.0.0.1:65536", false, false, "65536"},
	} {
		l, err := ListenTCP(c.address, c.encrypted, c.insecure)
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v", c, err)
		}
		if err == nil {
			_ = l.Close() // nothing was accepted
		}
	}
}

// TestStopDoesNotWaitForAServerThatIsAway stops an export of another server's export
// while a request waits for that server.
func TestStopDoesNotWaitForAServerThatIsAway(t *testing.T) {
	checkLeaks(t)
	below, lower := startExport(t, Source{Memory: 1 << 20}, 0)
	above, upper := startExport(t, Source{URI: "nbd+unix:///?socket=" + lower}, 0)
	client, err := nbd.Dial(t.Context(), "unix", upper, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	data := []byte(strings.Repeat("remote", 4096))[:512*40]
	if err := client.Write(t.Context(), data, 0, 0); err != nil {
		t.Fatal(err)
	}
	now, cancel := context.WithCancel(t.Context())
	cancel()
	if err := below.Stop(now); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- client.Write(context.Background(), data, 4096, 0) }() // ends when the server above does
	select {
	case err := <-ended:
		t.Fatalf("a write while the server below is away: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := above.Stop(now); err != nil {
		t.Error(err)
	}
	if err := <-ended; err == nil {
		t.Error("a write that nobody stored succeeded")
	}
	_ = client.Close() // it is dead
}
