package attach

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// pace is how long things wait.
type pace struct {
	first, most time.Duration // between tries to reach the server: doubled from the first on
	look        time.Duration // between looks whether the device is still there
	busy        time.Duration // between tries to attach a device that is open for a moment
	busyTries   int
}

var paceDefault = pace{
	first:     5 * time.Millisecond,   // a daemon that is replaced listens again within milliseconds
	most:      500 * time.Millisecond, // of the pause a restart makes; a failed connect costs microseconds
	look:      30 * time.Second,       // a detached device has no notice; one stat of sysfs
	busy:      20 * time.Millisecond,
	busyTries: 50, // with busy a second: longer than udev looks at a device
}

// backoff is the wait before the next try after some that failed.
func (p *pace) backoff(failed int) time.Duration {
	d := p.first
	for range failed - 1 {
		if d *= 2; d >= p.most {
			return p.most
		}
	}
	return d
}

// Keep gives an attached device fresh connections whenever some have died, until
// ctx ends or the device is detached. While it runs and the server comes back
// within the dead timeout, no I/O fails: it waits.
//
// It begins with one reconfiguration, since it cannot know what died before. Only
// one Keep should run for a device; two do no harm.
//
// Errors: ctx's; ErrNotAttached; ErrPermission; those of c. A server that is gone
// or does not match is tried again for ever.
func (d *Driver) Keep(ctx context.Context, index Index, c Config) error {
	if err := c.setDefaults(); err != nil {
		return err
	}
	listener, err := d.family.listen()
	if err != nil {
		return err
	}
	dead := make(chan struct{}, 1) // holds a note that connections may have died
	ended := make(chan error, 1)
	go func() { // ends when the listener is closed, or fails
		for {
			died, lost, err := listener.receive()
			if err != nil {
				ended <- err
				return
			}
			if lost || died == index {
				note(dead)
			}
		}
	}()
	running := true
	defer func() {
		_ = listener.Close() // nothing is sent on it
		if running {
			<-ended
		}
	}()

	note(dead) // what died before the group was joined
	look := time.NewTicker(d.pace.look)
	defer look.Stop()
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	retry.Stop() // until a try has failed
	cause := ""  // of the last failure
	log := d.log.With("device", index, "volume", c.Backend)
	for failed := 0; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			running = false
			return netlinkError("notifications", err)
		case <-look.C:
			if !d.host.attached(index) {
				return fmt.Errorf("%w: %v", ErrNotAttached, index)
			}
			continue
		case <-dead:
			if failed > 0 {
				continue // a try is due anyhow
			}
		case <-retry.C:
		}
		_, err := d.Reconfigure(ctx, index, c)
		switch {
		case err == nil:
			if failed > 0 {
				log.Info("nbd connections", "from", "lost", "to", "restored", "tries", failed+1)
			}
			failed = 0
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrNotAttached), errors.Is(err, ErrPermission):
			return err
		default:
			if failed++; failed == 1 || err.Error() != cause {
				cause = err.Error()
				log.Warn("nbd connections", "to", "lost", "err", err)
			}
			retry.Reset(d.pace.backoff(failed))
		}
	}
}

// note leaves a note, unless there is one.
func note(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
