package pool

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// scrubState is the scrub that runs, if any.
type scrubState struct {
	sync.Mutex
	job  *job
	stop chan struct{}
}

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
	s.job = p.jobs.begin(p, JobScrub, p.name, p.Info().Allocated)
	s.stop = make(chan struct{})
	j, stop := s.job, s.stop
	if !p.jobs.start(func() { j.end(p.runScrub(j, stop, rate)) }) { // ends with stop, or jobs.stop
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

// errScrubStopped is how a scrub ends that was stopped.
var errScrubStopped = errors.New("stopped; the next scrub goes on here")

func (p *Pool) runScrub(j *job, stop chan struct{}, rate uint64) error {
	p.checkpointMu.Lock()
	layer, cluster := uint32(p.super.scrubLayer), uint32(p.super.scrubCluster)
	p.checkpointMu.Unlock()
	began := time.Now()
	var bytes uint64
	keep := func(layer, cluster uint32) error {
		p.checkpointMu.Lock()
		defer p.checkpointMu.Unlock()
		return p.writeSuper(func(s *superblock) { s.scrubLayer, s.scrubCluster = uint64(layer), uint64(cluster) })
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
			return keep(0, 0)
		}
		id := slices.Min(ids)
		l := p.layers[id]
		p.mu.Unlock()
		if id != layer {
			layer, cluster = id, 0
		}
		var failed error
		l.each(cluster, func(v uint32, e entry) bool {
			select {
			case <-stop:
				failed = errScrubStopped
			default:
				if p.jobs.stopped.Load() {
					failed = errScrubStopped
				} else if err := p.failed(); err != nil {
					failed = err
				}
			}
			if failed != nil {
				cluster = v
				return false
			}
			p.scrubCluster(l, v, j)
			bytes += clusterSize
			j.done.Add(clusterSize)
			if ahead := time.Duration(float64(bytes)/float64(rate)*1e9) - time.Since(began); ahead > 0 {
				select {
				case <-stop:
				case <-time.After(min(ahead, time.Second)):
				}
			}
			return true
		})
		if failed != nil {
			if errors.Is(failed, errScrubStopped) {
				if err := keep(layer, cluster); err != nil {
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
