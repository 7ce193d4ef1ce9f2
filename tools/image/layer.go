package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// tree is the content of one layer, by path without a leading slash. Directories above
// what is in it come by themselves.
type tree map[string]entry

// entry is one file: a link if link is not empty, else the content of source or data.
type entry struct {
	source string // on this machine
	data   []byte // if source is empty
	mode   fs.FileMode
	link   string
}

func (t tree) put(name string, e entry) {
	t[strings.TrimPrefix(path.Clean(name), "/")] = e
}

// tar is the tree as a tar file: sorted, of root, without times, so that the same tree
// gives the same bytes.
func (t tree) tar() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	made := map[string]bool{".": true}
	var makeDir func(name string) error
	makeDir = func(name string) error {
		if made[name] {
			return nil
		}
		made[name] = true
		if err := makeDir(path.Dir(name)); err != nil {
			return err
		}
		mode := int64(0o755)
		if name == "tmp" {
			mode = 0o1777
		}
		return w.WriteHeader(header(name+"/", tar.TypeDir, mode))
	}
	for _, name := range slices.Sorted(maps.Keys(t)) {
		e := t[name]
		if err := makeDir(path.Dir(name)); err != nil {
			return nil, err
		}
		if e.mode.IsDir() {
			if err := makeDir(name); err != nil {
				return nil, err
			}
			continue
		}
		if e.link != "" {
			h := header(name, tar.TypeSymlink, 0o777)
			h.Linkname = e.link
			if err := w.WriteHeader(h); err != nil {
				return nil, err
			}
			continue
		}
		data := e.data
		if e.source != "" {
			var err error
			if data, err = os.ReadFile(e.source); err != nil {
				return nil, err
			}
		}
		h := header(name, tar.TypeReg, int64(e.mode.Perm()))
		h.Size = int64(len(data))
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func header(name string, kind byte, mode int64) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
}

// buildLayer gathers what a layer of one architecture holds.
func buildLayer(l layerSpec, arch string, d *debian) (tree, error) {
	t := tree{}
	root := "/"
	if len(l.Packages) > 0 {
		var versions []string
		var err error
		if root, versions, err = d.unpack(l.Packages, arch); err != nil {
			return nil, err
		}
		t.put("/usr/share/ashlar/packages", entry{data: []byte(strings.Join(versions, "\n") + "\n"), mode: 0o644})
	}
	c := closure{root: root, tree: t}
	for _, name := range l.Files {
		if err := c.take(forArch(name, arch)); err != nil {
			return nil, err
		}
	}
	for name, source := range l.Add {
		source = forArch(source, arch)
		info, err := os.Stat(source)
		switch {
		case err != nil:
			return nil, err
		case info.IsDir():
			if err := t.addDir(name, source); err != nil {
				return nil, err
			}
		default:
			t.put(name, entry{source: source, mode: info.Mode()})
		}
	}
	for name, target := range l.Links {
		t.put(name, entry{link: target})
	}
	return t, nil
}

// addDir takes the directory source whole, as name.
func (t tree) addDir(name, source string) error {
	return filepath.WalkDir(source, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(source, file)
		if err != nil {
			return err
		}
		at := path.Join(name, filepath.ToSlash(below))
		info, err := d.Info()
		switch {
		case err != nil:
			return err
		case d.IsDir():
			t.put(at, entry{mode: fs.ModeDir | 0o755})
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(file)
			if err != nil {
				return err
			}
			t.put(at, entry{link: target})
		case d.Type().IsRegular():
			t.put(at, entry{source: file, mode: info.Mode()})
		default:
			return fmt.Errorf("%s: neither a file, a directory nor a link", file)
		}
		return nil
	})
}
