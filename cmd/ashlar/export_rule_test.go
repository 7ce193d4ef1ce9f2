package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// selfSigned writes a certificate that is its own authority, and its key.
func selfSigned(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "server"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// TestExportRefusesWhatCannotBeMeant: a rule for an export that is not there, a file
// that two exports would write, metrics for other hosts.
func TestExportRefusesWhatCannotBeMeant(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "f.img"), 1<<20)
	cert, key := selfSigned(t, dir)
	export := func(more ...string) []string { return append([]string{"export", "--run", "true"}, more...) }
	secure := func(more ...string) []string {
		return export(append([]string{"--tls", "require", "--tls-cert", cert, "--tls-key", key, "--tls-ca", cert}, more...)...)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{secure("--tls-allow", "typo=host-a", "a="+file), exitUsage, "--tls-allow typo=host-a: no export"},
		{secure("--tls-allow", "a=host-a", file), exitUsage, "--tls-allow a=host-a"},
		{secure("--tls-allow", "a=host-a", "a="+file), exitOK, ""},
		{secure("--tls-allow", "a=host-a", "--name", "a", file), exitOK, ""},
		{secure("--tls-allow", "host-a", file), exitOK, ""},
		{export("a="+file, "b="+file), exitUsage, "is exported as a already"},
		{export("--read-only", "a="+file, "b="+file), exitOK, ""},
		{export("--metrics", "0.0.0.0:1", file), exitFailure, "loopback"},
	} {
		code, _, stderr := ashlar(t, c.args...)
		if code != c.code || !strings.Contains(stderr, c.want) || strings.Contains(stderr, "--insecure-plaintext") {
			t.Errorf("%q: exit code %d, want %d\n%s", c.args, code, c.code, stderr)
		}
	}
}
