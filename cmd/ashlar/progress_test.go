package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// feed shows a job at seconds after the start with these done bytes; the last
// state is its end.
func feed(p *progress, total uint64, at []int, done []uint64) {
	for i := range at {
		state := jobRunning
		if i == len(at)-1 {
			state = jobDone
		}
		p.show(&controlpb.Job{Kind: jobScrub, State: state, Target: tank, DoneBytes: done[i], TotalBytes: total}, day.Add(time.Duration(at[i])*time.Second))
	}
	p.end()
}

func TestProgressShowsRateAndTimeLeft(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		name     string
		terminal bool
		total    uint64
		at       []int
		done     []uint64
		want     []string
	}{
		{"on a terminal", true, 4096 * mib, []int{0, 1, 2, 3}, []uint64{0, 100 * mib, 200 * mib, 4096 * mib}, []string{
			"", "scrub tank: 0B of 4GiB, 0 %", "scrub tank: 100MiB of 4GiB, 2 %, 100MiB/s, 40s left",
			"scrub tank: 200MiB of 4GiB, 5 %, 100MiB/s, 39s left", "scrub tank: 4GiB of 4GiB, 100 %                    \n",
		}},
		{"the rate follows", true, 0, []int{0, 10, 20, 21}, []uint64{0, 1000 * mib, 1010 * mib, 1010 * mib}, []string{
			"", "scrub tank: 0B", "scrub tank: 1000MiB, 100MiB/s", "scrub tank: 1010MiB, 1MiB/s  ", "scrub tank: 1010MiB        \n",
		}},
		{"elsewhere, every ten seconds", false, 4096 * mib, []int{0, 1, 9, 10, 11, 12}, []uint64{0, 1 * mib, 9 * mib, 10 * mib, 11 * mib, 4096 * mib}, []string{
			"scrub tank: 0B of 4GiB, 0 %\nscrub tank: 10MiB of 4GiB, 0 %, 1MiB/s, 1h8m left\n",
		}},
		{"at once", false, 0, []int{0}, []uint64{5}, []string{""}},
	} {
		var b bytes.Buffer
		p := newProgress(&b)
		p.terminal = tt.terminal
		feed(p, tt.total, tt.at, tt.done)
		if got := strings.Split(b.String(), "\r"); strings.Join(got, "|") != strings.Join(tt.want, "|") {
			t.Errorf("%s: got\n%q, want\n%q", tt.name, got, tt.want)
		}
	}
}

func TestTimeLeft(t *testing.T) {
	for seconds, want := range map[float64]string{
		0.1: "1s", 59.6: "1m0s", 3599: "59m59s", 3600: "1h0m", 5400: "1h30m", 172800: "2 days", 1e6: "11 days", 1e300: "more than 100 days",
	} {
		if got := eta(seconds); got != want {
			t.Errorf("eta(%v) = %s, want %s", seconds, got, want)
		}
	}
}
