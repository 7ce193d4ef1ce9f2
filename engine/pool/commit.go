package pool

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"
)

// commitWork is what the committer has been asked for.
type commitWork struct {
	flushes []waiter     // make everything completed durable
	spaces  []waiter     // and give back what was freed
	regions []regionWait // make a region dirty
	txns    []*txn
	streams []streamRegion
	ahead   []regionAhead // made by lookAhead
	cleans  []uint32      // regions that have become clean
	unused  []uint32      // regions that were made dirty ahead, for nothing
	commit  bool          // like a flush that nobody waits for
}

// reset empties w and keeps its memory.
func (w *commitWork) reset() {
	clear(w.flushes)
	clear(w.spaces)
	clear(w.regions)
	clear(w.txns)
	*w = commitWork{flushes: w.flushes[:0], spaces: w.spaces[:0], regions: w.regions[:0], txns: w.txns[:0],
		streams: w.streams[:0], ahead: w.ahead[:0], cleans: w.cleans[:0], unused: w.unused[:0]}
}

type regionWait struct {
	index uint32
	w     waiter
}

// regionAhead is a region that becomes dirty though nobody waits for it: without data,
// together with one before it, or for a stream.
type regionAhead struct {
	index  uint32
	before regionState // what it is again if nobody writes to it
	next   bool        // see regionNext
}

// streamRegion is a region that a stream comes to: it is made dirty if it has data, is
// clean, and its checksums are in memory.
type streamRegion struct {
	index uint32
	next  bool // see regionNext
}

// txn changes several things at once. The committer runs apply, with applyMu
// held, at a point where no map is being captured; the records it returns are in
// one group, and done hears when that is durable.
type txn struct {
	apply func(b []byte) []byte
	done  chan error
}

// commitTxn runs a transaction and waits until it is durable.
func (p *Pool) commitTxn(apply func(b []byte) []byte) error {
	if err := p.writable(); err != nil {
		return err
	}
	t := &txn{apply: apply, done: make(chan error, 1)}
	p.request.Lock()
	if p.request.ended {
		p.request.Unlock()
		return fmt.Errorf("pool %s: %w", p.name, ErrStopped)
	}
	p.request.txns = append(p.request.txns, t)
	p.request.Unlock()
	p.kickCommitter()
	select {
	case err := <-t.done:
		return err
	case <-p.stopping:
		select {
		case err := <-t.done:
			return err
		case <-time.After(10 * time.Second): // the committer finishes what it has before it ends
			return fmt.Errorf("pool %s: %w", p.name, ErrStopped)
		}
	}
}

func (p *Pool) kickCommitter() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// flushWaiter is a waiter for a goroutine.
type flushWaiter chan error

func (w flushWaiter) wake(err error) { w <- err }

// commitAll makes everything that has completed durable and waits for it.
func (p *Pool) commitAll() error {
	w := make(flushWaiter, 1)
	p.askFlush(w)
	return <-w
}

// ask has add put a request of w's where the committer finds it; w wakes with an error
// when that has ended. Any thread.
func (p *Pool) ask(w waiter, add func()) {
	p.request.Lock()
	if p.request.ended {
		p.request.Unlock()
		w.wake(fmt.Errorf("pool %s: %w", p.name, ErrStopped))
		return
	}
	add()
	p.request.Unlock()
	p.kickCommitter()
}

// askFlush wakes w when everything completed so far is durable. Any thread.
func (p *Pool) askFlush(w waiter) {
	p.ask(w, func() { p.request.flushes = append(p.request.flushes, w) })
}

// askSpace wakes w when what was freed so far may be used again. Any thread.
func (p *Pool) askSpace(w waiter) {
	p.ask(w, func() { p.request.spaces = append(p.request.spaces, w) })
}

// askDirty wakes w when a region is dirty. Any thread.
func (p *Pool) askDirty(index uint32, w waiter) {
	p.ask(w, func() { p.request.regions = append(p.request.regions, regionWait{index, w}) })
}

// runCommitter is the one goroutine that writes the journal. It ends with
// stopping, after what was asked for until then.
func (p *Pool) runCommitter() {
	defer p.stopped.Done()
	var work commitWork
	for {
		stop := false
		var again <-chan time.Time
		if len(p.awaiting) > 0 {
			again = time.After(time.Millisecond)
		}
		select {
		case <-p.kick:
		case <-again:
		case <-p.stopping:
			stop = true
		}
		p.request.Lock()
		work, p.request.commitWork = p.request.commitWork, work
		p.request.ended = stop
		p.request.Unlock()
		p.commit(&work)
		work.reset()
		p.serveSpace(stop)
		if stop {
			return
		}
	}
}

// spaceWait is a piece that waits until what was freed may be used again.
type spaceWait struct {
	w     waiter
	until time.Time
}

// spaceWaitMax bounds the wait for requests under way, which mostly end in
// milliseconds.
const spaceWaitMax = 2 * time.Second

// errBusy is what a wait for space ends with when requests that may still touch what
// was freed do not end.
var errBusy = errors.New("requests under way do not end")

// serveSpace wakes those who wait for space when all that was freed is there, or it
// does not come. It does not wait itself: the requests it would wait for may need
// the committer. Committer.
func (p *Pool) serveSpace(now bool) {
	if len(p.awaiting) == 0 {
		return
	}
	left := p.reclaim()
	if !left || now || p.failed() != nil {
		for _, x := range p.awaiting {
			x.w.wake(nil)
		}
		p.awaiting = p.awaiting[:0]
		return
	}
	p.awaiting = slices.DeleteFunc(p.awaiting, func(x spaceWait) bool {
		if time.Now().Before(x.until) {
			return false
		}
		x.w.wake(errBusy)
		return true
	})
}

// commit does what was asked for.
//
// Where only regions have to become dirty, their records are written and nothing
// else: no data is waited for. Otherwise: transactions change memory, the changed
// entries are captured, all disks are flushed (each entry captured had its data
// completed before, so now that is durable), and the records follow.
func (p *Pool) commit(w *commitWork) {
	full := w.commit || len(w.flushes)+len(w.spaces)+len(w.txns) > 0
	err := p.failed()
	if p.config.ReadOnly && err == nil {
		err = p.writable()
	}
	if err == nil && len(w.regions)+len(w.streams)+len(w.cleans)+len(w.unused) > 0 && !full {
		err = p.commitRegions(w)
	} else if err == nil && full {
		err = p.commitMaps(w)
	}
	for _, x := range w.regions {
		x.w.wake(err)
	}
	for _, t := range w.txns {
		t.done <- err
	}
	for _, x := range w.flushes {
		x.wake(err)
	}
	for _, x := range w.spaces {
		if err != nil {
			x.wake(err)
			continue
		}
		p.awaiting = append(p.awaiting, spaceWait{x, time.Now().Add(spaceWaitMax)})
	}
	if p.journal.used() > p.journal.capacity()/2 {
		p.wakeKeeper()
	}
}

// regionRecords appends the records that make regions dirty or clean. sumsMu is held.
func (p *Pool) regionRecords(b []byte, w *commitWork) []byte {
	record := func(index uint32, to regionState) {
		_, z := p.regionAt(index)
		state := &z.states[index%uint32(len(z.regions))]
		if regionState(state.Load()) != to {
			state.Store(uint32(to))
			z.stale.Store(true)
			b = appendRecord(b, recordRegion, index, uint32(to))
		}
	}
	for _, index := range w.cleans {
		if g, _ := p.regionAt(index); g.state.Load()&regionIsDirty == 0 {
			record(index, regionClean)
		}
	}
	for _, index := range w.unused {
		if g, _ := p.regionAt(index); g.state.Load()&regionIsDirty == 0 {
			record(index, regionFresh)
		}
	}
	for _, x := range w.regions {
		record(x.index, regionDirty)
	}
	for _, x := range w.ahead {
		record(x.index, regionDirty)
	}
	return b
}

// regionsAhead is how many regions without data become dirty with one before them:
// clusters are allocated from one to the next, and their writes would each wait for
// a record of the journal. It is 28 MiB. After a crash there is nothing in them whose
// checksums would have to be computed.
const regionsAhead = 7

// lookAhead finds the regions that are to become dirty as well: fresh ones behind a
// fresh one, ones whose clusters are all free again, and those that streams come to. sumsMu
// is held.
func (p *Pool) lookAhead(w *commitWork) {
	w.ahead = w.ahead[:0]
	add := func(index uint32, before regionState, next bool) {
		same := func(x regionAhead) bool { return x.index == index }
		asked := func(x regionWait) bool { return x.index == index }
		if !slices.ContainsFunc(w.ahead, same) && !slices.ContainsFunc(w.regions, asked) {
			w.ahead = append(w.ahead, regionAhead{index, before, next})
		}
	}
	for _, x := range w.regions {
		_, z := p.regionAt(x.index)
		per := uint32(len(z.regions))
		at := x.index % per
		fresh := regionState(z.states[at].Load()) == regionFresh
		for i := at + 1; i <= at+regionsAhead && i < z.count/regionClusters; i++ {
			index, g := z.index*per+i, &z.regions[i]
			switch regionState(z.states[i].Load()) {
			case regionFresh:
				if fresh && p.installFresh(g, z, index) {
					add(index, regionFresh, false)
				}
			case regionClean:
				fresh = false
				if z.disk != nil && g.state.Load()&(regionUntrusted|regionIsDirty) == 0 &&
					p.alloc.empty(z.index, i*regionClusters, regionClusters) {
					p.installEmpty(g)
					add(index, regionClean, false)
				}
			default:
				fresh = false
			}
		}
	}
	for _, x := range w.streams {
		g, z := p.regionAt(x.index)
		if regionState(z.states[x.index%uint32(len(z.regions))].Load()) == regionClean && z.disk != nil && g.page.Load() != nil &&
			g.state.Load()&(regionUntrusted|regionIsDirty) == 0 {
			add(x.index, regionClean, x.next)
		}
	}
}

// lockRegions takes sumsMu with the pages of the regions that shall become dirty
// in memory. Whoever waits for one that cannot be had hears of it here.
func (p *Pool) lockRegions(w *commitWork) {
	for {
		p.sumsMu.Lock()
		p.lookAhead(w)
		missing, found := uint32(0), false
		for _, x := range w.regions {
			if g, _ := p.regionAt(x.index); g.page.Load() == nil || g.state.Load()&regionUntrusted != 0 {
				missing, found = x.index, true
				break
			}
		}
		if !found {
			return
		}
		p.sumsMu.Unlock()
		if err := p.loadSums(missing); err != nil {
			w.regions = slices.DeleteFunc(w.regions, func(x regionWait) bool {
				if x.index != missing {
					return false
				}
				x.w.wake(err)
				return true
			})
		}
	}
}

// markDirty lets writes into the regions whose records are durable. sumsMu is held.
func (p *Pool) markDirty(w *commitWork) {
	for _, x := range w.regions {
		g, _ := p.regionAt(x.index)
		g.state.Or(regionIsDirty | regionUsed)
		if d := p.dirty[x.index]; d == nil {
			p.dirty[x.index] = &dirtyRegion{}
		} else {
			d.ahead = false // somebody has a use for it
		}
	}
	for _, x := range w.ahead {
		g, _ := p.regionAt(x.index)
		bits := uint64(regionIsDirty | regionUsed)
		if x.next {
			bits |= regionNext
		}
		// A write that found it clean just now is not under way, but counts until it has
		// seen that, and will ask; the version is not that of an untouched region then.
		old := g.state.Or(bits)
		p.dirty[x.index] = &dirtyRegion{ahead: old&regionWriters == 0, before: x.before, version: old / regionVersion}
	}
	if len(w.regions)+len(w.ahead) > 0 {
		p.wakeKeeper()
	}
}

func (p *Pool) commitRegions(w *commitWork) error {
	if err := p.journal.room(p, 64<<10); err != nil {
		return err
	}
	p.lockRegions(w)
	defer p.sumsMu.Unlock()
	records := p.regionRecords(p.journal.records[:0], w)
	p.journal.records = records
	if len(records) > 0 {
		p.applyMu.Lock()
		err := p.journal.append(p, [][]byte{records}, p.settled.Load())
		p.applyMu.Unlock()
		if err != nil {
			p.fail(err)
			return err
		}
	}
	p.markDirty(w)
	return nil
}

// commitMaps captures and writes in rounds, each small enough for the journal.
func (p *Pool) commitMaps(w *commitWork) error {
	p.freed.Lock()
	freed := p.freed.clusters
	p.freed.clusters = nil
	p.freed.Unlock()

	var pages, held *mapPage // captured from the stack, not yet from themselves; held are those of new heads
	var freezes []freeze
	var through uint64
	for first := true; first || pages != nil; first = false {
		if err := p.journal.room(p, p.journal.capacity()/3); err != nil {
			return err
		}
		if first {
			p.lockRegions(w)
		}
		err := func() error {
			if first {
				defer p.sumsMu.Unlock()
			}
			p.applyMu.Lock()
			defer p.applyMu.Unlock()
			var chunks [][]byte
			p.captureMu.Lock()
			if first {
				freezes, p.freezes = p.freezes, nil
				if b := p.regionRecords(nil, w); len(b) > 0 {
					chunks = append(chunks, b)
				}
				for _, t := range w.txns {
					if b := t.apply(nil); len(b) > 0 {
						chunks = append(chunks, b)
					}
				}
				through = p.changes.Load()
				pages = p.changed.Swap(nil)
				if len(freezes) > 0 {
					pages, held = splitHeads(pages, freezes)
				}
			}
			size := 0
			for pages != nil && size < int(p.journal.capacity()/8) {
				page := pages
				pages = page.next
				page.next = nil
				b := p.capture(page)
				size += len(b)
				if len(b) > 0 {
					chunks = append(chunks, b)
				}
			}
			if pages == nil {
				for _, f := range freezes {
					chunks = append(chunks, f.records(nil))
				}
				freezes = nil
				pages, held = held, nil
			}
			p.captureMu.Unlock()
			pending := p.settled.Load()
			if pages == nil {
				pending = through
			}
			if err := flushAll(p.disks); err != nil {
				return err
			}
			if len(chunks) > 0 {
				if err := p.journal.append(p, chunks, pending); err != nil {
					return err
				}
			}
			if first {
				p.markDirty(w)
			}
			return nil
		}()
		if err != nil {
			p.fail(err)
			return err
		}
	}
	p.settled.Store(through)
	if len(freed) > 0 {
		p.grace.Lock()
		p.grace.waiting = append(p.grace.waiting, graceBatch{p.epoch.Load(), freed})
		p.grace.Unlock()
		p.reclaim()
	}
	return nil
}

// freeze puts heads onto layers that are not written any more. records makes the
// records of that, in one chunk; it runs where a transaction does.
type freeze struct {
	heads   []*layer
	records func([]byte) []byte
}

// splitHeads takes the pages of the heads of freezes out of a list.
func splitHeads(pages *mapPage, freezes []freeze) (rest, heads *mapPage) {
	for pages != nil {
		page := pages
		pages = page.next
		to := &rest
		if slices.ContainsFunc(freezes, func(f freeze) bool { return slices.Contains(f.heads, page.layer) }) {
			to = &heads
		}
		page.next, *to = *to, page
	}
	return rest, heads
}

// capture makes records of the entries of a page that the journal does not have.
// applyMu is held for writing.
func (p *Pool) capture(page *mapPage) []byte {
	page.queued.Store(false) // a change from here on queues it again
	var b []byte
	for i := range page.dirty {
		for word := page.dirty[i].Swap(0); word != 0; word &= word - 1 {
			j := uint32(i*64 + bits.TrailingZeros64(word))
			if b == nil {
				b = make([]byte, 0, 1024)
			}
			b = appendMapRecord(b, page.layer.id, page.index*mapEntries+j, entry(page.entries[j].Load()))
		}
	}
	if len(b) > 0 {
		p.markStale(page)
	}
	return b
}

// markStale notes that a page has to be written by the next checkpoint. applyMu is
// held for writing.
func (p *Pool) markStale(page *mapPage) {
	if !page.stale {
		page.stale = true
		p.stale = append(p.stale, page)
	}
}
