package daemon

import (
	"cmp"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// ReactorConfig says which reactors to start.
type ReactorConfig struct {
	Reactors    int   // 0: one, or one for each of CPUs
	CPUs        []int // one a reactor; empty: not pinned
	Poll        reactor.PollMode
	Engine      reactor.EngineKind
	BufferBytes int64 // per reactor
	GCPercent   int   // of the garbage collector, unless GOGC says it; 0: 400
}

func (c *ReactorConfig) check() error {
	if c.Reactors == 0 {
		c.Reactors = max(1, len(c.CPUs))
	}
	if len(c.CPUs) > 0 && len(c.CPUs) < c.Reactors {
		return fmt.Errorf("%d reactors cannot be pinned to %d CPUs: name one CPU a reactor", c.Reactors, len(c.CPUs))
	}
	return nil
}

// start starts the reactors of a config that was checked. With an error it returns
// those that run.
func (c *ReactorConfig) start(log *slog.Logger) (list []*reactor.Reactor, err error) {
	tuneRuntime(c.Reactors, cmp.Or(c.GCPercent, 400))
	raiseDescriptors(log)
	for i := range c.Reactors {
		rc := reactor.Config{Name: fmt.Sprintf("r%d", i), Engine: c.Engine, Poll: c.Poll, BufferBytes: c.BufferBytes, Log: log}
		if len(c.CPUs) > 0 {
			rc.CPU = c.CPUs[i] + 1
		}
		r, err := reactor.Start(rc)
		if err != nil {
			return list, err
		}
		list = append(list, r)
		log.Info("reactor", "name", r.Name(), "engine", r.Describe(), "poll", rc.Poll, "cpu", rc.CPU-1)
	}
	return list, nil
}

func stopReactors(list []*reactor.Reactor) {
	for _, r := range list {
		r.Stop()
	}
}

// tuneRuntime gives the Go runtime what a reactor needs of it: processors beside
// the reactors' own, or HTTP and the garbage collector starve, and little garbage
// collection, since the data path makes no garbage.
func tuneRuntime(reactors, gcPercent int) {
	if n := reactors + 2; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(1 << 30) // of the Go heap; data buffers lie outside it
	}
}

// raiseDescriptors allows as many descriptors as the system lets us have.
func raiseDescriptors(log *slog.Logger) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur == l.Max {
		return
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		log.Debug("the limit of open files stays", "error", err)
	}
}
