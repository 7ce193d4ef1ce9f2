package devtest

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Client uses one queue of a device from the goroutine of a test. It checks of
// every completion what datapath promises.
type Client struct{ client *client }

// Reactors starts count reactors and stops them at the end of the test.
func Reactors(t testing.TB, engine reactor.EngineKind, count int) []*reactor.Reactor {
	t.Helper()
	reactors := startReactors(t, engine, count)
	t.Cleanup(func() { stopReactors(reactors) })
	return reactors
}

// NewClient opens a queue of d on r.
func NewClient(t *testing.T, r *reactor.Reactor, d datapath.Device, depth int) *Client {
	t.Helper()
	g := &rig{T: t, options: &Options{}, reactors: []*reactor.Reactor{r}, dev: d, info: d.Info()}
	return &Client{g.client(0, depth)}
}

// Do submits the requests together, in one turn, and waits until all have ended.
// It sets Tag and Done.
func (c *Client) Do(requests ...*datapath.Request) {
	c.client.g.Helper()
	c.client.do(requests...)
}

// Start is Do without the waiting, which the function returned does. Until then
// no other request may be started.
func (c *Client) Start(requests ...*datapath.Request) (wait func()) {
	c.client.g.Helper()
	return c.client.start(requests...)
}

// Write writes data and fails the test when that fails.
func (c *Client) Write(offset uint64, data []byte) {
	c.client.g.Helper()
	c.client.write(offset, data)
}

// Read reads and fails the test when that fails.
func (c *Client) Read(offset, length uint64) []byte {
	c.client.g.Helper()
	return c.client.read(offset, length)
}

// Flush flushes and fails the test when that fails.
func (c *Client) Flush() {
	c.client.g.Helper()
	c.client.flush()
}

// Run executes f on the reactor and waits for it.
func (c *Client) Run(f func()) {
	c.client.g.Helper()
	c.client.run(f)
}

// Close closes the queue.
func (c *Client) Close() {
	c.client.g.Helper()
	c.client.close()
}
