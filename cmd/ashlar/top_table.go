package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/charmbracelet/x/ansi"

	"github.com/ashlar-storage/ashlar/internal/report"
)

// column is a column of a pane. Its width depends on that of the terminal alone, so
// that nothing moves when numbers change.
type column struct {
	title string
	width int  // cells; of a flexible one, the least
	most  int  // cells a flexible one grows to; 0: it is not flexible
	left  bool // aligned to the left
	drop  int  // the larger, the sooner it is left out of a narrow terminal; 0: never
	up    bool // sorts upwards first: names
}

// The columns of the panes, and of each row its cells in that order.
var (
	volumeColumns = []column{
		{title: "VOLUME", width: 10, most: 40, left: true, up: true},
		{title: "POOL", width: 8, left: true, drop: 8, up: true},
		{title: "OPEN", width: 5, drop: 7},
		{title: "IOPS", width: 6},
		{title: "BANDWIDTH", width: 10, drop: 5},
		{title: "P50", width: 7, drop: 3},
		{title: "P99", width: 7, drop: 1},
		{title: "FLIGHT", width: 7, drop: 4},
		{title: "P99 OVER TIME", width: 13, most: historyMax, left: true, drop: 6},
	}
	reactorColumns = []column{
		{title: "REACTOR", width: 8, left: true, up: true},
		{title: "CPU", width: 4, drop: 5, up: true},
		{title: "BUSY", width: 5},
		{title: "IDLE", width: 5, drop: 3},
		{title: "SLEEP", width: 6, drop: 2},
		{title: "SPIN", width: 7, drop: 4},
		{title: "SERVICE", width: 8, drop: 6},
		{title: "STOLEN", width: 7, drop: 1},
		{title: "WAKE P99", width: 9, drop: 7},
		{title: "BUSY · IDLE", width: 11, most: 40, left: true, drop: 8},
	}
	diskColumns = []column{
		{title: "DISK", width: 10, most: 24, left: true, up: true},
		{title: "POOLS", width: 8, most: 24, left: true, drop: 7, up: true},
		{title: "DEPTH", width: 6, drop: 2},
		{title: "IOPS", width: 6},
		{title: "BANDWIDTH", width: 10, drop: 5},
		{title: "Q P99", width: 7, drop: 4},
		{title: "P50", width: 7, drop: 3},
		{title: "P99", width: 7, drop: 1},
		{title: "FL P99", width: 7, drop: 6},
		{title: "ERRORS", width: 7, drop: 8},
	}
	paneColumns = [paneCount][]column{volumeColumns, reactorColumns, diskColumns}
	paneNames   = [paneCount]string{"volumes", "reactors", "disks"}
)

func columnOf(columns []column, title string) int {
	return slices.IndexFunc(columns, func(c column) bool { return c.title == title })
}

// row is a line of a pane: the cells as text, and what they are sorted by, a number
// or a text.
type row struct {
	key   string
	last  bool // stands below those that are not: a disk of no pool
	cells []string
	sort  []any
}

// widths gives each column its cells; those left out get 0. One cell stands before
// each column: for the cursor, and between.
func widths(columns []column, width int) []int {
	w := make([]int, len(columns))
	sum := 0
	for i, c := range columns {
		w[i] = c.width
		sum += c.width + 1
	}
	for sum > width {
		worst := -1
		for i, c := range columns {
			if w[i] > 0 && c.drop > 0 && (worst < 0 || c.drop > columns[worst].drop) {
				worst = i
			}
		}
		if worst < 0 {
			break // what is left is cut at the edge
		}
		sum -= w[worst] + 1
		w[worst] = 0
	}
	for i, c := range columns {
		if w[i] > 0 && c.most > w[i] && sum < width {
			more := min(c.most-w[i], width-sum)
			w[i] += more
			sum += more
		}
	}
	return w
}

// rows are the lines of a pane: filtered and in order.
func (m *topModel) rows(pane int) []row {
	if m.now == nil {
		return nil
	}
	var rows []row
	switch pane {
	case paneVolumes:
		for i := range m.now.Volumes {
			if v := &m.now.Volumes[i]; m.matches(v.Name, v.Pool) {
				rows = append(rows, m.volumeRow(v))
			}
		}
	case paneReactors:
		for i := range m.now.Reactors {
			rows = append(rows, reactorRow(&m.now.Reactors[i]))
		}
	case paneDisks:
		for i := range m.now.Disks {
			if d := &m.now.Disks[i]; m.matches(append([]string{d.Name}, d.Pools...)...) {
				rows = append(rows, diskRow(d))
			}
		}
	}
	p := m.panes[pane]
	down := !paneColumns[pane][p.sort].up
	slices.SortStableFunc(rows, func(a, b row) int {
		if a.last != b.last {
			return map[bool]int{true: 1, false: -1}[a.last]
		}
		order := compare(a.sort[p.sort], b.sort[p.sort])
		if down != p.reverse {
			order = -order
		}
		return cmp.Or(order, strings.Compare(a.key, b.key))
	})
	return rows
}

// compare orders two numbers or two texts.
func compare(a, b any) int {
	if x, ok := a.(float64); ok {
		return cmp.Compare(x, b.(float64))
	}
	return strings.Compare(a.(string), b.(string))
}

// cells collects a row: the text of a cell and what it is sorted by.
func (r *row) add(text string, by any) {
	r.cells = append(r.cells, text)
	r.sort = append(r.sort, by)
}

func (r *row) addTime(h report.Histogram, q float64) {
	if h.Count == 0 {
		r.add("-", 0.0)
		return
	}
	d := h.Quantile(q)
	r.add(report.Duration(d), float64(d))
}

func (r *row) addShare(v *float64) {
	if v == nil {
		r.add("-", -1.0)
		return
	}
	r.add(share(*v), *v)
}

func (m *topModel) volumeRow(v *report.Volume) row {
	r := row{key: volumeKey(v)}
	r.add(printable(v.Name), v.Name)
	r.add(printable(v.Pool), v.Pool)
	r.add(count(v.OpenCount), float64(v.OpenCount))
	r.add(short(v.IOPS), v.IOPS)
	r.add(report.Bytes(v.BytesPerSecond)+"/s", v.BytesPerSecond)
	r.addTime(v.Latency, 0.5)
	r.addTime(v.Latency, 0.99)
	r.add(count(v.InFlight), float64(v.InFlight))
	w := m.columnWidth(paneVolumes, len(volumeColumns)-1)
	r.add(sparkline(m.history[r.key], w), float64(v.Latency.Quantile(0.99)))
	return r
}

func reactorRow(v *report.Reactor) row {
	r := row{key: count(v.Index)}
	r.add(count(v.Index), float64(v.Index))
	cpu := "-"
	if v.Pinned {
		cpu = count(v.CPU)
	}
	r.add(cpu, float64(v.CPU))
	r.addShare(&v.Busy)
	r.addShare(&v.Idle)
	r.addShare(&v.Sleep)
	r.add(report.Duration(time.Duration(v.SpinBudgetNS)), float64(v.SpinBudgetNS))
	r.add(report.Duration(time.Duration(v.ServiceNS)), float64(v.ServiceNS))
	r.addShare(v.Stolen)
	if v.Wakeup == nil {
		r.add("-", -1.0)
	} else {
		r.addTime(*v.Wakeup, 0.99)
	}
	r.add("", v.Busy) // drawn when its width is known
	return r
}

func diskRow(d *report.Disk) row {
	r := row{key: d.Name, last: len(d.Pools) == 0}
	r.add(printable(d.Name), d.Name)
	pools := strings.Join(d.Pools, " ")
	r.add(printable(pools), pools)
	r.add(count(d.Depth), float64(d.Depth))
	r.add(short(d.IOPS), d.IOPS)
	r.add(report.Bytes(d.BytesPerSecond)+"/s", d.BytesPerSecond)
	r.addTime(d.Queue, 0.99)
	r.addTime(d.Service, 0.5)
	r.addTime(d.Service, 0.99)
	var flush report.Histogram
	for _, o := range d.Operations {
		if o.Name == "flush" {
			flush = o.Service
		}
	}
	r.addTime(flush, 0.99)
	r.add(count(d.Errors), float64(d.Errors))
	return r
}

// columnWidth is the width of a column in a terminal as wide as it is now.
func (m *topModel) columnWidth(pane, column int) int {
	return widths(paneColumns[pane], m.width)[column]
}

// ---- cells ----------------------------------------------------------------------

// fit makes a text as wide as a cell: cut with an ellipsis, or filled up.
func fit(text string, width int, left bool) string {
	if width <= 0 {
		return ""
	}
	text = truncate(text, width)
	space := strings.Repeat(" ", max(width-ansi.StringWidth(text), 0)) // a wide letter may not fit to the end
	if left {
		return text + space
	}
	return space + text
}

// printable is a text with whatever would move the cursor, colour the screen or turn
// the writing around made visible as a question mark.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, name)
}

// short prints a rate in at most six cells.
func short(v float64) string {
	switch {
	case v < 99_999.5:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v < 999_500:
		return fmt.Sprintf("%.0fk", v/1e3)
	case v < 99.95e6:
		return fmt.Sprintf("%.1fM", v/1e6)
	}
	return fmt.Sprintf("%.0fM", v/1e6)
}

// sparkline draws the last values, the newest to the right, from nothing to the most
// among them. 0 is a gap.
func sparkline(values []float64, width int) string {
	values = values[max(len(values)-width, 0):]
	most := 0.0
	for _, v := range values {
		most = max(most, v)
	}
	levels := []rune("▁▂▃▄▅▆▇█")
	var b strings.Builder
	b.WriteString(strings.Repeat(" ", max(width-len(values), 0)))
	for _, v := range values {
		if v <= 0 {
			b.WriteByte(' ')
			continue
		}
		b.WriteRune(levels[min(int(v/most*float64(len(levels))), len(levels)-1)])
	}
	return b.String()
}

// bar draws what a reactor is busy and what it spins, of a whole of width cells.
func bar(busy, idle float64, width int) string {
	full := min(int(busy*float64(width)+0.5), width)
	spin := min(int((busy+idle)*float64(width)+0.5), width) - full
	return strings.Repeat("█", full) + strings.Repeat("░", max(spin, 0)) + strings.Repeat(" ", max(width-full-max(spin, 0), 0))
}
