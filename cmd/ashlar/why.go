package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/report"
)

const (
	intervalMin = 10 * time.Millisecond // below, a sample costs more than it shows
	intervalMax = 24 * time.Hour
)

func newWhyCommand() *cobra.Command {
	var interval time.Duration
	var sinceStart bool
	c, _ := controlCommand(&cobra.Command{
		Use: "why [flags] VOLUME", Short: "Say where the time of a volume's requests goes, and why",
		Long: `Why looks at the requests of a volume for an interval, or since the daemon began. It
prints how long they spend in each stage of their way, names the cause of most of
that time, and says what to change. VOLUME is the name of an export (VOLUME,
POOL/VOLUME, VOLUME@SNAPSHOT), or the path or source of an attached device.

The stages, in the order of the way:
  client socket          from the arrival of a request to the end of its payload
  reactor queue, limits  until the store has it: waiting for buffers, slots, limits
  pool metadata          in the pool, until the disks have it
  device queue           in the kernel, until the disk has it
  device service         until the disk has done it
  device hand-over       the rest of the time below the pool: the way to the disk and
                         back, until the reactor has taken up the completion
  commit, flush          until what was written is durable
  finish, verify         in the pool after the disks: checksums
  reply                  until the client's reply is on its way

SHARE is the part of the time of these requests. Where the disks cannot be observed
the three stages of the device are one, and the reason is printed.

With --output json: {"volume", "pool", "from", "to", "seconds", "iops",
"bytes_per_second", "in_flight", "in_flight_mean", "operations": [{"operation",
"count", "errors", "bytes", "latency", "share", "stages": [{"stage", "time", "share",
"estimated"}]}], "causes": [{"cause", "share", "text", "remedy"}], "notes", "disks",
"reactors", "unobserved": [{"what", "reason"}]}; latency and time are {"count",
"mean_ns", "p50_ns", "p99_ns", "p999_ns"}, shares parts of 1, disks and reactors as
ashlar top has them. The first cause is the top one; there is always one, and "idle"
when there were no requests.` + controlHelp,
		Example: `  ashlar why vm1
  ashlar why vm1 --interval 30s
  ashlar why vm1 --since-start --output json`,
		Args: exactly("VOLUME"),
	}, func(s *session, args []string) error {
		if err := checkInterval(interval); err != nil {
			return err
		}
		if sinceStart && s.cmd.Flags().Changed("interval") {
			return usagef("--since-start looks back: it takes no --interval")
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		request := &controlpb.StatsRequest{Volumes: args}
		var first *controlpb.StatsResponse
		if !sinceStart {
			if first, err = client.Observe.Stats(s.ctx, request); err != nil {
				return err
			}
			if err := s.pause(interval); err != nil {
				return err
			}
		}
		second, err := client.Observe.Stats(s.ctx, request)
		if err != nil {
			return err
		}
		i, err := report.Between(first, second)
		if err != nil { // report.ErrRestarted
			return errors.New("the daemon was restarted meanwhile; ask again")
		}
		v, ok := i.Volume(args[0])
		if !ok && len(i.Volumes) == 1 {
			v, ok = &i.Volumes[0], true // the daemon knows it by another name: a device by its path
		}
		if !ok {
			return control.Errorf(control.ErrNotFound, "volume", args[0], "volume %s: nothing of that name is exported or attached", args[0])
		}
		r := report.Explain(i, v)
		if s.json() {
			return writeJSON(s.out(), r)
		}
		return writeWhy(s.out(), r)
	}, completeObserved)
	c.Flags().DurationVar(&interval, "interval", 2*time.Second, "how long to look")
	c.Flags().BoolVar(&sinceStart, "since-start", false, "look at all requests since the daemon began")
	return c
}

func checkInterval(d time.Duration) error {
	if d < intervalMin || d > intervalMax {
		return usagef("--interval %v: must be %v to %v", d, intervalMin, intervalMax)
	}
	return nil
}

// pause waits. It ends with the session's context.
func (s *session) pause(d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-s.ctx.Done():
		return errors.New("interrupted")
	}
}

// writeWhy prints a report: what was done, the table of stages, the causes.
func writeWhy(out io.Writer, r *report.Report) error {
	var b strings.Builder
	for _, line := range whySummary(r) {
		fmt.Fprintln(&b, line)
	}
	for _, t := range whyTables(r, screenWidth(out)) {
		fmt.Fprintln(&b)
		_ = t.write(&b) // a builder takes everything
	}
	fmt.Fprintln(&b)
	for _, line := range whyCauses(r) {
		fmt.Fprintln(&b, line)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// screenWidth is how many cells a terminal has in a line; what is none has enough.
func screenWidth(out io.Writer) int {
	if f, ok := out.(*os.File); ok {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			return width
		}
	}
	return math.MaxInt
}

// whySummary is what was done in the interval.
func whySummary(r *report.Report) []string {
	name := r.Volume
	if r.Pool != "" {
		name += " in pool " + r.Pool
	}
	lines := []string{fmt.Sprintf("%s, %s: %.0f IOPS, %s/s, %.1f requests in flight", name,
		report.Duration(time.Duration(r.Seconds*1e9)), r.IOPS, report.Bytes(r.BytesPerSecond), r.InFlightMean)}
	var parts []string
	for _, o := range r.Operations {
		parts = append(parts, fmt.Sprintf("%s %d (%.0f %% of the time)", o.Operation, o.Count, o.Share*100))
	}
	if len(parts) > 0 {
		lines = append(lines, strings.Join(parts, ", "))
	}
	return lines
}

// whyOperations are the kinds of requests a report has a column for.
func whyOperations(r *report.Report) []*report.WayOf {
	var list []*report.WayOf
	for _, name := range []string{"read", "write", "flush"} {
		if w := r.Way(name); w != nil {
			list = append(list, w)
		}
	}
	return list
}

// whyTable is the stages of some kinds of requests.
func whyTable(r *report.Report, operations []*report.WayOf) *table {
	head := []string{"STAGE"}
	for _, o := range operations {
		head = append(head, ">"+strings.ToUpper(o.Operation)+" P50", ">P99", ">P99.9", ">SHARE")
	}
	t := newTable(head...)
	for _, stage := range r.StageOrder() {
		row := []string{report.Title(stage)}
		shown := false
		for _, o := range operations {
			s, ok := o.Stage(stage)
			shown = shown || ok
			row = append(row, whyCells(s.Time, ok, s.Share)...)
		}
		if shown {
			t.add(row...)
		}
	}
	row := []string{"all"}
	for _, o := range operations {
		row = append(row, whyCells(o.Latency, true, 1)...)
	}
	t.add(row...)
	return t
}

// whyCells are the four cells of a stage. A time without a distribution has only its share.
func whyCells(q report.Quantiles, ok bool, share float64) []string {
	switch {
	case !ok:
		return []string{"", "", "", ""}
	case q.P999NS == 0 && q.MeanNS > 0:
		return []string{"", "", "", fmt.Sprintf("%.0f %%", share*100)}
	}
	d := func(ns int64) string { return report.Duration(time.Duration(ns)) }
	return []string{d(q.P50NS), d(q.P99NS), d(q.P999NS), fmt.Sprintf("%.0f %%", share*100)}
}

// whyCauses are the causes with their remedies, then what else to know.
func whyCauses(r *report.Report) []string {
	var lines []string
	for at, c := range r.Causes {
		head := "also: "
		if at == 0 {
			head = "top cause: "
		}
		lines = append(lines, head+c.Text)
		if c.Remedy != "" {
			lines = append(lines, "  to change it: "+c.Remedy)
		}
	}
	for _, n := range r.Notes {
		lines = append(lines, "note: "+n)
	}
	for _, u := range slices.Compact(slices.Clone(r.Unobserved)) {
		lines = append(lines, fmt.Sprintf("not observed: %s: %s", u.What, u.Reason))
	}
	return lines
}
