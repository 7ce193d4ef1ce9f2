package main

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
)

// spec says what an archive holds.
type spec struct {
	Images []imageSpec `yaml:"images"`
}

// imageSpec is one image, for one architecture or several.
type imageSpec struct {
	Name       string            `yaml:"name"`          // REGISTRY/PATH:TAG
	Archs      []string          `yaml:"architectures"` // of Go and Debian: amd64, arm64
	Entrypoint []string          `yaml:"entrypoint"`
	Env        map[string]string `yaml:"env"`
	Labels     map[string]string `yaml:"labels"`
	Layers     []layerSpec       `yaml:"layers"`
}

// layerSpec is one layer: files out of Debian packages, files of this machine, and
// symbolic links. In paths on this machine and in packages $ARCH is the architecture,
// and $TRIPLET Debian's name for its libraries.
type layerSpec struct {
	// Packages of Debian 12, by name. They are unpacked into one directory, and only
	// Files of it, the shared libraries those need, and the links on the way are taken.
	Packages []string `yaml:"packages"`
	// Host takes Files from this machine instead, for images of tests.
	Host bool `yaml:"host"`
	// Files are absolute paths; a directory is taken whole.
	Files []string `yaml:"files"`
	// Add maps paths in the image to files, from the directory of the build.
	Add map[string]string `yaml:"add"`
	// Links maps paths in the image to what they point to.
	Links map[string]string `yaml:"links"`
}

// readSpec reads a spec. Variables other than ARCH come from lookup, in the names of
// images and in the values of add; one that is not set is an error.
func readSpec(file string, lookup func(string) (string, bool)) (*spec, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var s spec
	if err := yaml.UnmarshalWithOptions(text, &s, yaml.Strict()); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if err := s.check(lookup); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return &s, nil
}

func (s *spec) check(lookup func(string) (string, bool)) error {
	if len(s.Images) == 0 {
		return fmt.Errorf("no images")
	}
	for i := range s.Images {
		image := &s.Images[i]
		var unset string
		image.Name = os.Expand(image.Name, func(name string) string {
			value, ok := lookup(name)
			if !ok {
				unset = name
			}
			return value
		})
		name, tag, tagged := strings.Cut(image.Name[strings.LastIndex(image.Name, "/")+1:], ":")
		switch {
		case unset != "":
			return fmt.Errorf("image %s: the variable %s is not set", image.Name, unset)
		case !strings.Contains(image.Name, "/") || !tagged || name == "" || tag == "":
			return fmt.Errorf("image %q: a name is written REGISTRY/PATH:TAG", image.Name)
		case len(image.Archs) == 0:
			return fmt.Errorf("image %s: no architectures", image.Name)
		case slices.ContainsFunc(image.Archs, func(arch string) bool { return triplets[arch] == "" }):
			return fmt.Errorf("image %s: architectures %s: only amd64 and arm64 are known", image.Name, strings.Join(image.Archs, ", "))
		case len(image.Layers) == 0:
			return fmt.Errorf("image %s: no layers", image.Name)
		}
		for _, layer := range image.Layers {
			if err := layer.check(); err != nil {
				return fmt.Errorf("image %s: %w", image.Name, err)
			}
		}
	}
	return nil
}

func (l *layerSpec) check() error {
	if len(l.Packages) > 0 && l.Host {
		return fmt.Errorf("a layer takes files from packages or from the host, not both")
	}
	if len(l.Files) > 0 && len(l.Packages) == 0 && !l.Host {
		return fmt.Errorf("files %s: they need packages, or host", strings.Join(l.Files, ", "))
	}
	if len(l.Files)+len(l.Add)+len(l.Links) == 0 {
		return fmt.Errorf("a layer without files")
	}
	for _, names := range [][]string{l.Files, keys(l.Add), keys(l.Links)} {
		for _, name := range names {
			if !path.IsAbs(name) || path.Clean(name) != name {
				return fmt.Errorf("path %q: must be absolute and without dots", name)
			}
		}
	}
	return nil
}

func keys(m map[string]string) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	return names
}

// triplets are what Debian calls its directories of libraries.
var triplets = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// forArch replaces $ARCH, $TRIPLET and variables of the environment.
func forArch(text, arch string) string {
	return os.Expand(text, func(name string) string {
		switch name {
		case "ARCH":
			return arch
		case "TRIPLET":
			return triplets[arch]
		}
		return os.Getenv(name)
	})
}
