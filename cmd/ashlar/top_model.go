package main

import (
	"maps"
	"slices"
	"strings"
	"time"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/charmbracelet/lipgloss"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/report"
)

// historyMax is how many intervals a sparkline can show: as many as a wide terminal
// has columns for.
const historyMax = 120

// The panes.
const (
	paneVolumes = iota
	paneReactors
	paneDisks
	paneCount
)

// topModel is the state of the live view. Update changes it and View draws it, on one
// goroutine; what asks the daemon is a command of bubbletea, one at a time.
type topModel struct {
	address  string                                   // immutable
	interval time.Duration                            // immutable
	ask      func() (*controlpb.StatsResponse, error) // immutable
	style    topStyle                                 // immutable

	width, height int

	last    *controlpb.StatsResponse // what the next sample is compared with
	now     *report.Interval         // what is shown; nil until the first sample
	began   bool                     // now is since the daemon began
	away    error                    // why there was no answer; nil when there was
	since   time.Time                // when it went away
	at      time.Time                // of the last answer, or want of one
	history map[string][]float64     // p99 of each volume, oldest first, in seconds; 0: no requests

	pane     int
	panes    [paneCount]paneState
	filter   string
	typing   bool   // the filter is being typed
	detail   string // key of the volume that is shown; "": none
	scroll   int    // of the detail
	help     bool
	paused   bool
	quitting bool
}

// paneState is what the user has chosen in a pane.
type paneState struct {
	key     string // of the row under the cursor
	index   int    // of it, as it was drawn last
	first   int    // row at the top
	sort    int    // column
	reverse bool
}

// sampleMsg is an answer of the daemon, or the want of one.
type sampleMsg struct {
	response *controlpb.StatsResponse
	err      error
	at       time.Time
}

// tickMsg ends an interval.
type tickMsg struct{}

func newTopModel(address string, interval time.Duration, ask func() (*controlpb.StatsResponse, error), renderer *lipgloss.Renderer) *topModel {
	m := &topModel{address: address, interval: interval, ask: ask, style: newTopStyle(renderer), width: 80, height: 24, history: map[string][]float64{}}
	m.panes[paneVolumes].sort = columnOf(volumeColumns, "IOPS")
	m.panes[paneDisks].sort = columnOf(diskColumns, "DISK")
	return m
}

// Init implements tea.Model.
func (m *topModel) Init() tea.Cmd { return m.sample }

// sample asks the daemon. It runs beside Update.
func (m *topModel) sample() tea.Msg {
	r, err := m.ask()
	return sampleMsg{r, err, time.Now()}
}

// Update implements tea.Model.
func (m *topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = max(msg.Width, 1), max(msg.Height, 1)
	case sampleMsg:
		m.take(msg)
		return m, tea.Tick(m.interval, func(time.Time) tea.Msg { return tickMsg{} })
	case tickMsg:
		return m, m.sample
	case tea.KeyMsg:
		return m, m.key(msg)
	}
	return m, nil
}

// take takes in an answer. While it is paused the screen stays, and what comes in
// later is compared with what it shows.
func (m *topModel) take(msg sampleMsg) {
	m.at = msg.at
	if msg.err != nil {
		if m.away == nil {
			m.since = msg.at
		}
		m.away = msg.err
		return
	}
	m.away = nil
	if m.paused && m.now != nil {
		return
	}
	i, err := report.Between(m.last, msg.response)
	if err != nil { // restarted: what it did since then
		i, _ = report.Between(nil, msg.response) // fails for two samples only
		clear(m.history)
	}
	m.began = m.last == nil || err != nil
	m.last, m.now = msg.response, i
	seen := map[string]bool{}
	for n := range i.Volumes {
		v := &i.Volumes[n]
		seen[volumeKey(v)] = true
		if m.began { // a mean of hours is no point in a line of seconds
			continue
		}
		h := append(m.history[volumeKey(v)], v.Latency.Quantile(0.99).Seconds())
		m.history[volumeKey(v)] = h[max(len(h)-historyMax, 0):]
	}
	maps.DeleteFunc(m.history, func(key string, _ []float64) bool { return !seen[key] })
}

// volumeKey tells volumes of one name in two pools apart.
func volumeKey(v *report.Volume) string { return v.Pool + "/" + v.Name }

func (m *topModel) key(msg tea.KeyMsg) tea.Cmd {
	key := msg.String()
	if key == "ctrl+c" {
		m.quitting = true
		return tea.Quit
	}
	if m.typing {
		m.typeFilter(msg)
		return nil
	}
	switch {
	case key == "q":
		m.quitting = true
		return tea.Quit
	case key == "?" || key == "h":
		m.help = !m.help
	case m.help:
		m.help = false // any other key
	case key == "p" || key == " ":
		m.paused = !m.paused
	case m.detail != "":
		m.detailKey(key)
	default:
		m.paneKey(key)
	}
	return nil
}

func (m *topModel) detailKey(key string) {
	switch key {
	case "esc", "enter", "backspace", "left":
		m.detail, m.scroll = "", 0
	case "up", "k":
		m.scroll--
	case "down", "j":
		m.scroll++
	case "pgup":
		m.scroll -= m.height / 2
	case "pgdown":
		m.scroll += m.height / 2
	case "home", "g":
		m.scroll = 0
	}
	m.scroll = min(max(m.scroll, 0), max(len(m.detailLines())-1, 0))
}

func (m *topModel) paneKey(key string) {
	p := &m.panes[m.pane]
	columns := len(paneColumns[m.pane])
	switch key {
	case "tab", "right", "l":
		m.pane = (m.pane + 1) % paneCount
	case "shift+tab", "left":
		m.pane = (m.pane + paneCount - 1) % paneCount
	case "1", "2", "3":
		m.pane = int(key[0] - '1')
	case "up", "k":
		m.move(-1)
	case "down", "j":
		m.move(1)
	case "pgup":
		m.move(-m.rowsOf(m.pane))
	case "pgdown":
		m.move(m.rowsOf(m.pane))
	case "home", "g":
		m.move(-1 << 30)
	case "end", "G":
		m.move(1 << 30)
	case "s":
		p.sort, p.reverse = (p.sort+1)%columns, false
	case "S":
		p.sort, p.reverse = (p.sort+columns-1)%columns, false
	case "r":
		p.reverse = !p.reverse
	case "/":
		m.typing = true
	case "esc":
		m.filter = ""
	case "enter":
		if rows := m.rows(m.pane); m.pane == paneVolumes && len(rows) > 0 {
			m.detail, m.scroll = rows[m.cursor(m.pane, rows)].key, 0
		}
	}
}

// typeFilter takes a key while the filter is typed.
func (m *topModel) typeFilter(msg tea.KeyMsg) {
	switch msg.Type {
	case tea.KeyEnter:
		m.typing = false
	case tea.KeyEsc:
		m.typing, m.filter = false, ""
	case tea.KeyBackspace:
		if r := []rune(m.filter); len(r) > 0 {
			m.filter = string(r[:len(r)-1])
		}
	case tea.KeyRunes, tea.KeySpace:
		m.filter += printable(string(msg.Runes))
	}
}

// move moves the cursor by rows.
func (m *topModel) move(by int) {
	rows := m.rows(m.pane)
	if len(rows) == 0 {
		return
	}
	p := &m.panes[m.pane]
	p.index = min(max(m.cursor(m.pane, rows)+by, 0), len(rows)-1)
	p.key = rows[p.index].key
}

// cursor is the row under the cursor: the one it was on, or the one that took its place.
func (m *topModel) cursor(pane int, rows []row) int {
	p := &m.panes[pane]
	if p.key != "" {
		if i := slices.IndexFunc(rows, func(r row) bool { return r.key == p.key }); i >= 0 {
			return i
		}
	}
	return min(max(p.index, 0), max(len(rows)-1, 0))
}

// matches says whether something of these names passes the filter.
func (m *topModel) matches(names ...string) bool {
	return m.filter == "" || slices.ContainsFunc(names, func(n string) bool {
		return strings.Contains(strings.ToLower(n), strings.ToLower(m.filter))
	})
}
