//go:build race

package filedev

const raceEnabled = true
