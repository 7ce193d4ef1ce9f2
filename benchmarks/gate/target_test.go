package gate

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTargetsShowWhatWasMeasured(t *testing.T) {
	dir := t.TempDir()
	folder := filepath.Join(dir, recordsFolder)
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, name+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("attach-pause-ublk", `{"name": "attach-pause-ublk", "measured": 0.25, "spread": 0.1, "host": "vm", "commit": "abc", "date": "2026-01-02T00:00:00Z"}`)
	write("attach-memory", `{"name": "attach-memory", "measured": 1.5, "host": "vm", "commit": "abc", "date": "2026-01-02T00:00:00Z", "note": "in an emulated machine"}`)
	records, err := readRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	section := targetSection(records)
	for _, want := range []string{
		"| 0.25 s | 10 % | pass | vm | abc | 2026-01-02 | `make test-vm` |",
		"| 1.5 MiB | 0 % | **miss**: in an emulated machine |", "not measured", "| pinned |",
	} {
		if !strings.Contains(section, want) {
			t.Errorf("no %q in\n%s", want, section)
		}
	}
	write("run", `{"name": "walk"}`)
	if _, err := readRecords(dir); err == nil || !strings.Contains(err.Error(), "walk") {
		t.Errorf("a record of another target: %v", err)
	}
	write("run", `{`)
	if _, err := Render(dir); err == nil {
		t.Error("a broken record was passed over")
	}
}

func TestChartsThatAreNotDrawnAnyMoreGo(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		drawn   map[string][]byte
		changed bool
	}{
		{map[string][]byte{"a.svg": []byte("1"), "b.svg": []byte("2")}, true},
		{map[string][]byte{"a.svg": []byte("1"), "b.svg": []byte("2")}, false},
		{map[string][]byte{"a.svg": []byte("3")}, true},
		{nil, true},
		{nil, false},
	} {
		if changed, err := renderCharts(dir, test.drawn); err != nil || changed != test.changed {
			t.Errorf("%d charts: changed %v, %v", len(test.drawn), changed, err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, chartsFolder, "*.svg")); len(left) != len(test.drawn) {
			t.Errorf("%d charts left of %d", len(left), len(test.drawn))
		}
	}
}
