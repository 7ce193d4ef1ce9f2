package report

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

const (
	us = time.Microsecond
	ms = time.Millisecond
)

// scenario is a morning with one thing wrong.
type scenario struct {
	name   string
	sample *controlpb.StatsResponse
	cause  string // the top one
	text   string // all of it
	remedy string // part of it
	also   []string
}

func rested(v *controlpb.VolumeStats, disks ...*controlpb.DiskStats) *controlpb.StatsResponse {
	return sample(v, []*controlpb.ReactorStats{atRest(0), atRest(1)}, disks...)
}

func limited(v *controlpb.VolumeStats, iops, bandwidth uint64) *controlpb.VolumeStats {
	v.Limits = &controlpb.Limits{Iops: iops, BandwidthBytes: bandwidth}
	return v
}

func inFlight(v *controlpb.VolumeStats, n uint32) *controlpb.VolumeStats {
	v.InFlight = n
	return v
}

func unseen(s *controlpb.StatsResponse) *controlpb.StatsResponse {
	s.Unobserved = []*controlpb.Unobserved{{What: "disks", Reason: "CAP_BPF is missing"}}
	return s
}

var scenarios = []scenario{
	{
		"a limit of requests",
		rested(limited(volume(operation("read", 1000, stages{"queue": 8 * ms, "device": ms})), 500, 0)),
		"limit-iops", "requests wait 89 % of their time for the volume's own limit of 500 IOPS (it does 500)", "ashlar volume limit vm1 --iops", nil,
	},
	{
		"a limit of bytes",
		rested(limited(volume(operation("write", 5000, stages{"queue": 4 * ms, "device": ms})), 0, 10<<20)),
		"limit-bandwidth", "requests wait 80 % of their time for the volume's own limit of 10MiB/s (it does 9.77MiB/s)", "ashlar volume limit vm1 --bandwidth", nil,
	},
	{
		"a reactor interrupted at its work",
		sample(volume(operation("read", 5000, stages{"queue": 100 * us, "device": 100 * us, "reply": 100 * us, "finish": 100 * us, "metadata": 100 * us})),
			[]*controlpb.ReactorStats{{BusyNs: 16e8, SleepNs: 4e8, OffCpu: took(100, 13*ms), Wakeup: took(100, 10*us)}, atRest(1)}),
		"reactor-without-cpu", "reactor 0 waits for a CPU: it had work and did not run for 45 % of the time", "--pin", []string{"metadata", "queue", "client-receive", "verify"},
	},
	{
		"a reactor that wakes late",
		sample(volume(operation("read", 5000, stages{"receive": ms / 2, "device": ms / 2})),
			[]*controlpb.ReactorStats{atRest(0), {Index: 1, BusyNs: 2e8, SleepNs: 18e8, OffCpu: took(1000, ms), Wakeup: took(1000, 800*us)}}),
		"reactor-without-cpu", "reactor 1 waits for a CPU: from being woken to running takes 800 µs (p99 824 µs), and a request 1 ms on average", "cgroup", []string{"client-send"},
	},
	{
		"one reactor, full",
		sample(volume(operation("read", 500_000, stages{"queue": 50 * us, "metadata": 10 * us, "device": 80 * us, "reply": 5 * us})),
			[]*controlpb.ReactorStats{{BusyNs: 194e7, IdleNs: 6e7}}, disk("nvme0n1", diskOperation("read", 500_000, us, 20*us))),
		"reactor-saturated", "reactor 0 is saturated (97 % busy)", "--reactors", []string{"device-hand-over"},
	},
	{
		"one reactor of several, full",
		sample(volume(operation("read", 500_000, stages{"queue": 50 * us, "device": 20 * us})),
			[]*controlpb.ReactorStats{{BusyNs: 194e7, IdleNs: 6e7}, atRest(1), atRest(2)}),
		"reactor-saturated", "reactor 0 is saturated (97 % busy), while the 3 reactors together are 39 % busy", "several", nil,
	},
	{
		"writes that wait for the flush of a disk",
		rested(volume(operation("write", 1000, stages{"metadata": 100 * us, "device": ms, "commit": 7 * ms}), operation("read", 100, stages{"device": ms})),
			disk("nvme0n1", diskOperation("flush", 900, us, 6*ms), diskOperation("write", 1000, us, 900*us), diskOperation("read", 100, us, 900*us))),
		"flush", "writes wait 86 % of their time for the flush of nvme0n1 (p99 6.18 ms): the disk has a volatile cache", "power-loss", nil,
	},
	{
		"flushes themselves",
		rested(volume(operation("flush", 200, stages{"device": 5 * ms, "commit": 3 * ms}), operation("write", 1000, stages{"device": ms / 2})),
			disk("nvme0n1", diskOperation("flush", 200, us, 4*ms), diskOperation("write", 1000, us, ms/2))),
		"flush", "flushes are 76 % of the time of all requests (p99 8.24 ms); they wait for the flush of nvme0n1 (p99 4.12 ms): the disk has a volatile cache", "power-loss", nil,
	},
	{
		"flushes with the disks unseen",
		unseen(rested(volume(operation("write", 1000, stages{"device": ms, "commit": 9 * ms})))),
		"flush", "writes wait 90 % of their time to be durable", "share one flush", nil,
	},
	{
		"flushes of a pool in a file",
		rested(volume(operation("flush", 1000, stages{"commit": 10 * ms, "reply": us})), disk("vda", diskOperation("flush", 900, us, 80*us))),
		"flush", "flushes are 100 % of the time of all requests (p99 10.3 ms); a flush of vda itself takes 1 % of that (p99 82.5 µs), the rest is the journal, and the file system where the pool is in a file",
		"rather than files", nil,
	},
	{
		"the queue of a disk",
		rested(volume(operation("read", 1000, stages{"device": 10 * ms})), disk("sda", diskOperation("read", 1000, 8*ms, 2*ms))),
		"device-queue", "requests wait 80 % of their time in the kernel's queue of sda (p99 8.24 ms, 4 in flight)", "/sys/block/sda/queue/scheduler", nil,
	},
	{
		"first writes",
		rested(volume(operation("write", 5000, stages{"metadata": 2 * ms, "device": ms}))),
		"metadata", "writes wait 67 % of their time in the pool before the disks have them (locks, maps, allocation; p99 2.06 ms)", "fill the volume", nil,
	},
	{
		"many layers",
		rested(volume(operation("read", 5000, stages{"metadata": 2 * ms, "device": ms}))),
		"metadata", "reads wait 67 % of their time in the pool before the disks have them (locks, maps, allocation; p99 2.06 ms)", "layers", nil,
	},
	{
		"no place in the daemon",
		rested(volume(operation("read", 5000, stages{"queue": 3 * ms, "device": ms}))),
		"queue", "requests wait 75 % of their time for a place in the daemon (p99 3.09 ms, 10.0 in flight on average)", "--buffers", nil,
	},
	{
		"a client that sends slowly",
		rested(volume(operation("write", 5000, stages{"receive": 3 * ms, "device": ms / 2}))),
		"client-send", "writes spend 86 % of their time on the client's socket, until their payload is here (p99 3.09 ms)", "network", nil,
	},
	{
		"a client that does not take its replies",
		rested(volume(operation("read", 5000, stages{"reply": 3 * ms, "device": ms / 2}))),
		"client-receive", "replies to reads wait 86 % of their time for the client to take them (p99 3.09 ms)", "network", nil,
	},
	{
		"checksums",
		rested(volume(operation("read", 5000, stages{"finish": 3 * ms, "device": ms / 2}))),
		"verify", "reads spend 86 % of their time after the disks, on checksums (p99 3.09 ms)", "--checksum-cache", nil,
	},
	{
		"a file system under the pool",
		rested(volume(operation("write", 5000, stages{"device": 3 * ms})), disk("vda", diskOperation("write", 5000, us, 300*us))),
		"device-hand-over", "requests spend 90 % of their time between the daemon and the disk's queue, or done and not yet taken up", "use disks", nil,
	},
	{
		"nothing but the disk, one request at a time",
		rested(volume(operation("read", 5000, stages{"receive": 2 * us, "device": 95 * us, "reply": 3 * us})), disk("nvme0n1", diskOperation("read", 5000, us, 90*us))),
		"device", "nothing is slow: 90 % of the time is the service time of nvme0n1 itself (p50 90 µs, p99 92.8 µs)", "the client has 0.2 requests in flight on average", nil,
	},
	{
		"nothing but the disk, many requests",
		rested(volume(operation("read", 5000, stages{"device": 10 * ms})), disk("a", diskOperation("read", 5000, us, 9*ms)), disk("bb", diskOperation("read", 5000, us, 11*ms))),
		"device", "nothing is slow: 100 % of the time is the service time of bb itself (p50 11 ms, p99 11.3 ms)", "for less, a faster disk than bb", nil,
	},
	{
		"a disk with a tail",
		rested(volume(operation("write", 5000, stages{"device": 2 * ms})), disk("sdb", func() *controlpb.DiskOperationStats {
			o := diskOperation("write", 5000, us, ms)
			o.Service = tookBoth(4900, 100*us, 100, 90*ms)
			return o
		}())),
		"device", "95 % of the time is the service time of sdb, and its slowest requests stand out: p50 100 µs, p99 90 ms", "health", nil,
	},
	{
		"a disk that is not observed",
		unseen(rested(volume(operation("read", 5000, stages{"device": ms})))),
		"device-unobserved", "100 % of the time is the device's (p99 1.03 ms); waiting and service are not told apart, since disks are not observed: CAP_BPF is missing", "ashlar doctor", nil,
	},
	{
		"a device that is no disk",
		rested(volume(operation("read", 5000, stages{"device": ms}))),
		"device-unobserved", "100 % of the time is the device's (p99 1.03 ms)", "faster", nil,
	},
	{
		"a little of everything",
		rested(volume(operation("read", 5000, stages{"receive": ms, "queue": ms, "metadata": ms, "device": ms, "finish": ms, "reply": ms}))),
		"balanced", "nothing stands out: the largest part, 17 %, is device", "", nil,
	},
	{
		"no stages",
		rested(volume(&controlpb.OperationStats{Operation: "read", Count: 5000, Latency: took(5000, ms)})),
		"balanced", "the stages of these requests were not counted", "", nil,
	},
	{"no requests", rested(volume()), "idle", "no requests in the interval of 2 s", "--since-start", nil},
	{
		"requests that do not end",
		rested(inFlight(volume(), 17), disk("nvme0n1")),
		"stuck", "17 requests are in flight, and none ended in 2 s; nvme0n1 has 4 of its own in flight", "kernel's log for nvme0n1", nil,
	},
}

func TestEveryRuleNamesItsCause(t *testing.T) {
	named := map[string]bool{}
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			i, err := Between(before(), s.sample)
			if err != nil {
				t.Fatal(err)
			}
			r := Explain(i, &i.Volumes[0])
			top := r.Causes[0]
			named[top.Name] = true
			if top.Name != s.cause || top.Text != s.text || !strings.Contains(top.Remedy, s.remedy) || (top.Remedy == "") != (s.remedy == "") {
				t.Errorf("%s (%.2f)\n%s\n%s\nwant %s\n%s\n%s", top.Name, top.Share, top.Text, top.Remedy, s.cause, s.text, s.remedy)
			}
			var also []string
			for _, c := range r.Causes[1:] {
				also = append(also, c.Name)
			}
			if fmt.Sprint(also) != fmt.Sprint(s.also) {
				t.Errorf("also %v, want %v", also, s.also)
			}
			for _, o := range r.Operations {
				sum := 0.0
				for _, stage := range o.Stages {
					sum += stage.Share
				}
				if len(o.Stages) > 0 && math.Abs(sum-1) > 1e-9 {
					t.Errorf("the stages of %s are %v of its time", o.Operation, sum)
				}
			}
		})
	}
	for _, rule := range rules {
		if !named[rule.name] {
			t.Errorf("no scenario for the rule %s", rule.name)
		}
	}
}

func TestSmallCausesAreNotNamed(t *testing.T) {
	i, err := Between(before(), rested(volume(operation("read", 5000, stages{"queue": ms, "device": 9 * ms}))))
	if err != nil {
		t.Fatal(err)
	}
	if r := Explain(i, &i.Volumes[0]); len(r.Causes) != 1 || r.Causes[0].Name != "device-unobserved" {
		t.Errorf("%+v", r.Causes)
	}
}

func TestNotesSayWhatToKnow(t *testing.T) {
	v := volume(operation("flush", 20, stages{"device": ms}), operation("read", 10, stages{"device": ms}))
	v.Operations[0].Errors = 3
	i, err := Between(before(), rested(v, disk("a", diskOperation("read", 9, us, ms)), disk("bb")))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"3 of 20 flushes failed; ashlar events says more",
		"only 30 requests: p99.9 is the slowest of them",
		"device queue and service are those of a, bb, with the requests of everybody",
	}
	r := Explain(i, &i.Volumes[0])
	if fmt.Sprint(r.Notes) != fmt.Sprint(want) {
		t.Errorf("%q", r.Notes)
	}
	if order := r.StageOrder(); fmt.Sprint(order) != "[device device-queue device-service device-hand-over]" {
		t.Errorf("%v", order)
	}
	if r.Way("write") != nil || Title("device-queue") != "device queue" || Title("replicas") != "replicas" {
		t.Error("names")
	}
}

func TestWordsForNumbers(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-1: "0", 0: "0", 1: "0", 2: "2 ns", 999: "999 ns", 1000: "1 µs", 1234: "1.23 µs", 99_960: "100 µs", 999_400: "999 µs", 999_600: "1 ms",
		12_345 * us: "12.3 ms", 1500 * ms: "1.5 s", time.Hour: "3600 s", 3 * time.Hour: "10800 s",
	} {
		if got := Duration(d); got != want {
			t.Errorf("%d ns is %q, want %q", d, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0B", 1023: "1023B", 1024: "1KiB", 1 << 20: "1MiB", 1000 << 10: "1000KiB", 1.5 * (1 << 40): "1.5TiB", 1 << 60: "1024PiB"} {
		if got := Bytes(v); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
	for operation, want := range map[string]string{"read": "reads", "flush": "flushes", "write-zeroes": "write-zeroes requests", "cache": "cache requests", "": "requests"} {
		if got := plural(operation); got != want {
			t.Errorf("%q is %q", operation, got)
		}
	}
}
