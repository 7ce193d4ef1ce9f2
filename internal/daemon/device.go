package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/internal/invariant"
	"github.com/ashlar-storage/ashlar/nbd/remote"
)

// Source says what is behind an export: exactly one of the fields is set.
type Source struct {
	Name   string // of the export
	Path   string // a file or block device
	URI    string // an export of an NBD server
	Memory uint64 // bytes of memory that forgets at the end
	Null   uint64 // bytes that are never kept
}

// remoteConnections is how many connections an export of another server gets
// where that server allows several: enough for one to each of a few of its threads.
const remoteConnections = 4

// remoteWait is how long the first connection to a server may take.
const remoteWait = 30 * time.Second

// remoteURI reports whether an argument is an NBD URI, by its scheme.
func remoteURI(argument string) bool {
	scheme, _, ok := strings.Cut(argument, "://")
	return ok && slices.Contains([]string{"nbd", "nbds", "nbd+unix", "nbds+unix"}, scheme)
}

// ParseSource reads an argument of `ashlar export`: a path or an NBD URI, or one of
// them behind NAME=. A path that exists is a path, whatever it contains.
func ParseSource(argument string) (Source, error) {
	if remoteURI(argument) {
		return Source{URI: argument}, nil
	}
	if _, err := os.Stat(argument); err != nil {
		if name, path, ok := strings.Cut(argument, "="); ok {
			if path == "" {
				return Source{}, fmt.Errorf("%q: no file after the name (NAME=FILE)", argument)
			}
			if remoteURI(path) {
				return Source{Name: name, URI: path}, nil
			}
			return Source{Name: name, Path: path}, nil
		}
	}
	if argument == "" {
		return Source{}, fmt.Errorf("an empty argument is no file")
	}
	return Source{Path: argument}, nil
}

// Shape is what filters do to every device of an export.
type Shape struct {
	Limits filter.Limits
	Delay  time.Duration // added to every request
	Stats  bool          // measure each operation, by stage
	SlowIO time.Duration // write of requests that take as long, with their stages; 0: none
}

// openRemote opens an export of another NBD server. Its requests wait for dead while
// that server is away; see remote.Config.
func openRemote(ctx context.Context, uri string, dead time.Duration, log *slog.Logger) (*remote.Device, error) {
	ctx, cancel := context.WithTimeout(ctx, remoteWait)
	defer cancel()
	return remote.Open(ctx, remote.Config{URI: uri, Connections: remoteConnections, DeadTimeout: dead, Log: log})
}

// remotesOf is the remote device that d is or wraps, if any.
func remotesOf(d datapath.Device) []*remote.Device {
	for d != nil {
		if r, ok := d.(*remote.Device); ok {
			return []*remote.Device{r}
		}
		u, ok := d.(interface{ Unwrap() datapath.Device })
		if !ok {
			return nil
		}
		d = u.Unwrap()
	}
	return nil
}

// apply puts the filters of the shape above d, the counting one on top, so that it
// sees what clients see.
//
// The name is the export's; slow takes what took long, and is nil for nothing.
func (s *Shape) apply(d datapath.Device, name string, slow *filter.SlowRequests) (datapath.Device, *filter.Stats) {
	if s.Delay > 0 {
		slow := filter.NewDelay(d, filter.DelayConfig{})
		for op := range datapath.OpCount {
			slow.Set(op, filter.Latency{Fixed: s.Delay})
		}
		d = slow
	}
	if s.Limits.RequestsPerSecond > 0 || s.Limits.BytesPerSecond > 0 {
		d = filter.NewLimit(d, s.Limits)
	}
	if !s.Stats && slow == nil {
		return d, nil
	}
	stats := filter.NewStats(d, filter.StatsConfig{Name: name, Slow: slow})
	return stats, stats
}

// open makes the device of a source, and a line that says how it is reached. dead is for
// another server; see openRemote.
func (s *Source) open(readOnly bool, access filedev.Access, dead time.Duration, log *slog.Logger) (d datapath.Device, how string, err error) {
	switch {
	case s.Path != "":
		var f *filedev.Device
		if f, err = filedev.Open(s.Path, filedev.Options{ReadOnly: readOnly, Access: access}); err != nil {
			if errors.Is(err, filedev.ErrLocked) {
				err = fmt.Errorf("%w, or export it with --read-only on both sides", err)
			}
			return nil, "", err
		}
		way, reason := f.Access()
		d, how = f, fmt.Sprintf("%s: %s (%s), at most %d in flight", s.Path, way, reason, f.InFlightMax())
	case s.URI != "":
		r, err := openRemote(context.Background(), s.URI, dead, log)
		if err != nil {
			return nil, "", err
		}
		d, how = r, fmt.Sprintf("%s: %d connections", s.URI, r.State().Connections)
	case s.Memory > 0:
		if d, err = memdev.New(memdev.Config{Size: s.Memory, ReadOnly: readOnly}); err != nil {
			return nil, "", err
		}
		how = fmt.Sprintf("%d bytes of memory", s.Memory)
	default:
		d, how = nulldev.New(s.Null), fmt.Sprintf("%d bytes that are not kept", s.Null)
	}
	if invariant.Enabled {
		d = datapath.Checked(d)
	}
	return d, how, nil
}
