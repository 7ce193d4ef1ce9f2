package observe

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath/uring"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/observe/bpf"
)

// TestSampledTimesStandForAll: of many requests, some are timed, and the histograms are
// about those that an observer has which times every one.
func TestSampledTimesStandForAll(t *testing.T) {
	bothWays(t, func(t *testing.T, observing func(Config) *Observer) {
		f, number := loopDevice(t, 8<<20)
		all := observing(Config{Groups: []string{GroupDisks}})
		some := started(t, Config{Groups: []string{GroupDisks}, pace: 1}, all.kernel)
		// Every 8th is large, and so takes its time.
		small, large := aligned(t, 512), aligned(t, 1<<20)
		const writes = 4000
		shifted := false
		for i := range writes {
			b := small
			if i%8 == 0 {
				b = large
			}
			if _, err := f.WriteAt(b, 0); err != nil {
				t.Fatal(err)
			}
			if i%500 == 499 {
				_ = some.Snapshot() // reads counters while they change
				if err := eachWrite(some, number, func(o *operation) { shifted = shifted || o.Sample.Shift > 0 }); err != nil {
					t.Fatal(err)
				}
			}
		}
		is, was := some.Snapshot(), all.Snapshot()
		got, want := disk(is, number).operation("write"), disk(was, number).operation("write")
		if !all.timed {
			if shifted {
				t.Error("where the programs keep the times, all are timed")
			}
		} else if !shifted {
			t.Skip("so slow a machine has one request in a tick")
		}
		if got.Count < want.Count*9/10 || want.Count < writes*9/10 {
			t.Errorf("%d writes, counted %d and %d", writes, want.Count, got.Count)
		}
		if n := got.Service.Count() + got.untimed; n > got.Count || n < got.Count*9/10 {
			t.Errorf("%d requests, times for %d and %d to come", got.Count, got.Service.Count(), got.untimed)
		}
		if is.Missed > was.Missed+got.Count/10 {
			t.Errorf("%d missed; by the other observer %d", is.Missed, was.Missed)
		}
		for name, h := range map[string][2]*Histogram{"service": {&got.Service, &want.Service}, "queue": {&got.Queue, &want.Queue}} {
			for _, q := range []float64{0.5, 0.8, 0.95} {
				a, b := h[0].Quantile(q), h[1].Quantile(q)
				if a > 3*b+10*time.Microsecond || b > 3*a+10*time.Microsecond {
					t.Errorf("%s: quantile %v is %v, of all %v", name, q, a, b)
				}
			}
			if n := h[0].Count(); n > 0 {
				if a, b := float64(h[0].Sum)/float64(n), float64(h[1].Sum)/float64(h[1].Count()); a > 2*b+10e3 || b > 2*a+10e3 {
					t.Errorf("%s: mean %.0f ns, of all %.0f ns", name, a, b)
				}
			}
		}
	})
}

// eachWrite reads the counters of writes to a disk, of every CPU.
func eachWrite(o *Observer, number Number, f func(*operation)) error {
	g := o.group(GroupDisks)
	var place uint32
	var packed uint64
	for i := g.collection.Maps[bpf.DisksMapPlaces].Iterate(); i.Next(&place, &packed); {
		if packed == 0 || packed>>3&(1<<32-1) != uint64(number.device()) || packed&7 != 1 {
			continue
		}
		cpus := make([]operation, o.cpus)
		if err := g.collection.Maps[bpf.DisksMapOperations].Lookup(place, &cpus); err != nil {
			return err
		}
		for i := range cpus {
			f(&cpus[i])
		}
	}
	return nil
}

// TestSampledRingsStandForAll: the same for requests of io_uring.
func TestSampledRingsStandForAll(t *testing.T) {
	testenv.RequireIOURing(t)
	testenv.RequireBPF(t)
	o := started(t, Config{Groups: []string{GroupRings}, pace: 1}, real())
	const writes = 5000
	throughRing(t, writes, func(_ int, fd int32, b []byte) uring.SQE { return ringWrite(fd, b) })
	for _, r := range o.Snapshot().Rings {
		if r.Kind != "write" {
			continue
		}
		if n := r.Time.Count(); r.Submitted != writes || n > writes || n < writes*9/10 {
			t.Errorf("%d requests, %d submitted, times for %d", writes, r.Submitted, n)
		}
		plausible(t, r.Kind, &r.Time)
		return
	}
	t.Error("no writes were seen")
}

// TestPaceIsWhatTheProgramsHave: by default not every request is timed.
func TestPaceIsWhatTheProgramsHave(t *testing.T) {
	testenv.RequireBPF(t)
	for _, c := range []struct {
		config Config
		want   uint32
	}{{Config{}, usualPace}, {Config{Every: true}, 0}, {Config{pace: 3}, 3}} {
		c.config.Groups = []string{GroupDisks, GroupRings}
		o := started(t, c.config, real())
		for group, name := range map[string]string{GroupDisks: bpf.DisksVarPace, GroupRings: bpf.RingsVarPace} {
			var is uint32
			if err := o.group(group).collection.Variables[name].Get(&is); err != nil || is != c.want {
				t.Errorf("%s: %d, %v; want %d", group, is, err, c.want)
			}
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
