package devtest

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
)

func testInfo(g *rig) {
	i := g.info
	powerOfTwo := func(n uint32) bool { return n != 0 && n&(n-1) == 0 }
	if !powerOfTwo(i.MinIO) || !powerOfTwo(i.PreferredIO) || i.PreferredIO < i.MinIO {
		g.Errorf("MinIO %d, PreferredIO %d: must be powers of two, the second not below the first", i.MinIO, i.PreferredIO)
	}
	if i.MaxIO != 0 && (i.MaxIO < i.PreferredIO || i.MaxIO%i.MinIO != 0) {
		g.Errorf("MaxIO %d does not fit PreferredIO %d and MinIO %d", i.MaxIO, i.PreferredIO, i.MinIO)
	}
	if i.Size%uint64(i.MinIO) != 0 {
		g.Errorf("size %d is no multiple of MinIO %d", i.Size, i.MinIO)
	}
	if i.Description == "" {
		g.Error("no description")
	}
	if i.Has(datapath.FeatureExtents) != slices.Contains(i.Contexts, datapath.ContextAllocation) {
		g.Errorf("extents: %t, but contexts are %q", i.Has(datapath.FeatureExtents), i.Contexts)
	}
}

// everyOp is one request of each operation the device has, on ranges of their
// own from offset on.
func (g *rig) everyOp(offset uint64) []*datapath.Request {
	const length = 2 * datapath.BlockSize
	var requests []*datapath.Request
	add := func(r datapath.Request) {
		if r.Op != datapath.OpFlush {
			r.Offset, r.Length = offset, length
			offset += length
		}
		if r.Op == datapath.OpRead || r.Op == datapath.OpWrite {
			r.Buf = make([]byte, length)
			fill(r.Buf[:64], offset)
		}
		if r.Op == datapath.OpExtents {
			r.Context, r.Extents = datapath.ContextAllocation, make([]datapath.Extent, 0, 4)
		}
		requests = append(requests, &r)
	}
	add(datapath.Request{Op: datapath.OpRead})
	add(datapath.Request{Op: datapath.OpWrite})
	has := g.info.Has
	if has(datapath.FeatureFUA) {
		add(datapath.Request{Op: datapath.OpWrite, Flags: datapath.FlagFUA})
	}
	if has(datapath.FeatureFlush) {
		add(datapath.Request{Op: datapath.OpFlush})
	}
	if has(datapath.FeatureDiscard) {
		add(datapath.Request{Op: datapath.OpDiscard})
	}
	if has(datapath.FeatureWriteZeroes) {
		add(datapath.Request{Op: datapath.OpWriteZeroes})
		add(datapath.Request{Op: datapath.OpWriteZeroes, Flags: datapath.FlagNoUnmap})
	}
	if has(datapath.FeatureCache) {
		add(datapath.Request{Op: datapath.OpCache})
	}
	if has(datapath.FeatureExtents) {
		add(datapath.Request{Op: datapath.OpExtents})
		add(datapath.Request{Op: datapath.OpExtents, Flags: datapath.FlagOneExtent})
	}
	return requests
}

// testEndsOnce relies on do and on Checked, which look at every completion.
func testEndsOnce(g *rig) {
	c := g.client(0, clientDepth)
	for range 8 {
		c.must(g.everyOp(0)...)
		for _, r := range g.everyOp(0) {
			c.must(r)
		}
	}
}

func testFieldsRestored(g *rig) {
	// Without Checked, which passes down requests of its own.
	g.dev = g.dev.(interface{ Unwrap() datapath.Device }).Unwrap()
	c := g.client(0, clientDepth)
	requests := g.everyOp(0)
	before := make([]datapath.Request, len(requests))
	for i, r := range requests {
		before[i] = *r
	}
	c.must(requests...)
	for i, r := range requests {
		b := &before[i]
		if r.Op != b.Op || r.Flags != b.Flags || r.Tag != uint32(i) || r.Offset != b.Offset || r.Length != b.Length || r.Context != b.Context {
			g.Errorf("%s became %+v", b.Op, r)
		}
		if len(r.Buf) != len(b.Buf) || len(b.Buf) > 0 && &r.Buf[0] != &b.Buf[0] {
			g.Errorf("%s: another buffer came back", b.Op)
		}
		if cap(r.Extents) != cap(b.Extents) {
			g.Errorf("%s: another array of extents came back", b.Op)
		}
	}
}

func testReusedInsideDone(g *rig) {
	const count = 300
	c := g.client(0, 1)
	done := make(chan datapath.Status, 1)
	r := &datapath.Request{Op: datapath.OpWrite, Length: datapath.BlockSize, Buf: pattern(1, datapath.BlockSize)}
	left := count
	r.Done = func(r *datapath.Request) {
		c.ended(r)
		if left--; left == 0 || r.Status != datapath.StatusOK {
			done <- r.Status
			return
		}
		r.Op ^= datapath.OpRead ^ datapath.OpWrite // by turns
		r.Status, r.Offset = 0xff, uint64(left%64)*datapath.BlockSize
		c.submit(r)
	}
	c.run(func() { c.submit(r) })
	if s := <-done; s != datapath.StatusOK {
		g.Fatalf("%s: %s", r.Op, s)
	}
}

func testFullDepth(g *rig) {
	for _, depth := range []int{1, 2, 7, 128} {
		c := g.client(0, depth)
		for range 3 {
			var requests []*datapath.Request
			for offset := uint64(0); len(requests) < depth; offset += 256 << 10 {
				requests = append(requests, g.everyOp(offset%(SizeMin-256<<10))...)
			}
			c.must(requests[:depth]...)
			one := make([]*datapath.Request, depth)
			for op := datapath.OpRead; op < datapath.OpCount; op++ {
				n := 0
				for i := 0; n < depth && i < 4*depth; i++ {
					for _, r := range g.everyOp(uint64(i) % 16 * 128 << 10) {
						if r.Op == op && n < depth {
							one[n] = r
							n++
						}
					}
				}
				c.must(one[:n]...)
			}
		}
	}
}

// inArena runs f with a buffer of the client's reactor.
func (c *client) inArena(length int, f func(b []byte)) {
	c.g.Helper()
	var b []byte
	c.run(func() { b = c.reactor.Buffers().Alloc(length) })
	if b == nil {
		c.g.Fatalf("no buffer of %d bytes", length)
	}
	f(b)
	c.run(func() { c.reactor.FreeBuffer(b) })
}

func testBufferKinds(g *rig) {
	c := g.client(0, 4)
	const length = 3 * datapath.BlockSize
	heap := make([]byte, length+datapath.BlockSize)
	for name, b := range map[string][]byte{
		"heap":           heap[:length],
		"heap, odd":      heap[1 : 1+length],
		"end of an heap": heap[datapath.BlockSize:],
	} {
		want := pattern(uint64(len(name)), length)
		copy(b, want)
		c.write(0, b)
		clear(b)
		c.must(&datapath.Request{Op: datapath.OpRead, Length: length, Buf: b})
		if !bytes.Equal(b, want) && !g.options.Forgets {
			g.Errorf("%s: other bytes came back", name)
		}
	}
	c.inArena(length+1, func(b []byte) {
		for _, start := range []int{0, 1} {
			b := b[start : start+length]
			want := pattern(uint64(start), length)
			copy(b, want)
			c.write(length, b)
			clear(b)
			c.must(&datapath.Request{Op: datapath.OpRead, Offset: length, Length: length, Buf: b})
			if !bytes.Equal(b, want) && !g.options.Forgets {
				g.Errorf("arena, %d bytes in: other bytes came back", start)
			}
		}
	})
}

func testBuffersNotKept(g *rig) {
	c := g.client(0, clientDepth)
	for _, length := range []uint64{g.unit(), datapath.BlockSize, 64 << 10} {
		c.inArena(int(length), func(b []byte) {
			want := pattern(length, length)
			copy(b, want)
			c.write(0, b)
			if !bytes.Equal(b, want) {
				g.Fatalf("a write of %d bytes changed its buffer", length)
			}
			fill(b, 99) // the device no longer looks
			c.expect(0, want, "after the buffer of the write was used again")
		})
	}
}

func testBuffersNotTouched(g *rig) {
	c := g.client(0, clientDepth)
	c.write(0, pattern(1, 64<<10))
	var buffers [][]byte
	for i := range clientDepth {
		b := make([]byte, 64<<10)
		r := &datapath.Request{Op: datapath.OpRead, Length: 64 << 10, Buf: b}
		if i%2 == 1 {
			r.Op = datapath.OpWrite
			fill(b, 1)
		}
		c.must(r)
		fill(b, uint64(100+i))
		buffers = append(buffers, b)
	}
	for range 4 { // time in which a late copy would show
		c.must(g.everyOp(128 << 10)...)
	}
	for i, b := range buffers {
		if !bytes.Equal(b, pattern(uint64(100+i), 64<<10)) {
			g.Errorf("the buffer of request %d changed after Done", i)
		}
	}
}

func testLend(g *rig) {
	const length = 64 << 10
	c := g.client(0, clientDepth)
	want := pattern(1, 4*length)
	if g.options.Forgets {
		clear(want)
	}
	c.write(0, want)
	mine := make([]byte, length)
	lent := 0
	for i := range 64 {
		offset := uint64(i) * 997 / g.unit() * g.unit()
		n := max(uint64(length>>(i%6))/g.unit()*g.unit(), g.unit())
		fill(mine, uint64(i))
		r := &datapath.Request{Op: datapath.OpRead, Flags: datapath.FlagLend, Offset: offset, Length: n, Buf: mine[:n]}
		c.must(r)
		if uint64(len(r.Buf)) != n || !bytes.Equal(r.Buf, want[offset:offset+n]) {
			g.Fatalf("read of %d bytes at %d with FlagLend: other bytes", n, offset)
		}
		if &r.Buf[0] != &mine[0] {
			lent++
		}
	}
	g.Logf("%d of 64 reads were lent", lent)
}

func testImmediate(g *rig) {
	if !g.info.Has(datapath.FeatureImmediate) {
		g.Skip("the device takes data when it comes to it")
	}
	const length = 3 * datapath.BlockSize
	c := g.client(0, clientDepth)
	b := make([]byte, length)
	for i := range 16 {
		done := make(chan datapath.Status, 1)
		r := &datapath.Request{Op: datapath.OpWrite, Offset: uint64(i) * length, Length: length, Buf: b}
		r.Done = func(r *datapath.Request) { c.ended(r); done <- r.Status }
		c.run(func() {
			fill(b, uint64(i))
			c.submit(r)
			fill(b, 1000)
		})
		if s := <-done; s != datapath.StatusOK {
			g.Fatalf("write: %s", s)
		}
	}
	for i := range 16 {
		c.expect(uint64(i)*length, pattern(uint64(i), length), "though the buffer was used again after Submit")
	}
}

// testBounds asks as an export does: what Validate refuses is not submitted.
func testBounds(g *rig) {
	size := g.info.Size
	for _, test := range []struct {
		op             datapath.Op
		offset, length uint64
		want           datapath.Status
	}{
		{datapath.OpRead, size, g.unit(), datapath.StatusInvalid},
		{datapath.OpRead, size - g.unit(), 2 * g.unit(), datapath.StatusInvalid},
		{datapath.OpRead, math.MaxUint64 - g.unit() + 1, g.unit(), datapath.StatusInvalid},
		{datapath.OpRead, g.unit(), math.MaxUint64 - g.unit() + 1, datapath.StatusInvalid},
		{datapath.OpWrite, size, g.unit(), datapath.StatusNoSpace},
		{datapath.OpWrite, size - g.unit(), 2 * g.unit(), datapath.StatusNoSpace},
		{datapath.OpWriteZeroes, size - g.unit(), 2 * g.unit(), datapath.StatusNoSpace},
		{datapath.OpDiscard, size - g.unit(), 2 * g.unit(), datapath.StatusInvalid},
		{datapath.OpExtents, size, g.unit(), datapath.StatusInvalid},
		{datapath.OpCache, size, g.unit(), datapath.StatusInvalid},
		{datapath.OpRead, size - g.unit(), g.unit(), datapath.StatusOK},
		{datapath.OpWrite, 0, size, datapath.StatusOK},
		{datapath.OpFlush, 0, 0, datapath.StatusOK},
	} {
		r := datapath.Request{Op: test.op, Offset: test.offset, Length: test.length}
		if got := datapath.Validate(&g.info, &r); got != test.want {
			g.Errorf("%s of %d bytes at %d of %d: %s, want %s", test.op, test.length, test.offset, size, got, test.want)
		}
	}
	if g.unit() > 1 {
		r := datapath.Request{Op: datapath.OpRead, Offset: 1, Length: g.unit()}
		if got := datapath.Validate(&g.info, &r); got != datapath.StatusInvalid {
			g.Errorf("offset 1 with MinIO %d: %s", g.unit(), got)
		}
	}
}

func testEdges(g *rig) {
	c := g.client(0, 4)
	last := pattern(1, g.unit())
	c.write(g.info.Size-g.unit(), last)
	c.expect(g.info.Size-g.unit(), last, "last bytes")
	tail := pattern(2, 3*datapath.BlockSize/g.unit()*g.unit())
	c.write(g.info.Size-uint64(len(tail)), tail)
	c.expect(g.info.Size-uint64(len(tail)), tail, "tail")
	first := pattern(3, g.unit())
	c.write(0, first)
	c.expect(0, first, "first bytes")
	for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite} {
		for _, offset := range []uint64{0, g.info.Size} {
			r := &datapath.Request{Op: op, Offset: offset, Buf: []byte{}}
			if c.do(r); r.Status != datapath.StatusOK && r.Status != datapath.StatusInvalid {
				g.Errorf("%s of no bytes at %d: %s", op, offset, r.Status)
			}
		}
	}
	c.expect(0, first, "first bytes after requests of no bytes")
}

func testUnsupported(g *rig) {
	c := g.client(0, 4)
	data := pattern(1, datapath.BlockSize)
	c.write(0, data)
	for _, test := range []struct {
		op      datapath.Op
		feature datapath.Features
	}{
		{datapath.OpFlush, datapath.FeatureFlush},
		{datapath.OpDiscard, datapath.FeatureDiscard},
		{datapath.OpWriteZeroes, datapath.FeatureWriteZeroes},
		{datapath.OpCache, datapath.FeatureCache},
		{datapath.OpExtents, datapath.FeatureExtents},
	} {
		if g.info.Has(test.feature) {
			continue
		}
		r := &datapath.Request{Op: test.op, Length: datapath.BlockSize}
		if test.op == datapath.OpFlush {
			r.Length = 0
		}
		if test.op == datapath.OpExtents {
			r.Context, r.Extents = datapath.ContextAllocation, make([]datapath.Extent, 0, 1)
		}
		if c.do(r); r.Status != datapath.StatusNotSupported {
			g.Errorf("%s, which the device does not list: %s", test.op, r.Status)
		}
	}
	c.expect(0, data, "after operations that are not supported")
	if g.info.Has(datapath.FeatureExtents) {
		r := &datapath.Request{Op: datapath.OpExtents, Length: datapath.BlockSize, Context: "no:such", Extents: make([]datapath.Extent, 0, 1)}
		if c.do(r); r.Status == datapath.StatusOK {
			g.Error("extents of an unknown context succeeded")
		}
	}
}

// crash closes the clients, loses what is not durable, and opens the device again.
func (g *rig) crash() {
	g.Helper()
	g.closeClients()
	below := g.dev.(interface{ Unwrap() datapath.Device }).Unwrap()
	g.dev = nil // Crash closes it
	g.use(g.options.Crash(g.T, below))
}

func testFlushCovers(g *rig) {
	if !g.info.Has(datapath.FeatureFlush) {
		g.Skip("the device has no flush")
	}
	const count, length = 24, 3 * datapath.BlockSize
	var writers []*client
	for i := range 3 {
		writers = append(writers, g.client(i, clientDepth))
	}
	flusher := g.client(1, 2)
	for i := range count {
		writers[i%3].write(uint64(i)*length, pattern(uint64(i), length))
	}
	flusher.flush()
	if g.options.Crash == nil {
		g.Log("the device cannot crash here: only what is visible was checked")
	} else {
		g.crash()
	}
	c := g.client(2, 2)
	for i := range count {
		c.expect(uint64(i)*length, pattern(uint64(i), length), "after a flush on another queue")
	}
}

func testFUA(g *rig) {
	if !g.info.Has(datapath.FeatureFUA) {
		g.Skip("the device has no FUA")
	}
	const count = 8
	c := g.client(0, clientDepth)
	c.write(0, pattern(77, 1<<20)) // not durable
	offset := func(i int) uint64 { return uint64(i) * 5 * datapath.BlockSize }
	length := func(i int) uint64 { return max(uint64(i+1)*datapath.BlockSize/2/g.unit()*g.unit(), g.unit()) }
	for i := range count {
		c.writeFlags(offset(i), pattern(uint64(i), length(i)), datapath.FlagFUA)
	}
	zeroed := uint64(count*5) * datapath.BlockSize
	if g.info.Has(datapath.FeatureWriteZeroes) {
		c.must(&datapath.Request{Op: datapath.OpWriteZeroes, Flags: datapath.FlagFUA, Offset: zeroed, Length: datapath.BlockSize})
	}
	if g.options.Crash != nil {
		g.crash()
		c = g.client(0, clientDepth)
	}
	for i := range count {
		c.expect(offset(i), pattern(uint64(i), length(i)), "after a write with FUA")
	}
	if g.info.Has(datapath.FeatureWriteZeroes) {
		c.expect(zeroed, zeros[:], "after a write-zeroes with FUA")
	}
}

func testReadOnly(g *rig) {
	if g.options.ReadOnly == nil {
		g.Skip("there is no read-only device of this kind")
	}
	if err := g.dev.Close(); err != nil {
		g.Fatal(err)
	}
	g.use(g.options.ReadOnly(g.T))
	if !g.info.ReadOnly {
		g.Fatal("Info does not say that the device is read-only")
	}
	for _, op := range []datapath.Op{datapath.OpWrite, datapath.OpDiscard, datapath.OpWriteZeroes} {
		r := &datapath.Request{Op: op, Length: datapath.BlockSize}
		if s := datapath.Validate(&g.info, r); s != datapath.StatusReadOnly {
			g.Errorf("%s: %s", op, s)
		}
	}
	c := g.client(0, 4)
	c.read(0, datapath.BlockSize)
	if g.info.Has(datapath.FeatureFlush) {
		c.flush()
	}
}

func testResize(g *rig) {
	if g.options.Resize == nil {
		g.Skip("the device cannot change its size here")
	}
	c := g.client(0, 4)
	data := pattern(1, datapath.BlockSize)
	old := g.info.Size
	c.write(old-datapath.BlockSize, data)
	below := g.dev.(interface{ Unwrap() datapath.Device }).Unwrap()
	size := old + 1<<20
	if err := g.options.Resize(below, size); err != nil {
		g.Fatal(err)
	}
	if got := g.dev.Info().Size; got != size {
		g.Fatalf("size %d after a resize to %d", got, size)
	}
	c.expect(old-datapath.BlockSize, data, "below the old end")
	c.expect(old, make([]byte, 1<<20), "past the old end")
	c.write(size-datapath.BlockSize, data) // on a queue that was open before
	c.expect(size-datapath.BlockSize, data, "new end")
}

func testQueueCycles(g *rig) {
	for cycle := range 20 {
		c := g.client(cycle, 1+cycle*7%60)
		data := pattern(uint64(cycle), datapath.BlockSize)
		c.write(uint64(cycle)*datapath.BlockSize, data)
		c.close()
		g.clients = g.clients[:0]
		other := g.client(cycle+1, 2)
		other.expect(uint64(cycle)*datapath.BlockSize, data, "after its queue was closed")
		other.close()
		g.clients = g.clients[:0]
	}
}

func testManyQueues(g *rig) {
	const count = 12
	var clients []*client
	for i := range count {
		clients = append(clients, g.client(i, 8))
	}
	for i, c := range clients {
		c.write(uint64(i)*datapath.BlockSize, pattern(uint64(i), datapath.BlockSize))
	}
	for i := range clients {
		clients[(i+5)%count].expect(uint64(i)*datapath.BlockSize, pattern(uint64(i), datapath.BlockSize), "on another queue")
	}
}

// testAllocations drives whole rounds of full depth, from one message to the
// reactor to the last completion.
func testAllocations(g *rig) {
	if raceEnabled {
		g.Skip("the race detector allocates")
	}
	const depth, length = 16, 2 * datapath.BlockSize
	c := g.client(0, depth)
	type round struct {
		name     string
		requests []*datapath.Request
	}
	rounds := []round{{name: "every operation"}, {name: "reads"}, {name: "writes"}, {name: "reads from the heap"}}
	rounds[0].requests = g.everyOp(0)
	var buffers [][]byte
	c.run(func() {
		for i := range depth {
			for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite} {
				b := c.reactor.Buffers().Alloc(length)
				buffers = append(buffers, b)
				rounds[1+op].requests = append(rounds[1+op].requests,
					&datapath.Request{Op: op, Offset: uint64(i) * length, Length: length, Buf: b})
			}
			rounds[3].requests = append(rounds[3].requests,
				&datapath.Request{Op: datapath.OpRead, Offset: uint64(i) * length, Length: length, Buf: make([]byte, length)})
		}
	})
	for _, round := range rounds {
		if n := c.allocations(round.requests); n != 0 {
			g.Errorf("%s: %v allocations in a round of %d requests", round.name, n, len(round.requests))
		}
	}
	c.run(func() {
		for _, b := range buffers {
			c.reactor.FreeBuffer(b)
		}
	})
}

// allocations is how many allocations a round of these requests makes.
func (c *client) allocations(requests []*datapath.Request) float64 {
	c.g.Helper()
	done := make(chan struct{}, 1)
	left := 0
	ended := func(r *datapath.Request) {
		if r.Status != datapath.StatusOK {
			c.g.Errorf("%s: %s", r.Op, r.Status)
		}
		if left--; left == 0 {
			done <- struct{}{}
		}
	}
	for i, r := range requests {
		r.Tag, r.Done = uint32(i), ended
	}
	round := &roundTask{}
	round.run = func() {
		left = len(requests)
		for _, r := range requests {
			c.queue.Submit(r)
		}
	}
	once := func() {
		c.reactor.Post(round)
		<-done
	}
	for range 50 { // heaps, lists and threads grow to their size
		once()
	}
	return testing.AllocsPerRun(100, once)
}

func (r *rig) String() string { return fmt.Sprintf("%s: %s", r.Name(), r.info.Description) }
