package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ashlar-storage/ashlar/internal/doctor"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// Where things of a node are when nothing else is said, as in deploy/systemd.
const (
	doctorConfig  = "/etc/ashlar/serve.yaml"
	doctorDataDir = "/var/lib/ashlar"
)

// thisHost is what doctor looks at; tests replace it.
var thisHost = doctor.This

func newDoctorCommand() *cobra.Command {
	var config, output, dataDir string
	c := &cobra.Command{
		Use: "doctor [flags]", Short: "Look whether this host has what the daemon needs",
		Long: `Doctor looks at this host for what ashlar serve will need: the kernel and its
drivers (io_uring, ublk, nbd, FUSE and loop), rights and limits, cgroups, disks with
their write caches, the data directory, ports and sockets, the clock, the service. It
needs no daemon and no rights, changes nothing, and says what it could not look at.

It goes by the options of --config, the file of ashlar serve: the data directory, the
addresses, the buffers; without that file by what serve does when it is told nothing.

Each finding has a level and, unless all is well, a remedy:
  ok        it is as it should be
  note      to know: something is missing that not everybody wants
  warning   the daemon works, but not all of it, or not well
  failure   the daemon will not work, or not keep what it is given

With --output json: {"items": [{"check", "level", "text", "remedy"}], "ok", "notes",
"warnings", "failures"}, the last four being numbers.

Exit codes: 0 nothing is a failure; 1 something is; 2 the command line is wrong.`,
		Example: `  ashlar doctor
  sudo ashlar doctor --data-dir /srv/ashlar
  ashlar doctor --output json | jq '.items[] | select(.level == "failure")'`,
		Args:                  noArguments,
		DisableFlagsInUseLine: true,
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		if output != "table" && output != "json" {
			return usagef("--output %q: must be table or json", output)
		}
		options, problem, err := doctorOptions(config, c.Flags().Changed("config"))
		if err != nil {
			return err
		}
		if c.Flags().Changed("data-dir") {
			if dataDir == "" {
				return usagef("--data-dir is empty")
			}
			options.DataDir = dataDir
		}
		if options.DataDir, err = filepath.Abs(options.DataDir); err != nil {
			return err
		}
		findings := problem
		findings = append(findings, doctor.Examine(thisHost(), options)...)
		if output == "json" {
			err = writeJSON(c.OutOrStdout(), object{
				{"items", findings}, {"ok", doctor.Count(findings, doctor.OK)}, {"notes", doctor.Count(findings, doctor.Note)},
				{"warnings", doctor.Count(findings, doctor.Warning)}, {"failures", doctor.Count(findings, doctor.Failure)},
			})
		} else {
			err = writeFindings(c.OutOrStdout(), findings)
		}
		if err == nil && doctor.Count(findings, doctor.Failure) > 0 {
			return &exitError{exitFailure}
		}
		return err
	}
	c.Flags().StringVar(&dataDir, "data-dir", "", "directory of the node's state (default that of --config, else "+doctorDataDir+")")
	c.Flags().StringVar(&config, "config", doctorConfig, "the configuration of ashlar serve, if it is there")
	addOutputFlag(c, &output)
	_ = c.MarkFlagDirname("data-dir")               // fails for an unknown flag only
	_ = c.MarkFlagFilename("config", "yaml", "yml") // likewise
	return c
}

// doctorOptions are what serve would be started with. A configuration that is there
// and wrong is a finding; one that was asked for and is not there is an error.
func doctorOptions(path string, asked bool) (doctor.Options, []doctor.Finding, error) {
	serve := newServeCommand().Flags()
	var problem []doctor.Finding
	if _, err := os.Stat(path); err != nil && asked {
		return doctor.Options{}, nil, fmt.Errorf("--config: %w", err)
	} else if err == nil {
		if err := readConfig(serve, path, notInConfig...); err != nil {
			problem = append(problem, doctor.Finding{
				Check: "config", Level: doctor.Failure, Text: strings.TrimPrefix(err.Error(), "--config: "), Remedy: "correct the file; ashlar serve --help lists the options",
			})
			if errors.Is(err, fs.ErrPermission) {
				problem[0].Level, problem[0].Remedy = doctor.Note, "sudo ashlar doctor"
			}
			serve = newServeCommand().Flags() // as if it were not there
		} else {
			problem = append(problem, doctor.Finding{Check: "config", Level: doctor.OK, Text: path + " is read"})
		}
	}
	value := func(name string) string { return serve.Lookup(name).Value.String() }
	o := doctor.Options{DataDir: value("data-dir"), Metrics: value("metrics"), Socket: value("socket")}
	if o.DataDir == "" {
		o.DataDir = doctorDataDir
	}
	list := func(name string) []string {
		if l, ok := serve.Lookup(name).Value.(pflag.SliceValue); ok {
			return l.GetSlice()
		}
		return nil
	}
	o.Control = list("control-listen")
	if o.Listen = list("listen"); len(o.Listen)+len(list("nbd-socket")) == 0 {
		o.Listen = []string{defaultListen}
	}
	if size, ok := serve.Lookup("buffers").Value.(*units.Size); ok {
		o.Buffers = uint64(*size)
	}
	return o, problem, nil
}

// writeFindings prints findings: a line each, the remedy below, and how many of which
// level there are.
func writeFindings(out io.Writer, findings []doctor.Finding) error {
	var b strings.Builder
	for _, f := range findings {
		fmt.Fprintf(&b, "%-8s %-13s %s\n", f.Level, f.Check, f.Text)
		if f.Remedy != "" {
			fmt.Fprintf(&b, "%23s%s\n", "-> ", f.Remedy)
		}
	}
	fmt.Fprintf(&b, "\nfailures: %d, warnings: %d, notes: %d, ok: %d\n", doctor.Count(findings, doctor.Failure), doctor.Count(findings, doctor.Warning),
		doctor.Count(findings, doctor.Note), doctor.Count(findings, doctor.OK))
	_, err := io.WriteString(out, b.String())
	return err
}
