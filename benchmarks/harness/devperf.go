package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/ashlar-storage/ashlar/benchmarks/internal/load"
)

// devperf is the batching client, benchmarks/devperf. It is looked for beside
// the running binary, then in PATH.
type devperf struct {
	once sync.Once
	path string
}

func (*devperf) Name() string              { return "devperf" }
func (*devperf) Program() (string, string) { return "", "" }
func (*devperf) VersionArgs() []string     { return nil }

func (d *devperf) find() (string, error) {
	d.once.Do(func() {
		if self, err := os.Executable(); err == nil {
			beside := filepath.Join(filepath.Dir(self), "devperf")
			if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
				d.path = beside
				return
			}
		}
		d.path, _ = exec.LookPath("devperf") // absence is reported below
	})
	if d.path == "" {
		return "", &MissingError{Program: "devperf", Remedy: "go build -o bin/devperf ./benchmarks/devperf, beside the ashlar binary"}
	}
	return d.path, nil
}

func (d *devperf) Check(c Case, t Target) error {
	if t.Engine != "nbd" {
		return fmt.Errorf("devperf speaks NBD only, not %s; use --client fio", t.Engine)
	}
	if _, err := c.Load(); err != nil {
		return err
	}
	_, err := d.find()
	return err
}

func (d *devperf) args(l Load, job ClientJob) []string {
	return []string{
		"--json", "--uri", job.Target.URI, "--op", l.RW, "--read-percent", strconv.Itoa(l.ReadPercent),
		"--block", strconv.FormatUint(l.BlockBytes, 10), "--depth", strconv.Itoa(l.Depth),
		"--connections", strconv.Itoa(l.Jobs), "--flush-every", strconv.Itoa(l.FlushEvery),
		"--ramp", job.Timing.Ramp.String(), "--runtime", job.Timing.Runtime.String(),
	}
}

func (d *devperf) Run(ctx context.Context, job ClientJob) (Measured, error) {
	path, err := d.find()
	if err != nil {
		return Measured{}, err
	}
	l, err := job.Case.Load()
	if err != nil {
		return Measured{}, err
	}
	output, _, _, err := runClient(ctx, job, append([]string{path}, d.args(l, job)...))
	if err != nil {
		return Measured{}, err
	}
	var r load.Report
	if err := json.NewDecoder(bytes.NewReader(output)).Decode(&r); err != nil {
		return Measured{}, fmt.Errorf("devperf: report: %w", err)
	}
	return Measured{
		From: r.WindowStart, To: r.WindowEnd,
		Metrics: Metrics{
			IOs: r.IOs, Seconds: r.Seconds, IOPS: r.IOPS, BytesPerSecond: r.BytesPerSecond,
			ReadIOPS: r.Ops["read"].IOPS, WriteIOPS: r.Ops["write"].IOPS,
			LatencyP50: r.LatencyP50, LatencyP99: r.LatencyP99, LatencyP999: r.LatencyP999,
			FlushP99: r.Ops["flush"].LatencyP99,
		},
	}, nil
}
