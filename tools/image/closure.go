package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// closure takes files out of a directory that is laid out as a root, with the shared
// libraries they need and the symbolic links on the way to them.
type closure struct {
	root string
	tree tree
}

// linkMax bounds the links on the way to one file, as the kernel does.
const linkMax = 40

// take adds the file, link or directory name.
func (c *closure) take(name string) error {
	real, info, err := c.resolve(name)
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return c.tree.addDir(real, filepath.Join(c.root, real))
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s: neither a file nor a directory", name)
	}
	key := strings.TrimPrefix(real, "/")
	if _, ok := c.tree[key]; ok {
		return nil
	}
	source := filepath.Join(c.root, real)
	c.tree.put(real, entry{source: source, mode: info.Mode().Perm() | 0o444})
	return c.libraries(real, source)
}

// resolve follows name to a file or directory, and adds each link it passes.
func (c *closure) resolve(name string) (string, fs.FileInfo, error) {
	at, rest := "/", strings.Split(strings.Trim(name, "/"), "/")
	var info fs.FileInfo
	for links := 0; len(rest) > 0; {
		next := path.Join(at, rest[0])
		rest = rest[1:]
		var err error
		if info, err = os.Lstat(filepath.Join(c.root, next)); err != nil {
			return "", nil, fmt.Errorf("%s: %w", name, err)
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			at = next
			continue
		}
		if links++; links > linkMax {
			return "", nil, fmt.Errorf("%s: too many links", name)
		}
		target, err := os.Readlink(filepath.Join(c.root, next))
		if err != nil {
			return "", nil, err
		}
		c.tree.put(next, entry{link: target})
		if path.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(strings.Trim(target, "/"), "/"), rest...)
	}
	return at, info, nil
}

// libraries takes what an ELF file needs; other files need nothing.
func (c *closure) libraries(name, source string) error {
	f, err := elf.Open(source)
	var format *elf.FormatError
	if errors.As(err, &format) || err != nil && isShort(source) {
		return nil // a script, or data
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	for _, program := range f.Progs {
		if program.Type != elf.PT_INTERP {
			continue
		}
		text := make([]byte, program.Filesz)
		if _, err := program.ReadAt(text, 0); err != nil {
			return fmt.Errorf("%s: its interpreter: %w", name, err)
		}
		if err := c.take(strings.TrimRight(string(text), "\x00")); err != nil {
			return fmt.Errorf("%s needs %w", name, err)
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	dirs, err := searchPath(f, path.Dir(name))
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, library := range needed {
		if err := c.library(library, dirs); err != nil {
			return fmt.Errorf("%s needs %w", name, err)
		}
	}
	return nil
}

func (c *closure) library(library string, dirs []string) error {
	for _, dir := range dirs {
		candidate := path.Join(dir, library)
		// Links on the way are put only by the one that exists.
		if _, err := (&closure{root: c.root, tree: tree{}}).exists(candidate); err == nil {
			return c.take(candidate)
		}
	}
	return fmt.Errorf("%s, which none of the packages has", library)
}

func (c *closure) exists(name string) (fs.FileInfo, error) {
	_, info, err := c.resolve(name)
	return info, err
}

// searchPath is where the dynamic linker of Debian looks for the libraries of f, which
// lies in origin.
func searchPath(f *elf.File, origin string) ([]string, error) {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			return nil, err
		}
		for _, value := range values {
			for _, dir := range strings.Split(value, ":") {
				dirs = append(dirs, strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir))
			}
		}
	}
	triplet := map[elf.Machine]string{elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu"}[f.Machine]
	if triplet != "" {
		dirs = append(dirs, "/lib/"+triplet, "/usr/lib/"+triplet)
	}
	return append(dirs, "/lib", "/usr/lib"), nil
}

// isShort reports whether a file is too short to be ELF.
func isShort(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.Size() < 64 // an ELF header
}
