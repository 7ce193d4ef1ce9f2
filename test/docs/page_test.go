package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// block is one fenced block of a page.
type block struct {
	line  int // of its first line, from 1
	lines []string

	run        bool
	repository bool     // in the repository's folder
	node       bool     // a node is there, as doc.go describes it
	daemon     bool     // its lines are daemons, each in the place of the one before
	without    []string // commands whose lines are left out
	mark       string   // the whole mark, "" without
}

var markPattern = regexp.MustCompile(`^<!-- test: (.*) -->$`)

// parsePage finds the fenced blocks of a page.
func parsePage(text string) (blocks []block, problems []string) {
	var current *block
	mark := ""
	for i, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "```") {
			if current != nil {
				blocks = append(blocks, *current)
				current = nil
				continue
			}
			current = &block{line: i + 2}
			if mark != "" {
				if problem := current.setMark(mark); problem != "" {
					problems = append(problems, problem)
				}
				mark = ""
			}
			continue
		}
		if current != nil {
			current.lines = append(current.lines, line)
			continue
		}
		if mark != "" {
			problems = append(problems, "a mark is not directly above a fence: "+mark)
			mark = ""
		}
		if m := markPattern.FindStringSubmatch(trimmed); m != nil {
			mark = m[1]
		}
	}
	if current != nil {
		problems = append(problems, "the last fence is not closed")
	}
	return blocks, problems
}

func (b *block) setMark(mark string) (problem string) {
	b.mark = mark
	words := strings.Fields(mark)
	if words[0] != "run" {
		return "a mark says neither run nor anything else known: " + mark
	}
	b.run = true
	for words = words[1:]; len(words) > 0; {
		phrase := strings.Join(words[:min(len(words), 3)], " ")
		switch {
		case phrase == "on a node":
			b.node = true
			words = words[3:]
		case phrase == "as a daemon":
			b.node, b.daemon = true, true
			words = words[3:]
		case strings.HasPrefix(phrase, "in repository"):
			b.repository = true
			words = words[2:]
		case words[0] == "without" && len(words) > 1:
			b.without = words[1:]
			words = nil
		default:
			return "a mark that is not understood: " + mark
		}
	}
	return ""
}

// commands are the simple commands of a line: words up to what ends them.
func commands(line string) [][]string {
	if at := strings.Index(line, " #"); at >= 0 {
		line = line[:at]
	}
	if strings.HasPrefix(strings.TrimSpace(line), "#") {
		return nil
	}
	var all [][]string
	var words []string
	for _, word := range strings.Fields(line) {
		end := strings.HasSuffix(word, ";")
		word = strings.Trim(strings.TrimSuffix(word, ";"), "'\"`")
		switch {
		case word == "|" || word == "&&" || word == "||" || word == "&":
			end = true
		case word == "sudo" && len(words) == 0 || word == "$" && len(words) == 0:
		default:
			words = append(words, word)
		}
		if end {
			all, words = append(all, words), nil
		}
	}
	return append(all, words)
}

// joined are the lines of a block with continuations put together; what was joined to
// the line before is empty.
func (b *block) joined() []string {
	lines := slices.Clone(b.lines)
	for i := len(lines) - 2; i >= 0; i-- {
		if strings.HasSuffix(lines[i], "\\") {
			lines[i] = strings.TrimSuffix(lines[i], "\\") + " " + strings.TrimSpace(lines[i+1])
			lines[i+1] = ""
		}
	}
	return lines
}

// pages are README.md and everything under docs that is written by hand.
func pages(t *testing.T) []string {
	t.Helper()
	list := []string{"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"}
	err := filepath.WalkDir(filepath.Join(root, "docs"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".md") {
			relative, err := filepath.Rel(root, path)
			list = append(list, relative)
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func readPage(t *testing.T, page string) (text string, blocks []block) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(root, page))
	if err != nil {
		t.Fatal(err)
	}
	blocks, problems := parsePage(string(raw))
	for _, p := range problems {
		t.Errorf("%s: %s", page, p)
	}
	return string(raw), blocks
}

// manual is what the man pages say there is.
type manual map[string][]string // "ashlar pool create" -> its flags

var manFlag = regexp.MustCompile(`(-{1,2}[a-zA-Z][a-z0-9-]*)`)

func readManual(t *testing.T) manual {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "docs/man/ashlar*.1"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no man pages (make man): %v", err)
	}
	m := manual{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".1"), "-", " ")
		m[name] = manFlag.FindAllString(strings.ReplaceAll(string(text), `\-`, "-"), -1)
	}
	return m
}

// find is the name of the page of a command; a hyphen within a word of a command is a
// space there. It says "" when the command needs another word, which is not one.
func (m manual) find(words []string) (name string, isGroup bool) {
	for n := len(words); n > 0; n-- {
		name = strings.ReplaceAll(strings.Join(words[:n], " "), "-", " ")
		if _, ok := m[name]; ok {
			for other := range m {
				isGroup = isGroup || strings.HasPrefix(other, name+" ")
			}
			return name, isGroup
		}
	}
	return "", false
}

// check says what is wrong with a command line of ours, "" if nothing is.
func (m manual) check(words []string) string {
	name, isGroup := m.find(words)
	rest := words[len(strings.Fields(name)):]
	if n := len(strings.Fields(strings.ReplaceAll(strings.Join(words, " "), "-", " "))); n == 0 || name == "" {
		return "no man page"
	}
	// A hyphen made two words of one: count by what the name took of the words.
	for n := 1; n <= len(words); n++ {
		if strings.ReplaceAll(strings.Join(words[:n], " "), "-", " ") == name {
			rest = words[n:]
			break
		}
	}
	if isGroup && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && isWord(rest[0]) {
		return "ashlar has no command " + strings.Join(append(strings.Fields(name)[1:], rest[0]), " ")
	}
	for _, word := range rest {
		flag, _, _ := strings.Cut(word, "=")
		if strings.HasPrefix(flag, "-") && flag != "-" && flag != "--" && manFlag.FindString(flag) == flag &&
			!slices.Contains(m[name], flag) && flag != "--help" && flag != "--version" && flag != "-h" {
			return name + " has no flag " + flag
		}
	}
	return ""
}

var wordPattern = regexp.MustCompile(`^[a-z][a-z-]*$`)

func isWord(s string) bool { return wordPattern.MatchString(s) }
