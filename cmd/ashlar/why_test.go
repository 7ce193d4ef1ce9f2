package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/report"
)

// TestADaemonThatGoesBetweenTheSamples is an error, for why and for top --once.
func TestADaemonThatGoesBetweenTheSamples(t *testing.T) {
	for _, args := range [][]string{{"why", "vm1"}, {"top", "--once"}} {
		t.Run(args[0], func(t *testing.T) {
			d := startDaemon(t)
			var out, errs bytes.Buffer
			ended := make(chan int)
			go func() { ended <- execute(append(args, "--interval", "3s"), strings.NewReader(""), &out, &errs) }() // ends with the command
			d.untilAsked(t)
			d.silent.Store(true)
			if code := <-ended; code != exitFailure || !strings.Contains(errs.String(), "shut down") || out.Len() > 0 {
				t.Errorf("exit code %d\n%s%s", code, &errs, &out)
			}
		})
	}
}

// TestAnInterruptEndsTheWait for the second sample.
func TestAnInterruptEndsTheWait(t *testing.T) {
	for _, args := range [][]string{{"why", "vm1"}, {"top", "--once"}} {
		t.Run(args[0], func(t *testing.T) {
			d := startDaemon(t)
			p := start(t, command(t, append(args, "--interval", "1h")...))
			d.untilAsked(t)
			p.signal(os.Interrupt)
			// It may come before the first sample is here.
			if code, said := p.code(), p.stderr.String(); code != exitFailure || said != "ashlar: interrupted\n" && said != "ashlar: canceled\n" {
				t.Errorf("exit code %d\n%s", code, &p.stderr)
			}
		})
	}
}

// untilAsked waits for the first sample to be asked for.
func (d *fakeDaemon) untilAsked(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		d.mu.Lock()
		asked := len(d.calls) > 0
		d.mu.Unlock()
		if asked {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody asks")
		}
	}
}

// TestTheOnlyAnswerIsTheVolume: the daemon knows a device by another name than its path.
func TestTheOnlyAnswerIsTheVolume(t *testing.T) {
	i, err := report.Between(nil, fakeNode(10, false))
	if err != nil || len(i.Volumes) != 1 {
		t.Fatal(err)
	}
	startDaemon(t)
	var out, errs bytes.Buffer
	if code := execute([]string{"why", "/dev/nbd7", "--interval", "10ms"}, strings.NewReader(""), &out, &errs); code != exitOK || !strings.HasPrefix(out.String(), "vm2 in pool tank") {
		t.Errorf("exit code %d\n%s%s", code, &errs, &out)
	}
}

func TestTablesFitTheirWidth(t *testing.T) {
	i, err := report.Between(fakeNode(10, true), fakeNode(20, true))
	if err != nil {
		t.Fatal(err)
	}
	v, _ := i.Volume("vm1")
	r := report.Explain(i, v)
	for width, tables := range map[int]int{20: 3, 80: 3, 100: 2, 140: 1, 300: 1} {
		if got := whyTables(r, width); len(got) != tables {
			t.Errorf("%d tables in %d cells, want %d", len(got), width, tables)
		}
	}
}
