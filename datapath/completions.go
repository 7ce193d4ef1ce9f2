package datapath

import "github.com/ashlar-storage/ashlar/datapath/reactor"

// Completions ends requests later in the turn, many at once: for queues that
// know the answer already in Submit, where no request may complete. It is owned
// by one reactor and allocates nothing after Init.
type Completions struct {
	reactor  *reactor.Reactor
	ended    []*Request // wait for the end of the turn; capacity depth
	running  []*Request // being completed now; capacity depth
	deferred reactor.Deferred
}

// Init reserves room for depth requests.
//
// Context: on r.
func (c *Completions) Init(r *reactor.Reactor, depth int) {
	c.reactor = r
	c.ended = make([]*Request, 0, depth)
	c.running = make([]*Request, 0, depth)
	c.deferred.Func = c.run
}

// Add completes r with status s later in this turn. It may be called inside
// Submit and inside Done.
func (c *Completions) Add(r *Request, s Status) {
	r.Status = s
	c.ended = append(c.ended, r)
	c.reactor.Defer(&c.deferred)
}

// run completes what was added before it. Callbacks submit and so add again:
// that goes to the other list and runs in the next round.
func (c *Completions) run() {
	batch := c.ended
	c.ended = c.running[:0]
	for i, r := range batch {
		batch[i] = nil
		r.Complete(r.Status)
	}
	c.running = batch[:0]
}
