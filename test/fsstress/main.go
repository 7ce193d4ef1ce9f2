package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// seedVariable gives the seed when --seed does not, as in the tests of this repository.
const seedVariable = "ASHLAR_TEST_SEED"

var errUsage = errors.New("usage")

func main() {
	err := run(os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "fsstress:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "seed %d: %s\n", o.seed, o.path)
	t, err := openTarget(o.path, o.lengthMax)
	if err != nil {
		return err
	}
	s, err := newStress(t, o)
	if err != nil {
		return errors.Join(err, t.close())
	}
	begin := time.Now()
	err = s.run()
	fmt.Fprintln(stdout, s.summary(time.Since(begin)))
	if closed := t.close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.path, err)
	}
	return nil
}

// parse returns the options of a command line, or errUsage when it has said what is wrong
// with it.
func parse(args []string, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("fsstress", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano())%1e9, "what the steps follow from (default $"+seedVariable+", or the clock)")
	flags.Uint64Var(&o.steps, "steps", 2000, "steps, at least")
	flags.StringVar(&o.until, "until", "", "go on until this file exists")
	flags.Int64Var(&o.sizeMax, "size", 8<<20, "largest size of the file, or bytes of the device that are used")
	flags.Int64Var(&o.lengthMax, "length", 128<<10, "most bytes of one step")
	flags.BoolVar(&o.check, "check", false, "compare everything with the device after each step")
	flags.IntVar(&o.logMax, "log", 12, "steps that a difference shows")
	without := flags.String("without", "", "kinds of steps to leave out, with commas")
	flags.Usage = func() {
		fmt.Fprintln(stderr, "usage: fsstress [flags] PATH")
		flags.PrintDefaults()
	}
	usage := func(format string, a ...any) (options, error) {
		fmt.Fprintf(stderr, "fsstress: "+format+"\n", a...)
		return o, errUsage
	}
	if err := flags.Parse(args); err != nil {
		return o, errUsage
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if text := os.Getenv(seedVariable); text != "" && !given["seed"] {
		if o.seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			return usage("%s: %v", seedVariable, err)
		}
	}
	for _, name := range strings.FieldsFunc(*without, func(r rune) bool { return r == ',' }) {
		k, err := parseKind(name)
		if err != nil {
			return usage("--without: %v", err)
		}
		o.without[k] = true
	}
	if o.sizeMax < align || o.lengthMax < align || o.sizeMax > 1<<32 {
		return usage("--size and --length are at least %d, and --size at most 4 GiB", align)
	}
	if flags.NArg() != 1 {
		return usage("one PATH, not %d", flags.NArg())
	}
	o.lengthMax = min(o.lengthMax, o.sizeMax)
	o.path = flags.Arg(0)
	o.command = fmt.Sprintf("fsstress --seed %d --size %d --length %d", o.seed, o.sizeMax, o.lengthMax)
	if *without != "" {
		o.command += " --without " + *without
	}
	return o, nil
}
