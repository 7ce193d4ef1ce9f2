package daemon

import (
	"log/slog"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// notify tells the service manager, if one started us (sd_notify(3)).
func notify(log *slog.Logger, state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.Warn("the service manager could not be told", "state", state, "error", err)
	}
}

// watchdog tells the service manager, where it asks for that (WatchdogSec), that
// every reactor still turns. A reactor that hangs keeps it from being told, and the
// service manager restarts us: clients wait and reconnect.
func watchdog(log *slog.Logger, reactors []*reactor.Reactor) (stop func()) {
	interval, err := systemd.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("watchdog", "error", err)
	}
	if err != nil || interval <= 0 {
		return func() {}
	}
	ended, done := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop
		defer close(done)
		tick := time.NewTicker(interval / 3) // two may be late
		defer tick.Stop()
		for {
			if !allTurn(reactors, ended) {
				return
			}
			notify(log, systemd.SdNotifyWatchdog)
			select {
			case <-tick.C:
			case <-ended:
				return
			}
		}
	}()
	return func() {
		close(ended)
		<-done
	}
}

// allTurn waits until every reactor has answered; false when ended comes first.
func allTurn(reactors []*reactor.Reactor, ended <-chan struct{}) bool {
	answers := make(chan struct{}, len(reactors))
	for _, r := range reactors {
		go r.Post(reactor.TaskFunc(func(*reactor.Reactor) { answers <- struct{}{} })) // ends when the mailbox has room, or the reactor stops
	}
	for range reactors {
		select {
		case <-answers:
		case <-ended:
			return false
		}
	}
	return true
}
