package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/ashlar-storage/ashlar"

// goFile is one parsed Go file of the repository.
type goFile struct {
	path    string // from the repository's root, with slashes
	test    bool
	text    []byte
	syntax  *ast.File
	imports []string
}

// tree is the repository.
type tree struct {
	root  string
	fset  *token.FileSet
	files []*goFile
	shell []string // scripts, from the root
}

func (f *goFile) dir() string { return path.Dir(f.path) }

// readTree parses every Go file of the repository.
func readTree(t *testing.T) *tree {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatalf("the repository's root is not where it should be: %v", err)
	}
	tr := &tree{root: root, fset: token.NewFileSet()}
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := entry.Name()
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if entry.IsDir() {
			if rel == "bin" || base == "testdata" || rel != "." && strings.HasPrefix(base, ".") && rel != ".ci" {
				return fs.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(base, ".sh") || strings.HasPrefix(rel, ".ci/") {
			tr.shell = append(tr.shell, rel)
		}
		if !strings.HasSuffix(base, ".go") {
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f := &goFile{path: rel, test: strings.HasSuffix(base, "_test.go"), text: text}
		if f.syntax, err = parser.ParseFile(tr.fset, rel, text, parser.ParseComments); err != nil {
			return err
		}
		for _, spec := range f.syntax.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			f.imports = append(f.imports, imported)
		}
		tr.files = append(tr.files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(tr.files) == 0 {
		t.Fatal("no Go files found")
	}
	return tr
}

// dirs lists the directories that hold Go files.
func (tr *tree) dirs() []string {
	var dirs []string
	for _, f := range tr.files {
		dirs = append(dirs, f.dir())
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// at is a position as an editor wants it.
func (tr *tree) at(node ast.Node) string {
	p := tr.fset.Position(node.Pos())
	return p.Filename + ":" + strconv.Itoa(p.Line)
}

// local gives the path inside the module, or false for an import from outside.
func local(imported string) (string, bool) {
	if imported == module {
		return ".", true
	}
	return strings.CutPrefix(imported, module+"/")
}

// matches reports whether name fits one of the patterns: "a/b" is that package,
// "a/b/..." it and all below.
func matches(name string, patterns ...string) bool {
	for _, p := range patterns {
		if prefix, below := strings.CutSuffix(p, "/..."); below {
			if name == prefix || strings.HasPrefix(name, prefix+"/") {
				return true
			}
		} else if name == p {
			return true
		}
	}
	return false
}
