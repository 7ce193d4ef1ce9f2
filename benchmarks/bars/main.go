// Bars runs the bars of package gate and stores what they gave.
//
//	go run ./benchmarks/bars --ashlar bin/ashlar --tmpfs /dev/shm/bar.img --disk /var/tmp/bar.img
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
	"strings"
	"syscall"

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
		fmt.Fprint(f.Output(), "usage: bars [--tmpfs FILE] [--disk FILE] [flags]\n\n"+
			"Runs the bars of the NBD export and stores a JSON result of each. FILEs that do not\n"+
			"exist are created and removed again; FILEs that do exist are overwritten only with --yes.\n"+
			"devperf, the batching client, is taken from PATH, else built from ./benchmarks/devperf.\n\n")
		f.PrintDefaults()
	}
	size := units.Size(1 << 30)
	var (
		binary  = f.String("ashlar", "bin/ashlar", "the binary measured")
		tmpfs   = f.String("tmpfs", "", "a file on tmpfs, such as /dev/shm/bar.img")
		disk    = f.String("disk", "", "a file or block device on a real disk")
		yes     = f.Bool("yes", false, "overwrite what --tmpfs and --disk name")
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
	switch {
	case *list:
		for _, b := range bars {
			for _, c := range b.Claims {
				fmt.Printf("%-32s %-6s %s\n", b.Name, b.Medium, c)
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
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return err
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
		return r.Save(filepath.Join(*out, r.ResultName()))
	})
	if err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d bars could not be measured", failed)
	}
	return renderPage(*out)
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
