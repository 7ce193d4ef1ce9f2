package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/histogram"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/observe"
)

// diskObserver sees the kernel's side of requests. Its methods are for ordinary
// goroutines, and answer from what was counted already.
type diskObserver interface {
	// observe completes a reply that has the daemon's own counts: it adds Disks and
	// Unobserved, and the off-CPU and wake-up times of Reactors. threads are the kernel's
	// thread ids of the reactors, in the order of reply.Reactors.
	observe(reply *controlpb.StatsResponse, threads []int)
}

// observeService serves what was counted.
type observeService struct {
	controlpb.UnimplementedObserveServer
	*controller
}

// Stats implements controlpb.ObserveServer.
func (s *observeService) Stats(_ context.Context, r *controlpb.StatsRequest) (*controlpb.StatsResponse, error) {
	wanted, err := s.wanted(r.GetVolumes())
	if err != nil {
		return nil, err
	}
	reply := &controlpb.StatsResponse{Started: timestamppb.New(s.started), Time: timestamppb.Now()}
	reply.Volumes = s.volumeStats(wanted)
	var threads []int
	for i, r := range s.reactors {
		st := r.Stats()
		reply.Reactors = append(reply.Reactors, reactorStats(i, r, &st))
		threads = append(threads, st.Thread)
	}
	reply.CpuSeconds, reply.RssBytes = usage()
	if s.observer == nil {
		for _, what := range []string{observe.GroupDisks, observe.GroupReactors} {
			reply.Unobserved = append(reply.Unobserved, &controlpb.Unobserved{What: what, Reason: "the daemon was started with --observe=none"})
		}
		return reply, nil
	}
	s.observer.observe(reply, threads)
	return reply, nil
}

// wanted are the names of exports that a request asks for, by whatever name it
// knows them; nil: all.
func (c *controller) wanted(names []string) (map[string]bool, error) {
	if len(names) == 0 {
		return nil, nil
	}
	counted := c.volumes.counted()
	exists := map[string]bool{}
	if all, err := c.volumes.names(); err == nil {
		for _, x := range all {
			exists[x.name] = true
		}
	}
	wanted := map[string]bool{}
	for _, name := range names {
		if !exists[name] && !counted[name] {
			if own := c.exportOf(name); own != "" {
				name = own
			} else {
				return nil, control.Errorf(control.ErrNotFound, "volume", name, "there is no volume, snapshot or device %q", name)
			}
		}
		wanted[name] = true
	}
	return wanted, nil
}

// exportOf is the name under which the requests of a volume, given as POOL/VOLUME, or
// of a device, given by its path, are counted; "": there is none.
func (c *controller) exportOf(name string) string {
	if c.devices != nil && strings.HasPrefix(name, "/dev/") {
		a, err := c.devices.named(name)
		if err != nil {
			return ""
		}
		if a.source.exported != nil {
			return a.source.exported.name
		}
		return a.source.name
	}
	if e, err := c.volumes.Resolve(name); err == nil {
		return e.Name
	}
	return ""
}

// counting has the requests of a source that is no volume counted, under its name;
// volumes count their own.
func (d *devices) counting(s *deviceSource) *deviceSource {
	open := s.open
	s.open = func(ctx context.Context, readOnly bool) (datapath.Device, error) {
		device, err := open(ctx, readOnly)
		if err != nil {
			return nil, err
		}
		return d.volumes.count(s.name, device), nil
	}
	return s
}

// volumeStats describes the exports wanted, by name: every volume, and whatever else
// had requests.
func (c *controller) volumeStats(wanted map[string]bool) []*controlpb.VolumeStats {
	counts := c.volumes.snapshotsOf(wanted)
	all, _ := c.volumes.names() // with a pool that stops there are none; what was counted is shown all the same
	var list []*controlpb.VolumeStats
	add := func(m *controlpb.VolumeStats) {
		if s := counts[m.Name]; s != nil {
			m.InFlight = uint32(max(s.InFlight(), 0))
			m.Operations = operations(s)
			delete(counts, m.Name)
		}
		list = append(list, m)
	}
	for _, x := range all {
		if wanted != nil && !wanted[x.name] || x.snapshot != "" && counts[x.name] == nil && wanted == nil {
			continue
		}
		m := &controlpb.VolumeStats{Name: x.name, Pool: x.pool, SizeBytes: x.size}
		if x.snapshot == "" {
			if i, err := c.engine.Volume(x.pool + "/" + x.volume); err == nil {
				m.OpenCount, m.SizeBytes = uint32(i.Open), i.Size
				m.Limits = limitsMessage(i.Limits)
			}
		}
		add(m)
	}
	for name := range counts { // devices of files and of other servers
		add(&controlpb.VolumeStats{Name: name})
	}
	slices.SortFunc(list, func(a, b *controlpb.VolumeStats) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// operations are those that were used.
func operations(s *filter.StatsSnapshot) []*controlpb.OperationStats {
	var list []*controlpb.OperationStats
	for op := range datapath.OpCount {
		o := s.Op(op)
		if o.Count == 0 {
			continue
		}
		m := &controlpb.OperationStats{Operation: op.String(), Count: o.Count, Errors: o.Errors, Bytes: o.Bytes, Latency: histogramMessage(&o.Latency)}
		for stage, h := range o.Stages {
			if h != nil {
				m.Stages = append(m.Stages, &controlpb.StageStats{Stage: datapath.Stage(stage).String(), Time: histogramMessage(h)})
			}
		}
		list = append(list, m)
	}
	return list
}

func histogramMessage(h *histogram.Histogram) *controlpb.Histogram {
	m := &controlpb.Histogram{Count: h.Count, SumNs: uint64(h.Sum)}
	for i, n := range h.Buckets {
		if n > 0 {
			low, high := histogram.Bounds(i)
			m.LowerNs, m.UpperNs, m.Counts = append(m.LowerNs, low), append(m.UpperNs, high), append(m.Counts, n)
		}
	}
	return m
}

func reactorStats(index int, r *reactor.Reactor, st *reactor.Stats) *controlpb.ReactorStats {
	m := &controlpb.ReactorStats{
		Index: uint32(index), BusyNs: uint64(st.Busy), IdleNs: uint64(st.Spun), SleepNs: uint64(st.Slept), Turns: st.Turns, Enters: st.Enters,
		SpinBudgetNs: uint64(st.SpinBudget), ServiceNs: uint64(st.ServiceTime),
	}
	if cpu, pinned := r.CPU(); pinned {
		m.Cpu, m.Pinned = uint32(cpu), true
	}
	return m
}

// usage is the processor time and the memory of this process.
func usage() (cpuSeconds float64, rssBytes uint64) {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) == nil { // fails for a bad pointer only
		cpuSeconds = (time.Duration(u.Utime.Nano()) + time.Duration(u.Stime.Nano())).Seconds()
		rssBytes = uint64(u.Maxrss) << 10 // the most there was, where /proc is not mounted
	}
	if b, err := os.ReadFile("/proc/self/statm"); err == nil {
		var size, resident uint64
		if _, err := fmt.Fscan(bytes.NewReader(b), &size, &resident); err == nil {
			rssBytes = resident * uint64(os.Getpagesize())
		}
	}
	return cpuSeconds, rssBytes
}
