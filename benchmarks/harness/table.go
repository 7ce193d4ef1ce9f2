package harness

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// besideTable are metrics that only some cases have, and no column of their own.
var besideTable = []string{
	"server_bytes_per_byte", "disk_bytes_per_byte", "call_median_us", "call_max_us", "create_us", "delete_us", "open_seconds", "open_tib_seconds",
}

// WriteTable prints the summary of a result: per case one line per peer, medians
// of the rounds, and the ratio to the baseline, of medians and (of rounds).
func (r *Result) WriteTable(out io.Writer) error {
	fmt.Fprintf(out, "%s on %s: %s, %d CPUs, Linux %s, load %.2f\n", r.Name, r.Host.Name, r.Host.CPUModel, r.Host.CPUs, r.Host.Kernel, r.Host.Load1)
	fs := ""
	if r.Options.FileSystem != "" {
		fs = " on " + r.Options.FileSystem
	}
	fmt.Fprintf(out, "target %s%s, client %s, server CPUs %s, client CPUs %s, %d rounds interleaved\n",
		r.Options.Target, fs, r.Options.Client, cpusOrAny(r.Options.ServerCPUs), cpusOrAny(r.Options.ClientCPUs), r.Options.Rounds)
	for _, c := range r.Cases {
		fmt.Fprintf(out, "\n%s\n", c.Case)
		w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
		header := []string{"peer", "IOPS", "spread", "MB/s", "p50 us", "p99 us", "p99.9 us", "max us", "client CPU", "server CPU", "CPU-s/M", "kIOPS/CPU-s"}
		if len(c.Peers) > 1 {
			header = append(header, "IOPS vs "+r.Options.Baseline, "per CPU-s", "p99.9")
		}
		fmt.Fprintln(w, strings.Join(header, "\t")+"\t")
		for _, p := range c.Peers {
			cell := func(metric string, scale float64, format string) string {
				s, ok := p.Metrics[metric]
				if !ok {
					return "-"
				}
				return fmt.Sprintf(format, s.Median*scale)
			}
			row := []string{
				p.Peer, cell("iops", 1, "%.0f"), percent(p.Metrics["iops"].Spread), cell("bytes_per_second", 1e-6, "%.1f"),
				cell("latency_p50_us", 1, "%.1f"), cell("latency_p99_us", 1, "%.1f"), cell("latency_p999_us", 1, "%.1f"), cell("latency_max_us", 1, "%.0f"),
				cell("client_cpu", 1, "%.2f"), cell("server_cpu", 1, "%.2f"),
				cell("server_cpu_seconds_per_million", 1, "%.2f"), cell("iops_per_server_cpu_second", 1e-3, "%.1f"),
			}
			if len(c.Peers) > 1 {
				for _, metric := range []string{"iops", "iops_per_server_cpu_second", "latency_p999_us"} {
					row = append(row, ratioCell(p, metric))
				}
			}
			fmt.Fprintln(w, strings.Join(row, "\t")+"\t")
		}
		if err := w.Flush(); err != nil {
			return fmt.Errorf("table: %w", err)
		}
		for _, p := range c.Peers {
			for _, name := range besideTable {
				if s, ok := p.Metrics[name]; ok {
					m, _ := FindMetric(name) // besideTable names metrics
					fmt.Fprintf(out, "%s: %s: %.4g (spread %s)\n", p.Peer, m.Title, s.Median, percent(s.Spread))
				}
			}
		}
	}
	for _, peer := range slices.Sorted(maps.Keys(r.Absent)) {
		fmt.Fprintln(out, r.Absent[peer])
	}
	if len(r.Verdicts) > 0 {
		fmt.Fprintln(out)
	}
	for _, v := range r.Verdicts {
		fmt.Fprintln(out, v)
	}
	return nil
}

// String is a verdict in one line.
func (v Verdict) String() string {
	verdict, sign := "MISS", ">="
	if v.Pass {
		verdict = "pass"
	}
	if v.AtMost {
		sign = "<="
	}
	against := ""
	if v.Against != "" {
		against = " against " + v.Against
	}
	switch {
	case v.Absent != "":
		return fmt.Sprintf("none  %s: %s", v.Claim, v.Absent)
	case v.Shown:
		return fmt.Sprintf("      %s: %.4g (spread %s)", v.Claim, v.Measured, percent(v.Spread))
	}
	return fmt.Sprintf("%s  %s: %.4g, bound %s %.4g%s (spread %s)", verdict, v.Claim, v.Measured, sign, v.Bound, against, percent(v.Spread))
}

func ratioCell(p PeerSummary, metric string) string {
	ratio, ok := p.Ratios[metric]
	if !ok {
		return "-"
	}
	return fmt.Sprintf("%.2fx (%.2fx)", ratio.OfMedians, ratio.OfRounds)
}

func percent(share float64) string { return fmt.Sprintf("%.0f %%", share*100) }

func cpusOrAny(cpus []int) string {
	if len(cpus) == 0 {
		return "any"
	}
	return joinCPUs(cpus)
}
