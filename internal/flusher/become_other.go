//go:build !linux

package flusher

import (
	"log/slog"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Become does nothing: there are no block devices to serve.
func Become([]*reactor.Reactor, *slog.Logger) {}
