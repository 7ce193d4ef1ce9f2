package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/authority"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestExportRefusesWhatCannotBeMeant: a rule for an export that is not there, a file
// that two exports would write, metrics for other hosts.
func TestExportRefusesWhatCannotBeMeant(t *testing.T) {
	dir := t.TempDir()
	file := testenv.SparseFile(t, filepath.Join(dir, "f.img"), 1<<20)
	ca := authority.New(t, dir)
	cert, key := ca.Issue(t, "server")
	export := func(more ...string) []string { return append([]string{"export", "--run", "true"}, more...) }
	secure := func(more ...string) []string {
		return export(append([]string{"--tls", "require", "--tls-cert", cert, "--tls-key", key, "--tls-ca", ca.File}, more...)...)
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
