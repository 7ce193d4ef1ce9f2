package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// idleSettle is left to a server after its start before it counts as idle: the
// garbage collector returns memory, adaptive polling backs off.
const idleSettle = 2 * time.Second

// IdleCase is the name of the case RunIdle reports.
const IdleCase = "idle"

// RunIdle measures what peers cost while nothing is asked of them: CPU share and
// resident memory. With the devperf client one connection is held open, else
// none. The config's profile is not used.
func RunIdle(ctx context.Context, c Config) (*Result, error) {
	if c.Runtime <= 0 || c.Runtime > RuntimeMax {
		return nil, fmt.Errorf("bench: idle for %v: want above 0 and at most %v", c.Runtime, RuntimeMax)
	}
	if c.Baseline == "" && len(c.Peers) > 0 {
		c.Baseline = c.Peers[0].Name()
	}
	if c.Profile == nil {
		c.Profile = &Profile{Name: IdleCase}
	}
	r := c.result()
	show := newProgress(c.Progress, c.Terminal)
	defer show.Stop()
	runs := c.Rounds * len(c.Peers)
	show.Begin(runs, time.Duration(runs)*(c.Runtime+idleSettle))
	for round := range c.Rounds {
		for order := range c.Peers {
			peer := (round + order) % len(c.Peers)
			show.Step(fmt.Sprintf("idle  round %d/%d  %s", round+1, c.Rounds, c.Peers[peer].Name()))
			run, err := c.oneIdle(ctx, c.Peers[peer], &r.Peers[peer])
			if err != nil {
				return r, fmt.Errorf("idle, %s: %w", c.Peers[peer].Name(), err)
			}
			run.Round, run.Order = round, order
			r.Runs = append(r.Runs, run)
			show.Done(fmt.Sprintf("%.2f %% CPU, %.1f MiB", share(run.ServerCPUSeconds, run.Seconds)*100, float64(run.ServerResident)/(1<<20)))
		}
	}
	r.Summarize()
	return r, nil
}

func (c *Config) oneIdle(ctx context.Context, p Peer, info *PeerInfo) (run RunResult, err error) {
	dir, err := os.MkdirTemp("", "ashlar-bench-")
	if err != nil {
		return run, fmt.Errorf("bench: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	port, err := freePort()
	if err != nil {
		return run, err
	}
	plan, err := p.Plan(c.site(dir, port))
	if err != nil {
		return run, err
	}
	info.Command = plan.Argv
	run = RunResult{Case: IdleCase, Peer: p.Name(), Started: time.Now().UTC().Truncate(time.Second), Load1: loadAverage()}
	s, err := startServer(ctx, plan, c.ServerCPUs)
	if err != nil {
		return run, err
	}
	defer s.Stop()
	of := startSampler(s.pid)
	defer of.Stop()
	begin := time.Now().Add(idleSettle)
	end := begin.Add(c.Runtime)
	if d, ok := c.Client.(*devperf); ok {
		path, err := d.find()
		if err != nil {
			return run, err
		}
		job := ClientJob{Dir: dir, CPUs: c.ClientCPUs, Bound: idleSettle + c.Runtime + graceMax, Started: func(int) { s.note() }}
		_, _, _, err = runClient(ctx, job, []string{
			path, "--uri", plan.Target.URI, "--op", "none",
			"--ramp", idleSettle.String(), "--runtime", (c.Runtime + time.Second).String(),
		})
		if err != nil {
			return run, err
		}
	} else {
		select {
		case <-time.After(time.Until(end)):
		case <-ctx.Done():
			return run, ctx.Err()
		}
	}
	s.note()
	run.Seconds = c.Runtime.Seconds()
	run.addCPU(of, new(sampler), Measured{From: begin, To: end})
	if !run.ServerSampled {
		return run, errors.New("its CPU time cannot be read")
	}
	return run, nil
}
