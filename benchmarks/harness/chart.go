package harness

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// charted are the metrics a chart is drawn of, if they were measured.
var charted = []string{"iops", "latency_p99_us", "latency_p999_us", "iops_per_server_cpu_second"}

// WriteCharts draws one SVG per metric into dir: a group of bars per case, a bar
// per peer, and a line from the lowest to the highest round. Without metrics they are
// those that are charted of everything. It returns the paths written.
func (r *Result) WriteCharts(dir string, metrics ...string) ([]string, error) {
	if len(metrics) == 0 {
		metrics = charted
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("charts: %w", err)
	}
	var written []string
	base := strings.TrimSuffix(r.ResultName(), ".json")
	for _, name := range metrics {
		m, ok := FindMetric(name)
		if !ok {
			return written, fmt.Errorf("charts: there is no metric %s", name)
		}
		p, width, err := r.chart(m)
		if err != nil {
			return written, fmt.Errorf("chart of %s: %w", name, err)
		}
		if p == nil {
			continue
		}
		path := filepath.Join(dir, base+"-"+name+".svg")
		if err := p.Save(width, 10*vg.Centimeter, path); err != nil {
			return written, fmt.Errorf("chart: %w", err)
		}
		written = append(written, path)
	}
	return written, nil
}

func (r *Result) chart(m Metric) (*plot.Plot, vg.Length, error) {
	const barWidth = 14
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s: %s", r.Name, m.Title)
	p.Y.Label.Text = m.Title
	p.Y.Min = 0
	p.Legend.Top = true
	grid := plotter.NewGrid()
	grid.Vertical.Color = nil // the groups have gaps
	p.Add(grid)
	drawn := 0
	var ranges []rangeLine
	for i, info := range r.Peers {
		offset := vg.Points(barWidth * (float64(i) - float64(len(r.Peers)-1)/2))
		values := make(plotter.Values, len(r.Cases))
		found := false
		for j, c := range r.Cases {
			s, ok := r.Spread(c.Case, info.Name, m)
			if !ok {
				continue
			}
			values[j], found = s.Median, true
			p.Y.Max = math.Max(p.Y.Max, s.Max)
			ranges = append(ranges, rangeLine{x: float64(j), offset: offset, spread: s})
		}
		if !found {
			continue
		}
		bars, err := plotter.NewBarChart(values, vg.Points(barWidth*0.9))
		if err != nil {
			return nil, 0, err
		}
		bars.Color = plotutil.Color(i)
		bars.LineStyle.Width = 0
		bars.Offset = offset
		p.Add(bars)
		p.Legend.Add(info.Name, bars)
		drawn++
	}
	if drawn == 0 {
		return nil, 0, nil
	}
	for _, l := range ranges {
		p.Add(l) // above the bars
	}
	names := make([]string, len(r.Cases))
	for j, c := range r.Cases {
		names[j] = c.Case
	}
	p.NominalX(names...)
	p.X.Tick.Label.Rotation = math.Pi / 8
	p.X.Tick.Label.XAlign = -1
	p.Y.Max *= 1.05
	// One unit of the axis is one group; the legend stands to the right of them.
	group := max(vg.Points(barWidth*float64(len(r.Peers))+20), 3*vg.Centimeter)
	legend := float64(5 * vg.Centimeter / group)
	p.X.Min, p.X.Max = -0.5, float64(len(r.Cases))-0.5+legend
	width := group*vg.Length(float64(len(r.Cases))+legend) + 3*vg.Centimeter
	return p, width, nil
}
