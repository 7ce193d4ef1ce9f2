package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// TestAWaitingJobSaysWhy: a job that cannot go on before somebody acts tells so
// wherever it is shown.
func TestAWaitingJobSaysWhy(t *testing.T) {
	waiting := noted(job(jobMerge, jobRunning, "vm1@monday", 0))
	want := "waits: " + waiting.GetNote()
	var out bytes.Buffer
	if err := writePool(&out, tankPool, []*controlpb.Job{waiting}); err != nil || !strings.Contains(out.String(), want) {
		t.Errorf("pool status: %v\n%s", err, &out)
	}
	out.Reset()
	p := newProgress(&out)
	p.show(job(jobMerge, jobRunning, "vm1@monday", 0), day)
	p.show(waiting, day.Add(time.Millisecond)) // sooner than the next plain line
	p.show(waiting, day.Add(2*time.Millisecond))
	p.show(job(jobMerge, jobRunning, "vm1@monday", 0), day.Add(3*time.Millisecond))
	if lines := strings.Split(out.String(), "\n"); len(lines) != 4 || !strings.HasSuffix(lines[1], ", "+want) || strings.Contains(lines[2], "waits") {
		t.Errorf("progress:\n%s", &out)
	}
}
