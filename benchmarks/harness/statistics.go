package harness

import "slices"

// Metric is one number of a run, by the name used in summaries.
type Metric struct {
	Name        string
	Title       string
	LowerIsGood bool
	of          func(Metrics) (float64, bool)
}

// measured takes a value of 0 for one that was not measured.
func measured(v float64) (float64, bool) { return v, v != 0 }

// The metrics summaries are made of.
var metrics = []Metric{
	{"iops", "IOPS", false, func(m Metrics) (float64, bool) { return measured(m.IOPS) }},
	{"bytes_per_second", "bytes per second", false, func(m Metrics) (float64, bool) { return measured(m.BytesPerSecond) }},
	{"latency_p50_us", "p50 latency, µs", true, func(m Metrics) (float64, bool) { return measured(m.LatencyP50) }},
	{"latency_p99_us", "p99 latency, µs", true, func(m Metrics) (float64, bool) { return measured(m.LatencyP99) }},
	{"latency_p999_us", "p99.9 latency, µs", true, func(m Metrics) (float64, bool) { return measured(m.LatencyP999) }},
	{"client_cpu", "client CPUs busy", true, func(m Metrics) (float64, bool) { return share(m.ClientCPUSeconds, m.Seconds), m.ClientSampled }},
	{"server_cpu", "server CPUs busy", true, func(m Metrics) (float64, bool) { return share(m.ServerCPUSeconds, m.Seconds), m.ServerSampled }},
	{"server_cpu_seconds_per_million", "server CPU-seconds per million I/Os", true, func(m Metrics) (float64, bool) { return measured(m.ServerCPUPerMillion) }},
	{"iops_per_server_cpu_second", "IOPS per server CPU-second", false, func(m Metrics) (float64, bool) { return measured(m.IOPSPerServerCPU) }},
	{"latency_max_us", "longest latency, µs", true, func(m Metrics) (float64, bool) { return measured(m.LatencyMax) }},
	{"server_bytes_per_byte", "bytes given to the device per byte written", true, func(m Metrics) (float64, bool) {
		return perByte(m.ServerBytesWritten, m.BytesWritten)
	}},
	{"disk_bytes_per_byte", "bytes the disk took per byte written", true, func(m Metrics) (float64, bool) {
		return perByte(m.DiskBytesWritten, m.BytesWritten)
	}},
	{"call_median_us", "median call, µs", true, func(m Metrics) (float64, bool) { return measured(m.CallMedian) }},
	{"call_max_us", "longest call, µs", true, func(m Metrics) (float64, bool) { return measured(m.CallMax) }},
	{"create_us", "creation, µs", true, func(m Metrics) (float64, bool) { return measured(m.CallCreate) }},
	{"delete_us", "deletion, µs", true, func(m Metrics) (float64, bool) { return measured(m.CallDelete) }},
	{"open_seconds", "open, seconds", true, func(m Metrics) (float64, bool) { return measured(m.OpenSeconds) }},
	{"open_tib_seconds", "open of 1 TiB mapped (extrapolated), seconds", true, func(m Metrics) (float64, bool) { return measured(m.OpenTiB) }},
	{"server_resident_bytes", "server resident bytes", true, func(m Metrics) (float64, bool) { return measured(float64(m.ServerResident)) }},
}

// FindMetric gives a metric by name.
func FindMetric(name string) (Metric, bool) {
	i := slices.IndexFunc(metrics, func(m Metric) bool { return m.Name == name })
	if i < 0 {
		return Metric{}, false
	}
	return metrics[i], true
}

// perByte is not measured when the server wrote nothing: its kernel does not count.
func perByte(written, asked uint64) (float64, bool) {
	if asked == 0 {
		return 0, false
	}
	return measured(float64(written) / float64(asked))
}

func share(part, whole float64) float64 {
	if whole == 0 {
		return 0
	}
	return part / whole
}

// median is the middle value, or the mean of the middle two; 0 of nothing.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

func spreadOf(values []float64) Spread {
	if len(values) == 0 {
		return Spread{}
	}
	s := Spread{Median: median(values), Min: slices.Min(values), Max: slices.Max(values)}
	s.Spread = share(s.Max-s.Min, s.Median)
	return s
}

// Values are the measured values of a metric, by round.
func (r *Result) Values(caseName, peer string, m Metric) map[int]float64 {
	values := map[int]float64{}
	for _, run := range r.Runs {
		if run.Case == caseName && run.Peer == peer {
			if v, ok := m.of(run.Metrics); ok {
				values[run.Round] = v
			}
		}
	}
	return values
}

// Spread is the median and spread of a metric; ok is false when it was not measured.
func (r *Result) Spread(caseName, peer string, m Metric) (s Spread, ok bool) {
	values := r.Values(caseName, peer, m)
	if len(values) == 0 {
		return s, false
	}
	list := make([]float64, 0, len(values))
	for _, v := range values {
		list = append(list, v)
	}
	return spreadOf(list), true
}

// Ratio compares peer with base: the ratio of the medians, and the median of
// the ratios within the rounds both took part in.
func (r *Result) Ratio(caseName, peer, base string, m Metric) (ratio Ratio, ok bool) {
	a, okA := r.Spread(caseName, peer, m)
	b, okB := r.Spread(caseName, base, m)
	if !okA || !okB || b.Median == 0 {
		return ratio, false
	}
	ours, theirs := r.Values(caseName, peer, m), r.Values(caseName, base, m)
	var rounds []float64
	for round, v := range ours {
		if w := theirs[round]; w != 0 {
			rounds = append(rounds, v/w)
		}
	}
	return Ratio{OfMedians: a.Median / b.Median, OfRounds: median(rounds)}, true
}

// Difference compares peer with base: the difference of the medians, and the
// median of the differences within the rounds both took part in.
func (r *Result) Difference(caseName, peer, base string, m Metric) (ofMedians, ofRounds float64, ok bool) {
	a, okA := r.Spread(caseName, peer, m)
	b, okB := r.Spread(caseName, base, m)
	if !okA || !okB {
		return 0, 0, false
	}
	ours, theirs := r.Values(caseName, peer, m), r.Values(caseName, base, m)
	var rounds []float64
	for round, v := range ours {
		if w, both := theirs[round]; both {
			rounds = append(rounds, v-w)
		}
	}
	return a.Median - b.Median, median(rounds), true
}

// Summarize derives Cases from Runs.
func (r *Result) Summarize() {
	r.Cases = nil
	for _, run := range r.Runs {
		if !slices.ContainsFunc(r.Cases, func(c CaseSummary) bool { return c.Case == run.Case }) {
			r.Cases = append(r.Cases, CaseSummary{Case: run.Case})
		}
	}
	for i := range r.Cases {
		c := &r.Cases[i]
		for _, info := range r.Peers {
			p := PeerSummary{Peer: info.Name, Metrics: map[string]Spread{}, Ratios: map[string]Ratio{}}
			for _, run := range r.Runs {
				if run.Case == c.Case && run.Peer == info.Name {
					p.Rounds++
				}
			}
			if p.Rounds == 0 {
				continue
			}
			for _, m := range metrics {
				if s, ok := r.Spread(c.Case, info.Name, m); ok {
					p.Metrics[m.Name] = s
				}
				if ratio, ok := r.Ratio(c.Case, info.Name, r.Options.Baseline, m); ok {
					p.Ratios[m.Name] = ratio
				}
			}
			c.Peers = append(c.Peers, p)
		}
	}
}
