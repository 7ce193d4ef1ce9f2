package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// debian gets packages of Debian 12. It has lists of its own: what the host has of
// architectures and sources does not matter and stays as it is.
type debian struct {
	dir string // what is kept
	run func(dir, name string, args ...string) ([]byte, error)
}

const (
	archiveKey    = "/usr/share/keyrings/debian-archive-keyring.gpg"
	debianDefault = "http://deb.debian.org"
)

// unpack gives a directory with the packages laid out as a root, and a line
// "NAME VERSION" for each. The directory is kept and belongs to debian.
func (d *debian) unpack(packages []string, arch string) (root string, versions []string, err error) {
	for _, command := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(command); err != nil {
			return "", nil, fmt.Errorf("packages: %s is missing; build on Debian or Ubuntu", command)
		}
	}
	if _, err := os.Stat(archiveKey); err != nil {
		return "", nil, fmt.Errorf("packages: %w; install the Debian package debian-archive-keyring", err)
	}
	packages = slices.Sorted(slices.Values(packages))
	sum := sha256.Sum256([]byte(strings.Join(packages, " ")))
	kept := filepath.Join(d.dir, fmt.Sprintf("%s-%x", arch, sum[:6]))
	root, list := filepath.Join(kept, "root"), filepath.Join(kept, "packages")
	text, err := os.ReadFile(list)
	if errors.Is(err, os.ErrNotExist) {
		text, err = d.fetch(kept, packages, arch)
	}
	if err != nil {
		return "", nil, err
	}
	return root, strings.Split(strings.TrimSpace(string(text)), "\n"), nil
}

// fetch fills the directory kept, and writes its list last.
func (d *debian) fetch(kept string, packages []string, arch string) ([]byte, error) {
	if err := os.RemoveAll(kept); err != nil {
		return nil, err
	}
	for _, dir := range []string{"root", "debs", "apt/lists/partial", "apt/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(kept, dir), 0o755); err != nil {
			return nil, err
		}
	}
	mirror := os.Getenv("DEBIAN_MIRROR")
	if mirror == "" {
		mirror = debianDefault
	}
	var sources strings.Builder
	for _, source := range []string{"debian bookworm", "debian bookworm-updates", "debian-security bookworm-security"} {
		fmt.Fprintf(&sources, "deb [signed-by=%s arch=%s] %s/%s main\n", archiveKey, arch, mirror, source)
	}
	apt := filepath.Join(kept, "apt")
	for name, text := range map[string]string{"sources.list": sources.String(), "status": ""} {
		if err := os.WriteFile(filepath.Join(apt, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	options := []string{"-qq"}
	for _, option := range []string{
		"Acquire::Retries=3", "APT::Sandbox::User=root", "APT::Architecture=" + arch, "APT::Architectures::=" + arch,
		"Dir::Etc::SourceList=" + apt + "/sources.list", "Dir::Etc::SourceParts=/dev/null",
		"Dir::State=" + apt, "Dir::State::Lists=" + apt + "/lists", "Dir::State::status=" + apt + "/status",
		"Dir::Cache=" + apt, "Dir::Cache::archives=" + apt + "/archives", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=",
	} {
		options = append(options, "-o", option)
	}
	debs := filepath.Join(kept, "debs")
	if _, err := d.run(debs, "apt-get", append(options, "update")...); err != nil {
		return nil, err
	}
	if _, err := d.run(debs, "apt-get", append(append(options, "download"), packages...)...); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return nil, err
	}
	if len(files) != len(packages) {
		return nil, fmt.Errorf("packages: %d asked for, %d came", len(packages), len(files))
	}
	var list []byte
	for _, file := range files {
		name, err := d.run(debs, "dpkg-deb", "--show", "--showformat", "${Package} ${Version}\n", file)
		if err != nil {
			return nil, err
		}
		list = append(list, name...)
		if _, err := d.run(debs, "dpkg-deb", "--extract", file, filepath.Join(kept, "root")); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{"apt", "debs"} {
		if err := os.RemoveAll(filepath.Join(kept, dir)); err != nil {
			return nil, err
		}
	}
	return list, os.WriteFile(filepath.Join(kept, "packages"), list, 0o644)
}

// runCommand runs a command in dir and returns what it printed.
func runCommand(dir, name string, args ...string) ([]byte, error) {
	c := exec.Command(name, args...)
	c.Dir = dir
	var errText bytes.Buffer
	c.Stderr = &errText
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(errText.String()))
	}
	return out, nil
}
