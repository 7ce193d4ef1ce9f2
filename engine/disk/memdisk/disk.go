package memdisk

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/invariant"
)

const (
	sectorDefault = 512 // what every disk writes whole
	minIO         = 512 // the smallest block of a disk Linux knows

	chunkMin = 16 << 10 // bytes of changes taken from the heap at once, doubling
	chunkMax = 1 << 20
)

// Config says what disk to make.
type Config struct {
	Size   uint64 // bytes
	Seed   uint64 // mixed into every seed given later
	Sector int    // bytes a crash leaves whole, a power of two; 512 when 0

	ReadOnly bool
	AnyIO    bool // MinIO is 1, not 512

	// DiscardKeeps makes discards do nothing, as a disk may. Else the range reads
	// as zeros.
	DiscardKeeps bool
	// Shuffle completes the requests of one turn in an order chosen by Seed.
	Shuffle bool
}

// Disk is a disk in memory. It is safe for use from any goroutine.
type Disk struct {
	group *Group // immutable
	index int    // in the group; immutable

	// Guarded by group.mu.
	config   Config // Size and ReadOnly change
	medium   medium
	visible  content
	queues   int // open
	opened   uint64
	stats    Stats
	chunk    []byte // room for the data of the next changes
	chunkLen int    // of the whole chunk
	taken    int    // bytes of chunk in use

	bad       map[uint64]struct{} // sectors that cannot be read
	vanished  bool
	lose      func(Event) bool
	misdirect func(Event) bool
	target    uint64 // of misdirect
}

// New makes a disk of zeros.
func New(c Config) *Disk { return NewGroup(c).disks[0] }

func newDisk(g *Group, index int, c Config) *Disk {
	if c.Sector == 0 {
		c.Sector = sectorDefault
	}
	invariant.Check(c.Sector > 0 && c.Sector&(c.Sector-1) == 0, "memdisk: sector of %d bytes is no power of two", c.Sector)
	invariant.Check(c.Size > 0 && c.Size < 1<<62, "memdisk: disk of %d bytes", c.Size)
	return &Disk{group: g, index: index, config: c}
}

// Info implements [datapath.Device].
func (d *Disk) Info() datapath.Info {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	return d.infoLocked()
}

func (d *Disk) infoLocked() datapath.Info {
	info := datapath.Info{
		Description: "crashable memory",
		Size:        d.config.Size,
		Features: datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureDiscard | datapath.FeatureWriteZeroes |
			datapath.FeatureFastZero | datapath.FeatureMultiQueue,
		ReadOnly:    d.config.ReadOnly,
		MinIO:       minIO,
		PreferredIO: datapath.BlockSize,
	}
	if d.config.AnyIO {
		info.MinIO = 1
	}
	return info
}

// OpenQueue implements [datapath.Device].
func (d *Disk) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.queues++
	d.opened++
	q := &queue{disk: d, reactor: r, orders: make([]uint64, depth),
		ended: make([]*datapath.Request, 0, depth), running: make([]*datapath.Request, 0, depth)}
	q.deferred.Func = q.run
	if d.config.Shuffle {
		q.random = rand.New(rand.NewPCG(d.config.Seed, d.opened))
	}
	return q, nil
}

// Close implements [datapath.Device]. The disk keeps everything, as a disk does,
// and can be used again.
func (d *Disk) Close() error { return nil }

// Group is the group the disk belongs to; one of its own when it was made by New.
func (d *Disk) Group() *Group { return d.group }

// Bytes is a copy of what a read would return.
func (d *Disk) Bytes(offset, length uint64) []byte {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	return d.bytesLocked(&d.visible, offset, length)
}

// Durable is a copy of what a crash that loses everything it may would leave.
func (d *Disk) Durable(offset, length uint64) []byte {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	c := d.medium.durable.freeze().fork()
	resolve(&c, d.medium.log, nil)
	return d.bytesLocked(&c, offset, length)
}

func (d *Disk) bytesLocked(c *content, offset, length uint64) []byte {
	d.insideLocked(offset, length)
	b := make([]byte, length)
	c.read(b, offset)
	return b
}

func (d *Disk) insideLocked(offset, length uint64) {
	invariant.Check(offset <= d.config.Size && length <= d.config.Size-offset, "memdisk: %d bytes at %d of %d", length, offset, d.config.Size)
}

// Clone makes a disk, in a group of its own, that is now as d is: content,
// changes that are not durable, unreadable sectors, being read-only or gone. It
// has no queues, no trace and no statistics, and no write is going to be lost or
// misdirected. It takes memory only for what either writes later.
//
// A clone may be taken while d is in use: Clone().Crash(seed) is a loss of power
// at that moment.
func (d *Disk) Clone() *Disk {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	g := &Group{clock: d.group.clock}
	clone := d.cloneLocked(g, 0)
	g.disks = []*Disk{clone}
	return clone
}

func (d *Disk) cloneLocked(g *Group, index int) *Disk {
	clone := newDisk(g, index, d.config)
	clone.medium.durable = d.medium.durable.freeze().fork()
	clone.visible = d.visible.freeze().fork()
	clone.medium.log = slices.Clone(d.medium.log)
	for i := range clone.medium.log { // of requests that the clone will not see complete
		if c := &clone.medium.log[i]; c.ended == 0 {
			c.ended = c.order
		}
	}
	clone.bad = maps.Clone(d.bad)
	clone.vanished = d.vanished
	d.chunk = nil // the clone uses the data in it
	return clone
}

// keepLocked copies data to where it stays unchanged.
func (d *Disk) keepLocked(data []byte) []byte {
	if len(data) > len(d.chunk)-d.taken {
		if len(d.medium.log) == 0 && d.group.trace == nil && len(data) <= len(d.chunk) {
			d.taken = 0
		} else {
			d.chunkLen = min(max(2*d.chunkLen, chunkMin), chunkMax)
			d.chunk, d.taken = make([]byte, max(d.chunkLen, len(data))), 0
		}
	}
	kept := d.chunk[d.taken : d.taken+len(data) : d.taken+len(data)]
	d.taken += len(data)
	copy(kept, data)
	return kept
}

// submit does r and returns the number of its event, 0 for none.
func (d *Disk) submit(r *datapath.Request) (order uint64, status datapath.Status) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	if status = d.refusesLocked(r); status != datapath.StatusOK {
		d.stats.Failed++
		return 0, status
	}
	switch r.Op {
	case datapath.OpRead:
		d.stats.Reads++
		d.stats.ReadBytes += r.Length
		r.Zero = d.visible.read(r.Buf, r.Offset)
	case datapath.OpFlush:
		d.stats.Flushes++
		order = d.group.recordLocked(Event{Disk: d.index, Op: r.Op})
	default:
		order = d.changeLocked(r)
	}
	return order, datapath.StatusOK
}

// refusesLocked says how a request fails.
func (d *Disk) refusesLocked(r *datapath.Request) datapath.Status {
	info := d.infoLocked()
	status := datapath.Validate(&info, r)
	switch {
	case d.vanished:
		return datapath.StatusIO
	case r.Op == datapath.OpCache, r.Op == datapath.OpExtents, r.Op >= datapath.OpCount:
		return datapath.StatusNotSupported
	case status == datapath.StatusReadOnly:
		return status
	case r.Op != datapath.OpFlush && (r.Offset > info.Size || r.Length > info.Size-r.Offset):
		return datapath.StatusIO // the disk has shrunk
	case status == datapath.StatusOK && r.Op == datapath.OpRead && d.badLocked(r.Offset, r.Length):
		return datapath.StatusIO
	}
	return status
}

// changeLocked does a write, discard or write-zeroes.
func (d *Disk) changeLocked(r *datapath.Request) uint64 {
	d.stats.count(r)
	e := Event{Disk: d.index, Op: r.Op, Offset: r.Offset, Length: r.Length, FUA: r.Flags&datapath.FlagFUA != 0, Stored: r.Offset}
	if r.Op == datapath.OpWrite {
		e.Data = r.Buf // as long as the functions look at it
	}
	e.Lost = d.lose != nil && d.lose(e)
	if !e.Lost && d.misdirect != nil && r.Op == datapath.OpWrite && d.misdirect(e) {
		d.misdirect = nil
		e.Stored = min(d.target, d.config.Size-r.Length)
	}
	stored := !e.Lost && r.Length > 0 && !(r.Op == datapath.OpDiscard && d.config.DiscardKeeps)
	if r.Op == datapath.OpWrite && (stored || d.group.trace != nil) {
		e.Data = d.keepLocked(r.Buf)
	}
	order := d.group.recordLocked(e)
	if stored {
		d.storeLocked(change{order: order, op: r.Op, offset: e.Stored, length: r.Length, data: e.Data, fua: e.FUA})
	}
	return order
}

func (d *Disk) storeLocked(c change) {
	c.apply(&d.visible, c.span())
	d.medium.add(c)
	d.healLocked(c.span())
}

// end is told, before the submitter is, that a request has completed.
func (d *Disk) end(op datapath.Op, order uint64) {
	g := d.group
	g.mu.Lock()
	defer g.mu.Unlock()
	g.endLocked(order)
	if op == datapath.OpFlush {
		d.medium.flush(order)
	} else {
		d.medium.end(order, g.clock)
	}
}

// String names the disk in test output.
func (d *Disk) String() string { return fmt.Sprintf("memdisk %d", d.index) }

// queue does requests in Submit and completes them at the end of the turn.
type queue struct {
	disk    *Disk            // immutable
	reactor *reactor.Reactor // immutable

	// Owned by the reactor.
	orders   []uint64            // the event of the request with each tag, 0 for none
	ended    []*datapath.Request // wait for the end of the turn; capacity depth
	running  []*datapath.Request // being completed; capacity depth
	deferred reactor.Deferred
	random   *rand.Rand // nil: completions keep the order of submission
}

// Submit implements [datapath.Queue].
func (q *queue) Submit(r *datapath.Request) {
	r.Zero = false
	q.orders[r.Tag], r.Status = q.disk.submit(r)
	q.ended = append(q.ended, r)
	q.reactor.Defer(&q.deferred)
}

// run completes what was submitted before it. It is [datapath.Completions], but
// the disk hears of each completion before the submitter does: what a flush
// covers depends on it.
func (q *queue) run() {
	batch := q.ended
	q.ended = q.running[:0]
	if q.random != nil {
		q.random.Shuffle(len(batch), func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
	}
	for i, r := range batch {
		batch[i] = nil
		if order := q.orders[r.Tag]; order != 0 {
			q.disk.end(r.Op, order)
		}
		r.Complete(r.Status)
	}
	q.running = batch[:0]
}

// Close implements [datapath.Queue].
func (q *queue) Close() error {
	q.disk.group.mu.Lock()
	defer q.disk.group.mu.Unlock()
	q.disk.queues--
	return nil
}
