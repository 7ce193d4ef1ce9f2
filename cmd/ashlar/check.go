package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/internal/daemon"
)

// Exit codes of pool check, listed in its help.
const (
	exitFindings = 3 // damage was found, and not all of it repaired
	exitRepaired = 4 // damage was found, and all of it repaired
)

// checkEvery is how often the progress of a check is shown: as fast as it can be read.
const checkEvery = 200 * time.Millisecond

func newPoolCheckCommand() *cobra.Command {
	var f daemon.PoolCheck
	var output string
	var asJSON bool
	c := &cobra.Command{
		Use: "check [flags] DEVICE|FILE...", Short: "Verify a closed pool on its devices, completely",
		Long: `Check verifies a pool that is not open, without a daemon: every copy of every
structure, the journal, the tree of layers, that each cluster has one owner, and
the stored checksums; with --data also every block against its checksum. It needs
all devices of the pool, and refuses one that is in use: close the pool first.

It changes nothing without --repair. A repair writes a copy that is damaged or old
again from the good one, and never makes data up. What is not a copy of something
stays as it is, and the report says what can be done about it.

--recompute-checksums is for checksums that are lost in both copies. It makes them
from the blocks as they are now, so that these can be read again. The risk: a
block that has rotted before counts as good from then on, and nothing will ever
tell. Without it, such blocks read as damaged until they are written again.

After a crash there are notes: an older copy, a torn end of the journal, blocks
that were being written. They are no damage; opening the pool settles them.

Exit codes: 0 no damage; 1 it could not be checked; 2 the command line is wrong;
3 damage was found; 4 damage was found, and all of it repaired.`,
		Example: `  ashlar pool close tank
  ashlar pool check /dev/vdb /dev/vdc --data
  ashlar pool check /dev/vdb /dev/vdc --repair`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("a DEVICE or FILE is missing: name all of the pool's")
			}
			return noEmpty(args)
		},
		DisableFlagsInUseLine: true,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		switch {
		case output != "table" && output != "json":
			return usagef("--output %q: must be table or json", output)
		case f.RecomputeSums && !f.Repair:
			return usagef("--recompute-checksums needs --repair")
		}
		if asJSON {
			output = "json"
		}
		config := f
		config.Paths = args
		p := newProgress(c.ErrOrStderr())
		var shown time.Time
		config.Progress = func(now daemon.PoolCheckProgress) {
			if t := time.Now(); t.Sub(shown) >= checkEvery || now.Done == now.Total {
				shown = t
				p.showWork(work{kind: "check of " + string(now.Phase), target: now.Pool, done: now.Done, total: now.Total, running: true}, t)
			}
		}
		report, err := daemon.CheckPool(config)
		p.end()
		if err != nil {
			return err
		}
		if output == "json" {
			err = writeJSON(c.OutOrStdout(), report)
		} else {
			err = writeReport(c.OutOrStdout(), report, f.Data)
		}
		switch {
		case err != nil:
			return err
		case report.Bad > 0:
			return &exitError{exitFindings}
		case report.Errors+report.Warnings > 0:
			return &exitError{exitRepaired}
		}
		return nil
	}
	c.Flags().BoolVar(&f.Data, "data", false, "also read every block and compare it with its checksum")
	c.Flags().BoolVar(&f.Repair, "repair", false, "write damaged copies again from the good ones")
	c.Flags().BoolVar(&f.RecomputeSums, "recompute-checksums", false, "with --repair: make lost checksums from the blocks as they are, rot included")
	addOutputFlag(c, &output)
	c.Flags().BoolVar(&asJSON, "json", false, "the same as --output json")
	c.MarkFlagsMutuallyExclusive("json", "output")
	return c
}

func writeReport(out io.Writer, r *daemon.PoolReport, data bool) error {
	for _, f := range r.Findings {
		repaired := ""
		if f.Repaired {
			repaired = " (repaired)"
		}
		fmt.Fprintf(out, "%s %s: %s at %d: %s%s\n", f.Severity, f.Code, f.Where.Device, f.Where.Offset, f.What, repaired)
		if f.Remedy != "" && !f.Repaired {
			fmt.Fprintf(out, "  %s\n", f.Remedy)
		}
	}
	if r.Omitted > 0 {
		fmt.Fprintf(out, "and %d more\n", r.Omitted)
	}
	if len(r.Findings) > 0 {
		fmt.Fprintln(out)
	}
	var f facts
	f.add("pool", "%s", r.Pool)
	f.add("uuid", "%s", r.UUID)
	state := "closed in order"
	if !r.Clean {
		state = "not closed in order"
	}
	f.add("state", "%s; format %d, generation %d", state, r.Version, r.Generation)
	if r.Complete {
		f.add("size", "%s on %d device(s)", humane(r.Total), r.Devices)
		f.add("allocated", "%s, and %s of metadata; %s free", humane(r.Allocated), humane(r.Metadata), humane(r.Free))
		f.add("volumes", "%d, with %d snapshots", r.Volumes, r.Snapshots)
		f.add("journal", "%d groups to replay", r.JournalGroups)
		f.add("regions", "%d clean, %d dirty, %d never used", r.CleanRegions, r.DirtyRegions, r.FreshRegions)
	}
	if data && r.Complete {
		f.add("blocks", "%d verified, %d damaged, %d unverified after a crash", r.VerifiedBlocks, r.DamagedBlocks, r.UnverifiedBlocks)
	}
	f.add("found", "%s", verdict(r))
	return f.write(out)
}

// verdict is the report in one sentence.
func verdict(r *daemon.PoolReport) string {
	text := fmt.Sprintf("%d errors, %d warnings, %d notes", r.Errors, r.Warnings, r.Notes)
	if r.Errors+r.Warnings == 0 {
		text = fmt.Sprintf("no damage, %d notes", r.Notes)
	}
	if r.Repaired > 0 {
		text += fmt.Sprintf("; %d repaired", r.Repaired)
	}
	if !r.Complete {
		text += "; damage kept the check from going on to its end"
	}
	return text
}
