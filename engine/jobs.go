package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/ashlar-storage/ashlar/engine/pool"
)

// Job is long work in a pool.
type Job struct {
	// ID names it on this node until the engine is closed: "POOL:OPENING:NUMBER",
	// since a pool that is opened anew counts from one again.
	ID string
	pool.Job
}

func (l lease) named(j pool.Job) Job {
	return Job{fmt.Sprintf("%s:%d:%d", l.name, l.opening, j.ID), j}
}

// job runs f, which begins a job, on the pool of a volume.
func (e *Engine) job(ref string, f func(p Pool, volume string) (pool.Job, error)) (Job, error) {
	l, volume, err := e.lookup(ref)
	if err != nil {
		return Job{}, err
	}
	defer l.done()
	j, err := f(l.pool, volume)
	if err != nil {
		return Job{}, err
	}
	return l.named(j), nil
}

// Scrub starts to verify everything a pool holds; "" is the only one.
func (e *Engine) Scrub(poolName string, rate uint64) (Job, error) {
	l, err := e.leasePool(poolName)
	if err != nil {
		return Job{}, err
	}
	defer l.done()
	j, err := l.pool.Scrub(rate)
	if err != nil {
		return Job{}, err
	}
	return l.named(j), nil
}

// StopScrub stops it, and returns it as it is then; its place is kept.
func (e *Engine) StopScrub(poolName string) (Job, error) {
	l, err := e.leasePool(poolName)
	if err != nil {
		return Job{}, err
	}
	defer l.done()
	var before pool.Job
	for _, j := range l.pool.Jobs() {
		if j.Kind == pool.JobScrub && j.Ended.IsZero() {
			before = j
		}
	}
	if err := l.pool.StopScrub(); err != nil {
		return Job{}, err
	}
	for _, j := range l.pool.Jobs() {
		if j.ID == before.ID {
			return l.named(j), nil
		}
	}
	return l.named(before), nil
}

// Jobs lists the work under way, and that just ended, of a pool, or of all open
// pools for "", oldest first.
func (e *Engine) Jobs(poolName string) ([]Job, error) {
	leases := []lease{}
	if poolName == "" {
		leases = e.leaseAll()
	} else {
		l, err := e.leasePool(poolName)
		if err != nil {
			return nil, err
		}
		leases = append(leases, l)
	}
	var list []Job
	for _, l := range leases {
		for _, j := range l.pool.Jobs() {
			list = append(list, l.named(j))
		}
		l.done()
	}
	slices.SortStableFunc(list, func(a, b Job) int { return a.Started.Compare(b.Started) })
	return list, nil
}

// leaseJob takes hold of the pool a job is of.
func (e *Engine) leaseJob(id string) (l lease, number uint64, err error) {
	unknown := fmt.Errorf("job %s: %w", id, pool.ErrNotFound)
	rest, last, ok := cutLast(id, ":")
	name, opening, ok2 := cutLast(rest, ":") // names may hold a colon
	if !ok || !ok2 || name == "" {
		return lease{}, 0, unknown
	}
	if number, err = strconv.ParseUint(last, 10, 64); err != nil {
		return lease{}, 0, unknown
	}
	if l, err = e.leasePool(name); err != nil {
		return lease{}, 0, err
	}
	if strconv.FormatUint(l.opening, 10) != opening {
		l.done()
		return lease{}, 0, fmt.Errorf("%w (its pool was opened anew since)", unknown)
	}
	return l, number, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// Job describes a job now.
func (e *Engine) Job(id string) (Job, error) {
	l, number, err := e.leaseJob(id)
	if err != nil {
		return Job{}, err
	}
	defer l.done()
	for _, j := range l.pool.Jobs() {
		if j.ID == number {
			return l.named(j), nil
		}
	}
	return Job{}, fmt.Errorf("job %s: %w", id, pool.ErrNotFound)
}

// WaitJob waits for the end of a job and returns it.
//
// Errors: that of ctx; a *NotOpenError when the pool is closed first.
func (e *Engine) WaitJob(ctx context.Context, id string) (Job, error) {
	l, number, err := e.leaseJob(id)
	if err != nil {
		return Job{}, err
	}
	defer l.done()
	both, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.life, cancel)()
	j, err := l.pool.WaitJob(both, number)
	if err != nil && l.life.Err() != nil && ctx.Err() == nil {
		return Job{}, &NotOpenError{l.name, errors.New("it is being closed")}
	}
	if err != nil {
		return Job{}, err
	}
	return l.named(j), nil
}
