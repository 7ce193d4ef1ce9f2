package gate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Target is something promised that no run beside peers can show: it is measured by
// a test in a machine of its own, or pinned by one.
type Target struct {
	Name  string
	Claim string
	How   string  // the command that measures, or the tests that pin it
	Unit  string  // of Bound; "" where a test pins it
	Bound float64 // at most
}

// Targets are all targets.
var Targets = []Target{
	{Name: "allocations", Claim: "no allocation per request", How: "pinned by the tests named …Allocate… of datapath/devtest, nbd, nbd/remote, ublk"},
	{"attach-pause-ublk", "pause of a ublk device while a new binary takes over <= 1 s", "make test-vm", "s", 1},
	{"attach-pause-nbd", "pause of an nbd device while a new binary takes over <= 1 s", "make test-uml", "s", 1},
	{"attach-memory", "resident bytes of the daemon for each idle attached volume, of 250, <= 1 MiB", "make test-vm", "MiB", 1},
	{"attach-time", "attaching the 250th volume takes at most twice as long as the first", "make test-vm", "x", 2},
	{"run", "`make run` on a warm machine ends within 60 s", "make run", "s", 60},
}

// Record is one measurement of a target, stored as records/NAME.json.
type Record struct {
	Name     string    `json:"name"`
	Measured float64   `json:"measured"`
	Spread   float64   `json:"spread"` // (max - min) / median; 0: measured once
	Host     string    `json:"host"`
	Commit   string    `json:"commit"`
	Date     time.Time `json:"date"`
	Note     string    `json:"note,omitempty"`
}

// recordsFolder is where records stand, below the results.
const recordsFolder = "records"

// readRecords reads the records of all targets.
func readRecords(dir string) (map[string]Record, error) {
	records := map[string]Record{}
	for _, t := range Targets {
		path := filepath.Join(dir, recordsFolder, t.Name+".json")
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("records: %w", err)
		}
		var r Record
		if err := json.Unmarshal(text, &r); err != nil {
			return nil, fmt.Errorf("record %s: %w", path, err)
		}
		if r.Name != t.Name {
			return nil, fmt.Errorf("record %s: is of %q", path, r.Name)
		}
		records[t.Name] = r
	}
	return records, nil
}

// targetSection is the part of the page about targets.
func targetSection(records map[string]Record) string {
	var b strings.Builder
	b.WriteString("\n## Measured by tests\n\nWhat has no peer to stand beside. A record is a file in `records`.\n\n" +
		"| claim | measured | spread | verdict | host | commit | date | by |\n|---|---|---|---|---|---|---|---|\n")
	for _, t := range Targets {
		r, ok := records[t.Name]
		switch {
		case t.Unit == "":
			fmt.Fprintf(&b, "| %s | | | pinned | | | | %s |\n", t.Claim, t.How)
		case !ok:
			fmt.Fprintf(&b, "| %s | - | - | not measured | - | - | - | `%s` |\n", t.Claim, t.How)
		default:
			verdict := "pass"
			if r.Measured > t.Bound {
				verdict = "**miss**"
			}
			if r.Note != "" {
				verdict += ": " + r.Note
			}
			fmt.Fprintf(&b, "| %s | %.3g %s | %.0f %% | %s | %s | %s | %s | `%s` |\n", t.Claim, r.Measured, t.Unit, r.Spread*100,
				verdict, r.Host, r.Commit, r.Date.Format(time.DateOnly), t.How)
		}
	}
	return b.String()
}
