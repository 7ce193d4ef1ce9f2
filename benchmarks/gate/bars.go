package gate

import "slices"

// Medium is what a bar is measured on.
type Medium string

// The media.
const (
	Tmpfs Medium = "tmpfs" // a file on tmpfs
	Disk  Medium = "disk"  // a file or block device on a real disk
	Null  Medium = "null"  // no storage: reads are zeros, writes are forgotten
	Idle  Medium = "idle"  // a file nobody reads

	Pool       Medium = "pool"        // a volume of a pool on a real disk, every block written before
	PoolFresh  Medium = "pool-fresh"  // an empty volume, a new one for each run
	PoolFilled Medium = "pool-filled" // a new volume for each run, its first quarter written
	PoolCalls  Medium = "pool-calls"  // the control API
	PoolOpen   Medium = "pool-open"   // the start of a node
)

// Bar is one thing claimed.
type Bar struct {
	Name   string
	Title  string
	Medium Medium
	Case   string // job of the bars profile
	Client string
	Claims []Claim
}

// Claim is one bound of a bar. With Against it bounds the ratio of the subject's
// median to the best median among those named, best in that metric; without, it
// bounds the subject's median.
type Claim struct {
	Subject string
	Metric  string
	Against []string
	Bound   float64
	AtMost  bool // else at least

	Minus   bool    // bounds the difference to the best median instead of the ratio
	Shown   bool    // has no bound: documented, not judged
	Stretch float64 // a further bound aimed at, not judged; 0: none
}

// Peers are the peers the bar needs, subjects first.
func (b Bar) Peers() []string {
	var names []string
	add := func(name string) {
		for _, n := range names {
			if n == name {
				return
			}
		}
		names = append(names, name)
	}
	for _, c := range b.Claims {
		add(c.Subject)
	}
	for _, c := range b.Claims {
		for _, name := range c.Against {
			add(name)
		}
	}
	return names
}

const (
	iops          = "iops"
	iopsPerCPU    = "iops_per_server_cpu_second"
	cpuPerMillion = "server_cpu_seconds_per_million"
	latencyMedian = "latency_p50_us"
	latencyTail   = "latency_p999_us"
	cpuShare      = "server_cpu"
	resident      = "server_resident_bytes"
)

var (
	nbdkit    = []string{"nbdkit-1", "nbdkit-16"}
	nbdAny    = []string{"nbdkit-1", "nbdkit-16", "nbd-server"}
	qemu      = []string{"qemu-nbd-native", "qemu-nbd-io_uring"}
	qemuAIO   = []string{"qemu-nbd-native"}
	rawDevice = []string{"raw"}
)

func atLeast(subject, metric string, bound float64, against []string) Claim {
	return Claim{Subject: subject, Metric: metric, Bound: bound, Against: against}
}

func atMost(subject, metric string, bound float64, against []string) Claim {
	return Claim{Subject: subject, Metric: metric, Bound: bound, Against: against, AtMost: true}
}

// deep is what is claimed at depth 32, where fio's own client is the limit
// against nbdkit: little in IOPS, more per CPU and in the tail.
func deep() []Claim {
	return []Claim{
		atLeast("ashlar", iops, 1.25, nbdkit),
		atLeast("ashlar", iopsPerCPU, 1.7, nbdkit),
		atMost("ashlar", latencyTail, 0.6, nbdkit),
		atLeast("ashlar", iops, 2, qemu),
	}
}

// shallow is what is claimed of one request at a time.
func shallow() []Claim {
	return []Claim{atLeast("ashlar", iops, 1, nbdkit), atLeast("ashlar-busy", iops, 1.3, nbdkit)}
}

// Bars are all bars.
var Bars = slices.Concat(exportBars, spinBars, poolBars, observeBars)

// exportBars are the bars of the NBD export.
var exportBars = []Bar{
	{"tmpfs-randread-4k-qd32", "4k random reads, depth 32", Tmpfs, "randread-4k-qd32", "fio", deep()},
	{"tmpfs-randwrite-4k-qd32", "4k random writes, depth 32", Tmpfs, "randwrite-4k-qd32", "fio", deep()},
	{"tmpfs-randread-4k-qd128", "4k random reads, depth 128", Tmpfs, "randread-4k-qd128", "fio", []Claim{atLeast("ashlar", iops, 1.2, nbdAny)}},
	{"tmpfs-randwrite-4k-qd128", "4k random writes, depth 128", Tmpfs, "randwrite-4k-qd128", "fio", []Claim{atLeast("ashlar", iops, 1.2, nbdAny)}},
	{"tmpfs-randread-4k-qd32-jobs4", "4k random reads, 4 connections, depth 32", Tmpfs, "randread-4k-qd32-jobs4", "fio", []Claim{atLeast("ashlar", iops, 1.3, nbdAny)}},
	{"tmpfs-randwrite-4k-qd32-jobs4", "4k random writes, 4 connections, depth 32", Tmpfs, "randwrite-4k-qd32-jobs4", "fio", []Claim{atLeast("ashlar", iops, 1.3, nbdAny)}},
	{"tmpfs-read-128k-qd16", "128k reads, depth 16, 2 reactors", Tmpfs, "read-128k-qd16", "fio", []Claim{atLeast("ashlar-r2", iops, 1, nbdkit)}},
	{"tmpfs-write-128k-qd16", "128k writes, depth 16, 2 reactors", Tmpfs, "write-128k-qd16", "fio", []Claim{atLeast("ashlar-r2", iops, 1, nbdkit)}},
	{"tmpfs-randread-4k-qd1", "4k random reads, one at a time", Tmpfs, "randread-4k-qd1", "fio", shallow()},
	{"tmpfs-randwrite-4k-qd1", "4k random writes, one at a time", Tmpfs, "randwrite-4k-qd1", "fio", shallow()},
	{"tmpfs-randwrite-4k-qd1-fsync", "4k random writes, a flush after each", Tmpfs, "randwrite-4k-qd1-fsync", "fio", shallow()},
	{"disk-randwrite-4k-qd32", "4k random writes, depth 32", Disk, "randwrite-4k-qd32", "fio", []Claim{atLeast("ashlar", iops, 2, qemuAIO), atLeast("ashlar", iops, 0.75, rawDevice)}},
	{"disk-randwrite-4k-qd128", "4k random writes, depth 128", Disk, "randwrite-4k-qd128", "fio", []Claim{atLeast("ashlar", iops, 2.4, qemuAIO), atLeast("ashlar", iops, 0.75, rawDevice)}},
	{"disk-randread-4k-qd32", "4k random reads, depth 32", Disk, "randread-4k-qd32", "fio", []Claim{atLeast("ashlar", iops, 1.25, qemuAIO)}},
	{"disk-randwrite-4k-qd1-fsync", "4k random writes, a flush after each", Disk, "randwrite-4k-qd1-fsync", "fio", []Claim{atLeast("ashlar", iops, 1.3, qemuAIO)}},
	{"null-randread-4k-qd32", "4k random reads, depth 32, batching client", Null, "randread-4k-qd32", "devperf", []Claim{atLeast("ashlar", iops, 600e3, nil), atMost("ashlar", cpuPerMillion, 2.6, nil)}},
	{"idle-export", "an export nobody uses, one connection open", Idle, "idle", "devperf", []Claim{atMost("ashlar", cpuShare, 0.01, nil), atMost("ashlar", resident, 40<<20, nil)}},
}
