package report

import (
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestBetweenSubtracts(t *testing.T) {
	a := before()
	a.Volumes = []*controlpb.VolumeStats{volume(operation("read", 100, stages{"device": time.Millisecond})), {Name: "gone"}}
	a.Reactors = []*controlpb.ReactorStats{{BusyNs: 1e9, IdleNs: 1e9, SleepNs: 1e9, Turns: 5, OffCpu: took(1, time.Second), Wakeup: took(1, time.Second)}}
	a.Disks = []*controlpb.DiskStats{disk("vda", diskOperation("read", 100, time.Microsecond, time.Millisecond))}
	a.Disks[0].Merges = 3
	v := volume(operation("read", 300, stages{"device": time.Millisecond}), operation("write", 50, stages{"device": time.Millisecond}), operation("discard", 0, nil))
	v.Operations[1].Errors, v.InFlight = 2, 9
	v.Limits = &controlpb.Limits{Iops: 500, BandwidthBytes: 1 << 20}
	d := disk("vda", diskOperation("read", 400, time.Microsecond, time.Millisecond))
	d.Merges = 7
	b := sample(v, []*controlpb.ReactorStats{{BusyNs: 2e9, IdleNs: 1e9, SleepNs: 2e9, Turns: 9, OffCpu: took(3, time.Second), Wakeup: took(4, time.Second), Pinned: true, Cpu: 3}}, d)
	b.Volumes = append(b.Volumes, &controlpb.VolumeStats{Name: "a-new-one", Operations: []*controlpb.OperationStats{operation("flush", 4, stages{"commit": time.Millisecond})}})
	b.Unobserved = []*controlpb.Unobserved{{What: "nbd", Reason: "no tracepoint"}}

	i, err := Between(a, b)
	if err != nil {
		t.Fatal(err)
	}
	if i.Seconds != 2 || i.CPUSeconds != 1 || len(i.Volumes) != 2 || i.Volumes[0].Name != "a-new-one" || i.Volumes[0].Operations[0].Count != 4 {
		t.Errorf("%+v", i)
	}
	got, ok := i.Volume("tank/vm1")
	if !ok || got.IOPS != 125 || got.BytesPerSecond != 125*4096 || got.Errors != 2 || len(got.Operations) != 2 || got.Operations[0].Count != 200 || got.Latency.Count != 250 ||
		got.InFlight != 9 || got.LimitIOPS != 500 || got.LimitBandwidth != 1<<20 {
		t.Errorf("%+v", got)
	}
	if s := got.Operations[0].Stages; len(s) != 1 || s[0].Time.Count != 200 || s[0].Time.SumNS != 200e6 {
		t.Errorf("%+v", s)
	}
	if _, ok := i.Volume("gone"); ok {
		t.Error("a volume that is gone is reported")
	}
	r := i.Reactors[0]
	if r.Busy != 0.5 || r.Idle != 0 || r.Sleep != 0.5 || r.Turns != 4 || *r.Stolen != 0.5 || r.Wakeup.Count != 3 || !r.Pinned || r.CPU != 3 {
		t.Errorf("%+v", r)
	}
	if k := i.Disks[0]; k.IOPS != 150 || k.Merges != 4 || k.Service.Count != 300 || k.Depth != 4 || k.Pools[0] != "tank" {
		t.Errorf("%+v", k)
	}
	if len(i.Unobserved) != 1 || i.Unobserved[0].Reason != "no tracepoint" {
		t.Errorf("%+v", i.Unobserved)
	}

	// An idle reactor whose sleep the kernel saw more of than it counted itself.
	b.Reactors[0].SleepNs, b.Reactors[0].BusyNs, b.Reactors[0].OffCpu = 4e9, 1.1e9, took(9, time.Second)
	idle, err := Between(a, b)
	if err != nil || *idle.Reactors[0].Stolen > 0.033 {
		t.Errorf("%v of an idle reactor is stolen, %v", *idle.Reactors[0].Stolen, err)
	}

	since, err := Between(nil, b)
	if err != nil || since.Seconds != 3602 || since.Volumes[1].Operations[0].Count != 300 || since.CPUSeconds != 12 {
		t.Errorf("since the start: %+v, %v", since, err)
	}
}

func TestBetweenOfTwoLivesIsAnError(t *testing.T) {
	b := sample(nil, nil)
	b.Started = timestamppb.New(nine.Add(time.Second))
	if _, err := Between(before(), b); !errors.Is(err, ErrRestarted) {
		t.Error(err)
	}
}

// TestNothingIsNoPanic: an empty answer, and one from before the one it is compared with.
func TestNothingIsNoPanic(t *testing.T) {
	for _, pair := range [][2]*controlpb.StatsResponse{
		{nil, nil}, {nil, {}}, {{}, {}}, {sample(volume(), nil), before()},
		{sample(volume(operation("read", 9, stages{"device": 1})), []*controlpb.ReactorStats{atRest(0)}), func() *controlpb.StatsResponse {
			s := before()
			s.Volumes = []*controlpb.VolumeStats{volume(operation("read", 3, stages{"device": 1}))}
			s.Reactors = []*controlpb.ReactorStats{{}}
			s.Disks = []*controlpb.DiskStats{disk("vda")}
			return s
		}()},
	} {
		i, err := Between(pair[0], pair[1])
		if err != nil {
			t.Fatal(err)
		}
		for v := range i.Volumes {
			r := Explain(i, &i.Volumes[v])
			if len(r.Causes) == 0 || r.IOPS != 0 {
				t.Errorf("%+v", r)
			}
		}
		b, err := json.Marshal(i)
		if err != nil || strings.Contains(string(b), ":null") && len(i.Reactors) == 0 {
			t.Errorf("%s, %v", b, err)
		}
	}
	if rate(1, 0) != 0 || rate(math.MaxUint64, 1) <= 0 {
		t.Error("rates")
	}
}
