package harness

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// qemuImg is `qemu-img bench`: the one client at hand that speaks NBD and iSCSI.
// It runs a number of requests, not a time, at consecutive offsets, and reports
// no latencies. A first short run finds how many fill the runtime.
type qemuImg struct{}

func (qemuImg) Name() string              { return "qemu-img" }
func (qemuImg) Program() (string, string) { return "qemu-img", "qemu-utils" }
func (qemuImg) VersionArgs() []string     { return []string{"--version"} }

const qemuProbeCount = 2000 // requests of the first run: 0.2 s at 10k a second

func (qemuImg) Check(c Case, t Target) error {
	l, err := c.Load()
	if err != nil {
		return err
	}
	if l.Jobs != 1 || l.RW == "randrw" || l.RW == "rw" {
		return fmt.Errorf("case %s: qemu-img bench has one connection and does not mix reads and writes", c.Name)
	}
	if t.Engine == "iscsi" && !qemuSpeaksISCSI() {
		return &MissingError{Program: "qemu's iSCSI driver", Remedy: "apt install qemu-block-extra"}
	}
	return nil
}

// qemuSpeaksISCSI asks for a port nobody serves: the answer tells a missing
// driver from a refused connection.
func qemuSpeaksISCSI() bool {
	ctx, cancel := context.WithTimeout(context.Background(), setupMax)
	defer cancel()
	out, _ := exec.CommandContext(ctx, "qemu-img", "info", "iscsi://127.0.0.1:1/iqn.none/1").CombinedOutput() // fails either way
	return !strings.Contains(string(out), "Unknown protocol")
}

func qemuArgs(l Load, t Target, count uint64) []string {
	where := t.URI
	if where == "" {
		where = t.Path
	}
	argv := []string{
		"qemu-img", "bench", "-f", "raw", "-t", "none", "-c", strconv.FormatUint(count, 10),
		"-d", strconv.Itoa(l.Depth), "-s", strconv.FormatUint(l.BlockBytes, 10),
	}
	if l.ReadPercent == 0 {
		argv = append(argv, "-w")
		if l.FlushEvery > 0 {
			argv = append(argv, "--flush-interval="+strconv.Itoa(l.FlushEvery), "--no-drain")
		}
	}
	return append(argv, where)
}

func (qemuImg) Run(ctx context.Context, job ClientJob) (Measured, error) {
	l, err := job.Case.Load()
	if err != nil {
		return Measured{}, err
	}
	probe := job
	probe.Started = nil
	count := uint64(qemuProbeCount)
	for { // until a run is long enough to scale from, or as long as asked
		output, _, _, err := runClient(ctx, probe, qemuArgs(l, job.Target, count))
		if err != nil {
			return Measured{}, err
		}
		seconds, err := parseQemuBench(string(output))
		if err != nil {
			return Measured{}, err
		}
		want := job.Timing.Runtime.Seconds()
		count = max(uint64(float64(count)*want/max(seconds, 1e-3)), qemuProbeCount)
		if seconds >= min(0.1, want) {
			break
		}
	}
	output, _, ended, err := runClient(ctx, job, qemuArgs(l, job.Target, count))
	if err != nil {
		return Measured{}, err
	}
	seconds, err := parseQemuBench(string(output))
	if err != nil {
		return Measured{}, err
	}
	iops := float64(count) / seconds
	m := Metrics{IOs: count, Seconds: seconds, IOPS: iops, BytesPerSecond: iops * float64(l.BlockBytes)}
	if l.ReadPercent == 0 {
		m.WriteIOPS = iops
	} else {
		m.ReadIOPS = iops
	}
	from, to := insideWindow(ended, seconds)
	return Measured{Metrics: m, From: from, To: to}, nil
}

var qemuCompleted = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

func parseQemuBench(output string) (seconds float64, err error) {
	match := qemuCompleted.FindStringSubmatch(output)
	if match == nil {
		return 0, fmt.Errorf("qemu-img bench: unexpected output %.200q", output)
	}
	seconds, err = strconv.ParseFloat(match[1], 64)
	if err != nil || seconds <= 0 {
		return 0, errors.New("qemu-img bench: a run of no length")
	}
	return seconds, nil
}
