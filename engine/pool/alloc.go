package pool

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// allocator knows which clusters are free. What it knows is derived at open from
// the maps; nothing of it is stored.
type allocator struct {
	mu    sync.Mutex
	zones []zoneAlloc
	disks []diskAlloc
	next  int // disk to take from next: clusters are striped over the disks

	// In clusters.
	free     uint64 // clear bits
	grace    uint64 // freed, but not yet for reuse; not in free
	reserved uint64 // promised to thick volumes
	reserve  uint64 // kept for metadata
	forming  uint64 // taken for metadata, and counted in reserve or owed still

	// owed counts pages of metadata that have no place on a disk yet, less the places
	// that are free: pages in memory, and those the map of a thick volume may come to
	// have. Checkpoints take clusters for them, which nobody else may.
	owed atomic.Int64
}

// owedClusters is what checkpoints may need for n pages more than there are.
func (a *allocator) owedClusters(n int64) uint64 {
	return uint64(max(a.owed.Load()+n, 0)+metaPairs-1) / metaPairs
}

// owe counts n more pages of metadata; false: they would find no place, and are not
// counted.
func (a *allocator) owe(n int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.free+a.forming < a.reserved+a.owedClusters(n) {
		return false
	}
	a.owed.Add(n)
	return true
}

// zoneAlloc is the free map of one zone: a set bit is in use.
type zoneAlloc struct {
	disk  int
	bits  []uint64
	count uint32 // clusters that exist; bits past them are set
	free  uint32
}

// diskAlloc is where the search on a disk goes on.
type diskAlloc struct {
	zones []uint32 // of the pool, in order
	zone  int      // index into zones
	word  int
	free  uint64
}

// addZone makes clusters [0, count) of a new last zone free.
func (a *allocator) addZone(disk int, size, count uint32) {
	z := zoneAlloc{disk: disk, bits: make([]uint64, (size+63)/64), count: count, free: count}
	for i := count; i < uint32(len(z.bits))*64; i++ {
		z.bits[i/64] |= 1 << (i % 64)
	}
	for len(a.disks) <= disk {
		a.disks = append(a.disks, diskAlloc{})
	}
	d := &a.disks[disk]
	d.zones = append(d.zones, uint32(len(a.zones)))
	d.free += uint64(count)
	a.zones = append(a.zones, z)
	a.free += uint64(count)
}

// extendZone makes clusters of a zone that was shorter free, up to count.
func (a *allocator) extendZone(zone int, count uint32) {
	z := &a.zones[zone]
	for i := z.count; i < count; i++ {
		z.bits[i/64] &^= 1 << (i % 64)
	}
	added := count - z.count
	z.count, z.free = count, z.free+added
	a.disks[z.disk].free += uint64(added)
	a.free += uint64(added)
}

// use marks a cluster; false: it is in use already, or does not exist.
func (a *allocator) use(cluster, zoneClusters uint32) bool {
	zone, i := cluster/zoneClusters, cluster%zoneClusters
	if int(zone) >= len(a.zones) {
		return false
	}
	z := &a.zones[zone]
	if z.bits[i/64]&(1<<(i%64)) != 0 {
		return false
	}
	z.bits[i/64] |= 1 << (i % 64)
	z.free--
	a.disks[z.disk].free--
	a.free--
	return true
}

// claim says what an allocation may use.
type claim uint8

const (
	claimData     claim = iota // what nobody has reserved
	claimReserved              // of a thick volume's reservation
	claimMeta                  // metadata: the pool's reserve too
)

// take takes a free cluster. The disks take turns.
func (a *allocator) take(c claim, zoneClusters uint32) (cluster uint32, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch c {
	case claimData:
		if a.free+a.forming <= a.reserved+a.reserve+a.owedClusters(1) {
			return 0, false
		}
	case claimReserved:
		// What is freed comes back to the reservation before anybody may have it again:
		// until then not even a thick volume may use what checkpoints need.
		if a.reserved == 0 || a.free == 0 || a.free+a.forming <= a.owedClusters(0) {
			return 0, false
		}
	}
	for range a.disks {
		d := &a.disks[a.next]
		a.next = (a.next + 1) % len(a.disks)
		if d.free == 0 {
			continue
		}
		cluster, ok = a.takeFrom(d, zoneClusters)
		if ok {
			switch c {
			case claimReserved:
				a.reserved--
			case claimMeta:
				a.forming++
			}
			return cluster, true
		}
	}
	return 0, false
}

func (a *allocator) takeFrom(d *diskAlloc, zoneClusters uint32) (uint32, bool) {
	for range len(d.zones) + 1 { // the first one again, from its beginning
		z := &a.zones[d.zones[d.zone]]
		if z.free > 0 {
			for ; d.word < len(z.bits); d.word++ {
				if w := z.bits[d.word]; w != ^uint64(0) {
					i := bits.TrailingZeros64(^w)
					z.bits[d.word] |= 1 << i
					z.free--
					d.free--
					a.free--
					return d.zones[d.zone]*zoneClusters + uint32(d.word*64+i), true
				}
			}
		}
		d.zone, d.word = (d.zone+1)%len(d.zones), 0
	}
	return 0, false
}

// put gives clusters back for reuse.
func (a *allocator) put(clusters []uint32, zoneClusters uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range clusters {
		z := &a.zones[c/zoneClusters]
		i := c % zoneClusters
		z.bits[i/64] &^= 1 << (i % 64)
		z.free++
		a.disks[z.disk].free++
		a.free++
	}
}

// putNow gives back one cluster that was never in use.
func (a *allocator) putNow(c uint32, reserved bool, zoneClusters uint32) {
	a.put([]uint32{c}, zoneClusters)
	if reserved {
		a.mu.Lock()
		a.reserved++
		a.mu.Unlock()
	}
}

// promise changes the reservation by n clusters, and by the pages of their map;
// false: there is not that much. The pool's reserve is there for the pages.
func (a *allocator) promise(n, pages int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if (n > 0 || pages > 0) && int64(a.free+a.grace+a.forming) < int64(a.reserved)+n+int64(max(a.reserve, a.owedClusters(pages))) {
		return false
	}
	a.reserved = uint64(int64(a.reserved) + n)
	a.owed.Add(pages)
	return true
}

// used reports whether a cluster is in use.
func (a *allocator) used(cluster, zoneClusters uint32) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	z, i := &a.zones[cluster/zoneClusters], cluster%zoneClusters
	return i < z.count && z.bits[i/64]&(1<<(i%64)) != 0
}

// empty reports whether none of n clusters of a zone, from first on, is in use.
func (a *allocator) empty(zone, first, n uint32) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	z := &a.zones[zone]
	if first+n > z.count {
		return false
	}
	for i := first; i < first+n; i++ {
		if z.bits[i/64]&(1<<(i%64)) != 0 {
			return false
		}
	}
	return true
}

// space is how many bytes of clusters there are, and how many of them are free or
// about to be.
func (a *allocator) space() (total, free uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.zones {
		total += uint64(a.zones[i].count)
	}
	return total << clusterShift, (a.free + a.grace) << clusterShift
}
