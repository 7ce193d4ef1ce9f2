package gate

import (
	"slices"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

const (
	latencyMax  = "latency_max_us"
	createCall  = "create_us"
	deleteCall  = "delete_us"
	openTiB     = "open_tib_seconds"
	openSeconds = "open_seconds"
	serverBytes = "server_bytes_per_byte"
	diskBytes   = "disk_bytes_per_byte"
)

// StagePeers are the peers that a Stage must have ready for the bars.
func StagePeers(bars []Bar) ([]harness.Peer, error) {
	var names []string
	for _, b := range bars {
		if b.Medium.OnStage() {
			names = append(names, b.Peers()...)
		}
	}
	found, err := harness.FindPeers(names...)
	return slices.DeleteFunc(found, func(p harness.Peer) bool { return harness.Available(p) != nil }), err
}

// OnStage tells whether a medium is a Stage.
func (m Medium) OnStage() bool {
	switch m {
	case Pool, PoolFresh, PoolFilled, PoolCalls, PoolOpen:
		return true
	}
	return false
}

// volume is the state a medium's volume is in.
func (m Medium) volume() harness.Volume {
	switch m {
	case PoolFresh:
		return harness.VolumeFresh
	case PoolFilled:
		return harness.VolumeFilled
	}
	return harness.VolumeMapped
}

var (
	plainFile = []string{"export"}
	qcow2     = []string{"qcow2-prealloc", "qcow2-thin"}
	nbdkitCow = []string{"nbdkit-cow"}
	lvmThin   = []string{"lvm-thin"}
)

// thin is what is claimed beside others that keep thin volumes with snapshots. They
// are named apart: nbdkit's overlay is in the page cache, the others' is not.
func thin() []Claim {
	var claims []Claim
	for _, against := range [][]string{qcow2, nbdkitCow, lvmThin} {
		claims = append(claims,
			atLeast("pool", iops, 1, against),
			atMost("pool", latencyTail, 1, against),
			atMost("pool", cpuPerMillion, 1, against))
	}
	return claims
}

// ofFile is what is claimed beside an export of a plain file.
func ofFile(bound, stretch float64) Claim {
	c := atLeast("pool", iops, bound, plainFile)
	c.Stretch = stretch
	return c
}

// above bounds how much worse a metric may be than another peer's.
func above(subject, metric string, bound float64, against string) Claim {
	c := atMost(subject, metric, bound, []string{against})
	c.Minus = true
	return c
}

// shownOnly documents a metric of which less is better.
func shownOnly(subject, metric string) Claim {
	return Claim{Subject: subject, Metric: metric, AtMost: true, Shown: true}
}

// written documents what a load costs in bytes, of the pool, of the plain file, and
// of qcow2.
func written() []Claim {
	return []Claim{
		shownOnly("pool", serverBytes), shownOnly("export", serverBytes), shownOnly("qcow2-thin", serverBytes),
		shownOnly("pool", diskBytes), shownOnly("export", diskBytes), shownOnly("qcow2-thin", diskBytes),
	}
}

const (
	snapshotSpike = 5e3  // microseconds
	volumeCall    = 50e3 // microseconds
	openMax       = 5    // "within seconds"
)

// poolBars are the bars of the pool, all on one disk.
var poolBars = []Bar{
	{"pool-randread-4k-qd32", "4k random reads, depth 32, all mapped", Pool, "pool-randread-4k-qd32", "fio", append([]Claim{ofFile(0.90, 0.97)}, thin()...)},
	{"pool-randwrite-4k-qd32", "4k random overwrites, depth 32, all mapped", Pool, "pool-randwrite-4k-qd32", "fio", append([]Claim{ofFile(0.90, 0.97)}, thin()...)},
	{"pool-first-randwrite-4k-qd32", "4k random writes to an empty volume, depth 32", PoolFresh, "pool-first-randwrite-4k-qd32", "fio", append([]Claim{ofFile(0.70, 0)}, thin()...)},
	{"pool-read-128k-qd16", "128k reads, depth 16, all mapped", Pool, "pool-read-128k-qd16", "fio", []Claim{ofFile(0.92, 0)}},
	{"pool-write-128k-qd16", "128k overwrites, depth 16, all mapped", Pool, "pool-write-128k-qd16", "fio", []Claim{ofFile(0.92, 0)}},
	{"pool-snapshot-randwrite-4k-qd32", "4k random writes, depth 32, a snapshot every second", PoolFilled, "pool-snapshot-randwrite-4k-qd32", "fio", []Claim{
		above("pool-snapshots", latencyTail, snapshotSpike, "pool"), above("pool-snapshots", latencyMax, snapshotSpike, "pool"),
		shownOnly("pool-snapshots", latencyMax), shownOnly("pool-snapshots", "call_max_us"),
	}},
	{"pool-chain-randread-4k-qd32", "4k random reads, depth 32, 100 snapshots", Pool, "pool-chain-randread-4k-qd32", "fio", []Claim{atLeast("pool-chain", iops, 0.90, []string{"pool"})}},
	{"pool-volume-1tib", "a thin volume of 1 TiB is made, and deleted", PoolCalls, harness.VolumeCallsCase, "fio", []Claim{
		atMost("pool", createCall, volumeCall, nil), atMost("pool", deleteCall, volumeCall, nil),
	}},
	{"pool-open-1tib", "a node starts with 1 TiB mapped (64 GiB, extrapolated)", PoolOpen, harness.OpenCase, "fio", []Claim{
		atMost("pool", openTiB, openMax, nil), shownOnly("pool", openSeconds), shownOnly("pool", resident),
	}},
	{"pool-bytes-write-128k-thin", "bytes written for a byte: 128k sequential, to an empty volume", PoolFresh, "pool-bytes-write-128k-thin", "fio", written()},
	{"pool-bytes-randwrite-4k-thin", "bytes written for a byte: 4k random, to an empty volume", PoolFresh, "pool-bytes-randwrite-4k-thin", "fio", written()},
	{"pool-bytes-randwrite-4k", "bytes written for a byte: 4k random overwrites", Pool, "pool-bytes-randwrite-4k", "fio", written()},
	{"pool-bytes-randwrite-4k-flush", "bytes written for a byte: 4k random overwrites, a flush after each", Pool, "pool-bytes-randwrite-4k-flush", "fio", written()},
}

// countsBytes tells whether what the server writes is to be counted.
func (b Bar) countsBytes() bool {
	for _, c := range b.Claims {
		if c.Metric == serverBytes {
			return true
		}
	}
	return false
}
