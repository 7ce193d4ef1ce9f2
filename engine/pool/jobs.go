package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const jobsKept = 100 // that have ended

var errClosing = errors.New("the pool is closing")

// jobList is the long work of a pool.
type jobList struct {
	mu      sync.Mutex
	next    uint64 // guarded by mu
	all     []*job // guarded by mu; by id
	running sync.WaitGroup
	stopped atomic.Bool // set with mu
}

// job is one piece of long work.
type job struct {
	list  *jobList
	done  atomic.Uint64 // bytes
	found atomic.Uint64
	ended chan struct{}

	info Job // guarded by list.mu, but for Done and Found
}

func (l *jobList) begin(p *Pool, kind JobKind, target string, total uint64) *job {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	j := &job{list: l, ended: make(chan struct{}), info: Job{ID: l.next, Kind: kind, Pool: p.name, Target: target, Total: total, Started: time.Now()}}
	l.all = append(l.all, j)
	over := -jobsKept
	for _, x := range l.all {
		if !x.info.Ended.IsZero() {
			over++
		}
	}
	l.all = slices.DeleteFunc(l.all, func(x *job) bool {
		if over > 0 && !x.info.Ended.IsZero() {
			over--
			return true
		}
		return false
	})
	return j
}

// end ends a job once; later calls do nothing.
func (j *job) end(err error) {
	if j == nil {
		return
	}
	j.list.mu.Lock()
	defer j.list.mu.Unlock()
	if !j.info.Ended.IsZero() {
		return
	}
	j.info.Ended = time.Now()
	switch {
	case errors.Is(err, errScrubStopped):
		j.info.Stopped = true
	case err != nil:
		j.info.Err = err.Error()
	default:
		j.done.Store(j.info.Total)
		j.info.Note = ""
	}
	close(j.ended)
}

func (j *job) note(text string) {
	j.list.mu.Lock()
	j.info.Note = text
	j.list.mu.Unlock()
}

func (j *job) snapshot() Job {
	j.list.mu.Lock()
	defer j.list.mu.Unlock()
	i := j.info
	i.Done, i.Found = min(j.done.Load(), i.Total), j.found.Load()
	return i
}

// start runs f on a goroutine of its own, which wait waits for; false: jobs have been
// told to end, and f is not run.
func (l *jobList) start(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped.Load() {
		return false
	}
	l.running.Go(f)
	return true
}

// stop tells running jobs to end, and lets none begin; wait waits until they have.
func (l *jobList) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped.Store(true)
}

func (l *jobList) wait() { l.running.Wait() }

// endAll ends what is left, so that nobody waits for it.
func (l *jobList) endAll(err error) {
	l.mu.Lock()
	all := slices.Clone(l.all)
	l.mu.Unlock()
	for _, j := range all {
		j.end(err)
	}
}

// Jobs lists the work under way and the last hundred that ended, by id.
func (p *Pool) Jobs() []Job {
	p.jobs.mu.Lock()
	all := slices.Clone(p.jobs.all)
	p.jobs.mu.Unlock()
	infos := make([]Job, 0, len(all))
	for _, j := range all {
		infos = append(infos, j.snapshot())
	}
	return infos
}

// WaitJob waits for the end of a job and returns it.
func (p *Pool) WaitJob(ctx context.Context, id uint64) (Job, error) {
	p.jobs.mu.Lock()
	i := slices.IndexFunc(p.jobs.all, func(j *job) bool { return j.info.ID == id })
	if i < 0 {
		p.jobs.mu.Unlock()
		return Job{}, fmt.Errorf("job %d: %w", id, ErrNotFound)
	}
	j := p.jobs.all[i]
	p.jobs.mu.Unlock()
	select {
	case <-j.ended:
		return j.snapshot(), nil
	case <-ctx.Done():
		return j.snapshot(), ctx.Err()
	}
}
