package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/engine/enginetest"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestExportRefusesARuleForNoExport: a mistyped name would leave the export that was
// meant open to every client.
func TestExportRefusesARuleForNoExport(t *testing.T) {
	checkLeaks(t)
	sources := []Source{{Name: "a", Memory: mib}, {Name: "b", Memory: mib}}
	for rule, want := range map[string]string{"typo": "--tls-allow typo=host-a: no export", "A": "A=host-a", "a": "", "b": "", "": ""} {
		c := ExportConfig{Sources: sources, ClientNames: map[string][]string{rule: {"host-a"}, "a": {"host-a"}}, Log: quiet()}
		e, err := StartExport(c)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", rule, err)
		}
		if err == nil {
			if err := e.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestExportRefusesOneFileTwice: two that write one file know nothing of each other.
func TestExportRefusesOneFileTwice(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	file, other := testenv.SparseFile(t, filepath.Join(dir, "f.img"), mib), testenv.SparseFile(t, filepath.Join(dir, "g.img"), mib)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		second   string
		readOnly bool
		want     string
	}{
		{file, false, "export b: " + file + " is exported as a already"},
		{link, false, "export b: " + link + " is exported as a already"},
		{file, true, ""},
		{other, false, ""},
	} {
		e, err := StartExport(ExportConfig{Sources: []Source{{Name: "a", Path: file}, {Name: "b", Path: c.second}}, ReadOnly: c.readOnly, Log: quiet()})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
		if err == nil {
			if err := e.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestServeTellsOfRulesForNoVolume at its start; the volumes and snapshots there are
// can be called in each of their ways.
func TestServeTellsOfRulesForNoVolume(t *testing.T) {
	fake := &enginetest.Fake{}
	t.Cleanup(func() {
		if err := fake.Close(); err != nil {
			t.Error(err)
		}
	})
	var log testenv.Output
	rules := []string{"v", "default/v", "v@s", "default/v@s"}
	n := newNode(t, fake, func(c *ServeConfig) {
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
		c.ClientNames = map[string][]string{"": {"everyone"}, "typo": {"host-a"}}
		for _, rule := range rules {
			c.ClientNames[rule] = []string{"host-a"}
		}
	})
	warned := func(rule string, text string) bool {
		return strings.Contains(text, "level=WARN") && strings.Contains(text, "--tls-allow "+rule+"=host-a")
	}
	text := log.Take()
	for _, rule := range append(rules, "typo") {
		if !warned(rule, text) {
			t.Errorf("nothing of %s while there are no volumes:\n%s", rule, text)
		}
	}
	n.volume("v", mib)
	if _, err := n.client.Snapshots.Create(t.Context(), &controlpb.CreateSnapshotRequest{Volume: "v", Name: "s"}); err != nil {
		t.Fatal(err)
	}
	n.stop()
	log.Take()
	n.start()
	text = log.Take()
	if !warned("typo", text) || strings.Count(text, "--tls-allow") != 1 {
		t.Errorf("of one rule for nothing:\n%s", text)
	}
}
