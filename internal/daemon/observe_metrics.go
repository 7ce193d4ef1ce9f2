package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ashlar-storage/ashlar/observe"
)

const sectionKernel = "The kernel (`serve --observe`)"

const kernelFamily = family(sectionKernel)

var (
	metricDiskQueue    = kernelFamily.histogram("disk_queue_seconds", "How long requests to a disk waited, from their beginning to their issue to the driver, by operation: read, write, flush, discard, write-zeroes. All disks of the host, and everybody's requests.", "disk", "op")
	metricDiskService  = kernelFamily.histogram("disk_service_seconds", "How long the driver and the disk needed, from issue to completion, by operation.", "disk", "op")
	metricDiskSize     = kernelFamily.histogram("disk_request_bytes", "Sizes of completed requests, by operation.", "disk", "op")
	metricDiskErrors   = kernelFamily.counter("disk_errors_total", "Requests that ended with an error, by operation.", "disk", "op")
	metricDiskMerges   = kernelFamily.counter("disk_merges_total", "Requests, or parts of them, that became parts of others, by operation.", "disk", "op")
	metricDiskRequeues = kernelFamily.counter("disk_requeues_total", "Requests that the driver handed back to the queue, by operation.", "disk", "op")
	metricDiskDepth    = kernelFamily.gauge("disk_requests_in_flight", "Requests that were issued to the driver and are not completed.", "disk")
	metricOffCPU       = kernelFamily.histogram("reactor_off_cpu_seconds", "How long the reactor's thread was off its CPU, each time.", "reactor")
	metricWaiting      = kernelFamily.histogram("reactor_cpu_wait_seconds", "That part of reactor_off_cpu_seconds in which the thread had work, and another thread had its CPU. Alert when it grows.", "reactor")
	metricWakeup       = kernelFamily.histogram("reactor_wakeup_seconds", "From the waking of the reactor's thread to its running.", "reactor")
	metricRing         = kernelFamily.histogram("ring_request_seconds", "From the submission of a request to an io_uring ring of the daemon to its first completion, by kind: read, write, sync, socket, wait, command, other.", "kind")
	metricRingRequests = kernelFamily.counter("ring_requests_total", "Requests submitted to io_uring rings of the daemon, by kind.", "kind")
	metricNBDClient    = kernelFamily.histogram("nbd_client_seconds", "What requests of the kernel's NBD client spent, by phase: send (into the socket), wait (for the server's answer), receive (its payload).", "device", "phase")
	metricObserved     = kernelFamily.gauge("observe_up", "1 for what of the kernel is observed, 0 for what is not: disks, reactors, io_uring, nbd, ublk. `ashlar top` says why not.", "what")
	metricMissed       = kernelFamily.counter("observe_missed_total", "Events that fell into another one of the same kind on the same CPU, and were not counted; and requests to disks that were counted without their times.")
)

// kernelCollector shows what the kernel was seen to do.
type kernelCollector struct{ kernel *kernelObserver }

// collector is the metrics of what is observed.
func (k *kernelObserver) collector() prometheus.Collector { return &kernelCollector{k} }

// Describe implements prometheus.Collector.
func (c *kernelCollector) Describe(ch chan<- *prometheus.Desc) { kernelFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *kernelCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.kernel.snapshot()
	up := map[string]float64{observe.GroupDisks: 1, observe.GroupReactors: 1, observe.GroupRings: 1, observe.GroupNBD: 1, observe.GroupUblk: 1}
	for _, u := range s.Unobserved {
		up[u.What] = 0
	}
	for what, value := range up {
		metricObserved.send(ch, value, what)
	}
	metricMissed.send(ch, float64(s.Missed))
	sent := make(map[string]bool) // a name is a series, and is sent once
	for i := range s.Disks {
		d := &s.Disks[i]
		if sent[d.Name] {
			continue
		}
		sent[d.Name] = true
		metricDiskDepth.send(ch, float64(d.Depth), d.Name)
		for j := range d.Operations {
			o := &d.Operations[j]
			metricDiskQueue.sendKernel(ch, &o.Queue, d.Name, o.Operation)
			metricDiskService.sendKernel(ch, &o.Service, d.Name, o.Operation)
			metricDiskSize.sendHistogram(ch, o.Count, float64(o.Bytes), sizeBuckets(o), []string{d.Name, o.Operation})
			metricDiskErrors.send(ch, float64(o.Errors), d.Name, o.Operation)
			metricDiskMerges.send(ch, float64(o.Merges), d.Name, o.Operation)
			metricDiskRequeues.send(ch, float64(o.Requeues), d.Name, o.Operation)
		}
	}
	for i := range s.Threads {
		t := &s.Threads[i]
		for _, r := range c.kernel.reactors {
			if st := r.Stats(); st.Thread == t.ID {
				metricOffCPU.sendKernel(ch, &t.OffCPU, st.Name)
				metricWaiting.sendKernel(ch, &t.Waiting, st.Name)
				metricWakeup.sendKernel(ch, &t.Wakeup, st.Name)
			}
		}
	}
	for i := range s.Rings {
		metricRing.sendKernel(ch, &s.Rings[i].Time, s.Rings[i].Kind)
		metricRingRequests.send(ch, float64(s.Rings[i].Submitted), s.Rings[i].Kind)
	}
	for i := range s.NBD {
		n := &s.NBD[i]
		metricNBDClient.sendKernel(ch, &n.Send, n.Name, "send")
		metricNBDClient.sendKernel(ch, &n.Wait, n.Name, "wait")
		metricNBDClient.sendKernel(ch, &n.Receive, n.Name, "receive")
	}
}

// sendKernel sends a histogram of the kernel, with a bucket for every power of two of
// nanoseconds from a microsecond to 17 seconds: there its counts are exact.
func (m *metric) sendKernel(ch chan<- prometheus.Metric, h *observe.Histogram, labels ...string) {
	buckets := make(map[float64]uint64)
	for bound := time.Duration(1 << 10); bound <= 1<<34; bound *= 2 {
		buckets[bound.Seconds()] = h.AtMost(bound)
	}
	m.sendHistogram(ch, h.Count(), time.Duration(h.Sum).Seconds(), buckets, labels)
}

// sizeBuckets has sizes of 512 bytes to 8 MiB.
func sizeBuckets(o *observe.DiskOperation) map[float64]uint64 {
	buckets := make(map[float64]uint64)
	var count uint64
	for i, n := range o.Sizes[:len(o.Sizes)-1] {
		count += n
		buckets[float64(int(512)<<i)] = count
	}
	return buckets
}
