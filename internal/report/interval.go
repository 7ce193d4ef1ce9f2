package report

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// ErrRestarted says that the daemon began anew between two samples, so that they
// cannot be subtracted.
var ErrRestarted = errors.New("report: the daemon was restarted between the samples")

// Interval is what happened between two samples, or since the daemon began.
type Interval struct {
	From       time.Time    `json:"from"`
	To         time.Time    `json:"to"`
	Seconds    float64      `json:"seconds"`
	Started    time.Time    `json:"started"`     // of the daemon's counts
	CPUSeconds float64      `json:"cpu_seconds"` // the daemon used in the interval
	RSSBytes   uint64       `json:"rss_bytes"`   // of the daemon, at the end
	Volumes    []Volume     `json:"volumes"`
	Reactors   []Reactor    `json:"reactors"`
	Disks      []Disk       `json:"disks"`
	Unobserved []Unobserved `json:"unobserved"`
}

// Volume is the work of one export. Counts are of the interval; open and in flight
// are as they were at its end.
type Volume struct {
	Name           string      `json:"name"`
	Pool           string      `json:"pool"` // "": not a volume of a pool
	SizeBytes      uint64      `json:"size_bytes"`
	OpenCount      uint32      `json:"open_count"`
	InFlight       uint32      `json:"in_flight"`
	LimitIOPS      uint64      `json:"limit_iops"`            // 0: none
	LimitBandwidth uint64      `json:"limit_bandwidth_bytes"` // a second; 0: none
	IOPS           float64     `json:"iops"`
	BytesPerSecond float64     `json:"bytes_per_second"`
	Errors         uint64      `json:"errors"`
	Latency        Histogram   `json:"latency"` // of all operations
	Operations     []Operation `json:"operations"`
}

// Operation is one kind of request.
type Operation struct {
	Name    string    `json:"operation"` // read, write, flush, ...
	Count   uint64    `json:"count"`
	Errors  uint64    `json:"errors"`
	Bytes   uint64    `json:"bytes"`
	Latency Histogram `json:"latency"`
	Stages  []Stage   `json:"stages"` // in the order of the way
}

// Stage is a part of the way of requests.
type Stage struct {
	Name string    `json:"stage"`
	Time Histogram `json:"time"`
}

// Reactor is one polling thread. Shares are parts of the interval.
type Reactor struct {
	Index        uint32  `json:"index"`
	CPU          uint32  `json:"cpu"` // pinned to; with pinned
	Pinned       bool    `json:"pinned"`
	Busy         float64 `json:"busy"`
	Idle         float64 `json:"idle"` // spinning for work
	Sleep        float64 `json:"sleep"`
	Turns        uint64  `json:"turns"`
	Enters       uint64  `json:"enters"`
	SpinBudgetNS uint64  `json:"spin_budget_ns"`
	ServiceNS    uint64  `json:"service_ns"` // the service time of devices that it was learned from
	// Stolen is the share of the interval in which the thread was off its CPU without
	// sleeping by its own will: it had work, and another thread had the CPU. Absent
	// when it is not observed.
	Stolen *float64   `json:"stolen"`
	OffCPU *Histogram `json:"off_cpu"` // absent when it is not observed
	Wakeup *Histogram `json:"wakeup"`  // from being woken to running; likewise
}

// Disk is one block device as the kernel sees it, with the requests of everybody.
type Disk struct {
	Name           string          `json:"name"`
	Pools          []string        `json:"pools"`
	Depth          uint32          `json:"depth"` // in flight at the end
	IOPS           float64         `json:"iops"`
	BytesPerSecond float64         `json:"bytes_per_second"`
	Merges         uint64          `json:"merges"`
	Errors         uint64          `json:"errors"`
	Queue          Histogram       `json:"queue"`   // of all operations: from insertion to issue
	Service        Histogram       `json:"service"` // from issue to completion
	Operations     []DiskOperation `json:"operations"`
}

// DiskOperation is one kind of request to a disk.
type DiskOperation struct {
	Name    string    `json:"operation"` // read, write, flush, discard
	Count   uint64    `json:"count"`
	Errors  uint64    `json:"errors"`
	Bytes   uint64    `json:"bytes"`
	Queue   Histogram `json:"queue"`
	Service Histogram `json:"service"`
}

// Unobserved says what is not seen, and why.
type Unobserved struct {
	What   string `json:"what"`
	Reason string `json:"reason"`
}

// Between is what happened from sample a to the later sample b of one daemon; with a
// nil, since the daemon began. A volume that came between them counts from its
// beginning; one that went is left out.
//
// Errors: ErrRestarted.
func Between(a, b *controlpb.StatsResponse) (*Interval, error) {
	started := b.GetStarted().AsTime()
	from := started
	if a != nil {
		if !a.GetStarted().AsTime().Equal(started) {
			return nil, ErrRestarted
		}
		from = a.GetTime().AsTime()
	}
	i := &Interval{
		From: from, To: b.GetTime().AsTime(), Started: started,
		CPUSeconds: max(b.GetCpuSeconds()-a.GetCpuSeconds(), 0), RSSBytes: b.GetRssBytes(),
		Volumes: []Volume{}, Reactors: []Reactor{}, Disks: []Disk{}, Unobserved: []Unobserved{}, // lists in JSON are never null
	}
	i.Seconds = max(i.To.Sub(i.From).Seconds(), 0)
	before := map[[2]string]*controlpb.VolumeStats{}
	for _, v := range a.GetVolumes() {
		before[[2]string{v.GetPool(), v.GetName()}] = v
	}
	for _, v := range b.GetVolumes() {
		i.Volumes = append(i.Volumes, volumeBetween(before[[2]string{v.GetPool(), v.GetName()}], v, i.Seconds))
	}
	slices.SortStableFunc(i.Volumes, func(x, y Volume) int { return cmp.Or(strings.Compare(x.Name, y.Name), strings.Compare(x.Pool, y.Pool)) })
	reactors := map[uint32]*controlpb.ReactorStats{}
	for _, r := range a.GetReactors() {
		reactors[r.GetIndex()] = r
	}
	for _, r := range b.GetReactors() {
		i.Reactors = append(i.Reactors, reactorBetween(reactors[r.GetIndex()], r))
	}
	slices.SortStableFunc(i.Reactors, func(x, y Reactor) int { return cmp.Compare(x.Index, y.Index) })
	disks := map[[2]uint32]*controlpb.DiskStats{}
	for _, d := range a.GetDisks() {
		disks[[2]uint32{d.GetMajor(), d.GetMinor()}] = d
	}
	for _, d := range b.GetDisks() {
		i.Disks = append(i.Disks, diskBetween(disks[[2]uint32{d.GetMajor(), d.GetMinor()}], d, i.Seconds))
	}
	slices.SortStableFunc(i.Disks, func(x, y Disk) int { return strings.Compare(x.Name, y.Name) })
	for _, u := range b.GetUnobserved() {
		i.Unobserved = append(i.Unobserved, Unobserved{u.GetWhat(), u.GetReason()})
	}
	return i, nil
}

// Volume finds a volume by its name, or by POOL/NAME.
func (i *Interval) Volume(name string) (*Volume, bool) {
	for at := range i.Volumes {
		if v := &i.Volumes[at]; v.Name == name || v.Pool != "" && v.Pool+"/"+v.Name == name {
			return v, true
		}
	}
	return nil, false
}

func volumeBetween(a, b *controlpb.VolumeStats, seconds float64) Volume {
	v := Volume{
		Name: b.GetName(), Pool: b.GetPool(), SizeBytes: b.GetSizeBytes(), OpenCount: b.GetOpenCount(), InFlight: b.GetInFlight(),
		LimitIOPS: b.GetLimits().GetIops(), LimitBandwidth: b.GetLimits().GetBandwidthBytes(), Operations: []Operation{},
	}
	before := map[string]*controlpb.OperationStats{}
	for _, o := range a.GetOperations() {
		before[o.GetOperation()] = o
	}
	var count, bytes uint64
	for _, o := range b.GetOperations() {
		op := operationBetween(before[o.GetOperation()], o)
		if op.Count == 0 {
			continue
		}
		v.Operations = append(v.Operations, op)
		v.Latency = v.Latency.plus(op.Latency)
		v.Errors = plus(v.Errors, op.Errors)
		count, bytes = plus(count, op.Count), plus(bytes, op.Bytes)
	}
	v.IOPS, v.BytesPerSecond = rate(count, seconds), rate(bytes, seconds)
	return v
}

func operationBetween(a, b *controlpb.OperationStats) Operation {
	o := Operation{
		Name: b.GetOperation(), Count: less(b.GetCount(), a.GetCount()), Errors: less(b.GetErrors(), a.GetErrors()), Bytes: less(b.GetBytes(), a.GetBytes()),
		Latency: histogramOf(b.GetLatency()).minus(histogramOf(a.GetLatency())), Stages: []Stage{},
	}
	before := map[string]*controlpb.Histogram{}
	for _, s := range a.GetStages() {
		before[s.GetStage()] = s.GetTime()
	}
	for _, s := range b.GetStages() {
		o.Stages = append(o.Stages, Stage{s.GetStage(), histogramOf(s.GetTime()).minus(histogramOf(before[s.GetStage()]))})
	}
	return o
}

func reactorBetween(a, b *controlpb.ReactorStats) Reactor {
	r := Reactor{
		Index: b.GetIndex(), CPU: b.GetCpu(), Pinned: b.GetPinned(), Turns: less(b.GetTurns(), a.GetTurns()), Enters: less(b.GetEnters(), a.GetEnters()),
		SpinBudgetNS: b.GetSpinBudgetNs(), ServiceNS: b.GetServiceNs(),
	}
	busy, idle, sleep := less(b.GetBusyNs(), a.GetBusyNs()), less(b.GetIdleNs(), a.GetIdleNs()), less(b.GetSleepNs(), a.GetSleepNs())
	// Of their own sum: a reactor counts a phase when it ends, so that the sum is not
	// the interval to the nanosecond.
	all := float64(busy) + float64(idle) + float64(sleep)
	if all > 0 {
		r.Busy, r.Idle, r.Sleep = float64(busy)/all, float64(idle)/all, float64(sleep)/all
	}
	if b.GetOffCpu() != nil {
		h := histogramOf(b.GetOffCpu()).minus(histogramOf(a.GetOffCpu()))
		r.OffCPU = &h
		stolen := 0.0
		if all > 0 {
			// Not more than it did not sleep: the kernel's counts come a little later.
			stolen = min(float64(less(h.SumNS, sleep))/all, r.Busy+r.Idle)
		}
		r.Stolen = &stolen
	}
	if b.GetWakeup() != nil {
		h := histogramOf(b.GetWakeup()).minus(histogramOf(a.GetWakeup()))
		r.Wakeup = &h
	}
	return r
}

func diskBetween(a, b *controlpb.DiskStats, seconds float64) Disk {
	d := Disk{Name: b.GetName(), Pools: append([]string{}, b.GetPools()...), Depth: b.GetQueueDepth(), Merges: less(b.GetMerges(), a.GetMerges()), Operations: []DiskOperation{}}
	before := map[string]*controlpb.DiskOperationStats{}
	for _, o := range a.GetOperations() {
		before[o.GetOperation()] = o
	}
	var count, bytes uint64
	for _, o := range b.GetOperations() {
		was := before[o.GetOperation()]
		op := DiskOperation{
			Name: o.GetOperation(), Count: less(o.GetCount(), was.GetCount()), Errors: less(o.GetErrors(), was.GetErrors()), Bytes: less(o.GetBytes(), was.GetBytes()),
			Queue:   histogramOf(o.GetQueue()).minus(histogramOf(was.GetQueue())),
			Service: histogramOf(o.GetService()).minus(histogramOf(was.GetService())),
		}
		if op.Count == 0 {
			continue
		}
		d.Operations = append(d.Operations, op)
		d.Queue, d.Service = d.Queue.plus(op.Queue), d.Service.plus(op.Service)
		d.Errors = plus(d.Errors, op.Errors)
		count, bytes = plus(count, op.Count), plus(bytes, op.Bytes)
	}
	d.IOPS, d.BytesPerSecond = rate(count, seconds), rate(bytes, seconds)
	return d
}

func rate(count uint64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(count) / seconds
}
