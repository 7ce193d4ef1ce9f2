package report

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Cause is one reason why requests take the time they take.
type Cause struct {
	Name   string  `json:"cause"`  // stable; one of the rules, or idle, stuck, balanced
	Share  float64 `json:"share"`  // of the time of all requests that it accounts for
	Text   string  `json:"text"`   // a sentence with its numbers, without a full stop
	Remedy string  `json:"remedy"` // what to change; "" when nothing needs to be
}

const (
	shareTop  = 0.25 // a cause of less than a quarter of the time is not worth a change
	shareAlso = 0.20 // and one of less than a fifth not worth a second line

	reactorFull  = 0.90                   // above, a reactor at work has no time for the next request
	stolenMuch   = 0.05                   // a twentieth of the time without a CPU shows in p99
	wakeupSlow   = 200 * time.Microsecond // an idle CPU wakes a thread in less than a tenth of it
	limitReached = 0.90                   // a bucket that refills is never emptied to the last request
	depthOfOne   = 1.5                    // requests in flight: below, the client waits for each before the next
	fewRequests  = 1000                   // below, p99.9 is the slowest request
	flushPart    = 0.30                   // of what a commit takes: two flushes of the disk are most of one
	tailLong     = 20                     // times p50: more than queueing explains
)

// facts are what the rules are asked about.
type facts struct {
	interval *Interval
	volume   *Volume
	report   *Report
	shares   map[string]float64 // of the time of all requests, by stage; see part
}

// rule is one way to be slow. Its weight is the share of the time of all requests
// that it explains, 0 when it does not apply.
type rule struct {
	name   string
	weight func(f *facts) float64
	say    func(f *facts) (text, remedy string)
}

// rules in the order in which they win when they weigh the same.
var rules = []rule{
	{"limit-iops", func(f *facts) float64 {
		if l := f.volume.LimitIOPS; l == 0 || f.volume.IOPS < limitReached*float64(l) {
			return 0
		}
		return f.shares[stageQueue]
	}, func(f *facts) (string, string) {
		return fmt.Sprintf("requests wait %s of their time for the volume's own limit of %d IOPS (it does %.0f)", percent(f.shares[stageQueue]), f.volume.LimitIOPS, f.volume.IOPS),
			"raise the limit (ashlar volume limit " + f.volume.Name + " --iops N), or send fewer and larger requests"
	}},
	{"limit-bandwidth", func(f *facts) float64 {
		if l := f.volume.LimitBandwidth; l == 0 || f.volume.BytesPerSecond < limitReached*float64(l) {
			return 0
		}
		return f.shares[stageQueue]
	}, func(f *facts) (string, string) {
		return fmt.Sprintf("requests wait %s of their time for the volume's own limit of %s/s (it does %s/s)",
				percent(f.shares[stageQueue]), bytesOf(float64(f.volume.LimitBandwidth)), bytesOf(f.volume.BytesPerSecond)),
			"raise the limit (ashlar volume limit " + f.volume.Name + " --bandwidth SIZE)"
	}},
	{"reactor-without-cpu", func(f *facts) float64 {
		r, share := f.starved()
		if r == nil {
			return 0
		}
		return share
	}, func(f *facts) (string, string) {
		r, share := f.starved()
		text := fmt.Sprintf("reactor %d waits for a CPU: it had work and did not run for %s of the time", r.Index, percent(share))
		if r.Stolen == nil || *r.Stolen < stolenMuch {
			text = fmt.Sprintf("reactor %d waits for a CPU: from being woken to running takes %s (p99 %s), and a request %s on average",
				r.Index, duration(r.Wakeup.Mean()), duration(r.Wakeup.Quantile(0.99)), duration(f.volume.Latency.Mean()))
		}
		return text, "give it a CPU of its own (--pin, away from other work), and look at the CPU limit of its cgroup"
	}},
	{"reactor-saturated", func(f *facts) float64 {
		if r := f.busiest(); r == nil || r.Busy < reactorFull {
			return 0
		}
		return max(1-f.shares[stageDeviceQueue]-f.shares[stageDeviceService]-f.flushShare(), 0)
	}, func(f *facts) (string, string) {
		r := f.busiest()
		text := fmt.Sprintf("reactor %d is saturated (%s busy)", r.Index, percent(r.Busy))
		if n := len(f.interval.Reactors); n > 1 && f.meanBusy() < 0.6 {
			return text + fmt.Sprintf(", while the %d reactors together are %s busy", n, percent(f.meanBusy())),
				"spread the work: one connection belongs to one reactor, so open several (nbd-client -C, --queues)"
		}
		return text, "add reactors (--reactors), and connections so that each has one"
	}},
	{"flush", func(f *facts) float64 {
		return f.flushShare()
	}, func(f *facts) (string, string) {
		who, share := f.most(stageCommit)
		text := fmt.Sprintf("%s wait %s of their time to be durable", plural(who), percent(share))
		if flush := f.report.Way("flush"); flush != nil && flush.Share > f.shareIn(who, stageCommit) {
			who = "flush"
			text = fmt.Sprintf("flushes are %s of the time of all requests (p99 %s)", percent(f.flushShare()), duration(time.Duration(flush.Latency.P99NS)))
		}
		disk, histogram := f.slowestFlush()
		if disk == "" {
			return text, "fewer fsyncs, or several at once: those that wait together share one flush of the disk"
		}
		// The kernel sends flushes only to disks that declare a volatile cache.
		if part := float64(histogram.Mean()) / float64(max(f.durableMean(who), 1)); part < flushPart {
			return text + fmt.Sprintf("; a flush of %s itself takes %s of that (p99 %s), the rest is the journal, and the file system where the pool is in a file",
				disk, percent(part), duration(histogram.Quantile(0.99))), "use disks for the pool rather than files, or fewer fsyncs"
		}
		if who == "flush" {
			text += fmt.Sprintf("; they wait for the flush of %s (p99 %s)", disk, duration(histogram.Quantile(0.99)))
		} else {
			text = fmt.Sprintf("%s wait %s of their time for the flush of %s (p99 %s)", plural(who), percent(share), disk, duration(histogram.Quantile(0.99)))
		}
		return text + ": the disk has a volatile cache", "use a disk with power-loss protection, or fewer fsyncs"
	}},
	{"device-queue", func(f *facts) float64 {
		return f.shares[stageDeviceQueue]
	}, func(f *facts) (string, string) {
		d := f.worst(func(d *Disk) time.Duration { return d.Queue.Quantile(0.99) })
		return fmt.Sprintf("requests wait %s of their time in the kernel's queue of %s (p99 %s, %d in flight)",
				percent(f.shares[stageDeviceQueue]), d.Name, duration(d.Queue.Quantile(0.99)), d.Depth),
			fmt.Sprintf("more disks (ashlar pool add-device), less other work on %s, or no I/O scheduler: echo none > /sys/block/%s/queue/scheduler", d.Name, d.Name)
	}},
	{"metadata", func(f *facts) float64 {
		return f.shares[stageMetadata]
	}, func(f *facts) (string, string) {
		who, share := f.most(stageMetadata)
		remedy := "look at the layers of the volume (ashlar volume show): fewer snapshots, or wait for their merges (ashlar job list)"
		if who == "write" {
			remedy = "writes to places never written wait for the journal, and writes to the same blocks for each other: larger writes, or fill the volume once"
		}
		return fmt.Sprintf("%s wait %s of their time in the pool before the disks have them (locks, maps, allocation; p99 %s)", plural(who), percent(share), f.p99(who, stageMetadata)), remedy
	}},
	{"queue", func(f *facts) float64 {
		return f.shares[stageQueue]
	}, func(f *facts) (string, string) {
		who, _ := f.most(stageQueue)
		return fmt.Sprintf("requests wait %s of their time for a place in the daemon (p99 %s, %.1f in flight on average)", percent(f.shares[stageQueue]), f.p99(who, stageQueue), f.report.InFlightMean),
			"more buffers (--buffers) and slots (--depth), or a client that has fewer requests in flight"
	}},
	{"client-send", func(f *facts) float64 {
		return f.shares[stageReceive]
	}, func(f *facts) (string, string) {
		who, share := f.most(stageReceive)
		return fmt.Sprintf("%s spend %s of their time on the client's socket, until their payload is here (p99 %s)", plural(who), percent(share), f.p99(who, stageReceive)),
			"look at the client and the network: more connections (nbd-client -C), a unix socket on the same host"
	}},
	{"client-receive", func(f *facts) float64 {
		return f.shares[stageReply]
	}, func(f *facts) (string, string) {
		who, share := f.most(stageReply)
		return fmt.Sprintf("replies to %s wait %s of their time for the client to take them (p99 %s)", plural(who), percent(share), f.p99(who, stageReply)),
			"look at the client and the network: more connections (nbd-client -C), a unix socket on the same host"
	}},
	{"verify", func(f *facts) float64 {
		return f.shares[stageFinish]
	}, func(f *facts) (string, string) {
		who, share := f.most(stageFinish)
		return fmt.Sprintf("%s spend %s of their time after the disks, on checksums (p99 %s)", plural(who), percent(share), f.p99(who, stageFinish)),
			"add reactors (--reactors), or a larger --checksum-cache"
	}},
	{"device-hand-over", func(f *facts) float64 {
		return f.shares[stageHandOver]
	}, func(f *facts) (string, string) {
		return fmt.Sprintf("requests spend %s of their time between the daemon and the disk's queue, or done and not yet taken up", percent(f.shares[stageHandOver])),
			"a pool on files waits for their file system: use disks; and add reactors (--reactors) when they are busy"
	}},
	{"device", func(f *facts) float64 {
		return f.shares[stageDeviceService]
	}, func(f *facts) (string, string) {
		d := f.worst(func(d *Disk) time.Duration { return d.Service.Quantile(0.99) })
		h := d.Service
		text := fmt.Sprintf("nothing is slow: %s of the time is the service time of %s itself (p50 %s, p99 %s)",
			percent(f.shares[stageDeviceService]), d.Name, duration(h.Quantile(0.5)), duration(h.Quantile(0.99)))
		if p50, p99 := h.Quantile(0.5), h.Quantile(0.99); p50 > 0 && p99 >= tailLong*p50 {
			text = fmt.Sprintf("%s of the time is the service time of %s, and its slowest requests stand out: p50 %s, p99 %s",
				percent(f.shares[stageDeviceService]), d.Name, duration(p50), duration(p99))
			return text, "look at the disk's health and at who else writes to it: disks that clean up while they are written to show this"
		}
		return text, f.moreWork(fmt.Sprintf("for less, a faster disk than %s, or more of them (ashlar pool add-device)", d.Name))
	}},
	{"device-unobserved", func(f *facts) float64 {
		return f.shares[stageDevice]
	}, func(f *facts) (string, string) {
		who, _ := f.most(stageDevice)
		text := fmt.Sprintf("%s of the time is the device's (p99 %s)", percent(f.shares[stageDevice]), f.p99(who, stageDevice))
		if reason := f.unobserved("disks"); reason != "" {
			return text + "; waiting and service are not told apart, since disks are not observed: " + reason, "let the daemon observe disks; ashlar doctor says what it lacks"
		}
		return text, f.moreWork("for less, a faster disk")
	}},
}

// causes asks the rules. There is always one.
func causes(i *Interval, v *Volume, r *Report) ([]Cause, []string) {
	f := &facts{interval: i, volume: v, report: r, shares: map[string]float64{}}
	for _, w := range r.Operations {
		for _, s := range w.Stages {
			f.shares[f.part(w.Operation, s.Stage)] += s.Share * w.Share
		}
	}
	if len(v.Operations) == 0 {
		return []Cause{f.silence()}, f.notes()
	}
	list := []Cause{}
	for _, rule := range rules {
		weight := min(rule.weight(f), 1)
		if weight < shareAlso || f.implied(rule.name, list) {
			continue
		}
		text, remedy := rule.say(f)
		c := Cause{Name: rule.name, Share: weight, Text: text, Remedy: remedy}
		at := len(list)
		for at > 0 && list[at-1].Share < weight {
			at--
		}
		list = append(list[:at], append([]Cause{c}, list[at:]...)...)
	}
	if len(list) == 0 || list[0].Share < shareTop {
		list = []Cause{f.balanced()}
	}
	for at := len(list) - 1; at > 0; at-- {
		if strings.HasPrefix(list[at].Name, "device") && list[at].Name != "device-queue" && list[at].Name != "device-hand-over" {
			list = slices.Delete(list, at, at+1) // a disk that serves is no fault beside one
		}
	}
	return list, f.notes()
}

// implied says that an earlier cause explains this one: a queue that a limit makes is
// no want of buffers.
func (f *facts) implied(name string, found []Cause) bool {
	if name != "queue" {
		return false
	}
	for _, c := range found {
		if strings.HasPrefix(c.Name, "limit-") || c.Name == "reactor-saturated" {
			return true
		}
	}
	return false
}

// silence is the cause of nothing being done.
func (f *facts) silence() Cause {
	if n := f.volume.InFlight; n > 0 {
		c := Cause{
			Name: "stuck", Share: 1, Text: fmt.Sprintf("%d requests are in flight, and none ended in %s", n, seconds(f.interval.Seconds)),
			Remedy: "look at ashlar events and ashlar pool status",
		}
		for _, d := range f.report.Disks {
			if d.Depth > 0 {
				c.Text += fmt.Sprintf("; %s has %d of its own in flight", d.Name, d.Depth)
				c.Remedy += ", and at the kernel's log for " + d.Name
				break
			}
		}
		return c
	}
	return Cause{Name: "idle", Text: "no requests in the interval of " + seconds(f.interval.Seconds), Remedy: "repeat it while the client works, or look back with --since-start"}
}

// balanced is what is said when no part stands out.
func (f *facts) balanced() Cause {
	top, share := "", 0.0
	for _, stage := range sorted(f.shares) {
		if f.shares[stage] > share {
			top, share = stage, f.shares[stage]
		}
	}
	if top == "" {
		return Cause{Name: "balanced", Text: "the stages of these requests were not counted"}
	}
	return Cause{Name: "balanced", Share: share, Text: fmt.Sprintf("nothing stands out: the largest part, %s, is %s", percent(share), Title(top))}
}

func (f *facts) notes() []string {
	notes := []string{}
	total := uint64(0)
	for _, w := range f.report.Operations {
		total = plus(total, w.Count)
		if w.Errors > 0 {
			notes = append(notes, fmt.Sprintf("%d of %d %s failed; ashlar events says more", w.Errors, w.Count, plural(w.Operation)))
		}
	}
	if total > 0 && total < fewRequests {
		notes = append(notes, fmt.Sprintf("only %d requests: p99.9 is the slowest of them", total))
	}
	for _, w := range f.report.Operations {
		if _, split := w.Stage(stageDeviceService); split {
			var names []string
			for _, d := range f.report.Disks {
				names = append(names, d.Name)
			}
			notes = append(notes, "device queue and service are those of "+strings.Join(names, ", ")+", with the requests of everybody")
			break
		}
	}
	return notes
}

// ---- what the rules ask -----------------------------------------------------------

// most is the operation that loses most of all time in a stage, and the share of its
// own time that this is.
func (f *facts) most(stage string) (operation string, share float64) {
	most := -1.0
	for _, w := range f.report.Operations {
		if s, ok := w.Stage(stage); ok && s.Share*w.Share > most {
			most, operation, share = s.Share*w.Share, w.Operation, s.Share
		}
	}
	return operation, share
}

// shareIn is the share of the time of all requests that an operation spends in a stage.
func (f *facts) shareIn(operation, stage string) float64 {
	if w := f.report.Way(operation); w != nil {
		s, _ := w.Stage(stage)
		return s.Share * w.Share
	}
	return 0
}

func (f *facts) p99(operation, stage string) string {
	if w := f.report.Way(operation); w != nil {
		s, _ := w.Stage(stage)
		return duration(time.Duration(s.Time.P99NS))
	}
	return duration(0)
}

// partFlush is the time of flushes at the disks, beside the stages.
const partFlush = "flush"

// part is what a stage of an operation counts for: a flush waits for disks to make
// things durable, not for their service.
func (f *facts) part(operation, stage string) string {
	if operation == "flush" && (stage == stageDevice || stage == stageDeviceService || stage == stageHandOver) {
		return partFlush
	}
	return stage
}

// flushShare is what durability costs: commits of writes, and flushes but for the
// time they wait in the daemon.
func (f *facts) flushShare() float64 { return f.shares[stageCommit] + f.shares[partFlush] }

// durableMean is what an operation takes on average to be durable: a flush altogether,
// a write its commit.
func (f *facts) durableMean(operation string) time.Duration {
	w := f.report.Way(operation)
	if w == nil {
		return 0
	}
	if operation == "flush" {
		return time.Duration(w.Latency.MeanNS)
	}
	s, _ := w.Stage(stageCommit)
	return time.Duration(s.Time.MeanNS)
}

// slowestFlush is the disk of the pool whose flushes take longest; "" when none was seen.
func (f *facts) slowestFlush() (disk string, h Histogram) {
	for _, d := range f.report.Disks {
		for _, o := range d.Operations {
			if o.Name == "flush" && (disk == "" || o.Service.Quantile(0.99) > h.Quantile(0.99)) {
				disk, h = d.Name, o.Service
			}
		}
	}
	return disk, h
}

// worst is the disk with most of something. There is one, or the kernel was not seen.
func (f *facts) worst(of func(*Disk) time.Duration) *Disk {
	worst := &Disk{Name: "the disk"}
	for i := range f.report.Disks {
		if d := &f.report.Disks[i]; i == 0 || of(d) > of(worst) {
			worst = d
		}
	}
	return worst
}

func (f *facts) busiest() *Reactor {
	var busiest *Reactor
	for i := range f.interval.Reactors {
		if r := &f.interval.Reactors[i]; busiest == nil || r.Busy > busiest.Busy {
			busiest = r
		}
	}
	return busiest
}

func (f *facts) meanBusy() float64 {
	var sum float64
	for _, r := range f.interval.Reactors {
		sum += r.Busy
	}
	return sum / float64(max(len(f.interval.Reactors), 1))
}

// starved is the reactor that waited most for a CPU, and the share of the time of
// requests that this accounts for: of the whole interval where it was interrupted at
// work, of a mean request where it was slow to wake.
func (f *facts) starved() (worst *Reactor, share float64) {
	for i := range f.interval.Reactors {
		r := &f.interval.Reactors[i]
		s := 0.0
		if r.Stolen != nil && *r.Stolen >= stolenMuch {
			s = *r.Stolen
		}
		if mean := f.volume.Latency.Mean(); s == 0 && r.Wakeup != nil && r.Wakeup.Quantile(0.99) >= wakeupSlow && mean > 0 {
			s = min(float64(r.Wakeup.Mean())/float64(mean), 1)
		}
		if s > share {
			worst, share = r, s
		}
	}
	return worst, share
}

func (f *facts) unobserved(what string) string {
	for _, u := range f.interval.Unobserved {
		if u.What == what {
			return u.Reason
		}
	}
	return ""
}

// moreWork is what helps where each request is as fast as it can be.
func (f *facts) moreWork(otherwise string) string {
	if f.report.InFlightMean < depthOfOne {
		return fmt.Sprintf("the client has %.1f requests in flight on average: more of them at once are more IOPS; %s", f.report.InFlightMean, otherwise)
	}
	return otherwise
}

// ---- words --------------------------------------------------------------------------

// Duration prints a duration with three digits, in the unit that suits.
func Duration(d time.Duration) string { return duration(d) }

func duration(d time.Duration) string {
	switch v := float64(d); {
	case d <= 1: // the first bucket: no time at all
		return "0"
	case v < 999.5:
		return fmt.Sprintf("%d ns", d)
	case v < 999.5e3:
		return digits(v/1e3) + " µs"
	case v < 999.5e6:
		return digits(v/1e6) + " ms"
	case v < 9995e9:
		return digits(v/1e9) + " s"
	}
	return fmt.Sprintf("%.0f s", float64(d)/1e9)
}

// digits prints a number below 1000 with three digits, without zeros behind the point.
func digits(v float64) string {
	text := fmt.Sprintf("%.2f", v)
	switch {
	case v >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case v >= 9.995:
		text = fmt.Sprintf("%.1f", v)
	}
	return strings.TrimSuffix(strings.TrimRight(text, "0"), ".")
}

func percent(share float64) string { return fmt.Sprintf("%.0f %%", share*100) }

func seconds(s float64) string { return duration(time.Duration(s * 1e9)) }

// bytesOf prints bytes in the largest unit below them.
func bytesOf(v float64) string {
	unit := 0
	names := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	for v >= 1024 && unit < len(names)-1 {
		v /= 1024
		unit++
	}
	if unit > 0 && v >= 999.5 {
		return fmt.Sprintf("%.0f%s", v, names[unit])
	}
	return digits(v) + names[unit]
}

// Bytes prints a number of bytes, or of bytes a second, with three digits.
func Bytes(v float64) string { return bytesOf(v) }

// plural is an operation in a sentence.
func plural(operation string) string {
	switch operation {
	case "flush":
		return "flushes"
	case "write-zeroes":
		return "write-zeroes requests"
	case "cache", "extents":
		return operation + " requests"
	case "":
		return "requests"
	}
	return operation + "s"
}
