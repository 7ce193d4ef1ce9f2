// Package fioprofiles carries the fio job files of this directory in the binary,
// so that `ashlar bench --profile NAME` needs nothing but fio itself.
//
// A job file names no target and no engine: both are given on fio's command
// line, so that one file runs on a raw device, a file or an NBD URI. README.md
// says where each profile comes from and how to run it by hand.
package fioprofiles

import (
	"embed"
	"fmt"
	"io/fs"
	"path"
	"sort"
	"strings"
)

//go:embed *.fio
var files embed.FS

// Names lists the profiles in alphabetical order.
func Names() []string {
	paths, err := fs.Glob(files, "*.fio")
	if err != nil || len(paths) == 0 {
		panic(fmt.Sprintf("fioprofiles: the binary was built without its profiles: %v", err))
	}
	names := make([]string, len(paths))
	for i, p := range paths {
		names[i] = strings.TrimSuffix(path.Base(p), ".fio")
	}
	sort.Strings(names)
	return names
}

// Read gives the text of a profile by its name.
func Read(name string) (string, error) {
	text, err := files.ReadFile(name + ".fio")
	if err != nil {
		return "", fmt.Errorf("profile %q: not built in (have %s)", name, strings.Join(Names(), ", "))
	}
	return string(text), nil
}
