package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// fio is the flexible I/O tester. Its nbd engine fills a core at some 200k
// requests a second: above that it measures itself, see devperf.
type fio struct{}

func (fio) Name() string              { return "fio" }
func (fio) Program() (string, string) { return "fio", "fio" }
func (fio) VersionArgs() []string     { return []string{"--version"} }

func (fio) Check(c Case, t Target) error {
	switch t.Engine {
	case "nbd", "io_uring", "libaio":
		return nil
	}
	return fmt.Errorf("fio of Debian has no engine for %s; use --client qemu-img, for every peer", t.Engine)
}

// windowMin is the part of the runtime a run must have measured.
const windowMin = 0.9

// fioArgs point fio at a target. The engine stands before its options.
func fioArgs(t Target) []string {
	if t.Engine == "nbd" {
		return []string{"--ioengine=nbd", "--uri=" + t.URI}
	}
	// A colon separates file names for fio.
	return []string{"--ioengine=" + t.Engine, "--filename=" + strings.ReplaceAll(t.Path, ":", `\:`)}
}

func (fio) Run(ctx context.Context, job ClientJob) (Measured, error) {
	file, report := filepath.Join(job.Dir, "job.fio"), filepath.Join(job.Dir, "report.json")
	if err := os.WriteFile(file, []byte(job.Case.Render(job.Timing)), 0o600); err != nil {
		return Measured{}, fmt.Errorf("fio: %w", err)
	}
	argv := append([]string{"fio", "--output-format=json", "--output=" + report, "--eta=never"}, fioArgs(job.Target)...)
	_, started, ended, err := runClient(ctx, job, append(argv, file))
	if err != nil {
		return Measured{}, err
	}
	text, err := os.ReadFile(report)
	if err != nil {
		return Measured{}, fmt.Errorf("fio: %w", err)
	}
	m, err := parseFio(text)
	if err != nil {
		return Measured{}, err
	}
	out := Measured{Metrics: m}
	if want := job.Timing.Runtime.Seconds(); m.Seconds < want*windowMin {
		return Measured{}, fmt.Errorf("fio: measured %.2f s instead of %.2f s: the job lacks time_based=1, or was cut short", m.Seconds, want)
	}
	switch {
	case job.Timing.Runtime > 0:
		out.From, out.To = insideWindow(ended, m.Seconds)
	case !job.Case.verifies(): // else it has phases, and its I/Os are those of both
		out.From, out.To, out.Whole = started, ended, true
	}
	return out, nil
}

// fioReport is the part of fio's JSON that is read.
type fioReport struct {
	Jobs []struct {
		Name       string   `json:"jobname"`
		Error      int      `json:"error"`
		Read       fioStats `json:"read"`
		Write      fioStats `json:"write"`
		Mixed      fioStats `json:"mixed"`
		Sync       fioSync  `json:"sync"`
		JobRuntime uint64   `json:"job_runtime"`
	} `json:"jobs"`
}

type fioStats struct {
	IOs       uint64     `json:"total_ios"`
	IOPS      float64    `json:"iops"`
	Bandwidth float64    `json:"bw_bytes"`
	IOBytes   uint64     `json:"io_bytes"`
	RuntimeMS uint64     `json:"runtime"`
	Latency   fioLatency `json:"clat_ns"`
	Total     fioLatency `json:"lat_ns"`
}

type fioLatency struct {
	Mean        float64            `json:"mean"`
	Max         float64            `json:"max"`
	Percentiles map[string]float64 `json:"percentile"`
}

type fioSync struct {
	IOs     uint64     `json:"total_ios"`
	Latency fioLatency `json:"lat_ns"`
}

var errFioReport = errors.New("fio: the report is not the JSON it should be")

// parseFio reads a report of one case. Several jobs at once add up; their
// latencies are the worst job's, since percentiles cannot be joined.
func parseFio(text []byte) (Metrics, error) {
	// Messages of fio's engines come before the report.
	start := bytes.Index(text, []byte("{\n"))
	if start < 0 {
		return Metrics{}, fmt.Errorf("%w: %.200q", errFioReport, text)
	}
	var r fioReport
	if err := json.NewDecoder(bytes.NewReader(text[start:])).Decode(&r); err != nil {
		return Metrics{}, fmt.Errorf("%w: %w", errFioReport, err)
	}
	if len(r.Jobs) == 0 {
		return Metrics{}, fmt.Errorf("%w: no jobs", errFioReport)
	}
	var m Metrics
	for _, j := range r.Jobs {
		if j.Error != 0 {
			return Metrics{}, fmt.Errorf("fio: job %s ended with error %d", j.Name, j.Error)
		}
		if j.Read.IOs+j.Write.IOs == 0 {
			return Metrics{}, fmt.Errorf("fio: job %s did no I/O", j.Name)
		}
		m.IOs += j.Read.IOs + j.Write.IOs
		m.IOPS += j.Read.IOPS + j.Write.IOPS
		m.ReadIOPS += j.Read.IOPS
		m.WriteIOPS += j.Write.IOPS
		m.BytesPerSecond += j.Read.Bandwidth + j.Write.Bandwidth
		m.Seconds = max(m.Seconds, float64(max(j.Read.RuntimeMS, j.Write.RuntimeMS))/1e3)
		latency := j.Mixed.Latency.Percentiles
		if latency == nil && j.Write.IOs == 0 {
			latency = j.Read.Latency.Percentiles
		} else if latency == nil && j.Read.IOs == 0 {
			latency = j.Write.Latency.Percentiles
		}
		m.LatencyP50 = max(m.LatencyP50, latency["50.000000"]/1e3)
		m.LatencyP99 = max(m.LatencyP99, latency["99.000000"]/1e3)
		m.LatencyP999 = max(m.LatencyP999, latency["99.900000"]/1e3)
		m.LatencyMax = max(m.LatencyMax, j.Mixed.Latency.Max/1e3, j.Read.Latency.Max/1e3, j.Write.Latency.Max/1e3)
		m.BytesWritten += j.Write.IOBytes
		m.FlushP99 = max(m.FlushP99, j.Sync.Latency.Percentiles["99.000000"]/1e3)
	}
	return m, nil
}

// fioVersionOK tells a fio that has what the harness uses: unified_rw_reporting
// =both came with 3.27.
func fioVersionOK(version string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(version, "fio-%d.%d", &major, &minor); err != nil {
		return true // a build without a number; it will tell
	}
	return major > 3 || major == 3 && minor >= 27
}
