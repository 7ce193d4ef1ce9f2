package lint

import (
	"go/ast"
	"go/token"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestUnsafeStandsOnlyInFilesNamedForIt(t *testing.T) {
	for _, f := range readTree(t).files {
		stem := strings.TrimSuffix(strings.TrimSuffix(path.Base(f.path), ".go"), "_test")
		if strings.HasSuffix(stem, ".pb") { // written by protoc-gen-go, which keeps its descriptor so
			continue
		}
		if slices.Contains(f.imports, "unsafe") && !strings.HasSuffix(stem, "_unsafe") {
			t.Errorf("%s imports unsafe; code on raw kernel memory lives in a file named x_unsafe.go", f.path)
		}
	}
}

func TestNoNotesToSelf(t *testing.T) {
	note := regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|X` + `XX)\b`)
	for _, f := range readTree(t).files {
		for i, line := range strings.Split(string(f.text), "\n") {
			if word := note.FindString(line); word != "" {
				t.Errorf("%s:%d: %s: do it, or write an issue and say why it is not done here", f.path, i+1, word)
			}
		}
	}
}

func TestPackagesSayWhatTheyProvide(t *testing.T) {
	vague := []string{"util", "utils", "common", "manager", "helper", "helpers", "misc", "shared"}
	tr := readTree(t)
	for _, f := range tr.files {
		name := strings.TrimSuffix(f.syntax.Name.Name, "_test")
		if slices.Contains(vague, name) {
			t.Errorf("%s: package %s: name it for what it provides", f.path, name)
		}
		if base := strings.ReplaceAll(path.Base(f.dir()), "-", ""); name != base && name != "main" && f.dir() != "." {
			t.Errorf("%s: package %s is in folder %s", f.path, name, base)
		}
	}
}

func TestEveryPackageHasADocComment(t *testing.T) {
	tr := readTree(t)
	for _, dir := range tr.dirs() {
		var docs []string
		product := false
		for _, f := range tr.files {
			if f.dir() != dir {
				continue
			}
			product = product || !f.test
			if f.syntax.Doc != nil && (!f.test || !strings.HasSuffix(f.syntax.Name.Name, "_test")) {
				docs = append(docs, f.path)
			}
		}
		switch {
		case len(docs) == 0:
			t.Errorf("package %s has no doc comment", dir)
		case product && len(docs) > 1:
			t.Errorf("package %s has more than one doc comment: %s", dir, strings.Join(docs, ", "))
		}
	}
}

func TestExportedNamesOfTheDataPathAreDocumented(t *testing.T) {
	tr := readTree(t)
	for _, f := range tr.files {
		if f.test || !matches(f.dir(), "datapath/...", "nbd/...") {
			continue
		}
		for _, decl := range f.syntax.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || receiverExported(d.Recv)) {
					t.Errorf("%s: %s has no doc comment", tr.at(d), d.Name.Name)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					undocumented(d, spec, func(name *ast.Ident) {
						t.Errorf("%s: %s has no doc comment", tr.at(name), name.Name)
					})
				}
			}
		}
	}
}

// undocumented calls report for each exported name of spec that neither a
// comment of its own nor one of its group describes.
func undocumented(group *ast.GenDecl, spec ast.Spec, report func(*ast.Ident)) {
	switch s := spec.(type) {
	case *ast.TypeSpec:
		if s.Name.IsExported() && s.Doc == nil && s.Comment == nil && (group.Doc == nil || group.Lparen != token.NoPos) {
			report(s.Name)
		}
	case *ast.ValueSpec:
		if s.Doc != nil || s.Comment != nil || group.Doc != nil {
			return
		}
		for _, name := range s.Names {
			if name.IsExported() {
				report(name)
			}
		}
	}
}

func receiverExported(recv *ast.FieldList) bool {
	if len(recv.List) == 0 {
		return false
	}
	expr := recv.List[0].Type
	for {
		switch e := expr.(type) {
		case *ast.StarExpr:
			expr = e.X
		case *ast.IndexExpr:
			expr = e.X
		case *ast.IndexListExpr:
			expr = e.X
		case *ast.Ident:
			return e.IsExported()
		default:
			return false
		}
	}
}

func TestEveryFuzzTargetHasASeedCorpus(t *testing.T) {
	tr := readTree(t)
	for _, f := range tr.files {
		if !f.test {
			continue
		}
		for _, decl := range f.syntax.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Fuzz") {
				continue
			}
			corpus := filepath.Join(tr.root, f.dir(), "testdata", "fuzz", fn.Name.Name)
			entries, err := os.ReadDir(corpus)
			if (err != nil || len(entries) == 0) && !addsSeeds(fn) {
				t.Errorf("%s: %s has neither f.Add nor testdata/fuzz/%s", tr.at(fn), fn.Name.Name, fn.Name.Name)
			}
		}
	}
}

// addsSeeds reports whether fn calls a method Add, or hands its *testing.F to a
// function that may.
func addsSeeds(fn *ast.FuncDecl) bool {
	if fn.Type.Params == nil || len(fn.Type.Params.List) != 1 || len(fn.Type.Params.List[0].Names) != 1 {
		return false
	}
	parameter := fn.Type.Params.List[0].Names[0].Name
	isParameter := func(e ast.Expr) bool {
		id, ok := e.(*ast.Ident)
		return ok && id.Name == parameter
	}
	found := false
	ast.Inspect(fn.Body, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		if s, ok := call.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "Add" && isParameter(s.X) {
			found = true
		}
		if slices.ContainsFunc(call.Args, isParameter) {
			found = true
		}
		return true
	})
	return found
}

func TestShellScriptsParse(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("needs bash (Debian package bash; make test does not skip it)")
	}
	tr := readTree(t)
	if len(tr.shell) == 0 {
		t.Error("no shell scripts found")
	}
	for _, script := range tr.shell {
		name := filepath.Join(tr.root, script)
		if out, err := exec.Command(bash, "-n", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
		if info, err := os.Stat(name); err == nil && info.Mode()&0o111 == 0 {
			t.Errorf("%s is not executable", script)
		}
	}
}
