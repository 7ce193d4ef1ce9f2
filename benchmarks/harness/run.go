package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Config is a benchmark to run.
type Config struct {
	Name     string // of the result; the profile's when empty
	Profile  *Profile
	Only     []string // cases; empty is all
	Backing  Backing  // prepared
	Peers    []Peer
	Client   Client
	Baseline string // a peer's name; empty is the first peer

	Rounds       int
	Runtime      time.Duration // 0 keeps the profile's
	Ramp         time.Duration // negative keeps the profile's
	ServerCPUs   []int
	ClientCPUs   []int
	Ashlar, Poll string
	Reactors     int

	// Of a backing that is the directory of a Stage.
	Volume         Volume
	SnapshotPeriod time.Duration
	CountBytes     bool // stop the server at the end of each run, and count what it wrote

	Progress io.Writer // nil is silent
	Terminal bool      // Progress is a terminal
}

// The bounds of a benchmark.
const (
	RoundsMax  = 100
	RuntimeMax = time.Hour
	unboundMax = 15 * time.Minute // for a case without a runtime, such as verify
	graceMax   = 60 * time.Second // for a client to start and to end, beyond ramp and runtime
)

// Check finds what would make a benchmark fail, before anything is started.
func (c *Config) Check() error {
	switch {
	case c.Profile == nil || len(c.Profile.Cases) == 0:
		return errors.New("bench: no profile")
	case len(c.Peers) == 0:
		return errors.New("bench: no peers")
	case c.Rounds < 1 || c.Rounds > RoundsMax:
		return fmt.Errorf("bench: %d rounds: want 1 to %d", c.Rounds, RoundsMax)
	case c.Runtime < 0 || c.Runtime > RuntimeMax:
		return fmt.Errorf("bench: runtime %v: want at most %v", c.Runtime, RuntimeMax)
	case c.Ramp > RuntimeMax:
		return fmt.Errorf("bench: ramp %v: want at most %v", c.Ramp, RuntimeMax)
	}
	if c.Baseline != "" && !slices.ContainsFunc(c.Peers, func(p Peer) bool { return p.Name() == c.Baseline }) {
		return fmt.Errorf("bench: the baseline %q is not among the peers %s", c.Baseline, strings.Join(c.names(), ", "))
	}
	for _, cpus := range [][]int{c.ServerCPUs, c.ClientCPUs} {
		for _, cpu := range cpus {
			if allowed := AllowedCPUs(); len(allowed) > 0 && !slices.Contains(allowed, cpu) {
				return fmt.Errorf("bench: CPU %d is not among those this process may use (%s)", cpu, joinCPUs(allowed))
			}
		}
	}
	if err := lookProgram(c.Client.Program()); err != nil {
		return err
	}
	cases, err := c.cases()
	if err != nil {
		return err
	}
	for _, p := range c.Peers {
		if err := lookProgram(p.Program()); err != nil {
			return err
		}
		plan, err := p.Plan(c.site("/", 0))
		if err != nil {
			return err
		}
		for _, x := range cases {
			if err := c.Client.Check(x, plan.Target); err != nil {
				return fmt.Errorf("%s: %w", p.Name(), err)
			}
		}
	}
	return nil
}

// Warnings tells what makes numbers doubtful without making them impossible.
func (c *Config) Warnings() []string {
	var w []string
	if len(AllowedCPUs()) == 1 {
		w = append(w, "one CPU only: client and server share it, and the numbers are those of another placement")
	} else if len(c.ServerCPUs) == 0 || len(c.ClientCPUs) == 0 {
		w = append(w, "client and server are not pinned: placement is the largest variable there is")
	} else if slices.ContainsFunc(c.ServerCPUs, func(cpu int) bool { return slices.Contains(c.ClientCPUs, cpu) }) {
		w = append(w, "client and server share a CPU")
	}
	if load := loadAverage(); load > 0.5 {
		w = append(w, fmt.Sprintf("the host is busy, load average %.2f: only ratios between interleaved peers count", load))
	}
	if c.Rounds < 3 {
		w = append(w, "fewer than 3 rounds: a median of them says little")
	}
	if c.Client == nil || c.Client.Name() != "fio" {
		return w
	}
	if version := programVersion(clientProgram(c.Client)); !fioVersionOK(version) {
		w = append(w, version+" is older than 3.27: mixed latencies are missing")
	}
	return w
}

func clientProgram(c Client) (string, []string) {
	program, _ := c.Program()
	return program, c.VersionArgs()
}

func (c *Config) names() []string {
	names := make([]string, len(c.Peers))
	for i, p := range c.Peers {
		names[i] = p.Name()
	}
	return names
}

func (c *Config) cases() ([]Case, error) {
	if len(c.Only) == 0 {
		return c.Profile.Cases, nil
	}
	var cases []Case
	for _, name := range c.Only {
		x, err := c.Profile.Find(name)
		if err != nil {
			return nil, err
		}
		cases = append(cases, x)
	}
	return cases, nil
}

// Writes tells whether a case that is to run changes the target.
func (c *Config) Writes() bool {
	cases, err := c.cases()
	return err != nil || slices.ContainsFunc(cases, Case.Writes)
}

func (c *Config) site(dir string, port int) Site {
	return Site{
		Dir: dir, Backing: c.Backing, Port: port, CPUs: c.ServerCPUs,
		Ashlar: c.Ashlar, Poll: c.Poll, Reactor: c.Reactors,
		Volume: c.Volume, SnapshotPeriod: c.SnapshotPeriod,
	}
}

// Run runs the benchmark. When ctx ends early it stops everything it started and
// returns the rounds done so far with ctx's error.
func Run(ctx context.Context, c Config) (*Result, error) {
	if c.Baseline == "" && len(c.Peers) > 0 {
		c.Baseline = c.Peers[0].Name()
	}
	if err := c.Check(); err != nil {
		return nil, err
	}
	cases, err := c.cases()
	if err != nil {
		return nil, err
	}
	r := c.result()
	show := newProgress(c.Progress, c.Terminal)
	defer show.Stop()
	var total time.Duration
	timings := make([]Timing, len(cases))
	for i, x := range cases {
		if timings[i], err = x.Timing(); err != nil {
			return nil, err
		}
		timings[i] = timings[i].Override(c.Ramp, c.Runtime)
		total += timings[i].Ramp + timings[i].Runtime
	}
	show.Begin(len(cases)*c.Rounds*len(c.Peers), total*time.Duration(c.Rounds*len(c.Peers)))
	for i, x := range cases {
		for round := range c.Rounds {
			for order := range c.Peers {
				peer := (round + order) % len(c.Peers)
				show.Step(fmt.Sprintf("%s  round %d/%d  %s", x.Name, round+1, c.Rounds, c.Peers[peer].Name()))
				run, err := c.one(ctx, x, timings[i], c.Peers[peer], &r.Peers[peer])
				if err != nil {
					r.Summarize()
					return r, fmt.Errorf("%s, %s, round %d: %w", x.Name, c.Peers[peer].Name(), round+1, err)
				}
				run.Round, run.Order = round, order
				r.Runs = append(r.Runs, run)
				show.Done(fmt.Sprintf("%.0f IOPS, %.1f MB/s", run.IOPS, run.BytesPerSecond/1e6))
			}
		}
	}
	r.Summarize()
	return r, nil
}

func (c *Config) result() *Result {
	name := c.Name
	if name == "" {
		name = c.Profile.Name
	}
	r := &Result{
		Schema: Schema, Name: name, Started: time.Now().UTC().Truncate(time.Second), Host: ReadHost(c.Ashlar),
		Options: Options{
			Profile: c.Profile.Name, Target: c.Backing, Client: c.Client.Name(),
			ClientVersion: programVersion(clientProgram(c.Client)),
			Rounds:        c.Rounds, RuntimeSeconds: c.Runtime.Seconds(), RampSeconds: c.Ramp.Seconds(),
			ServerCPUs: c.ServerCPUs, ClientCPUs: c.ClientCPUs, Baseline: c.Baseline, Poll: c.Poll, Reactors: c.Reactors,
			Volume: c.Volume,
		},
	}
	if c.Backing.Kind == BackingFile || c.Backing.Kind == BackingPool {
		r.Options.FileSystem = fileSystemOf(c.Backing.Path)
	}
	for _, p := range c.Peers {
		program, _ := p.Program()
		info := PeerInfo{Name: p.Name(), About: p.About(), Version: programVersion(program, p.VersionArgs())}
		if _, own := p.(ownPeer); own {
			info.Version = strings.TrimSpace(r.Host.Version + " " + r.Host.Commit)
		}
		r.Peers = append(r.Peers, info)
	}
	return r
}

// one starts a peer, loads it, and stops it.
func (c *Config) one(ctx context.Context, x Case, t Timing, p Peer, info *PeerInfo) (run RunResult, err error) {
	// A short path: a unix socket's has at most 107 bytes.
	dir, err := os.MkdirTemp("", "ashlar-bench-")
	if err != nil {
		return run, fmt.Errorf("bench: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	clientDir := filepath.Join(dir, "client")
	if err := os.Mkdir(clientDir, 0o700); err != nil {
		return run, fmt.Errorf("bench: %w", err)
	}
	port, err := freePort()
	if err != nil {
		return run, err
	}
	site := c.site(dir, port)
	site.Writes = x.Writes()
	plan, err := p.Plan(site)
	if err != nil {
		return run, err
	}
	info.Command = plan.Argv
	if err := runAll(ctx, plan.Before); err != nil {
		return run, err
	}
	run = RunResult{Case: x.Name, Peer: p.Name(), Started: time.Now().UTC().Truncate(time.Second), Load1: loadAverage()}
	s, err := startServer(ctx, plan, c.ServerCPUs)
	if err != nil {
		return run, err
	}
	if s.kernel != nil {
		info.Command = s.kernel.Command()
	}
	defer func() { // s is another one after a count
		err = errors.Join(err, s.cleanUp(ctx, plan))
		s.Stop()
		err = errors.Join(err, s.left)
	}()
	pid := s.pid
	if pid == 0 {
		pid = ownerOf(plan.Target)
	}
	ofServer := s.follow(pid)
	defer ofServer.Stop()
	ofClient := new(sampler)
	defer func() { ofClient.Stop() }()
	bound := t.Ramp + t.Runtime + graceMax
	if t.Runtime == 0 {
		bound = unboundMax
	}
	before, disk := s.writtenSoFar(pid), diskWritten(c.Backing.Path)
	meanwhile := startMeanwhile(ctx, plan.During)
	defer meanwhile.Stop() // when the client fails
	m, err := c.Client.Run(ctx, ClientJob{
		Case: x, Timing: t, Target: s.target, Dir: clientDir, CPUs: c.ClientCPUs, Bound: bound,
		Started: func(pid int) {
			s.note() // children serving the connections come a little later; Stop looks again
			ofClient = startSampler(pid)
		},
	})
	if err != nil {
		if text := s.output.String(); text != "" {
			err = fmt.Errorf("%w; the server said: %s", err, text)
		}
		return run, err
	}
	s.note()
	calls, err := meanwhile.Stop()
	if err != nil {
		return run, err
	}
	run.Metrics = m.Metrics
	ofServer.take() // up to the end
	run.addCPU(ofServer, ofClient, m)
	run.addCalls(calls)
	if c.CountBytes && (pid != 0 || s.kernel != nil) {
		if s.Stop(); s.killed {
			return run, errors.New("the server had to be killed: what it wrote is not all it had to write")
		}
		if s.written > before {
			run.ServerBytesWritten = s.written - before
		}
		if now := diskWritten(c.Backing.Path); now > disk {
			run.DiskBytesWritten = now - disk
		}
		if len(plan.After) > 0 {
			plan.Setup = nil
			again, err := startServer(ctx, plan, c.ServerCPUs)
			if err != nil {
				return run, err
			}
			s = again
		}
	}
	return run, nil
}

// addCPU turns the rates seen by the samplers into seconds of the window. Of a
// load that ended with its work they see all of it, with the client's start and
// end around it, when a server has nothing to do.
func (r *RunResult) addCPU(server, client *sampler, m Measured) {
	seconds := r.Seconds
	if m.Whole {
		seconds = m.To.Sub(m.From).Seconds()
	}
	if rate, _, ok := client.Rate(m.From, m.To); ok {
		r.ClientCPUSeconds, r.ClientSampled = rate*seconds, true
	}
	rate, resident, ok := server.Rate(m.From, m.To)
	r.ServerResident = resident
	if !ok {
		return
	}
	r.ServerCPUSeconds, r.ServerSampled = rate*seconds, true
	if m.Whole {
		rate = share(r.ServerCPUSeconds, r.Seconds) // as if it had taken no longer than its I/O
	}
	if r.IOPS == 0 {
		return
	}
	r.ServerCPUPerMillion = rate / r.IOPS * 1e6
	if rate > 0 {
		r.IOPSPerServerCPU = r.IOPS / rate
	}
}

// ownerOf is the process behind an export served on a unix socket.
func ownerOf(t Target) int {
	u, err := url.Parse(t.URI)
	if err != nil || u.Scheme != "nbd+unix" {
		return 0
	}
	return socketOwner(u.Query().Get("socket"))
}
