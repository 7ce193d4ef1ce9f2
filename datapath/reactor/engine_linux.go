package reactor

import (
	"errors"
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath/uring"
)

// openEngine makes the engine the configuration asks for, on the reactor's thread.
func openEngine(r *Reactor) (engine, error) {
	if r.config.Engine == EngineEpoll {
		return newEpollEngine(r)
	}
	e, err := newRingEngine(r)
	if err == nil {
		return e, nil
	}
	if r.config.Engine == EngineRing || !errors.Is(err, uring.ErrUnsupported) {
		return nil, fmt.Errorf("io_uring engine: %w", err)
	}
	r.log.Warn("io_uring is not usable, running on epoll and worker threads instead", "reason", err)
	return newEpollEngine(r)
}
