package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// unpackTo writes the files of an archive into a directory.
func unpackTo(t *testing.T, archive, dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // only read
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, h.Name), string(text))
	}
}

func testSpec(t *testing.T) *spec {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "ashlar.amd64"), "binary for amd64")
	writeFile(t, filepath.Join(dir, "ashlar.arm64"), "binary for arm64")
	return &spec{Images: []imageSpec{{
		Name: "test.local/ashlar:1", Archs: []string{"amd64", "arm64"}, Entrypoint: []string{"/usr/bin/ashlar"},
		Env: map[string]string{"PATH": "/usr/bin", "A": "b"}, Labels: map[string]string{"l": "m"},
		Layers: []layerSpec{
			{Add: map[string]string{"/usr/bin/ashlar": filepath.Join(dir, "ashlar.$ARCH")}, Links: map[string]string{"/bin/a": "ashlar"}},
		},
	}}}
}

func TestArchiveHoldsTheImagesForEachArchitecture(t *testing.T) {
	dir := t.TempDir()
	archive := filepath.Join(dir, "a.tar")
	if err := writeArchive(archive, testSpec(t), nil); err != nil {
		t.Fatal(err)
	}
	unpacked := filepath.Join(dir, "layout")
	unpackTo(t, archive, unpacked)
	top, err := layout.ImageIndexFromPath(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(top); err != nil {
		t.Fatal(err)
	}
	manifests, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if got := manifests.Manifests[0].Annotations["io.containerd.image.name"]; got != "test.local/ashlar:1" {
		t.Errorf("the image is called %q", got)
	}
	index, err := top.ImageIndex(manifests.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range inner.Manifests {
		image, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		config, err := image.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if config.Architecture != m.Platform.Architecture || config.OS != "linux" {
			t.Errorf("%s has a config of %s/%s", m.Platform, config.OS, config.Architecture)
		}
		if got := strings.Join(config.Config.Env, " "); got != "A=b PATH=/usr/bin" {
			t.Errorf("environment %q", got)
		}
		if want := "binary for " + m.Platform.Architecture; fileOf(t, image, "usr/bin/ashlar") != want {
			t.Errorf("%s holds another binary", m.Platform)
		}
	}
	if len(inner.Manifests) != 2 {
		t.Errorf("%d images, want 2", len(inner.Manifests))
	}
	left, err := filepath.Glob(filepath.Join(dir, ".image-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// fileOf is the content of a file of an image of one layer.
func fileOf(t *testing.T, image v1.Image, name string) string {
	t.Helper()
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers: %v", len(layers), err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = content.Close() }() // only read
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if h.Name == name {
			text, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
	}
}

func TestSameInputsGiveTheSameBytes(t *testing.T) {
	s, dir := testSpec(t), t.TempDir()
	var archives [2][]byte
	for i := range archives {
		name := filepath.Join(dir, "a.tar")
		if err := writeArchive(name, s, nil); err != nil {
			t.Fatal(err)
		}
		var err error
		if archives[i], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two archives of the same spec differ")
	}
}

func TestArchiveSaysWhichFileIsMissing(t *testing.T) {
	s := testSpec(t)
	s.Images[0].Layers[0].Add = map[string]string{"/x": "/nowhere/at/all"}
	output := filepath.Join(t.TempDir(), "a.tar")
	if err := writeArchive(output, s, nil); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "test.local/ashlar:1") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(output); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an archive was written: %v", err)
	}
	if err := writeArchive(filepath.Join(t.TempDir(), "none", "a.tar"), testSpec(t), nil); err == nil {
		t.Error("an archive was written into no directory")
	}
}

func TestDirectoriesAreTakenWhole(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "a", "b"), "text")
	if err := os.Symlink("b", filepath.Join(dir, "a", "c")); err != nil {
		t.Fatal(err)
	}
	built, err := buildLayer(layerSpec{Add: map[string]string{"/opt": dir}}, "amd64", nil)
	if err != nil {
		t.Fatal(err)
	}
	if built["opt/a/b"].source == "" || built["opt/a/c"].link != "b" {
		t.Errorf("%v", built)
	}
	if _, err := built.tar(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "a", "b")); err != nil {
		t.Fatal(err)
	}
	if _, err := built.tar(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that went away: %v", err)
	}
}

// host is a command of this machine with shared libraries.
func host(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"/bin/mount", "/usr/bin/ls", "/bin/ls"} {
		if _, err := os.Stat(name); err == nil {
			return name
		}
	}
	t.Skip("needs /bin/mount or /bin/ls, linked dynamically (make interop does not skip it)")
	return ""
}

func TestLayerOfTheHostRunsWithItsLibrariesAlone(t *testing.T) {
	program := host(t)
	built, err := buildLayer(layerSpec{Host: true, Files: []string{program}}, "amd64", nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range built {
		names = append(names, name)
	}
	if all := strings.Join(names, " "); !strings.Contains(all, "libc.so.6") || !strings.Contains(all, "ld-linux") {
		t.Errorf("the C library or the dynamic linker is missing: %s", all)
	}
	if os.Geteuid() != 0 {
		return
	}
	text, err := built.tar()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	unpack := exec.Command("tar", "-x", "-C", dir)
	unpack.Stdin = bytes.NewReader(text)
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	if out, err := exec.Command("chroot", dir, program, "--version").CombinedOutput(); err != nil {
		t.Errorf("in its layer alone: %v: %s", err, out)
	}
}

func TestMissingLibrariesAndFilesAreNamed(t *testing.T) {
	program := host(t)
	root := t.TempDir()
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(root, "bin/program"), string(text))
	if err := os.Symlink("loop", filepath.Join(root, "loop")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"/bin/program": "/bin/program needs", "/bin/none": "/bin/none", "/loop": "too many links"} {
		c := closure{root: root, tree: tree{}}
		if err := c.take(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	c := closure{root: root, tree: tree{}}
	if err := c.library("libnone.so.1", []string{"/lib"}); err == nil || !strings.Contains(err.Error(), "none of the packages") {
		t.Error(err)
	}
}

func TestPackagesThatCannotBeHadAreAnError(t *testing.T) {
	for _, command := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(command); err != nil {
			t.Skipf("needs %s of Debian (make interop does not skip it)", command)
		}
	}
	if _, err := os.Stat(archiveKey); err != nil {
		t.Skip("needs the Debian package debian-archive-keyring (make setup installs it)")
	}
	refuse := errors.New("refused")
	for _, verb := range []string{"update", "download", "--show", "--extract"} {
		dir := t.TempDir()
		d := &debian{dir: dir, run: func(in, _ string, args ...string) ([]byte, error) {
			for _, a := range args {
				if a == verb {
					return nil, refuse
				}
				if a == "download" {
					writeFile(t, filepath.Join(in, "a_1.deb"), "")
				}
			}
			return []byte("a 1\n"), nil
		}}
		if _, _, err := d.unpack([]string{"a"}, "amd64"); !errors.Is(err, refuse) {
			t.Errorf("%s: %v", verb, err)
		}
		if found, err := filepath.Glob(filepath.Join(dir, "*", "packages")); err != nil || len(found) > 0 {
			t.Errorf("%s: what is not whole is kept: %v %v", verb, found, err)
		}
	}
	short := &debian{dir: t.TempDir(), run: func(string, string, ...string) ([]byte, error) { return nil, nil }}
	if _, _, err := short.unpack([]string{"a"}, "amd64"); err == nil || !strings.Contains(err.Error(), "1 asked for, 0 came") {
		t.Error(err)
	}
}

func TestPackagesAreFetchedOnce(t *testing.T) {
	if _, err := os.Stat(archiveKey); err != nil {
		t.Skip("needs the Debian package debian-archive-keyring (make setup installs it)")
	}
	calls := 0
	d := &debian{dir: t.TempDir(), run: func(in, name string, args ...string) ([]byte, error) {
		calls++
		for _, a := range args {
			if a == "download" {
				writeFile(t, filepath.Join(in, "a_1.deb"), "")
			}
		}
		return []byte("a 1\n"), nil
	}}
	for range 2 {
		root, versions, err := d.unpack([]string{"a"}, "amd64")
		if err != nil || len(versions) != 1 || versions[0] != "a 1" || root == "" {
			t.Fatalf("%s %v %v", root, versions, err)
		}
	}
	if calls != 4 { // update, download, show, extract
		t.Errorf("%d commands, want 4", calls)
	}
}

func TestRunCommandTellsWhatWentWrong(t *testing.T) {
	if _, err := runCommand(t.TempDir(), "sh", "-c", "echo why >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "why") {
		t.Error(err)
	}
	out, err := runCommand(t.TempDir(), "echo", "x")
	if err != nil || string(out) != "x\n" {
		t.Errorf("%q %v", out, err)
	}
}

func TestRunRefusesABadSpec(t *testing.T) {
	if err := run(filepath.Join(t.TempDir(), "none"), "x", "y"); err == nil {
		t.Error("a spec that does not exist was built")
	}
}
