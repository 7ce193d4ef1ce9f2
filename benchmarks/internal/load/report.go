package load

import "time"

// Report is what a load measured, as printed and as written to JSON.
type Report struct {
	Pattern        Pattern             `json:"pattern"`
	WindowStart    time.Time           `json:"window_start"` // wall clock
	WindowEnd      time.Time           `json:"window_end"`
	Seconds        float64             `json:"seconds"`
	IOs            uint64              `json:"ios"` // reads and writes; flushes are in Ops
	IOPS           float64             `json:"iops"`
	BytesPerSecond float64             `json:"bytes_per_second"`
	LatencyP50     float64             `json:"latency_p50_us"` // of reads and writes
	LatencyP99     float64             `json:"latency_p99_us"`
	LatencyP999    float64             `json:"latency_p999_us"`
	LatencyMax     float64             `json:"latency_max_us"`
	CPUSeconds     float64             `json:"cpu_seconds"` // of this process in the window
	Ops            map[string]OpReport `json:"ops"`
}

// OpReport is the part of one operation.
type OpReport struct {
	Count       uint64  `json:"count"`
	IOPS        float64 `json:"iops"`
	LatencyP50  float64 `json:"latency_p50_us"`
	LatencyP99  float64 `json:"latency_p99_us"`
	LatencyP999 float64 `json:"latency_p999_us"`
}

const microsecond = 1e3 // nanoseconds

// Summarize joins the meters of all jobs. Its window reaches from the first
// Begin to the last End.
func Summarize(p Pattern, meters []*Meter, cpuSeconds float64) Report {
	r := Report{Pattern: p, CPUSeconds: cpuSeconds, Ops: map[string]OpReport{}}
	var all, one Meter
	for _, m := range meters {
		from, to := m.Window()
		if r.WindowStart.IsZero() || from.Before(r.WindowStart) {
			r.WindowStart = from
		}
		if to.After(r.WindowEnd) {
			r.WindowEnd = to
		}
	}
	r.Seconds = r.WindowEnd.Sub(r.WindowStart).Seconds()
	if r.Seconds <= 0 {
		return r
	}
	data := &all.Latency[OpRead]
	var bytes uint64
	for op := range OpCount {
		one.Latency[op].Reset()
		for _, m := range meters {
			one.Latency[op].Merge(&m.Latency[op])
			bytes += m.Bytes[op]
		}
		h := &one.Latency[op]
		if h.Count() == 0 {
			continue
		}
		r.Ops[op.String()] = OpReport{
			Count: h.Count(), IOPS: float64(h.Count()) / r.Seconds,
			LatencyP50: h.Percentile(50) / microsecond, LatencyP99: h.Percentile(99) / microsecond,
			LatencyP999: h.Percentile(99.9) / microsecond,
		}
		if op != OpFlush {
			data.Merge(h)
		}
	}
	r.IOs = data.Count()
	r.IOPS = float64(r.IOs) / r.Seconds
	r.BytesPerSecond = float64(bytes) / r.Seconds
	r.LatencyP50 = data.Percentile(50) / microsecond
	r.LatencyP99 = data.Percentile(99) / microsecond
	r.LatencyP999 = data.Percentile(99.9) / microsecond
	r.LatencyMax = float64(data.Max()) / microsecond
	return r
}
