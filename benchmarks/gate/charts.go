package gate

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

// chartsFolder is where the charts of the page stand, below the results.
const chartsFolder = "charts"

// chartGroup is a set of bars that one row of charts shows.
type chartGroup struct {
	name, title string
	has         func(Bar) bool
}

func judgesIOPS(b Bar) bool {
	return b.Client == "fio" && slices.ContainsFunc(b.Claims, func(c Claim) bool { return c.Metric == iops })
}

var chartGroups = []chartGroup{
	{"export-tmpfs", "an export of a file on tmpfs", func(b Bar) bool { return b.Medium == Tmpfs && strings.HasPrefix(b.Name, "tmpfs-") && judgesIOPS(b) }},
	{"export-disk", "an export of a file on a disk", func(b Bar) bool { return b.Medium == Disk && strings.HasPrefix(b.Name, "disk-") && judgesIOPS(b) }},
	{"pool", "a volume of a pool on a disk", func(b Bar) bool { return b.Medium.OnStage() && strings.HasPrefix(b.Name, "pool-") && judgesIOPS(b) }},
	{"spin", "a reactor without work: it looks for a learned time, always, or never", func(b Bar) bool { return strings.HasPrefix(b.Name, "spin-") && judgesIOPS(b) }},
	{"observe", "a volume of a pool on a disk, everything observed and nothing", func(b Bar) bool { return strings.HasPrefix(b.Name, "observe-") && judgesIOPS(b) }},
}

// podTitle is what the charts of pods show.
const podTitle = "fio in a pod: on a claim, and on a hostPath of the disk"

// merge puts the newest results of a group's bars on one host together, each bar a
// case.
func (g chartGroup) merge(all []stored) *harness.Result {
	if len(all) == 0 {
		return nil
	}
	host := all[0].Host
	merged := &harness.Result{Schema: harness.Schema, Name: g.name, Host: host}
	for _, bar := range Bars {
		if !g.has(bar) {
			continue
		}
		i := slices.IndexFunc(all, func(s stored) bool { return s.Name == bar.Name && s.Host.Name == host.Name })
		if i < 0 {
			continue
		}
		_, short, _ := strings.Cut(bar.Name, "-")
		for _, p := range all[i].Peers {
			if !slices.ContainsFunc(merged.Peers, func(q harness.PeerInfo) bool { return q.Name == p.Name }) {
				merged.Peers = append(merged.Peers, p)
			}
		}
		for _, run := range all[i].Runs {
			run.Case = short
			merged.Runs = append(merged.Runs, run)
		}
	}
	if len(merged.Runs) == 0 {
		return nil
	}
	merged.Summarize()
	return merged
}

// charts draws all charts of the page: file name to SVG.
func charts(all []stored) (map[string][]byte, error) {
	dir, err := os.MkdirTemp("", "ashlar-charts-")
	if err != nil {
		return nil, fmt.Errorf("charts: %w", err)
	}
	defer os.RemoveAll(dir)
	drawn := map[string][]byte{}
	for _, g := range chartGroups {
		r := g.merge(all)
		if r == nil {
			continue
		}
		paths, err := r.WriteCharts(dir)
		if err != nil {
			return nil, err
		}
		if err := take(drawn, g.name, r, paths); err != nil {
			return nil, err
		}
	}
	for metric, r := range podCharts(all) {
		paths, err := r.WriteCharts(dir, metric)
		if err != nil {
			return nil, err
		}
		if err := take(drawn, r.Name, r, paths); err != nil {
			return nil, err
		}
	}
	return drawn, nil
}

// take puts what was drawn of a result among the charts of the page, under the name of
// its group.
func take(drawn map[string][]byte, group string, r *harness.Result, paths []string) error {
	base := strings.TrimSuffix(r.ResultName(), ".json")
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("charts: %w", err)
		}
		drawn[group+strings.TrimPrefix(filepath.Base(path), base)] = text
	}
	return nil
}

// renderCharts rewrites the charts below dir and says whether one changed.
func renderCharts(dir string, drawn map[string][]byte) (changed bool, err error) {
	folder := filepath.Join(dir, chartsFolder)
	if len(drawn) > 0 {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return false, fmt.Errorf("charts: %w", err)
		}
	}
	old, err := filepath.Glob(filepath.Join(folder, "*.svg"))
	if err != nil {
		return false, fmt.Errorf("charts: %w", err)
	}
	for _, path := range old {
		if _, ok := drawn[filepath.Base(path)]; !ok {
			if err := os.Remove(path); err != nil {
				return false, fmt.Errorf("charts: %w", err)
			}
			changed = true
		}
	}
	for name, text := range drawn {
		path := filepath.Join(folder, name)
		before, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("charts: %w", err)
		}
		if bytes.Equal(before, text) {
			continue
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return false, fmt.Errorf("charts: %w", err)
		}
		changed = true
	}
	return changed, nil
}

// chartSection is the part of the page that shows the charts drawn.
func chartSection(all []stored, drawn map[string][]byte) string {
	if len(drawn) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n## Charts\n\nThe newest results of the host `%s`: a group of bars for each work, the median of each server, and a line from its worst to its best round. "+
		"Each axis is of its own: what counts is the height within a group.\n", all[0].Host.Name)
	for _, g := range append(slices.Clone(chartGroups), chartGroup{name: podChart, title: podTitle}) {
		first := true
		for _, metric := range []string{iops, bandwidth, latencyP99, latencyTail, iopsPerCPU} {
			name := g.name + "-" + metric + ".svg"
			if _, ok := drawn[name]; !ok {
				continue
			}
			if first {
				fmt.Fprintf(&b, "\n### %s\n\n", strings.ToUpper(g.title[:1])+g.title[1:])
				first = false
			}
			m, _ := harness.FindMetric(metric) // one of the charted
			fmt.Fprintf(&b, "![%s, %s](%s/%s)\n", g.title, m.Title, chartsFolder, name)
		}
	}
	return b.String()
}
