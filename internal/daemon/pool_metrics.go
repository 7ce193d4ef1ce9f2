package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// poolCollector reads what the pools of an engine say of themselves.
type poolCollector struct{ engine *engine.Engine }

const poolFamily = family(sectionPools)

var (
	metricPoolState       = poolFamily.gauge("pool_state", "1 for the state a pool is in: online, read-only, stopped, closed (known, and could not be opened). Of a closed pool only this and pool_devices are known.", "pool", "state")
	metricPoolSize        = poolFamily.gauge("pool_size_bytes", "All bytes of a pool: allocated, metadata and free together.", "pool")
	metricPoolUsed        = poolFamily.gauge("pool_used_bytes", "Bytes of a pool by kind: allocated (data of volumes and snapshots), metadata.", "pool", "kind")
	metricPoolFree        = poolFamily.gauge("pool_free_bytes", "Bytes not in use.", "pool")
	metricPoolKept        = poolFamily.gauge("pool_kept_bytes", "Part of the free bytes, by what it is kept for: reserved (thick volumes), reserve (the pool itself).", "pool", "kind")
	metricPoolAvailable   = poolFamily.gauge("pool_available_bytes", "Bytes any volume can still get. Alert on this one.", "pool")
	metricPoolProvisioned = poolFamily.gauge("pool_provisioned_bytes", "The sizes of all volumes together.", "pool")
	metricPoolVolumes     = poolFamily.gauge("pool_volumes", "Volumes in a pool.", "pool")
	metricPoolSnapshots   = poolFamily.gauge("pool_snapshots", "Snapshots in a pool.", "pool")
	metricPoolDirty       = poolFamily.gauge("pool_dirty_regions", "Regions marked dirty in the intent log: what is looked at again after a crash.", "pool")
	metricPoolJournal     = poolFamily.gauge("pool_journal_bytes", "Size of the journal.", "pool")
	metricPoolJournalUsed = poolFamily.gauge("pool_journal_used_bytes", "Bytes of the journal that the next checkpoint frees.", "pool")
	metricPoolGroups      = poolFamily.counter("pool_journal_groups_total", "Groups written to the journal since the pool was opened.", "pool")
	metricPoolMissing     = poolFamily.gauge("pool_devices_missing", "Devices of a pool that are not there.", "pool")
	metricPoolDevices     = poolFamily.gauge("pool_devices", "Devices of a pool, the missing ones included.", "pool")
	metricPoolJobs        = poolFamily.gauge("pool_jobs", "Jobs under way, by kind: merge, delete, scrub.", "pool", "kind")
	metricJobDone         = poolFamily.gauge("pool_job_done_bytes", "What a job under way has done.", "pool", "kind", "target")
	metricJobTotal        = poolFamily.gauge("pool_job_total_bytes", "What a job under way has to do.", "pool", "kind", "target")
	metricEvents          = poolFamily.counter("pool_events_total", "Events of pools since the daemon began, by kind: corrupt, io-error, stopped, space-low, full, repaired; opened, not-open, closed, ambiguous.", "kind")
)

// Describe implements prometheus.Collector.
func (c *poolCollector) Describe(ch chan<- *prometheus.Desc) { poolFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *poolCollector) Collect(ch chan<- prometheus.Metric) {
	for _, i := range c.engine.Pools() {
		for _, state := range []pool.State{pool.StateOnline, pool.StateReadOnly, pool.StateStopped, engine.StateClosed} {
			value := 0.0
			if i.State == state {
				value = 1
			}
			metricPoolState.send(ch, value, i.Name, string(state))
		}
		missing := 0
		for _, d := range i.Devices {
			if !d.Present {
				missing++
			}
		}
		metricPoolDevices.send(ch, float64(len(i.Devices)), i.Name)
		if !i.Open {
			continue // of a pool that is not open nothing else is known
		}
		metricPoolMissing.send(ch, float64(missing), i.Name)
		metricPoolSize.send(ch, float64(i.Total), i.Name)
		metricPoolUsed.send(ch, float64(i.Allocated), i.Name, "allocated")
		metricPoolUsed.send(ch, float64(i.Info.Metadata), i.Name, "metadata")
		metricPoolFree.send(ch, float64(i.Free), i.Name)
		metricPoolKept.send(ch, float64(i.Reserved), i.Name, "reserved")
		metricPoolKept.send(ch, float64(i.Reserve), i.Name, "reserve")
		metricPoolAvailable.send(ch, float64(i.Available), i.Name)
		metricPoolProvisioned.send(ch, float64(i.Provisioned), i.Name)
		metricPoolVolumes.send(ch, float64(i.Volumes), i.Name)
		metricPoolSnapshots.send(ch, float64(i.Snapshots), i.Name)
		metricPoolDirty.send(ch, float64(i.DirtyRegions), i.Name)
		metricPoolJournal.send(ch, float64(i.Journal.Bytes), i.Name)
		metricPoolJournalUsed.send(ch, float64(i.Journal.Used), i.Name)
		metricPoolGroups.send(ch, float64(i.Journal.Groups), i.Name)
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
			metricJobDone.send(ch, float64(j.Done), j.Pool, string(j.Kind), j.Target)
			metricJobTotal.send(ch, float64(j.Total), j.Pool, string(j.Kind), j.Target)
		}
		for k, n := range running {
			metricPoolJobs.send(ch, float64(n), k[0], k[1])
		}
	}
	for kind, n := range c.engine.EventCounts() {
		metricEvents.send(ch, float64(n), string(kind))
	}
}
