package pool

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// scrubKeepEvery is how often the place of a scrub is written down: what is lost with
// the process or the power is as much work at most.
const scrubKeepEvery = time.Minute

// scrubState is the scrub that runs, if any.
type scrubState struct {
	keepEvery time.Duration // immutable once a scrub runs

	sync.Mutex
	job  *job
	stop chan struct{}
}

// scrubPlace is where a scrub is: the next cluster it looks at.
type scrubPlace struct{ layer, cluster uint32 }

// Scrub starts reading everything and verifying it, from where the last one was
// stopped. rate is in bytes a second, 0 for the pool's. One runs at a time
// (ErrInUse). What it finds is reported as an event each, and counted.
func (p *Pool) Scrub(rate uint64) (Job, error) {
	if err := p.writable(); err != nil {
		return Job{}, err
	}
	if rate == 0 {
		rate = p.config.ScrubRate
	}
	s := &p.scrub
	s.Lock()
	defer s.Unlock()
	if s.job != nil && s.job.snapshot().Ended.IsZero() {
		return s.job.snapshot(), fmt.Errorf("pool %s: a scrub is running: %w", p.name, ErrInUse)
	}
	p.checkpointMu.Lock()
	place := scrubPlace{uint32(p.super.scrubLayer), uint32(p.super.scrubCluster)}
	p.checkpointMu.Unlock()
	before, total := p.scrubSizes(place)
	s.job = p.jobs.begin(p, JobScrub, p.name, total)
	s.job.done.Store(before)
	s.stop = make(chan struct{})
	j, stop := s.job, s.stop
	if !p.jobs.start(func() { j.end(p.runScrub(j, stop, rate, place)) }) { // ends with stop, or jobs.stop
		j.end(errClosing)
		return j.snapshot(), fmt.Errorf("pool %s: %w: %w", p.name, errClosing, ErrStopped)
	}
	return j.snapshot(), nil
}

// StopScrub stops it; its place is kept.
func (p *Pool) StopScrub() error {
	s := &p.scrub
	s.Lock()
	defer s.Unlock()
	if s.job == nil || !s.job.snapshot().Ended.IsZero() {
		return fmt.Errorf("pool %s: no scrub is running: %w", p.name, ErrNotFound)
	}
	close(s.stop)
	s.stop = make(chan struct{})
	return nil
}

// errScrubStopped is how a scrub ends that was stopped; its job did not fail.
var errScrubStopped = errors.New("stopped; the next scrub goes on here")

// scrubSizes is how much a scrub reads in all, and how much of it lies before a place,
// in bytes of clusters as they are owned now.
func (p *Pool) scrubSizes(place scrubPlace) (before, total uint64) {
	p.mu.Lock()
	for id, l := range p.layers {
		n := uint64(max(l.owned.Load(), 0)) << clusterShift
		total += n
		if id < place.layer {
			before += n
		}
	}
	l := p.layers[place.layer]
	p.mu.Unlock()
	if l != nil {
		l.each(0, func(v uint32, e entry) bool {
			if v < place.cluster && e.cluster() != noCluster {
				before += clusterSize
			}
			return v < place.cluster
		})
	}
	return min(before, total), total
}

// keepScrub writes the place of the scrub down.
func (p *Pool) keepScrub(place scrubPlace) error {
	p.checkpointMu.Lock()
	defer p.checkpointMu.Unlock()
	if err := p.failed(); err != nil {
		return err
	}
	return p.writeSuper(func(s *superblock) {
		s.scrubLayer, s.scrubCluster = uint64(place.layer), uint64(place.cluster)
	})
}

func (p *Pool) runScrub(j *job, stop chan struct{}, rate uint64, place scrubPlace) error {
	layer, cluster := place.layer, place.cluster
	began := time.Now()
	kept := began
	var bytes uint64
	check := func() error {
		select {
		case <-stop:
			return errScrubStopped
		default:
		}
		if p.jobs.stopped.Load() {
			return errScrubStopped
		}
		return p.failed()
	}
	pace := func(n uint64) error {
		bytes += n
		if ahead := time.Duration(float64(bytes)/float64(rate)*1e9) - time.Since(began); ahead > 0 {
			select {
			case <-stop:
			case <-time.After(min(ahead, time.Second)):
			}
		}
		return check()
	}
	for {
		p.mu.Lock()
		ids := make([]uint32, 0, len(p.layers))
		for id := range p.layers {
			if id >= layer {
				ids = append(ids, id)
			}
		}
		if len(ids) == 0 {
			p.mu.Unlock()
			err := p.scrubMetadata(j, pace)
			if errors.Is(err, errScrubStopped) {
				if err := p.keepScrub(scrubPlace{layer, 0}); err != nil {
					return err
				}
			}
			if err != nil {
				return err
			}
			return p.keepScrub(scrubPlace{})
		}
		id := slices.Min(ids)
		l := p.layers[id]
		p.mu.Unlock()
		if id != layer {
			layer, cluster = id, 0
		}
		var failed error
		l.each(cluster, func(v uint32, e entry) bool {
			failed = check()
			if failed == nil && time.Since(kept) >= p.scrub.keepEvery {
				kept = time.Now()
				failed = p.keepScrub(scrubPlace{layer, v})
			}
			if failed != nil {
				cluster = v
				return false
			}
			if e.cluster() == noCluster {
				return true
			}
			p.scrubCluster(l, v, j)
			j.done.Add(clusterSize)
			_ = pace(clusterSize) // check says it again
			return true
		})
		if failed != nil {
			if errors.Is(failed, errScrubStopped) {
				if err := p.keepScrub(scrubPlace{layer, cluster}); err != nil {
					return err
				}
			}
			return failed
		}
		layer, cluster = id+1, 0
	}
}

// scrubCluster verifies the blocks of one cluster. A block that differs is looked
// at again, since it may have been written meanwhile.
func (p *Pool) scrubCluster(l *layer, v uint32, j *job) {
	buffer := alignedBytes(clusterSize)
	bad := uint32(0)
	for try := range 5 {
		e := l.lookup(v)
		c, mask := e.cluster(), e.mask()
		if try > 0 {
			mask &= bad
			time.Sleep(time.Duration(try) * 2 * time.Millisecond)
		}
		if c == noCluster || mask == 0 {
			return
		}
		d, offset := p.address(c)
		g, index, first := p.region(c)
		if p.loadSums(index) != nil || d == nil {
			bad = mask
			continue
		}
		page := g.page.Load()
		bad = 0
		whole := d.read(buffer, offset) == nil
		for b := range uint32(clusterBlocks) {
			if mask&(1<<b) == 0 {
				continue
			}
			block := buffer[b*blockSize:][:blockSize]
			if !whole && d.read(block, offset+uint64(b)*blockSize) != nil || page == nil || checksum(block) != page.sums[first+b].Load() {
				bad |= 1 << b
			}
		}
		if l.lookup(v).cluster() != c {
			bad = mask // has moved
		}
		if bad == 0 {
			return
		}
	}
	e := l.lookup(v)
	if bad &= e.mask(); bad == 0 {
		return // given up meanwhile
	}
	d, offset := p.address(e.cluster())
	name := fmt.Sprintf("layer %d", l.id)
	p.mu.Lock()
	if l.vol != nil {
		name = l.vol.name
	} else if l.rec.name != "" {
		name = p.snapshotName(l)
	}
	p.mu.Unlock()
	for b := range uint32(clusterBlocks) {
		if bad&(1<<b) != 0 {
			j.found.Add(1)
			p.corrupt.Add(1)
			p.event(Event{Kind: EventCorrupt, Volume: name, Offset: uint64(v)<<clusterShift + uint64(b)*blockSize, Device: d.path,
				Address: offset + uint64(b)*blockSize, Message: "the scrub found a block that differs from its checksum or cannot be read"})
		}
	}
}
