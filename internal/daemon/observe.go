package daemon

import (
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/observe"
)

// serviceEvery is how often reactors are told what the disks of pools need. The spin
// budget that comes of it moves slowly anyway.
const serviceEvery = time.Second

// kernelObserver is what the kernel shows of disks and threads: for the API, for the
// metrics, and for the spin budget of reactors.
type kernelObserver struct {
	load     func() (*observe.Observer, error)
	reactors []*reactor.Reactor
	disks    func() map[observe.Number][]string // of pools, by number: the pools that have them
	every    time.Duration
	log      *slog.Logger

	loaded atomic.Pointer[observe.Observer] // nil: not yet, or not at all
	failed atomic.Pointer[string]           // why not at all

	mu      sync.Mutex
	threads []int // watched

	quit chan struct{}
	done chan struct{}
}

// startObserver begins to load the programs, to watch the reactors and the disks of
// the engine's pools. It does not wait: loading takes some tenths of a second, and
// nobody needs it to serve. What the kernel does not allow is logged and listed as
// unobserved. Call close before the reactors stop and the engine closes.
func startObserver(log *slog.Logger, groups []string, reactors []*reactor.Reactor, e *engine.Engine) *kernelObserver {
	k := &kernelObserver{
		load:     func() (*observe.Observer, error) { return observe.Start(observe.Config{Log: log, Groups: groups}) },
		reactors: reactors, disks: func() map[observe.Number][]string { return poolDisks(e.Pools(), "/") }, every: serviceEvery, log: log,
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	go k.run() // ends with quit
	return k
}

// close takes the programs out of the kernel.
func (k *kernelObserver) close() error {
	close(k.quit)
	<-k.done
	if o := k.loaded.Load(); o != nil {
		return o.Close()
	}
	return nil
}

// run loads the programs, and then tells the reactors what their disks need.
func (k *kernelObserver) run() {
	defer close(k.done)
	o, err := k.load()
	if err != nil {
		k.log.Error("the kernel is not observed", "error", err)
		why := err.Error()
		k.failed.Store(&why)
		return
	}
	k.loaded.Store(o)
	var threads []int
	for _, r := range k.reactors {
		threads = append(threads, r.Stats().Thread)
	}
	k.watch(threads)
	debug.FreeOSMemory() // the kernel's types were read: tens of megabytes that nobody needs again
	k.feed(o)
}

// watch has the threads observed, if they are not yet.
func (k *kernelObserver) watch(threads []int) {
	threads = slices.DeleteFunc(slices.Clone(threads), func(id int) bool { return id <= 0 }) // of a reactor that has not begun
	k.mu.Lock()
	defer k.mu.Unlock()
	if o := k.loaded.Load(); o != nil && !slices.Equal(threads, k.threads) && o.SetThreads(threads) == nil { // else again at the next call
		k.threads = threads
	}
}

// feed tells the reactors what the fastest of the pools' disks needs: waiting awake
// pays for that one, and those that are slower are not worth it.
func (k *kernelObserver) feed(o *observe.Observer) {
	tick := time.NewTicker(k.every)
	defer tick.Stop()
	for {
		select {
		case <-k.quit:
			for _, r := range k.reactors {
				r.ObserveService(0) // back to what they learn themselves
			}
			return
		case <-tick.C:
		}
		var fastest time.Duration
		for n := range k.disks() {
			if median, ok := o.ServiceTime(n.Major, n.Minor); ok && (fastest == 0 || median < fastest) {
				fastest = median
			}
		}
		for _, r := range k.reactors {
			r.ObserveService(fastest)
		}
	}
}

// observe implements diskObserver.
func (k *kernelObserver) observe(reply *controlpb.StatsResponse, threads []int) {
	k.watch(threads)
	s := k.snapshot()
	pools := k.disks()
	for i := range s.Disks {
		reply.Disks = append(reply.Disks, diskMessage(&s.Disks[i], pools[s.Disks[i].Number]))
	}
	for i := range s.Threads {
		if j := slices.Index(threads, s.Threads[i].ID); j >= 0 && j < len(reply.Reactors) {
			reply.Reactors[j].OffCpu = kernelHistogram(&s.Threads[i].OffCPU)
			reply.Reactors[j].Wakeup = kernelHistogram(&s.Threads[i].Wakeup)
		}
	}
	for _, u := range s.Unobserved {
		reply.Unobserved = append(reply.Unobserved, &controlpb.Unobserved{What: u.What, Reason: u.Reason})
	}
}

// snapshot reads the counters; while nothing is loaded, it says why.
func (k *kernelObserver) snapshot() *observe.Snapshot {
	if o := k.loaded.Load(); o != nil {
		return o.Snapshot()
	}
	s := &observe.Snapshot{Time: time.Now()}
	reason := "the programs are not loaded yet"
	if why := k.failed.Load(); why != nil {
		reason = *why
	}
	for _, what := range []string{observe.GroupDisks, observe.GroupReactors, observe.GroupRings, observe.GroupNBD, observe.GroupUblk} {
		s.Unobserved = append(s.Unobserved, observe.Unobserved{What: what, Reason: reason})
	}
	return s
}

func diskMessage(d *observe.Disk, pools []string) *controlpb.DiskStats {
	m := &controlpb.DiskStats{Name: d.Name, Major: d.Major, Minor: d.Minor, QueueDepth: uint32(d.Depth), Merges: d.Merges, Pools: pools}
	for i := range d.Operations {
		o := &d.Operations[i]
		m.Operations = append(m.Operations, &controlpb.DiskOperationStats{
			Operation: o.Operation, Count: o.Count, Errors: o.Errors, Bytes: o.Bytes, Queue: kernelHistogram(&o.Queue), Service: kernelHistogram(&o.Service),
		})
	}
	return m
}

// kernelHistogram leaves out empty buckets.
func kernelHistogram(h *observe.Histogram) *controlpb.Histogram {
	m := &controlpb.Histogram{SumNs: h.Sum}
	var lower time.Duration
	for i, n := range h.Counts {
		upper := observe.Upper(i)
		if n > 0 {
			m.Count += n
			m.LowerNs, m.UpperNs, m.Counts = append(m.LowerNs, uint64(lower)), append(m.UpperNs, uint64(upper)), append(m.Counts, n)
		}
		lower = upper
	}
	return m
}
