package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/nbd"
)

// Check reports why Serve would refuse to start with these options; the error is that
// of Serve. Nothing is left behind, and nobody is served.
//
// A daemon that runs on the same data directory is not disturbed. It is taken for the
// one that ends before: where it listens is free, or is handed over. Another daemon's
// lock is therefore not looked at, nor are pools, which only the one that has them can.
func (c ServeConfig) Check() (err error) {
	c.Log = slog.New(slog.DiscardHandler) // what the options choose is for the log of Serve
	if c.DataDir, err = filepath.Abs(c.DataDir); err != nil {
		return err
	}
	if err := c.Reactors.check(); err != nil {
		return err
	}
	if err := CheckWritable(c.DataDir); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	if _, err := c.options(); err != nil {
		return fmt.Errorf("options: %w", err)
	}
	held, err := readHeld(c.DataDir)
	if err != nil {
		return err
	}
	if err := c.checkSockets(held); err != nil {
		return err
	}
	reactors, err := c.Reactors.start(c.Log)
	defer func() { stopReactors(reactors) }()
	if err != nil {
		return err
	}
	if _, err := nbd.NewServer(c.server(reactors, &nbd.ExportSet{})); err != nil {
		return err
	}
	spans, err := startTracing(context.Background(), c.OTLPEndpoint, c.Version, c.Log)
	spans.stop() // nothing was sent
	return err
}

// checkSockets opens what is neither handed over nor closed before, and closes it.
func (c *ServeConfig) checkSockets(held []heldSocket) error {
	passed, secure := passedFor(held)
	if secure && c.ControlTLS == nil {
		return errControlWithoutTLS
	}
	wanted := c.sockets(passed)
	if c.Metrics != "" {
		wanted = append(wanted, socket{
			key: metricsKey, network: "tcp", address: c.Metrics,
			allowed: func() error { return httpAddress(c.Metrics) },
			open:    func() (net.Listener, error) { return ListenTCP(c.Metrics, false, false) },
		})
	}
	// What nobody asks for any more is closed before anything new is opened; what is
	// handed over stays, and is in the way of the rest.
	kept := map[string]bool{}
	for _, s := range wanted {
		kept[s.key] = s.key != metricsKey && slices.ContainsFunc(held, func(h heldSocket) bool { return h.Key == s.key })
	}
	freed := slices.DeleteFunc(slices.Clone(held), func(h heldSocket) bool { _, ok := passedName(h.Key); return ok || kept[h.Key] })
	var opened []net.Listener
	defer func() {
		for _, l := range opened { // at the end, since two of them may be in each other's way
			_ = l.Close() // nobody was served
		}
	}()
	for _, s := range wanted {
		if s.allowed != nil {
			if err := s.allowed(); err != nil {
				return named(s.key, err)
			}
		}
		if kept[s.key] || slices.ContainsFunc(freed, func(h heldSocket) bool { return h.overlaps(s) }) {
			kept[s.key] = false // named twice, it is refused
			continue
		}
		l, err := s.open()
		if err != nil {
			return named(s.key, err)
		}
		opened = append(opened, l)
	}
	return nil
}

// named adds the flag to an error of the address for metrics, as Serve does.
func named(key string, err error) error {
	if key == metricsKey {
		return fmt.Errorf("--metrics: %w", err)
	}
	return err
}

// CheckWritable reports why nothing can be made in a directory, which is made itself
// when it is not there.
func CheckWritable(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if errors.Is(err, os.ErrNotExist) && at != filepath.Dir(at) {
			continue
		}
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%s is no directory", at)
		}
		if err := unix.Access(at, unix.W_OK|unix.X_OK); err != nil {
			return fmt.Errorf("%s cannot be written to: %w", at, err)
		}
		return nil
	}
}
