package remote

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

// How long to wait between attempts to connect: from a restart that is over at once
// to a server that is away for hours.
const (
	backoffMin = 20 * time.Millisecond
	backoffMax = 5 * time.Second
)

// connect makes the connections of one session: one, or several where the server
// allows it. Fewer than asked for are no error.
func (d *Device) connect(ctx context.Context) ([]*nbd.Link, error) {
	first, err := nbd.DialLink(ctx, d.network, d.address, d.options)
	if err != nil {
		return nil, err
	}
	links := []*nbd.Link{first}
	if first.Info().Flags&nbd.FlagCanMultiConn == 0 {
		return links, nil
	}
	for len(links) < d.config.Connections {
		l, err := nbd.DialLink(ctx, d.network, d.address, d.options)
		if err != nil {
			d.log.Debug("fewer connections than asked for", "connections", len(links), "reason", err)
			break
		}
		if a, b := l.Info(), first.Info(); a.Size != b.Size || a.Flags != b.Flags { // it changes right now
			_ = d.abandon([]*nbd.Link{l}) // unused
			break
		}
		links = append(links, l)
	}
	return links, nil
}

// keepConnected makes a new session whenever one is lost.
func (d *Device) keepConnected(ctx context.Context) {
	defer close(d.done)
	delay := d.config.backoff
	for {
		again := false
		select {
		case <-ctx.Done():
			return
		case served := <-d.want:
			if served {
				delay = d.config.backoff
			}
			again = !served // it accepts and drops: no reason to hurry
		}
		for again || !d.reconnect(ctx) {
			again = false
			select {
			case <-ctx.Done():
				return
			case <-time.After(delay/2 + rand.N(delay/2)): // apart from other clients of the server
			}
			delay = min(2*delay, backoffMax)
		}
	}
}

// reconnect makes one attempt and reports whether the core has a session.
func (d *Device) reconnect(ctx context.Context) bool {
	d.waitEnded()
	attempt, cancel := context.WithTimeout(ctx, d.config.StallTimeout)
	defer cancel()
	links, err := d.connect(attempt)
	if ctx.Err() != nil {
		_ = d.abandon(links) // Close waits for them
		return false
	}
	ok := false
	_ = d.reactor.Run(func(*reactor.Reactor) { // it runs until Close, which waits for us
		if err != nil {
			d.core.stillAway(err)
			return
		}
		ok = d.core.adopt(links) == nil
	})
	return ok
}
