package pool

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/rate"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	// extraPieces bounds how many pieces a queue's requests may have under way beyond
	// one each.
	extraPieces = 64
	bounceCount = 16 // reads, and changes, of part of a block, served at once
	loaderCount = 16 // checksum pages read at once
	readMax     = 1 << 20

	bounceMemory = 2 * bounceCount * blockSize
	loaderMemory = loaderCount * pairSize
)

// queue is one reactor's path into a volume.
//
// A request is cut into pieces that each lie in one place on one disk; each piece
// has one request of the disk's queue. A read needs no lock: what it reads is
// proven by its checksum. A change locks its blocks in the volume's table of
// words, finds or allocates their cluster, enters their region, writes, sets
// their checksums, and then makes them visible in the map.
type queue struct {
	v     *volume          // immutable
	p     *Pool            // immutable
	r     *reactor.Reactor // immutable
	lower []datapath.Queue // by disk; nil: missing; owned by the reactor

	// active counts the requests under way by the parity of the epoch they began in.
	active [2]atomic.Int64 // written by the reactor, read by Pool.reclaim

	// Owned by the reactor.
	slots      []slot
	pieces     []piece // the first len(slots) belong to the slots of the same index
	free       []*piece
	memory     []byte
	zeros      []byte
	reads      bounces // for reads, which may wait for blocks while they have one
	patches    bounces // for changes, which have their blocks before
	loaders    [][]byte
	loading    []*piece // that have one
	waitLoader []*piece
	streams    streams

	throttle
	goOn      reactor.Deferred // takeTurns
	wakeLater reactor.Deferred // wakeOthers

	// What waited and may go on; added to by any thread.
	served handover[lockWait, *lockWait]
	turns  handover[slot, *slot]
	woken  atomic.Bool // a message to look at them is on its way

	paused    bool
	held      []*slot // changes that wait for the end of a pause; each has its place in the order
	modifying int     // changes under way
	drained   func()  // called once when it is 0

	closed      bool
	submitting  bool
	completions datapath.Completions
	continuing  []*slot // have more to do, in another turn
	continued   []*slot
	nextTurn    nextTurn
}

// slot is one request of the export.
type slot struct {
	q         *queue
	r         *datapath.Request
	next      uint64 // bytes, on the volume: where the next piece begins; of a flush, the next disk
	end       uint64
	pieces    int // under way
	parity    uint64
	resting   int  // pieces that wait and hold on to no cluster
	away      bool // not counted in active: all its pieces rest
	status    datapath.Status
	commit    bool // a change could not be kept but by the journal
	zero      bool // nothing but zeros so far
	advancing bool
	waits     bool // for a message
	flushed   bool // the disks have been flushed for it
	atDisk    int  // pieces whose data a disk has, where the request is timed
	place     orderPlace
	behind    *slot // link in lists of those whose turn has come
	err       error
}

// piece is a part of a request.
type piece struct {
	q    *queue
	s    *slot
	own  bool // belongs to its slot
	req  datapath.Request
	step func(*piece) // what to do when the lower request has ended
	then func(*piece) // what to do when a wait has ended
	err  error        // of the wait

	v            uint32 // cluster of the volume
	first, count uint32 // blocks of it; a read may go on into the clusters behind
	cluster      uint32 // of the pool
	buf          []byte // whole blocks
	done         uint32 // blocks verified
	tries        int
	again        uint32 // cluster of a block that is read again

	// Of a part of a block: bounce holds the block, part the bytes of the request in
	// it at from. A nil part of a change is zeros.
	bounce []byte
	part   []byte
	from   int
	length int

	loader  []byte
	wanted  uint32       // region whose checksums it waits for
	version uint64       // of that region, before they were read
	after   func(*piece) // and what then
	also    *piece       // link in the list of those that wait for the same read

	mask    uint32 // blocks to lock
	locked  bool
	turn    lockWait
	spaced  int // how often it has waited for space
	rests   bool
	region  *region
	index   uint32 // of the region
	block   uint32 // in the region
	inPlace bool   // the blocks were mapped here before
}

func (v *volume) openQueue(r *reactor.Reactor, depth int) (*queue, error) {
	p := v.p
	if depth < 1 {
		return nil, fmt.Errorf("volume %s: queue depth %d: must be at least 1", v.name, depth)
	}
	pieces := depth + min(depth, extraPieces)
	q := &queue{v: v, p: p, r: r, slots: make([]slot, depth), pieces: make([]piece, pieces),
		free: make([]*piece, 0, pieces), waitLoader: make([]*piece, 0, pieces), loading: make([]*piece, 0, loaderCount),
		held: make([]*slot, 0, depth), continuing: make([]*slot, 0, depth), continued: make([]*slot, 0, depth)}
	q.goOn.Func, q.wakeLater.Func = q.takeTurns, q.wakeOthers
	q.nextTurn.q = q
	q.throttle.line, q.throttle.timer.Func = rate.NewLine[*slot](depth), q.releaseThrottled
	q.completions.Init(r, depth)
	var err error
	if q.memory, err = unix.Mmap(-1, 0, bounceMemory+loaderMemory+clusterSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
		return nil, fmt.Errorf("volume %s: buffers: %w", v.name, err)
	}
	m := q.memory
	for _, b := range []*bounces{&q.reads, &q.patches} {
		b.waiting = make([]*piece, 0, pieces)
		for range bounceCount {
			b.free = append(b.free, m[:blockSize:blockSize])
			m = m[blockSize:]
		}
	}
	for range loaderCount {
		q.loaders = append(q.loaders, m[:pairSize:pairSize])
		m = m[pairSize:]
	}
	q.zeros = m
	for i := range q.slots {
		q.slots[i].q = q
	}
	for i := range q.pieces {
		c := &q.pieces[i]
		c.q, c.own = q, i < depth
		c.req.Tag = uint32(i)
		c.req.Done = func(*datapath.Request) { c.step(c) }
		if !c.own {
			q.free = append(q.free, c)
		}
	}
	if err := q.openDisks(); err != nil {
		return nil, errors.Join(err, q.release())
	}
	v.addQueue(q)
	p.addQueue(q)
	// A disk may have been added in between; one that is added from here on finds q.
	if err := q.openDisks(); err != nil {
		return nil, errors.Join(err, q.Close())
	}
	return q, nil
}

// openDisks opens queues of the disks that q has none of. Reactor.
func (q *queue) openDisks() error {
	all := *q.p.members.Load()
	for len(q.lower) < len(all) {
		d := all[len(q.lower)]
		if d == nil {
			q.lower = append(q.lower, nil)
			continue
		}
		l, err := d.dev.OpenQueue(q.r, len(q.pieces))
		if err != nil {
			return fmt.Errorf("volume %s: %s: %w", q.v.name, d.path, err)
		}
		q.lower = append(q.lower, l)
	}
	return nil
}

// closeDisks closes the queues of disks that are members no more. Nothing lies on
// them. Reactor.
func (q *queue) closeDisks() error {
	var errs []error
	for n := len(*q.p.members.Load()); len(q.lower) > n; q.lower = q.lower[:len(q.lower)-1] {
		errs = append(errs, q.lower[len(q.lower)-1].Close())
	}
	return errors.Join(errs...)
}

// Close implements [datapath.Queue].
func (q *queue) Close() error {
	q.p.removeQueue(q)
	q.v.removeQueue(q)
	q.closed = true
	q.r.Disarm(&q.throttle.timer)
	return q.release()
}

func (q *queue) release() error {
	var errs []error
	for _, l := range q.lower {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(append(errs, unix.Munmap(q.memory))...)
}

// Submit implements [datapath.Queue].
func (q *queue) Submit(r *datapath.Request) {
	s := &q.slots[r.Tag]
	s.r, s.next, s.end, s.pieces, s.status, s.commit, s.flushed, s.err = r, r.Offset, r.Offset+r.Length, 0, datapath.StatusOK, false, false, nil
	r.Zero = false
	s.zero = true
	s.atDisk = 0
	q.submitting = true
	if (q.v.rate.Load() != nil || !q.throttle.line.Empty()) && q.throttled(s) {
		q.submitting = false
		return
	}
	r.MarkRecent(datapath.StageMetadata, q.r)
	s.parity = q.enter()
	if s.end > q.v.size.Load() || s.end < r.Offset {
		q.refuse(s)
		q.submitting = false
		return
	}
	if r.Modifies() {
		q.submitChange(s)
	} else {
		s.advance()
	}
	q.submitting = false
}

// refuse ends a request that goes past the end of the volume. An export has looked
// before; this one proves that nothing outside can be touched.
func (q *queue) refuse(s *slot) {
	s.status = datapath.StatusInvalid
	if s.r.Modifies() {
		q.modifying++
		if s.r.Op != datapath.OpDiscard {
			s.status = datapath.StatusNoSpace
		}
	}
	s.finish()
}

// enter counts a request in the present epoch and returns its parity.
func (q *queue) enter() uint64 {
	for {
		e := q.p.epoch.Load()
		q.active[e&1].Add(1)
		if q.p.epoch.Load() == e {
			return e & 1
		}
		q.active[e&1].Add(-1)
	}
}

// rest says that the piece waits, and holds on to no cluster that could be freed:
// what it waits for may be just the end of its own epoch. unrest undoes it.
func (c *piece) rest() {
	c.rests = true
	c.s.resting++
	c.s.leaveEpoch()
}

func (c *piece) unrest() {
	if c.rests {
		c.rests = false
		c.s.resting--
		c.s.joinEpoch()
	}
}

// leaveEpoch takes the request out of its epoch when all its pieces rest.
func (s *slot) leaveEpoch() {
	if !s.away && !s.advancing && s.resting > 0 && s.resting == s.pieces {
		s.q.active[s.parity].Add(-1)
		s.away = true
	}
}

// joinEpoch undoes leaveEpoch.
func (s *slot) joinEpoch() {
	if s.away {
		s.parity = s.q.enter()
		s.away = false
	}
}

// advance begins as many pieces of the request as it can, and ends it when there
// are none left.
func (s *slot) advance() {
	if s.advancing {
		return // a piece ended at once; the loop below goes on
	}
	s.advancing = true
	s.joinEpoch()
	for s.next < s.end && s.status == datapath.StatusOK && !s.waits {
		more := false
		switch s.r.Op {
		case datapath.OpRead:
			more = s.advanceRead()
		case datapath.OpWrite:
			more = s.advanceWrite()
		case datapath.OpDiscard, datapath.OpWriteZeroes:
			more = s.advanceZero()
		default:
			more = s.advanceOther()
		}
		if !more {
			break
		}
	}
	s.advancing = false
	if s.place.listed && (s.next >= s.end || s.status != datapath.StatusOK) {
		s.cameToLocks()
	}
	if s.pieces > 0 || s.waits {
		s.leaveEpoch()
		return
	}
	switch s.r.Op {
	case datapath.OpFlush:
		s.flush()
		return
	case datapath.OpExtents:
		if s.status == datapath.StatusOK {
			s.status = s.extents()
		}
	case datapath.OpRead:
		s.r.Zero = s.zero && s.status == datapath.StatusOK && s.r.Length > 0
	case datapath.OpWrite, datapath.OpDiscard, datapath.OpWriteZeroes:
		if s.status == datapath.StatusOK && (s.commit || s.r.Flags&datapath.FlagFUA != 0) && s.unsettled() {
			s.commit = false
			s.waits = true
			s.r.Mark(datapath.StageCommit, s.q.r)
			s.q.p.askFlush(s)
			return
		}
	default:
		s.status = datapath.StatusNotSupported
	}
	s.finish()
}

// unsettled reports whether a change that has completed is not yet durable.
func (s *slot) unsettled() bool { return s.q.p.changes.Load() != s.q.p.settled.Load() }

// finish ends the request.
func (s *slot) finish() {
	q, r := s.q, s.r
	q.active[s.parity].Add(-1)
	if r.Modifies() {
		if q.modifying--; q.modifying == 0 && q.drained != nil {
			f := q.drained
			q.drained = nil
			f()
		}
	}
	if q.submitting {
		q.completions.Add(r, s.status)
		return
	}
	r.Complete(s.status)
}

// wake implements waiter: what the request waited for is durable.
func (s *slot) wake(err error) {
	s.err = err
	s.q.r.Post(s)
}

// RunTask implements [reactor.Task].
func (s *slot) RunTask(*reactor.Reactor) {
	s.waits = false
	if s.err != nil {
		s.status = datapath.StatusIO
	}
	s.finish()
}

// fail notes what went wrong with a piece; the first failure is the request's.
func (s *slot) fail(status datapath.Status) {
	if s.status == datapath.StatusOK {
		s.status = status
	}
}

// takePiece gives a piece to s: its own if that is free, else a common one. nil:
// there is none, and s goes on when one is free.
func (q *queue) takePiece(s *slot) *piece {
	c := &q.pieces[s.r.Tag]
	if c.s != nil {
		n := len(q.free) - 1
		if n < 0 {
			if s.pieces == 0 {
				panic("pool: a request without pieces has lost its own")
			}
			return nil // one of its own pieces ends
		}
		c = q.free[n]
		q.free = q.free[:n]
	}
	c.s, c.done, c.tries, c.bounce, c.part, c.loader, c.err = s, 0, 0, nil, nil, nil, nil
	c.locked, c.spaced, c.region, c.inPlace = false, 0, nil, false
	s.pieces++
	return c
}

// end ends a piece.
func (c *piece) end(status datapath.Status) {
	q, s := c.q, c.s
	if status != datapath.StatusOK {
		s.fail(status)
	}
	c.unlock()
	if c.bounce != nil {
		c.giveBounce()
	}
	c.s = nil
	if !c.own {
		q.free = append(q.free, c)
	}
	s.pieces--
	s.advance()
}

// lower gives the piece's request to the disk that holds a cluster, at offset
// bytes from its start. step is called when it has ended.
func (c *piece) submit(op datapath.Op, flags datapath.Flags, d *disk, offset uint64, b []byte, step func(*piece)) {
	c.step = step
	if d == nil {
		c.req.Status = datapath.StatusIO
		c.later(step)
		return
	}
	c.req.Op, c.req.Flags, c.req.Offset, c.req.Length, c.req.Buf = op, flags, offset, uint64(len(b)), b
	c.q.lower[d.index].Submit(&c.req)
}

// toDisk and fromDisk stand around the requests that carry data, at least one of
// which makes the stage that of the device; next is the stage after the last.
func (c *piece) toDisk() {
	if s := c.s; s.r.Timing != nil {
		if s.atDisk++; s.atDisk == 1 {
			s.r.Mark(datapath.StageDevice, c.q.r)
		}
	}
}

func (c *piece) fromDisk(next datapath.Stage) {
	if s := c.s; s.r.Timing != nil {
		if s.atDisk--; s.atDisk == 0 {
			s.r.Mark(next, c.q.r)
		}
	}
}

// later calls then from another turn.
func (c *piece) later(then func(*piece)) {
	c.then = then
	if !c.q.r.TryPost(c) {
		go c.q.r.Post(c) // its mailbox is full; waits until it is not
	}
}

// wake implements waiter.
func (c *piece) wake(err error) {
	c.err = err
	c.q.r.Post(c)
}

// RunTask implements [reactor.Task].
func (c *piece) RunTask(*reactor.Reactor) {
	c.unrest()
	c.then(c)
}

// takeBounce gets memory for a part of a block; false: then is called when there
// is some.
func (c *piece) takeBounce(then func(*piece)) bool {
	from := c.bounces()
	if n := len(from.free) - 1; n >= 0 {
		c.bounce = from.free[n]
		from.free = from.free[:n]
		return true
	}
	c.then = then
	from.waiting = append(from.waiting, c)
	c.rest()
	return false
}

// bounces is memory for parts of blocks, and who waits for some.
type bounces struct {
	free    [][]byte
	waiting []*piece
}

// bounces is where the piece's memory comes from. A read may have to wait for blocks
// that a change has, and a change that has them for memory: so they share none.
func (c *piece) bounces() *bounces {
	if c.s.r.Op == datapath.OpRead {
		return &c.q.reads
	}
	return &c.q.patches
}

func (c *piece) giveBounce() {
	to, b := c.bounces(), c.bounce
	c.bounce = nil
	if len(to.waiting) > 0 {
		next := takeFirst(&to.waiting)
		next.bounce = b
		next.later(next.then)
		return
	}
	to.free = append(to.free, b)
}

func takeFirst[T any](list *[]*T) *T {
	l := *list
	first := l[0]
	copy(l, l[1:])
	l[len(l)-1] = nil
	*list = l[:len(l)-1]
	return first
}

// needSums makes sure that the checksums of the piece's region index are in
// memory; false: then is called when they are, with c.err set when they cannot be
// had.
func (c *piece) needSums(index uint32, then func(*piece)) bool {
	g, z := c.q.p.regionAt(index)
	if g.page.Load() != nil {
		g.touch()
		return true
	}
	c.err = nil
	if g.state.Load()&regionUntrusted != 0 {
		c.then = then
		c.q.p.askRebuild(index, c)
		return false
	}
	q := c.q
	if q.p.installFresh(g, z, index) {
		return true
	}
	c.wanted, c.after, c.also = index, then, nil
	for _, other := range q.loading {
		if other.wanted == index {
			c.also, other.also = other.also, c
			return false
		}
	}
	if c.s.r.Op == datapath.OpRead {
		q.waitsIn(index, false) // a change says so where it enters the region
	}
	n := len(q.loaders) - 1
	if n < 0 {
		q.waitLoader = append(q.waitLoader, c)
		return false
	}
	c.loader = q.loaders[n]
	q.loaders = q.loaders[:n]
	q.loading = append(q.loading, c)
	c.version = g.version()
	c.submit(datapath.OpRead, 0, z.disk, q.p.sumsOffset(z, index), c.loader, (*piece).sumsRead)
	return false
}

func (c *piece) sumsRead() {
	q := c.q
	g, z := q.p.regionAt(c.wanted)
	if c.req.Status == datapath.StatusOK {
		q.p.installSums(g, z, c.wanted, c.loader, c.version)
	}
	q.loaders = append(q.loaders, c.loader)
	c.loader = nil
	i := slices.Index(q.loading, c)
	q.loading = slices.Delete(q.loading, i, i+1)
	q.lendLoader()
	failed := c.req.Status != datapath.StatusOK
	for c != nil {
		next := c.also
		c.also = nil
		if failed {
			waits := c
			waits.then = waits.after
			go func() { waits.wake(q.p.loadSums(waits.wanted)) }() // one copy may still be read; ends with the piece
		} else {
			c.after(c)
		}
		c = next
	}
}

// retrySums goes on with a piece that waited for a loader.
func (c *piece) retrySums() {
	have := c.needSums(c.wanted, c.after)
	c.q.lendLoader() // it may not have needed one
	if have {
		c.after(c)
	}
}

// lendLoader has the next piece that waits for a loader try again, if there is one
// of each.
func (q *queue) lendLoader() {
	if len(q.loaders) > 0 && len(q.waitLoader) > 0 {
		takeFirst(&q.waitLoader).later((*piece).retrySums)
	}
}

// pause stops changes of the queue; ack is called when none is under way. Reactor.
func (q *queue) pause(ack func()) {
	q.paused = true
	if q.modifying == 0 {
		ack()
		return
	}
	q.drained = ack
}

// nextTurn is the message a queue sends itself.
type nextTurn struct{ q *queue }

// RunTask implements [reactor.Task].
func (n *nextTurn) RunTask(*reactor.Reactor) {
	q := n.q
	list := q.continuing
	q.continuing = q.continued[:0]
	for i, s := range list {
		list[i] = nil
		s.waits = false
		s.advance()
	}
	q.continued = list[:0]
}

// goOnLater makes s go on in another turn, so that long work lets others run.
func (s *slot) goOnLater() {
	q := s.q
	s.waits = true
	q.continuing = append(q.continuing, s)
	if len(q.continuing) == 1 && !q.r.TryPost(&q.nextTurn) {
		go q.r.Post(&q.nextTurn) // its mailbox is full; waits until it is not
	}
}
