package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/charmbracelet/lipgloss"
	"github.com/charmbracelet/x/ansi"

	"github.com/ashlar-storage/ashlar/internal/report"
)

// topTall is the height from which all panes are shown below each other.
const topTall = 30

// topStyle is how things look on a terminal with colours. All is said in words and
// marks as well, for those without.
type topStyle struct {
	title, head, chosen, bad, faint lipgloss.Style
}

func newTopStyle(r *lipgloss.Renderer) topStyle {
	return topStyle{
		title:  r.NewStyle().Bold(true),
		head:   r.NewStyle().Bold(true).Foreground(lipgloss.Color("6")),
		chosen: r.NewStyle().Reverse(true),
		bad:    r.NewStyle().Bold(true).Foreground(lipgloss.Color("1")),
		faint:  r.NewStyle().Faint(true),
	}
}

// View implements tea.Model: as many lines as the terminal has, each as wide as it is.
func (m *topModel) View() string {
	if m.quitting {
		return ""
	}
	lines := []string{m.header()}
	if m.height > 2 {
		body := m.height - 2
		lines = append(lines, m.body(body)...)
		for len(lines) < m.height-1 {
			lines = append(lines, "")
		}
	}
	if m.height > 1 {
		lines = append(lines[:m.height-1], m.footer())
	}
	for i, l := range lines {
		lines[i] = fill(l, m.width)
	}
	return strings.Join(lines, "\n")
}

// fill makes a line, with its colours, as wide as the terminal.
func fill(line string, width int) string {
	line = truncate(line, width)
	return line + strings.Repeat(" ", max(width-ansi.StringWidth(line), 0))
}

// truncate cuts a text to a width, with an ellipsis. What ansi.Truncate leaves may be
// wider than asked: a mark that makes the letter before it wide, such as U+FE0F, counts
// otherwise where it is cut.
func truncate(text string, width int) string {
	cut := text
	for w := width; ansi.StringWidth(cut) > width; w-- {
		cut = ansi.Truncate(text, max(w, 0), "…")
		if w <= 0 {
			return ""
		}
	}
	return cut
}

// header is the state of the daemon. The most important stands first.
func (m *topModel) header() string {
	switch {
	case m.away != nil:
		return m.style.bad.Render(fmt.Sprintf("daemon away for %s: ", age(m.at.Sub(m.since)))) + printable(m.away.Error())
	case m.now == nil:
		return m.style.title.Render("ashlar top") + "  asking " + m.address
	}
	var parts []string
	if m.paused {
		parts = append(parts, m.style.chosen.Render("PAUSED"))
	}
	var iops, bandwidth float64
	for _, v := range m.now.Volumes {
		iops += v.IOPS
		bandwidth += v.BytesPerSecond
	}
	window := report.Duration(m.now.To.Sub(m.now.From))
	if m.began {
		window = "since its start"
	}
	parts = append(parts,
		m.style.title.Render("ashlar top"),
		window,
		short(iops)+" IOPS", report.Bytes(bandwidth)+"/s",
		fmt.Sprintf("CPU %s", share(m.now.CPUSeconds/max(m.now.Seconds, 1e-9))), humane(m.now.RSSBytes)+" resident",
		"up "+age(m.now.To.Sub(m.now.Started)), m.address)
	return strings.Join(parts, "  ")
}

// age prints a duration in its two largest units.
func age(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

// footer is the keys, or the filter that is being typed.
func (m *topModel) footer() string {
	switch {
	case m.typing:
		return "/" + m.filter + "▏  enter keeps it, esc ends it"
	case m.help:
		return m.style.faint.Render("any key: back")
	case m.detail != "":
		return m.style.faint.Render("esc back  ↑↓ scroll  p pause  ? keys  q quit")
	}
	keys := "tab pane  ↑↓ move  enter why  s sort  r turn  / filter  p pause  ? keys  q quit"
	if m.width < 60 {
		keys = "? keys  q quit"
	}
	if m.filter != "" {
		keys = "/" + m.filter + "  (esc ends it)  " + keys
	}
	return m.style.faint.Render(keys)
}

// body is what stands between header and footer, in at most height lines.
func (m *topModel) body(height int) []string {
	switch {
	case m.help:
		return cut(topKeys, height)
	case m.now == nil:
		return nil
	case m.detail != "":
		lines := m.detailLines()
		return cut(lines[min(m.scroll, max(len(lines)-1, 0)):], height)
	}
	var lines []string
	if m.height >= topTall {
		for pane := range paneCount {
			if pane > 0 {
				lines = append(lines, "")
			}
			lines = append(lines, m.paneTitle(pane))
			lines = append(lines, m.paneLines(pane, m.rowsOf(pane))...)
		}
	} else {
		if height > 3 {
			lines = append(lines, m.tabs())
		}
		lines = append(lines, m.paneLines(m.pane, m.rowsOf(m.pane))...)
	}
	for _, u := range m.now.Unobserved {
		if len(lines) < height && height > 8 {
			for len(lines) < height-len(m.now.Unobserved) {
				lines = append(lines, "")
			}
			lines = append(lines, m.style.faint.Render(fmt.Sprintf("not observed: %s: %s", u.What, printable(u.Reason))))
		}
	}
	return cut(lines, height)
}

func cut(lines []string, height int) []string { return lines[:min(len(lines), height)] }

// rowsOf is how many rows a pane has room for, below its head. It depends on the size
// of the terminal alone, and on how many reactors and disks there are.
func (m *topModel) rowsOf(pane int) int {
	body := m.height - 2
	if m.height < topTall {
		if body > 3 {
			body-- // the tabs
		}
		if body > 7 && m.now != nil {
			body -= len(m.now.Unobserved)
		}
		return max(body-1, 1)
	}
	room := body - 3*2 - 2 // titles and heads, lines between
	reactors, disks := 1, 1
	if m.now != nil {
		room -= len(m.now.Unobserved)
		reactors, disks = max(len(m.now.Reactors), 1), max(len(m.now.Disks), 1)
	}
	reactors, disks = min(reactors, room/4), min(disks, room/4)
	return []int{max(room-reactors-disks, 1), max(reactors, 1), max(disks, 1)}[pane]
}

// tabs names the panes with how much is in each; the one that is shown stands in brackets.
func (m *topModel) tabs() string {
	var parts []string
	for pane := range paneCount {
		parts = append(parts, m.paneTitle(pane))
	}
	return strings.Join(parts, " ")
}

func (m *topModel) paneTitle(pane int) string {
	of := len(m.rows(pane))
	text := fmt.Sprintf("%d %s", of, paneNames[pane])
	if of == 1 {
		text = strings.TrimSuffix(text, "s")
	}
	if pane == m.pane {
		return m.style.title.Render("[" + text + "]")
	}
	return m.style.faint.Render(" " + text + " ")
}

// paneLines is the head of a pane and its rows, at most room of them.
func (m *topModel) paneLines(pane, room int) []string {
	columns, w := paneColumns[pane], widths(paneColumns[pane], m.width)
	p := &m.panes[pane]
	var head strings.Builder
	for i, c := range columns {
		if w[i] == 0 {
			continue
		}
		title := c.title
		if i == p.sort {
			mark := "▼"
			if c.up != p.reverse {
				mark = "▲"
			}
			title = ansi.Truncate(title, w[i]-1, "") + mark
		}
		head.WriteString(" " + fit(title, w[i], c.left))
	}
	lines := []string{m.style.head.Render(fill(head.String(), m.width))}
	rows := m.rows(pane)
	at := m.cursor(pane, rows)
	p.index = at
	p.first = min(max(p.first, at-room+1), at)
	p.first = max(min(p.first, len(rows)-room), 0)
	for n := p.first; n < min(p.first+room, len(rows)); n++ {
		var line strings.Builder
		for i, c := range columns {
			if w[i] == 0 {
				continue
			}
			before := " "
			if n == at && pane == m.pane && line.Len() == 0 {
				before = "▸"
			}
			cell := rows[n].cells[i]
			if pane == paneReactors && i == len(columns)-1 {
				r := m.reactor(rows[n].key)
				cell = bar(r.Busy, r.Idle, w[i])
			}
			line.WriteString(before + fit(cell, w[i], c.left))
		}
		text := fill(line.String(), m.width)
		if n == at && pane == m.pane {
			text = m.style.chosen.Render(text)
		}
		lines = append(lines, text)
	}
	if len(rows) == 0 {
		lines = append(lines, m.style.faint.Render(" "+m.nothing(pane)))
	}
	for len(lines) < room+1 {
		lines = append(lines, "")
	}
	return lines
}

// nothing says why a pane is empty.
func (m *topModel) nothing(pane int) string {
	if m.filter != "" {
		return "nothing matches /" + m.filter
	}
	for _, u := range m.now.Unobserved {
		if u.What == paneNames[pane] {
			return "not observed: " + printable(u.Reason)
		}
	}
	return "no " + paneNames[pane]
}

func (m *topModel) reactor(key string) *report.Reactor {
	for i := range m.now.Reactors {
		if count(m.now.Reactors[i].Index) == key {
			return &m.now.Reactors[i]
		}
	}
	return new(report.Reactor)
}

// detailLines is one volume, as `ashlar why` shows it, in the width there is.
func (m *topModel) detailLines() []string {
	if m.now == nil {
		return nil
	}
	for i := range m.now.Volumes {
		v := &m.now.Volumes[i]
		if volumeKey(v) == m.detail {
			return m.whyLines(report.Explain(m.now, v))
		}
	}
	return []string{"", "this volume is gone: esc goes back"}
}

func (m *topModel) whyLines(r *report.Report) []string {
	r.Volume = printable(r.Volume)
	lines := []string{""}
	wrap := func(text, indent string) {
		first := ""
		for _, l := range strings.Split(ansi.Wrap(text, max(m.width-len(indent), 10), ""), "\n") {
			lines = append(lines, first+l)
			first = indent
		}
	}
	for _, l := range whySummary(r) {
		wrap(l, "  ")
	}
	lines = append(lines, "")
	for _, l := range whyCauses(r) {
		wrap(printable(l), "  ")
	}
	for _, t := range whyTables(r, m.width) {
		var b strings.Builder
		_ = t.write(&b) // a builder takes everything
		lines = append(lines, "")
		for i, l := range strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n") {
			if i == 0 {
				l = m.style.head.Render(l)
			}
			lines = append(lines, l)
		}
	}
	return lines
}

// whyTables is the stages of a report in as many tables as the width takes, at least
// one kind of request in each.
func whyTables(r *report.Report, width int) []*table {
	const stage, operation = 22, 4*9 + 2 // cells that the columns take at most
	each := max((width-stage)/operation, 1)
	var tables []*table
	for operations := whyOperations(r); len(operations) > 0; {
		n := min(each, len(operations))
		tables = append(tables, whyTable(r, operations[:n]))
		operations = operations[n:]
	}
	return tables
}

// topKeys is the help.
var topKeys = []string{
	"",
	" tab, shift+tab, 1 2 3   volumes, reactors, disks",
	" ↑ ↓ pgup pgdn home end  move",
	" enter                   where the time of a volume's requests goes; esc: back",
	" s, S                    sort by the next, the last column",
	" r                       turn the order",
	" /                       filter by name or pool; esc: all",
	" p, space                pause",
	" q, ctrl+c               quit",
	"",
	" P50, P99   latency of half, of 99 % of the requests, from arrival to reply",
	" FLIGHT     requests in flight now",
	" SPIN       how long a reactor without work polls before it sleeps",
	" SERVICE    of a reactor: the service time of devices that SPIN was learned from",
	" STOLEN     time in which a reactor had work and another thread had its CPU",
	" WAKE P99   from being woken to running",
	" Q P99      of a disk: waiting in the kernel's queue; FL P99: its flushes",
}
