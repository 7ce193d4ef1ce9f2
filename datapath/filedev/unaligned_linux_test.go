package filedev

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// owner has bytes of its own, which it writes over and over: pieces that share
// blocks with those of others, or whole blocks beside them.
type owner struct {
	pieces []piece
	random *rand.Rand
	left   int // writes still to begin
	flight int
	err    error
	done   chan error
	free   []*datapath.Request
	at     []int // piece of the request with this tag
	busy   map[int]bool
}

type piece struct{ from, to int }

// TestNeighboursInOneBlockKeepTheirBytes has several reactors write small pieces
// of the same blocks, whole blocks, and zeros, all at once.
func TestNeighboursInOneBlockKeepTheirBytes(t *testing.T) {
	const area, depth, owners = 64 << 10, 8, 3
	writes := 600
	if testing.Short() || raceEnabled {
		writes = 100
	}
	for _, place := range []struct {
		name string
		open func(t *testing.T) *Device
	}{
		{"file of odd size", func(t *testing.T) *Device {
			return mustOpen(t, newFile(t, diskDir(t), area+333), Options{Access: AccessDirect})
		}},
		{"disk of 4096-byte sectors", func(t *testing.T) *Device {
			return mustOpen(t, loopDevice(t, newFile(t, testenv.TmpfsDir(t), area), 4096), Options{})
		}},
		{"tmpfs, inline", func(t *testing.T) *Device {
			return mustOpen(t, newFile(t, testenv.TmpfsDir(t), area+333), Options{})
		}},
		{"tmpfs, direct", func(t *testing.T) *Device {
			return mustOpen(t, newFile(t, testenv.TmpfsDir(t), area+333), Options{Access: AccessDirect})
		}},
	} {
		t.Run(place.name, func(t *testing.T) {
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				d := place.open(t)
				size := int(d.size.Load())
				const seed = 7
				random := rand.New(rand.NewPCG(seed, 0))
				var all [owners]*owner
				for i := range all {
					all[i] = &owner{random: rand.New(rand.NewPCG(seed, uint64(i+1))), left: writes, done: make(chan error, 1), at: make([]int, depth), busy: map[int]bool{}}
				}
				for from := 0; from < size; {
					o := all[random.IntN(owners)]
					length := []int{512, 512, 1, 700, 4095, 4096, 8192, 1024}[random.IntN(8)]
					if length >= 4096 && random.IntN(2) == 0 { // to the next whole block
						from = (from + 4095) &^ 4095
					}
					if p := (piece{from, min(from+length, size)}); p.from < p.to {
						o.pieces = append(o.pieces, p)
					}
					from += length
				}
				shadow := make([]byte, size) // each byte is its owner's
				for i, o := range all {
					c := newClient(t, d, startReactor(t, reactor.Config{Name: fmt.Sprint(i), Engine: engine}), depth)
					o.start(c, shadow, depth)
				}
				for i, o := range all {
					if err := <-o.done; err != nil {
						t.Errorf("owner %d: %v", i, err)
					}
				}
				if t.Failed() {
					return
				}
				c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), 1)
				c.expect(0, shadow, "at rest")
			})
		})
	}
}

func (o *owner) start(c *client, shadow []byte, depth int) {
	for i := range depth {
		r := &datapath.Request{Tag: uint32(i)}
		r.Done = func(r *datapath.Request) { o.ended(c, shadow, r) }
		o.free = append(o.free, r)
	}
	c.r.Post(reactor.TaskFunc(func(*reactor.Reactor) { o.pump(c, shadow) }))
}

func (o *owner) pump(c *client, shadow []byte) {
	for o.err == nil && o.left > 0 && len(o.free) > 0 {
		i := o.random.IntN(len(o.pieces))
		if o.busy[i] {
			if o.flight > 0 {
				return
			}
			continue
		}
		p := o.pieces[i]
		r := o.free[len(o.free)-1]
		o.free = o.free[:len(o.free)-1]
		o.busy[i], o.at[r.Tag] = true, i
		o.left--
		o.flight++
		r.Op, r.Flags, r.Offset, r.Length, r.Buf = datapath.OpWrite, 0, uint64(p.from), uint64(p.to-p.from), nil
		switch o.random.IntN(12) {
		case 0:
			r.Op = datapath.OpWriteZeroes
			clear(shadow[p.from:p.to])
		case 1:
			r.Flags = datapath.FlagFUA
			fallthrough
		default:
			r.Buf = pattern(int(o.random.Uint32()), p.to-p.from)
			copy(shadow[p.from:], r.Buf)
		}
		c.queue.Submit(r)
	}
	if o.flight == 0 {
		o.done <- o.err
	}
}

// ended reads back what was written, by the same request.
func (o *owner) ended(c *client, shadow []byte, r *datapath.Request) {
	p := o.pieces[o.at[r.Tag]]
	if r.Status != datapath.StatusOK && o.err == nil {
		o.err = fmt.Errorf("%s of %d bytes at %d: %s", r.Op, r.Length, r.Offset, r.Status)
	}
	if r.Op != datapath.OpRead && o.err == nil {
		r.Op, r.Flags, r.Buf = datapath.OpRead, 0, make([]byte, r.Length)
		c.queue.Submit(r)
		return
	}
	if o.err == nil && !bytes.Equal(r.Buf, shadow[p.from:p.to]) {
		o.err = fmt.Errorf("%d bytes at %d came back changed, from byte %d", r.Length, r.Offset, difference(r.Buf, shadow[p.from:p.to]))
	}
	o.busy[o.at[r.Tag]] = false
	o.flight--
	o.free = append(o.free, r)
	o.pump(c, shadow)
}

// TestParkedRequestsAreNotPassed submits one request among others that are
// submitted again as soon as they end: it has its turn after a few of them.
func TestParkedRequestsAreNotPassed(t *testing.T) {
	const depth = 24
	for _, test := range []struct {
		name        string
		options     Options
		others, one *datapath.Request
	}{
		{"for a place in the disk's queue", Options{Access: AccessDirect, InFlightMax: 2}, read(0, 4096), read(8192, 4096)},
		{"for a bouncer", Options{Access: AccessDirect}, read(1, 100), read(8192, 100)},
		{"for a region, with a whole block", Options{Access: AccessDirect}, write(1, pattern(1, 100)), write(4096, pattern(2, 4096))},
		{"for a region, with a piece of a block", Options{Access: AccessDirect}, write(4096, pattern(2, 4096)), write(1, pattern(1, 100))},
		{"for a region, with a read", Options{Access: AccessBuffered}, write(0, pattern(1, 4096)), read(0, 4096)},
		{"for a region, with a write", Options{Access: AccessBuffered}, read(0, 4096), write(0, pattern(1, 4096))},
	} {
		t.Run(test.name, func(t *testing.T) {
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				d := mustOpen(t, newFile(t, diskDir(t), 1<<20), test.options)
				c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), depth)
				c.do(test.one) // its memory is aligned as others' is, or not
				done := make(chan int, 1)
				passed, waiting, stop, left := 0, false, false, depth
				end := func() {
					if left--; left == 0 {
						done <- passed
					}
				}
				for i := range depth - 1 {
					r := *test.others
					r.Tag = uint32(i)
					if r.Buf = directBlock(len(r.Buf)); r.Op == datapath.OpWrite {
						copy(r.Buf, test.others.Buf)
					}
					r.Done = func(r *datapath.Request) {
						if waiting {
							passed++
						}
						if stop || passed > 100*depth {
							end()
							return
						}
						c.queue.Submit(r)
					}
					c.r.Post(reactor.TaskFunc(func(*reactor.Reactor) { c.queue.Submit(&r) }))
				}
				one := *test.one
				one.Tag = depth - 1
				if one.Buf = directBlock(len(one.Buf)); one.Op == datapath.OpWrite {
					copy(one.Buf, test.one.Buf)
				}
				rounds := 0
				one.Done = func(r *datapath.Request) {
					if rounds++; rounds < 10 {
						c.queue.Submit(r)
						return
					}
					waiting, stop = false, true
					end()
				}
				c.r.Post(reactor.TaskFunc(func(*reactor.Reactor) {
					waiting = true
					c.queue.Submit(&one)
				}))
				// Each of the others may be before it once when it parks, and once more
				// while it is on its way.
				if n := <-done; n > 10*4*depth {
					t.Errorf("%d others ended while 10 requests waited, want at most %d each", n, 4*depth)
				}
			})
		})
	}
}

func TestUnalignedRequestsAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		const depth = 32
		d := mustOpen(t, newFile(t, diskDir(t), 1<<20+777), Options{Access: AccessDirect, InFlightMax: 3})
		c := newClient(t, d, startReactor(t, reactor.Config{Engine: engine}), depth)
		var requests []*datapath.Request
		for i := range depth {
			requests = append(requests, write(uint64(i*100), pattern(i, 100)))
		}
		requests[3] = read(5, 99)
		requests[4] = write(1<<20+770, pattern(1, 7))
		requests[5] = write(8192, directBlock(4096))
		requests[6] = read(1<<20, 777)
		requests[7] = writeFUA(1<<20, pattern(1, 700))
		requests[8] = flush()
		requests[9] = zeroes(4096, 8192, 0)
		if n := c.allocations(requests); n != 0 {
			t.Errorf("%v allocations in a round of %d requests", n, depth)
		}
	})
}
