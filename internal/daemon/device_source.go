package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/invariant"
	"github.com/ashlar-storage/ashlar/nbd"
)

// deviceSource is what a block device shows: a volume, a snapshot, a file, or an
// export of another NBD server.
type deviceSource struct {
	name     string // POOL/VOLUME, POOL/VOLUME@SNAPSHOT, an absolute path, or a URI
	identity string // of the very bytes: a volume made anew under an old name has another
	exported *exported
	readOnly bool // can only be read
	open     func(ctx context.Context, readOnly bool) (datapath.Device, error)
}

// deviceSource finds what a client names. Errors are *control.Error.
func (d *devices) source(name string) (*deviceSource, error) {
	switch {
	case name == "":
		return nil, control.Errorf(control.ErrInvalid, "device", "", "nothing to attach is named")
	case strings.Contains(name, "://"):
		u, err := nbd.ParseURI(name)
		if err != nil {
			return nil, control.Errorf(control.ErrInvalid, "device", name, "%w", err)
		}
		return d.counting(d.remoteSource(u)), nil
	case filepath.IsAbs(name):
		return d.counting(d.fileSource(filepath.Clean(name))), nil
	}
	volume, snapshot := engine.SplitRef(name)
	i, err := d.engine.Volume(volume)
	if err != nil {
		return nil, problem("volume", volume, err)
	}
	x := exported{name: d.volumes.exportName(i.Pool, i.Name), pool: i.Pool, volume: i.Name, size: i.Size}
	if !strings.Contains(name, "@") {
		return d.volumeSource(x, i.UUID.String()), nil
	}
	list, err := d.engine.Snapshots(i.Pool + "/" + i.Name)
	if err != nil {
		return nil, problem("volume", volume, err)
	}
	for _, s := range list {
		if s.Name == snapshot {
			x.name, x.snapshot, x.size = x.name+"@"+snapshot, snapshot, s.Size
			return d.volumeSource(x, s.UUID.String()), nil
		}
	}
	return nil, control.Errorf(control.ErrNotFound, "snapshot", name, "")
}

// sources are all volumes and snapshots there are, by identity.
func (d *devices) sources() (map[string]*deviceSource, error) {
	all := map[string]*deviceSource{}
	volumes, err := d.engine.Volumes("")
	if err != nil {
		return nil, err
	}
	for _, i := range volumes {
		s := d.volumeSource(exported{name: d.volumes.exportName(i.Pool, i.Name), pool: i.Pool, volume: i.Name, size: i.Size}, i.UUID.String())
		all[s.identity] = s
	}
	snapshots, err := d.engine.Snapshots("")
	if err != nil {
		return nil, err
	}
	for _, i := range snapshots {
		x := exported{name: d.volumes.exportName(i.Pool, i.Volume) + "@" + i.Name, pool: i.Pool, volume: i.Volume, snapshot: i.Name, size: i.Size}
		s := d.volumeSource(x, i.UUID.String())
		all[s.identity] = s
	}
	return all, nil
}

func (d *devices) volumeSource(x exported, id string) *deviceSource {
	s := &deviceSource{name: x.pool + "/" + x.volume, identity: "volume:" + id, exported: &x, readOnly: x.snapshot != ""}
	if x.snapshot != "" {
		s.name, s.identity = s.name+"@"+x.snapshot, "snapshot:"+id
	}
	s.open = func(context.Context, bool) (datapath.Device, error) { return d.volumes.open(x) }
	return s
}

func (d *devices) fileSource(path string) *deviceSource {
	return &deviceSource{name: path, identity: "file:" + d.node + ":" + path, open: func(_ context.Context, readOnly bool) (datapath.Device, error) {
		f, err := filedev.Open(path, filedev.Options{ReadOnly: readOnly})
		if err != nil {
			return nil, err
		}
		if invariant.Enabled {
			return datapath.Checked(f), nil
		}
		return f, nil
	}}
}

// remoteSource is an export of another NBD server.
func (d *devices) remoteSource(u *nbd.URI) *deviceSource {
	name := u.String()
	return &deviceSource{name: name, identity: "nbd:" + d.node + ":" + name, open: func(ctx context.Context, _ bool) (datapath.Device, error) {
		r, err := openRemote(ctx, name, d.dead, d.log)
		if err != nil {
			return nil, err
		}
		return r, nil
	}}
}

// abandon has requests that wait for another server end, so that the daemon can. It is
// for devices through which no answer reaches the kernel any more.
func abandon(device datapath.Device) {
	for _, r := range remotesOf(device) {
		r.Abandon()
	}
}

// errNoSource says that nothing of this daemon is what a device of the kernel shows.
var errNoSource = errors.New("what it shows is not here: its pool is closed, its volume is gone, or it is another daemon's")

// sourceOf finds what a device found in the kernel shows. The hint is a name it may
// have been attached by.
func (d *devices) sourceOf(known map[string]*deviceSource, matches func(identity string) bool, hint string) (*deviceSource, error) {
	for identity, s := range known {
		if matches(identity) {
			return s, nil
		}
	}
	if filepath.IsAbs(hint) || strings.Contains(hint, "://") {
		if s, err := d.source(hint); err == nil && matches(s.identity) {
			return s, nil
		}
	}
	return nil, errNoSource
}

// notFound says whether err means that what is named does not exist.
func notFound(err error) bool {
	return errors.Is(err, control.ErrNotFound) || errors.Is(err, pool.ErrNotFound)
}

// openError says why a source cannot be had.
func openError(s *deviceSource, err error) error {
	var told *control.Error
	if errors.As(err, &told) {
		return told
	}
	reason := reasonOf(err)
	outside := reason == control.ErrInternal && s.exported == nil // a file, or another server
	if outside {
		reason = control.ErrPrecondition
	}
	told = control.Errorf(reason, "device", s.name, "%w", err)
	if !strings.Contains(err.Error(), s.name) {
		told = control.Errorf(reason, "device", s.name, "%s: %w", s.name, fmt.Errorf("%w", err))
	}
	switch {
	case outside && strings.Contains(s.name, "://"):
		told.Remedy = "look whether its server runs and has that export: nbdinfo '" + s.name + "'"
	case outside && errors.Is(err, fs.ErrNotExist):
		told.Remedy = "make it first, on the host of the daemon: truncate -s 1GiB " + s.name
	}
	return told
}
