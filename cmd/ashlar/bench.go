package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/ashlar-storage/ashlar/benchmarks/gate"
	"github.com/ashlar-storage/ashlar/benchmarks/harness"
	"github.com/ashlar-storage/ashlar/internal/units"
	fioprofiles "github.com/ashlar-storage/ashlar/tools/fio-profiles"
)

// benchFlags are the flags of `ashlar bench`.
type benchFlags struct {
	profile   string
	only      []string
	against   []string
	baseline  string
	client    string
	rounds    int
	runtime   time.Duration
	ramp      time.Duration
	serverCPU string
	clientCPU string
	poll      string
	reactors  int
	size      units.Size
	yes       bool
	json      string
	svg       string
	output    string
	binary    string // measured instead of this one; for tests
	without   bool   // leave ashlar itself out
}

// keepProfile marks a duration that was not given.
const keepProfile = -1

func newBenchCommand() *cobra.Command {
	var b benchFlags
	cmd := &cobra.Command{
		Use:   "bench [flags] TARGET",
		Short: "Measure this export, alone or beside other servers",
		Long: `Measure Ashlar's NBD export on TARGET with fio, alone or beside other servers.

TARGET is a file, a block device, null:SIZE, mem:SIZE, or an export that runs
already: nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH.

Every server is started on a unix socket of its own, pinned to other CPUs than the
client, loaded, and stopped; the servers take turns round by round. The table shows
medians over the rounds and ratios to the baseline: of the medians, and in brackets
the median of the ratios within each round.

Write jobs destroy what TARGET holds. A block device or a file with content is
overwritten only with --yes.`,
		Example: `  # A first look, on a new file of 1 GiB in memory
  ashlar bench --size 1GiB /dev/shm/bench.img

  # Beside nbdkit and qemu-nbd, five rounds, results kept
  ashlar bench --profile kbench --against nbdkit,qemu-nbd --rounds 5 --yes \
      --json result.json --svg charts /dev/shm/bench.img

  # What the disk gives without a server, and what is left of it
  ashlar bench --profile bars --only randwrite-4k-qd32 --against raw --size 4GiB /var/tmp/bench.img

  # An export that runs already, with a profile of one's own
  ashlar bench --profile my.fio --yes 'nbd+unix:///?socket=/run/vol1.sock'

  # Beside an iSCSI target, which only qemu-img reaches (Debian packages tgt, qemu-block-extra)
  ashlar bench --profile bars --only randread-4k-qd32 --client qemu-img --against tgt,nbdkit-16 \
      --size 1GiB /dev/shm/bench.img

  # The server's ceiling, with the batching client
  ashlar bench --profile bars --only randread-4k-qd32 --client devperf null:64GiB

  # Every bar that can be judged on this file, results into a directory
  ashlar bench --profile bars --size 1GiB --json results /dev/shm/bench.img`,
		Args: func(_ *cobra.Command, arguments []string) error {
			if len(arguments) != 1 {
				return fmt.Errorf("want one TARGET, got %d: a file, a block device, null:SIZE, mem:SIZE or an NBD URI", len(arguments))
			}
			return nil
		},
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, arguments []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return b.run(ctx, cmd, arguments[0])
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.profile, "profile", "quick", "what to run: "+strings.Join(fioprofiles.Names(), ", ")+", or a fio job FILE; bars without --only is judged")
	f.StringSliceVar(&b.only, "only", nil, "run only these jobs of the profile, or these bars")
	f.StringSliceVar(&b.against, "against", nil, "servers to measure beside: "+strings.Join(benchPeers(), ", "))
	f.StringVar(&b.baseline, "baseline", "", "the server ratios refer to (default the first of --against)")
	f.StringVar(&b.client, "client", "fio", "who puts the load on: "+strings.Join(harness.ClientNames(), ", "))
	f.IntVar(&b.rounds, "rounds", 3, "interleaved rounds")
	f.DurationVar(&b.runtime, "runtime", 0, "measured time of each run (default the profile's)")
	f.DurationVar(&b.ramp, "ramp", keepProfile, "load before the measured time (default the profile's)")
	f.Lookup("ramp").DefValue = "" // the sentinel is no business of the reader
	f.StringVar(&b.serverCPU, "server-cpu", "", "CPUs of the servers, such as 0 or 0-3, or any (default the first)")
	f.StringVar(&b.clientCPU, "client-cpu", "", "CPUs of the client (default the second)")
	f.StringVar(&b.poll, "poll", "", "polling of ashlar: auto, busy or off (default auto)")
	f.IntVar(&b.reactors, "reactors", 0, "reactors of ashlar (default its own)")
	f.Var(&b.size, "size", "create TARGET of this size when it does not exist")
	f.BoolVar(&b.yes, "yes", false, "overwrite what TARGET holds")
	f.StringVar(&b.json, "json", "", "write the result to this FILE; with the judged bars, a directory")
	f.StringVar(&b.svg, "svg", "", "draw charts into this directory")
	f.StringVar(&b.output, "output", "table", "what to print: table or json")
	f.StringVar(&b.binary, "binary", "", "measure this ashlar binary instead of the running one")
	f.BoolVar(&b.without, "without-ashlar", false, "measure only the servers of --against")
	for _, hidden := range []string{"binary", "without-ashlar"} {
		_ = f.MarkHidden(hidden) // fails for an unknown name only
	}
	benchComplete(cmd)
	return cmd
}

// benchPeers are the peers beside the default one.
func benchPeers() []string {
	return slices.DeleteFunc(harness.PeerNames(), func(name string) bool { return name == "ashlar" })
}

// benchComplete offers the values of flags to the shell. Lists complete their
// last element.
func benchComplete(cmd *cobra.Command) {
	fixed := func(values ...string) cobra.CompletionFunc {
		return cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
	}
	list := func(values func() []string) cobra.CompletionFunc {
		return func(_ *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
			prefix := typed[:strings.LastIndexByte(typed, ',')+1]
			var offered []string
			for _, v := range values() {
				offered = append(offered, prefix+v)
			}
			return offered, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
	}
	for flag, complete := range map[string]cobra.CompletionFunc{
		"profile":  cobra.FixedCompletions(fioprofiles.Names(), cobra.ShellCompDirectiveDefault), // or a file
		"against":  list(benchPeers),
		"only":     list(func() []string { return benchCases(cmd) }),
		"baseline": fixed(harness.PeerNames()...),
		"client":   fixed(harness.ClientNames()...),
		"poll":     fixed("auto", "busy", "off"),
		"output":   fixed("table", "json"),
	} {
		_ = cmd.RegisterFlagCompletionFunc(flag, complete) // fails for an unknown or a doubled name only
	}
	_ = cmd.MarkFlagDirname("svg") // fails for an unknown name only
}

// benchCases are the jobs of the profile typed so far, with the bars' names.
func benchCases(cmd *cobra.Command) []string {
	name, err := cmd.Flags().GetString("profile")
	if err != nil {
		return nil
	}
	profile, err := harness.LoadProfile(name)
	if err != nil {
		return nil
	}
	var names []string
	for _, c := range profile.Cases {
		names = append(names, c.Name)
	}
	if name == "bars" {
		names = append(names, gate.Names()...)
	}
	return names
}

func (b *benchFlags) check() error {
	switch {
	case b.output != "table" && b.output != "json":
		return usagef("--output %q: want table or json", b.output)
	case b.poll != "" && !slices.Contains([]string{"auto", "busy", "off"}, b.poll):
		return usagef("--poll %q: want auto, busy or off", b.poll)
	case b.reactors < 0:
		return usagef("--reactors %d: want at least 1", b.reactors)
	case b.runtime < 0:
		return usagef("--runtime %v: want above 0", b.runtime)
	case b.without && len(b.against) == 0:
		return usagef("--without-ashlar leaves nothing to measure; name servers with --against")
	}
	return nil
}

// judged tells whether the bars are to be judged, and which: the bars profile
// as a whole, or bars named with --only. A job of that name runs like any job.
func (b *benchFlags) judged() bool {
	return b.profile == "bars" && !slices.ContainsFunc(b.only, func(name string) bool {
		return !slices.Contains(gate.Names(), name)
	}) && len(b.against) == 0 && !b.without
}

func (b *benchFlags) run(ctx context.Context, cmd *cobra.Command, target string) error {
	if err := b.check(); err != nil {
		return err
	}
	config := harness.Config{
		Only: b.only, Rounds: b.rounds, Runtime: b.runtime, Ramp: b.ramp, Baseline: b.baseline,
		Poll: b.poll, Reactors: b.reactors, Ashlar: b.binary,
		Progress: cmd.ErrOrStderr(), Terminal: term.IsTerminal(int(os.Stderr.Fd())),
	}
	var err error
	if config.Ashlar == "" {
		if config.Ashlar, err = os.Executable(); err != nil {
			return fmt.Errorf("bench: find the running binary: %w", err)
		}
	}
	if config.ServerCPUs, config.ClientCPUs, err = harness.ChooseCPUs(b.serverCPU, b.clientCPU); err != nil {
		return err
	}
	if config.Profile, err = harness.LoadProfile(b.profile); err != nil {
		return err
	}
	if config.Client, err = harness.FindClient(b.client); err != nil {
		return err
	}
	if config.Backing, err = harness.ParseBacking(target); err != nil {
		return err
	}
	if b.judged() && config.Backing.Kind == harness.BackingFile {
		return b.runBars(ctx, cmd, config)
	}
	if config.Peers, err = b.peers(config.Backing); err != nil {
		return err
	}
	if config.Baseline == "" && len(b.against) > 0 {
		config.Baseline = config.Peers[len(config.Peers)-1].Name()
		if first, err := harness.FindPeers(b.against[0]); err == nil {
			config.Baseline = first[0].Name()
		}
	}
	// Everything that can be wrong is said before anything is overwritten.
	if err := config.Check(); err != nil {
		return err
	}
	if err := b.prepare(cmd, &config.Backing, config.Writes()); err != nil {
		return err
	}
	for _, w := range config.Warnings() {
		fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
	}
	result, err := harness.Run(ctx, config)
	if err != nil {
		if errors.Is(err, context.Canceled) {
			return errors.New("bench: interrupted; everything it started is stopped, nothing is written")
		}
		return fmt.Errorf("bench: %w", err)
	}
	if b.json != "" {
		if err := result.Save(b.json); err != nil {
			return err
		}
	}
	return b.print(cmd, result)
}

// peers are those to measure on a backing.
func (b *benchFlags) peers(backing harness.Backing) ([]harness.Peer, error) {
	if backing.Kind == harness.BackingURI {
		if len(b.against) > 0 {
			return nil, usagef("--against starts servers of its own and needs a file or a block device, not %s", backing)
		}
		return harness.FindPeers("target")
	}
	names := b.against
	if !b.without {
		names = append([]string{"ashlar"}, names...)
	}
	return harness.FindPeers(names...)
}

func (b *benchFlags) prepare(cmd *cobra.Command, backing *harness.Backing, writes bool) error {
	created, err := backing.Prepare(writes, b.yes, uint64(b.size))
	if overwrite := new(harness.OverwriteError); errors.As(err, &overwrite) || err != nil && backing.Kind == harness.BackingURI {
		return fmt.Errorf("%w; give --yes if that is what you want", err)
	}
	if err != nil {
		return err
	}
	if created {
		fmt.Fprintf(cmd.ErrOrStderr(), "created %s, %s; it stays after the benchmark\n", backing, units.FormatSize(backing.Size))
	}
	return nil
}

// runBars runs and judges the bars that can be measured on the target.
func (b *benchFlags) runBars(ctx context.Context, cmd *cobra.Command, base harness.Config) error {
	bars, err := gate.Find(b.only)
	if err != nil {
		return err
	}
	backing := base.Backing
	if err := b.prepare(cmd, &backing, true); err != nil {
		return err
	}
	base.Only, base.Baseline = nil, ""
	c := gate.Config{Base: base}
	medium := gate.Disk
	if harness.FileSystem(backing.Path) == "tmpfs" && !strings.HasPrefix(backing.Path, "/dev/") || strings.HasPrefix(backing.Path, "/dev/shm/") {
		medium = gate.Tmpfs
		c.Tmpfs = backing
	} else {
		c.Disk = backing
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "bars on %s: those of %s\n", backing, medium)
	directory := b.json
	if directory != "" {
		if err := os.MkdirAll(directory, 0o755); err != nil {
			return fmt.Errorf("bench: %w", err)
		}
	}
	missed, failed := 0, 0
	err = c.RunAll(ctx, bars, func(_ gate.Bar, r *harness.Result, err error) error {
		if err != nil {
			failed++
			fmt.Fprintln(cmd.ErrOrStderr(), err)
			return nil
		}
		for _, v := range r.Verdicts {
			if !v.Pass {
				missed++
			}
		}
		if directory != "" {
			if err := r.Save(filepath.Join(directory, r.ResultName())); err != nil {
				return err
			}
		}
		return b.print(cmd, r)
	})
	switch {
	case err != nil:
		return fmt.Errorf("bench: %w", err)
	case missed > 0 || failed > 0:
		return fmt.Errorf("bench: %d claims missed, %d bars could not be measured", missed, failed)
	}
	return nil
}

// print shows a result and draws its charts.
func (b *benchFlags) print(cmd *cobra.Command, r *harness.Result) error {
	if b.svg != "" {
		paths, err := r.WriteCharts(b.svg)
		if err != nil {
			return err
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "charts:", strings.Join(paths, " "))
	}
	return printResult(cmd.OutOrStdout(), b.output, r)
}

func printResult(out io.Writer, format string, r *harness.Result) error {
	if format == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	if err := r.WriteTable(out); err != nil {
		return err
	}
	_, err := fmt.Fprintln(out)
	return err
}
