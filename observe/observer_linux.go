//go:build amd64 || arm64

package observe

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// driverRetry is how often a Snapshot looks for a driver that was not loaded before:
// often enough for people, cheap enough for a loop.
const driverRetry = 5 * time.Second

// Observer holds the programs in the kernel. Its methods may be called from any
// goroutine; they take turns.
type Observer struct {
	config  Config
	kernel  kernel
	started time.Time

	mu         sync.Mutex
	closed     bool
	process    int // its id, as the first pid namespace counts
	groups     []*group
	threads    []int    // watched
	disks      []Number // likewise; none: all
	services   map[Number]*service
	counted    map[countedKey]uint64 // requests that snapshots have reported
	timed      bool                  // the kernel keeps the times of requests, and the programs read them
	untimed    bool                  // it does not for some, so that the programs have to
	serviceAge time.Duration         // how long an answer of ServiceTime is good
	lastRetry  time.Time

	// Buffers of reads, one value a CPU.
	cpus       int
	operations []operation
	rings      []ringKind
	clients    []nbdClient
}

// Start loads the programs. A group that cannot be loaded is no error: it is listed
// by Unobserved. The observer must be closed; a process that ends without takes its
// programs along.
//
// Errors: of the configuration.
func Start(c Config) (*Observer, error) {
	return start(c, kernel{types: btf.LoadKernelSpec, root: "/"})
}

func start(c Config, k kernel) (*Observer, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	o := &Observer{config: c, kernel: k, started: time.Now(), threads: slices.Clone(c.Threads), disks: slices.Clone(c.Disks), services: make(map[Number]*service), counted: make(map[countedKey]uint64), serviceAge: time.Second}
	var err error
	if o.cpus, err = ebpf.PossibleCPU(); err != nil {
		o.cpus = 1 // then nothing loads either, and the reasons say why
	}
	o.operations = make([]operation, o.cpus)
	o.rings = make([]ringKind, o.cpus)
	o.clients = make([]nbdClient, o.cpus)
	o.process = os.Getpid()
	types, err := o.kernel.load()
	if err == nil {
		if id, err := processID(); err == nil { // else it is wrong in a container only
			o.process = id
		}
	}
	o.groups = []*group{o.disksGroup(), o.reactorsGroup(), o.ringsGroup(), o.nbdGroup(), ublkGroup()}
	for _, g := range o.groups {
		switch {
		case len(c.Groups) > 0 && !slices.Contains(c.Groups, g.name):
			g.reason = "it is switched off"
		case g.spec == nil: // its reason stands
		case err != nil:
			g.reason = err.Error()
		default:
			o.load(g, types)
		}
	}
	o.lastRetry = time.Now()
	for _, g := range o.groups {
		if g.reason != "" {
			c.Log.Info("not observed", "what", g.name, "reason", g.reason)
		}
	}
	return o, nil
}

// load loads a group and logs that it is there; when it is not, g.reason says why.
func (o *Observer) load(g *group, types *btf.Spec) {
	began := time.Now()
	g.reason, g.partial = "", nil
	if err := g.load(o.kernel, types); err != nil {
		g.fail(err)
		return
	}
	o.config.Log.Info("observing", "what", g.name, "programs", len(g.links), "took", time.Since(began).Round(time.Millisecond))
}

func (o *Observer) group(name string) *group {
	return o.groups[slices.IndexFunc(o.groups, func(g *group) bool { return g.name == name })]
}

// Unobserved lists what is not observed, and why.
func (o *Observer) Unobserved() []Unobserved {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.unobservedLocked()
}

func (o *Observer) unobservedLocked() []Unobserved {
	var list []Unobserved
	for _, g := range o.groups {
		if g.reason != "" {
			list = append(list, Unobserved{g.name, g.reason})
		}
		for _, p := range g.partial {
			list = append(list, Unobserved{g.name, p})
		}
	}
	return list
}

// SetThreads watches other threads of this process instead; those that stay keep
// their counts.
func (o *Observer) SetThreads(ids []int) error {
	if err := checkThreads(ids); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.setThreadsLocked(ids)
}

// SetDisks counts other disks instead, none: all. What was counted stays.
func (o *Observer) SetDisks(disks []Number) error {
	if err := checkDisks(disks); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.setDisksLocked(disks)
}

// Snapshot reads all counters: some system calls for each disk that had requests.
// Counters of other CPUs go on meanwhile; a request may be in one and not yet in
// another. A group that cannot be read is listed as unobserved.
func (o *Observer) Snapshot() *Snapshot {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := &Snapshot{Time: time.Now(), Started: o.started}
	o.retryDriversLocked(s.Time)
	o.keepTimesLocked()
	for _, read := range []struct {
		group string
		into  func(*group, *Snapshot) error
	}{
		{GroupDisks, o.readDisks}, {GroupReactors, o.readThreads}, {GroupRings, o.readRings}, {GroupNBD, o.readNBD},
	} {
		g := o.group(read.group)
		if g.collection == nil {
			continue
		}
		if err := read.into(g, s); err != nil {
			s.Unobserved = append(s.Unobserved, Unobserved{g.name, fmt.Sprintf("its counters cannot be read: %v", err)})
		}
		s.Missed += g.missed()
	}
	s.Unobserved = append(s.Unobserved, o.unobservedLocked()...)
	return s
}

// retryDriversLocked loads the groups of drivers that have come meanwhile.
func (o *Observer) retryDriversLocked(now time.Time) {
	if o.closed || now.Sub(o.lastRetry) < driverRetry {
		return
	}
	o.lastRetry = now
	for _, g := range o.groups {
		if !g.waits || !o.kernel.driver(g.module) {
			continue
		}
		if types, err := o.kernel.load(); err == nil {
			o.load(g, types)
		}
	}
}

// Close takes all programs out of the kernel. The observer then observes nothing.
func (o *Observer) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	for _, g := range o.groups {
		g.unload()
		g.reason, g.partial, g.waits = "the observer is closed", nil, false
	}
	return nil
}
