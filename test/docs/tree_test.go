package docs

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// eachFile calls f with every text file of the tree that is written by hand and has one
// of the endings; "" is a file without.
func eachFile(t *testing.T, f func(path, text string), endings ...string) {
	t.Helper()
	count := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && slices.Contains([]string{".git", ".make", "bin", "results", "testdata"}, d.Name()):
			return filepath.SkipDir
		case !d.Type().IsRegular() || !slices.Contains(endings, filepath.Ext(path)):
			return nil
		}
		b, err := os.ReadFile(path)
		if err == nil && !bytes.ContainsRune(b, 0) {
			count++
			relative, _ := filepath.Rel(root, path) // of what was found there
			f(relative, string(b))
		}
		return err
	})
	if err != nil || count == 0 {
		t.Fatalf("%d files: %v", count, err)
	}
}

// TestTheSeedHasOneName: what a random test prints is what repeats it, and every other.
func TestTheSeedHasOneName(t *testing.T) {
	pattern := regexp.MustCompile(`\bASHLAR_[A-Z_]*SEED\b`)
	seen := false
	eachFile(t, func(path, text string) {
		for _, name := range pattern.FindAllString(text, -1) {
			if seen = true; name != "ASHLAR_TEST_SEED" {
				t.Errorf("%s: %s is not ASHLAR_TEST_SEED", path, name)
			}
		}
	}, ".go", ".sh", ".md", "")
	if !seen {
		t.Error("no seed was found: does the pattern still fit?")
	}
}

// TestMakeHelpNamesTheVariables: those of the Makefile that can be set, and those that
// its programs read.
func TestMakeHelpNamesTheVariables(t *testing.T) {
	help, err := exec.Command("make", "--no-print-directory", "-C", root, "help").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, line, found := strings.Cut(string(help), "variables: ")
	if !found {
		t.Fatalf("make help names no variables:\n%s", help)
	}
	want := []string{"ASHLAR_TEST_LONG", "ASHLAR_TEST_SEED", "TESTFLAGS", "BENCHFLAGS"}
	for path, pattern := range map[string]string{
		"Makefile": `(?m)^([A-Z_]+) *\?=`, "tools/run.sh": `(?m)^#   (RUN_[A-Z]+)`, "test/kube/run.sh": `(?m)^#   (KUBE_[A-Z]+)`,
	} {
		b, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile(pattern).FindAllStringSubmatch(string(b), -1)
		if len(names) == 0 {
			t.Errorf("%s: no variables were found: does the pattern still fit?", path)
		}
		for _, name := range names {
			want = append(want, name[1])
		}
	}
	for _, name := range want {
		if !regexp.MustCompile(`\b` + name + `\b`).MatchString(line) {
			t.Errorf("make help does not name %s", name)
		}
	}
}

// TestFioLeavesNoStateFiles: with verification, and not told otherwise, fio leaves one of
// each job in the directory it runs in.
func TestFioLeavesNoStateFiles(t *testing.T) {
	verify := regexp.MustCompile(`(?m)(?:--|^)verify=[a-z]`)
	eachFile(t, func(path, text string) {
		if runs, told := len(verify.FindAllString(text, -1)), strings.Count(text, "verify_state_save=0"); runs > told && path != "test/docs/tree_test.go" {
			t.Errorf("%s: %d runs of fio verify, %d with verify_state_save=0", path, runs, told)
		}
	}, ".go", ".sh", ".fio")
}

// TestMetricsHaveOnePort: one for the daemon and one for the CSI driver, wherever an
// example names it.
func TestMetricsHaveOnePort(t *testing.T) {
	pattern := regexp.MustCompile(`(csi )?(?:--)?metrics[=:]? [0-9.]+:(\d+)`)
	seen := 0
	eachFile(t, func(path, text string) {
		for _, m := range pattern.FindAllStringSubmatch(text, -1) {
			want := "9120"
			if m[1] != "" {
				want = "9122"
			}
			if seen++; m[2] != want {
				t.Errorf("%s: %q, elsewhere port %s", path, m[0], want)
			}
		}
	}, ".md", ".yaml")
	if seen < 3 {
		t.Errorf("metrics are named %d times: does the pattern still fit?", seen)
	}
}

// TestContributingSaysWhatMakeRunDoes: in the words of make help.
func TestContributingSaysWhatMakeRunDoes(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "CONTRIBUTING.md"))
	if err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	about := regexp.MustCompile(`(?m)^run: .*## (.*?)(?: \(.*)?$`).FindStringSubmatch(string(makefile))
	if about == nil || !strings.Contains(string(page), "make run        # "+about[1]+"\n") {
		t.Errorf("CONTRIBUTING.md does not say of make run what make help does: %q", about)
	}
}
