package main

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/fuse/keeper"
	"github.com/ashlar-storage/ashlar/internal/flusher"
)

type fuseKeeperFlags struct {
	socket string
	idle   time.Duration
	logFlags
}

func newFuseKeeperCommand() *cobra.Command {
	f := &fuseKeeperFlags{}
	c := &cobra.Command{
		Use:   "fuse-keeper --socket PATH [flags]",
		Short: "Hold devices attached through FUSE while the daemon restarts",
		Long: `Fuse-keeper holds the connections to the kernel of devices that the daemon (ashlar
serve) attached through FUSE. When the daemon dies, the devices and the file systems
on them wait, and the next daemon goes on with them.

The daemon starts one when it needs it, unless serve --fuse-keeper names another's
socket. Under systemd or in Kubernetes it has to be a unit, or a container, of its
own: with the daemon's, it would end.

It needs no configuration, reads no disk, and may be restarted while the daemon runs.
SIGTERM and SIGINT end it, but not while it holds a device that no daemon serves: then
it waits for one, and a second signal ends it, and the devices with it.`,
		Example: `  ashlar fuse-keeper --socket /run/ashlar/keeper.sock`,
		Args:    noArguments,
		RunE:    func(*cobra.Command, []string) error { return f.run() },
	}
	flags := c.Flags()
	flags.StringVar(&f.socket, "socket", "", "path of the socket on which daemons reach it (required)")
	flags.DurationVar(&f.idle, "idle", 0, "end after holding nothing for so long, with nobody connected; 0: never")
	f.add(c)
	_ = c.MarkFlagRequired("socket")                 // these two fail for an unknown flag only
	_ = c.MarkFlagFilename("socket", "sock", "path") // as above
	return c
}

func (f *fuseKeeperFlags) run() error {
	log, err := f.logger()
	if err != nil {
		return err
	}
	if f.idle < 0 {
		return usagef("--idle %v: must not be negative", f.idle)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	s, err := keeper.Start(keeper.Config{Socket: f.socket, Idle: f.idle, Log: log})
	if err != nil {
		return err
	}
	// A daemon that comes back needs it, and pages of its devices wait for the daemon.
	flusher.Become(nil, log)
	// The last to be killed when memory is short: it has little, and much would end.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // needs root
	stop := make(chan struct{})
	ended := make(chan struct{})
	defer close(ended)
	go func() { // ends with the command
		for {
			select {
			case <-signals:
			case <-ended:
				return
			}
			select {
			case stop <- struct{}{}:
			case <-ended:
				return
			}
		}
	}()
	return s.Run(stop)
}
