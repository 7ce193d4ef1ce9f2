package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/internal/daemon"
	"github.com/ashlar-storage/ashlar/internal/units"
	"github.com/ashlar-storage/ashlar/nbd"
)

type serveFlags struct {
	dataDir, config string
	checkOnly       bool

	defaultPool   units.Size
	poolFile      string
	readOnly      bool
	scan          []string
	scanDevices   bool
	checksumCache units.Size
	overProvision int
	scrubRate     units.Bandwidth

	listen, nbdSockets []string
	nbdFlags

	socket                                      string
	controlListen                               []string
	controlTLSCert, controlTLSKey, controlTLSCA string
	controlAllow                                []string

	deadFlags
	keeper string
	reactorFlags
	metrics string
	observe []string
	stages  bool
	slowIO  time.Duration
	otlp    string
	pidFile string
	logFlags
}

func newServeCommand() *cobra.Command {
	f := &serveFlags{checksumCache: 64 << 20, scrubRate: 64 << 20}
	c := &cobra.Command{
		Use:   "serve --data-dir DIR [flags]",
		Short: "Run the daemon of a node: pools, volumes, snapshots over NBD",
		Long: `Serve opens the pools of this node and serves their volumes to NBD clients:
nbd://HOST/VOLUME, and snapshots, read-only, as VOLUME@SNAPSHOT. Where two pools
have a volume of one name, it is POOL/VOLUME. The commands pool, volume, snapshot,
job and events ask the daemon on its control socket.

The data directory remembers which pools there are; files of pools made without a
path lie there, too. One daemon has it at a time. A device that has moved is found
again by its signature. A pool with a device missing stays closed, and the others
are served; --read-only opens what is left of it.

Without --listen, --nbd-socket or a socket passed in by the service manager
(LISTEN_FDS; those named "control" are for the control API), it listens for NBD on
` + defaultListen + `.

--config names a YAML file whose keys are the flags below, without the dashes: a
flag on the command line goes before the file. A key that is no flag is an error.
The options in force are written to options.json in the data directory.

SIGTERM and SIGINT drain: requests in flight are finished, volumes and pools are
closed. A second signal does not wait for clients. Killing it loses nothing either:
the next start recovers.

SIGHUP hands over: the daemon drains and becomes the program that lies at its path
now, with the same options; that is how it is upgraded and its configuration read
anew. Listening sockets stay open, and attached devices only wait. Before, it has that
program check all that it would start with: where something is wrong, the log says
what, and the daemon goes on as it is. The data directory stays the same.

--check is that check, for an operator: it reads the options and files, looks whether
addresses are free that the running daemon does not have, and ends; with exit code 0
if a daemon could start or take over.`,
		Example: `  # a first try: one pool in a sparse file, a volume, and a look at it
  ashlar serve --data-dir /tmp/node --socket /tmp/node/control.sock --default-pool 10GiB &
  export ASHLAR_SERVER=unix:///tmp/node/control.sock
  ashlar volume create data --size 1GiB
  nbdinfo nbd://localhost/data

  # a node as systemd runs it (deploy/systemd); is its configuration right?
  ashlar serve --config /etc/ashlar/serve.yaml
  ashlar serve --config /etc/ashlar/serve.yaml --check

  # /etc/ashlar/serve.yaml
  data-dir: /var/lib/ashlar
  listen: [0.0.0.0:10809]
  tls: require
  tls-cert: /etc/ashlar/server.pem
  tls-key: /etc/ashlar/server.key
  reactors: 2`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c) },
	}
	flags := c.Flags()
	flags.StringVar(&f.dataDir, "data-dir", "", "directory of this node's state")
	flags.StringVar(&f.config, "config", "", "YAML file of options, by the names of these flags")
	flags.BoolVar(&f.checkOnly, "check", false, "say whether a daemon could start, or take over, with these options, and end")

	flags.Var(&f.defaultPool, "default-pool", `in a new data directory, make a pool "default" in a sparse file of this size`)
	flags.StringVar(&f.poolFile, "pool-file", "", "path of that file (default: in the data directory)")
	flags.BoolVar(&f.readOnly, "read-only", false, "open every pool read-only, even with devices missing")
	flags.StringArrayVar(&f.scan, "scan", nil, "file, block device or directory to look for missing devices on (repeatable)")
	flags.BoolVar(&f.scanDevices, "scan-devices", false, "look for missing devices on all block devices")
	flags.Var(&f.checksumCache, "checksum-cache", "bound of the checksums each pool keeps in memory; 1/1024 of the data in use fits all")
	flags.IntVar(&f.overProvision, "over-provision", 0, "bound of the sizes of all volumes of a pool together, in percent of the pool (0: none)")
	flags.Var(&f.scrubRate, "scrub-rate", "bytes a second a scrub reads")

	flags.StringArrayVar(&f.listen, "listen", nil, "listen for NBD on this TCP HOST:PORT (repeatable)")
	flags.StringArrayVar(&f.nbdSockets, "nbd-socket", nil, "listen for NBD on a Unix socket at this path (repeatable)")
	f.nbdFlags.add(c)

	flags.StringVar(&f.socket, "socket", strings.TrimPrefix(control.DefaultAddress, "unix://"), `Unix socket of the control API, for this user only ("": none)`)
	flags.StringArrayVar(&f.controlListen, "control-listen", nil, "serve the control API on this TCP HOST:PORT too, with mutual TLS (repeatable)")
	flags.StringVar(&f.controlTLSCert, "control-tls-cert", "", "PEM file with the certificate chain of the control API")
	flags.StringVar(&f.controlTLSKey, "control-tls-key", "", "PEM file with its key")
	flags.StringVar(&f.controlTLSCA, "control-tls-ca", "", "PEM file with the authorities that its clients' certificates must come from")
	flags.StringArrayVar(&f.controlAllow, "control-allow", nil, "only clients whose certificate has this name may use the control API on TCP (repeatable)")

	f.deadFlags.add(c, "requests fail after waiting this long: of a device attached through nbd, for a daemon; of a URI, for its server (0: never)")
	flags.StringVar(&f.keeper, "fuse-keeper", "", "socket of a fuse-keeper that holds devices attached through FUSE (default: one is started when needed)")
	f.reactorFlags.add(c)
	flags.StringVar(&f.metrics, "metrics", "", "serve /metrics, /healthz and /debug/pprof by HTTP on this loopback HOST:PORT")
	flags.StringSliceVar(&f.observe, "observe", []string{"disks", "reactors", "nbd", "ublk"}, "observe these in the kernel (eBPF), as far as it allows: disks, reactors, io_uring, nbd, ublk; or none")
	completeObserve(c)
	flags.BoolVar(&f.stages, "stages", true, "time the stages of requests (false: to measure what that costs)")
	flags.DurationVar(&f.slowIO, "slow-io", time.Second, "log requests that take at least this long, with where the time went (0: none)")
	flags.StringVar(&f.otlp, "otlp-endpoint", "", "send spans of control operations and slow requests to this OpenTelemetry collector, HOST:PORT or URL (default: what OTEL_EXPORTER_OTLP_ENDPOINT says, if it is set)")
	flags.StringVar(&f.pidFile, "pid-file", "", "write the process id here once clients can connect")
	f.logFlags.add(c)
	flags.Lookup("log-level").Usage = "debug, info, warn or error (default info)"

	for _, flag := range []string{"data-dir"} {
		_ = c.MarkFlagDirname(flag) // fails for an unknown flag only
	}
	_ = c.MarkFlagFilename("config", "yaml", "yml") // likewise
	return c
}

func (f *serveFlags) check() error {
	switch {
	case f.dataDir == "":
		return usagef("--data-dir is needed: the directory of this node's state")
	case f.poolFile != "" && f.defaultPool == 0:
		return usagef("--pool-file needs --default-pool SIZE")
	case f.overProvision < 0 || f.overProvision > 100_000:
		return usagef("--over-provision %d: must be 0 to 100000 percent", f.overProvision)
	case f.checksumCache < 1<<20:
		return usagef("--checksum-cache %v: must be at least 1MiB", f.checksumCache)
	case f.slowIO < 0:
		return usagef("--slow-io %v: must be 0 or more", f.slowIO)
	case f.scrubRate == 0:
		return usagef("--scrub-rate 0: must be more; a scrub is begun by `ashlar pool scrub` only")
	}
	anyTLS := f.controlTLSCert != "" || f.controlTLSKey != "" || f.controlTLSCA != ""
	allTLS := f.controlTLSCert != "" && f.controlTLSKey != "" && f.controlTLSCA != ""
	switch {
	case (len(f.controlListen) > 0 || anyTLS) && !allTLS:
		return usagef("the control API on TCP needs --control-tls-cert, --control-tls-key and --control-tls-ca")
	case len(f.controlAllow) > 0 && !allTLS:
		return usagef("--control-allow needs --control-listen with its TLS flags")
	}
	for _, group := range observed(f.observe) {
		if err := oneOf("observe", group, "disks", "reactors", "io_uring", "nbd", "ublk"); err != nil {
			return err
		}
	}
	return cmp.Or(f.reactorFlags.check(), f.nbdFlags.check(), f.deadFlags.check())
}

// notInConfig are the flags that are for the command line only.
var notInConfig = []string{"config", "help", "check"}

// serveConfig is what the flags, the file among them, ask for.
func (f *serveFlags) serveConfig(c *cobra.Command) (daemon.ServeConfig, error) {
	if f.config != "" {
		if err := readConfig(c.Flags(), f.config, notInConfig...); err != nil {
			return daemon.ServeConfig{}, err
		}
	}
	if err := f.check(); err != nil {
		return daemon.ServeConfig{}, err
	}
	if f.logLevel == "" {
		f.logLevel = "info" // a daemon tells of changes of state
		if f.verbose {
			f.logLevel = "debug"
		}
	}
	log, err := f.logger()
	if err != nil {
		return daemon.ServeConfig{}, err
	}
	config := daemon.ServeConfig{
		DataDir: f.dataDir, Version: version, Commit: commit, Options: optionsInForce(c.Flags()),
		Reactors: f.reactorFlags.config(),
		ReadOnly: f.readOnly, Scan: f.scan, ScanDevices: f.scanDevices,
		SumCacheBytes: int64(f.checksumCache), OverProvision: f.overProvision, ScrubRate: uint64(f.scrubRate),
		DefaultPool: uint64(f.defaultPool), PoolFile: f.poolFile,
		NBDSockets: f.nbdSockets, Listen: f.listen, InsecurePlaintext: f.insecurePlaintext,
		TLS: nbd.TLSMode(f.tls), TLSOnly: f.tlsOnly, NoList: f.noList, Connections: f.connections, Depth: f.depth,
		Socket: f.socket, ControlListen: f.controlListen, ControlNames: f.controlAllow,
		DeadTimeout: f.deadFlags.config(), Keeper: f.keeper,
		Metrics: f.metrics, SlowIO: f.slowIO, Observe: observed(f.observe), NoStages: !f.stages, OTLPEndpoint: f.otlp, Activation: true, Log: log,
	}
	if len(f.listen)+len(f.nbdSockets) == 0 {
		config.ListenDefault = defaultListen
	}
	if config.TLSConfig, config.ClientNames, err = f.loadTLS(); err != nil {
		return config, err
	}
	if f.controlTLSCert != "" {
		config.ControlTLS, err = loadControlTLS(f.controlTLSCert, f.controlTLSKey, f.controlTLSCA)
	}
	return config, err
}

// loadControlTLS reads what a server of mutual TLS needs; that is the same for NBD.
func loadControlTLS(cert, key, ca string) (*tls.Config, error) {
	c, err := nbd.LoadTLS(cert, key, ca, true)
	if err != nil {
		return nil, fmt.Errorf("control API: %w", err)
	}
	return c, nil
}

func (f *serveFlags) run(c *cobra.Command) error {
	config, err := f.serveConfig(c)
	if err != nil {
		return err
	}
	if f.checkOnly {
		return f.runCheck(c, config)
	}
	program, err := programPath()
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	ctx, drain := context.WithCancelCause(context.Background())
	defer drain(nil)
	cut := make(chan struct{})
	config.Cut, config.Successor = cut, &daemon.Successor{}
	ended := make(chan struct{})
	defer close(ended)
	dataDir, err := filepath.Abs(f.dataDir)
	if err != nil {
		return err
	}
	next := &successor{path: program, args: os.Args[1:], dataDir: dataDir}
	o := &orders{signals: signals, ended: ended, drain: drain, cut: cut, check: next.check, log: config.Log}
	go o.obey() // ends with ended
	if f.pidFile != "" {
		config.Ready = func(daemon.Addresses) {
			if err := writePIDFile(f.pidFile); err != nil {
				config.Log.Error("pid file", "error", err)
				drain(err)
			}
		}
		defer func() { _ = os.Remove(f.pidFile) }() // ours; may be gone
	}
	if err := daemon.Serve(ctx, config); err != nil || !errors.Is(context.Cause(ctx), daemon.ErrHandOver) {
		return err
	}
	return config.Successor.Exec(program, os.Args)
}

// observed are the groups to observe; the word none alone is none.
func observed(groups []string) []string {
	if len(groups) == 1 && groups[0] == "none" {
		return nil
	}
	return groups
}

// optionsInForce are the values of all flags, by name.
func optionsInForce(flags *pflag.FlagSet) map[string]any {
	options := map[string]any{}
	flags.VisitAll(func(flag *pflag.Flag) {
		if flag.Name == "help" || flag.Name == "check" {
			return
		}
		if list, ok := flag.Value.(pflag.SliceValue); ok {
			options[flag.Name] = list.GetSlice()
			return
		}
		switch flag.Value.Type() {
		case "bool":
			options[flag.Name] = flag.Value.String() == "true"
		default:
			options[flag.Name] = flag.Value.String()
		}
	})
	return options
}
