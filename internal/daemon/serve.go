package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/nbd"
	"github.com/ashlar-storage/ashlar/nbd/attach"
)

// ServeConfig says what a node is. DataDir and Log are required; without anything
// to listen on it serves nobody.
type ServeConfig struct {
	DataDir         string
	Version, Commit string
	Options         any // in force; written to options.json in DataDir

	Reactors ReactorConfig

	// Pools; see engine.Config.
	ReadOnly      bool
	Scan          []string
	ScanDevices   bool
	SumCacheBytes int64
	OverProvision int
	ScrubRate     uint64
	// DefaultPool is the size in bytes of a file in which a pool named "default" is
	// made when the data directory is new; 0: none is. PoolFile is its path; by
	// default it lies in DataDir.
	DefaultPool uint64
	PoolFile    string

	// NBD.
	NBDSockets        []string
	Listen            []string
	ListenDefault     string // where to listen when nothing else says where; "": nowhere
	InsecurePlaintext bool
	TLS               nbd.TLSMode
	TLSConfig         *tls.Config
	TLSOnly           bool
	ClientNames       map[string][]string // by volume; "" for all
	NoList            bool
	Connections       int
	Depth             int

	// The control API: a unix socket for the user the daemon runs as, and TCP for
	// clients with a certificate.
	Socket        string
	ControlListen []string
	ControlTLS    *tls.Config // requires and verifies client certificates
	ControlNames  []string    // names of certificates that may; empty: all that verify

	// DeadTimeout is how long requests wait for whoever answers them before they fail:
	// those of a device attached through the kernel's nbd driver for a daemon, those of
	// an export of another server for that server. 0: 5 minutes.
	// Devices attached through ublk and FUSE wait for a daemon without end.
	DeadTimeout time.Duration

	Keeper      string // socket of a fuse-keeper that others run; "": the daemon starts its own
	DeviceLinks string // directory of the names of attached devices; "": /dev/ashlar

	Metrics string // loopback HOST:PORT of /metrics, /healthz, /debug/pprof; "": none
	// Observe are the groups of package observe that the kernel is to show, by eBPF:
	// what disks and reactor threads do. What it does not allow is logged and listed as
	// unobserved. Empty: none.
	Observe []string
	// NoStages leaves the stages of requests untimed; see filter.StatsConfig.
	NoStages bool
	// SlowIO is how long a request takes to be written of in the log; 0: none is.
	SlowIO time.Duration
	// OTLPEndpoint is the OpenTelemetry collector that gets spans of control operations
	// and of slow requests, HOST:PORT or a URL; "": the one that the environment names
	// (OTEL_EXPORTER_OTLP_ENDPOINT), if it does.
	OTLPEndpoint string

	// Activation takes sockets the service manager passes (LISTEN_FDS): those named
	// "control" for the control API, all others for NBD.
	Activation bool

	// Successor gets the listening sockets when the context ends with ErrHandOver.
	Successor *Successor

	Log   *slog.Logger
	Cut   <-chan struct{} // closed: do not wait for clients any more
	Ready func(Addresses) // called when clients can connect; may be nil

	Layout engine.Layout         // of tests; nil: package pool
	ways   map[controlpb.Via]way // of tests; nil: the kernel's
}

// DeadNever, as a DeadTimeout, has requests wait without end: to package remote, 292 years.
const DeadNever = attach.Never

// Addresses are where a node is reached.
type Addresses struct {
	NBD     []net.Addr
	Control []net.Addr
	HTTP    net.Addr // nil: none
}

// node is a running daemon; the fields are in the order in which they start.
type node struct {
	config   *ServeConfig
	log      *slog.Logger
	lock     *dirLock
	reactors []*reactor.Reactor
	engine   *engine.Engine
	volumes  *volumes
	devices  *devices
	server   *nbd.Server
	exports  []net.Listener
	controls []net.Listener
	secure   []net.Listener // of controls, those with TLS
	grpc     []*grpc.Server
	stopHTTP func()
	tracing  *tracing        // nil: off
	slow     *slowLog        // nil: off
	kernel   *kernelObserver // nil: off

	inherited inheritance
	keys      map[net.Listener]string // how each listener was asked for

	addresses Addresses
	stopping  chan struct{}
	ended     chan error // what a listener ended with
	serving   int        // goroutines that will send to ended
}

// Serve runs a node until ctx ends, then shuts it down: clients are drained,
// volumes and pools closed, so that the next start has nothing to recover. It
// returns an error when it could not start, when a listener failed, or when
// something did not close well.
func Serve(ctx context.Context, c ServeConfig) (err error) {
	n := &node{config: &c, log: c.Log, keys: map[net.Listener]string{}, stopping: make(chan struct{})}
	defer func() { err = errors.Join(err, n.stop()) }()
	if err := n.start(); err != nil {
		return err
	}
	stopWatchdog := watchdog(n.log, n.reactors)
	defer stopWatchdog() // the reactors stop after it
	notify(n.log, systemd.SdNotifyReady+"\nSTATUS=serving")
	if !n.inherited.began.IsZero() {
		n.log.Info("handed over", "pause", time.Since(n.inherited.began))
	}
	if c.Ready != nil {
		c.Ready(n.addresses)
	}
	select {
	case <-ctx.Done():
		n.log.Info("draining", "reason", context.Cause(ctx))
		if errors.Is(context.Cause(ctx), ErrHandOver) && c.Successor != nil {
			n.keep(c.Successor)
		}
	case err = <-n.ended:
		n.serving--
	}
	notify(n.log, systemd.SdNotifyStopping+"\nSTATUS=draining")
	n.drain()
	return err
}

// keep has a successor go on listening.
func (n *node) keep(s *Successor) {
	s.began = time.Now()
	if monotonic, err := monotonicMicroseconds(); err == nil {
		notify(n.log, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", systemd.SdNotifyReloading, monotonic))
	}
	for l, key := range n.keys {
		if err := s.keep(key, l); err != nil {
			n.log.Warn("a socket is closed for a moment", "error", err)
		}
	}
}

// monotonicMicroseconds is the clock of service managers.
func monotonicMicroseconds() (int64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return 0, err
	}
	return t.Nano() / 1000, nil
}

func (n *node) start() (err error) {
	c := n.config
	if n.inherited, err = inherit(); err != nil {
		return err
	}
	defer n.inherited.close()
	if c.DataDir, err = filepath.Abs(c.DataDir); err != nil {
		return err
	}
	if err := c.Reactors.check(); err != nil {
		return err
	}
	c.Reactors.GCPercent = 100 // hundreds of attached devices are live memory, not garbage
	if n.lock, err = lockDir(c.DataDir); err != nil {
		return err
	}
	if err := n.writeOptions(); err != nil {
		return err
	}
	if err := n.listen(); err != nil {
		return err
	}
	if n.reactors, err = c.Reactors.start(n.log); err != nil {
		return err
	}
	if n.engine, err = engine.Open(engine.Config{
		DataDir: c.DataDir, Reactors: n.reactors, Log: n.log, ReadOnly: c.ReadOnly, Scan: c.Scan, ScanDevices: c.ScanDevices,
		SumCacheBytes: c.SumCacheBytes, OverProvision: c.OverProvision, ScrubRate: c.ScrubRate, Layout: c.Layout,
	}); err != nil {
		return err
	}
	if err := n.firstPool(); err != nil {
		if n.inherited.began.IsZero() {
			return err
		}
		n.log.Error("the first pool is not made", "error", err) // no reason to leave clients and devices alone
	}
	if n.tracing, err = startTracing(context.Background(), c.OTLPEndpoint, c.Version, n.log); err != nil {
		return err
	}
	n.slow = startSlowLog(c.SlowIO, n.log, n.tracing.tracer())
	n.volumes = newVolumes(n.engine, c.TLSOnly, c.ClientNames)
	n.volumes.slow, n.volumes.noStages = n.slow.taking(), c.NoStages
	n.volumes.warnOfRules(n.log)
	set := &nbd.ExportSet{}
	set.SetResolver(n.volumes)
	if n.server, err = nbd.NewServer(c.server(n.reactors, set)); err != nil {
		return err
	}
	if n.devices, err = newDevices(n.engine, n.volumes, n.reactors, c); err != nil {
		return err
	}
	n.devices.recover(context.Background())
	control := &controller{
		config: c, engine: n.engine, volumes: n.volumes, server: n.server, devices: n.devices, reactors: n.reactors, uris: n.uris, started: time.Now(), stopping: n.stopping,
	}
	if len(c.Observe) > 0 {
		n.kernel = startObserver(n.log, c.Observe, n.reactors, n.engine)
		control.observer = n.kernel
	}
	if c.Metrics != "" {
		health := func() (bool, string) {
			state, reasons := control.health()
			if state == controlpb.HealthState_HEALTH_STATE_OK {
				return true, "ok"
			}
			word := strings.ToLower(strings.TrimPrefix(state.String(), "HEALTH_STATE_"))
			return state != controlpb.HealthState_HEALTH_STATE_FAILED, word + "\n" + strings.Join(reasons, "\n")
		}
		if n.addresses.HTTP, n.stopHTTP, err = StartHTTP(c.Metrics, health, n.collectors()...); err != nil {
			return fmt.Errorf("--metrics: %w", err)
		}
	}
	n.ended = make(chan error, len(n.exports)+len(n.controls))
	for _, l := range n.exports {
		n.serving++
		go func() { n.ended <- n.server.Serve(l) }() // ends with Shutdown
	}
	for _, l := range n.controls {
		options := n.tracing.serverOptions()
		if slices.Contains(n.secure, l) {
			options = append(options, grpc.Creds(credentials.NewTLS(admitting(c.ControlTLS, c.ControlNames))))
		}
		s := grpc.NewServer(options...)
		control.register(s)
		n.grpc = append(n.grpc, s)
		n.serving++
		go func() { n.ended <- s.Serve(l) }() // ends with Stop
	}
	for _, a := range n.addresses.NBD {
		n.log.Info("serving nbd", "address", a.String())
	}
	for _, a := range n.addresses.Control {
		n.log.Info("serving control", "address", a.String())
	}
	n.log.Info("serving", "version", c.Version, "data_dir", c.DataDir, "pools", len(n.engine.Pools()))
	if err := n.writeHeld(); err != nil {
		n.log.Warn("a later check of options will not know where this daemon listens", "error", err)
	}
	return nil
}

// server is the config of the NBD server for clients.
func (c *ServeConfig) server(reactors []*reactor.Reactor, set *nbd.ExportSet) nbd.ServerConfig {
	return nbd.ServerConfig{
		Reactors: reactors, Exports: set, Log: c.Log, TLS: c.TLS, TLSConfig: c.TLSConfig, NoList: c.NoList,
		ConnectionsMax: c.Connections, Depth: c.Depth, DrainTimeout: drainPatience,
	}
}

// writeOptions writes the options in force beside the data.
func (n *node) writeOptions() error {
	b, err := n.config.options()
	if err == nil {
		err = engine.ReplaceFile(filepath.Join(n.config.DataDir, "options.json"), append(b, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("options: %w", err)
	}
	return nil
}

// options are the options in force, in JSON.
func (c *ServeConfig) options() ([]byte, error) { return json.MarshalIndent(c.Options, "", "  ") }

// firstPool makes the pool of a new node.
func (n *node) firstPool() error {
	const name = "default"
	c := n.config
	if c.DefaultPool == 0 || !n.engine.Fresh() || len(n.engine.Pools()) > 0 {
		return nil
	}
	spec := engine.PoolSpec{Name: name, Size: c.DefaultPool}
	if c.PoolFile != "" {
		spec.Paths = []string{c.PoolFile}
		// A new data directory over a file of an earlier life: that is its pool.
		if _, err := os.Stat(c.PoolFile); err == nil {
			if _, err := n.engine.ImportPool(engine.ImportSpec{Name: name, Paths: spec.Paths}); err == nil || !errors.Is(err, pool.ErrNotFound) {
				return err
			}
		}
	}
	_, err := n.engine.CreatePool(spec)
	return err
}

// admitting is c for clients whose certificate has one of the names, where there
// are names.
func admitting(c *tls.Config, names []string) *tls.Config {
	c = c.Clone()
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.MinVersion = max(c.MinVersion, tls.VersionTLS12)
	if len(names) == 0 {
		return c
	}
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.VerifiedChains) > 0 && hasName(s.VerifiedChains[0][0], names) {
			return nil
		}
		return errors.New("this certificate is not for the control API")
	}
	return c
}

func hasName(certificate *x509.Certificate, names []string) bool {
	have := slices.Concat([]string{certificate.Subject.CommonName}, certificate.DNSNames, certificate.EmailAddresses)
	for _, u := range certificate.URIs {
		have = append(have, u.String())
	}
	return slices.ContainsFunc(have, func(name string) bool { return name != "" && slices.Contains(names, name) })
}

// uris are the addresses of an export, one for each listener.
func (n *node) uris(export string) []string {
	var list []string
	for _, a := range n.addresses.NBD {
		address := a.String()
		if tcp, ok := a.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
			if hostname, err := os.Hostname(); err == nil {
				address = net.JoinHostPort(hostname, fmt.Sprint(tcp.Port))
			}
		}
		encrypted := n.config.TLS == nbd.TLSForced || n.config.TLS == nbd.TLSSelective && n.config.TLSOnly
		if u := URI(export, a.Network(), address, encrypted); u != "" {
			list = append(list, u)
		}
	}
	return list
}

// controlPatience is how long calls of the control API may go on when the daemon
// ends. Streams end at once, and no call waits for clients.
const controlPatience = 5 * time.Second

// drain ends what clients do: the control API first, so that nothing new begins.
func (n *node) drain() {
	close(n.stopping)
	graceful := make(chan struct{})
	go func() { // ends with Stop at the latest
		defer close(graceful)
		for _, s := range n.grpc {
			s.GracefulStop()
		}
	}()
	select {
	case <-graceful:
	case <-time.After(controlPatience):
	case <-n.config.Cut:
	}
	for _, s := range n.grpc {
		s.Stop()
	}
	<-graceful
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	over := make(chan struct{})
	go func() { // ends with the drain
		select {
		case <-n.config.Cut:
			cancel()
		case <-over:
		}
	}()
	var both sync.WaitGroup
	both.Go(func() { _ = n.server.Shutdown(ctx) }) // it waits, and has no errors
	both.Go(func() {
		if err := n.devices.leave(ctx); err != nil {
			n.log.Error("devices", "error", err)
		}
	})
	both.Wait()
	close(over)
	for ; n.serving > 0; n.serving-- {
		if err := <-n.ended; err != nil && !errors.Is(err, nbd.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) {
			n.log.Warn("a listener ended", "error", err)
		}
	}
}

// stop takes down what start has begun, whether it ended well or not; drain ran
// before where clients could connect.
func (n *node) stop() error {
	for _, l := range slices.Concat(n.exports, n.controls) {
		_ = l.Close() // closed before, where it was served
	}
	var errs []error
	if n.devices != nil {
		errs = append(errs, n.devices.leave(context.Background())) // again, where drain ran
	}
	if n.kernel != nil {
		errs = append(errs, n.kernel.close())
	}
	if n.engine != nil {
		if err := n.engine.Close(); err != nil {
			errs = append(errs, err)
		}
	}
	if n.stopHTTP != nil {
		n.stopHTTP()
	}
	stopReactors(n.reactors)
	n.slow.stop()
	n.tracing.stop()
	if n.lock != nil {
		n.lock.unlock()
		n.log.Info("stopped")
	}
	return errors.Join(errs...)
}
