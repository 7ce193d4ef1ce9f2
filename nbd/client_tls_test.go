package nbd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// clientPKI is a certificate authority with a server and a client certificate,
// in a directory laid out as nbdkit and libnbd want it.
type clientPKI struct {
	dir    string
	roots  *x509.CertPool
	server tls.Certificate // for localhost and 127.0.0.1
	client tls.Certificate
}

// clientCertificates makes a clientPKI, with three more directories in it: empty
// and half lack files; other is of another authority.
func clientCertificates(t testing.TB) *clientPKI {
	t.Helper()
	p := newClientPKI(t, t.TempDir())
	newClientPKI(t, filepath.Join(p.dir, "other"))
	authority, err := os.ReadFile(filepath.Join(p.dir, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(p.dir, "empty", "ca-cert.pem"), "NOTHING", nil)
	writePEM(t, filepath.Join(p.dir, "half", "client-cert.pem"), "CERTIFICATE", p.client.Certificate[0])
	if err := os.WriteFile(filepath.Join(p.dir, "half", "ca-cert.pem"), authority, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func newClientPKI(t testing.TB, dir string) *clientPKI {
	t.Helper()
	p := &clientPKI{dir: dir, roots: x509.NewCertPool()}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", der)
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	p.roots.AddCert(root)
	issue := func(serial int64, name string, usage x509.ExtKeyUsage) tls.Certificate {
		leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, root, &leafKey.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(leafKey)
		if err != nil {
			t.Fatal(err)
		}
		writePEM(t, filepath.Join(dir, name+"-cert.pem"), "CERTIFICATE", der)
		writePEM(t, filepath.Join(dir, name+"-key.pem"), "PRIVATE KEY", private)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: leafKey}
	}
	p.server = issue(2, "server", x509.ExtKeyUsageServerAuth)
	p.client = issue(3, "client", x509.ExtKeyUsageClientAuth)
	return p
}

func writePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestClientVerifiesServers connects over TCP and over a unix socket to a server
// with a certificate for localhost and 127.0.0.1.
func TestClientVerifiesServers(t *testing.T) {
	checkClientGoroutines(t)
	pki := clientCertificates(t)
	memory := make([]byte, fakeSize)
	script := func(f *fakePeer) {
		f.greet(handshakeFixedNewstyle)
		f.startTLS(&tls.Config{Certificates: []tls.Certificate{pki.server}, ClientCAs: pki.roots, ClientAuth: tls.VerifyClientCertIfGiven})
		f.wantOption(optExtendedHeaders)
		f.reply(optExtendedHeaders, repAck, nil)
		f.headers = HeadersExtended
		f.wantOption(optGo)
		f.reply(optGo, repInfo, fakeInfoExport(fakeSize, allFakeFlags))
		f.reply(optGo, repAck, nil)
		f.serveMemory(memory, nil)
	}
	socket := fakeServer(t, script)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveFake(t, l, script)
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	for _, tt := range []struct{ name, uri, want string }{
		{"address", "nbds://127.0.0.1:" + port + "/?tls-certificates=" + pki.dir, ""},
		{"opportunistic", "nbd://127.0.0.1:" + port + "/?tls-certificates=" + pki.dir, ""},
		{"right name", "nbds://127.0.0.1:" + port + "/?tls-hostname=localhost&tls-certificates=" + pki.dir, ""},
		{"wrong name", "nbds://127.0.0.1:" + port + "/?tls-hostname=other.example&tls-certificates=" + pki.dir, "not other.example"},
		{"other authority", "nbds://127.0.0.1:" + port + "/?tls-certificates=" + pki.dir + "/other", "unknown authority"},
		{"no authority", "nbds://127.0.0.1:" + port + "/", "unknown authority"},
		{"not verified", "nbds://127.0.0.1:" + port + "/?tls-verify-peer=0", ""},
		{"socket", "nbds+unix:///?socket=" + socket + "&tls-certificates=" + pki.dir, ""},
		{"socket, right name", "nbds+unix:///?socket=" + socket + "&tls-hostname=localhost&tls-certificates=" + pki.dir, ""},
		{"socket, wrong name", "nbds+unix:///?socket=" + socket + "&tls-hostname=other.example&tls-certificates=" + pki.dir, "not other.example"},
		{"socket, other authority", "nbds+unix:///?socket=" + socket + "&tls-certificates=" + pki.dir + "/other", "unknown authority"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := DialURI(t.Context(), tt.uri, Options{})
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !c.TLS() {
				t.Error("no TLS")
			}
			for _, size := range []int{100, clientCopyMaxTLS, clientCopyMaxTLS + 1, 200 << 10} {
				want := make([]byte, size)
				_, _ = rand.Read(want) // never fails
				got := make([]byte, size)
				if _, err := c.WriteAt(want, 1000); err != nil {
					t.Fatal(err)
				}
				if _, err := c.ReadAt(got, 1000); err != nil || string(got) != string(want) {
					t.Errorf("%d bytes read back differ: %v", size, err)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestClientTLSConfigOfTheCaller(t *testing.T) {
	pki := clientCertificates(t)
	veto := errors.New("not this one")
	socket := fakeServer(t, func(f *fakePeer) {
		f.greet(handshakeFixedNewstyle)
		f.startTLS(&tls.Config{Certificates: []tls.Certificate{pki.server}, MaxVersion: tls.VersionTLS12})
		f.wait()
	})
	for _, tt := range []struct {
		name   string
		config *tls.Config
		want   string
	}{
		{"veto", &tls.Config{RootCAs: pki.roots, VerifyConnection: func(tls.ConnectionState) error { return veto }}, veto.Error()},
		{"clock", &tls.Config{RootCAs: pki.roots, Time: func() time.Time { return time.Now().Add(48 * time.Hour) }}, "expired"},
		{"version", &tls.Config{RootCAs: pki.roots, MinVersion: tls.VersionTLS13}, "protocol version"},
	} {
		_, err := Dial(t.Context(), "unix", socket, Options{TLSRequired: true, TLSConfig: tt.config})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
	pipe, _ := net.Pipe()
	if config := clientTLSConfig(&tls.Config{MinVersion: tls.VersionTLS10}, pipe); config.MinVersion != tls.VersionTLS12 || config.InsecureSkipVerify {
		t.Errorf("TLS version %#x, skip %v", config.MinVersion, config.InsecureSkipVerify)
	}
}
