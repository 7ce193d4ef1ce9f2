package pool

import (
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath"
)

// advanceRead begins the next piece of a read. It reports whether there may be
// more to begin now.
func (s *slot) advanceRead() bool {
	q := s.q
	at := s.next
	v, b := uint32(at>>clusterShift), uint32(at%clusterSize/blockSize)
	head := q.v.head.Load()
	if at%blockSize != 0 || s.end-at < blockSize {
		return s.readPart(head, v, b)
	}
	blocks := uint32(min((s.end-at)/blockSize, readMax/blockSize))
	cluster, count := head.locate(v, b, min(blocks, clusterBlocks-b))
	buf := s.r.Buf[at-s.r.Offset:]
	if cluster == noCluster {
		n := uint64(count) * blockSize
		clear(buf[:n])
		s.next += n
		return true
	}
	// What follows on the disk comes in the same request.
	for last, next := cluster, v+1; b+count == (next-v)*clusterBlocks && count < blocks; next++ {
		c, n := head.locate(next, 0, min(blocks-count, clusterBlocks))
		if c != last+1 || c/q.p.zoneClusters != cluster/q.p.zoneClusters {
			break
		}
		last, count = c, count+n
	}
	c := q.takePiece(s)
	if c == nil {
		return false
	}
	s.zero = false
	n := uint64(count) * blockSize
	c.v, c.first, c.count, c.cluster, c.buf = v, b, count, cluster, buf[:n:n]
	s.next += n
	d, offset := q.p.address(cluster)
	c.toDisk()
	c.submit(datapath.OpRead, 0, d, offset+uint64(b)*blockSize, c.buf, (*piece).readDone)
	return true
}

// readPart reads a part of block b of cluster v through a bounce buffer.
func (s *slot) readPart(head *layer, v, b uint32) bool {
	q := s.q
	from := s.next % blockSize
	n := min(blockSize-from, s.end-s.next)
	part := s.r.Buf[s.next-s.r.Offset:][:n]
	cluster, _ := head.locate(v, b, 1)
	if cluster == noCluster {
		clear(part)
		s.next += n
		return true
	}
	c := q.takePiece(s)
	if c == nil {
		return false
	}
	s.zero = false
	s.next += n
	c.v, c.first, c.count, c.cluster, c.part, c.from = v, b, 1, cluster, part, int(from)
	if c.takeBounce((*piece).startReadPart) {
		c.startReadPart()
	}
	return true
}

func (c *piece) startReadPart() {
	c.buf = c.bounce
	if c.cluster, _ = c.q.v.head.Load().locate(c.v, c.first, 1); c.cluster == noCluster { // it may have waited
		clear(c.part)
		c.end(datapath.StatusOK)
		return
	}
	d, offset := c.q.p.address(c.cluster)
	c.toDisk()
	c.submit(datapath.OpRead, 0, d, offset+uint64(c.first)*blockSize, c.buf, (*piece).readDone)
}

func (c *piece) readDone() {
	c.fromDisk(datapath.StageFinish)
	if c.req.Status != datapath.StatusOK {
		c.diskFailed("read")
		c.end(datapath.StatusIO)
		return
	}
	c.verify()
}

// verify compares every block read with its checksum. It may be left and called
// again when checksums have been loaded.
func (c *piece) verify() {
	p := c.q.p
	for c.done < c.count {
		i := c.first + c.done
		cluster := c.cluster + i/clusterBlocks
		g, index, block := p.region(cluster)
		page := g.page.Load()
		if page == nil {
			if c.err != nil {
				c.diskFailed("read of checksums")
				c.end(datapath.StatusIO)
				return
			}
			if !c.needSums(index, (*piece).verify) {
				return
			}
			continue
		}
		if g.state.Load()&(regionUsed|regionNext) != regionUsed {
			g.touch()
			c.q.comesTo(g, index, false)
		}
		for {
			data := c.buf[c.done*blockSize:][:blockSize]
			if checksum(data) != page.sums[block+i%clusterBlocks].Load() {
				c.mismatch()
				return
			}
			c.done++
			i++
			if c.done == c.count || i%clusterBlocks == 0 {
				break
			}
		}
	}
	c.readEnd()
}

func (c *piece) readEnd() {
	if c.part != nil {
		copy(c.part, c.bounce[c.from:])
	}
	c.end(datapath.StatusOK)
}

// mismatch deals with block c.done, which is not what its checksum says: a write
// may have been under way, so it is read again with writes locked out.
func (c *piece) mismatch() {
	i := c.first + c.done
	c.v, c.first, c.cluster = c.v+i/clusterBlocks, i%clusterBlocks, c.cluster+i/clusterBlocks
	c.buf, c.count, c.done = c.buf[c.done*blockSize:], c.count-c.done, 0
	c.mask = 1 << c.first
	c.tries = 0
	c.readAgain()
}

func (c *piece) readAgain() {
	if !c.lock((*piece).readAgain) {
		return
	}
	head := c.q.v.head.Load()
	cluster, _ := head.locate(c.v, c.first, 1)
	if cluster == noCluster {
		clear(c.buf[:blockSize])
		c.oneProven()
		return
	}
	c.again = cluster
	d, offset := c.q.p.address(cluster)
	c.toDisk()
	c.submit(datapath.OpRead, 0, d, offset+uint64(c.first)*blockSize, c.buf[:blockSize], (*piece).readAgainDone)
}

func (c *piece) readAgainDone() {
	c.fromDisk(datapath.StageFinish)
	if c.req.Status != datapath.StatusOK {
		c.diskFailed("read")
		c.end(datapath.StatusIO)
		return
	}
	c.verifyAgain()
}

func (c *piece) verifyAgain() {
	p := c.q.p
	g, index, block := p.region(c.again)
	page := g.page.Load()
	if page == nil {
		if c.err != nil {
			c.diskFailed("read of checksums")
			c.end(datapath.StatusIO)
			return
		}
		if c.needSums(index, (*piece).verifyAgain) {
			c.verifyAgain()
		}
		return
	}
	if checksum(c.buf[:blockSize]) == page.sums[block+c.first].Load() {
		c.oneProven()
		return
	}
	if c.tries++; c.tries < 2 {
		c.readAgain()
		return
	}
	d, offset := p.address(c.again)
	p.corrupt.Add(1)
	p.event(Event{Kind: EventCorrupt, Volume: c.q.v.name, Offset: uint64(c.v)<<clusterShift + uint64(c.first)*blockSize, Device: d.path,
		Address: offset + uint64(c.first)*blockSize, Message: "a block differs from its checksum, twice, and there is no other copy: reads of it fail"})
	c.end(datapath.StatusCorrupt)
}

// oneProven goes on behind the block that was read again.
func (c *piece) oneProven() {
	c.unlock()
	if c.count == 1 {
		c.readEnd()
		return
	}
	c.done = 1
	c.verify()
}

// diskFailed tells of a failed request of a disk. It is no part of the fast path.
func (c *piece) diskFailed(what string) {
	p := c.q.p
	d, offset := p.address(c.cluster)
	path := "a missing disk"
	if d != nil {
		path = d.path
	}
	p.event(Event{Kind: EventIO, Volume: c.q.v.name, Offset: uint64(c.v)<<clusterShift + uint64(c.first)*blockSize, Device: path,
		Address: offset + uint64(c.first)*blockSize, Message: fmt.Sprintf("%s failed: %v", what, c.req.Status)})
}
