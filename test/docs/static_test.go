package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestCommandsExist(t *testing.T) {
	m := readManual(t)
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, match := range regexp.MustCompile(`(?m)^([a-z][a-z-]*):`).FindAllStringSubmatch(string(makefile), -1) {
		targets = append(targets, match[1])
	}
	count := 0
	for _, page := range pages(t) {
		_, blocks := readPage(t, page)
		for _, b := range blocks {
			for i, line := range b.joined() {
				for _, words := range commands(line) {
					switch {
					case len(words) < 2:
					case words[0] == "ashlar" && (isWord(words[1]) || strings.HasPrefix(words[1], "-")):
						count++
						if problem := m.check(words); problem != "" {
							t.Errorf("%s:%d: %s: %s", page, b.line+i, strings.Join(words, " "), problem)
						}
					case words[0] == "make" && isWord(words[1]) && !slices.Contains(targets, words[1]):
						t.Errorf("%s:%d: the Makefile has no target %s", page, b.line+i, words[1])
					}
				}
			}
		}
	}
	if count == 0 {
		t.Error("no command of ours was found: does the parser still fit?")
	}
}

var linkPattern = regexp.MustCompile(`\]\(([^)\s]+)\)`)

func TestLinksLeadSomewhere(t *testing.T) {
	for _, page := range append(pages(t), "benchmarks/results/README.md") {
		text, _ := readPage(t, page)
		for _, match := range linkPattern.FindAllStringSubmatch(text, -1) {
			target, _, _ := strings.Cut(match[1], "#")
			if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(page), target)); err != nil {
				t.Errorf("%s: the link %s leads nowhere", page, match[1])
			}
		}
	}
}

var fromPattern = regexp.MustCompile("(?s)<!-- from: (\\S+) -->\n```go\n(.*?)```")

// TestExamplesAreWhatCompiles wants code that a page says is from a file to be there.
func TestExamplesAreWhatCompiles(t *testing.T) {
	count := 0
	for _, page := range pages(t) {
		text, _ := readPage(t, page)
		for _, match := range fromPattern.FindAllStringSubmatch(text, -1) {
			count++
			file, err := os.ReadFile(filepath.Join(root, match[1]))
			if err != nil {
				t.Errorf("%s: %v", page, err)
			} else if !strings.Contains(string(file), match[2]) {
				t.Errorf("%s: the code from %s is not what stands there", page, match[1])
			}
		}
		if strings.Count(text, "<!-- from: ") != len(fromPattern.FindAllString(text, -1)) {
			t.Errorf("%s: a from mark is not above a fence of go", page)
		}
	}
	if count == 0 {
		t.Error("no example was found")
	}
}

func TestBlocksAndMarksAreFound(t *testing.T) {
	text := "a\n<!-- test: run without nbd-client mount -->\n```sh\nfirst \\\n  second\n```\n```\nplain\n```\n<!-- test: run in repository -->\n```\nmake help\n```\n"
	blocks, problems := parsePage(text)
	if len(problems) != 0 || len(blocks) != 3 {
		t.Fatalf("%d blocks, problems %q", len(blocks), problems)
	}
	if b := blocks[0]; !b.run || b.line != 4 || !slices.Equal(b.without, []string{"nbd-client", "mount"}) || b.joined()[0] != "first  second" {
		t.Errorf("%+v", b)
	}
	if b := blocks[1]; b.run || b.repository {
		t.Errorf("%+v", b)
	}
	if b := blocks[2]; !b.run || !b.repository {
		t.Errorf("%+v", b)
	}
	for mark, want := range map[string]block{
		"run on a node": {node: true}, "run as a daemon": {node: true, daemon: true}, "run on a node without mount": {node: true, without: []string{"mount"}},
	} {
		blocks, problems := parsePage("<!-- test: " + mark + " -->\n```\n```\n")
		if len(problems) != 0 || len(blocks) != 1 {
			t.Fatalf("%s: %d blocks, problems %q", mark, len(blocks), problems)
		}
		if b := blocks[0]; !b.run || b.node != want.node || b.daemon != want.daemon || !slices.Equal(b.without, want.without) {
			t.Errorf("%s: %+v", mark, b)
		}
	}
	for _, bad := range []string{
		"<!-- test: run on a boat -->\n```\n```\n", "<!-- test: run on a -->\n```\n```\n",
		"<!-- test: run -->\n\n```\n```\n", "<!-- test: walk -->\n```\n```\n", "<!-- test: run without -->\n```\n```\n", "```\n",
	} {
		if _, problems := parsePage(bad); len(problems) == 0 {
			t.Errorf("%q: no problem was found", bad)
		}
	}
}

func TestLinesInTheBackgroundAreWaitedFor(t *testing.T) {
	for line, want := range map[string]string{
		"ashlar serve --data-dir x &   # a node":   "ashlar pool list >/dev/null 2>&1",
		"ashlar export --socket /run/a disk.img &": "test -S '/run/a'",
		"ashlar export --listen :1 disk.img &":     "",
		"ashlar export --socket /run/a disk.img":   "",
		"sleep 1 &":                                "",
		"ashlar volume list; ashlar pool status x": "",
	} {
		if got := readiness(commands(line)); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

func TestCheckFindsWhatIsNotThere(t *testing.T) {
	m := manual{"ashlar": nil, "ashlar pool": nil, "ashlar pool create": {"--force"}, "ashlar pool add device": {"--size"}, "ashlar export": {"--socket"}}
	for line, want := range map[string]string{
		"ashlar pool create fast /dev/vdb --force":       "",
		"ashlar pool add-device fast /dev/vdc --size 1G": "",
		"ashlar export --socket=/run/a disk.img":         "",
		"ashlar --version":                               "",
		"ashlar pool creat fast":                         "no command pool creat",
		"ashlar attack":                                  "no command attack",
		"ashlar export --port 1":                         "no flag --port",
	} {
		if got := m.check(strings.Fields(line)); want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

// TestTheShortComparisonSaysWhatTheLongOneDoes wants each ratio of README.md's table of
// others in docs/comparison.md, which has it from the results.
func TestTheShortComparisonSaysWhatTheLongOneDoes(t *testing.T) {
	short, _ := readPage(t, "README.md")
	long, _ := readPage(t, "docs/comparison.md")
	_, section, ok := strings.Cut(short, "\n## Beside others\n")
	section, _, _ = strings.Cut(section, "\n## ")
	ratios := regexp.MustCompile(`\d+\.\d+x`).FindAllString(section, -1)
	if !ok || len(ratios) == 0 {
		t.Fatal("README.md has no ratio beside others")
	}
	for _, ratio := range ratios {
		if !strings.Contains(long, ratio) {
			t.Errorf("README.md says %s, docs/comparison.md does not", ratio)
		}
	}
}
