//go:build amd64 || arm64

package observe

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/observe/bpf"
)

type operation = bpf.DisksOperation

// operationNames are those of enum operation_kind, in its order.
var operationNames = []string{"read", "write", "flush", "discard", "write-zeroes"}

// disksMemory is about how much the counters of disks may take, on all CPUs together:
// 4 KiB a CPU, disk and operation.
const disksMemory = 32 << 20

func (o *Observer) disksGroup() *group {
	return &group{
		name: GroupDisks,
		spec: bpf.LoadDisks,
		prepare: func(spec *ebpf.CollectionSpec) error {
			operations := spec.Maps[bpf.DisksMapOperations]
			most := spec.Maps[bpf.DisksMapPlaces].MaxEntries
			n := scale(disksMemory, int(operations.ValueSize), o.cpus, 128, int(most))
			n = 1 << (bits.Len32(n) - 1)
			operations.MaxEntries = n
			spec.Maps[bpf.DisksMapPlaces].MaxEntries = n
			spec.Maps[bpf.DisksMapNames].MaxEntries = n
			return errors.Join(spec.Variables[bpf.DisksVarPlacesMask].Set(n-1), o.setPace(spec.Variables[bpf.DisksVarPace]))
		},
		spare: func(spec *ebpf.CollectionSpec, k kernel) error {
			begins, issues := k.timesRequests()
			if begins {
				delete(spec.Programs, bpf.DisksProgBlockRqInsert)
			}
			o.timed = begins && issues && !o.untimed
			if !o.timed {
				return nil
			}
			delete(spec.Programs, bpf.DisksProgBlockRqIssue)
			spec.Maps[bpf.DisksMapFlights].MaxEntries = 1 // nobody looks at it
			return spec.Variables[bpf.DisksVarKernelTimes].Set(uint32(1))
		},
		required: [][]string{{bpf.DisksProgBlockRqIssue}, {bpf.DisksProgBlockRqComplete}},
		arm:      func() error { return o.setDisksLocked(o.disks) },
		keep:     []string{bpf.DisksMapOperations, bpf.DisksMapPlaces, bpf.DisksMapNames, bpf.DisksMapWatched},
	}
}

// keepTimesLocked lets the programs keep the times of requests themselves from here on,
// when the kernel was to do that and some requests had none: of a disk that came later,
// or whose statistics were switched off. What was counted stays; requests that are under
// way meanwhile are not counted.
func (o *Observer) keepTimesLocked() {
	g := o.group(GroupDisks)
	if g.collection == nil || !o.timed {
		return
	}
	var seen uint32
	if err := g.collection.Variables[bpf.DisksVarUntimed].Get(&seen); err != nil || seen == 0 {
		return // without the variable, times stay missing
	}
	o.untimed = true
	o.config.Log.Info("the kernel has no times for some requests: the programs keep them from here on", "what", g.name)
	types, err := o.kernel.load()
	if err != nil {
		g.fail(err)
		return
	}
	o.load(g, types)
}

func (n Number) device() uint32        { return n.Major<<20 | n.Minor }
func numberOf(device uint32) Number    { return Number{device >> 20, device & (1<<20 - 1)} }
func compare(a, b Number) int          { return int(a.device()) - int(b.device()) }
func (n Number) in(list []Number) bool { return slices.Contains(list, n) }

func (o *Observer) setDisksLocked(disks []Number) error {
	o.disks = slices.Clone(disks)
	g := o.group(GroupDisks)
	if g.collection == nil {
		return nil // it will be when it is loaded
	}
	watched := g.collection.Maps[bpf.DisksMapWatched]
	only := g.collection.Variables[bpf.DisksVarOnlyWatched]
	if len(disks) == 0 {
		return errors.Join(only.Set(uint32(0)), pausePlaces(g, nil))
	}
	for _, d := range disks {
		if err := watched.Put(d.device(), uint32(1)); err != nil {
			return err
		}
	}
	var device uint32
	var gone []uint32
	for i, value := watched.Iterate(), uint32(0); i.Next(&device, &value); {
		if !numberOf(device).in(disks) {
			gone = append(gone, device)
		}
	}
	for _, device := range gone {
		if err := watched.Delete(device); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return errors.Join(only.Set(uint32(1)), pausePlaces(g, disks))
}

// place is where an operation of a disk is counted.
type place struct {
	index  uint32
	device uint32
	kind   uint32
	paused bool
}

// The bits of a place, as pack of disks.c sets them.
const (
	placeUsed   = 1 << 63
	placePaused = 1 << 62
)

func unpack(index uint32, v uint64) place {
	return place{index, uint32(v &^ (placeUsed | placePaused) >> 3), uint32(v & 7), v&placePaused != 0}
}

func (x place) pack() uint64 {
	v := placeUsed | uint64(x.device)<<3 | uint64(x.kind)
	if x.paused {
		v |= placePaused
	}
	return v
}

// readPlaces lists the places in use.
func readPlaces(g *group) ([]place, error) {
	m := g.collection.Maps[bpf.DisksMapPlaces]
	var cursor ebpf.MapBatchCursor
	indexes, values := make([]uint32, m.MaxEntries()), make([]uint64, m.MaxEntries())
	n, err := m.BatchLookup(&cursor, indexes, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) { // which is said at the end
		return nil, err
	}
	var list []place
	for i := range n {
		if values[i]&placeUsed != 0 {
			list = append(list, unpack(indexes[i], values[i]))
		}
	}
	return list, nil
}

// pausePlaces stops the counting of disks that are not to be observed, and lets it go
// on for those that are; none: all are.
func pausePlaces(g *group, disks []Number) error {
	list, err := readPlaces(g)
	if err != nil {
		return err
	}
	for _, x := range list {
		paused := len(disks) > 0 && !numberOf(x.device).in(disks)
		if paused == x.paused {
			continue
		}
		x.paused = paused
		if err := g.collection.Maps[bpf.DisksMapPlaces].Put(x.index, x.pack()); err != nil {
			return err
		}
	}
	return nil
}

// forget makes a place that of nothing, its counters zero.
func (o *Observer) forget(g *group, x place) error {
	clear(o.operations)
	return errors.Join(
		g.collection.Maps[bpf.DisksMapPlaces].Put(x.index, uint64(0)),
		g.collection.Maps[bpf.DisksMapOperations].Put(x.index, o.operations),
	)
}

// readDisks reads the counters of all disks, and forgets those of disks that are gone.
func (o *Observer) readDisks(g *group, s *Snapshot) error {
	var refused uint64
	if err := g.collection.Variables[bpf.DisksVarRefused].Get(&refused); err == nil && refused > 0 {
		s.Unobserved = append(s.Unobserved, Unobserved{GroupDisks, "there are more disks than counters: name those to observe"})
	}
	names, counters := g.collection.Maps[bpf.DisksMapNames], g.collection.Maps[bpf.DisksMapOperations]
	places, err := readPlaces(g)
	if err != nil {
		return err
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Or(cmp.Compare(a.device, b.device), cmp.Compare(a.kind, b.kind)) })
	for len(places) > 0 {
		device := places[0].device
		var name bpf.DisksName
		if err := names.Lookup(device, &name); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		disk := Disk{Name: text(name.Text[:]), Number: numberOf(device)}
		present := o.kernel.rename(&disk)
		for ; len(places) > 0 && places[0].device == device; places = places[1:] {
			x := places[0]
			if int(x.kind) >= len(operationNames) {
				continue
			}
			if !present {
				delete(o.counted, countedKey{disk.Number, operationNames[x.kind]})
				if err := o.forget(g, x); err != nil {
					return err
				}
				continue
			}
			if err := counters.Lookup(x.index, &o.operations); err != nil {
				if errors.Is(err, ebpf.ErrKeyNotExist) {
					continue // there is no room for it
				}
				return err
			}
			disk.Operations = append(disk.Operations, sumOperation(operationNames[x.kind], o.operations))
		}
		if !present {
			delete(o.services, disk.Number)
			if err := names.Delete(device); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
			continue
		}
		inFlight := o.kernel.inFlight(disk.Number)
		if o.timed {
			setDepths(disk.Operations, inFlight)
		}
		for i := range disk.Operations {
			d := &disk.Operations[i]
			if !o.timed {
				d.Depth = min(d.Depth, inFlight(d.Operation))
				d.Count -= d.Depth
			}
			d.Count = max(d.Count, o.counted[countedKey{disk.Number, d.Operation}]) // a count never goes back
			o.counted[countedKey{disk.Number, d.Operation}] = d.Count
			s.Missed += d.Count - min(d.Count, d.Service.Count()+d.untimed)
			disk.Depth += d.Depth
			disk.Merges += d.Merges
		}
		s.Disks = append(s.Disks, disk)
	}
	slices.SortFunc(s.Disks, func(a, b Disk) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return compare(a.Number, b.Number)
	})
	return nil
}

// setDepths says how many requests the driver has, as the kernel counts them: reads,
// and all others but flushes, which are taken for writes.
func setDepths(operations []DiskOperation, inFlight func(operation string) uint64) {
	for _, kinds := range [][]string{{"read"}, {"write", "discard", "write-zeroes"}} {
		for _, kind := range kinds {
			i := slices.IndexFunc(operations, func(d DiskOperation) bool { return d.Operation == kind })
			if i < 0 {
				continue
			}
			if n := inFlight(kind); n != math.MaxUint64 {
				operations[i].Depth = n
			}
			break
		}
	}
}

// sumOperation adds up what each CPU counted. What the CPUs have is not read at one
// moment, so the depth of a queue may be off by what happens meanwhile. Count is
// what was issued: completed, or in flight.
func sumOperation(name string, cpus []operation) DiskOperation {
	d := DiskOperation{Operation: name}
	var issued, requeued, done, lost uint64
	for i := range cpus {
		c := &cpus[i]
		issued += c.Issued
		requeued += c.Requeued
		d.Requeues += c.HandedBack
		done += c.Done
		lost += c.Lost
		d.Errors += c.Errors
		d.Bytes += c.Bytes + c.LostBytes
		d.Merges += c.BackMerges + c.FrontMerges + c.RequestMerges
		for j, n := range c.Sizes {
			d.Sizes[j] += n
		}
		d.Queue.addRaw(c.Queue.Sum, &c.Queue.Counts)
		d.Service.addRaw(c.Service.Sum, &c.Service.Counts)
		d.untimed += uint64(c.Sample.Waiting)
	}
	d.Requeues += requeued
	d.Count = max(issued-min(issued, requeued), done+lost)
	d.Depth = d.Count - done - lost
	return d
}

// inFlight is the most requests of each operation that a disk can have: the kernel's
// own count. Completions that were not reported to the programs would else stay in
// the depth of a queue until their memory is used again.
func (k *kernel) inFlight(n Number) func(operation string) uint64 {
	var reads, writes uint64
	dir := filepath.Join(k.root, "sys/dev/block", n.String())
	b, err := os.ReadFile(filepath.Join(dir, "inflight"))
	if err == nil {
		_, err = fmt.Sscan(string(b), &reads, &writes)
	}
	counts, _ := os.ReadFile(filepath.Join(dir, "queue/iostats")) // absent: not counted
	if err != nil || strings.TrimSpace(string(counts)) != "1" {
		return func(string) uint64 { return math.MaxUint64 }
	}
	return func(operation string) uint64 {
		switch operation {
		case "read":
			return reads
		case "flush":
			return math.MaxUint64 // they are not in it
		}
		return writes
	}
}

// timesRequests reports whether the kernel itself notes of the requests of all disks
// when they began, as it does unless somebody has switched the statistics of a disk off;
// and when the driver got them, as writeback throttling makes it do (blk_stat_add_callback
// in block/blk-stat.c). The programs then need not note it. What has no size (a loop
// device without a file) or no requests (zram, md) does not count.
func (k *kernel) timesRequests() (begins, issues bool) {
	disks, _ := filepath.Glob(filepath.Join(k.root, "sys/block/*")) // the pattern is good
	for _, disk := range disks {
		if size, err := os.ReadFile(filepath.Join(disk, "size")); err != nil || strings.TrimSpace(string(size)) == "0" {
			continue
		}
		if _, err := os.Stat(filepath.Join(disk, "mq")); err != nil {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(disk, "queue/iostats")); err != nil || strings.TrimSpace(string(b)) != "1" {
			return false, false
		}
		b, err := os.ReadFile(filepath.Join(disk, "queue/wbt_lat_usec"))
		throttled := err == nil && strings.TrimSpace(string(b)) != "0" // absent or unreadable: not set up
		issues = throttled && (issues || !begins)
		begins = true
	}
	return begins, issues
}

// rename gives a disk the name it has now, and reports whether it is there at all. A
// disk without a number in sysfs is looked for by its name: the paths of an NVMe
// multipath device are such.
func (k *kernel) rename(d *Disk) bool {
	dir := filepath.Join(k.root, "sys/dev/block")
	target, err := os.Readlink(filepath.Join(dir, d.Number.String()))
	if err == nil {
		d.Name = filepath.Base(target)
		return true
	}
	d.Name = strings.ReplaceAll(d.Name, "/", "!") // as in sysfs
	if _, err := os.Stat(filepath.Join(k.root, "sys/class/block", d.Name)); err == nil {
		return true
	}
	_, err = os.Stat(dir)
	return err != nil // without sysfs nobody knows
}

// countedKey is an operation of a disk.
type countedKey struct {
	Number
	operation string
}

// service is what ServiceTime knows of a disk.
type service struct {
	asked  time.Time
	since  time.Time // of the counts in base
	base   Histogram // reads and writes, when the answer was made
	median time.Duration
}

const (
	serviceCount  = 64               // requests that make a new answer
	serviceExpiry = 10 * time.Second // after which fewer will do
)

// ServiceTime is the median time that a disk needed for its recent reads and writes.
// It is meant to be asked often: it asks the kernel once a second, with two or three
// system calls. ok is false while no request was seen.
//
// The number is that of the whole disk, not of a partition.
func (o *Observer) ServiceTime(major, minor uint32) (median time.Duration, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	g := o.group(GroupDisks)
	if g.collection == nil {
		return 0, false
	}
	n, now := Number{major, minor}, time.Now()
	s := o.services[n]
	if s == nil {
		if len(o.services) >= watchedMax {
			return 0, false
		}
		s = &service{since: o.started}
		o.services[n] = s
	} else if now.Sub(s.asked) < o.serviceAge {
		return s.median, s.median > 0
	}
	s.asked = now
	if o.keepTimesLocked(); g.collection == nil {
		return s.median, s.median > 0
	}
	var sum Histogram
	places, err := readPlaces(g)
	if err != nil {
		return s.median, s.median > 0
	}
	for _, x := range places {
		if x.device != n.device() || x.kind > 1 { // reads, writes
			continue
		}
		if err := g.collection.Maps[bpf.DisksMapOperations].Lookup(x.index, &o.operations); err != nil {
			continue // there is no room for it
		}
		for i := range o.operations {
			sum.addRaw(o.operations[i].Service.Sum, &o.operations[i].Service.Counts)
		}
	}
	recent := sum
	recent.Sub(&s.base)
	if count := recent.Count(); count >= serviceCount || count > 0 && (s.median == 0 || now.Sub(s.since) >= serviceExpiry) {
		s.median, s.base, s.since = max(recent.Quantile(0.5), 1), sum, now
	}
	return s.median, s.median > 0
}

// text is a C string.
func text(c []int8) string {
	var b strings.Builder
	for _, x := range c {
		if x == 0 {
			break
		}
		b.WriteByte(byte(x))
	}
	return b.String()
}

// keys lists the keys of a map. Those that come or go meanwhile are in it or not.
func keys[K any](m *ebpf.Map) ([]K, error) {
	var list []K
	var next K
	var previous any
	for range m.MaxEntries() {
		err := m.NextKey(previous, &next)
		if errors.Is(err, ebpf.ErrKeyNotExist) || errors.Is(err, unix.ENOENT) {
			return list, nil
		}
		if err != nil {
			return nil, err
		}
		list = append(list, next)
		previous = next
	}
	return list, nil
}
