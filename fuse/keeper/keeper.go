package keeper

import (
	"log/slog"
	"time"
)

// Config says how a keeper runs.
type Config struct {
	Socket string // path; its directory is made when missing
	// Idle ends the keeper when it has held nothing, and nobody was connected, for so
	// long; 0: never.
	Idle time.Duration
	Log  *slog.Logger // slog.Default() when nil
}

// Options are of a Client.
type Options struct {
	Socket string
	// Command starts a keeper that listens at Socket, when none does; nil: none is
	// started. It outlives this process.
	Command []string
	Log     *slog.Logger // slog.Default() when nil
}

// Entry is what a keeper holds, without the descriptor.
type Entry struct {
	Name  string
	State []byte
	Owned bool
	PID   int // of the owner, as the keeper's namespace numbers it
}
