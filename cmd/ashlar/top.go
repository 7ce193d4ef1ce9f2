package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/charmbracelet/lipgloss"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	_ "github.com/ashlar-storage/ashlar/internal/background" // the terminal is not asked for its colours
	"github.com/ashlar-storage/ashlar/internal/report"
)

// topAskMax bounds one question of the live view, so that a daemon that hangs is
// shown to be away.
const topAskMax = 5 * time.Second

func newTopCommand() *cobra.Command {
	var interval time.Duration
	var once bool
	c, _ := controlCommand(&cobra.Command{
		Use: "top [flags]", Short: "Watch volumes, reactors and disks at work",
		Long: `Top shows what the daemon does, anew each interval: the volumes with their rates
and latencies, the reactors, and the disks as the kernel sees them. The first screen
is of all the time since the daemon began.

Keys: tab or 1 2 3 choose volumes, reactors, disks; up and down, pgup, pgdn, home, end
move; enter shows where the time of a volume's requests goes, as ashlar why does, and
esc comes back; s and S choose the column to sort by, r turns the order; / filters by
name, esc ends that; p pauses; ? shows the keys; q quits.

A daemon that goes away is shown to be away, and shown again when it is back.

--once looks for one interval and prints a table, or with --output json: {"from", "to",
"seconds", "started", "cpu_seconds", "rss_bytes", "volumes": [{"name", "pool",
"size_bytes", "open_count", "in_flight", "limit_iops", "limit_bandwidth_bytes", "iops",
"bytes_per_second", "errors", "latency", "operations": [{"operation", "count", "errors",
"bytes", "latency", "stages": [{"stage", "time"}]}]}], "reactors": [{"index", "cpu",
"pinned", "busy", "idle", "sleep", "turns", "enters", "spin_budget_ns", "service_ns",
"stolen", "off_cpu", "wakeup"}], "disks": [{"name", "pools", "depth", "iops",
"bytes_per_second", "merges", "errors", "queue", "service", "operations": [{"operation",
"count", "errors", "bytes", "queue", "service"}]}], "unobserved": [{"what", "reason"}]}.
latency, time, queue, service, off_cpu and wakeup are {"count", "mean_ns", "p50_ns",
"p99_ns", "p999_ns"}. busy, idle, sleep and stolen are parts of 1; stolen is the time a
reactor had work and no CPU. stolen, off_cpu and wakeup are null where they are not
observed. Names are added, never changed.` + controlHelp,
		Example: `  ashlar top
  ashlar top --interval 5s
  ashlar top --once --output json | jq '.volumes[] | {name, iops, p99: .latency.p99_ns}'`,
		Args: noArguments,
	}, func(s *session, _ []string) error {
		if err := checkInterval(interval); err != nil {
			return err
		}
		switch {
		case once:
			return s.topOnce(interval)
		case s.json():
			return usagef("--output json goes with --once")
		case !outputIsTerminal(s.out()):
			return usagef("standard output is no terminal: `ashlar top --once` prints one look, with --output json for scripts")
		}
		return s.topLive(interval)
	})
	c.Flags().DurationVar(&interval, "interval", time.Second, "how long to look for each screen")
	c.Flags().BoolVar(&once, "once", false, "look once, print it and end")
	return c
}

// outputIsTerminal says whether there is a screen; tests replace it.
var outputIsTerminal = func(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// topLive shows the live view until its user quits.
func (s *session) topLive(interval time.Duration) error {
	if s.timeout == 0 || s.timeout > topAskMax {
		s.timeout = topAskMax
	}
	if _, err := s.client(); err != nil { // a daemon that was never there is an error
		return err
	}
	signaled := s.ctx
	ctx, cancel := context.WithCancel(s.ctx)
	s.ctx = ctx
	a := &asker{s: s}
	defer func() { // the last question is over before the session is
		cancel()
		a.mu.Lock()
		defer a.mu.Unlock()
	}()
	m := newTopModel(s.address(), interval, a.stats, lipgloss.NewRenderer(s.out()))
	p := tea.NewProgram(m, tea.WithoutSignalHandler(), tea.WithAltScreen(), tea.WithInput(s.cmd.InOrStdin()), tea.WithOutput(s.out()))
	// A signal ends the context and so the view, by the way of the key q: a program given
	// the context itself closes its input while it is being read, and its own handler of
	// signals may block for ever.
	defer context.AfterFunc(ctx, p.Quit)()
	_, err := p.Run()
	if signaled.Err() != nil { // it ends as by q
		return nil
	}
	return err
}

// asker asks the daemon for samples, on goroutines of the live view.
type asker struct {
	mu sync.Mutex // held for a whole question
	s  *session   // its connection is guarded by mu while the live view runs
}

// stats asks for a sample. After an error the next question makes a new connection,
// without the pauses of one that is tried again and again.
func (a *asker) stats() (*controlpb.StatsResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	client, err := a.s.client()
	if err != nil {
		if a.s.conn != nil {
			_ = a.s.conn.Close() // it is no use any more
		}
		a.s.conn = nil
		return nil, err
	}
	r, err := client.Observe.Stats(a.s.ctx, new(controlpb.StatsRequest))
	if err != nil {
		_ = a.s.conn.Close() // likewise
		a.s.conn = nil
	}
	return r, err
}

// topOnce looks for one interval.
func (s *session) topOnce(interval time.Duration) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	first, err := client.Observe.Stats(s.ctx, new(controlpb.StatsRequest))
	if err != nil {
		return err
	}
	if err := s.pause(interval); err != nil {
		return err
	}
	second, err := client.Observe.Stats(s.ctx, new(controlpb.StatsRequest))
	if err != nil {
		return err
	}
	i, err := report.Between(first, second)
	if err != nil { // report.ErrRestarted
		return errors.New("the daemon was restarted meanwhile; ask again")
	}
	if s.json() {
		return writeJSON(s.out(), i)
	}
	return writeTop(s.out(), i)
}

// writeTop prints an interval in tables.
func writeTop(out io.Writer, i *report.Interval) error {
	duration := func(ns int64) string { return report.Duration(time.Duration(ns)) }
	quantiles := func(h report.Histogram) (p50, p99, p999 string) {
		if h.Count == 0 {
			return "", "", ""
		}
		q := h.Quantiles()
		return duration(q.P50NS), duration(q.P99NS), duration(q.P999NS)
	}
	volumes := newTable("VOLUME", "POOL", ">OPEN", ">IOPS", ">BANDWIDTH", ">P50", ">P99", ">P99.9", ">IN FLIGHT", ">ERRORS")
	for _, v := range i.Volumes {
		p50, p99, p999 := quantiles(v.Latency)
		volumes.add(printable(v.Name), v.Pool, count(v.OpenCount), fmt.Sprintf("%.0f", v.IOPS), report.Bytes(v.BytesPerSecond)+"/s", p50, p99, p999, count(v.InFlight), count(v.Errors))
	}
	reactors := newTable("REACTOR", ">CPU", ">BUSY", ">IDLE", ">SLEEP", ">SPIN BUDGET", ">SERVICE", ">STOLEN", ">WAKEUP P99")
	for _, r := range i.Reactors {
		cpu, stolen, wakeup := "", "", ""
		if r.Pinned {
			cpu = count(r.CPU)
		}
		if r.Stolen != nil {
			stolen = share(*r.Stolen)
		}
		if r.Wakeup != nil {
			_, wakeup, _ = quantiles(*r.Wakeup)
		}
		reactors.add(count(r.Index), cpu, share(r.Busy), share(r.Idle), share(r.Sleep), duration(int64(r.SpinBudgetNS)), duration(int64(r.ServiceNS)), stolen, wakeup)
	}
	disks := newTable("DISK", "POOLS", ">DEPTH", ">IOPS", ">BANDWIDTH", ">QUEUE P99", ">SERVICE P50", ">P99", ">P99.9", ">ERRORS")
	for _, d := range i.Disks {
		_, queue, _ := quantiles(d.Queue)
		p50, p99, p999 := quantiles(d.Service)
		disks.add(d.Name, strings.Join(d.Pools, " "), count(d.Depth), fmt.Sprintf("%.0f", d.IOPS), report.Bytes(d.BytesPerSecond)+"/s", queue, p50, p99, p999, count(d.Errors))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s CPU, %s resident\n", report.Duration(i.To.Sub(i.From)), share(i.CPUSeconds/max(i.Seconds, 1e-9)), humane(i.RSSBytes))
	for _, t := range []*table{volumes, reactors, disks} {
		if len(t.rows) > 1 {
			fmt.Fprintln(&b)
			_ = t.write(&b) // a builder takes everything
		}
	}
	if len(i.Unobserved) > 0 {
		fmt.Fprintln(&b)
	}
	for _, u := range slices.Compact(slices.Clone(i.Unobserved)) {
		fmt.Fprintf(&b, "not observed: %s: %s\n", u.What, u.Reason)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// share prints a part of 1.
func share(v float64) string { return strconv.FormatFloat(v*100, 'f', 0, 64) + " %" }
