// Bars runs the bars of package gate and stores what they gave.
//
//	go run ./benchmarks/bars --ashlar bin/ashlar --tmpfs /dev/shm/bar.img --disk /var/tmp/bar.img
//	go run ./benchmarks/bars --ashlar bin/ashlar --pool /var/tmp
//	go run ./benchmarks/bars --render
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/ashlar-storage/ashlar/benchmarks/gate"
	"github.com/ashlar-storage/ashlar/benchmarks/harness"
	"github.com/ashlar-storage/ashlar/internal/units"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bars:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, arguments []string) (err error) {
	f := flag.NewFlagSet("bars", flag.ContinueOnError)
	f.Usage = func() {
		fmt.Fprint(f.Output(), "usage: bars [--tmpfs FILE] [--disk FILE] [--pool DIRECTORY] [flags]\n\n"+
			"Runs the bars of the NBD export and of the pool and stores a JSON result of each. FILEs\n"+
			"that do not exist are created and removed again; FILEs that do exist are overwritten only\n"+
			"with --yes. In DIRECTORY, on a real disk, a new directory is made for the pool, its\n"+
			"volumes, and the files they are compared with: 16 times --pool-size, 19 times where LVM's\n"+
			"thin volumes can be measured, and 4 GiB while the open of a large pool is timed. It is\n"+
			"removed at the end.\n"+
			"devperf, the batching client, is taken from PATH, else built from ./benchmarks/devperf.\n\n")
		f.PrintDefaults()
	}
	size, poolSize := units.Size(1<<30), units.Size(2<<30)
	var (
		binary  = f.String("ashlar", "bin/ashlar", "the binary measured")
		tmpfs   = f.String("tmpfs", "", "a file on tmpfs, such as /dev/shm/bar.img")
		disk    = f.String("disk", "", "a file or block device on a real disk")
		pool    = f.String("pool", "", "a directory on a real disk, for the bars of the pool")
		lvm     = f.String("lvm-device", "", "a block device on the disk of --pool that LVM is given instead of a file; overwritten, so only with --yes")
		short   = f.Bool("short", false, "try the rig: one round, all of it small and short, nothing stored")
		yes     = f.Bool("yes", false, "overwrite what --tmpfs, --disk and --lvm-device name")
		out     = f.String("out", "benchmarks/results", "directory of the results")
		only    = f.String("only", "", "bars to run, separated by commas (default all)")
		rounds  = f.Int("rounds", 5, "interleaved rounds of each bar")
		runtime = f.Duration("runtime", 0, "measured time of a run (default the profile's)")
		ramp    = f.Duration("ramp", -1, "load before it is measured (default the profile's)")
		server  = f.String("server-cpu", "", "CPUs of the server (default the first)")
		client  = f.String("client-cpu", "", "CPUs of the client (default the second)")
		render  = f.Bool("render", false, "only write README.md from the results")
		list    = f.Bool("list", false, "only list the bars")
	)
	f.Var(&size, "size", "size of the files created")
	f.Var(&poolSize, "pool-size", "size of the volumes of the pool's bars")
	if err := f.Parse(arguments); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	var names []string
	if *only != "" {
		names = strings.Split(*only, ",")
	}
	bars, err := gate.Find(names)
	if err != nil {
		return err
	}
	if *pool != "" && *tmpfs == "" && *disk == "" && *only == "" { // the null device is always at hand
		bars = slices.DeleteFunc(slices.Clone(bars), func(b gate.Bar) bool { return !b.Medium.OnStage() })
	}
	switch {
	case *list:
		for _, b := range bars {
			for _, c := range b.Claims {
				fmt.Printf("%-34s %-11s %s\n", b.Name, b.Medium, c)
			}
		}
		return nil
	case *render:
		return renderPage(*out)
	}
	absolute, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(absolute); err != nil {
		return fmt.Errorf("no binary to measure: %w; build it with make, or name it with --ashlar", err)
	}
	if *short {
		given := map[string]bool{}
		f.Visit(func(x *flag.Flag) { given[x.Name] = true })
		for name, value := range map[string]string{
			"rounds": "1", "runtime": "300ms", "ramp": "0s", "size": "64MiB", "pool-size": "256MiB", "out": "",
		} {
			if given[name] {
				continue
			}
			if err := f.Set(name, value); err != nil {
				return err
			}
		}
	}
	if *out != "" {
		if err := os.MkdirAll(*out, 0o755); err != nil {
			return err
		}
	}
	c := gate.Config{Base: harness.Config{
		Rounds: *rounds, Runtime: *runtime, Ramp: *ramp, Ashlar: absolute,
		Progress: os.Stderr, Terminal: term.IsTerminal(int(os.Stderr.Fd())),
	}}
	if c.Base.ServerCPUs, c.Base.ClientCPUs, err = harness.ChooseCPUs(*server, *client); err != nil {
		return err
	}
	for _, x := range []struct {
		path string
		into *harness.Backing
	}{{*tmpfs, &c.Tmpfs}, {*disk, &c.Disk}} {
		if x.path == "" {
			continue
		}
		b := harness.Backing{Kind: harness.BackingFile, Path: x.path}
		created, prepareErr := b.Prepare(true, *yes, uint64(size))
		if prepareErr != nil {
			return prepareErr
		}
		if created {
			defer func() { err = errors.Join(err, os.Remove(x.path)) }()
		}
		*x.into = b
	}
	if c.Tmpfs.Kind != "" && harness.FileSystem(*tmpfs) != "tmpfs" {
		return fmt.Errorf("--tmpfs %s lies on %s", *tmpfs, harness.FileSystem(*tmpfs))
	}
	if c.Disk.Kind != "" && harness.FileSystem(*disk) == "tmpfs" && !strings.HasPrefix(*disk, "/dev/") {
		return fmt.Errorf("--disk %s lies on tmpfs", *disk)
	}
	remove, err := provideDevperf(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	if *pool != "" {
		if *lvm != "" && !*yes {
			return fmt.Errorf("--lvm-device: LVM would overwrite %s; say --yes if it may", *lvm)
		}
		s, remove, err := prepareStage(ctx, *pool, *lvm, uint64(poolSize), *short, bars, &c)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, remove()) }()
		c.Stage = s
	}
	for _, w := range c.Base.Warnings() {
		fmt.Fprintln(os.Stderr, "warning:", w)
	}
	failed := 0
	err = c.RunAll(ctx, bars, func(b gate.Bar, r *harness.Result, err error) error {
		if err != nil {
			failed++
			fmt.Fprintln(os.Stderr, err)
			return nil
		}
		if err := r.WriteTable(os.Stdout); err != nil {
			return err
		}
		fmt.Println()
		if *out == "" {
			return nil
		}
		return r.Save(filepath.Join(*out, r.ResultName()))
	})
	if err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d bars could not be measured", failed)
	}
	if *out == "" {
		return nil
	}
	return renderPage(*out)
}

// What --short makes of the pool's bars: enough to see each of them work.
const (
	shortChain     = 5
	shortOpenBytes = 1 << 30
	shortSettle    = 100 * time.Millisecond
	shortPeriod    = 100 * time.Millisecond
	shortCalls     = 3
)

// prepareStage makes the directory of the pool's bars.
func prepareStage(ctx context.Context, parent, lvmDevice string, size uint64, short bool, bars []gate.Bar, c *gate.Config) (*harness.Stage, func() error, error) {
	parent, err := filepath.Abs(parent)
	if err != nil {
		return nil, nil, err
	}
	if harness.FileSystem(parent) == "tmpfs" {
		return nil, nil, fmt.Errorf("--pool %s lies on tmpfs", parent)
	}
	s := &harness.Stage{
		Dir: filepath.Join(parent, fmt.Sprintf("ashlar-stage-%d", os.Getpid())), Size: size,
		LVMDevice: lvmDevice, Ashlar: c.Base.Ashlar, CPUs: c.Base.ServerCPUs, Progress: os.Stderr,
	}
	if short {
		s.ChainLength, s.OpenBytes, s.Settle = shortChain, shortOpenBytes, shortSettle
		c.Base.SnapshotPeriod, c.CallRounds = shortPeriod, shortCalls
	}
	peers, err := gate.StagePeers(bars)
	if err != nil {
		return nil, nil, err
	}
	if err := s.Prepare(ctx, peers); err != nil {
		return nil, nil, err
	}
	return s, s.Remove, nil
}

// provideDevperf puts devperf in PATH when it is not there.
func provideDevperf(ctx context.Context) (remove func() error, err error) {
	if _, err := exec.LookPath("devperf"); err == nil {
		return func() error { return nil }, nil
	}
	dir, err := os.MkdirTemp("", "ashlar-devperf-")
	if err != nil {
		return nil, err
	}
	remove = func() error { return os.RemoveAll(dir) }
	cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "devperf"), "./benchmarks/devperf")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("build devperf (run this at the root of the repository): %w: %s", err, out), remove())
	}
	return remove, os.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

func renderPage(dir string) error {
	changed, err := gate.Render(dir)
	if err != nil {
		return err
	}
	if changed {
		fmt.Println("wrote", filepath.Join(dir, "README.md"))
	}
	return nil
}
