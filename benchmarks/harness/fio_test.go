package harness

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFioReports(t *testing.T) {
	for _, c := range []struct {
		file string
		want Metrics
	}{
		{"fio-mixed.json", Metrics{IOPS: 2996242.574257, ReadIOPS: 2245133.663366, WriteIOPS: 751108.910891,
			BytesPerSecond: 12272609584, LatencyP50: 0.181, LatencyP99: 0.241, LatencyP999: 0.524}},
		{"fio-fsync.json", Metrics{IOPS: 38009.90099, WriteIOPS: 38009.90099, BytesPerSecond: 155688554,
			LatencyP50: 10.56, LatencyP99: 62.72, LatencyP999: 134.144, FlushP99: 43.776}},
		{"fio-gtod-reduce.json", Metrics{IOPS: 5034.482759, ReadIOPS: 5034.482759, BytesPerSecond: 20621241}},
	} {
		text, err := os.ReadFile(filepath.Join("testdata", c.file))
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseFio(text)
		if err != nil {
			t.Errorf("%s: %v", c.file, err)
			continue
		}
		if got.IOs == 0 || got.Seconds < 0.19 || got.Seconds > 0.25 {
			t.Errorf("%s: %d I/Os in %v s", c.file, got.IOs, got.Seconds)
		}
		got.IOs, got.Seconds = 0, 0
		for _, x := range [][2]float64{
			{got.IOPS, c.want.IOPS}, {got.ReadIOPS, c.want.ReadIOPS}, {got.WriteIOPS, c.want.WriteIOPS},
			{got.BytesPerSecond, c.want.BytesPerSecond}, {got.LatencyP50, c.want.LatencyP50},
			{got.LatencyP99, c.want.LatencyP99}, {got.LatencyP999, c.want.LatencyP999}, {got.FlushP99, c.want.FlushP99},
		} {
			if math.Abs(x[0]-x[1]) > 1e-6*math.Max(1, x[1]) {
				t.Errorf("%s: %+v, want %+v", c.file, got, c.want)
				break
			}
		}
	}
}

func TestBrokenFioReportsAreErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "not the JSON",
		"fio: connect: refused\n": "refused",
		"{\n":                     "not the JSON",
		"{\n\"jobs\": []}":        "no jobs",
		"{\n\"jobs\": [{\"jobname\": \"a\", \"error\": 84}]}": "error 84",
		"{\n\"jobs\": [{\"jobname\": \"a\", \"read\": {}}]}":  "did no I/O",
	} {
		if _, err := parseFio([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseFio(f *testing.F) {
	for _, name := range []string{"fio-mixed.json", "fio-fsync.json", "fio-gtod-reduce.json"} {
		text, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if m, err := parseFio(text); err == nil && m.IOs == 0 {
			t.Error("a report without I/O was taken")
		}
	})
}

func TestFioVersions(t *testing.T) {
	for version, want := range map[string]bool{"fio-3.33": true, "fio-3.27": true, "fio-3.16": false, "fio-2.99": false, "fio-4.0": true, "fio-master": true} {
		if fioVersionOK(version) != want {
			t.Errorf("%s: %v", version, !want)
		}
	}
}
