package pool

// A region whose checksums are not in memory costs a read a second one, and a write to a
// region that is clean waits for a record of the journal. A stream would stop for that in
// every region: so the regions behind the one it is in are made ready meanwhile, a group
// at a time, with one read and one record.

const (
	// streamGroup is how many regions of a zone are made ready together: 31 MiB. More
	// would save little, and be more to compute after a crash.
	streamGroup = 8
	// streamAsks is how many groups may wait to be made ready; streams beyond that stop
	// now and then.
	streamAsks = 64
)

// streams are the regions a queue's requests came to last and had to wait in, or would
// have had to; a request that has to wait in the one behind one of them is taken for part
// of a stream. Owned by the reactor.
type streams struct {
	regions [8]uint32 // number + 1; 0: none
	next    int       // the place that is given up next
}

// comes notes that requests have come to a region, and reports whether it is the first
// time and they came from the region before.
func (t *streams) comes(index uint32) bool {
	for i, r := range t.regions {
		switch {
		case r == index+1:
			return false
		case r == index && r != 0:
			t.regions[i] = index + 1
			return true
		}
	}
	t.regions[t.next] = index + 1
	t.next = (t.next + 1) % len(t.regions)
	return false
}

// streamAsk is a region that is to be made ready, with those of its group behind it: their
// checksums are wanted in memory, and for changes they have to be dirty.
type streamAsk struct {
	index  uint32
	change bool
}

// waitsIn notes that a request has to wait in a region.
func (q *queue) waitsIn(index uint32, change bool) {
	if q.streams.comes(index) {
		q.p.askReady(index+1, change)
	}
}

// comesTo notes that a request has come to a region that was not used lately, or was made
// ready. The first in a group that was has the next group made ready.
func (q *queue) comesTo(g *region, index uint32, change bool) {
	if g.takeNext() {
		q.streams.comes(index)
		q.p.askReady(q.p.groupEnd(index), change)
	}
}

// groupEnd is the first region behind the group of a region.
func (p *Pool) groupEnd(index uint32) uint32 {
	per := p.zoneClusters / regionClusters
	i := index % per
	return index - i + min(i-i%streamGroup+streamGroup, per)
}

// askReady has regions made ready, if there is time. Any thread.
func (p *Pool) askReady(index uint32, change bool) {
	select {
	case p.streamAsks <- streamAsk{index, change}:
	default:
	}
}

// runStreams makes regions ready. It ends with streamsEnd.
func (p *Pool) runStreams() {
	defer p.streamsDone.Done()
	memory := alignedBytes(streamGroup * pairSize)
	for {
		select {
		case <-p.streamsEnd:
			return
		case a := <-p.streamAsks:
			p.makeReady(a, memory)
		}
	}
}

// endStreams ends runStreams. What it has asked the committer for is still done.
func (p *Pool) endStreams() {
	close(p.streamsEnd)
	p.streamsDone.Wait()
}

// makeReady brings the checksums of the regions of a group from one of them on into
// memory, and asks the committer to make those dirty that are clean, for changes. Whoever
// comes to the first that was not ready asks for the next group; where all were ready,
// the stream follows another, or itself.
func (p *Pool) makeReady(a streamAsk, memory []byte) {
	per := p.zoneClusters / regionClusters
	if uint64(a.index) >= uint64(len(*p.zones.Load()))*uint64(per) {
		return
	}
	_, z := p.regionAt(a.index)
	p.sumsMu.Lock()
	count := z.count / regionClusters
	p.sumsMu.Unlock()
	from := a.index % per
	to := min(from+p.groupEnd(a.index)-a.index, count)
	if from >= to || z.disk == nil {
		return
	}
	wanted := func(i uint32) bool {
		return z.regions[i].state.Load()&regionUntrusted == 0 && regionState(z.states[i].Load()) != regionFresh
	}
	var seen [streamGroup]uint64
	absent := func(i uint32) bool { return wanted(i) && z.regions[i].page.Load() == nil }
	first := from
	for first < to && !absent(first) {
		first++
	}
	if first < to {
		for i := first; i < to; i++ {
			seen[i-first] = z.regions[i].version()
		}
		b := memory[:(to-first)*pairSize]
		if z.disk.readPages(b, p.sumsOffset(z, a.index-from+first)) != nil {
			return // whoever comes here finds out, and tells
		}
		for i := first; i < to; i++ {
			index, pair := a.index-from+i, b[(i-first)*pairSize:][:pairSize]
			// A pair that could not be read, or is damaged, is for whoever comes here: it is
			// not known to be lost.
			if _, _, _, ok := newestOfPair(pair, p.id, uint64(index)); ok && absent(i) {
				p.installSums(&z.regions[i], z, index, pair, seen[i-first])
			}
		}
	}
	if !a.change {
		if first < to {
			z.regions[first].state.Or(regionNext)
		}
		return
	}
	var list []streamRegion
	for i := from; i < to; i++ {
		if wanted(i) && z.regions[i].state.Load()&regionIsDirty == 0 {
			list = append(list, streamRegion{a.index - from + i, len(list) == 0})
		}
	}
	if len(list) > 0 {
		p.request.Lock()
		p.request.streams = append(p.request.streams, list...)
		p.request.Unlock()
		p.kickCommitter()
	}
}
