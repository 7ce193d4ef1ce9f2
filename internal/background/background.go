// Package background keeps the terminal from being asked for its colours.
//
// Bubble Tea asks standard output for its background when a program that links it
// starts, whatever that program is about to do (tea_init.go of v1), and waits up to
// five seconds for an answer that many terminals never give: consoles, pseudo
// terminals of scripts, CI. Nothing of Ashlar depends on the background, so this
// package says what it is before Bubble Tea asks.
//
// A blank import is all it takes. Packages are initialised in the order of their
// import paths where they do not depend on each other (Go specification, Program
// initialization), and this one comes before github.com/charmbracelet/bubbletea; a
// test of cmd/ashlar looks.
package background

import "github.com/charmbracelet/lipgloss"

func init() { lipgloss.SetHasDarkBackground(true) }
