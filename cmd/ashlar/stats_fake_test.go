package main

import (
	"math/bits"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// fakeNode is what Observe.Stats says of a node that has been at the same work since
// the daemon began, seconds ago. A busy one does all there is to do.
func fakeNode(seconds uint64, busy bool) *controlpb.StatsResponse {
	s := &controlpb.StatsResponse{
		Started: timestamppb.New(day), Time: timestamppb.New(day.Add(time.Duration(seconds) * time.Second)),
		CpuSeconds: 0.35 * float64(seconds), RssBytes: 40<<20 + 1<<19,
		Unobserved: []*controlpb.Unobserved{{What: "nbd", Reason: "the kernel has no tracepoint nbd_header_sent (module nbd)"}},
	}
	r := func(index uint32, busy, idle, sleep uint64) *controlpb.ReactorStats {
		return &controlpb.ReactorStats{
			Index: index, Cpu: index + 2, Pinned: true, BusyNs: busy * 1e6 * seconds, IdleNs: idle * 1e6 * seconds, SleepNs: sleep * 1e6 * seconds,
			Turns: 9000 * seconds, Enters: 4000 * seconds, SpinBudgetNs: 50_000, ServiceNs: 83_000,
			OffCpu: spent(100*seconds, time.Millisecond), Wakeup: spent(100*seconds, 12*time.Microsecond),
		}
	}
	s.Reactors = []*controlpb.ReactorStats{r(0, 310, 190, 500), r(1, 40, 60, 900)}
	if !busy {
		s.Volumes = []*controlpb.VolumeStats{{Name: "vm1", Pool: tank, SizeBytes: 100 << 30}}
		return s
	}
	const us = time.Microsecond
	s.Volumes = []*controlpb.VolumeStats{
		{
			Name: "vm1", Pool: tank, OpenCount: 4, InFlight: 7, SizeBytes: 100 << 30, Operations: []*controlpb.OperationStats{
				did("read", 8000*seconds, 4096, "receive", us, "queue", 3*us, "metadata", 4*us, "device", 95*us, "finish", 2*us, "reply", 3*us),
				did("write", 1000*seconds, 16384, "receive", 9*us, "queue", 3*us, "metadata", 22*us, "device", 80*us, "commit", 900*us, "reply", 2*us),
				did("flush", 20*seconds, 0, "queue", us, "commit", 1200*us, "reply", us),
				did("discard", seconds, 1<<20, "metadata", 40*us, "reply", us),
			},
		},
		{
			Name: "vm2", Pool: tank, OpenCount: 1, InFlight: 32, SizeBytes: 1 << 40, Limits: &controlpb.Limits{Iops: 500}, Operations: []*controlpb.OperationStats{
				did("read", 500*seconds, 4096, "queue", 60_000*us, "device", 90*us, "reply", 2*us),
			},
		},
		{Name: "データ-große-daten-with-a-name-that-goes-on-and-on", Pool: "cellar", OpenCount: 1, SizeBytes: 1 << 30, Operations: []*controlpb.OperationStats{
			did("write", 3*seconds, 4096, "device", 300*us),
		}},
		{Name: "disk.img", SizeBytes: 1 << 30},
	}
	s.Volumes[0].Operations[1].Errors = seconds / 2
	d := func(name string, minor uint32, pool string, operations ...*controlpb.DiskOperationStats) *controlpb.DiskStats {
		return &controlpb.DiskStats{Name: name, Major: 259, Minor: minor, QueueDepth: 6, Merges: 10 * seconds, Pools: []string{pool}, Operations: operations}
	}
	o := func(name string, count uint64, bytes uint64, queue, service time.Duration) *controlpb.DiskOperationStats {
		return &controlpb.DiskOperationStats{Operation: name, Count: count * seconds, Bytes: bytes * count * seconds, Queue: spent(count*seconds, queue), Service: spent(count*seconds, service)}
	}
	s.Disks = []*controlpb.DiskStats{
		d("nvme0n1", 0, tank, o("read", 4250, 4096, us, 84*us), o("write", 1100, 16384, us, 71*us), o("flush", 60, 0, us, 850*us)),
		d("nvme1n1", 1, tank, o("read", 4250, 4096, 2*us, 88*us), o("write", 1100, 16384, us, 75*us)),
		d("sdc", 2, "cellar", o("write", 3, 4096, 40*us, 200*us)),
	}
	return s
}

// did is an operation whose requests each spend as long in every stage.
func did(name string, count, bytes uint64, stages ...any) *controlpb.OperationStats {
	o := &controlpb.OperationStats{Operation: name, Count: count, Bytes: count * bytes}
	var all time.Duration
	for i := 0; i < len(stages); i += 2 {
		d := stages[i+1].(time.Duration)
		o.Stages = append(o.Stages, &controlpb.StageStats{Stage: stages[i].(string), Time: spent(count, d)})
		all += d
	}
	o.Latency = spent(count, all)
	return o
}

// spent is a histogram of durations of about d, and one in fifty of three times that.
// As in the daemon, a power of two has 16 buckets.
func spent(count uint64, d time.Duration) *controlpb.Histogram {
	h := &controlpb.Histogram{Count: count, SumNs: count * uint64(d)}
	for _, p := range []struct{ count, ns uint64 }{{count - count/50, uint64(d)}, {count / 50, 3 * uint64(d)}} {
		width := uint64(1) << max(bits.Len64(p.ns)-5, 0)
		lower := p.ns / width * width
		if p.count > 0 {
			h.LowerNs, h.UpperNs, h.Counts = append(h.LowerNs, lower), append(h.UpperNs, lower+width), append(h.Counts, p.count)
		}
	}
	return h
}

// fakeClock numbers the samples that a test has asked for, by the volume.
var fakeClock struct {
	sync.Mutex
	samples map[string]uint64
}

func init() {
	answers["Observe.Stats"] = func(r proto.Message) []proto.Message {
		name := ""
		if names := r.(*controlpb.StatsRequest).GetVolumes(); len(names) > 0 {
			name = names[0]
		}
		fakeClock.Lock()
		defer fakeClock.Unlock()
		if fakeClock.samples == nil {
			fakeClock.samples = map[string]uint64{}
		}
		fakeClock.samples[name]++
		n := fakeClock.samples[name]
		s := fakeNode(3600+2*n, name != "idle")
		switch name {
		case "idle":
			s.Volumes[0].Name = "idle"
		case "/dev/nbd7": // the device of vm2
			s.Volumes = s.Volumes[1:2]
		case "restarted":
			s.Started = timestamppb.New(day.Add(time.Duration(n) * time.Second))
		case "unobserved":
			s.Volumes[0].Name, s.Disks = "unobserved", nil
			s.Unobserved = append(s.Unobserved, &controlpb.Unobserved{What: "disks", Reason: "no permission to load eBPF programs (CAP_BPF, CAP_PERFMON)"})
		}
		return one(s)
	}
}
