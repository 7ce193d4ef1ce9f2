package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// poolCollector reads what the pools of an engine say of themselves.
type poolCollector struct{ engine *engine.Engine }

var (
	descPoolState       = prometheus.NewDesc("pool_state", "1 for the state a pool is in: online, read-only, stopped, closed.", []string{"pool", "state"}, nil)
	descPoolSize        = prometheus.NewDesc("pool_size_bytes", "All bytes of a pool: allocated, metadata and free together.", []string{"pool"}, nil)
	descPoolUsed        = prometheus.NewDesc("pool_used_bytes", "Bytes of a pool by kind: allocated (data of volumes and snapshots), metadata.", []string{"pool", "kind"}, nil)
	descPoolFree        = prometheus.NewDesc("pool_free_bytes", "Bytes not in use.", []string{"pool"}, nil)
	descPoolKept        = prometheus.NewDesc("pool_kept_bytes", "Part of the free bytes, by what it is kept for: reserved (thick volumes), reserve (the pool itself).", []string{"pool", "kind"}, nil)
	descPoolAvailable   = prometheus.NewDesc("pool_available_bytes", "Bytes any volume can still get.", []string{"pool"}, nil)
	descPoolProvisioned = prometheus.NewDesc("pool_provisioned_bytes", "The sizes of all volumes together.", []string{"pool"}, nil)
	descPoolVolumes     = prometheus.NewDesc("pool_volumes", "Volumes in a pool.", []string{"pool"}, nil)
	descPoolSnapshots   = prometheus.NewDesc("pool_snapshots", "Snapshots in a pool.", []string{"pool"}, nil)
	descPoolDirty       = prometheus.NewDesc("pool_dirty_regions", "Regions marked dirty in the intent log: what is looked at again after a crash.", []string{"pool"}, nil)
	descPoolJournal     = prometheus.NewDesc("pool_journal_bytes", "Size of the journal.", []string{"pool"}, nil)
	descPoolJournalUsed = prometheus.NewDesc("pool_journal_used_bytes", "Bytes of the journal that the next checkpoint frees.", []string{"pool"}, nil)
	descPoolGroups      = prometheus.NewDesc("pool_journal_groups_total", "Groups written to the journal since the pool was opened.", []string{"pool"}, nil)
	descPoolMissing     = prometheus.NewDesc("pool_devices_missing", "Devices of a pool that are not there.", []string{"pool"}, nil)
	descPoolDevices     = prometheus.NewDesc("pool_devices", "Devices of a pool, the missing ones included.", []string{"pool"}, nil)
	descPoolJobs        = prometheus.NewDesc("pool_jobs", "Jobs under way, by kind.", []string{"pool", "kind"}, nil)
	descJobDone         = prometheus.NewDesc("pool_job_done_bytes", "What a job under way has done.", []string{"pool", "kind", "target"}, nil)
	descJobTotal        = prometheus.NewDesc("pool_job_total_bytes", "What a job under way has to do.", []string{"pool", "kind", "target"}, nil)
	descEvents          = prometheus.NewDesc("pool_events_total", "Events of pools since the daemon began, by kind.", []string{"kind"}, nil)
)

// Describe implements prometheus.Collector.
func (c *poolCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descPoolState, descPoolSize, descPoolUsed, descPoolFree, descPoolKept, descPoolAvailable, descPoolProvisioned,
		descPoolVolumes, descPoolSnapshots, descPoolDirty, descPoolJournal, descPoolJournalUsed, descPoolGroups, descPoolMissing, descPoolDevices,
		descPoolJobs, descJobDone, descJobTotal, descEvents} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *poolCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	for _, i := range c.engine.Pools() {
		for _, state := range []pool.State{pool.StateOnline, pool.StateReadOnly, pool.StateStopped, engine.StateClosed} {
			value := 0.0
			if i.State == state {
				value = 1
			}
			gauge(descPoolState, value, i.Name, string(state))
		}
		missing := 0
		for _, d := range i.Devices {
			if !d.Present {
				missing++
			}
		}
		gauge(descPoolDevices, float64(len(i.Devices)), i.Name)
		if !i.Open {
			continue // of a pool that is not open nothing else is known
		}
		gauge(descPoolMissing, float64(missing), i.Name)
		gauge(descPoolSize, float64(i.Total), i.Name)
		gauge(descPoolUsed, float64(i.Allocated), i.Name, "allocated")
		gauge(descPoolUsed, float64(i.Info.Metadata), i.Name, "metadata")
		gauge(descPoolFree, float64(i.Free), i.Name)
		gauge(descPoolKept, float64(i.Reserved), i.Name, "reserved")
		gauge(descPoolKept, float64(i.Reserve), i.Name, "reserve")
		gauge(descPoolAvailable, float64(i.Available), i.Name)
		gauge(descPoolProvisioned, float64(i.Provisioned), i.Name)
		gauge(descPoolVolumes, float64(i.Volumes), i.Name)
		gauge(descPoolSnapshots, float64(i.Snapshots), i.Name)
		gauge(descPoolDirty, float64(i.DirtyRegions), i.Name)
		gauge(descPoolJournal, float64(i.Journal.Bytes), i.Name)
		gauge(descPoolJournalUsed, float64(i.Journal.Used), i.Name)
		counter(descPoolGroups, float64(i.Journal.Groups), i.Name)
	}
	jobs, err := c.engine.Jobs("")
	if err == nil { // else the engine is closed, and has none
		running := map[[2]string]int{}
		type progress struct{ pool, kind, target string }
		seen := map[progress]bool{}
		for _, j := range jobs {
			if !j.Ended.IsZero() {
				continue
			}
			running[[2]string{j.Pool, string(j.Kind)}]++
			p := progress{j.Pool, string(j.Kind), j.Target}
			if seen[p] {
				continue // a series is sent once
			}
			seen[p] = true
			gauge(descJobDone, float64(j.Done), j.Pool, string(j.Kind), j.Target)
			gauge(descJobTotal, float64(j.Total), j.Pool, string(j.Kind), j.Target)
		}
		for k, n := range running {
			gauge(descPoolJobs, float64(n), k[0], k[1])
		}
	}
	for kind, n := range c.engine.EventCounts() {
		counter(descEvents, float64(n), string(kind))
	}
}
