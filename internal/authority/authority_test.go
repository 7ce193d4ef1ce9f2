package authority

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"testing"
)

func TestAuthorityVouchesForItsOwn(t *testing.T) {
	dir := t.TempDir()
	a := New(t, dir)
	pem, err := os.ReadFile(a.File)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	verify := func(from *Authority, host string, usage x509.ExtKeyUsage) error {
		pair, err := tls.LoadX509KeyPair(from.Issue(t, "node", "storage.example", "127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pair.Leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	for _, host := range []string{"storage.example", "127.0.0.1", ""} {
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
			if err := verify(a, host, usage); err != nil {
				t.Errorf("%q: %v", host, err)
			}
		}
	}
	if verify(a, "elsewhere", x509.ExtKeyUsageServerAuth) == nil {
		t.Error("a certificate holds for a host that it does not name")
	}
	if verify(New(t, t.TempDir()), "127.0.0.1", x509.ExtKeyUsageServerAuth) == nil {
		t.Error("an authority vouches for another's")
	}
}
