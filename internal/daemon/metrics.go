package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

// collector reads counters when Prometheus asks.
type collector struct {
	server   *nbd.Server
	reactors []*reactor.Reactor
	stats    func() map[string]*filter.StatsSnapshot // by export
}

// Collector is the exporter's metrics.
func (e *Exporter) Collector() prometheus.Collector {
	return &collector{e.Server, e.Reactors, func() map[string]*filter.StatsSnapshot {
		all := make(map[string]*filter.StatsSnapshot, len(e.stats))
		for name, stats := range e.stats {
			all[name] = stats.Snapshot()
		}
		return all
	}}
}

var (
	descRequests    = prometheus.NewDesc("nbd_requests_total", "Requests begun, by operation.", []string{"op"}, nil)
	descRead        = prometheus.NewDesc("nbd_read_bytes_total", "Bytes sent in replies to reads.", nil, nil)
	descWritten     = prometheus.NewDesc("nbd_written_bytes_total", "Bytes of writes the device completed.", nil, nil)
	descErrors      = prometheus.NewDesc("nbd_error_replies_total", "Replies with an error.", nil, nil)
	descInFlight    = prometheus.NewDesc("nbd_requests_in_flight", "Requests begun and not answered.", nil, nil)
	descConnections = prometheus.NewDesc("nbd_connections", "Connections, by state.", []string{"state"}, nil)
	descAccepted    = prometheus.NewDesc("nbd_connections_accepted_total", "Connections taken.", nil, nil)
	descRefused     = prometheus.NewDesc("nbd_connections_refused_total", "Connections turned away because there were too many.", nil, nil)
	descHandshakes  = prometheus.NewDesc("nbd_handshakes_failed_total", "Handshakes that ended in an error.", nil, nil)
	descTime        = prometheus.NewDesc("reactor_time_seconds_total", "What the reactor's thread did with its time.", []string{"reactor", "state"}, nil)
	descTurns       = prometheus.NewDesc("reactor_turns_total", "Rounds of the reactor's loop.", []string{"reactor"}, nil)
	descSleeps      = prometheus.NewDesc("reactor_sleeps_total", "Times the reactor slept in the kernel.", []string{"reactor"}, nil)
	descIOs         = prometheus.NewDesc("reactor_device_completions_total", "Operations of devices that ended.", []string{"reactor"}, nil)
	descGap         = prometheus.NewDesc("reactor_turn_max_seconds", "The longest turn so far.", []string{"reactor"}, nil)
	descService     = prometheus.NewDesc("reactor_device_service_seconds", "Learned mean service time of the devices.", []string{"reactor"}, nil)
	descLatency     = prometheus.NewDesc("export_request_seconds", "From the submission of a request to the device to its completion, by export and operation.", []string{"export", "op"}, nil)
	descSpin        = prometheus.NewDesc("reactor_spin_budget_seconds", "How long the reactor looks for work before it sleeps.", []string{"reactor"}, nil)
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descRequests, descRead, descWritten, descErrors, descInFlight, descConnections, descAccepted,
		descRefused, descHandshakes, descTime, descTurns, descSleeps, descIOs, descGap, descService, descSpin, descLatency} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := c.server.Stats()
	for op := range datapath.OpCount {
		counter(descRequests, float64(s.Totals.Requests[op]), op.String())
	}
	counter(descRead, float64(s.Totals.BytesRead))
	counter(descWritten, float64(s.Totals.BytesWritten))
	counter(descErrors, float64(s.Totals.Errors))
	gauge(descInFlight, float64(s.Totals.InFlight))
	gauge(descConnections, float64(s.Connections), "transmission")
	gauge(descConnections, float64(s.Negotiating), "handshake")
	counter(descAccepted, float64(s.Accepted))
	counter(descRefused, float64(s.Refused))
	counter(descHandshakes, float64(s.HandshakesFailed))
	for name, snapshot := range c.stats() {
		for op := range datapath.OpCount {
			if h := &snapshot[op].Latency; snapshot[op].Count > 0 {
				ch <- prometheus.MustNewConstHistogram(descLatency, snapshot[op].Count, h.Mean().Seconds()*float64(snapshot[op].Count),
					h.Export(time.Microsecond, time.Minute), name, op.String())
			}
		}
	}
	for _, r := range c.reactors {
		st := r.Stats()
		counter(descTime, st.Busy.Seconds(), st.Name, "busy")
		counter(descTime, st.Spun.Seconds(), st.Name, "spin")
		counter(descTime, st.Slept.Seconds(), st.Name, "sleep")
		counter(descTurns, float64(st.Turns), st.Name)
		counter(descSleeps, float64(st.Sleeps), st.Name)
		counter(descIOs, float64(st.Completions), st.Name)
		gauge(descGap, st.GapMax.Seconds(), st.Name)
		gauge(descService, st.ServiceTime.Seconds(), st.Name)
		gauge(descSpin, st.SpinBudget.Seconds(), st.Name)
	}
}
