package packaging

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// machines are what the binaries of packages must be made for.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

func TestPackagesOfAllArchitecturesAreAlike(t *testing.T) {
	list := strings.Fields(os.Getenv("ASHLAR_DEBS"))
	if len(list) == 0 {
		t.Skip("needs the packages in ASHLAR_DEBS (make test-deb does not skip it)")
	}
	testenv.RequireCommand(t, "dpkg-deb", "dpkg")
	var files []string
	found := map[string]bool{}
	for _, deb := range list {
		arch := field(t, deb, "Architecture")
		machine, ok := machines[arch]
		if !ok || found[arch] {
			t.Fatalf("%s: architecture %q", deb, arch)
		}
		found[arch] = true
		if m := field(t, deb, "Maintainer"); !strings.Contains(m, "Ashlar") || !strings.Contains(m, "ashlar-storage") {
			t.Errorf("%s: maintainer %q", deb, m)
		}
		if h := field(t, deb, "Homepage"); h != "https://github.com/ashlar-storage/ashlar" {
			t.Errorf("%s: homepage %q", deb, h)
		}
		names := contents(t, deb, machine)
		if files == nil {
			files = names
		}
		if !slices.Equal(names, files) {
			t.Errorf("%s has the files %q, the first one %q", deb, names, files)
		}
	}
}

// field gives one of a package's control fields.
func field(t *testing.T, deb, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "dpkg-deb", "--field", deb, name).Output()
	if err != nil {
		t.Fatalf("%s: %v", deb, err)
	}
	return strings.TrimSpace(string(out))
}

// contents lists what a package installs, and wants all of it to be root's and not
// writable by others, and the binary to be static and for its machine.
func contents(t *testing.T, deb string, machine elf.Machine) (names []string) {
	t.Helper()
	archive, err := exec.CommandContext(t.Context(), "dpkg-deb", "--fsys-tarfile", deb).Output()
	if err != nil {
		t.Fatalf("%s: %v", deb, err)
	}
	binary := false
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%s: %v", deb, err)
		}
		names = append(names, h.Name)
		if h.Uid != 0 || h.Gid != 0 || h.Mode&0o022 != 0 {
			t.Errorf("%s: %s is owned by %d:%d with mode %o", deb, h.Name, h.Uid, h.Gid, h.Mode)
		}
		if filepath.Clean(h.Name) != "usr/bin/ashlar" {
			continue
		}
		binary = true
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatalf("%s: %v", deb, err)
		}
		f, err := elf.NewFile(bytes.NewReader(text))
		if err != nil {
			t.Fatalf("%s: %v", deb, err)
		}
		if f.Machine != machine {
			t.Errorf("%s: the binary is for %v, want %v", deb, f.Machine, machine)
		}
		if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			t.Errorf("%s: the binary is not static", deb)
		}
	}
	if !binary {
		t.Errorf("%s: no /usr/bin/ashlar", deb)
	}
	return names
}

// TestLintianFindsNoErrors asks Debian's checker of packages, where it is installed.
func TestLintianFindsNoErrors(t *testing.T) {
	list := strings.Fields(os.Getenv("ASHLAR_DEBS"))
	if len(list) == 0 {
		t.Skip("needs the packages in ASHLAR_DEBS (make test-deb does not skip it)")
	}
	lintian, err := exec.LookPath("lintian")
	if err != nil {
		t.Skip("needs lintian (apt-get install lintian)")
	}
	out, err := exec.CommandContext(t.Context(), lintian, append([]string{"--allow-root", "--fail-on", "error,warning"}, list...)...).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
