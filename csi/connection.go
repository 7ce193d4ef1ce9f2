package csi

import (
	"context"
	"sync"
	"time"

	"github.com/ashlar-storage/ashlar/control"
)

// daemon is the connection to the daemon of this node. It is made by the first
// call that wants it, and again when it was lost.
type daemon struct {
	address string
	timeout time.Duration

	mu     sync.Mutex
	conn   *control.Client
	closed bool
}

func newDaemon(address string, timeout time.Duration) *daemon {
	return &daemon{address: address, timeout: timeout}
}

// client gives the connection, which stays the daemon's. Its errors are
// *control.Error.
func (d *daemon) client(ctx context.Context) (*control.Client, error) {
	d.mu.Lock()
	defer d.mu.Unlock() // held while connecting: a socket of this host answers or refuses at once
	switch {
	case d.closed:
		return nil, control.Errorf(control.ErrUnavailable, "", "", "the driver is going down")
	case d.conn != nil:
		return d.conn, nil
	}
	conn, err := control.Dial(ctx, d.address, control.Options{Timeout: d.timeout})
	if err != nil {
		return nil, err
	}
	d.conn = conn
	return conn, nil
}

func (d *daemon) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed = true; d.conn != nil {
		_ = d.conn.Close() // nothing is in flight
		d.conn = nil
	}
}
