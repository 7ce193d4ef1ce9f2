package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
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

	Log *slog.Logger
}

// Exporter is a running set of reactors, devices and an NBD server.
type Exporter struct {
	Server   *nbd.Server
	Reactors []*reactor.Reactor
	Exports  *nbd.ExportSet
	devices  []datapath.Device
	stats    map[string]*filter.Stats // by export, where they are kept
	log      *slog.Logger
}

// StartExport opens the devices and starts the reactors and the server; the
// caller gives it listeners.
func StartExport(c ExportConfig) (*Exporter, error) {
	e := &Exporter{Exports: &nbd.ExportSet{}, log: c.Log, stats: map[string]*filter.Stats{}}
	if err := e.start(&c); err != nil {
		return nil, errors.Join(err, e.close())
	}
	return e, nil
}

func (e *Exporter) start(c *ExportConfig) error {
	if c.Reactors == 0 {
		c.Reactors = max(1, len(c.CPUs))
	}
	if len(c.CPUs) > 0 && len(c.CPUs) < c.Reactors {
		return fmt.Errorf("%d reactors cannot be pinned to %d CPUs: name one CPU a reactor", c.Reactors, len(c.CPUs))
	}
	for _, s := range c.Sources {
		d, how, err := s.open(c.ReadOnly, c.Access)
		if err != nil {
			return err
		}
		d, stats := c.Shape.apply(d)
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
	tuneRuntime(c.Reactors)
	raiseDescriptors(e.log)
	for i := range c.Reactors {
		rc := reactor.Config{Name: fmt.Sprintf("r%d", i), Engine: c.Engine, Poll: c.Poll, BufferBytes: c.BufferBytes, Log: c.Log}
		if len(c.CPUs) > 0 {
			rc.CPU = c.CPUs[i] + 1
		}
		r, err := reactor.Start(rc)
		if err != nil {
			return err
		}
		e.Reactors = append(e.Reactors, r)
		e.log.Info("reactor", "name", r.Name(), "engine", r.Describe(), "poll", rc.Poll, "cpu", rc.CPU-1)
	}
	var err error
	e.Server, err = nbd.NewServer(nbd.ServerConfig{
		Reactors: e.Reactors, Exports: e.Exports, Log: c.Log,
		TLS: c.TLS, TLSConfig: c.TLSConfig, NoList: c.NoList, ConnectionsMax: c.Connections, Depth: c.Depth,
	})
	return err
}

// tuneRuntime gives the Go runtime what a reactor needs of it: processors beside
// the reactors' own, or HTTP and the garbage collector starve, and little garbage
// collection, since the data path makes no garbage.
func tuneRuntime(reactors int) {
	if n := reactors + 2; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(1 << 30) // of the Go heap; data buffers lie outside it
	}
}

// raiseDescriptors allows as many descriptors as the system lets us have.
func raiseDescriptors(log *slog.Logger) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur == l.Max {
		return
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		log.Debug("the limit of open files stays", "error", err)
	}
}

// Stop drains the server, then closes everything.
func (e *Exporter) Stop(ctx context.Context) error {
	err := e.Server.Shutdown(ctx)
	return errors.Join(err, e.close())
}

func (e *Exporter) close() error {
	for _, r := range e.Reactors {
		r.Stop()
	}
	var errs []error
	for _, d := range e.devices {
		errs = append(errs, d.Close())
	}
	e.Reactors, e.devices = nil, nil
	return errors.Join(errs...)
}

// ListenUnix listens on a socket file. A file left behind by a server that is
// gone is replaced; one that somebody answers on is not.
func ListenUnix(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err == nil {
		return l, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("listen on socket %s: %w", path, unwrap(err))
	}
	if info, statErr := os.Lstat(path); statErr != nil || info.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("listen on socket %s: the path exists and is no socket", path)
	}
	if c, dialErr := net.Dial("unix", path); dialErr == nil {
		_ = c.Close() // only asked whether anyone is there
		return nil, fmt.Errorf("listen on socket %s: another server answers there", path)
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("listen on socket %s: replace what a dead server left: %w", path, err)
	}
	if l, err = net.Listen("unix", path); err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, unwrap(err))
	}
	return l, nil
}

// ListenTCP listens on host:port. Without TLS required, an address beyond this
// host needs the operator's word.
func ListenTCP(address string, encrypted, insecure bool) (net.Listener, error) {
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	if !encrypted && !insecure && !a.IP.IsLoopback() {
		return nil, fmt.Errorf("listen on %s: this would serve plain text to the network; use --tls require with --tls-cert and --tls-key, a loopback address, or --insecure-plaintext", address)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // the kernel's MPTCP sockets cost more and gain nothing here
	l, err := lc.Listen(context.Background(), "tcp", a.String())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, unwrap(err))
	}
	return l, nil
}

// unwrap takes net's repetition of the address off an error.
func unwrap(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
