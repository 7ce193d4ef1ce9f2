package main

import (
	"cmp"
	"crypto/tls"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/daemon"
	"github.com/ashlar-storage/ashlar/internal/units"
	"github.com/ashlar-storage/ashlar/nbd"
)

// oneOf wants a flag's value to be one of the words.
func oneOf(flag, value string, words ...string) error {
	if slices.Contains(words, value) {
		return nil
	}
	return usagef("--%s %q: must be one of %s", flag, value, strings.Join(words, ", "))
}

// reactorFlags are the flags of every command that starts reactors.
type reactorFlags struct {
	reactors int
	pin      units.CPUs
	poll     string
	engine   string
	buffers  units.Size
}

func (f *reactorFlags) add(c *cobra.Command) {
	flags := c.Flags()
	f.buffers = 64 << 20
	flags.IntVar(&f.reactors, "reactors", 0, "polling threads (default: one, or one for each CPU of --pin)")
	flags.Var(&f.pin, "pin", "CPUs to pin the reactors to, such as 0,2-3")
	flags.StringVar(&f.poll, "poll", "auto", "when idle: auto (spin for a learned budget, then sleep), busy (never sleep), off (sleep at once)")
	flags.StringVar(&f.engine, "engine", "auto", "how reactors reach the kernel: auto, ring (io_uring), epoll")
	flags.Var(&f.buffers, "buffers", "bound of the data buffers of each reactor")
	completeWords(c, "poll", "auto", "busy", "off")
	completeWords(c, "engine", "auto", "ring", "epoll")
}

func (f *reactorFlags) check() error {
	switch {
	case f.reactors < 0 || f.reactors > 256:
		return usagef("--reactors %d: must be 1 to 256", f.reactors)
	case f.buffers < 4<<20 || f.buffers > 64<<30:
		return usagef("--buffers %v: must be 4MiB to 64GiB", f.buffers)
	}
	return cmp.Or(oneOf("poll", f.poll, "auto", "busy", "off"), oneOf("engine", f.engine, "auto", "ring", "epoll"))
}

func (f *reactorFlags) config() daemon.ReactorConfig {
	return daemon.ReactorConfig{
		Reactors: f.reactors, CPUs: f.pin, Poll: reactor.PollMode(f.poll), Engine: reactor.EngineKind(f.engine), BufferBytes: int64(f.buffers),
	}
}

// nbdFlags are the flags of every command that serves NBD.
type nbdFlags struct {
	tls, tlsCert, tlsKey, tlsCA string
	tlsOnly                     bool
	tlsAllow                    []string
	insecurePlaintext           bool
	noList                      bool
	connections, depth          int
}

func (f *nbdFlags) add(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.tls, "tls", "off", "TLS: off, on (offered), require")
	flags.StringVar(&f.tlsCert, "tls-cert", "", "PEM file with the server's certificate chain")
	flags.StringVar(&f.tlsKey, "tls-key", "", "PEM file with its key")
	flags.StringVar(&f.tlsCA, "tls-ca", "", "PEM file with the authorities that client certificates must come from; clients must then show one")
	flags.StringArrayVar(&f.tlsAllow, "tls-allow", nil, "[EXPORT=]NAME: only clients whose certificate has NAME may have the export (repeatable)")
	flags.BoolVar(&f.tlsOnly, "tls-only", false, "with --tls on: serve the exports over TLS only")
	flags.BoolVar(&f.insecurePlaintext, "insecure-plaintext", false, "allow plain text on addresses other hosts can reach")
	flags.BoolVar(&f.noList, "no-list", false, "do not tell clients the names of the exports")
	flags.IntVar(&f.connections, "connections", 1024, "connections served at once")
	flags.IntVar(&f.depth, "depth", 256, "requests in flight per connection")
	completeWords(c, "tls", "off", "on", "require")
}

func (f *nbdFlags) check() error {
	switch {
	case f.connections < 1:
		return usagef("--connections %d: must be at least 1", f.connections)
	case f.depth < 1 || f.depth > 512:
		return usagef("--depth %d: must be 1 to 512", f.depth)
	}
	return oneOf("tls", f.tls, "off", "on", "require")
}

// loadTLS reads the certificates, and which of them may have which export.
func (f *nbdFlags) loadTLS() (c *tls.Config, clientNames map[string][]string, err error) {
	if f.tls == "off" {
		if f.tlsCert != "" || f.tlsKey != "" || f.tlsCA != "" || f.tlsOnly || len(f.tlsAllow) > 0 {
			return nil, nil, usagef("the --tls-… flags need --tls on or --tls require")
		}
		return nil, nil, nil
	}
	if f.tlsCert == "" || f.tlsKey == "" {
		return nil, nil, usagef("--tls %s needs --tls-cert and --tls-key", f.tls)
	}
	if len(f.tlsAllow) > 0 && f.tlsCA == "" {
		return nil, nil, usagef("--tls-allow needs --tls-ca to verify client certificates")
	}
	if c, err = nbd.LoadTLS(f.tlsCert, f.tlsKey, f.tlsCA, f.tlsCA != ""); err != nil {
		return nil, nil, err
	}
	clientNames = map[string][]string{}
	for _, a := range f.tlsAllow {
		export, name, ok := strings.Cut(a, "=")
		if !ok {
			export, name = "", a
		}
		clientNames[export] = append(clientNames[export], name)
	}
	return c, clientNames, nil
}

// deadFlags is the flag of every command whose requests may wait for somebody who is
// away.
type deadFlags struct{ deadTimeout time.Duration }

func (f *deadFlags) add(c *cobra.Command, usage string) {
	c.Flags().DurationVar(&f.deadTimeout, "dead-timeout", 5*time.Minute, usage)
}

func (f *deadFlags) check() error {
	if f.deadTimeout < 0 || f.deadTimeout > 0 && f.deadTimeout < time.Second {
		return usagef("--dead-timeout %v: must be 1s or more, or 0 to wait without end", f.deadTimeout)
	}
	return nil
}

// config is the time in the words of package daemon.
func (f *deadFlags) config() time.Duration {
	if f.deadTimeout == 0 {
		return daemon.DeadNever
	}
	return f.deadTimeout
}

// logFlags are the flags of every command that logs.
type logFlags struct {
	logLevel string
	logForm  string
	verbose  bool
}

func (f *logFlags) add(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.logLevel, "log-level", "", "debug, info, warn or error (default warn; info with --verbose)")
	flags.StringVar(&f.logForm, "log-format", "text", "text or json")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "say what was chosen and why")
	completeWords(c, "log-level", "debug", "info", "warn", "error")
	completeWords(c, "log-format", "text", "json")
}

// logger writes to standard error, since standard output may be a client.
func (f *logFlags) logger() (*slog.Logger, error) {
	var level slog.Level
	name := f.logLevel
	if name == "" {
		name = "warn"
		if f.verbose {
			name = "info"
		}
	}
	if err := level.UnmarshalText([]byte(name)); err != nil {
		return nil, usagef("--log-level %q: must be debug, info, warn or error", name)
	}
	options := &slog.HandlerOptions{Level: level}
	switch f.logForm {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
	}
	return nil, usagef("--log-format %q: must be text or json", f.logForm)
}
