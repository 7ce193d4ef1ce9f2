package docs

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
	"testing"
	"time"
)

// writeCertificates makes the certificates that pages speak of, below ashlar/ of a
// folder; doc.go says which.
func writeCertificates(t *testing.T, folder string) {
	t.Helper()
	folder = filepath.Join(folder, "ashlar")
	if err := os.MkdirAll(filepath.Join(folder, "pki"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	newKey := func() *ecdsa.PrivateKey {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	valid := x509.Certificate{NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), BasicConstraintsValid: true}

	authority, authorityKey := valid, newKey()
	authority.SerialNumber, authority.Subject = big.NewInt(1), pkix.Name{CommonName: "authority"}
	authority.IsCA, authority.KeyUsage = true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, &authority, &authority, &authorityKey.PublicKey, authorityKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"clients-ca.pem", "operators-ca.pem", "pki/ca-cert.pem"} {
		write(name, "CERTIFICATE", der)
	}
	for i, c := range []struct {
		name, certificate, key string
		usage                  x509.ExtKeyUsage
	}{
		{"storage", "server.pem", "server.key", x509.ExtKeyUsageServerAuth},
		{"host-a", "pki/client-cert.pem", "pki/client-key.pem", x509.ExtKeyUsageClientAuth},
	} {
		leaf, key := valid, newKey()
		leaf.SerialNumber, leaf.Subject = big.NewInt(int64(2+i)), pkix.Name{CommonName: c.name}
		leaf.KeyUsage, leaf.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{c.usage}
		leaf.DNSNames, leaf.IPAddresses = []string{c.name}, []net.IP{net.IPv4(127, 0, 0, 2), net.IPv4(10, 0, 0, 5)}
		der, err := x509.CreateCertificate(rand.Reader, &leaf, &authority, &key.PublicKey, authorityKey)
		if err != nil {
			t.Fatal(err)
		}
		write(c.certificate, "CERTIFICATE", der)
		if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			t.Fatal(err)
		}
		write(c.key, "PRIVATE KEY", der)
	}
}
