package harness

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func near(a, b float64) bool { return math.Abs(a-b) < 1e-9*math.Max(1, math.Abs(b)) }

func TestMedianAndSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   Spread
	}{
		{nil, Spread{}},
		{[]float64{3}, Spread{3, 3, 3, 0}},
		{[]float64{4, 1, 2}, Spread{2, 1, 4, 1.5}},
		{[]float64{4, 1, 2, 3}, Spread{2.5, 1, 4, 1.2}},
	} {
		if got := spreadOf(c.values); got != c.want {
			t.Errorf("%v: %+v, want %+v", c.values, got, c.want)
		}
	}
}

// sampleResult has two peers whose medians and round ratios differ: the host was
// slow in the second round.
func sampleResult() *Result {
	r := &Result{Schema: Schema, Name: "bars", Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Host: Host{Name: "host", CPUModel: "cpu", CPUs: 2}, Options: Options{Profile: "bars", Client: "fio", Rounds: 3, Baseline: "b"},
		Peers: []PeerInfo{{Name: "a"}, {Name: "b"}}}
	for round, v := range [][2]float64{{300, 100}, {120, 40}, {200, 150}} {
		for i, peer := range []string{"a", "b"} {
			r.Runs = append(r.Runs, RunResult{Case: "x", Peer: peer, Round: round, Metrics: Metrics{
				IOs: 10, Seconds: 1, IOPS: v[i], BytesPerSecond: v[i] * 4096, LatencyP99: 1000 / v[i],
				ServerSampled: true, ServerCPUSeconds: 0.5, IOPSPerServerCPU: v[i] * 2,
			}})
		}
	}
	r.Summarize()
	return r
}

func TestRatiosOfMediansAndOfRounds(t *testing.T) {
	r := sampleResult()
	got := r.Cases[0].Peers[0].Ratios["iops"]
	if !near(got.OfMedians, 2) || !near(got.OfRounds, 3) {
		t.Errorf("ratios %+v, want 200/100 = 2 and the median of 3, 3, 1.33 = 3", got)
	}
	if _, ok := r.Cases[0].Peers[0].Metrics["latency_p50_us"]; ok {
		t.Error("a latency nobody measured is in the summary")
	}
	if s := r.Cases[0].Peers[1].Metrics["server_cpu"]; s.Median != 0.5 {
		t.Errorf("server CPU %+v", s)
	}
}

func TestRatioLeavesOutRoundsOfOnePeer(t *testing.T) {
	r := sampleResult()
	r.Runs = r.Runs[:5] // b has no third round
	m, _ := FindMetric("iops")
	ratio, ok := r.Ratio("x", "a", "b", m)
	if !ok || !near(ratio.OfRounds, 3) || !near(ratio.OfMedians, 200.0/70) {
		t.Errorf("ratio %+v, %v", ratio, ok)
	}
	if _, ok := r.Ratio("x", "a", "nobody", m); ok {
		t.Error("a ratio to a peer that did not run")
	}
}

func TestAnIdleServerWasMeasured(t *testing.T) {
	r := &Result{Peers: []PeerInfo{{Name: "a"}}, Runs: []RunResult{{Case: "idle", Peer: "a", Metrics: Metrics{Seconds: 1, ServerSampled: true}}}}
	r.Summarize()
	if s, ok := r.Cases[0].Peers[0].Metrics["server_cpu"]; !ok || s.Median != 0 {
		t.Errorf("server CPU %+v, %v", s, ok)
	}
}

func TestResultsSurviveTheirFile(t *testing.T) {
	r := sampleResult()
	path := filepath.Join(t.TempDir(), r.ResultName())
	if filepath.Base(path) != "2026-01-02-host-bars.json" {
		t.Errorf("name %s", path)
	}
	if err := r.Save(path); err != nil {
		t.Fatal(err)
	}
	back, err := ReadResult(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(back.Runs) != len(r.Runs) || back.Runs[3].Metrics != r.Runs[3].Metrics {
		t.Errorf("read back %+v", back)
	}
	if err := os.WriteFile(path, []byte(`{"schema": 99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadResult(path); !errors.Is(err, errSchema) {
		t.Errorf("a later schema: %v", err)
	}
	if err := r.Save(filepath.Join(t.TempDir(), "no", "where")); err == nil {
		t.Error("saved into a directory that is not there")
	}
}

func TestTableShowsRatiosAndCharts(t *testing.T) {
	r := sampleResult()
	var b strings.Builder
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"IOPS vs b", "2.00x (3.00x)", "90 %"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	paths, err := r.WriteCharts(t.TempDir())
	if err != nil || len(paths) != 3 {
		t.Fatalf("charts %v, %v; want iops, p99 and per CPU", paths, err)
	}
	text, err := os.ReadFile(paths[0])
	if err != nil || !strings.Contains(string(text), "<svg") {
		t.Errorf("%s is no SVG: %v", paths[0], err)
	}
	if paths, err = r.WriteCharts(t.TempDir(), "latency_p50_us"); err != nil || len(paths) > 1 {
		t.Errorf("charts of one metric: %v, %v", paths, err)
	}
	if _, err = r.WriteCharts(t.TempDir(), "loudness"); err == nil {
		t.Error("a metric that is not there was drawn")
	}
}

func TestPathsBelowTheWorkingDirectoryAreRelative(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	command := []string{filepath.Join(dir, "bin", "ashlar"), "export", "/dev/vdb", dir}
	here(command)
	if want := []string{filepath.Join("bin", "ashlar"), "export", "/dev/vdb", dir}; !slices.Equal(command, want) {
		t.Errorf("%q, want %q", command, want)
	}
}
