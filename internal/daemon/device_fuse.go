package daemon

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/fuse/keeper"
)

// fuseWay attaches loop devices on files of FUSE mounts.
type fuseWay struct {
	reactors []*reactor.Reactor
	dir      string
	options  keeper.Options
	log      *slog.Logger

	mu     sync.Mutex
	keeper *keeper.Client // nil until it is needed
}

// newFUSEWay makes the way for a data directory. socket is where a keeper listens that
// others start; "": the daemon starts its own.
func newFUSEWay(reactors []*reactor.Reactor, dataDir, socket string, log *slog.Logger) *fuseWay {
	w := &fuseWay{reactors: reactors, dir: filepath.Join(dataDir, "fuse"), options: keeper.Options{Socket: socket, Log: log}, log: log}
	if socket != "" {
		return w
	}
	w.options.Socket = keeperSocket(dataDir)
	command, err := keeper.SelfCommand(w.options.Socket)
	if err != nil {
		log.Warn("no keeper can be started", "error", err) // and so nothing attached through FUSE
	}
	w.options.Command = command
	return w
}

// keeperSocket is where the keeper listens that the daemon of a data directory starts.
func keeperSocket(dataDir string) string {
	path := filepath.Join(dataDir, "keeper.sock")
	if len(path) > socketPathMax {
		h := fnv.New64a()
		_, _ = h.Write([]byte(dataDir)) // never fails
		path = fmt.Sprintf("/run/ashlar/keeper-%x.sock", h.Sum64())
	}
	return path
}

// socketPathMax is what fits into an address of a unix socket (sun_path, unix(7)).
const socketPathMax = 107

// open is the connection to the keeper.
func (w *fuseWay) open(ctx context.Context) (*keeper.Client, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.keeper == nil {
		k, err := keeper.Open(ctx, w.options)
		if err != nil {
			return nil, err
		}
		w.keeper = k
	}
	return w.keeper, nil
}

// existing is the connection to the keeper, which is not started for that; nil for none.
func (w *fuseWay) existing(ctx context.Context) *keeper.Client {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.keeper == nil {
		o := w.options
		if k, err := keeper.Open(ctx, keeper.Options{Socket: o.Socket, Log: o.Log}); err == nil {
			_ = k.Close() // there is one; from now on it is started again when it ends
			if k, err = keeper.Open(ctx, o); err == nil {
				w.keeper = k
			}
		}
	}
	return w.keeper
}

func (w *fuseWay) supported() error { return fuse.Supported() }

func (w *fuseWay) config(name string, d datapath.Device, k *keeper.Client, o deviceOptions) fuse.Config {
	return fuse.Config{
		Device: d, Reactors: w.reactors, Name: name, Dir: w.dir, Keeper: k,
		Loop: fuse.AnyLoop, Queues: o.queues, Depth: o.depth, ReadOnly: o.readOnly,
	}
}

func (w *fuseWay) attach(ctx context.Context, s *deviceSource, o deviceOptions) (attachment, error) {
	k, err := w.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("no keeper, without which a device would fail with the daemon: %w", err)
	}
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return nil, err
	}
	d, err := s.open(ctx, o.readOnly)
	if err != nil {
		return nil, openError(s, err)
	}
	t, err := fuse.Start(ctx, w.config(backendPrefix+s.identity+" "+s.name, d, k, o))
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &fuseAttachment{target: t, device: d}, nil
}

func (w *fuseWay) found(ctx context.Context) ([]foundDevice, error) {
	list, err := fuse.List(ctx, w.existing(ctx))
	if err != nil {
		if errors.Is(err, fuse.ErrUnsupported) {
			return nil, nil
		}
		return nil, err
	}
	return foundFUSE(list), nil
}

// foundFUSE are those of a list that Ashlar made.
func foundFUSE(list []fuse.Info) []foundDevice {
	var found []foundDevice
	for _, i := range list {
		rest, ours := strings.CutPrefix(i.Name, backendPrefix)
		if !ours {
			continue
		}
		path := i.Path()
		if path == "" {
			path = i.File // a mount without its loop device
		}
		_, source, _ := strings.Cut(rest, " ")
		found = append(found, foundDevice{
			path: path, backend: i.Name, served: i.State == fuse.StateServed, source: source,
			matches: func(identity string) bool { return strings.HasPrefix(rest, identity+" ") },
		})
	}
	return found
}

func (w *fuseWay) recover(ctx context.Context, s *deviceSource, f foundDevice) (attachment, error) {
	k, err := w.open(ctx)
	if err != nil {
		return nil, err
	}
	i, err := fuse.Find(ctx, f.backend, k)
	if err != nil {
		return nil, err
	}
	d, err := s.open(ctx, i.ReadOnly)
	if err != nil {
		return nil, openError(s, err)
	}
	t, err := fuse.Recover(ctx, w.config(f.backend, d, k, deviceOptions{readOnly: i.ReadOnly}))
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &fuseAttachment{target: t, device: d}, nil
}

func (w *fuseWay) remove(ctx context.Context, f foundDevice) error {
	err := fuse.Remove(ctx, f.backend, w.existing(ctx))
	if errors.Is(err, fuse.ErrInUse) || errors.Is(err, fuse.ErrServed) {
		return inUseError(f.path, err)
	}
	return err
}

func (w *fuseWay) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.keeper == nil {
		return nil
	}
	k := w.keeper
	w.keeper = nil
	return k.Close()
}

type fuseAttachment struct {
	target *fuse.Target
	device datapath.Device
}

func (a *fuseAttachment) path() string               { return a.target.Path() }
func (a *fuseAttachment) shape() (queues, depth int) { return a.target.Queues(), a.target.Depth() }

func (a *fuseAttachment) state() (controlpb.DeviceState, string) {
	if a.target.Stats().Gone {
		return controlpb.DeviceState_DEVICE_STATE_FAILED, "the kernel has broken the connection; detach it"
	}
	return sourceState(a.device)
}

func (a *fuseAttachment) resize(ctx context.Context) error { return a.target.Resize(ctx) }

func (a *fuseAttachment) detach(ctx context.Context, _ bool) error {
	if err := a.target.Stop(ctx); err != nil {
		if errors.Is(err, fuse.ErrInUse) {
			return inUseError(a.path(), err)
		}
		return err
	}
	return a.device.Close()
}

func (a *fuseAttachment) leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainPatience)
	defer cancel()
	if err := a.target.Detach(ctx); err != nil {
		// What has not ended would be answered with an error when the device is closed.
		// It ends with the process, unanswered, and the next daemon does it.
		return err
	}
	return a.device.Close()
}
