package remote

import (
	"math/rand/v2"
	"sync"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// volatileDevice is memory with a cache that a crash loses: what was not flushed
// is, sector by sector, there or gone.
type volatileDevice struct {
	*memdev.Device // what reads see

	mu      sync.Mutex
	durable *memdev.Store // guarded by mu
	dirty   map[uint64]bool
	flushes int
}

const volatileSector = 512

func newVolatile(n *node, size uint64) *volatileDevice {
	n.t.Helper()
	store, err := memdev.NewStore(size)
	if err != nil {
		n.t.Fatal(err)
	}
	n.closers = append(n.closers, store.Close)
	return &volatileDevice{Device: n.memory(memdev.Config{Size: size, MinIO: volatileSector}), durable: store, dirty: map[uint64]bool{}}
}

// crash loses what was not flushed, or half of it. The device is not in use.
func (v *volatileDevice) crash(random *rand.Rand) {
	v.mu.Lock()
	defer v.mu.Unlock()
	b := make([]byte, volatileSector)
	for sector := range v.dirty {
		if random.IntN(2) == 0 {
			v.durable.Read(b, sector*volatileSector)
			v.Store().Write(b, sector*volatileSector)
		}
		v.save(sector) // what survived is on the disk
	}
	clear(v.dirty)
}

// save makes a sector durable. The caller holds mu.
func (v *volatileDevice) save(sector uint64) {
	var b [volatileSector]byte
	v.Store().Read(b[:], sector*volatileSector)
	v.durable.Write(b[:], sector*volatileSector)
}

func (v *volatileDevice) flushCount() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.flushes
}

// OpenQueue implements datapath.Device.
func (v *volatileDevice) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	q, err := v.Device.OpenQueue(r, depth)
	return &volatileQueue{q, v}, err
}

type volatileQueue struct {
	datapath.Queue
	device *volatileDevice
}

// Submit relies on memdev's doing the work within Submit.
func (q *volatileQueue) Submit(r *datapath.Request) {
	v := q.device
	v.mu.Lock()
	defer v.mu.Unlock()
	q.Queue.Submit(r)
	first, end := r.Offset/volatileSector, (r.Offset+r.Length)/volatileSector
	switch {
	case r.Op == datapath.OpFlush:
		v.flushes++
		for sector := range v.dirty {
			v.save(sector)
		}
		clear(v.dirty)
	case r.Modifies():
		for sector := first; sector < end; sector++ {
			if r.Flags&datapath.FlagFUA != 0 {
				v.save(sector)
				delete(v.dirty, sector)
			} else {
				v.dirty[sector] = true
			}
		}
	}
}
