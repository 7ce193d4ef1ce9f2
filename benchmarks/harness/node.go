package harness

import (
	"context"
	"fmt"
	"time"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// node is a connection to the control API of an `ashlar serve`. Starting the
// command line tool would take CPU from the load measured, and its start would be
// part of what is timed. Its methods tell how long the answer took.
type node struct{ client *control.Client }

// callMax bounds one call: far above every bar, so that a miss is a number.
const callMax = 30 * time.Second

// dialNode connects to the daemon behind a unix socket.
func dialNode(ctx context.Context, socket string) (*node, error) {
	c, err := control.Dial(ctx, "unix://"+socket, control.Options{})
	if err != nil {
		return nil, err
	}
	return &node{client: c}, nil
}

func (n *node) Close() error { return n.client.Close() }

// timed runs a call and measures it.
func timed(ctx context.Context, call func(context.Context) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, callMax)
	defer cancel()
	began := time.Now()
	err := call(ctx)
	return time.Since(began), err
}

// CreateVolume makes a thin volume in the only pool.
func (n *node) CreateVolume(ctx context.Context, name string, size uint64) (time.Duration, error) {
	return timed(ctx, func(ctx context.Context) error {
		_, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: name, SizeBytes: size})
		return err
	})
}

// DeleteVolume deletes a volume without snapshots. Its space is given back later.
func (n *node) DeleteVolume(ctx context.Context, name string) (time.Duration, error) {
	return timed(ctx, func(ctx context.Context) error {
		_, err := n.client.Volumes.Delete(ctx, &controlpb.DeleteVolumeRequest{Name: name})
		return err
	})
}

// CreateSnapshot keeps a volume as it is.
func (n *node) CreateSnapshot(ctx context.Context, volume, name string) (time.Duration, error) {
	return timed(ctx, func(ctx context.Context) error {
		_, err := n.client.Snapshots.Create(ctx, &controlpb.CreateSnapshotRequest{Volume: volume, Name: name})
		return err
	})
}

// snapshotsDuring takes a snapshot of a volume at once and then every period,
// until ctx ends.
func snapshotsDuring(control, volume string, period time.Duration) func(context.Context) ([]time.Duration, error) {
	return func(ctx context.Context) ([]time.Duration, error) {
		n, err := dialNode(ctx, control)
		if err != nil {
			return nil, err
		}
		defer func() { _ = n.Close() }() // nothing is in flight
		ticker := time.NewTicker(period)
		defer ticker.Stop()
		var calls []time.Duration
		for {
			// A snapshot begun is finished: the run's end must not leave half of one.
			took, err := n.CreateSnapshot(context.WithoutCancel(ctx), volume, fmt.Sprintf("s%d", len(calls)))
			if err != nil {
				return calls, err
			}
			calls = append(calls, took)
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return calls, nil
			}
		}
	}
}
