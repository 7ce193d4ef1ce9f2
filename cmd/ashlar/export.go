package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/daemon"
	"github.com/ashlar-storage/ashlar/internal/units"
	"github.com/ashlar-storage/ashlar/nbd"
)

// defaultListen is where export listens when it is told nothing: NBD's port
// (IANA: nbd 10809/tcp), on this host only.
const defaultListen = "127.0.0.1:10809"

type exportFlags struct {
	sockets, listen []string
	stdio           bool
	name            string
	readOnly        bool
	memory, null    units.Size

	reactorFlags
	access string
	nbdFlags

	limitIOPS      units.IOPS
	limitBandwidth units.Bandwidth
	delay          time.Duration

	metrics string
	slowIO  time.Duration
	deadFlags
	pidFile  string
	runShell string
	logFlags
}

func newExportCommand() *cobra.Command {
	f := &exportFlags{}
	c := &cobra.Command{
		Use:   "export [flags] FILE|BLOCKDEV|URI | NAME=FILE... | --mem SIZE | --null SIZE",
		Short: "Export files, disks or memory over NBD",
		Long: `Export serves files or block devices, as they are, to NBD clients.

Without --socket, --listen, --stdio or a socket passed in by the service manager
(LISTEN_FDS), it listens on ` + defaultListen + `. One FILE is the default export, named by
--name; several NAME=FILE serve several, and the first is the default.

How the bytes are reached (O_DIRECT, inline for files in memory, or through the
page cache) is chosen by probing the file, and logged with --verbose.

FILE may also be the URI of an export of another NBD server (nbd://, nbds://,
nbd+unix://, nbds+unix://). Its connections are made again when they break, and
requests wait for that, up to --dead-timeout, instead of failing.

SIGTERM and SIGINT drain: no new connection is taken, requests in flight are
finished, clients are told that the server is going. A second signal cuts.`,
		Example: `  # a file on a Unix socket; look at it, measure it, attach it
  ashlar export --socket /run/ashlar.sock disk.img
  nbdinfo 'nbd+unix:///?socket=/run/ashlar.sock'
  fio --name=t --ioengine=nbd --uri='nbd+unix:///?socket=/run/ashlar.sock' --rw=randread --bs=4k --iodepth=32 --size=1g
  nbd-client -unix /run/ashlar.sock /dev/nbd0 -C 4

  # two disks over TLS, each for its own client
  ashlar export --listen :10809 --tls require --tls-cert server.pem --tls-key server.key --tls-ca ca.pem \
      --tls-allow a=host-a --tls-allow b=host-b a=/dev/vdb b=/dev/vdc

  # 1 GiB of memory for one command
  ashlar export --mem 1GiB --run 'nbdinfo "$uri"'`,
		RunE: func(c *cobra.Command, args []string) error { return f.run(c, args) },
	}
	flags := c.Flags()
	flags.StringArrayVar(&f.sockets, "socket", nil, "listen on a Unix socket at this path (repeatable)")
	flags.StringArrayVar(&f.listen, "listen", nil, "listen on this TCP HOST:PORT (repeatable)")
	flags.BoolVar(&f.stdio, "stdio", false, "serve one client on standard input and output, then end (inetd)")
	flags.StringVar(&f.name, "name", "", "name of the one export")
	flags.BoolVar(&f.readOnly, "read-only", false, "refuse every change")
	flags.Var(&f.memory, "mem", "serve this much memory instead of a file")
	flags.Var(&f.null, "null", "serve a device of this size that keeps nothing, for measurements")

	f.reactorFlags.add(c)
	flags.StringVar(&f.access, "access", "auto", "how files are reached: auto, direct (O_DIRECT), inline, buffered")
	f.nbdFlags.add(c)

	flags.Var(&f.limitIOPS, "limit-iops", "requests a second each export may serve, such as 10k")
	flags.Var(&f.limitBandwidth, "limit-bandwidth", "bytes a second each export may move, such as 100MiB/s")
	flags.DurationVar(&f.delay, "delay", 0, "add this to every request, to stand for a slower device")

	flags.StringVar(&f.metrics, "metrics", "", "serve /metrics, /healthz and /debug/pprof by HTTP on this loopback HOST:PORT")
	flags.DurationVar(&f.slowIO, "slow-io", 0, "log requests that take at least this long, with where the time went (0: none)")
	f.deadFlags.add(c, "requests of a URI fail after waiting this long for its server (0: never)")
	flags.StringVar(&f.pidFile, "pid-file", "", "write the process id here once clients can connect")
	flags.StringVar(&f.runShell, "run", "", "run this shell command with $uri set, then end with its exit code")
	f.logFlags.add(c)
	completeWords(c, "access", "auto", "direct", "inline", "buffered")
	c.MarkFlagsMutuallyExclusive("stdio", "run")
	c.MarkFlagsMutuallyExclusive("mem", "null")
	return c
}

func (f *exportFlags) sources(c *cobra.Command, args []string) ([]daemon.Source, error) {
	memory, null := c.Flags().Changed("mem"), c.Flags().Changed("null")
	switch {
	case (memory || null) && len(args) > 0:
		return nil, usagef("--mem and --null take no file")
	case memory && f.memory < 512, null && f.null < 512:
		return nil, usagef("a device needs at least one sector (512 bytes)")
	case memory:
		return []daemon.Source{{Name: f.name, Memory: uint64(f.memory)}}, nil
	case null:
		return []daemon.Source{{Name: f.name, Null: uint64(f.null)}}, nil
	case len(args) == 0:
		return nil, usagef("nothing to export: name a file, a block device, --mem SIZE or --null SIZE")
	}
	var sources []daemon.Source
	for _, a := range args {
		s, err := daemon.ParseSource(a)
		if err != nil {
			return nil, &usageError{err}
		}
		if len(args) > 1 && s.Name == "" {
			return nil, usagef("%s: with several exports each needs a name (NAME=FILE)", a)
		}
		if f.name != "" {
			if len(args) > 1 || s.Name != "" {
				return nil, usagef("--name goes with one unnamed file")
			}
			s.Name = f.name
		}
		sources = append(sources, s)
	}
	return sources, nil
}

func (f *exportFlags) config(c *cobra.Command, args []string) (daemon.ExportConfig, error) {
	log, err := f.logger()
	if err != nil {
		return daemon.ExportConfig{}, err
	}
	config := daemon.ExportConfig{
		Shape: daemon.Shape{
			Limits: filter.Limits{RequestsPerSecond: uint64(f.limitIOPS), BytesPerSecond: uint64(f.limitBandwidth)},
			Delay:  f.delay, Stats: f.metrics != "", SlowIO: f.slowIO,
		},
		ReadOnly: f.readOnly, Access: filedev.Access(f.access),
		Reactors: f.reactors, CPUs: f.pin, Poll: reactor.PollMode(f.poll), Engine: reactor.EngineKind(f.engine), BufferBytes: int64(f.buffers),
		TLS: nbd.TLSMode(f.tls), TLSOnly: f.tlsOnly, NoList: f.noList, Connections: f.connections, Depth: f.depth, DeadTimeout: f.deadFlags.config(), Log: log,
	}
	switch {
	case f.delay < 0 || f.delay > time.Minute:
		return config, usagef("--delay %v: must be 0 to 1m", f.delay)
	case f.slowIO < 0:
		return config, usagef("--slow-io %v: must be 0 or more", f.slowIO)
	}
	if err := cmp.Or(f.reactorFlags.check(), f.nbdFlags.check(), f.deadFlags.check(), oneOf("access", f.access, "auto", "direct", "inline", "buffered")); err != nil {
		return config, err
	}
	if config.Sources, err = f.sources(c, args); err != nil {
		return config, err
	}
	if config.TLSConfig, config.ClientNames, err = f.loadTLS(); err != nil {
		return config, err
	}
	if err := config.Check(); err != nil {
		return config, &usageError{err}
	}
	return config, nil
}

func (f *exportFlags) run(c *cobra.Command, args []string) (err error) {
	config, err := f.config(c, args)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	listeners, where, cleanup, err := f.listeners(config.TLS == nbd.TLSForced)
	if err != nil {
		return err
	}
	defer cleanup()
	defer func() {
		for _, l := range listeners {
			_ = l.Close() // not yet closed where nothing was served
		}
	}()
	e, err := daemon.StartExport(config)
	if err != nil {
		return err
	}
	ctx, cut := context.WithCancel(context.Background())
	defer cut()
	defer func() { err = errors.Join(err, e.Stop(ctx)) }()

	if f.metrics != "" {
		_, stop, serveErr := daemon.StartHTTP(f.metrics, daemon.Healthy, e.Collectors()...)
		if serveErr != nil {
			return fmt.Errorf("--metrics: %w", serveErr)
		}
		defer stop()
	}
	ended := make(chan error, len(listeners)+1)
	for _, l := range listeners {
		go func() { ended <- e.Server.Serve(l) }() // ends with Shutdown
	}
	if f.stdio {
		conn, stdioErr := stdioConn()
		if stdioErr != nil {
			return stdioErr
		}
		go func() { ended <- e.Server.ServeConn(conn) }() // ends with the client
	}
	uri := daemon.URI(config.Sources[0].Name, where.network, where.address, config.TLS != nbd.TLSOff)
	config.Log.Info("serving", "uri", uri, "version", version)
	if f.pidFile != "" {
		if err := writePIDFile(f.pidFile); err != nil {
			return err
		}
		defer func() { _ = os.Remove(f.pidFile) }() // ours; may be gone
	}
	var command <-chan error
	if f.runShell != "" {
		if command, err = runShell(f.runShell, uri, where); err != nil {
			return err
		}
	}
	select {
	case s := <-signals:
		config.Log.Info("draining", "signal", s)
		go func() { // ends with the process
			<-signals
			cut()
		}()
		return nil
	case err := <-command:
		return err
	case err := <-ended:
		if errors.Is(err, nbd.ErrServerClosed) {
			return nil
		}
		return err
	}
}

// endpoint is where clients find the server.
type endpoint struct{ network, address string }

// listeners opens what the flags, or the service manager, ask to listen on.
func (f *exportFlags) listeners(encrypted bool) (list []net.Listener, where endpoint, cleanup func(), err error) {
	cleanup = func() {}
	fail := func(err error) ([]net.Listener, endpoint, func(), error) {
		for _, l := range list {
			_ = l.Close() // nothing was served
		}
		cleanup()
		return nil, endpoint{}, func() {}, err
	}
	if f.stdio {
		if len(f.sockets)+len(f.listen) > 0 {
			return fail(usagef("--stdio goes with neither --socket nor --listen"))
		}
		return nil, endpoint{}, cleanup, nil
	}
	passed, err := passedListeners()
	if err != nil {
		return fail(err)
	}
	list = passed
	sockets, addresses := f.sockets, f.listen
	if len(list)+len(sockets)+len(addresses) == 0 {
		if f.runShell != "" {
			dir, err := os.MkdirTemp("", "ashlar-")
			if err != nil {
				return fail(err)
			}
			cleanup = func() { _ = os.RemoveAll(dir) } // temporary
			sockets = []string{filepath.Join(dir, "nbd.sock")}
		} else {
			addresses = []string{defaultListen}
		}
	}
	for _, path := range sockets {
		l, err := daemon.ListenUnix(path)
		if err != nil {
			return fail(err)
		}
		list = append(list, l)
	}
	for _, address := range addresses {
		l, err := daemon.ListenTCP(address, encrypted, f.insecurePlaintext)
		if err != nil {
			return fail(err)
		}
		list = append(list, l)
	}
	address := list[0].Addr()
	return list, endpoint{address.Network(), address.String()}, cleanup, nil
}

// passedListeners are the sockets of the service manager: LISTEN_FDS of them
// from descriptor 3 on, if LISTEN_PID is us (sd_listen_fds(3)).
func passedListeners() ([]net.Listener, error) {
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name) // not for our children; fails for an empty name only
	}
	if err != nil || n < 0 || n > 64 {
		return nil, fmt.Errorf("LISTEN_FDS: not a number of sockets from 0 to 64")
	}
	var list []net.Listener
	for fd := 3; fd < 3+n; fd++ {
		syscall.CloseOnExec(fd)
		file := os.NewFile(uintptr(fd), fmt.Sprintf("LISTEN_FD_%d", fd))
		l, err := net.FileListener(file)
		_ = file.Close() // FileListener has a duplicate
		if err != nil {
			return nil, fmt.Errorf("descriptor %d of LISTEN_FDS: %w", fd, err)
		}
		list = append(list, l)
	}
	return list, nil
}

func writePIDFile(path string) error {
	temporary := path + ".new"
	if err := os.WriteFile(temporary, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644); err != nil {
		return fmt.Errorf("pid file: %w", err)
	}
	if err := os.Rename(temporary, path); err != nil {
		_ = os.Remove(temporary) // ours
		return fmt.Errorf("pid file: %w", err)
	}
	return nil
}

// runShell starts the command of --run; the channel tells how it ended.
func runShell(text, uri string, where endpoint) (<-chan error, error) {
	command := exec.Command("/bin/sh", "-c", text)
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	command.Env = append(os.Environ(), "uri="+uri)
	if where.network == "unix" {
		command.Env = append(command.Env, "unixsocket="+where.address)
	}
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("--run: %w", err)
	}
	done := make(chan error, 1)
	go func() { // ends with the command
		err := command.Wait()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			code := exit.ExitCode()
			if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signaled() {
				code = 128 + int(s.Signal())
			}
			err = &exitError{code}
		}
		done <- err
	}()
	return done, nil
}

// stdioConn makes a connection of standard input and output: of the socket, when
// it is one (inetd), else of the two pipes.
func stdioConn() (net.Conn, error) {
	if c, err := net.FileConn(os.Stdin); err == nil {
		return c, nil
	}
	in, err := pollable(os.Stdin)
	if err != nil {
		return nil, err
	}
	out, err := pollable(os.Stdout)
	if err != nil {
		_ = in.Close() // unused
		return nil, err
	}
	return &pipeConn{in: in, out: out}, nil
}

// pollable is f on a descriptor of its own, without blocking: so deadlines hold,
// Close ends a read that waits, and a client that has left gives EPIPE instead of
// the signal that a write to descriptor 1 would.
func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("--stdio: %s: %w", f.Name(), err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd) // unused
		return nil, fmt.Errorf("--stdio: %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// pipeConn is a net.Conn over a pair of pipes.
type pipeConn struct{ in, out *os.File }

func (p *pipeConn) Read(b []byte) (int, error)  { return p.in.Read(b) }
func (p *pipeConn) Write(b []byte) (int, error) { return p.out.Write(b) }
func (p *pipeConn) Close() error                { return errors.Join(p.in.Close(), p.out.Close()) }
func (p *pipeConn) LocalAddr() net.Addr         { return &net.UnixAddr{Name: "stdio", Net: "unix"} }
func (p *pipeConn) RemoteAddr() net.Addr        { return &net.UnixAddr{Name: "stdio", Net: "unix"} }

// Deadlines hold where the descriptors support them (pipes do, files do not).
func (p *pipeConn) SetDeadline(t time.Time) error {
	_, _ = p.SetReadDeadline(t), p.SetWriteDeadline(t)
	return nil
}
func (p *pipeConn) SetReadDeadline(t time.Time) error {
	_ = p.in.SetReadDeadline(t) // see SetDeadline
	return nil
}
func (p *pipeConn) SetWriteDeadline(t time.Time) error {
	_ = p.out.SetWriteDeadline(t) // see SetDeadline
	return nil
}
