package daemon

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/ashlar-storage/ashlar/engine"
)

func TestMetricNamesHaveUnits(t *testing.T) {
	for name, kind := range MetricNames() {
		switch {
		case kind == "counter" && !strings.HasSuffix(name, "_total"):
			t.Errorf("counter %s does not end in _total", name)
		case kind != "counter" && strings.HasSuffix(name, "_total"):
			t.Errorf("%s %s ends in _total", kind, name)
		case kind == "histogram" && !strings.HasSuffix(name, "_seconds") && !strings.HasSuffix(name, "_bytes"):
			t.Errorf("histogram %s does not name its unit", name)
		}
	}
	if len(MetricNames()) != len(metrics) {
		t.Error("a name is used twice")
	}
	for _, m := range metrics {
		if m.help == "" || !strings.HasSuffix(m.help, ".") {
			t.Errorf("the help of %s is no sentence: %q", m.name, m.help)
		}
	}
}

func TestMetricsHaveTheTypesThatAreDocumented(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		n.volume("data", mib)
		c := n.dial("data")
		if err := c.Write(t.Context(), make([]byte, 4096), 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		n.settled("data", "write", 1)
		names := MetricNames()
		_, text := n.get("/metrics")
		seen := 0
		for _, line := range strings.Split(text, "\n") {
			fields := strings.Fields(line)
			if len(fields) != 4 || fields[1] != "TYPE" || strings.HasPrefix(fields[2], "go_") || strings.HasPrefix(fields[2], "process_") {
				continue
			}
			seen++
			if names[fields[2]] != fields[3] {
				t.Errorf("%s is a %s, documented as %q", fields[2], fields[3], names[fields[2]])
			}
		}
		if seen < 30 {
			t.Errorf("%d metrics", seen)
		}
		for _, line := range []string{
			`export_request_stage_seconds_count{export="data",op="write",stage="reply"} 1`, `export_request_bytes_total{export="data",op="write"} 4096`,
			`export_request_errors_total{export="data",op="write"} 0`, `export_requests_in_flight{export="data"} 0`, `reactor_turn_seconds_count{reactor="r0"} `,
			`reactor_enters_total{reactor="r1"} `, `reactor_spin_budget_seconds{reactor="r0"} 0`,
		} {
			if !strings.Contains(text, line) {
				t.Errorf("%s is not among the metrics", line)
			}
		}
	})
}

// Metrics and labels of other exporters that rules and panels may use.
var foreignMetrics = map[string][]string{
	"up": {"job"}, "process_cpu_seconds_total": nil, "process_resident_memory_bytes": nil, "go_gc_duration_seconds_sum": nil,
	"csi_call_seconds_count": {"method", "code"}, "csi_call_seconds_bucket": {"method", "code", "le"}, // a test of csi has it
}

var (
	promStrings    = regexp.MustCompile(`"[^"]*"`)
	promGroups     = regexp.MustCompile(`\b(?:by|without|ignoring|on|group_left|group_right)\s*\(([^)]*)\)`)
	promRanges     = regexp.MustCompile(`\[[^\]]*\]`)
	promSelectors  = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}`)
	promIdentifier = regexp.MustCompile(`[a-zA-Z_:][a-zA-Z0-9_:]*\b\s*\(?`)
	promLabel      = regexp.MustCompile(`([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)`)
)

// checkExpression reports what an expression of Prometheus' language uses that is not
// there.
func checkExpression(t *testing.T, where, expression string) {
	t.Helper()
	labels := metricLabels()
	kinds := MetricNames()
	text := promStrings.ReplaceAllString(expression, `""`)
	var grouped []string
	for _, g := range promGroups.FindAllStringSubmatch(text, -1) {
		for _, l := range strings.Split(g[1], ",") {
			if l = strings.TrimSpace(l); l != "" {
				grouped = append(grouped, l)
			}
		}
	}
	text = promRanges.ReplaceAllString(promGroups.ReplaceAllString(text, " "), " ")
	used := map[string][]string{} // labels, by metric
	for _, s := range promSelectors.FindAllStringSubmatch(text, -1) {
		for _, l := range promLabel.FindAllStringSubmatch(s[2], -1) {
			used[s[1]] = append(used[s[1]], l[1])
		}
	}
	text = regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(text, " ")
	have := []string{"instance", "job"}
	count := 0
	for _, name := range promIdentifier.FindAllString(text, -1) {
		if strings.HasSuffix(name, "(") || slices.Contains([]string{"and", "or", "unless", "bool", "offset"}, strings.TrimSpace(name)) {
			continue
		}
		name = strings.TrimSpace(name)
		count++
		if own, ok := foreignMetrics[name]; ok {
			have = append(have, own...)
			continue
		}
		base := name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if b, ok := strings.CutSuffix(name, suffix); ok && kinds[b] == "histogram" {
				base = b
			}
		}
		own, ok := labels[base]
		if !ok || kinds[name] == "histogram" {
			t.Errorf("%s: there is no metric %s in %s", where, name, expression)
			continue
		}
		own = append([]string{"instance", "job"}, own...)
		if strings.HasSuffix(name, "_bucket") {
			own = append(own, "le")
		}
		have = append(have, own...)
		for _, l := range used[name] {
			if !slices.Contains(own, l) {
				t.Errorf("%s: %s has no label %s", where, name, l)
			}
		}
	}
	for _, l := range grouped {
		if !slices.Contains(have, l) {
			t.Errorf("%s: nothing has the label %s in %s", where, l, expression)
		}
	}
	if count == 0 {
		t.Errorf("%s: %q uses no metric", where, expression)
	}
}

func TestAlertsUseMetricsThatExist(t *testing.T) {
	b, err := os.ReadFile("../../deploy/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	known := metricLabels()
	variable := regexp.MustCompile(`\$labels\.(\w+)`)
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if seen[r.Alert] || !strings.HasPrefix(r.Alert, "Ashlar") {
				t.Errorf("alert %q: named twice, or not after Ashlar", r.Alert)
			}
			seen[r.Alert] = true
			checkExpression(t, r.Alert, r.Expr)
			if s := r.Labels["severity"]; s != "warning" && s != "critical" {
				t.Errorf("%s: severity %q", r.Alert, s)
			}
			for _, key := range []string{"summary", "description", "remedy"} {
				if r.Annotations[key] == "" {
					t.Errorf("%s has no %s", r.Alert, key)
				}
				for _, v := range variable.FindAllStringSubmatch(r.Annotations[key], -1) {
					found := v[1] == "instance"
					for _, all := range []map[string][]string{known, foreignMetrics} {
						for name, labels := range all {
							found = found || strings.Contains(r.Expr, name) && slices.Contains(labels, v[1])
						}
					}
					if !found {
						t.Errorf("%s: no metric of it has the label %s", r.Alert, v[1])
					}
				}
			}
		}
	}
	for _, want := range []string{"PoolFull", "PoolStopped", "CorruptData", "DiskErrors", "DeviceWaiting", "SlowRequests", "ReactorSaturated",
		"ReactorWithoutCPU", "DiskRequestsFail", "CSIDown", "CSICallsFail"} {
		if !seen["Ashlar"+want] {
			t.Errorf("no alert Ashlar%s", want)
		}
	}
}

func TestDashboardUsesMetricsThatExist(t *testing.T) {
	b, err := os.ReadFile("../../deploy/grafana/ashlar.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		UID        string
		Templating struct {
			List []struct {
				Name  string
				Query any
			}
		}
		Panels []struct {
			ID      int
			Title   string
			Type    string
			GridPos struct{ H, W, X, Y int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	var shown strings.Builder
	for _, p := range board.Panels {
		if ids[p.ID] || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q: id %d is taken, or it is too wide", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other, ok := taken[[2]int{x, y}]; ok {
					t.Fatalf("panel %q lies on %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			checkExpression(t, p.Title, target.Expr)
			shown.WriteString(target.Expr + "\n")
		}
	}
	// What the kernel is observed for is worth nothing unseen.
	for _, m := range metrics {
		if m.section == sectionKernel && !strings.Contains(shown.String(), m.name) {
			t.Errorf("no panel shows %s", m.name)
		}
	}
	variables := 0
	for _, v := range board.Templating.List {
		q, ok := v.Query.(map[string]any)
		if !ok {
			continue
		}
		variables++
		inner := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(q["query"].(string))
		if inner == nil {
			t.Errorf("variable %s: %v", v.Name, q["query"])
			continue
		}
		checkExpression(t, v.Name, "sum by ("+inner[2]+") ("+inner[1]+")")
	}
	if variables != 2 || board.UID == "" || len(ids) < 20 {
		t.Errorf("%d variables, %d panels", variables, len(ids))
	}
}
