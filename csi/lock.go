package csi

import (
	"context"
	"slices"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// keyLocks hold what calls are at work on. Nobody waits: a second call for the
// same thing is told to come again, as the specification has it.
type keyLocks struct {
	mu   sync.Mutex
	held map[string]bool
}

func newKeyLocks() *keyLocks { return &keyLocks{held: map[string]bool{}} }

// lock takes all of the keys, or none and an error ABORTED.
func (l *keyLocks) lock(keys ...string) (unlock func(), err error) {
	slices.Sort(keys)
	keys = slices.Compact(keys)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range keys {
		if l.held[k] {
			return nil, status.Errorf(codes.Aborted, "%s: another call is at work on it; repeat this one when that has ended", k)
		}
	}
	for _, k := range keys {
		l.held[k] = true
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range keys {
			delete(l.held, k)
		}
	}, nil
}

// What keys are of. A volume has one name on a node, whatever its pool.
func volumeKey(volume string) string     { return "volume " + volume }
func snapshotKey(snapshot string) string { return "snapshot " + snapshot }

// locked gives the daemon to a call, and the lock of a key. The caller gives the lock
// back, unless there is an error.
func (d *Driver) locked(ctx context.Context, key string) (client *control.Client, unlock func(), err error) {
	if client, err = d.daemon.client(ctx); err != nil {
		return nil, nil, err
	}
	unlock, err = d.locks.lock(key)
	return client, unlock, err
}

// lockedVolume is locked for the volume of an id, which must be one of this node.
func (d *Driver) lockedVolume(ctx context.Context, id string) (client *control.Client, v *controlpb.Volume, unlock func(), err error) {
	i, _ := ParseVolumeID(id) // told by volume
	if client, unlock, err = d.locked(ctx, volumeKey(i.Volume)); err != nil {
		return nil, nil, nil, err
	}
	if v, err = d.volume(ctx, id); err != nil {
		unlock()
		return nil, nil, nil, err
	}
	return client, v, unlock, nil
}
