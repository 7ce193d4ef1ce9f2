package reactor

import (
	"sync"
)

// workers are the threads that make calls which may sleep: every file operation
// of the epoll engine, and OpFunc of both engines. They start as they are needed.
type workers struct {
	r     *Reactor
	queue chan *IO
	group sync.WaitGroup

	started int // reactor only
	busy    int // operations given to workers and not completed; reactor only
}

func newWorkers(r *Reactor, depthMax int) *workers {
	return &workers{r: r, queue: make(chan *IO, depthMax)}
}

// submit hands io to a worker. The queue holds every operation that Reserve
// admitted, so the send does not block.
func (w *workers) submit(io *IO) {
	w.busy++
	if w.busy > w.started && w.started < w.r.config.Workers {
		w.started++
		w.group.Add(1)
		go w.work()
	}
	w.queue <- io
}

// work ends when the queue is closed.
func (w *workers) work() {
	defer w.group.Done()
	for io := range w.queue {
		io.run()
		w.r.complete(io)
	}
}

// stop waits for the workers to end. Nothing is in flight.
func (w *workers) stop() {
	close(w.queue)
	w.group.Wait()
}
