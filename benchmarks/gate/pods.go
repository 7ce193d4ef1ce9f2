package gate

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

// podPrefix begins the names of results that package benchmarks/kube measures: fio in a
// pod, on a volume and on the disk itself. Nothing was promised of them, so no bar
// judges them.
const podPrefix = "kube-"

// podChart is the group of their charts.
const podChart = "kube"

const (
	bandwidth  = "bytes_per_second"
	latencyP99 = "latency_p99_us"
)

// podTitles name the metrics of pods, without a unit: podAmount has it.
var podTitles = map[string]string{iops: "IOPS", bandwidth: "bandwidth", latencyP99: "p99 latency"}

// podMetrics are what counts in a case of the profiles of pods, by the name of the
// case. Where one request is under way at a time, the IOPS are the inverse of the mean
// latency; the median of fio leaves out the system call that submits, in which a
// direct write may spend all its time.
func podMetrics(caseName string) []string {
	switch {
	case strings.Contains(caseName, "latency"):
		return []string{iops, latencyP99}
	case strings.Contains(caseName, "bandwidth"), strings.HasSuffix(caseName, "_bw"), strings.HasSuffix(caseName, "_seq"):
		return []string{bandwidth}
	}
	return []string{iops}
}

// newestPods are the newest results of each profile on a host, in the order of their
// names.
func newestPods(all []stored, host string) []stored {
	var list []stored
	for _, s := range all {
		if strings.HasPrefix(s.Name, podPrefix) && s.Host.Name == host &&
			!slices.ContainsFunc(list, func(o stored) bool { return o.Name == s.Name }) {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b stored) int { return strings.Compare(b.Name, a.Name) }) // kbench, dbench
	return list
}

// hostsOf are the hosts of results, the one of the newest first.
func hostsOf(all []stored) []string {
	var names []string
	for _, s := range all {
		if !slices.Contains(names, s.Host.Name) {
			names = append(names, s.Host.Name)
		}
	}
	return names
}

// podSection is the part of the page about pods.
func podSection(all []stored) string {
	var b strings.Builder
	for _, host := range hostsOf(all) {
		for _, s := range newestPods(all, host) {
			base := s.Options.Baseline
			for _, c := range s.Cases {
				for _, name := range podMetrics(c.Case) {
					m, _ := harness.FindMetric(name) // one of the above
					theirs, ok := s.Spread(c.Case, base, m)
					if !ok {
						continue
					}
					for _, p := range s.Peers {
						ours, ok := s.Spread(c.Case, p.Name, m)
						ratio, both := s.Ratio(c.Case, p.Name, base, m)
						if p.Name == base || !ok || !both {
							continue
						}
						fmt.Fprintf(&b, "| [%s](%s) | %s | %s | %s | %s | %.2fx (%.2fx) | %.0f %% | %s | %s | %s |\n", strings.TrimPrefix(s.Name, podPrefix), s.file,
							c.Case, podTitles[name], podAmount(name, ours.Median), podAmount(name, theirs.Median), ratio.OfMedians, ratio.OfRounds,
							math.Max(ours.Spread, theirs.Spread)*100, host, commit(s.Host), s.Started.Format(time.DateOnly))
					}
				}
			}
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return "\n## In a pod\n\nfio in a pod of Kubernetes, on a claim and on a hostPath of the disk that the pool is on, in turns; the file is written whole " +
		"before. Nothing was promised of these, so there is no verdict. Under the claim are a file system, a block device, and a volume of the pool with its " +
		"checksums; where the kernel has neither ublk nor nbd, as on the host `vm`, the device is a loop device on FUSE. Under the hostPath is the file system of the disk. Of latency less is better.\n\n" +
		"| profile | case | | claim | hostPath | ratio | spread | host | commit | date |\n|---|---|---|---|---|---|---|---|---|---|\n" + b.String()
}

// podAmount prints a value of one of podMetrics.
func podAmount(metric string, v float64) string {
	if metric == bandwidth {
		return fmt.Sprintf("%.0f MiB/s", v/(1<<20))
	}
	if metric == latencyP99 {
		return fmt.Sprintf("%.2f ms", v/1e3)
	}
	return fmt.Sprintf("%.1fk", v/1e3)
}

// podCharts are the results of pods on the host of the newest result put together, by
// the metric that a chart shows: in each the cases it counts in.
func podCharts(all []stored) map[string]*harness.Result {
	charts := map[string]*harness.Result{}
	if len(all) == 0 {
		return charts
	}
	host := all[0].Host
	for _, s := range newestPods(all, host.Name) {
		profile := strings.TrimPrefix(s.Name, podPrefix)
		for _, run := range s.Runs {
			counts := podMetrics(run.Case)
			metric := counts[len(counts)-1]
			r := charts[metric]
			if r == nil {
				r = &harness.Result{Schema: harness.Schema, Name: podChart, Host: host, Peers: s.Peers}
				charts[metric] = r
			}
			run.Case = profile + " " + run.Case
			r.Runs = append(r.Runs, run)
		}
	}
	for _, r := range charts {
		r.Summarize()
	}
	return charts
}
