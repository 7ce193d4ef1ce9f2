package report

import (
	"slices"
	"time"
)

// Stages of the way of a request, in its order. The daemon names those without a
// dash; the stage of the device becomes three where the kernel was seen at work.
const (
	stageReceive  = "receive"
	stageQueue    = "queue"
	stageMetadata = "metadata"
	stageDevice   = "device"
	stageCommit   = "commit"
	stageFinish   = "finish"
	stageReply    = "reply"

	stageDeviceQueue   = "device-queue"
	stageDeviceService = "device-service"
	stageHandOver      = "device-hand-over"
)

// way is every stage that tables know, with the words for it.
var way = []struct{ stage, title string }{
	{stageReceive, "client socket"},
	{stageQueue, "reactor queue, limits"},
	{stageMetadata, "pool metadata"},
	{stageDevice, "device"},
	{stageDeviceQueue, "device queue"},
	{stageDeviceService, "device service"},
	{stageHandOver, "device hand-over"},
	{stageCommit, "commit, flush"},
	{stageFinish, "finish, verify"},
	{stageReply, "reply"},
}

// Title is the words for a stage; of one that is not known, its name.
func Title(stage string) string {
	for _, w := range way {
		if w.stage == stage {
			return w.title
		}
	}
	return stage
}

// Report says where the time of the requests of one volume went.
type Report struct {
	Volume         string       `json:"volume"`
	Pool           string       `json:"pool"`
	From           time.Time    `json:"from"`
	To             time.Time    `json:"to"`
	Seconds        float64      `json:"seconds"`
	IOPS           float64      `json:"iops"`
	BytesPerSecond float64      `json:"bytes_per_second"`
	InFlight       uint32       `json:"in_flight"`      // at the end
	InFlightMean   float64      `json:"in_flight_mean"` // over the interval
	Operations     []WayOf      `json:"operations"`
	Causes         []Cause      `json:"causes"` // the top one first; never empty
	Notes          []string     `json:"notes"`
	Disks          []Disk       `json:"disks"` // of the volume's pool, with the requests of everybody
	Reactors       []Reactor    `json:"reactors"`
	Unobserved     []Unobserved `json:"unobserved"`
}

// WayOf is the way of one kind of request.
type WayOf struct {
	Operation string       `json:"operation"`
	Count     uint64       `json:"count"`
	Errors    uint64       `json:"errors"`
	Bytes     uint64       `json:"bytes"`
	Latency   Quantiles    `json:"latency"`
	Share     float64      `json:"share"` // of the time of all requests of the volume
	Stages    []StageShare `json:"stages"`
}

// StageShare is what one stage took.
type StageShare struct {
	Stage string    `json:"stage"`
	Time  Quantiles `json:"time"`
	Share float64   `json:"share"` // of the time of this kind of request
	// Estimated marks a share derived from what the kernel saw of the disks, where the
	// requests of other volumes are counted too. Its times are the disks' own.
	Estimated bool `json:"estimated"`
}

// Stage finds a stage of the way.
func (w *WayOf) Stage(name string) (StageShare, bool) {
	for _, s := range w.Stages {
		if s.Stage == name {
			return s, true
		}
	}
	return StageShare{}, false
}

// Way is the operation of a name; nil when there was none.
func (r *Report) Way(operation string) *WayOf {
	for i := range r.Operations {
		if r.Operations[i].Operation == operation {
			return &r.Operations[i]
		}
	}
	return nil
}

// StageOrder is the stages that any operation of the report has, in the order of the
// way. Those it does not know come last, by name.
func (r *Report) StageOrder() []string {
	seen := map[string]bool{}
	for _, o := range r.Operations {
		for _, s := range o.Stages {
			seen[s.Stage] = true
		}
	}
	var order []string
	for _, w := range way {
		if seen[w.stage] {
			order = append(order, w.stage)
			delete(seen, w.stage)
		}
	}
	return append(order, sorted(seen)...)
}

// diskOperations are what a disk does for an operation of a volume.
var diskOperations = map[string]string{"read": "read", "write": "write", "flush": "flush", "discard": "discard"}

// Explain lays out the way of a volume's requests in an interval, and finds the cause
// of most of their time.
func Explain(i *Interval, v *Volume) *Report {
	r := &Report{
		Volume: v.Name, Pool: v.Pool, From: i.From, To: i.To, Seconds: i.Seconds, IOPS: v.IOPS, BytesPerSecond: v.BytesPerSecond,
		InFlight: v.InFlight, Operations: []WayOf{}, Causes: []Cause{}, Notes: []string{}, Disks: []Disk{}, Reactors: i.Reactors, Unobserved: i.Unobserved,
	}
	if i.Seconds > 0 {
		r.InFlightMean = float64(v.Latency.SumNS) / 1e9 / i.Seconds
	}
	for _, d := range i.Disks {
		if v.Pool != "" && slices.Contains(d.Pools, v.Pool) {
			r.Disks = append(r.Disks, d)
		}
	}
	var total float64
	for _, o := range v.Operations {
		total += float64(timeOf(&o))
	}
	for at := range v.Operations {
		o := &v.Operations[at]
		w := WayOf{Operation: o.Name, Count: o.Count, Errors: o.Errors, Bytes: o.Bytes, Latency: o.Latency.Quantiles(), Stages: []StageShare{}}
		if total > 0 {
			w.Share = float64(timeOf(o)) / total
		}
		w.Stages = stagesOf(o, r.Disks)
		r.Operations = append(r.Operations, w)
	}
	r.Causes, r.Notes = causes(i, v, r)
	return r
}

// timeOf is the time of all requests of a kind: the sum of their stages, or where
// these were not counted, of their latency.
func timeOf(o *Operation) uint64 {
	var sum uint64
	for _, s := range o.Stages {
		sum = plus(sum, s.Time.SumNS)
	}
	if sum == 0 {
		return o.Latency.SumNS
	}
	return sum
}

func stagesOf(o *Operation, disks []Disk) []StageShare {
	list := []StageShare{}
	total := float64(timeOf(o))
	for _, s := range o.Stages {
		if s.Time.Count == 0 {
			continue
		}
		share := 0.0
		if total > 0 {
			share = float64(s.Time.SumNS) / total
		}
		if s.Name == stageDevice {
			if parts := splitDevice(o, s, share, disks); parts != nil {
				list = append(list, parts...)
				continue
			}
		}
		list = append(list, StageShare{Stage: s.Name, Time: s.Time.Quantiles(), Share: share})
	}
	return list
}

// splitDevice divides the time between a request's submission and its completion by
// what the kernel saw of the disks: waiting in the disk's queue, service, and what is
// left: the way there, and until the reactor has taken up the completion. The kernel
// counts the requests of everybody, and one request may be several there, so means
// are compared, not sums. It returns nil when nothing was seen.
func splitDevice(o *Operation, s Stage, share float64, disks []Disk) []StageShare {
	var queue, service Histogram
	for _, d := range disks {
		for _, op := range d.Operations {
			if op.Name == diskOperations[o.Name] {
				queue, service = queue.plus(op.Queue), service.plus(op.Service)
			}
		}
	}
	if service.Count == 0 {
		return nil
	}
	q, v, all := float64(queue.SumNS)/float64(service.Count), float64(service.Mean()), float64(s.Time.Mean())
	rest := max(all-q-v, 0)
	sum := q + v + rest
	if sum <= 0 {
		return nil
	}
	parts := []StageShare{
		{Stage: stageDeviceQueue, Time: queue.Quantiles(), Share: share * q / sum, Estimated: true},
		{Stage: stageDeviceService, Time: service.Quantiles(), Share: share * v / sum, Estimated: true},
	}
	left := StageShare{Stage: stageHandOver, Share: share * rest / sum, Estimated: true}
	left.Time.Count, left.Time.MeanNS = s.Time.Count, int64(rest) // no distribution is known
	return append(parts, left)
}
