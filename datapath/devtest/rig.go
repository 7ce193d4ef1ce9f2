package devtest

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	requestWait = 30 * time.Second // a request not ended by then is lost
	clientDepth = 32
)

// rig is what one test works on: a device, and reactors to use it from.
type rig struct {
	*testing.T
	options  *Options
	open     func(t *testing.T) datapath.Device
	reactors []*reactor.Reactor
	clients  []*client
	dev      datapath.Device // through Checked
	info     datapath.Info
}

func newRig(t *testing.T, o *Options, open func(t *testing.T) datapath.Device, reactors []*reactor.Reactor) *rig {
	t.Helper()
	g := &rig{T: t, options: o, open: open, reactors: reactors}
	g.use(open(t))
	return g
}

// use makes d the device under test.
func (g *rig) use(d datapath.Device) {
	g.Helper()
	g.dev = datapath.Checked(d)
	g.info = g.dev.Info()
	if g.info.Size < SizeMin {
		g.Fatalf("a device of %d bytes: the suite needs %d", g.info.Size, SizeMin)
	}
}

// close closes the clients and the device. After a lost request nothing can be
// closed in order, and the failure has been reported.
func (g *rig) close() {
	if g.Failed() {
		return
	}
	g.closeClients()
	if g.dev == nil {
		return
	}
	if err := g.dev.Close(); err != nil {
		g.Errorf("close: %v", err)
	}
}

func (g *rig) closeClients() {
	for _, c := range g.clients {
		c.close()
	}
	g.clients = nil
}

// unit is the smallest length of a request, and its alignment.
func (g *rig) unit() uint64 { return uint64(max(g.info.MinIO, 1)) }

// largest is the longest read or write, up to 4 MiB.
func (g *rig) largest() uint64 {
	n := uint64(SizeMin)
	if g.info.MaxIO != 0 {
		n = min(n, uint64(g.info.MaxIO))
	}
	return n
}

// client is one queue and what the test needs to use it.
type client struct {
	g       *rig
	reactor *reactor.Reactor
	queue   datapath.Queue
	depth   int
	thread  int

	// Owned by the reactor.
	submitting bool
	inflight   int
}

// client opens a queue on reactor i.
func (g *rig) client(i, depth int) *client {
	g.Helper()
	c := &client{g: g, reactor: g.reactors[i%len(g.reactors)], depth: depth}
	c.run(func() {
		var err error
		if c.queue, err = g.dev.OpenQueue(c.reactor, depth); err != nil {
			g.Errorf("OpenQueue: %v", err)
		}
		c.thread = unix.Gettid()
	})
	if c.queue == nil {
		g.FailNow()
	}
	g.clients = append(g.clients, c)
	return c
}

// run executes f on the client's reactor and waits for it.
func (c *client) run(f func()) {
	c.g.Helper()
	if err := c.reactor.Run(func(*reactor.Reactor) { f() }); err != nil {
		c.g.Fatal(err)
	}
}

func (c *client) close() {
	c.g.Helper()
	c.run(func() {
		if err := c.queue.Close(); err != nil {
			c.g.Errorf("close queue: %v", err)
		}
	})
}

// submit hands r, whose Tag and Done are set, to the queue. On the reactor.
func (c *client) submit(r *datapath.Request) {
	c.submitting = true
	c.inflight++
	c.queue.Submit(r)
	c.submitting = false
}

// ended checks what every completion promises. On the reactor, inside Done.
func (c *client) ended(r *datapath.Request) {
	c.inflight--
	if c.submitting {
		c.g.Errorf("%s completed inside Submit", r.Op)
	}
	if unix.Gettid() != c.thread {
		c.g.Errorf("%s completed on another thread", r.Op)
	}
	if r.Zero && (r.Op != datapath.OpRead || r.Status != datapath.StatusOK || !isZero(r.Buf)) {
		c.g.Errorf("%s at %d: Zero is set, status %s, buffer zero: %t", r.Op, r.Offset, r.Status, isZero(r.Buf))
	}
}

// do submits the requests together, in one turn, and waits until all have ended.
// It sets Tag and Done.
func (c *client) do(requests ...*datapath.Request) {
	c.g.Helper()
	c.start(requests...)()
}

// start is do without the waiting, which the function returned does.
func (c *client) start(requests ...*datapath.Request) (wait func()) {
	c.g.Helper()
	if len(requests) > c.depth {
		c.g.Fatalf("%d requests on a queue of depth %d", len(requests), c.depth)
	}
	if len(requests) == 0 {
		return func() {}
	}
	var waiting atomic.Int64
	waiting.Store(int64(len(requests)))
	all := make(chan struct{})
	for i, r := range requests {
		r.Tag = uint32(i)
		r.Status = datapath.Status(0xff)
		times := 0
		r.Done = func(r *datapath.Request) {
			c.ended(r)
			if times++; times > 1 {
				c.g.Errorf("%s completed %d times", r.Op, times)
				return
			}
			if waiting.Add(-1) == 0 {
				close(all)
			}
		}
	}
	c.run(func() {
		for _, r := range requests {
			c.submit(r)
		}
	})
	return func() {
		c.g.Helper()
		select {
		case <-all:
		case <-time.After(requestWait):
			c.g.Fatalf("%d of %d requests did not end in %v", waiting.Load(), len(requests), requestWait)
		}
		c.run(func() {}) // a second completion mostly shows by now; Checked stops at it in any case
	}
}

// must is do, and fails the test for a status other than StatusOK.
func (c *client) must(requests ...*datapath.Request) {
	c.g.Helper()
	c.do(requests...)
	for _, r := range requests {
		if r.Status != datapath.StatusOK {
			c.g.Fatalf("%s of %d bytes at %d, flags %#x: %s", r.Op, r.Length, r.Offset, r.Flags, r.Status)
		}
	}
}

func (c *client) write(offset uint64, data []byte) { c.writeFlags(offset, data, 0) }

func (c *client) writeFlags(offset uint64, data []byte, flags datapath.Flags) {
	c.g.Helper()
	c.must(&datapath.Request{Op: datapath.OpWrite, Flags: flags, Offset: offset, Length: uint64(len(data)), Buf: data})
}

func (c *client) read(offset, length uint64) []byte {
	c.g.Helper()
	data := bytes.Repeat([]byte{0x5a}, int(length))
	c.must(&datapath.Request{Op: datapath.OpRead, Offset: offset, Length: length, Buf: data})
	return data
}

func (c *client) flush() {
	c.g.Helper()
	c.must(&datapath.Request{Op: datapath.OpFlush})
}

// expect reads and compares.
func (c *client) expect(offset uint64, want []byte, when string) {
	c.g.Helper()
	if c.g.options.Forgets {
		want = make([]byte, len(want))
	}
	if got := c.read(offset, uint64(len(want))); !bytes.Equal(got, want) {
		i := difference(got, want)
		c.g.Fatalf("%s: byte %d of the device is %#02x, want %#02x (range %d+%d)", when, offset+uint64(i), got[i], want[i], offset, len(want))
	}
}

func difference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func isZero(b []byte) bool {
	for len(b) >= len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

var zeros [datapath.BlockSize]byte

// pattern is length bytes that tell where and by whom they were written; none of
// them is zero.
func pattern(seed uint64, length uint64) []byte {
	b := make([]byte, length)
	fill(b, seed)
	return b
}

func fill(b []byte, seed uint64) {
	const ones = 0x0101010101010101
	for ; len(b) >= 8; b = b[8:] {
		seed += 0x9e3779b97f4a7c15
		binary.LittleEndian.PutUint64(b, (seed^seed>>29)*0xbf58476d1ce4e5b9|ones)
	}
	for i := range b {
		b[i] = byte(mix(seed+uint64(i))) | 1
	}
}

// mix is the finalizer of splitmix64: a number that looks random, from a count.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
