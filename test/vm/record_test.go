package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// recordVariable names a folder, benchmarks/results/records for one, that what
// devices.sh measures is written to; a path that is not absolute begins at the top of
// the repository. docs/internals/testing.md says how it is used.
const recordVariable = "ASHLAR_TEST_RECORD"

// recordFolder is that folder, "" when nothing is recorded.
func recordFolder(t *testing.T) string {
	folder := os.Getenv(recordVariable)
	if folder == "" || filepath.IsAbs(folder) {
		return folder
	}
	folder, err := filepath.Abs(filepath.Join("../..", folder))
	if err != nil {
		t.Fatal(err)
	}
	return folder
}

// record is a measurement, in the form that `make results` reads.
type record struct {
	Name     string    `json:"name"`
	Measured float64   `json:"measured"`
	Spread   float64   `json:"spread"` // (max - min) / median; 0: measured once
	Host     string    `json:"host"`
	Commit   string    `json:"commit"`
	Date     time.Time `json:"date"`
	Note     string    `json:"note,omitempty"`
}

// figuresOf reads the lines "FIGURE NAME NUMBER" of what a script said.
func figuresOf(t *testing.T, said string) map[string][]float64 {
	t.Helper()
	figures := map[string][]float64{}
	for _, line := range regexp.MustCompile(`(?m)^FIGURE (\S+) (.*)$`).FindAllStringSubmatch(said, -1) {
		number, err := strconv.ParseFloat(strings.TrimSpace(line[2]), 64)
		if err != nil {
			t.Fatalf("%q: %v", line[0], err)
		}
		figures[line[1]] = append(figures[line[1]], number)
	}
	return figures
}

// newRecord is the record of figures, of which the largest counts, measured with
// bin/ashlar.
func newRecord(t *testing.T, name, note string, figures []float64) record {
	t.Helper()
	if len(figures) == 0 {
		t.Fatalf("nothing was measured for %s", name)
	}
	out, err := exec.Command(binaryPath, "version", "--output", "json").Output()
	var built struct{ Version, Commit string }
	if err == nil {
		err = json.Unmarshal(out, &built)
	}
	if err != nil {
		t.Fatalf("%s version: %v", binaryPath, err)
	}
	if strings.HasSuffix(built.Version, "-dirty") { // as the Makefile marks it
		built.Commit += "-dirty"
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return record{
		Name: name, Measured: rounded(slices.Max(figures)), Spread: rounded(spread(figures)),
		Host: host, Commit: built.Commit, Date: time.Now().UTC().Truncate(time.Minute), Note: note,
	}
}

// rounded keeps a thousandth.
func rounded(x float64) float64 {
	x, _ = strconv.ParseFloat(strconv.FormatFloat(x, 'f', 3, 64), 64) // it was just written
	return x
}

// spread is the distance of the extremes in medians.
func spread(figures []float64) float64 {
	sorted := slices.Sorted(slices.Values(figures))
	median := (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
	if median == 0 {
		return 0
	}
	return (sorted[len(sorted)-1] - sorted[0]) / median
}

// writeRecord writes a record as folder/NAME.json. A claim is about devices whatever
// their driver: a worse record of the same commit and host, as of another driver, stays.
func writeRecord(folder string, r record) error {
	path := filepath.Join(folder, r.Name+".json")
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		var old record
		if err := json.Unmarshal(text, &old); err != nil {
			return fmt.Errorf("%s: %w; remove it to write it anew", path, err)
		}
		if old.Commit == r.Commit && old.Host == r.Host && old.Note != r.Note && old.Measured > r.Measured {
			return nil
		}
	}
	if text, err = json.MarshalIndent(r, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func TestRecordsKeepTheWorseOfOneCommit(t *testing.T) {
	folder := t.TempDir()
	at := time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC)
	for _, step := range []struct {
		r    record
		want string // the note of the record afterwards
	}{
		{record{Measured: 0.7, Commit: "a", Note: "nbd"}, "nbd"},
		{record{Measured: 0.2, Commit: "a", Note: "ublk"}, "nbd"},
		{record{Measured: 0.6, Commit: "a", Note: "nbd"}, "nbd"}, // measured again
		{record{Measured: 0.9, Commit: "a", Note: "fuse"}, "fuse"},
		{record{Measured: 0.1, Commit: "b", Note: "ublk"}, "ublk"},
	} {
		step.r.Name, step.r.Host, step.r.Date = "attach-memory", "vm", at
		if err := writeRecord(folder, step.r); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(folder, "attach-memory.json"))
		if err != nil {
			t.Fatal(err)
		}
		var got record
		if err := json.Unmarshal(text, &got); err != nil || got.Note != step.want || got.Note == step.r.Note && got != step.r {
			t.Errorf("after %+v: %s, %v", step.r, text, err)
		}
	}
	path := filepath.Join(folder, "attach-time.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeRecord(folder, record{Name: "attach-time"}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a broken record: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeRecord(folder, record{Name: "attach-time"}); err == nil {
		t.Error("a record that is a folder was written")
	}
	if err := writeRecord(filepath.Join(folder, "nowhere"), record{Name: "run"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("into a folder that is not there: %v", err)
	}
}

func TestFiguresAreReadFromWhatAScriptSays(t *testing.T) {
	figures := figuresOf(t, "ext4: 3 times\nFIGURE pause 0.25\nFIGURE pause 1.5\nNOFIGURE pause 3\nFIGURE pause 0.5\nFIGURE memory 0.75\n")
	if want := []float64{0.25, 1.5, 0.5}; !slices.Equal(figures["pause"], want) || !slices.Equal(figures["memory"], []float64{0.75}) {
		t.Errorf("%v", figures)
	}
	if got := spread(figures["pause"]); got != 2.5 {
		t.Errorf("spread %v", got)
	}
	if spread([]float64{3}) != 0 || spread([]float64{0, 0}) != 0 {
		t.Error("one figure, and zeros, have a spread")
	}
}
