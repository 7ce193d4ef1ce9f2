package filedev

import (
	"testing"

	"github.com/ncw/directio"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// directBlock is memory that direct I/O takes.
func directBlock(length int) []byte {
	if length == 0 {
		return nil
	}
	return directio.AlignedBlock((length + directio.BlockSize - 1) &^ (directio.BlockSize - 1))[:length]
}

// round submits requests again and again, from one message to the reactor to the
// last completion, without allocating.
type round struct {
	c        *client
	requests []*datapath.Request
	left     int
	failed   datapath.Status
	done     chan struct{}
}

// RunTask implements [reactor.Task].
func (n *round) RunTask(*reactor.Reactor) {
	n.left = len(n.requests)
	for _, r := range n.requests {
		n.c.queue.Submit(r)
	}
}

func (n *round) run() {
	n.c.r.Post(n)
	<-n.done
}

func (c *client) round(requests []*datapath.Request) *round {
	n := &round{c: c, requests: requests, done: make(chan struct{}, 1)}
	ended := func(r *datapath.Request) {
		if r.Status != datapath.StatusOK {
			n.failed = r.Status
		}
		if n.left--; n.left == 0 {
			n.done <- struct{}{}
		}
	}
	for i, r := range requests {
		r.Tag, r.Done = uint32(i), ended
	}
	return n
}

// allocations is how many allocations a round of these requests makes.
func (c *client) allocations(requests []*datapath.Request) float64 {
	c.t.Helper()
	n := c.round(requests)
	for range 50 { // heaps, lists and threads grow to their size
		n.run()
	}
	allocations := testing.AllocsPerRun(100, n.run)
	if n.failed != datapath.StatusOK {
		c.t.Fatal(n.failed)
	}
	return allocations
}

// stream keeps depth requests in flight until left have been submitted.
type stream struct {
	round
	next func(r *datapath.Request)
}

// RunTask implements [reactor.Task].
func (s *stream) RunTask(*reactor.Reactor) {
	for _, r := range s.requests[:min(len(s.requests), s.left)] {
		s.next(r)
		s.c.queue.Submit(r)
	}
}

func benchmark(b *testing.B, d *Device, engine reactor.EngineKind, op datapath.Op, length, depth int) {
	c := newClient(b, d, startReactor(b, reactor.Config{Engine: engine}), depth)
	s := &stream{round: round{c: c, left: b.N, done: make(chan struct{})}}
	places := d.size.Load() / uint64(length)
	at, ended := uint64(0), 0
	s.next = func(r *datapath.Request) {
		at = (at + 7919) % places
		r.Offset = at * uint64(length)
	}
	for i := range depth {
		r := &datapath.Request{Op: op, Length: uint64(length), Tag: uint32(i), Buf: directBlock(length)}
		r.Done = func(r *datapath.Request) {
			if r.Status != datapath.StatusOK {
				s.failed = r.Status
			}
			if ended++; ended == b.N {
				close(s.done)
				return
			}
			if begun := ended + depth - 1; begun < b.N {
				s.next(r)
				c.queue.Submit(r)
			}
		}
		s.requests = append(s.requests, r)
	}
	b.SetBytes(int64(length))
	b.ReportAllocs()
	b.ResetTimer()
	c.r.Post(s)
	<-s.done
	b.StopTimer()
	if s.failed != datapath.StatusOK {
		b.Fatal(s.failed)
	}
}

const benchmarkSize = 16 << 20

func onEnginesBench(b *testing.B, f func(b *testing.B, engine reactor.EngineKind)) {
	for _, engine := range engines {
		b.Run(string(engine), func(b *testing.B) {
			if engine == reactor.EngineRing {
				testenv.RequireIOURing(b)
			}
			f(b, engine)
		})
	}
}

func benchmarkFile(b *testing.B, dir string, access Access, op datapath.Op, length, depth int) {
	onEnginesBench(b, func(b *testing.B, engine reactor.EngineKind) {
		d := mustOpen(b, newFile(b, dir, benchmarkSize), Options{Access: access})
		c := newClient(b, d, startReactor(b, reactor.Config{Engine: engine}), 1)
		for offset := 0; offset < benchmarkSize; offset += 1 << 20 {
			c.must(write(uint64(offset), pattern(offset, 1<<20)))
		}
		benchmark(b, d, engine, op, length, depth)
	})
}

func BenchmarkInlineRead4k(b *testing.B) {
	benchmarkFile(b, testenv.TmpfsDir(b), AccessInline, datapath.OpRead, 4096, 1)
}

func BenchmarkInlineWrite4k(b *testing.B) {
	benchmarkFile(b, testenv.TmpfsDir(b), AccessInline, datapath.OpWrite, 4096, 1)
}

func BenchmarkInlineRead128kQD4(b *testing.B) {
	benchmarkFile(b, testenv.TmpfsDir(b), AccessInline, datapath.OpRead, 128<<10, 4)
}

func BenchmarkBufferedRead4kQD32(b *testing.B) {
	benchmarkFile(b, b.TempDir(), AccessBuffered, datapath.OpRead, 4096, 32)
}

func BenchmarkBufferedWrite4kQD32(b *testing.B) {
	benchmarkFile(b, b.TempDir(), AccessBuffered, datapath.OpWrite, 4096, 32)
}

func BenchmarkDirectRead4k(b *testing.B) {
	benchmarkFile(b, b.TempDir(), AccessDirect, datapath.OpRead, 4096, 1)
}

func BenchmarkDirectRead4kQD32(b *testing.B) {
	benchmarkFile(b, b.TempDir(), AccessDirect, datapath.OpRead, 4096, 32)
}

func BenchmarkDirectWrite4kQD32(b *testing.B) {
	benchmarkFile(b, b.TempDir(), AccessDirect, datapath.OpWrite, 4096, 32)
}

// BenchmarkDirectWrite500QD32 is a read-modify-write each.
func BenchmarkDirectWrite500QD32(b *testing.B) {
	benchmarkFile(b, b.TempDir(), AccessDirect, datapath.OpWrite, 500, 32)
}

// BenchmarkLock is what one request pays for keeping read-modify-writes apart.
func BenchmarkLock(b *testing.B) {
	for _, test := range []struct {
		name   string
		length uint64
	}{{"4k", 4 << 10}, {"128k", 128 << 10}, {"1m", 1 << 20}} {
		b.Run(test.name, func(b *testing.B) {
			var l regionLocks
			var h hold
			for b.Loop() {
				h.want(8<<20, test.length, lockWrite)
				l.take(&h)
				l.release(&h)
			}
		})
	}
}
