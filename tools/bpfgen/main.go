// Command bpfgen compiles the eBPF programs of a folder, so that a build needs no C
// compiler: what it writes is committed.
//
//	//go:generate go run github.com/ashlar-storage/ashlar/tools/bpfgen disks.c=operation,flight nbd.c=client
//
// An argument is a source and the C structures that Go shares with it. Compiling takes
// clang, and clangs differ. So bpfgen records the checksums of the sources, of what
// was made of them, and of the arguments; while they agree, it does nothing and needs
// no clang. When they do not, it compiles with the clang of $BPF_CLANG, or clang.
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

// sums is the file of checksums, in the form that sha256sum -c reads.
const sums = "checksums.txt"

const compiler = "github.com/cilium/ebpf/cmd/bpf2go"

// cflags are those of every program: instructions of Linux 5.12 (v3), and warnings
// that are errors, but for what a header has and one program does not use.
const cflags = "-O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-unused-const-variable"

func main() {
	if err := generate(".", os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bpfgen:", err)
		os.Exit(1)
	}
}

func generate(dir string, programs []string) error {
	if len(programs) == 0 {
		return errors.New("name the sources")
	}
	recorded, err := os.ReadFile(filepath.Join(dir, sums))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	now, err := checksums(dir, programs)
	if err != nil {
		return err
	}
	if bytes.Equal(recorded, now) {
		return nil
	}
	clang := os.Getenv("BPF_CLANG")
	if clang == "" {
		clang = "clang"
	}
	if _, err := exec.LookPath(clang); err != nil {
		return fmt.Errorf("the sources do not agree with what was compiled of them (%s), and %s is not installed: make generate-bpf installs it", sums, clang)
	}
	for _, p := range programs {
		if err := compile(dir, clang, p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	if now, err = checksums(dir, programs); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, sums), now, 0o644)
}

// compile writes X_bpfel.go and X_bpfel.o of X.c.
func compile(dir, clang, program string) error {
	source, types, _ := strings.Cut(program, "=")
	stem := strings.TrimSuffix(source, ".c")
	args := []string{"run", compiler, "-go-package", "bpf", "-target", "bpfel", "-cc", clang, "-strip", strip(clang), "-cflags", cflags, "-output-stem", stem}
	if types != "" {
		for _, t := range strings.Split(types, ",") {
			args = append(args, "-type", t)
		}
	}
	cmd := exec.Command("go", append(args, strings.ToUpper(stem[:1])+stem[1:], source)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// strip is the llvm-strip beside a clang: clang-19 has llvm-strip-19.
func strip(clang string) string {
	return strings.Replace(clang, "clang", "llvm-strip", 1)
}

// checksums lists all sources and outputs of dir. Its first line, a comment, holds the
// arguments.
func checksums(dir string, programs []string) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# bpfgen %s; %s\n", strings.Join(programs, " "), cflags)
	var names []string
	for _, pattern := range []string{"*.c", "*.h", "*_bpfel.go", "*_bpfel.o"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		names = append(names, found...)
	}
	slices.Sort(names)
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%x  %s\n", sha256.Sum256(text), filepath.Base(name))
	}
	return b.Bytes(), nil
}
