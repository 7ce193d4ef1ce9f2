package remote

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

func TestOpenSaysWhatIsWrong(t *testing.T) {
	n := newNode(t)
	n.start(n.memory(memdev.Config{Size: testSize}))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	silent, err := net.Listen("unix", filepath.Join(t.TempDir(), "silent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, test := range []struct {
		config Config
		want   string
	}{
		{Config{URI: "http://x/"}, `scheme "http"`},
		{Config{URI: n.uri(), Connections: 17}, "17 connections"},
		{Config{URI: n.uri(), Connections: -1}, "-1 connections"},
		{Config{URI: n.uri(), DeadTimeout: -1}, "negative"},
		{Config{URI: n.uri(), RetainBytes: 1}, "must be at least"},
		{Config{URI: "nbds://localhost/?tls-type=psk"}, "pre-shared keys"},
		{Config{URI: "nbd+unix:///?socket=" + filepath.Join(t.TempDir(), "none")}, "no such file"},
		{Config{URI: strings.Replace(n.uri(), ":///", ":///none", 1)}, "unknown export"},
		{Config{URI: n.uri(), TLSRequired: true}, "TLS is required"},
		{Config{URI: n.uri(), Engine: "steam"}, "unknown engine"},
		{Config{URI: "nbd+unix:///?socket=" + silent.Addr().String()}, "deadline exceeded"},
	} {
		d, err := Open(ctx, test.config)
		if err == nil {
			t.Errorf("%+v: opened", test.config)
			_ = d.Close() // the test has failed
		} else if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want %q", test.config, err, test.want)
		}
	}
	if d := open(t, Config{URI: n.uri()}); d.Info().Size != testSize {
		t.Errorf("info %+v", d.Info())
	} else if _, err := d.OpenQueue(nil, 0); err == nil {
		t.Error("a queue of depth 0 opened")
	}
}

func TestRequestsOutsideTheRulesAreAnswered(t *testing.T) {
	n := newNode(t)
	n.start(without{n.memory(memdev.Config{Size: testSize}), datapath.FeatureDiscard | datapath.FeatureFUA | datapath.FeatureFastZero})
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	for _, test := range []struct {
		request datapath.Request
		want    datapath.Status
	}{
		{datapath.Request{Op: datapath.OpDiscard, Length: 512}, datapath.StatusNotSupported},
		{datapath.Request{Op: datapath.OpWrite, Flags: datapath.FlagFUA, Length: 512, Buf: block(1)}, datapath.StatusNotSupported},
		{datapath.Request{Op: datapath.OpWriteZeroes, Flags: datapath.FlagFastZero, Length: 512}, datapath.StatusNotSupported},
		{datapath.Request{Op: datapath.OpCount}, datapath.StatusNotSupported},
		{datapath.Request{Op: datapath.OpExtents, Length: 512, Context: datapath.ContextAllocation}, datapath.StatusInvalid},
		{datapath.Request{Op: datapath.OpWrite, Length: 8 << 20, Buf: make([]byte, 8<<20)}, datapath.StatusInvalid},
	} {
		if c.Do(&test.request); test.request.Status != test.want {
			t.Errorf("%s: %s, want %s", test.request.Op, test.request.Status, test.want)
		}
	}
}

func TestFewerConnectionsThanAskedForServe(t *testing.T) {
	n := newNode(t)
	n.config.ConnectionsMax = 2
	n.start(n.memory(memdev.Config{Size: testSize}))
	d := open(t, Config{URI: n.uri(), Connections: 4})
	if got := d.State().Connections; got != 2 {
		t.Errorf("%d connections, want 2", got)
	}
	c := client(t, d)
	defer c.Close()
	c.Write(0, block(1))
	if !bytes.Equal(c.Read(0, 512), block(1)) {
		t.Error("other bytes came back")
	}
}

// TestWithoutFlushNothingIsRetained: nobody would ever say that it need not be.
func TestWithoutFlushNothingIsRetained(t *testing.T) {
	n := newNode(t)
	n.start(without{n.memory(memdev.Config{Size: testSize}), datapath.FeatureFlush})
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	c.Write(0, block(1))
	_ = d.reactor.Run(func(*reactor.Reactor) { // it runs
		if d.core.retention.on() {
			t.Error("a write is retained")
		}
	})
	r := &datapath.Request{Op: datapath.OpFlush}
	if c.Do(r); r.Status != datapath.StatusNotSupported {
		t.Errorf("flush: %s", r.Status)
	}
}

// certificate makes one that signs itself, for localhost.
func certificate(t *testing.T) (pair tls.Certificate, authorities *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	authorities = x509.NewCertPool()
	authorities.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}, authorities
}

func TestTLS(t *testing.T) {
	pair, authorities := certificate(t)
	n := newNode(t)
	n.config.TLS, n.config.TLSConfig = nbd.TLSForced, &tls.Config{Certificates: []tls.Certificate{pair}}
	v := newVolatile(n, testSize)
	n.start(v)
	if _, err := Open(t.Context(), Config{URI: n.uri()}); err == nil || !strings.Contains(err.Error(), "TLS required") {
		t.Errorf("without TLS: %v", err)
	}
	if _, err := Open(t.Context(), Config{URI: strings.Replace(n.uri(), "nbd+", "nbds+", 1), TLS: &tls.Config{}}); !errors.As(err, new(x509.UnknownAuthorityError)) {
		t.Errorf("a certificate nobody knows: %v", err)
	}
	d := open(t, Config{URI: strings.Replace(n.uri(), "nbd+", "nbds+", 1), TLS: &tls.Config{RootCAs: authorities}, Connections: 2})
	c := client(t, d)
	defer c.Close()
	large := make([]byte, 1<<20)
	for i := range large {
		large[i] = byte(i * 7 >> 3)
	}
	for range 5 {
		c.Write(0, large)
		n.kill()
		n.start(v)
		if !bytes.Equal(c.Read(0, uint64(len(large))), large) {
			t.Fatal("other bytes came back")
		}
	}
	c.Flush()
}

// TestCloseWhileTheServerIsAway must not wait for it.
func TestCloseWhileTheServerIsAway(t *testing.T) {
	n := newNode(t)
	n.start(n.memory(memdev.Config{Size: testSize}))
	d := openUnclosed(t, Config{URI: n.uri()})
	n.kill()
	reach(t, d, Waiting)
	start := time.Now()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > remoteWait/2 {
		t.Errorf("took %v", took)
	}
}

func TestAbandonEndsWhatWaits(t *testing.T) {
	n := newNode(t)
	n.start(n.memory(memdev.Config{Size: testSize}))
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	n.kill()
	reach(t, d, Waiting)
	r := &datapath.Request{Op: datapath.OpWrite, Length: 512, Buf: block(1)}
	wait := c.Start(r)
	eventually(t, "the write waits", func() (waits bool) {
		_ = d.reactor.Run(func(*reactor.Reactor) { waits = d.core.unended == 1 }) // it runs
		return waits
	})
	d.Abandon()
	if wait(); r.Status != datapath.StatusShutdown {
		t.Errorf("write: %s", r.Status)
	}
	if c.Do(r); r.Status != datapath.StatusIO {
		t.Errorf("a later write: %s", r.Status)
	}
}

// TestFullMailboxesDelayNothingForGood rings while the other reactor is busy.
func TestFullMailboxesDelayNothingForGood(t *testing.T) {
	n := newNode(t)
	n.start(n.memory(memdev.Config{Size: testSize}))
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	release := make(chan struct{})
	d.reactor.Post(reactor.TaskFunc(func(*reactor.Reactor) { <-release }))
	for d.reactor.TryPost(reactor.TaskFunc(func(*reactor.Reactor) {})) { // until it is full
	}
	wait := c.Start(&datapath.Request{Op: datapath.OpWrite, Length: 512, Buf: block(1)})
	close(release)
	wait()
}
