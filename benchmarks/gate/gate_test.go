package gate

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

func TestEveryBarCanBeMeasured(t *testing.T) {
	profile, err := harness.LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, b := range Bars {
		if names[b.Name] {
			t.Errorf("two bars are called %s", b.Name)
		}
		names[b.Name] = true
		if _, err := harness.FindPeers(b.Peers()...); err != nil {
			t.Errorf("%s: %v", b.Name, err)
		}
		if _, err := harness.FindClient(b.Client); err != nil {
			t.Errorf("%s: %v", b.Name, err)
		}
		if _, err := profile.Find(b.Case); err != nil && b.Medium != Idle && b.Medium != PoolCalls && b.Medium != PoolOpen {
			t.Errorf("%s: %v", b.Name, err)
		}
		if len(b.Claims) == 0 {
			t.Errorf("%s claims nothing", b.Name)
		}
		for _, c := range b.Claims {
			m, ok := harness.FindMetric(c.Metric)
			if !ok {
				t.Errorf("%s: no metric %s", b.Name, c.Metric)
			}
			if m.LowerIsGood != c.AtMost {
				t.Errorf("%s: %s is bounded from the wrong side", b.Name, c)
			}
		}
	}
}

func result(values map[string]float64) *harness.Result {
	r := &harness.Result{Schema: harness.Schema, Name: "tmpfs-randread-4k-qd32", Started: time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC),
		Host: harness.Host{Name: "host", Commit: "0123456789abcdef"}}
	for peer, v := range values {
		r.Peers = append(r.Peers, harness.PeerInfo{Name: peer})
		for round := range 3 {
			r.Runs = append(r.Runs, harness.RunResult{Case: "randread-4k-qd32", Peer: peer, Round: round,
				Metrics: harness.Metrics{IOs: 1, Seconds: 1, IOPS: v, LatencyP999: 1e6 / v}})
		}
	}
	return r
}

func TestClaimsAreJudgedAgainstTheBestPeer(t *testing.T) {
	r := result(map[string]float64{"ashlar": 200, "nbdkit-1": 100, "nbdkit-16": 160})
	for _, c := range []struct {
		claim    Claim
		against  string
		measured float64
		pass     bool
	}{
		{atLeast("ashlar", iops, 1.25, nbdkit), "nbdkit-16", 1.25, true},
		{atLeast("ashlar", iops, 1.3, nbdkit), "nbdkit-16", 1.25, false},
		{atMost("ashlar", latencyTail, 0.8, nbdkit), "nbdkit-16", 0.8, true},
		{atMost("ashlar", latencyTail, 0.6, nbdkit), "nbdkit-16", 0.8, false},
		{atLeast("ashlar", iops, 200, nil), "", 200, true},
		{atLeast("ashlar", iops, 1, qemu), "", 0, false},         // nobody to compare with
		{atLeast("ashlar-busy", iops, 1, nbdkit), "", 0, false},  // the subject did not run
		{atLeast("ashlar", iopsPerCPU, 1, nbdkit), "", 0, false}, // the metric was not measured
	} {
		v := c.claim.judge(r, "randread-4k-qd32")
		if v.Against != c.against || v.Pass != c.pass || v.Measured < c.measured-1e-9 || v.Measured > c.measured+1e-9 {
			t.Errorf("%s: %+v, want %v against %q, pass %v", c.claim, v, c.measured, c.against, c.pass)
		}
	}
}

func TestThePageHoldsTheNewestResultOfEachHost(t *testing.T) {
	dir := t.TempDir()
	for day, v := range map[int]float64{2: 300, 3: 110} {
		r := result(map[string]float64{"ashlar": v, "nbdkit-1": 100, "nbdkit-16": 80})
		r.Started = time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC)
		if err := r.Save(filepath.Join(dir, r.ResultName())); err != nil {
			t.Fatal(err)
		}
	}
	changed, err := Render(dir)
	if err != nil || !changed {
		t.Fatal(changed, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	for _, want := range []string{"1.10x (1.10x)", "**miss**", "0123456789ab", "2026-01-03", "not measured", "go run ./benchmarks/bars --render"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q in\n%s", want, page)
		}
	}
	if strings.Contains(page, "3.00x") {
		t.Error("an older result of the same host stands in the table")
	}
	if changed, err = Render(dir); err != nil || changed {
		t.Errorf("rendering again: changed %v, %v", changed, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Render(dir); err == nil {
		t.Error("a broken result was passed over")
	}
}

// The committed page is what the generator makes of the committed results.
func TestTheCommittedPageIsCurrent(t *testing.T) {
	all, err := readAll(filepath.Join("..", "results"))
	if err != nil {
		t.Fatal(err)
	}
	page, drawn, err := renderAll(filepath.Join("..", "results"), all)
	if err != nil {
		t.Fatal(err)
	}
	have, err := os.ReadFile(filepath.Join("..", "results", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page {
		t.Errorf("benchmarks/results/README.md is not what its results give; run %s", Generator)
	}
	charts, err := filepath.Glob(filepath.Join("..", "results", chartsFolder, "*.svg"))
	if err != nil || len(charts) != len(drawn) {
		t.Errorf("%d charts, want %d (%v); run %s", len(charts), len(drawn), err, Generator)
	}
	for _, path := range charts {
		if text, err := os.ReadFile(path); err != nil || !bytes.Equal(text, drawn[filepath.Base(path)]) {
			t.Errorf("%s is not what the results give (%v); run %s", path, err, Generator)
		}
	}
}

func TestFindNamesTheBarsThereAre(t *testing.T) {
	if found, err := Find(nil); err != nil || len(found) != len(Bars) {
		t.Errorf("%d bars, %v", len(found), err)
	}
	if _, err := Find([]string{"nope"}); err == nil || !strings.Contains(err.Error(), "idle-export") {
		t.Errorf("%v, want the bars there are", err)
	}
}

func TestClaimsOfThePoolAreJudged(t *testing.T) {
	r := result(map[string]float64{"pool": 100, "export": 110, "pool-snapshots": 50})
	r.Absent = map[string]string{"lvm-thin": "lvm-thin: no device mapper"}
	r.Verdicts = nil
	for _, c := range []struct {
		claim    Claim
		measured float64
		pass     bool
		text     string
	}{
		{ofFile(0.90, 0.97), 100.0 / 110, true, "pool: IOPS >= 0.90x (aim 0.97x) export"},
		{ofFile(0.92, 0), 100.0 / 110, false, "pool: IOPS >= 0.92x export"},
		{above("pool-snapshots", latencyTail, 10e3, "pool"), 10e3, true, "pool-snapshots: p99.9 latency, µs <= 10.00 ms more than pool"},
		{above("pool-snapshots", latencyTail, 9e3, "pool"), 10e3, false, "pool-snapshots: p99.9 latency, µs <= 9.00 ms more than pool"},
		{shownOnly("pool", latencyTail), 10e3, true, "pool: p99.9 latency, µs, documented"},
		{shownOnly("pool", serverBytes), 0, false, "pool: bytes given to the device per byte written, documented"}, // not measured
		{atLeast("pool", iops, 1, lvmThin), 0, false, "pool: IOPS >= 1.00x lvm-thin"},
	} {
		v := c.claim.judge(r, "randread-4k-qd32")
		if c.claim.String() != c.text {
			t.Errorf("%q, want %q", c.claim, c.text)
		}
		if v.Pass != c.pass || v.Measured < c.measured-1e-6 || v.Measured > c.measured+1e-6 {
			t.Errorf("%s: %+v, want %v, pass %v", c.claim, v, c.measured, c.pass)
		}
		if (v.Absent != "") != (c.claim.Against != nil && c.claim.Against[0] == "lvm-thin") {
			t.Errorf("%s: absent %q", c.claim, v.Absent)
		}
	}
}

func TestThePageSaysWhyAPeerIsNotThere(t *testing.T) {
	r := result(map[string]float64{"pool": 100, "export": 110, "qcow2-thin": 90, "qcow2-prealloc": 95, "nbdkit-cow": 30})
	r.Name = "pool-randread-4k-qd32"
	for i := range r.Runs {
		r.Runs[i].Case = r.Name
	}
	r.Absent = map[string]string{"lvm-thin": "lvm-thin: no device mapper"}
	page := renderPage([]stored{{"f.json", r}}, "")
	for _, want := range []string{"not measured: lvm-thin: no device mapper", "3 claims are against peers that their host cannot run.", "| 1.05x (1.05x) | qcow2-prealloc |"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q in\n%s", want, page)
		}
	}
}

func TestTheStageHoldsThePeersOfItsBars(t *testing.T) {
	names := func(bars ...string) string {
		found, err := Find(bars)
		if err != nil {
			t.Fatal(err)
		}
		peers, err := StagePeers(found)
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, p := range peers {
			list = append(list, p.Name())
		}
		return strings.Join(list, " ")
	}
	want := "pool export qcow2-prealloc qcow2-thin nbdkit-cow"
	thin, err := harness.FindPeers("lvm-thin")
	if err != nil {
		t.Fatal(err)
	}
	if harness.Available(thin[0]) == nil { // as the host is
		want += " lvm-thin"
	}
	if got := names("pool-randread-4k-qd32", "tmpfs-randread-4k-qd32"); got != want {
		t.Error(got)
	}
	if got := names("pool-open-1tib"); got != "pool" {
		t.Error(got)
	}
	var c Config
	for _, b := range Bars {
		if _, ok := c.backing(b); ok != (b.Medium == Null) {
			t.Errorf("%s can run on nothing: %v", b.Name, ok)
		}
	}
}
