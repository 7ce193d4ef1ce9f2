package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
	"github.com/ashlar-storage/ashlar/nbd/remote"
)

// ExportConfig says what `ashlar export` serves, and how.
type ExportConfig struct {
	Sources  []Source
	ReadOnly bool
	Access   filedev.Access

	Reactors    int   // 1 when 0
	CPUs        []int // one a reactor; empty: not pinned
	Poll        reactor.PollMode
	Engine      reactor.EngineKind
	BufferBytes int64 // per reactor

	Shape Shape // filters over every device

	TLS         nbd.TLSMode
	TLSConfig   *tls.Config
	TLSOnly     bool                // every export needs TLS where it is offered
	ClientNames map[string][]string // by export; "" for all
	NoList      bool
	Connections int
	Depth       int

	DeadTimeout time.Duration // how long requests wait for another server that is away; see ServeConfig

	Log *slog.Logger
}

// Exporter is a running set of reactors, devices and an NBD server.
type Exporter struct {
	Server   *nbd.Server
	Reactors []*reactor.Reactor
	Exports  *nbd.ExportSet
	devices  []datapath.Device
	remotes  []*remote.Device         // of devices
	stats    map[string]*filter.Stats // by export, where they are kept
	slow     *slowLog                 // nil: off
	log      *slog.Logger
}

// StartExport opens the devices and starts the reactors and the server; the
// caller gives it listeners.
func StartExport(c ExportConfig) (*Exporter, error) {
	e := &Exporter{Exports: &nbd.ExportSet{}, log: c.Log, stats: map[string]*filter.Stats{}}
	e.slow = startSlowLog(c.Shape.SlowIO, c.Log, nil)
	if err := e.start(&c); err != nil {
		return nil, errors.Join(err, e.close())
	}
	return e, nil
}

// Check finds what cannot be meant: a rule of ClientNames for an export that is not
// there, which would leave another open to every client; a file that is exported twice
// and written by both.
func (c *ExportConfig) Check() error {
	for _, rule := range slices.Sorted(maps.Keys(c.ClientNames)) {
		if rule != "" && !slices.ContainsFunc(c.Sources, func(s Source) bool { return s.Name == rule }) {
			return fmt.Errorf("--tls-allow %s=%s: no export has that name", rule, c.ClientNames[rule][0])
		}
	}
	if c.ReadOnly {
		return nil
	}
	for i, s := range c.Sources {
		for _, before := range c.Sources[:i] {
			if sameFile(before.Path, s.Path) {
				return fmt.Errorf("export %s: %s is exported as %s already: give each export a file of its own, or add --read-only", s.Name, s.Path, before.Name)
			}
		}
	}
	return nil
}

// sameFile says whether two paths, "" for none, lead to one file.
func sameFile(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	first, errFirst := os.Stat(a)
	second, errSecond := os.Stat(b)
	return errFirst == nil && errSecond == nil && os.SameFile(first, second)
}

func (e *Exporter) start(c *ExportConfig) error {
	if err := c.Check(); err != nil {
		return err
	}
	rc := ReactorConfig{Reactors: c.Reactors, CPUs: c.CPUs, Poll: c.Poll, Engine: c.Engine, BufferBytes: c.BufferBytes}
	if err := rc.check(); err != nil {
		return err
	}
	for _, s := range c.Sources {
		d, how, err := s.open(c.ReadOnly, c.Access, c.DeadTimeout, e.log)
		if err != nil {
			return err
		}
		e.remotes = append(e.remotes, remotesOf(d)...)
		d, stats := c.Shape.apply(d, s.Name, e.slow.taking())
		if stats != nil {
			e.stats[s.Name] = stats
		}
		e.devices = append(e.devices, d)
		x := &nbd.Export{
			Name: s.Name, Description: d.Info().Description, Device: d, ReadOnly: c.ReadOnly, TLSOnly: c.TLSOnly,
			ClientNames: slices.Concat(c.ClientNames[""], c.ClientNames[s.Name]),
		}
		if s.Name == "" {
			x.ClientNames = c.ClientNames[""]
		}
		if err := e.Exports.Add(x); err != nil {
			return err
		}
		e.log.Info("export", "name", s.Name, "size", d.Info().Size, "read_only", d.Info().ReadOnly || c.ReadOnly, "access", how)
	}
	var err error
	if e.Reactors, err = rc.start(e.log); err != nil {
		return err
	}
	e.Server, err = nbd.NewServer(nbd.ServerConfig{
		Reactors: e.Reactors, Exports: e.Exports, Log: c.Log,
		TLS: c.TLS, TLSConfig: c.TLSConfig, NoList: c.NoList, ConnectionsMax: c.Connections, Depth: c.Depth,
	})
	return err
}

// remoteDrain is how long requests may wait for another server when this one stops.
const remoteDrain = 10 * time.Second

// Stop drains the server, then closes everything. When ctx ends, clients are cut.
func (e *Exporter) Stop(ctx context.Context) error {
	patience, cancel := context.WithTimeout(ctx, remoteDrain)
	defer cancel()
	defer context.AfterFunc(patience, func() { // else a server that is away would keep the process
		for _, r := range e.remotes {
			r.Abandon()
		}
	})()
	err := e.Server.Shutdown(ctx)
	return errors.Join(err, e.close())
}

func (e *Exporter) close() error {
	stopReactors(e.Reactors)
	var errs []error
	for _, d := range e.devices {
		errs = append(errs, d.Close())
	}
	e.slow.stop()
	e.Reactors, e.devices, e.slow = nil, nil, nil
	return errors.Join(errs...)
}
