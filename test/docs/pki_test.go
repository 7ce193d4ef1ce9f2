package docs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/authority"
)

// writeCertificates makes the certificates that pages speak of, below ashlar/ of a
// folder; doc.go says which.
func writeCertificates(t *testing.T, folder string) {
	t.Helper()
	folder = filepath.Join(folder, "ashlar")
	if err := os.MkdirAll(filepath.Join(folder, "pki"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := authority.New(t, filepath.Join(folder, "pki"))
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, filepath.Join(folder, to)); err != nil {
			t.Fatal(err)
		}
	}
	cert, key := a.Issue(t, "storage", "storage", "127.0.0.2", "10.0.0.5")
	move(cert, "server.pem")
	move(key, "server.key")
	cert, key = a.Issue(t, "host-a")
	move(cert, "pki/client-cert.pem")
	move(key, "pki/client-key.pem")
	for _, name := range []string{"clients-ca.pem", "operators-ca.pem"} {
		if err := os.Link(a.File, filepath.Join(folder, name)); err != nil {
			t.Fatal(err)
		}
	}
	move(a.File, "pki/ca-cert.pem")
}
