package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/charmbracelet/lipgloss"
	"github.com/charmbracelet/x/ansi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// screen drives a model of the live view without a terminal.
type screen struct {
	t testing.TB
	m *topModel
	n uint64 // samples taken
}

func newScreen(t testing.TB, width, height int) *screen {
	s := &screen{t: t, m: newTopModel("unix:///run/ashlar/control.sock", time.Second, nil, lipgloss.NewRenderer(io.Discard))}
	s.m.Update(tea.WindowSizeMsg{Width: width, Height: height})
	return s
}

// sample is another answer, of two seconds later.
func (s *screen) sample(change ...func(*controlpb.StatsResponse)) *screen {
	r := fakeNode(3600+2*s.n, true)
	for _, c := range change {
		c(r)
	}
	s.answer(r, nil)
	return s
}

func (s *screen) answer(r *controlpb.StatsResponse, err error) {
	_, next := s.m.Update(sampleMsg{r, err, day.Add(time.Hour + 2*time.Duration(s.n)*time.Second)})
	if s.n++; next == nil {
		s.t.Error("after an answer nothing waits for the next interval")
	}
}

// press presses keys, by the names that bubbletea has for them.
func (s *screen) press(keys ...string) *screen {
	special := map[string]tea.KeyType{
		"tab": tea.KeyTab, "shift+tab": tea.KeyShiftTab, "enter": tea.KeyEnter, "esc": tea.KeyEsc, "up": tea.KeyUp, "down": tea.KeyDown, "left": tea.KeyLeft,
		"right": tea.KeyRight, "pgup": tea.KeyPgUp, "pgdown": tea.KeyPgDown, "home": tea.KeyHome, "end": tea.KeyEnd, "backspace": tea.KeyBackspace, "ctrl+c": tea.KeyCtrlC,
	}
	for _, k := range keys {
		if kind, ok := special[k]; ok {
			s.m.Update(tea.KeyMsg{Type: kind})
			continue
		}
		kind := tea.KeyRunes
		if k == " " {
			kind = tea.KeySpace
		}
		s.m.Update(tea.KeyMsg{Type: kind, Runes: []rune(k)})
	}
	return s
}

// view is the screen as lines, after a look at its size.
func (s *screen) view() []string {
	s.t.Helper()
	lines := strings.Split(s.m.View(), "\n")
	if len(lines) != s.m.height {
		s.t.Errorf("%d lines on a terminal of %d", len(lines), s.m.height)
	}
	for i, l := range lines {
		if w := ansi.StringWidth(l); w != s.m.width {
			s.t.Errorf("line %d has %d cells on a terminal of %d: %q", i+1, w, s.m.width, l)
		}
	}
	return lines
}

func (s *screen) shows(text string) {
	s.t.Helper()
	if v := strings.Join(s.view(), "\n"); !strings.Contains(v, text) {
		s.t.Errorf("the screen lacks %q:\n%s", text, v)
	}
}

func (s *screen) hides(text string) {
	s.t.Helper()
	if v := strings.Join(s.view(), "\n"); strings.Contains(v, text) {
		s.t.Errorf("the screen has %q:\n%s", text, v)
	}
}

func noDisks(r *controlpb.StatsResponse) {
	r.Disks = nil
	r.Unobserved = append(r.Unobserved, &controlpb.Unobserved{What: "disks", Reason: "no permission to load eBPF programs (CAP_BPF)"})
	for _, k := range r.Reactors {
		k.OffCpu, k.Wakeup = nil, nil
	}
}

// TestTopScreens compares screens with those in testdata/top; -rewrite renews them.
// The bars at the end of lines are the terminal's edge.
func TestTopScreens(t *testing.T) {
	errAway := control.Errorf(control.ErrUnavailable, "", "", "cannot reach the daemon at unix:///run/ashlar/control.sock: is `ashlar serve` running?")
	for name, draw := range map[string]func() *screen{
		"begin":          func() *screen { return newScreen(t, 80, 24) },
		"since-start":    func() *screen { return newScreen(t, 80, 24).sample() },
		"volumes-80x24":  func() *screen { return newScreen(t, 80, 24).sample().sample().sample().sample() },
		"volumes-120x40": func() *screen { return newScreen(t, 120, 40).sample().sample().sample() },
		"volumes-20x5":   func() *screen { return newScreen(t, 20, 5).sample().sample() },
		"reactors-80x24": func() *screen { return newScreen(t, 80, 24).sample().sample().press("2") },
		"disks-80x24":    func() *screen { return newScreen(t, 80, 24).sample().sample().press("3") },
		"unobserved":     func() *screen { return newScreen(t, 80, 24).sample(noDisks).sample(noDisks).press("3") },
		"unobserved-120x40": func() *screen {
			return newScreen(t, 120, 40).sample(noDisks).sample(noDisks)
		},
		"detail-80x24":  func() *screen { return newScreen(t, 80, 24).sample().sample().press("enter") },
		"detail-120x40": func() *screen { return newScreen(t, 120, 40).sample().sample().press("down", "up", "enter") },
		"detail-20x5":   func() *screen { return newScreen(t, 20, 5).sample().sample().press("enter") },
		"help-80x24":    func() *screen { return newScreen(t, 80, 24).sample().press("?") },
		"filter-80x24":  func() *screen { return newScreen(t, 80, 24).sample().sample().press("/", "v", "M") },
		"paused-80x24":  func() *screen { return newScreen(t, 80, 24).sample().sample().press("p").sample() },
		"away-80x24": func() *screen {
			s := newScreen(t, 80, 24).sample().sample()
			s.answer(nil, errAway)
			s.answer(nil, errAway)
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got strings.Builder
			for _, l := range draw().view() {
				got.WriteString(l + "|\n")
			}
			path := filepath.Join("testdata", "top", name+".screen")
			if *rewrite {
				if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got.String(), want)
			}
		})
	}
}

func TestTopComesBackAfterTheDaemon(t *testing.T) {
	s := newScreen(t, 80, 24).sample().sample()
	s.answer(nil, errors.New("no\x1b[31m answer"))
	s.shows("daemon away for 0s: no?[31m answer")
	s.shows("vm1") // what was seen last stays
	s.answer(nil, errors.New("no answer"))
	s.shows("daemon away for 2s")
	again := func(r *controlpb.StatsResponse) { r.Started = timestamppb.New(day.Add(59 * time.Minute)) }
	s.sample(again).shows("since its start")
	s.hides("away")
	s.sample(again).shows("2 s")
	s.hides("since its start")
}

func TestTopPauseKeepsTheScreen(t *testing.T) {
	s := newScreen(t, 80, 24).sample().sample()
	before := s.view()[2:]
	s.press("p")
	s.shows("PAUSED")
	s.sample(func(r *controlpb.StatsResponse) { r.Volumes[0].Name = "other" })
	if after := s.view()[2:]; fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("the screen went on:\n%s", strings.Join(after, "\n"))
	}
	s.press(" ").sample().shows("4 s") // what went by meanwhile is in the next
	s.hides("PAUSED")
}

func TestTopSortsFiltersAndMoves(t *testing.T) {
	first := func(s *screen) string { return strings.TrimPrefix(strings.Fields(s.view()[3])[0], "▸") }
	s := newScreen(t, 80, 24).sample().sample()
	if got := first(s); got != "vm1" {
		t.Errorf("by IOPS: %q", got)
	}
	s.press("home", "r")
	if got := first(s); got != "disk.img" {
		t.Errorf("by IOPS, turned: %q", got)
	}
	s.press("S", "S", "S") // by name
	s.shows("VOLUME▲")
	if got := first(s); got != "disk.img" {
		t.Errorf("by name: %q", got)
	}
	s.press("S") // around: by what the sparkline shows
	if got := first(s); got != "vm2" {
		t.Errorf("by p99: %q", got)
	}
	s.shows("▸vm1") // the cursor stays with its volume
	s.press("home")
	s.shows("▸vm2")
	s.press("end", "up")
	s.shows("▸データ")
	s.press("pgdown", "pgup", "down")
	s.shows("▸vm1")
	s.press("/", "c", "e", "x", "backspace", "l", "enter")
	s.shows("データ-große")
	s.hides("vm1")
	s.press("enter")
	s.shows("in pool cellar")
	s.press("esc", "esc")
	s.shows("vm1")
	s.press("/", "z", "enter")
	s.shows("nothing matches /z")
	s.press("enter", "down", "/", "esc") // nothing to enter, nowhere to move
	s.shows("vm1")
	s.press("tab")
	s.shows("[2 reactors]")
	s.press("enter", "tab", "right", "left")
	s.shows("[3 disks]")
	s.press("shift+tab", "1")
	s.shows("[4 volumes]")
	s.press("?")
	s.shows("sort by the next")
	s.press("x")
	s.hides("sort by the next")
}

func TestTopDetailScrollsAndOutlivesItsVolume(t *testing.T) {
	s := newScreen(t, 80, 12).sample().sample().press("enter")
	s.shows("vm1 in pool tank")
	s.press("pgdown", "pgdown", "pgdown", "pgdown", "pgdown", "down", "down")
	s.shows("FLUSH P50")
	s.press("pgup", "up", "home")
	s.shows("vm1 in pool tank")
	s.sample(func(r *controlpb.StatsResponse) { r.Volumes = r.Volumes[1:] })
	s.shows("this volume is gone")
	s.press("left").shows("vm2")
}

func TestTopShowsNoLatencyOfWhatDidNothing(t *testing.T) {
	s := newScreen(t, 80, 24).sample(func(r *controlpb.StatsResponse) { r.Volumes = nil; r.Reactors = nil; r.Disks = nil })
	s.shows("no volumes")
	s.press("2").shows("no reactors")
	s = newScreen(t, 80, 24)
	s.answer(fakeNode(3600, false), nil)
	s.answer(fakeNode(3602, false), nil)
	s.shows("-")
}

// TestTopKeepsItsShape: whatever happens on whatever terminal, every line is as wide
// as it, and there are as many as it has.
func TestTopKeepsItsShape(t *testing.T) {
	keys := []string{"tab", "shift+tab", "enter", "esc", "up", "down", "pgup", "pgdown", "home", "end", "s", "S", "r", "/", "p", "?", "1", "2", "3", "v", "データ", "backspace", " ", "x"}
	rapid.Check(t, func(rt *rapid.T) {
		s := newScreen(t, rapid.IntRange(1, 200).Draw(rt, "width"), rapid.IntRange(1, 60).Draw(rt, "height"))
		for range rapid.IntRange(0, 25).Draw(rt, "steps") {
			switch rapid.IntRange(0, 5).Draw(rt, "kind") {
			case 0:
				s.m.Update(tea.WindowSizeMsg{Width: rapid.IntRange(0, 200).Draw(rt, "width"), Height: rapid.IntRange(0, 60).Draw(rt, "height")})
			case 1:
				n := rapid.IntRange(0, 60).Draw(rt, "volumes")
				s.sample(func(r *controlpb.StatsResponse) {
					for i := range n {
						r.Volumes = append(r.Volumes, &controlpb.VolumeStats{Name: rapid.String().Draw(rt, "name"), Pool: fmt.Sprint("pool", i)})
					}
				})
			case 2:
				s.answer(nil, errors.New(rapid.String().Draw(rt, "error")))
			default:
				s.press(rapid.SampledFrom(keys).Draw(rt, "key"))
			}
			s.view()
			if t.Failed() {
				rt.FailNow()
			}
		}
	})
}

// TestTopShowsTheDisksOfPoolsFirst, whatever they are sorted by.
func TestTopShowsTheDisksOfPoolsFirst(t *testing.T) {
	other := func(r *controlpb.StatsResponse) {
		r.Disks = r.Disks[:1]
		r.Disks = append(r.Disks, &controlpb.DiskStats{Name: "loop0", Major: 7, Operations: []*controlpb.DiskOperationStats{
			{Operation: "read", Count: 1e6 * uint64(r.GetTime().AsTime().Sub(day).Seconds())},
		}})
	}
	s := newScreen(t, 80, 24).sample(other).sample(other).press("3")
	for range diskColumns {
		for range 2 {
			if l := s.view()[3]; !strings.HasPrefix(l, "▸nvme0n1") {
				t.Errorf("the first is %q", l)
			}
			s.press("r")
		}
		s.press("s")
	}
	s.sample(func(r *controlpb.StatsResponse) { r.Disks = r.Disks[:1] }).shows("[1 disk]")
}

func TestTopQuits(t *testing.T) {
	for _, key := range []tea.KeyMsg{{Type: tea.KeyRunes, Runes: []rune("q")}, {Type: tea.KeyCtrlC}} {
		s := newScreen(t, 80, 24).sample()
		if _, c := s.m.Update(key); c == nil || c() != (tea.QuitMsg{}) || s.m.View() != "" {
			t.Errorf("%v does not quit", key)
		}
	}
	s := newScreen(t, 80, 24).press("/", "q")
	if s.m.quitting || s.m.filter != "q" {
		t.Error("a letter of the filter quits")
	}
}

func TestTopAsksAgainAfterEachInterval(t *testing.T) {
	asked := 0
	m := newTopModel("x", time.Millisecond, func() (*controlpb.StatsResponse, error) { asked++; return fakeNode(1, true), nil }, lipgloss.NewRenderer(io.Discard))
	msg := m.Init()()
	_, tick := m.Update(msg)
	_, again := m.Update(tick())
	if again == nil || asked != 1 {
		t.Fatalf("asked %d times", asked)
	}
	if _, ok := again().(sampleMsg); !ok || asked != 2 {
		t.Errorf("asked %d times", asked)
	}
}

func TestCellsOfTop(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 99_999: "99999", 100_000: "100k", 999_400: "999k", 999_600: "1.0M", 1.25e6: "1.2M", 250e6: "250M"} {
		if got := short(v); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
	for _, tt := range []struct {
		values []float64
		width  int
		want   string
	}{
		{nil, 3, "   "}, {[]float64{1, 2, 4, 8}, 4, "▂▃▅█"}, {[]float64{5}, 3, "  █"}, {[]float64{0, 0}, 2, "  "}, {[]float64{9, 1, 1}, 2, "██"}, {[]float64{1}, 0, ""},
	} {
		if got := sparkline(tt.values, tt.width); got != tt.want {
			t.Errorf("%v in %d is %q, want %q", tt.values, tt.width, got, tt.want)
		}
	}
	if got := bar(0.5, 0.25, 8); got != "████░░  " {
		t.Errorf("%q", got)
	}
	if got := bar(1.2, 1, 4); got != "████" {
		t.Errorf("%q", got)
	}
	if got := fit("データ", 4, true); got != "デ… " && got != "デー" && ansi.StringWidth(got) != 4 {
		t.Errorf("%q", got)
	}
	if got := printable("a\x1b[2Jb\u202ec\n"); got != "a?[2Jb?c?" {
		t.Errorf("%q", got)
	}
	for d, want := range map[time.Duration]string{-1: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 3 * time.Hour: "3h00m", 50 * time.Hour: "2d02h"} {
		if got := age(d); got != want {
			t.Errorf("%v is %q", d, got)
		}
	}
}

// TestTopCutsWhatGrowsWhereItIsCut: U+FE0F makes the letter before it wide.
func TestTopCutsWhatGrowsWhereItIsCut(t *testing.T) {
	for _, text := range []string{" \ufe0f? and more", "1\ufe0f\u20e3\ufe0f\ufe0f x", "\ufe0f\ufe0f\ufe0f"} {
		for width := range 6 {
			if w := ansi.StringWidth(fill(text, width)); w != width {
				t.Errorf("%q is %d wide, want %d", text, w, width)
			}
		}
	}
}
