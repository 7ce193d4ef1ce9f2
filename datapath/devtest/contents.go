package devtest

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// roundTask is a message made once.
type roundTask struct{ run func() }

// RunTask implements [reactor.Task].
func (t *roundTask) RunTask(*reactor.Reactor) { t.run() }

func testLarge(g *rig) {
	c := g.client(0, 4)
	n := g.largest()
	all := pattern(1, n+64)
	for i, length := range []uint64{n, n - g.unit(), n/2 + g.unit(), datapath.BlockSize + g.unit()} {
		for _, offset := range []uint64{0, g.info.Size - length, min(g.unit(), g.info.Size-length)} {
			offset -= offset % g.unit()
			data := all[uint64(i)*8 : uint64(i)*8+length]
			c.write(offset, data)
			c.expect(offset, data, fmt.Sprintf("%d bytes in one request", length))
		}
	}
	c.inArena(int(n), func(b []byte) {
		fill(b, 5)
		c.write(0, b)
		want := pattern(5, n)
		clear(b)
		c.must(&datapath.Request{Op: datapath.OpRead, Length: n, Buf: b})
		if !bytes.Equal(b, want) && !g.options.Forgets {
			g.Errorf("a buffer of the arena of %d bytes came back with other bytes", n)
		}
	})
	if g.info.Has(datapath.FeatureWriteZeroes) {
		c.must(&datapath.Request{Op: datapath.OpWriteZeroes, Length: g.info.Size / g.unit() * g.unit()})
		c.expect(0, make([]byte, n), "after the whole device was zeroed")
		c.expect(g.info.Size-n, make([]byte, n), "after the whole device was zeroed")
	}
}

// testNeighbours has several queues write, at the same time, bytes that share
// blocks: each checks that its own bytes stay as it wrote them.
func testNeighbours(g *rig) {
	if g.unit() >= datapath.BlockSize {
		g.Skip("requests are whole blocks")
	}
	sizes := []uint64{512}
	if g.unit() == 1 {
		sizes = append(sizes, 700, 1, 4095)
	} else {
		sizes[0] = g.unit()
	}
	for _, size := range sizes {
		const rounds, stripes = 30, 24
		clients := []*client{g.client(0, stripes), g.client(1, stripes), g.client(2, stripes)}
		errs := make(chan error, len(clients))
		for k, c := range clients {
			go func() { // ends after its rounds
				var err error
				defer func() { errs <- err }()
				offset := func(i int) uint64 { return uint64(i*len(clients)+k) * size }
				for round := range rounds {
					var writes, reads []*datapath.Request
					for i := range stripes {
						data := pattern(uint64(k)<<40|uint64(round)<<20|uint64(i), size)
						writes = append(writes, &datapath.Request{Op: datapath.OpWrite, Offset: offset(i), Length: size, Buf: data})
						reads = append(reads, &datapath.Request{Op: datapath.OpRead, Offset: offset(i), Length: size, Buf: make([]byte, size)})
					}
					for _, batch := range [][]*datapath.Request{writes, reads} {
						if err = c.try(batch); err != nil {
							return
						}
					}
					for i, r := range reads {
						if !bytes.Equal(r.Buf, writes[i].Buf) && !g.options.Forgets {
							err = fmt.Errorf("round %d: %d bytes at %d, written next to neighbours, came back changed", round, size, r.Offset)
							return
						}
					}
				}
			}()
		}
		for range clients {
			if err := <-errs; err != nil {
				g.Error(err)
			}
		}
		if g.Failed() {
			g.FailNow()
		}
	}
}

// try is must for goroutines other than the test's.
func (c *client) try(requests []*datapath.Request) error {
	done := make(chan struct{})
	left := len(requests)
	for i, r := range requests {
		r.Tag = uint32(i)
		r.Done = func(r *datapath.Request) {
			c.ended(r)
			if left--; left == 0 {
				close(done)
			}
		}
	}
	err := c.reactor.Run(func(*reactor.Reactor) {
		for _, r := range requests {
			c.submit(r)
		}
	})
	if err != nil {
		return err
	}
	<-done
	for _, r := range requests {
		if r.Status != datapath.StatusOK {
			return fmt.Errorf("%s of %d bytes at %d: %s", r.Op, r.Length, r.Offset, r.Status)
		}
	}
	return nil
}

// ranges are pieces of the first 640 KiB, aligned in every way the device allows.
func (g *rig) ranges() [][2]uint64 {
	u := g.unit()
	all := [][2]uint64{
		{0, datapath.BlockSize}, {datapath.BlockSize, 15 * datapath.BlockSize},
		{0, 256 << 10}, {64 << 10, 64 << 10}, {96 << 10, 512 << 10},
		{u, u}, {datapath.BlockSize - u, 2 * u}, {320 << 10, 192<<10 - u}, {64<<10 + u, 200 << 10},
	}
	return slices.DeleteFunc(all, func(r [2]uint64) bool { return r[0]%u != 0 || r[1]%u != 0 || r[1] == 0 })
}

func testWriteZeroes(g *rig) {
	if !g.info.Has(datapath.FeatureWriteZeroes) {
		g.Skip("the device has no write-zeroes")
	}
	const area = 640 << 10
	c := g.client(0, 8)
	flags := []datapath.Flags{0, datapath.FlagNoUnmap}
	if g.info.Has(datapath.FeatureFUA) {
		flags = append(flags, datapath.FlagFUA, datapath.FlagFUA|datapath.FlagNoUnmap)
	}
	want := pattern(0, area)
	c.write(0, want)
	for i, f := range append(flags, datapath.FlagFastZero, datapath.FlagFastZero|datapath.FlagNoUnmap) {
		for _, at := range g.ranges() {
			r := &datapath.Request{Op: datapath.OpWriteZeroes, Flags: f, Offset: at[0], Length: at[1]}
			c.do(r)
			switch {
			case r.Status == datapath.StatusOK:
				clear(want[at[0] : at[0]+at[1]])
			case f&datapath.FlagFastZero != 0 && r.Status == datapath.StatusNotSupported: // and nothing has changed
			default:
				g.Fatalf("write-zeroes %d+%d, flags %#x: %s", at[0], at[1], f, r.Status)
			}
			c.expect(0, want, fmt.Sprintf("after write-zeroes %d+%d, flags %#x", at[0], at[1], f))
			fill(want[at[0]:at[0]+at[1]], uint64(i))
			c.write(at[0], want[at[0]:at[0]+at[1]])
			c.expect(0, want, "written again after write-zeroes")
		}
	}
}

func testDiscard(g *rig) {
	if !g.info.Has(datapath.FeatureDiscard) {
		g.Skip("the device has no discard")
	}
	const area = 640 << 10
	c := g.client(0, 8)
	want := pattern(0, area)
	c.write(0, want)
	for _, at := range g.ranges() {
		c.must(&datapath.Request{Op: datapath.OpDiscard, Offset: at[0], Length: at[1]})
		if g.options.DiscardZeroes {
			clear(want[at[0] : at[0]+at[1]])
			c.expect(0, want, fmt.Sprintf("after discard %d+%d", at[0], at[1]))
		} else {
			c.expect(0, want[:at[0]], fmt.Sprintf("before discard %d+%d", at[0], at[1]))
			c.expect(at[0]+at[1], want[at[0]+at[1]:], fmt.Sprintf("behind discard %d+%d", at[0], at[1]))
		}
		fill(want[at[0]:at[0]+at[1]], at[1])
		c.write(at[0], want[at[0]:at[0]+at[1]])
		c.expect(0, want, "written again after discard")
	}
}

// extents walks the allocation map of a range in requests of at most places
// extents.
func (c *client) extents(offset, length uint64, places int, flags datapath.Flags) []datapath.Extent {
	c.g.Helper()
	var all []datapath.Extent
	for length > 0 {
		r := &datapath.Request{Op: datapath.OpExtents, Flags: flags, Offset: offset, Length: length,
			Context: datapath.ContextAllocation, Extents: make([]datapath.Extent, 0, places)}
		c.must(r)
		if len(r.Extents) == 0 {
			c.g.Fatalf("no extents at %d", offset)
		}
		for _, e := range r.Extents {
			e.Length = min(e.Length, length)
			if e.Length == 0 {
				c.g.Fatalf("an extent at %d is empty or begins past the range", offset)
			}
			all = append(all, e)
			offset, length = offset+e.Length, length-e.Length
		}
	}
	return all
}

func testExtents(g *rig) {
	if !g.info.Has(datapath.FeatureExtents) {
		g.Skip("the device has no extents")
	}
	const area = 2 << 20
	c := g.client(0, 8)
	c.write(0, pattern(1, area))
	if g.info.Has(datapath.FeatureWriteZeroes) {
		for i, at := range g.ranges() {
			if i%3 == 0 {
				c.must(&datapath.Request{Op: datapath.OpWriteZeroes, Offset: at[0], Length: at[1]})
			}
		}
		c.must(&datapath.Request{Op: datapath.OpWriteZeroes, Offset: 1 << 20, Length: 256 << 10})
		c.must(&datapath.Request{Op: datapath.OpWriteZeroes, Offset: 1536 << 10, Length: 256 << 10, Flags: datapath.FlagNoUnmap})
	}
	content := c.read(0, area)
	for _, places := range []int{1, 3, 1024} {
		for _, flags := range []datapath.Flags{0, datapath.FlagOneExtent} {
			for _, offset := range []uint64{0, 128 << 10, 1<<20 + g.unit()} {
				at := offset
				for _, e := range c.extents(offset, area-offset, places, flags) {
					if e.State&^(datapath.ExtentHole|datapath.ExtentZero) != 0 {
						g.Fatalf("state %#x at %d", e.State, at)
					}
					if e.State&datapath.ExtentZero != 0 && !isZero(content[at:at+e.Length]) {
						g.Fatalf("extent %d+%d reads as zeros, says the device; it holds data", at, e.Length)
					}
					if g.info.Has(datapath.FeatureWriteZeroes) && !g.options.Forgets && e.State&datapath.ExtentHole != 0 &&
						at < 1792<<10 && at+e.Length > 1536<<10 {
						g.Fatalf("extent %d+%d is a hole; it was zeroed with FlagNoUnmap", at, e.Length)
					}
					at += e.Length
				}
				if at != area {
					g.Fatalf("extents from %d end at %d, not at %d", offset, at, area)
				}
			}
		}
	}
	c.extents(0, g.info.Size, 16, 0)
}
