package daemon

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/invariant"
	"github.com/ashlar-storage/ashlar/internal/units"
	"github.com/ashlar-storage/ashlar/nbd"
)

// volumes offers what the engine has to NBD clients: VOLUME, and VOLUME@SNAPSHOT
// read-only; POOL/VOLUME where two pools have a volume of one name. It implements
// nbd.Resolver.
type volumes struct {
	engine      *engine.Engine
	tlsOnly     bool
	clientNames map[string][]string

	slow     *filter.SlowRequests // takes what took long; nil: nothing does
	noStages bool                 // of requests

	mu      sync.Mutex
	live    map[string][]*filter.Stats     // by export, of devices that are open
	past    map[string]*filter.PackedStats // by export, of devices that were
	closing map[string]int                 // pools no volume of which may be opened
}

func newVolumes(e *engine.Engine, tlsOnly bool, clientNames map[string][]string) *volumes {
	return &volumes{
		engine: e, tlsOnly: tlsOnly, clientNames: clientNames,
		live: map[string][]*filter.Stats{}, past: map[string]*filter.PackedStats{}, closing: map[string]int{},
	}
}

// exported is a volume or snapshot as clients see it.
type exported struct {
	name     string // of the export
	pool     string
	volume   string
	snapshot string // "" for the volume itself
	size     uint64 // bytes
}

// names lists everything that is exported, by name.
func (v *volumes) names() ([]exported, error) {
	list, err := v.engine.Volumes("")
	if err != nil {
		return nil, err
	}
	snapshots, err := v.engine.Snapshots("")
	if err != nil {
		return nil, err
	}
	count := map[string]int{}
	for _, i := range list {
		count[i.Name]++
	}
	own := func(pool, volume string) string {
		if count[volume] > 1 {
			return pool + "/" + volume
		}
		return volume
	}
	var all []exported
	for _, i := range list {
		all = append(all, exported{name: own(i.Pool, i.Name), pool: i.Pool, volume: i.Name, size: i.Size})
	}
	for _, s := range snapshots {
		all = append(all, exported{name: own(s.Pool, s.Volume) + "@" + s.Name, pool: s.Pool, volume: s.Volume, snapshot: s.Name, size: s.Size})
	}
	slices.SortFunc(all, func(a, b exported) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// exportName is the name a volume is exported by.
func (v *volumes) exportName(poolName, volume string) string {
	if i, err := v.engine.Volume(volume); err == nil && i.Pool == poolName {
		return volume
	}
	return poolName + "/" + volume
}

// export makes an export of x.
func (v *volumes) export(x exported) *nbd.Export {
	e := &nbd.Export{Name: x.name, TLSOnly: v.tlsOnly, ReadOnly: x.snapshot != ""}
	e.Description = fmt.Sprintf("%s in pool %s", units.FormatSize(x.size), x.pool)
	if x.snapshot != "" {
		e.Description = fmt.Sprintf("snapshot of %s, %s", x.volume, e.Description)
	}
	// By whatever name a client asks, the same certificates open the same bytes.
	for _, rule := range append([]string{""}, x.rulesOf()...) {
		e.ClientNames = append(e.ClientNames, v.clientNames[rule]...)
	}
	e.Open = func() (datapath.Device, error) { return v.open(x) }
	return e
}

// Resolve implements nbd.Resolver. The empty name is the only volume.
func (v *volumes) Resolve(name string) (*nbd.Export, error) {
	if name == "" {
		list, err := v.engine.Volumes("")
		if err != nil {
			return nil, err
		}
		if len(list) != 1 {
			return nil, nbd.ErrUnknownExport
		}
		name = list[0].Name
	}
	ref, snapshot := engine.SplitRef(name)
	i, err := v.engine.Volume(ref)
	if err != nil {
		return nil, unknown(err)
	}
	x := exported{name: v.exportName(i.Pool, i.Name), pool: i.Pool, volume: i.Name, size: i.Size}
	if strings.Contains(name, "@") {
		list, err := v.engine.Snapshots(i.Pool + "/" + i.Name)
		if err != nil {
			return nil, unknown(err)
		}
		at := slices.IndexFunc(list, func(s engine.SnapshotInfo) bool { return s.Name == snapshot })
		if at < 0 {
			return nil, nbd.ErrUnknownExport
		}
		x.name, x.snapshot, x.size = x.name+"@"+snapshot, snapshot, list[at].Size
	}
	return v.export(x), nil
}

// unknown tells what does not exist from what cannot be had now.
func unknown(err error) error {
	var closed *engine.NotOpenError
	if !errors.As(err, &closed) && (errors.Is(err, pool.ErrNotFound) || errors.Is(err, pool.ErrInvalid)) {
		return nbd.ErrUnknownExport
	}
	return err
}

// List implements nbd.Resolver.
func (v *volumes) List() []*nbd.Export {
	all, err := v.names()
	if err != nil {
		return nil // the engine is closed, or a pool of it stops: nothing to offer
	}
	list := make([]*nbd.Export, 0, len(all))
	for _, x := range all {
		list = append(list, v.export(x))
	}
	return list
}

// open opens a volume or snapshot, and counts its requests.
func (v *volumes) open(x exported) (d datapath.Device, err error) {
	v.mu.Lock()
	closing := v.closing[x.pool] > 0
	v.mu.Unlock()
	if closing {
		return nil, fmt.Errorf("pool %s is being closed", x.pool)
	}
	if x.snapshot != "" {
		d, err = v.engine.OpenSnapshot(x.pool+"/"+x.volume, x.snapshot)
	} else {
		d, err = v.engine.OpenVolume(x.pool + "/" + x.volume)
	}
	if err != nil {
		return nil, err
	}
	if invariant.Enabled {
		d = datapath.Checked(d)
	}
	return v.count(x.name, d), nil
}

// count counts the requests of d from here on under a name.
func (v *volumes) count(name string, d datapath.Device) datapath.Device {
	c := &counted{Stats: filter.NewStats(d, filter.StatsConfig{Name: name, Slow: v.slow, NoStages: v.noStages}), volumes: v, name: name}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.live[name] = append(v.live[name], c.Stats)
	return c
}

// counted is an open device whose counts outlive it.
type counted struct {
	*filter.Stats
	volumes *volumes
	name    string
}

// Close implements datapath.Device.
func (c *counted) Close() error {
	err := c.Stats.Close()
	c.volumes.mu.Lock()
	defer c.volumes.mu.Unlock()
	now := c.Snapshot() // its queues are closed: no reactor is asked
	now.AddPacked(c.volumes.past[c.name])
	c.volumes.past[c.name] = now.Pack()
	list := slices.DeleteFunc(c.volumes.live[c.name], func(s *filter.Stats) bool { return s == c.Stats })
	if len(list) == 0 {
		delete(c.volumes.live, c.name)
	} else {
		c.volumes.live[c.name] = list
	}
	return err
}

// snapshots is what was counted for each export since the daemon began. Of exports
// that are gone it forgets: names come and go, memory must not grow with them.
func (v *volumes) snapshots() map[string]*filter.StatsSnapshot { return v.snapshotsOf(nil) }

// snapshotsOf is snapshots of some exports; nil: all.
func (v *volumes) snapshotsOf(wanted map[string]bool) map[string]*filter.StatsSnapshot {
	exists := map[string]bool{}
	all, err := v.names()
	for _, x := range all {
		exists[x.name] = true
	}
	type counting struct {
		name string
		past *filter.PackedStats
		live []*filter.Stats
	}
	var list []counting
	v.mu.Lock()
	for name := range v.past {
		if _, open := v.live[name]; !open && !exists[name] && err == nil {
			delete(v.past, name)
		}
	}
	for name, before := range v.past {
		if wanted == nil || wanted[name] {
			list = append(list, counting{name, before, slices.Clone(v.live[name])})
		}
	}
	for name, stats := range v.live {
		if v.past[name] == nil && (wanted == nil || wanted[name]) {
			list = append(list, counting{name, nil, slices.Clone(stats)})
		}
	}
	v.mu.Unlock()
	// Without the lock, since a reactor that is slow is waited for. A device that
	// closes meanwhile has its counts still; they become past later.
	counts := make(map[string]*filter.StatsSnapshot, len(list))
	for _, c := range list {
		sum := &filter.StatsSnapshot{}
		sum.AddPacked(c.past)
		for _, s := range c.live {
			sum.Add(s.Snapshot())
		}
		counts[c.name] = sum
	}
	return counts
}

// counted are the names under which requests are, or were, counted.
func (v *volumes) counted() map[string]bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	names := map[string]bool{}
	for name := range v.past {
		names[name] = true
	}
	for name := range v.live {
		names[name] = true
	}
	return names
}

// hold keeps the volumes of a pool from being opened until release.
func (v *volumes) hold(poolName string) (release func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closing[poolName]++
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.closing[poolName]--; v.closing[poolName] == 0 {
			delete(v.closing, poolName)
		}
	}
}
