package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func lookup(values map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := values[name]; return v, ok }
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestSpecOfTheImageOfAshlarIsValid(t *testing.T) {
	s, err := readSpec("ashlar.yaml", lookup(map[string]string{"IMAGE": "test.local/ashlar:1"}))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Images) != 1 || s.Images[0].Name != "test.local/ashlar:1" || len(s.Images[0].Archs) != 2 {
		t.Errorf("%+v", s)
	}
}

func TestSpecsThatCannotBeBuiltAreRefused(t *testing.T) {
	image := func(fields string) string { return "images: [{" + fields + "}]" }
	const good = "name: test.local/x:1, architectures: [amd64]"
	for _, tc := range []struct{ name, text, want string }{
		{"not YAML", "images: [", "test.yaml"},
		{"unknown key", "images: []\nimage: x", "unknown field"},
		{"no images", "images: []", "no images"},
		{"name without a tag", image("name: test.local/x, architectures: [amd64]"), "REGISTRY/PATH:TAG"},
		{"name without a registry", image("name: x:1, architectures: [amd64]"), "REGISTRY/PATH:TAG"},
		{"variable that is not set", image("name: \"test.local/${MISSING}:1\", architectures: [amd64]"), "MISSING is not set"},
		{"no architecture", image("name: test.local/x:1"), "no architectures"},
		{"unknown architecture", image("name: test.local/x:1, architectures: [mips]"), "only amd64 and arm64"},
		{"no layers", image(good), "no layers"},
		{"empty layer", image(good + ", layers: [{packages: [bash]}]"), "without files"},
		{"two sources", image(good + ", layers: [{packages: [bash], host: true, files: [/bin/bash]}]"), "not both"},
		{"files of nothing", image(good + ", layers: [{files: [/bin/bash]}]"), "need packages, or host"},
		{"relative path", image(good + ", layers: [{add: {bin/x: y}}]"), "must be absolute"},
		{"path with dots", image(good + ", layers: [{add: {/bin/../x: y}}]"), "must be absolute"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := readSpec(writeFile(t, filepath.Join(t.TempDir(), "test.yaml"), tc.text), lookup(nil))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	if _, err := readSpec(filepath.Join(t.TempDir(), "none"), lookup(nil)); err == nil {
		t.Error("a spec that does not exist was read")
	}
}
