package bpf

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

func TestObjectsAreThoseOfTheSources(t *testing.T) {
	f, err := os.Open("checksums.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read-only
	recorded := make(map[string]string)
	for s := bufio.NewScanner(f); s.Scan(); {
		if sum, name, ok := strings.Cut(s.Text(), "  "); ok && !strings.HasPrefix(sum, "#") {
			recorded[name] = sum
		}
	}
	for _, pattern := range []string{"*.c", "*.h", "*_bpfel.go", "*_bpfel.o"} {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			t.Fatalf("%s: %v, %v", pattern, names, err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if sum := fmt.Sprintf("%x", sha256.Sum256(text)); recorded[name] != sum {
				t.Errorf("%s has changed since the programs were compiled; run make generate-bpf", name)
			}
			delete(recorded, name)
		}
	}
	for name := range recorded {
		t.Errorf("%s is gone; run make generate-bpf", name)
	}
}

func TestObjectsCanBeRead(t *testing.T) {
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){
		"disks": LoadDisks, "reactors": LoadReactors, "rings": LoadRings, "nbd": LoadNbd, "self": LoadSelf,
	} {
		spec, err := load()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, p := range spec.Programs {
			if p.License != "Dual BSD/GPL" {
				t.Errorf("%s %s: license %q", name, p.Name, p.License)
			}
			if name != "self" && p.AttachTo != p.Name {
				t.Errorf("%s: program %s is for tracepoint %s", name, p.Name, p.AttachTo)
			}
		}
		for _, m := range spec.Maps {
			if m.MaxEntries == 0 || m.MaxEntries > 1<<15 {
				t.Errorf("%s: map %s has %d entries", name, m.Name, m.MaxEntries)
			}
		}
	}
}
