package main

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// Values that are no files. Without a word on them a shell offers files for them.
var (
	notFileTypes = []string{"size", "bandwidth", "iops", "cpus", "duration", "int", "uint32", "uint64", "float64"}
	notFileNames = []string{"name", "label", "listen", "metrics", "control-listen", "control-allow", "tls-name", "tls-allow", "otlp-endpoint", "server"}
)

// completeRest has the shell offer nothing where nothing was said of what to offer and
// what is asked for is no file: numbers, addresses, new names, and arguments of
// commands that take none.
func completeRest(c *cobra.Command) {
	if c.ValidArgsFunction == nil && len(c.ValidArgs) == 0 && c.Args != nil && c.Args(c, []string{"x"}) != nil {
		c.ValidArgsFunction = cobra.NoFileCompletions
	}
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if _, said := c.GetFlagCompletionFunc(f.Name); said {
			return
		}
		if slices.Contains(notFileTypes, f.Value.Type()) || slices.Contains(notFileNames, f.Name) {
			_ = c.RegisterFlagCompletionFunc(f.Name, cobra.NoFileCompletions) // fails for an unknown flag only
		}
	})
	for _, sub := range c.Commands() {
		completeRest(sub)
	}
}

// refuseUnknown has the commands that cobra adds, help and completion, refuse words
// they do not know, as all others do. It comes after root has its output: completion
// scripts go where that was then.
func refuseUnknown(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Run, c.RunE = nil, func(c *cobra.Command, args []string) error {
				about, rest, err := root.Find(args)
				if err != nil || len(rest) > 0 {
					return usagef("there is no command %q to help with", strings.Join(args, " "))
				}
				about.InitDefaultHelpFlag() // or it is not shown
				return about.Help()
			}
		case "completion":
			c.Args = func(_ *cobra.Command, args []string) error {
				if len(args) > 0 {
					return usagef("no completion for the shell %q: there is one for bash, fish, powershell and zsh", args[0])
				}
				return nil
			}
			c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() } // else its arguments are not checked
		}
	}
}

// completeObserved offers what requests are counted of: exports and attached devices.
var completeObserved = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	r, err := c.Observe.Stats(ctx, new(controlpb.StatsRequest))
	return namesOf(r.GetVolumes(), (*controlpb.VolumeStats).GetName), err
})

// completeLabels offers the labels that volumes have.
var completeLabels = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	l, err := c.Volumes.List(ctx, new(controlpb.ListVolumesRequest))
	var labels []string
	for _, v := range l.GetVolumes() {
		for key, value := range v.GetLabels() {
			labels = append(labels, key+"="+value)
		}
	}
	return namesOf(labels, func(label string) string { return label }), err
})
