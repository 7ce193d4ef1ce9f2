package daemon

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// makeFile makes a file of size bytes and returns its path.
func TestParseSource(t *testing.T) {
	dir := t.TempDir()
	odd := testenv.SparseFile(t, filepath.Join(dir, "a=b"), 4096)
	for argument, want := range map[string]Source{
		"disk.img":                     {Path: "disk.img"},
		"name=disk.img":                {Name: "name", Path: "disk.img"},
		"name=/dev/disk/x":             {Name: "name", Path: "/dev/disk/x"},
		"name=key=disk.img":            {Name: "name", Path: "key=disk.img"},
		"=disk.img":                    {Path: "disk.img"},
		odd:                            {Path: odd}, // it exists
		"nbd://host:1/x=y":             {URI: "nbd://host:1/x=y"},
		"name=nbds+unix:///?socket=/a": {Name: "name", URI: "nbds+unix:///?socket=/a"},
		"name=" + odd:                  {Name: "name", Path: odd},
	} {
		if got, err := ParseSource(argument); err != nil || got != want {
			t.Errorf("%q: %+v, %v, want %+v", argument, got, err, want)
		}
	}
	for argument, want := range map[string]string{"": "empty", "name=": "NAME=FILE"} {
		if got, err := ParseSource(argument); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v", argument, got, err)
		}
	}
}
