// Command ashlar is a userspace block device engine: one binary that exports
// block devices, measures them, and controls a daemon that keeps pools of them.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version and commit are stamped by the Makefile (-ldflags -X).
var (
	version = "dev"
	commit  = ""
)

// Exit codes, listed in the help of the root command.
const (
	exitOK      = 0
	exitFailure = 1 // what was asked could not be done
	exitUsage   = 2 // the command line is wrong
)

// usageError marks an error in the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// exitError ends the process with a code of a program it ran.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("the command ended with exit code %d", e.code) }

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int { return execute(args, os.Stdin, os.Stdout, os.Stderr) }

// execute runs a command line to its end and returns the exit code.
func execute(args []string, in io.Reader, out, errs io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	began := false
	refuseUnknown(root)
	noteStart(root, &began)
	command, err := root.ExecuteC()
	if err == nil {
		return exitOK
	}
	var exit *exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	fmt.Fprintf(errs, "ashlar: %v\n", err)
	var usage *usageError
	if errors.As(err, &usage) || !began { // whatever stops a command before it begins is in the command line
		fmt.Fprintf(errs, "See '%s --help'.\n", command.CommandPath())
		return exitUsage
	}
	return exitFailure
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "ashlar",
		Short: "Userspace block devices over NBD",
		Long: `Ashlar is a userspace block device engine. It exports files, disks and memory as
block devices over NBD, and measures them. A daemon (serve) keeps pools with thin
volumes and snapshots; pool, volume, snapshot, job and events ask it, and attach,
detach and devices make volumes, files and exports of other servers block devices
of this host. why and top show where its time goes, doctor whether a host has what
it needs; csi is the driver for Kubernetes.

Exit codes: 0 done; 1 what was asked could not be done; 2 the command line is
wrong; with export --run, the exit code of the command that was run; pool check
has more.`,
		Version:           versionText(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
	}
	root.SetVersionTemplate("ashlar {{.Version}}\n")
	root.AddCommand(newExportCommand(), newBenchCommand(), newManCommand(), newVersionCommand(),
		newPoolCommand(), newVolumeCommand(), newSnapshotCommand(), newJobCommand(), newEventsCommand())
	root.AddCommand(newServeCommand(), newAttachCommand(), newDetachCommand(), newDevicesCommand())
	root.AddCommand(newWhyCommand(), newTopCommand(), newDoctorCommand())
	root.AddCommand(newCSICommand())
	root.AddCommand(newFuseKeeperCommand())
	completeRest(root)
	return root
}

// noteStart has every command set began when it begins.
func noteStart(c *cobra.Command, began *bool) {
	if f := c.RunE; f != nil {
		c.RunE = func(c *cobra.Command, args []string) error {
			*began = true
			return f(c, args)
		}
	}
	for _, sub := range c.Commands() {
		noteStart(sub, began)
	}
}

func versionText() string {
	text := version
	if commit != "" {
		text += " (" + commit + ")"
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		text += " " + info.GoVersion
	}
	return text
}
