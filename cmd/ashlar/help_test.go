package main

import (
	"slices"
	"strings"
	"testing"
)

// TestHelpRefusesUnknownWords as every other command does.
func TestHelpRefusesUnknownWords(t *testing.T) {
	for _, c := range []struct {
		line string
		code int
		want string // in what is printed
	}{
		{"completion nosuch", exitUsage, "nosuch"},
		{"help nosuch", exitUsage, "nosuch"},
		{"help pool nosuch", exitUsage, "pool nosuch"},
		{"help pool list more", exitUsage, "more"},
		{"help", exitOK, "Available Commands"},
		{"help pool", exitOK, "ashlar pool"},
		{"help pool list", exitOK, "--help"},
		{"help completion", exitOK, "bash"},
		{"completion", exitOK, "bash"},
		{"completion --help", exitOK, "bash"},
		{"completion zsh", exitOK, "compdef"},
		{"__complete help po", exitOK, "pool"},
	} {
		code, stdout, stderr := ashlar(t, strings.Fields(c.line)...)
		if said := stdout + stderr; code != c.code || !strings.Contains(said, c.want) || (code != exitOK) != (stdout == "") {
			t.Errorf("%s: exit code %d, want %d\n%s", c.line, code, c.code, said)
		}
	}
}

// TestTheHelpNamesEveryCommand but those that need no word.
func TestTheHelpNamesEveryCommand(t *testing.T) {
	root := newRootCommand()
	text := strings.FieldsFunc(root.Long, func(r rune) bool { return (r < 'a' || r > 'z') && r != '-' })
	for _, c := range root.Commands() {
		if !c.Hidden && !slices.Contains([]string{"bench", "export", "fuse-keeper", "man", "version"}, c.Name()) && !slices.Contains(text, c.Name()) {
			t.Errorf("%s is not in\n%s", c.Name(), root.Long)
		}
	}
}
