package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/daemon"
)

// orphanHelp is in the help of the commands that do without a daemon.
const orphanHelp = `

Where no daemon runs on this host, this command goes by the kernel's own lists.`

// openOrphans looks at this host's devices without a daemon; tests replace it.
var openOrphans = daemon.NewOrphans

// orphans are this host's devices, when err says that no daemon runs here; nil else.
// The daemon of a socket that exists and may not be opened does run.
func (s *session) orphans(err error, keeper string) *daemon.Orphans {
	if !errors.Is(err, control.ErrUnavailable) || !s.unix() || (!errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED)) {
		return nil
	}
	var c daemon.OrphansConfig
	if keeper != "" {
		c.Keepers = []string{keeper}
	}
	return openOrphans(c)
}

// bounded is a context for a call that no daemon bounds.
func (s *session) bounded() (context.Context, context.CancelFunc) {
	ctx := s.ctx
	if ctx == nil {
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		s.ctx, s.stop = ctx, stop
	}
	if s.timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, s.timeout)
}

// noteNoDaemon says that the kernel is asked in place of a daemon.
func (s *session) noteNoDaemon() {
	s.note("no daemon at %s: this is what the kernel has", s.address())
}

// detachOrphan removes a device without a daemon.
func (s *session) detachOrphan(o *daemon.Orphans, name string, force bool) (d *controlpb.Device, err error) {
	ctx, cancel := s.bounded()
	defer cancel()
	defer func() { err = errors.Join(err, o.Close()) }()
	s.noteNoDaemon()
	if d, err = o.Detach(ctx, name, force); err == nil && d.GetReason() != "" {
		s.note("%s: %s", d.GetPath(), d.GetReason())
	}
	return d, err
}

// listOrphans lists devices without a daemon.
func (s *session) listOrphans(o *daemon.Orphans) (l *controlpb.ListDevicesResponse, err error) {
	ctx, cancel := s.bounded()
	defer cancel()
	defer func() { err = errors.Join(err, o.Close()) }()
	s.noteNoDaemon()
	devices, support, err := o.List(ctx)
	if err != nil {
		s.note("not all devices could be looked at: %v", err)
	}
	return &controlpb.ListDevicesResponse{Devices: devices, Support: support}, nil
}
