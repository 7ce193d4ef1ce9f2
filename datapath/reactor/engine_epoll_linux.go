package reactor

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// epollEngine serves hosts without io_uring: readiness by edge-triggered epoll,
// files by worker threads.
type epollEngine struct {
	r       *Reactor
	fd      int
	watches []*Watch // by slot
	free    []uint32
	events  [128]unix.EpollEvent
}

func newEpollEngine(r *Reactor) (*epollEngine, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &epollEngine{r: r, fd: fd}, nil
}

func (e *epollEngine) kind() EngineKind { return EngineEpoll }
func (e *epollEngine) commands() bool   { return false }
func (e *epollEngine) describe() string {
	return fmt.Sprintf("epoll with up to %d worker threads", e.r.config.Workers)
}
func (e *epollEngine) close()                     { _ = unix.Close(e.fd) } // holds no data
func (e *epollEngine) growBuffers(int, []byte)    {}
func (e *epollEngine) reserve(int)                {}
func (e *epollEngine) addFile(*File)              {}
func (e *epollEngine) removeFile(*File)           {}
func (e *epollEngine) addBuffers(int) (int, bool) { return 0, false }
func (e *epollEngine) removeBuffers(int, int)     {}

func (e *epollEngine) submit(io *IO) {
	if io.File != nil {
		io.FD = io.File.fd
	}
	e.r.workers.submit(io)
}

func (e *epollEngine) watch(w *Watch) error {
	n := len(e.free) - 1
	if n < 0 {
		e.watches = append(e.watches, nil)
		e.free = append(e.free, uint32(len(e.watches)-1))
		n = 0
	}
	w.slot, e.free = e.free[n], e.free[:n]
	w.events = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET
	e.watches[w.slot] = w
	if err := e.control(unix.EPOLL_CTL_ADD, w); err != nil {
		e.watches[w.slot] = nil
		e.free = append(e.free, w.slot)
		return fmt.Errorf("epoll_ctl: watch descriptor %d: %w", w.FD, err)
	}
	w.armed = true
	return nil
}

func (e *epollEngine) control(op int, w *Watch) error {
	return unix.EpollCtl(e.fd, op, w.FD, &unix.EpollEvent{Events: w.events, Fd: int32(w.slot)})
}

func (e *epollEngine) wantWrite(w *Watch) {
	w.events |= unix.EPOLLOUT
	_ = e.control(unix.EPOLL_CTL_MOD, w) // the descriptor is in the set; MOD reports a present state again
}

func (e *epollEngine) unwatch(w *Watch) {
	if !w.armed {
		return
	}
	w.armed = false
	_ = e.control(unix.EPOLL_CTL_DEL, w) // a closed descriptor has left the set already
	e.watches[w.slot] = nil
	e.free = append(e.free, w.slot)
}

func (e *epollEngine) poll() int { return e.collect(0) }

func (e *epollEngine) wait(timeout int64) int {
	milliseconds := -1
	if timeout >= 0 {
		milliseconds = int(min((timeout+999_999)/1_000_000, 1<<30))
	}
	n := e.collect(milliseconds)
	return n
}

func (e *epollEngine) nap(limit int64) int { return e.wait(limit) }

func (e *epollEngine) collect(milliseconds int) int {
	e.r.stats.enters.Add(1)
	n, err := e.epollWait(milliseconds)
	if err != 0 {
		return 0 // EINTR: the next turn comes again
	}
	if milliseconds != 0 {
		e.r.now = e.r.clock()
	}
	for i := range n {
		event := &e.events[i]
		w := e.watches[event.Fd]
		if w == nil {
			continue // ended by a callback of this batch
		}
		if event.Events&unix.EPOLLOUT != 0 {
			w.events &^= unix.EPOLLOUT
			_ = e.control(unix.EPOLL_CTL_MOD, w) // in the set
		}
		w.Ready(event.Events)
	}
	return n
}
