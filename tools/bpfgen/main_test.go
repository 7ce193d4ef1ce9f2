package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestWhatAgreesIsNotCompiled(t *testing.T) {
	t.Setenv("BPF_CLANG", "no-such-clang")
	dir := t.TempDir()
	write(t, dir, "x.c", "int x;")
	write(t, dir, "x_bpfel.o", "object")
	sum, err := checksums(dir, []string{"x.c"})
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, sums, string(sum))
	if err := generate(dir, []string{"x.c"}); err != nil {
		t.Errorf("nothing has changed: %v", err)
	}
	for name, change := range map[string]func(){
		"the arguments": func() {},
		"a source":      func() { write(t, dir, "x.c", "int y;") },
		"an output":     func() { write(t, dir, "x_bpfel.o", "other") },
		"a header":      func() { write(t, dir, "y.h", "") },
	} {
		write(t, dir, "x.c", "int x;")
		write(t, dir, "x_bpfel.o", "object")
		programs := []string{"x.c"}
		if name == "the arguments" {
			programs = []string{"x.c=y"}
		}
		change()
		err := generate(dir, programs)
		if err == nil || !strings.Contains(err.Error(), "no-such-clang is not installed") || !strings.Contains(err.Error(), "make generate-bpf") {
			t.Errorf("%s changed: %v", name, err)
		}
		_ = os.Remove(filepath.Join(dir, "y.h")) // it may not be there
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	if err := generate(dir, nil); err == nil {
		t.Error("no sources are no error")
	}
	if err := os.Mkdir(filepath.Join(dir, sums), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := generate(dir, []string{"x.c"}); err == nil {
		t.Error("checksums that cannot be read are no error")
	}
	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "x.c"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := generate(dir, []string{"x.c"}); err == nil {
		t.Error("a source that cannot be read is no error")
	}
	if got := strip("/usr/bin/clang-19"); got != "/usr/bin/llvm-strip-19" {
		t.Errorf("strip is %s", got)
	}
}

func TestASourceThatDoesNotCompileIsNamed(t *testing.T) {
	for _, command := range []string{"clang", "llvm-strip", "go"} {
		if _, err := exec.LookPath(command); err != nil {
			t.Skipf("needs the command %s (after make generate-bpf it is not skipped)", command)
		}
	}
	dir, err := os.MkdirTemp(".", ".test-") // in the module, where the compiler's tool is found
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // it is thrown away
	write(t, dir, "x.c", "//go:build ignore\n\nint x(")
	if err := generate(dir, []string{"x.c"}); err == nil || !strings.Contains(err.Error(), "x.c") {
		t.Errorf("got %v", err)
	}
	write(t, dir, "x.c", "//go:build ignore\n\nint x __attribute__((section(\".data.x\"))) = 1;")
	if err := generate(dir, []string{"x.c"}); err != nil {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "x_bpfel.o")); err != nil {
		t.Error(err)
	}
	if err := generate(dir, []string{"x.c"}); err != nil {
		t.Errorf("the second time: %v", err)
	}
}
