package interop

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// authority is a certificate authority made for one test.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t *testing.T, dir string) *authority {
	t.Helper()
	a := &authority{dir: dir, next: 1}
	a.cert, a.key = a.issue(t, "ca", &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	return a
}

// issue writes NAME.pem and NAME-key.pem signed by a, or by itself when a has no
// certificate yet.
func (a *authority) issue(t *testing.T, name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(a.next)
	a.next++
	template.Subject = pkix.Name{CommonName: name}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + "-key.pem": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(a.dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func (a *authority) server(t *testing.T, name string) {
	t.Helper()
	a.issue(t, name, &x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
}

// client makes a directory laid out as libnbd and qemu look for certificates.
func (a *authority) client(t *testing.T, name string, trusted *authority) string {
	t.Helper()
	dir := filepath.Join(a.dir, "client-"+name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a.issue(t, name, &x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	for to, from := range map[string]string{
		"ca-cert.pem":     filepath.Join(trusted.dir, "ca.pem"),
		"client-cert.pem": filepath.Join(a.dir, name+".pem"),
		"client-key.pem":  filepath.Join(a.dir, name+"-key.pem"),
	} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, to), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// anonymous is a client directory without a certificate of its own.
func (a *authority) anonymous(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(a.dir, "anonymous")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(a.dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca-cert.pem"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestTLSRequiredWithClientCertificates(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	a := newAuthority(t, dir)
	a.server(t, "server")
	known, anonymous := a.client(t, "client", a), a.anonymous(t)
	otherDir := filepath.Join(dir, "other")
	if err := os.Mkdir(otherDir, 0o700); err != nil {
		t.Fatal(err)
	}
	other := newAuthority(t, otherDir)
	stranger := other.client(t, "stranger", a)

	source, disk, back := patchwork(t, dir, "source", 32*mib), sparse(t, dir, "disk", 32*mib), filepath.Join(dir, "back")
	s, address := serveTCP(t, "--tls", "require", "--tls-cert", filepath.Join(dir, "server.pem"),
		"--tls-key", filepath.Join(dir, "server-key.pem"), "--tls-ca", filepath.Join(dir, "ca.pem"), disk)
	uri := "nbds://" + address + "/?tls-certificates="

	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", uri+known)); got != strconv.Itoa(32*mib) {
		t.Errorf("size %q", got)
	}
	if out := tool(t, "nbdinfo", uri+known); !strings.Contains(out, "TLS") {
		t.Errorf("nbdinfo does not report TLS:\n%s", out)
	}
	for name, bad := range map[string]string{
		"in plain text":                   "nbd://" + address,
		"without a client certificate":    uri + anonymous,
		"certified by somebody else":      uri + stranger,
		"trusting another authority only": uri + a.client(t, "mistrust", other),
	} {
		if out, err := try(t, "nbdinfo", "--size", bad); err == nil {
			t.Errorf("a client %s got in: %s", name, out)
		}
	}
	tool(t, "nbdcopy", "--connections=4", source, uri+known)
	tool(t, "nbdcopy", "--connections=4", uri+known, back)
	same(t, source, back)

	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	tool(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+known,
		"--image-opts", "driver=raw,file.driver=file,file.filename="+source,
		"driver=raw,file.driver=nbd,file.server.type=inet,file.server.host="+host+",file.server.port="+port+",file.tls-creds=tls0,file.tls-hostname=localhost")
	s.stop(t)
	same(t, source, disk)
}

func TestTLSOptional(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	a := newAuthority(t, dir)
	a.server(t, "server")
	_, address := serveTCP(t, "--tls", "on", "--tls-cert", filepath.Join(dir, "server.pem"),
		"--tls-key", filepath.Join(dir, "server-key.pem"), sparse(t, dir, "disk", 8*mib))
	for _, uri := range []string{"nbd://" + address, "nbds://" + address + "/?tls-certificates=" + a.anonymous(t)} {
		if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", uri)); got != strconv.Itoa(8*mib) {
			t.Errorf("%s: size %q", uri, got)
		}
	}
}

func TestTLSOff(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	a := newAuthority(t, dir)
	_, address := serveTCP(t, sparse(t, dir, "disk", 8*mib))
	if _, err := try(t, "nbdinfo", "--size", "nbds://"+address+"/?tls-certificates="+a.anonymous(t)); err == nil {
		t.Error("a client that insists on TLS was served without")
	}
	tool(t, "nbdinfo", "--size", "nbd://"+address)
}
