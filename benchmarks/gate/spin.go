package gate

// spin is what is claimed of the learned spin budget: it costs no more than polling
// always, and loses nothing to never polling. What the three take is documented.
func spin() []Claim {
	claims := []Claim{
		atMost("ashlar-auto", cpuPerMillion, 1.05, []string{"ashlar-busy"}),
		atLeast("ashlar-auto", iops, 0.95, []string{"ashlar-off"}),
	}
	for _, metric := range []string{latencyMedian, latencyTail, cpuPerMillion} {
		for _, peer := range []string{"ashlar-auto", "ashlar-busy", "ashlar-off"} {
			claims = append(claims, shownOnly(peer, metric))
		}
	}
	return claims
}

// spinBars compare what a reactor does with no work: look for a learned time, always,
// or never. All are pinned: placement must not differ.
var spinBars = []Bar{
	{"spin-tmpfs-randread-4k-qd1", "auto, busy and no polling: 4k random reads of tmpfs, one at a time", Tmpfs, "randread-4k-qd1", "fio", spin()},
	{"spin-disk-randread-4k-qd1", "auto, busy and no polling: 4k random reads of a disk, one at a time", Disk, "randread-4k-qd1", "fio", spin()},
	{"spin-disk-randread-4k-qd32", "auto, busy and no polling: 4k random reads of a disk, depth 32", Disk, "randread-4k-qd32", "fio", spin()},
	{"spin-idle", "auto and no polling: an export nobody uses, one connection open", Idle, "idle", "devperf", []Claim{
		atMost("ashlar-auto", cpuShare, 0.01, nil), shownOnly("ashlar-off", cpuShare), shownOnly("ashlar-busy", cpuShare),
	}},
}

// observed is what observation may cost.
func observed() []Claim {
	c := atLeast("pool-observed", iops, 0.98, []string{"pool-unobserved"})
	c.Stretch = 0.99
	return []Claim{c, shownOnly("pool-observed", cpuPerMillion), shownOnly("pool-unobserved", cpuPerMillion), shownOnly("pool-observed", latencyTail), shownOnly("pool-unobserved", latencyTail)}
}

// observeBars compare a node that observes everything with one that observes nothing:
// stages of requests, slow requests, metrics, and the kernel's side.
var observeBars = []Bar{
	{"observe-randread-4k-qd32", "everything observed: 4k random reads, depth 32, all mapped", Pool, "pool-randread-4k-qd32", "fio", observed()},
	{"observe-randwrite-4k-qd32", "everything observed: 4k random overwrites, depth 32, all mapped", Pool, "pool-randwrite-4k-qd32", "fio", observed()},
}
