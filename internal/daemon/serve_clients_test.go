package daemon

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/engine/enginetest"
	"github.com/ashlar-storage/ashlar/internal/authority"
	"github.com/ashlar-storage/ashlar/nbd"
)

func TestServeControlsOverTCPForKnownCertificatesOnly(t *testing.T) {
	ours, theirs := authority.New(t, t.TempDir()), authority.New(t, t.TempDir())
	serverCert, serverKey := ours.Issue(t, "node", "127.0.0.1")
	config, err := nbd.LoadTLS(serverCert, serverKey, ours.File, true)
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, &enginetest.Fake{}, func(c *ServeConfig) {
		c.DefaultPool, c.ControlListen, c.ControlTLS, c.ControlNames = 0, []string{"127.0.0.1:0"}, config, []string{"operator"}
	})
	address := n.addresses.Control[1].String()
	ask := func(a *authority.Authority, name string) error {
		t.Helper()
		cert, key := a.Issue(t, name)
		c, err := control.LoadTLS(cert, key, ours.File, "")
		if err != nil {
			t.Fatal(err)
		}
		client, err := control.Dial(t.Context(), address, control.Options{TLS: c, Timeout: serveWait})
		if err != nil {
			return err
		}
		_, err = client.Node.Info(t.Context(), &controlpb.InfoRequest{})
		return errors.Join(err, client.Close())
	}
	if err := ask(ours, "operator"); err != nil {
		t.Errorf("the operator: %v", err)
	}
	if err := ask(ours, "somebody"); err == nil {
		t.Error("a certificate of another name is let in")
	}
	if err := ask(theirs, "operator"); err == nil {
		t.Error("a certificate of another authority is let in")
	}
	c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: config.ClientCAs, NextProtos: []string{"h2"}})
	if err == nil { // TLS 1.3 tells with the first read
		_ = c.SetDeadline(time.Now().Add(serveWait))
		_, err = io.ReadAll(c)
		_ = c.Close() // refused
	}
	if err == nil {
		t.Error("without a certificate")
	}
}

// sluggish connects, asks for much and reads nothing, so that it is owed replies.
func (n *testNode) sluggish(export string) net.Conn {
	n.t.Helper()
	c, err := net.Dial("unix", n.config.NBDSockets[0])
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Close() }) // cut by the server
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(c, greeting); err != nil {
		n.t.Fatal(err)
	}
	b := binary.BigEndian.AppendUint32(nil, 3)               // fixed newstyle, no zeroes
	b = binary.BigEndian.AppendUint64(b, 0x49484156454f5054) // IHAVEOPT
	b = binary.BigEndian.AppendUint32(b, 1)                  // EXPORT_NAME
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(export))), export...)
	for cookie := range uint64(12) {
		b = binary.BigEndian.AppendUint32(b, 0x25609513)
		b = binary.BigEndian.AppendUint32(b, 0) // READ
		b = binary.BigEndian.AppendUint64(b, cookie)
		b = binary.BigEndian.AppendUint64(b, 0)
		b = binary.BigEndian.AppendUint32(b, mib)
	}
	if _, err := c.Write(b); err != nil {
		n.t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 10+16)); err != nil { // the export, and the head of the first reply
		n.t.Fatal(err)
	}
	return c
}

func TestServeDoesNotWaitForClientsAfterTheSecondSignal(t *testing.T) {
	fake := &enginetest.Fake{}
	t.Cleanup(func() { _ = fake.Close() }) // memory only
	n := newNode(t, fake, nil)
	n.volume("data", mib)
	n.sluggish("data")
	n.drain()
	select {
	case err := <-n.ended:
		t.Fatalf("it did not wait for a client that is owed replies: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	began := time.Now()
	close(n.cut)
	n.stop()
	if took := time.Since(began); took > drainPatience/2 {
		t.Errorf("it took %v", took)
	}
}

func TestServeExportsTwoVolumesOfOneName(t *testing.T) {
	fake := &enginetest.Fake{}
	t.Cleanup(func() { _ = fake.Close() }) // memory only
	n := newNode(t, fake, func(c *ServeConfig) { c.PoolFile = filepath.Join(filepath.Dir(c.DataDir), "default") })
	n.volume("v", mib)
	before := n.dial("v") // of the only pool
	if _, err := n.client.Pools.Create(t.Context(), &controlpb.CreatePoolRequest{Name: "two", FileSizeBytes: 64 * mib}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.Volumes.Create(t.Context(), &controlpb.CreateVolumeRequest{Pool: "two", Name: "v", SizeBytes: mib}); !errors.Is(err, control.ErrExists) {
		t.Errorf("%v", err)
	}
	// A pool from elsewhere, where that name was free.
	if err := before.Close(); err != nil {
		t.Error(err)
	}
	n.closedVolumes()
	if _, err := n.client.Pools.Close(t.Context(), &controlpb.ClosePoolRequest{Name: "default"}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.Volumes.Create(t.Context(), &controlpb.CreateVolumeRequest{Pool: "two", Name: "v", SizeBytes: 2 * mib}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.Pools.Open(t.Context(), &controlpb.OpenPoolRequest{Name: "default", Paths: []string{n.config.PoolFile}}); err != nil {
		t.Fatal(err)
	}
	list, err := nbd.List(t.Context(), "unix", n.config.NBDSockets[0], nbd.Options{})
	if err != nil || len(list) != 2 || list[0].Name != "default/v" || list[1].Name != "two/v" {
		t.Errorf("%v, %v", list, err)
	}
	for export, size := range map[string]uint64{"default/v": mib, "two/v": 2 * mib} {
		if i, err := nbd.Info(t.Context(), "unix", n.config.NBDSockets[0], nbd.Options{Export: export}); err != nil || i.Size != size || i.Name != export {
			t.Errorf("%+v, %v", i, err)
		}
	}
	if _, err := nbd.Info(t.Context(), "unix", n.config.NBDSockets[0], nbd.Options{Export: "v"}); err == nil {
		t.Error("one of two was given out by the name of both")
	}
	v, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Pool: "two", Name: "v"})
	if err != nil || len(v.GetUris()) == 0 || !strings.Contains(v.GetUris()[0], "two") {
		t.Errorf("%v, %v", v, err)
	}
	if _, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Name: "v"}); !errors.Is(err, control.ErrInvalid) {
		t.Errorf("%v", err)
	}
}

func TestServeTakesUpTheFileOfItsFirstPoolAgain(t *testing.T) {
	fake := &enginetest.Fake{}
	t.Cleanup(func() { _ = fake.Close() }) // memory only
	n := newNode(t, fake, func(c *ServeConfig) { c.PoolFile = filepath.Join(filepath.Dir(c.DataDir), "default") })
	n.volume("v", mib)
	n.stop()
	if err := os.RemoveAll(n.config.DataDir); err != nil {
		t.Fatal(err)
	}
	n.start()
	if _, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Name: "v"}); err != nil {
		t.Error(err)
	}
}

func TestURI(t *testing.T) {
	for _, c := range []struct {
		export, network, address string
		encrypted                bool
		want                     string
	}{
		{"v", "tcp", "127.0.0.1:10809", false, "nbd://127.0.0.1:10809/v"},
		{"v@s", "tcp", "[::1]:5", true, "nbds://[::1]:5/v@s"},
		{"p/v", "unix", "/run/x", false, "nbd+unix:///p/v?socket=/run/x"},
		{"v", "pipe", "x", false, ""},
		{"v", "tcp", "nonsense", false, ""},
	} {
		got := URI(c.export, c.network, c.address, c.encrypted)
		if got == c.want {
			continue
		}
		u, err := nbd.ParseURI(got) // another spelling of the same
		want, wantErr := nbd.ParseURI(c.want)
		if err != nil || wantErr != nil || u.String() != want.String() {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

func TestLockNamesItsHolder(t *testing.T) {
	checkLeaks(t)
	dir := filepath.Join(t.TempDir(), "made", "here")
	l, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{"": "another process", "x\n": "another process", "999999999\n": "process 999999999;"} {
		if err := os.WriteFile(filepath.Join(dir, "lock"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := lockDir(dir); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%q: %v", text, err)
		}
	}
	l.unlock()
	if l, err = lockDir(dir); err != nil {
		t.Fatal(err)
	}
	l.unlock()
}
