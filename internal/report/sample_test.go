package report

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// The tests make samples of mornings: the daemon started at eight, the first sample
// is of nine, the second of two seconds later.
var (
	eight = time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)
	nine  = eight.Add(time.Hour)
)

// took is a histogram of count durations of about d.
func took(count uint64, d time.Duration) *controlpb.Histogram {
	return tookBoth(count, d, 0, 0)
}

// tookBoth is a histogram of two peaks.
func tookBoth(count uint64, d time.Duration, more uint64, longer time.Duration) *controlpb.Histogram {
	h := &controlpb.Histogram{}
	for _, p := range []struct {
		count uint64
		d     time.Duration
	}{{count, d}, {more, longer}} {
		if p.count > 0 {
			h.Count += p.count
			h.SumNs += p.count * uint64(p.d)
			h.LowerNs = append(h.LowerNs, uint64(p.d)-uint64(p.d)/32)
			h.UpperNs = append(h.UpperNs, uint64(p.d)+uint64(p.d)/32)
			h.Counts = append(h.Counts, p.count)
		}
	}
	return h
}

// stages are what each of count requests spends, by stage.
type stages map[string]time.Duration

func operation(name string, count uint64, s stages) *controlpb.OperationStats {
	o := &controlpb.OperationStats{Operation: name, Count: count, Bytes: 4096 * count}
	var all time.Duration
	for _, stage := range []string{"receive", "queue", "metadata", "device", "commit", "finish", "reply"} {
		if d := s[stage]; d > 0 {
			o.Stages = append(o.Stages, &controlpb.StageStats{Stage: stage, Time: took(count, d)})
			all += d
		}
	}
	o.Latency = took(count, all)
	return o
}

func volume(operations ...*controlpb.OperationStats) *controlpb.VolumeStats {
	return &controlpb.VolumeStats{Name: "vm1", Pool: "tank", OpenCount: 1, SizeBytes: 1 << 30, Operations: operations}
}

func disk(name string, operations ...*controlpb.DiskOperationStats) *controlpb.DiskStats {
	return &controlpb.DiskStats{Name: name, Major: 259, Minor: uint32(len(name)), Pools: []string{"tank"}, QueueDepth: 4, Operations: operations}
}

func diskOperation(name string, count uint64, queue, service time.Duration) *controlpb.DiskOperationStats {
	return &controlpb.DiskOperationStats{Operation: name, Count: count, Bytes: 4096 * count, Queue: took(count, queue), Service: took(count, service)}
}

// atRest is a reactor that had little to do in two seconds.
func atRest(index uint32) *controlpb.ReactorStats {
	return &controlpb.ReactorStats{Index: index, BusyNs: 2e8, IdleNs: 3e8, SleepNs: 15e8}
}

// sample is an answer two seconds after nine, of counts that began then.
func sample(v *controlpb.VolumeStats, reactors []*controlpb.ReactorStats, disks ...*controlpb.DiskStats) *controlpb.StatsResponse {
	s := &controlpb.StatsResponse{
		Time: timestamppb.New(nine.Add(2 * time.Second)), Started: timestamppb.New(eight), Reactors: reactors, Disks: disks, CpuSeconds: 12, RssBytes: 20 << 20,
	}
	if v != nil {
		s.Volumes = append(s.Volumes, v)
	}
	return s
}

// before is the sample of nine o'clock, when all counts were zero.
func before() *controlpb.StatsResponse {
	return &controlpb.StatsResponse{Time: timestamppb.New(nine), Started: timestamppb.New(eight), CpuSeconds: 11}
}
