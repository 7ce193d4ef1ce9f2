package daemon

//go:generate go run ../../tools/metricsdoc ../../docs/metrics.md

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

// Collectors are the exporter's metrics.
func (e *Exporter) Collectors() []prometheus.Collector {
	counts := func() map[string]*filter.StatsSnapshot {
		all := make(map[string]*filter.StatsSnapshot, len(e.stats))
		for name, stats := range e.stats {
			all[name] = stats.Snapshot()
		}
		return all
	}
	return []prometheus.Collector{&requestCollector{counts: counts, slow: e.slow}, &slowCollector{e.slow}, &nbdCollector{e.Server}, &reactorCollector{e.Reactors}}
}

// collectors are the metrics of a node.
func (n *node) collectors() []prometheus.Collector {
	list := []prometheus.Collector{
		&requestCollector{counts: n.volumes.snapshots, slow: n.slow}, &slowCollector{n.slow}, &limitCollector{n.volumes}, &deviceCollector{n.devices},
		&nbdCollector{n.server}, &poolCollector{n.engine}, &reactorCollector{n.reactors},
	}
	if n.kernel != nil {
		list = append(list, n.kernel.collector())
	}
	return list
}

// ---- requests -------------------------------------------------------------

// requestCollector shows what is counted of each export.
type requestCollector struct {
	counts func() map[string]*filter.StatsSnapshot // by export
	slow   *slowLog                                // nil: none
}

const requestFamily = family(sectionRequests)

var (
	metricLatency = requestFamily.histogram("export_request_seconds",
		"From the arrival of a request to its reply on its way. The export is VOLUME, VOLUME@SNAPSHOT, or POOL/VOLUME where two pools have a volume of one name; "+
			"of an attached file or NBD export its path or URI. Those that are gone disappear.", "export", "op")
	metricStage = requestFamily.histogram("export_request_stage_seconds",
		"What requests spent in a stage of their way: receive, queue, metadata, device, commit, finish, reply. Only stages that were entered.", "export", "op", "stage")
	metricBytes    = requestFamily.counter("export_request_bytes_total", "Length of the requests that succeeded.", "export", "op")
	metricErrors   = requestFamily.counter("export_request_errors_total", "Requests that failed.", "export", "op")
	metricInFlight = requestFamily.gauge("export_requests_in_flight", "Requests under way.", "export")
)

// Describe implements prometheus.Collector.
func (c *requestCollector) Describe(ch chan<- *prometheus.Desc) { requestFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *requestCollector) Collect(ch chan<- prometheus.Metric) {
	for name, s := range c.counts() {
		metricInFlight.send(ch, float64(s.InFlight()), name)
		for op := range datapath.OpCount {
			o := s.Op(op)
			if o.Count == 0 {
				continue
			}
			metricBytes.send(ch, float64(o.Bytes), name, op.String())
			metricErrors.send(ch, float64(o.Errors), name, op.String())
			h := &o.Latency
			metricLatency.sendHistogram(ch, h.Count, h.Sum.Seconds(), h.Export(time.Microsecond, time.Minute, 2), []string{name, op.String()}, c.slow.exemplars(name, op)...)
			for stage, h := range o.Stages {
				if h != nil {
					metricStage.sendHistogram(ch, h.Count, h.Sum.Seconds(), h.Export(time.Microsecond, time.Minute, 4), []string{name, op.String(), datapath.Stage(stage).String()})
				}
			}
		}
	}
}

// limitCollector shows the limits of volumes that have some.
type limitCollector struct{ volumes *volumes }

const limitFamily = family(sectionLimits)

var (
	metricLimitIOPS  = limitFamily.gauge("export_limit_requests_per_second", "Requests a second that the clients of a volume may make, all together. Those above it wait in the stage queue.", "export")
	metricLimitBytes = limitFamily.gauge("export_limit_bytes_per_second", "Bytes a second that the clients of a volume may read and write, all together.", "export")
)

// Describe implements prometheus.Collector.
func (c *limitCollector) Describe(ch chan<- *prometheus.Desc) { limitFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *limitCollector) Collect(ch chan<- prometheus.Metric) {
	list, err := c.volumes.engine.Volumes("")
	if err != nil {
		return // the engine is closed: nobody is served
	}
	for _, i := range list {
		name := c.volumes.exportName(i.Pool, i.Name)
		if i.Limits.IOPS > 0 {
			metricLimitIOPS.send(ch, float64(i.Limits.IOPS), name)
		}
		if i.Limits.Bandwidth > 0 {
			metricLimitBytes.send(ch, float64(i.Limits.Bandwidth), name)
		}
	}
}

// ---- NBD ------------------------------------------------------------------

// nbdCollector shows what an NBD server counts.
type nbdCollector struct{ server *nbd.Server }

const nbdFamily = family(sectionNBD)

var (
	metricRequests    = nbdFamily.counter("nbd_requests_total", "Requests begun, by operation.", "op")
	metricRead        = nbdFamily.counter("nbd_read_bytes_total", "Bytes sent in replies to reads.")
	metricWritten     = nbdFamily.counter("nbd_written_bytes_total", "Bytes of writes the device completed.")
	metricReplyErrors = nbdFamily.counter("nbd_error_replies_total", "Replies with an error.")
	metricNBDInFlight = nbdFamily.gauge("nbd_requests_in_flight", "Requests begun and not answered.")
	metricConnections = nbdFamily.gauge("nbd_connections", "Connections, by state: handshake, transmission.", "state")
	metricAccepted    = nbdFamily.counter("nbd_connections_accepted_total", "Connections taken.")
	metricRefused     = nbdFamily.counter("nbd_connections_refused_total", "Connections turned away because there were too many.")
	metricHandshakes  = nbdFamily.counter("nbd_handshakes_failed_total", "Handshakes that ended in an error.")
)

// Describe implements prometheus.Collector.
func (c *nbdCollector) Describe(ch chan<- *prometheus.Desc) { nbdFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *nbdCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.server.Stats()
	for op := range datapath.OpCount {
		metricRequests.send(ch, float64(s.Totals.Requests[op]), op.String())
	}
	metricRead.send(ch, float64(s.Totals.BytesRead))
	metricWritten.send(ch, float64(s.Totals.BytesWritten))
	metricReplyErrors.send(ch, float64(s.Totals.Errors))
	metricNBDInFlight.send(ch, float64(s.Totals.InFlight))
	metricConnections.send(ch, float64(s.Connections), "transmission")
	metricConnections.send(ch, float64(s.Negotiating), "handshake")
	metricAccepted.send(ch, float64(s.Accepted))
	metricRefused.send(ch, float64(s.Refused))
	metricHandshakes.send(ch, float64(s.HandshakesFailed))
}

// ---- reactors -------------------------------------------------------------

// reactorCollector shows what reactors do.
type reactorCollector struct{ reactors []*reactor.Reactor }

const reactorFamily = family(sectionReactors)

var (
	metricTime    = reactorFamily.counter("reactor_time_seconds_total", "What the reactor's thread did with its time: busy, spin, sleep.", "reactor", "state")
	metricTurns   = reactorFamily.counter("reactor_turns_total", "Rounds of the reactor's loop.", "reactor")
	metricTurn    = reactorFamily.histogram("reactor_turn_seconds", "How long rounds took: for so long nothing else of the reactor's is served.", "reactor")
	metricGap     = reactorFamily.gauge("reactor_turn_max_seconds", "The longest round so far.", "reactor")
	metricEnters  = reactorFamily.counter("reactor_enters_total", "System calls of the loop: to submit, to look for what has completed, to wait.", "reactor")
	metricSleeps  = reactorFamily.counter("reactor_sleeps_total", "Times the reactor slept in the kernel.", "reactor")
	metricIOs     = reactorFamily.counter("reactor_device_completions_total", "Operations of devices that ended.", "reactor")
	metricService = reactorFamily.gauge("reactor_device_service_seconds", "Mean service time of the devices, from which the spin budget comes: observed, else learned.", "reactor")
	metricSpin    = reactorFamily.gauge("reactor_spin_budget_seconds", "How long the reactor looks for work before it sleeps, now.", "reactor")
)

// Describe implements prometheus.Collector.
func (c *reactorCollector) Describe(ch chan<- *prometheus.Desc) { reactorFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *reactorCollector) Collect(ch chan<- prometheus.Metric) {
	for _, r := range c.reactors {
		st := r.Stats()
		metricTime.send(ch, st.Busy.Seconds(), st.Name, "busy")
		metricTime.send(ch, st.Spun.Seconds(), st.Name, "spin")
		metricTime.send(ch, st.Slept.Seconds(), st.Name, "sleep")
		metricTurns.send(ch, float64(st.Turns), st.Name)
		count, sum, buckets := turnBuckets(&st)
		metricTurn.sendHistogram(ch, count, sum, buckets, []string{st.Name})
		metricGap.send(ch, st.GapMax.Seconds(), st.Name)
		metricEnters.send(ch, float64(st.Enters), st.Name)
		metricSleeps.send(ch, float64(st.Sleeps), st.Name)
		metricIOs.send(ch, float64(st.Completions), st.Name)
		metricService.send(ch, st.ServiceTime.Seconds(), st.Name)
		metricSpin.send(ch, st.SpinBudget.Seconds(), st.Name)
	}
}

// turnBuckets are the turns of a reactor at most so long, from a microsecond to a
// second. Their sum is the time it was not asleep.
func turnBuckets(st *reactor.Stats) (count uint64, sum float64, buckets map[float64]uint64) {
	buckets = map[float64]uint64{}
	for i, n := range st.Gaps {
		count += n
		if end := time.Duration(1) << (i + 1); i >= 9 && i < 30 { // bucket i ends before 2^(i+1) ns
			buckets[end.Seconds()] = count
		}
	}
	return count, (st.Busy + st.Spun).Seconds(), buckets
}

// ---- attached devices -----------------------------------------------------

// deviceCollector shows the block devices that are attached.
type deviceCollector struct{ devices *devices }

const deviceFamily = family(sectionDevices)

var metricDeviceState = deviceFamily.gauge("device_state",
	"1 for the state an attached device is in: online, waiting (requests wait for its server or its source), failed.", "device", "source", "via", "state")

// Describe implements prometheus.Collector.
func (c *deviceCollector) Describe(ch chan<- *prometheus.Desc) { deviceFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *deviceCollector) Collect(ch chan<- prometheus.Metric) {
	for _, a := range c.devices.all() {
		now, _ := a.state()
		for _, state := range []controlpb.DeviceState{controlpb.DeviceState_DEVICE_STATE_ONLINE, controlpb.DeviceState_DEVICE_STATE_WAITING, controlpb.DeviceState_DEVICE_STATE_FAILED} {
			value := 0.0
			if state == now {
				value = 1
			}
			name := strings.ToLower(strings.TrimPrefix(state.String(), "DEVICE_STATE_"))
			metricDeviceState.send(ch, value, a.path(), a.source.name, viaNames[a.via], name)
		}
	}
}
