package gate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

// Config is how to run bars.
type Config struct {
	// Base gives rounds, times, CPUs, the ashlar binary and the progress output.
	// Its profile, peers, client, backing and name are set per bar.
	Base harness.Config

	Tmpfs, Disk harness.Backing // prepared; a zero one leaves its bars out
	Stage       *harness.Stage  // prepared; nil leaves the pool's bars out
	CallRounds  int             // of the control API's bar; 0: callRounds
}

// nullSize is that of the null device: large, since it costs nothing.
const nullSize = 64 << 30

// idleRuntime resolves 1 % of a CPU in steps of a hundredth of it.
const idleRuntime = 10 * time.Second

// callRounds makes a median of calls that take some milliseconds each.
const callRounds = 20

// byteRounds are enough for what hardly differs: the same load, counted.
const byteRounds = 3

// Find gives the bars of the names, all when there are none.
func Find(names []string) ([]Bar, error) {
	if len(names) == 0 {
		return Bars, nil
	}
	var found []Bar
	for _, name := range names {
		i := slices.IndexFunc(Bars, func(b Bar) bool { return b.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("no bar is called %q (have %v)", name, Names())
		}
		found = append(found, Bars[i])
	}
	return found, nil
}

// Names lists the bars.
func Names() []string {
	names := make([]string, len(Bars))
	for i, b := range Bars {
		names[i] = b.Name
	}
	return names
}

// backing is what a bar runs on; ok is false when that medium is not at hand.
func (c *Config) backing(b Bar) (backing harness.Backing, ok bool) {
	switch b.Medium {
	case Tmpfs:
		return c.Tmpfs, c.Tmpfs.Kind != ""
	case Disk:
		return c.Disk, c.Disk.Kind != ""
	case Idle:
		if c.Tmpfs.Kind != "" {
			return c.Tmpfs, true
		}
		return c.Disk, c.Disk.Kind != ""
	}
	if b.Medium.OnStage() {
		if c.Stage == nil {
			return harness.Backing{}, false
		}
		return c.Stage.Backing(), true
	}
	return harness.Backing{Kind: harness.BackingNull, Size: nullSize}, true
}

// Run runs one bar and judges it.
func (c *Config) Run(ctx context.Context, b Bar) (*harness.Result, error) {
	backing, ok := c.backing(b)
	if !ok {
		return nil, fmt.Errorf("bar %s: needs a file on %s", b.Name, b.Medium)
	}
	h := c.Base
	h.Name, h.Backing = b.Name, backing
	var err error
	if h.Client, err = harness.FindClient(b.Client); err != nil {
		return nil, fmt.Errorf("bar %s: %w", b.Name, err)
	}
	if h.Peers, err = harness.FindPeers(b.Peers()...); err != nil {
		return nil, fmt.Errorf("bar %s: %w", b.Name, err)
	}
	absent := map[string]string{}
	h.Peers = slices.DeleteFunc(h.Peers, func(p harness.Peer) bool {
		reason := harness.Available(p)
		if reason != nil {
			absent[p.Name()] = reason.Error()
		}
		return reason != nil
	})
	if len(h.Peers) == 0 {
		return nil, fmt.Errorf("bar %s: %v", b.Name, absent)
	}
	h.Baseline = h.Peers[0].Name()
	for _, claim := range b.Claims {
		if len(claim.Against) > 0 && absent[claim.Against[0]] == "" {
			h.Baseline = claim.Against[0]
			break
		}
	}
	h.Volume = b.Medium.volume()
	if b.countsBytes() {
		h.CountBytes = true
		h.Rounds = min(h.Rounds, byteRounds)
	}
	var r *harness.Result
	switch b.Medium {
	case PoolCalls:
		if h.Rounds = c.CallRounds; h.Rounds == 0 {
			h.Rounds = callRounds
		}
		r, err = harness.RunVolumeCalls(ctx, h, c.Stage)
	case PoolOpen:
		r, err = harness.RunOpen(ctx, h, c.Stage)
	case Idle:
		h.Profile = nil
		if h.Runtime == 0 {
			h.Runtime = idleRuntime
		}
		r, err = harness.RunIdle(ctx, h)
	default:
		if h.Profile, err = harness.LoadProfile("bars"); err != nil {
			return nil, err
		}
		h.Only = []string{b.Case}
		r, err = harness.Run(ctx, h)
	}
	if err != nil {
		return nil, fmt.Errorf("bar %s: %w", b.Name, err)
	}
	if len(absent) > 0 {
		r.Absent = absent
	}
	r.Verdicts = b.Judge(r)
	return r, nil
}

// RunAll runs the bars whose medium is at hand. After each it calls done with
// the result, or with why there is none; it ends early only with the context or
// when done returns an error.
func (c *Config) RunAll(ctx context.Context, bars []Bar, done func(Bar, *harness.Result, error) error) error {
	ran := 0
	for _, b := range bars {
		if _, ok := c.backing(b); !ok {
			continue
		}
		ran++
		r, err := c.Run(ctx, b)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := done(b, r, err); err != nil {
			return err
		}
	}
	if ran == 0 {
		return errors.New("bars: none of those named can run on what was given")
	}
	return nil
}
