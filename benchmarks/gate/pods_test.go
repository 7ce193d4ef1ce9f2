package gate

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

// pods is a result of fio in a pod, with the rounds of the claim; the hostPath has
// twice the IOPS, half the bandwidth, and 4 ms.
func pods(profile, host string, day int, cases ...string) stored {
	r := &harness.Result{
		Schema: harness.Schema, Name: podPrefix + profile, Started: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC),
		Host:    harness.Host{Name: host, Commit: "0123456789abcdef"},
		Options: harness.Options{Profile: profile, Rounds: 3, Baseline: "hostpath"},
		Peers:   []harness.PeerInfo{{Name: "ashlar"}, {Name: "hostpath"}},
	}
	for _, c := range cases {
		for round, v := range []float64{900, 1000, 1100} {
			r.Runs = append(r.Runs,
				harness.RunResult{Case: c, Peer: "ashlar", Round: round, Metrics: harness.Metrics{IOPS: v, BytesPerSecond: 2 << 20, LatencyP99: 1000}},
				harness.RunResult{Case: c, Peer: "hostpath", Round: round, Metrics: harness.Metrics{IOPS: 2000, BytesPerSecond: 1 << 20, LatencyP99: 4000}})
		}
	}
	r.Summarize()
	return stored{file: profile + host + ".json", Result: r}
}

func TestThePageHoldsWhatPodsGet(t *testing.T) {
	all := []stored{
		pods("dbench", "one", 5, "read_latency", "read_seq"), pods("kbench", "one", 4, "iops-read"), pods("kbench", "two", 3, "bandwidth-write"),
		pods("kbench", "one", 2, "iops-write"), // an older one
	}
	section := podSection(all)
	rows := slices.DeleteFunc(strings.Split(section, "\n"), func(line string) bool { return !strings.HasPrefix(line, "| [") })
	want := []string{
		"| [kbench](kbenchone.json) | iops-read | IOPS | 1.0k | 2.0k | 0.50x (0.50x) | 20 % | one | 0123456789ab | 2026-01-04 |",
		"| [dbench](dbenchone.json) | read_latency | IOPS | 1.0k | 2.0k | 0.50x (0.50x) | 20 % | one | 0123456789ab | 2026-01-05 |",
		"| [dbench](dbenchone.json) | read_latency | p99 latency | 1.00 ms | 4.00 ms | 0.25x (0.25x) | 0 % | one | 0123456789ab | 2026-01-05 |",
		"| [dbench](dbenchone.json) | read_seq | bandwidth | 2 MiB/s | 1 MiB/s | 2.00x (2.00x) | 0 % | one | 0123456789ab | 2026-01-05 |",
		"| [kbench](kbenchtwo.json) | bandwidth-write | bandwidth | 2 MiB/s | 1 MiB/s | 2.00x (2.00x) | 0 % | two | 0123456789ab | 2026-01-03 |",
	}
	if !slices.Equal(rows, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(rows, "\n"), strings.Join(want, "\n"))
	}
	if podSection(nil) != "" || podSection([]stored{{Result: result(map[string]float64{"ashlar": 1})}}) != "" {
		t.Error("a section without a result of pods")
	}
}

func TestWhatPodsGetIsDrawn(t *testing.T) {
	all := []stored{pods("dbench", "one", 5, "read_latency", "read_seq"), pods("kbench", "one", 4, "iops-read"), pods("kbench", "two", 3, "iops-write")}
	drawn, err := charts(all)
	if err != nil {
		t.Fatal(err)
	}
	section := chartSection(all, drawn)
	for _, name := range []string{"kube-iops.svg", "kube-bytes_per_second.svg", "kube-latency_p99_us.svg"} {
		if drawn[name] == nil || !strings.Contains(section, "charts/"+name) {
			t.Errorf("no %s in %s", name, section)
		}
	}
	if len(drawn) != 3 {
		t.Errorf("%d charts, want 3", len(drawn))
	}
	for metric, want := range map[string][]string{iops: {"kbench iops-read"}, bandwidth: {"dbench read_seq"}, latencyP99: {"dbench read_latency"}} {
		var cases []string
		for _, c := range podCharts(all)[metric].Cases {
			cases = append(cases, c.Case)
		}
		if !slices.Equal(cases, want) {
			t.Errorf("the chart of %s has %q, want %q", metric, cases, want)
		}
	}
}
