package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestJSONNamesStay: scripts read the JSON of top and why. Its names are kept in
// testdata/json, where they may be added to, and stand in the help of the command.
func TestJSONNamesStay(t *testing.T) {
	for _, args := range [][]string{{"top", "--once", "--output", "json", "--interval", "10ms"}, {"why", "vm1", "--output", "json", "--interval", "10ms"}} {
		t.Run(args[0], func(t *testing.T) {
			startDaemon(t)
			var out, help, errs bytes.Buffer
			if code := execute(args, strings.NewReader(""), &out, &errs); code != exitOK {
				t.Fatalf("exit code %d\n%s", code, &errs)
			}
			var v any
			if err := json.Unmarshal(out.Bytes(), &v); err != nil {
				t.Fatal(err)
			}
			paths := map[string]bool{}
			namesIn(v, "", paths)
			got := strings.Join(slices.Sorted(maps.Keys(paths)), "\n") + "\n"
			file := filepath.Join("testdata", "json", args[0]+".names")
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || got != string(want) {
				t.Errorf("%v, got\n%swant\n%s", err, got, want)
			}
			if code := execute([]string{args[0], "--help"}, strings.NewReader(""), &help, &errs); code != exitOK {
				t.Fatal(code)
			}
			for path := range paths {
				if name := path[strings.LastIndex(path, ".")+1:]; !strings.Contains(help.String(), `"`+strings.TrimSuffix(name, "[]")+`"`) && !inTop(args[0], path) {
					t.Errorf("the help does not tell of %s", path)
				}
			}
		})
	}
}

// inTop says whether a part of what why prints is what top prints, whose help tells of it.
func inTop(command, path string) bool {
	return command == "why" && (strings.HasPrefix(path, "disks[].") || strings.HasPrefix(path, "reactors[]."))
}

func namesIn(v any, path string, paths map[string]bool) {
	switch v := v.(type) {
	case map[string]any:
		for name, inner := range v {
			namesIn(inner, strings.TrimPrefix(path+"."+name, "."), paths)
		}
	case []any:
		for _, inner := range v {
			namesIn(inner, path+"[]", paths)
		}
		if len(v) == 0 {
			paths[path+"[]"] = true
		}
	default:
		paths[path] = true
	}
}
