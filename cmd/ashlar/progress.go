package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

const (
	rateWindow = 10 * time.Second // long enough to smooth a job that works in bursts, short enough to follow a change of its rate
	plainEvery = 10 * time.Second // between lines where there is no terminal: a log of an hour stays readable
)

// progress shows a job while it runs: one line that changes on a terminal, a line
// now and then elsewhere.
type progress struct {
	out      io.Writer
	terminal bool
	width    int       // of what the line shows now
	last     time.Time // of the last plain line
	note     string    // of the last plain line
	samples  []sample  // of the last rateWindow, oldest first
}

type sample struct {
	at   time.Time
	done uint64
}

func newProgress(out io.Writer) *progress {
	f, ok := out.(*os.File)
	return &progress{out: out, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

// work is what a progress shows: a job of a daemon, or what this process does.
type work struct {
	kind, target string
	done, total  uint64 // bytes
	running      bool
	damaged      uint64 // blocks
	note         string // why it does not go on, "" when it does
}

// show shows the state of a job at a time.
func (p *progress) show(j *controlpb.Job, now time.Time) {
	p.showWork(work{
		kind: word(j.GetKind()), target: j.GetTarget(), done: j.GetDoneBytes(), total: j.GetTotalBytes(),
		running: j.GetState() == controlpb.JobState_JOB_STATE_RUNNING, damaged: j.GetDamagedBlocks(), note: j.GetNote(),
	}, now)
}

func (p *progress) showWork(w work, now time.Time) {
	text := p.line(w, now)
	switch {
	case p.terminal:
		fmt.Fprintf(p.out, "\r%s%s", text, strings.Repeat(" ", max(p.width-len(text), 0)))
		p.width = len(text)
	case !w.running: // the result says it
	case p.last.IsZero() || now.Sub(p.last) >= plainEvery || w.note != p.note:
		fmt.Fprintln(p.out, text)
		p.last, p.note = now, w.note
	}
}

// end leaves the line.
func (p *progress) end() {
	if p.terminal && p.width > 0 {
		fmt.Fprintln(p.out)
		p.width = 0
	}
}

// line is the state of some work with its rate, and when it will end at that rate.
func (p *progress) line(w work, now time.Time) string {
	if n := len(p.samples); n > 0 && w.done < p.samples[n-1].done {
		p.samples = p.samples[:0] // a new phase
	}
	p.samples = append(p.samples, sample{now, w.done})
	for len(p.samples) > 2 && now.Sub(p.samples[1].at) >= rateWindow {
		p.samples = p.samples[1:]
	}
	text := fmt.Sprintf("%s %s: %s", w.kind, w.target, humane(w.done))
	if w.total > 0 {
		text += fmt.Sprintf(" of %s, %s", humane(w.total), percent(w.done, w.total))
	}
	if w.running {
		first := p.samples[0]
		if seconds := now.Sub(first.at).Seconds(); seconds > 0 && w.done > first.done {
			rate := float64(w.done-first.done) / seconds
			text += fmt.Sprintf(", %s/s", humane(uint64(rate)))
			if left := w.total - w.done; w.total > w.done && rate >= 1 {
				text += ", " + eta(float64(left)/rate) + " left"
			}
		}
	}
	if w.damaged > 0 {
		text += fmt.Sprintf(", %d damaged blocks", w.damaged)
	}
	if w.note != "" {
		text += ", waits: " + w.note
	}
	return text
}

// eta prints seconds to come, roughly.
func eta(seconds float64) string {
	if seconds > 100*24*3600 {
		return "more than 100 days"
	}
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return max(d.Round(time.Second), time.Second).String()
}
