package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// module makes a module with .proto files and goes there.
func module(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	files["go.mod"] = "module example\n"
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestImportsComeBeforeWhatNeedsThem(t *testing.T) {
	root := module(t, map[string]string{
		"a/a.proto": "syntax = \"proto3\";\npackage a;\nimport \"b/b.proto\";\nimport \"google/protobuf/timestamp.proto\";\n" +
			"option go_package = \"example/a\";\n// A is described.\nmessage A { b.B b = 1; google.protobuf.Timestamp at = 2; }\n",
		"b/b.proto": "syntax = \"proto3\";\npackage b;\noption go_package = \"example/b\";\nmessage B {}\n",
	})
	t.Chdir(filepath.Join(root, "a"))
	if got, err := moduleRoot(); err != nil || got != root {
		t.Fatalf("root %s, %v", got, err)
	}
	request, err := compile(t.Context(), root, []string{"a.proto"})
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, f := range request.GetProtoFile() {
		order = append(order, f.GetName())
	}
	want := []string{"b/b.proto", "google/protobuf/timestamp.proto", "a/a.proto"}
	if !slices.Equal(order, want) || !slices.Equal(request.GetFileToGenerate(), want[2:]) {
		t.Errorf("files %q, to generate %q", order, request.GetFileToGenerate())
	}
	if info := request.GetProtoFile()[2].GetSourceCodeInfo(); !strings.Contains(info.String(), "A is described.") {
		t.Error("the comments are lost")
	}
}

func TestWhatIsWrongIsNamed(t *testing.T) {
	root := module(t, map[string]string{"a.proto": "syntax = \"proto3\";\nmessage A { B b = 1; }\n"})
	t.Chdir(root)
	for _, tt := range []struct {
		files []string
		want  string
	}{
		{nil, "name the .proto files"},
		{[]string{"none.proto"}, "none.proto"},
		{[]string{"a.proto"}, "a.proto:2:"},
	} {
		if err := generate(t.Context(), tt.files); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v", tt.files, err)
		}
	}
	t.Chdir("/")
	if _, err := moduleRoot(); err == nil {
		t.Error("there is no module at the root of the file system")
	}
}
