package memdisk

import "github.com/ashlar-storage/ashlar/datapath"

const (
	pageSize = datapath.BlockSize

	// A node has 64 places: a copy on write of the way to one page of a disk of
	// 64 MiB then costs three nodes of 512 bytes beside the page itself.
	fanBits = 6
	fan     = 1 << fanBits

	spareMax = 256 // pages kept for the next write, so that zeroing and writing in turns allocates nothing
)

type page [pageSize]byte

// owner is an identity: who holds the pointer may change what carries it.
type owner struct{ _ byte }

// node is a place in the tree of pages. Nodes whose owner is not that of the
// content they are reached from are shared, and copied before a change.
type node struct {
	owner *owner
	below *[fan]*node // of an inner node
	pages *[fan]*page // of a leaf
	owned uint64      // of a leaf: one bit for each page that nothing shares
}

// content is a sparse array of bytes; what was never written is zero. Its zero
// value is empty.
type content struct {
	root   *node // nil: all zeros
	height int   // levels of inner nodes above the leaves
	owner  *owner
	spare  []*page // nobody else knows them; their bytes are anything
}

// snapshot is content that no longer changes. It may be read and forked from any
// goroutine.
type snapshot struct {
	root   *node
	height int
}

// freeze gives the content as it is now. What c writes later is copied first.
func (c *content) freeze() snapshot {
	c.owner = nil
	return snapshot{c.root, c.height}
}

// fork makes content that begins as s.
func (s snapshot) fork() content { return content{root: s.root, height: s.height} }

// page finds a page, nil for one of zeros.
func (c *content) page(index uint64) *page {
	n := c.root
	if n == nil || index>>(fanBits*(c.height+1)) != 0 {
		return nil
	}
	for level := c.height; level > 0; level-- {
		if n = n.below[index>>(fanBits*level)%fan]; n == nil {
			return nil
		}
	}
	return n.pages[index%fan]
}

// own makes the node at link, of the level given, one that c may change.
func (c *content) own(link **node, level int) *node {
	n := *link
	if n != nil && n.owner == c.owner {
		return n
	}
	own := &node{owner: c.owner}
	if level > 0 {
		own.below = new([fan]*node)
	} else {
		own.pages = new([fan]*page)
	}
	if n != nil && level > 0 {
		*own.below = *n.below
	} else if n != nil {
		*own.pages = *n.pages
	}
	*link = own
	return own
}

// writable is a page that c may change. When whole, all of it will be written
// and its bytes are anything.
func (c *content) writable(index uint64, whole bool) *page {
	if c.owner == nil {
		c.owner = new(owner)
	}
	for index>>(fanBits*(c.height+1)) != 0 {
		if c.root != nil {
			top := &node{owner: c.owner, below: new([fan]*node)}
			top.below[0], c.root = c.root, top
		}
		c.height++
	}
	link := &c.root
	for level := c.height; level > 0; level-- {
		link = &c.own(link, level).below[index>>(fanBits*level)%fan]
	}
	leaf, i := c.own(link, 0), index%fan
	old := leaf.pages[i]
	if old != nil && leaf.owned>>i&1 == 1 {
		return old
	}
	var p *page
	if n := len(c.spare); n > 0 {
		p, c.spare = c.spare[n-1], c.spare[:n-1]
		if old == nil && !whole {
			clear(p[:])
		}
	} else {
		p = new(page)
	}
	if old != nil && !whole {
		*p = *old
	}
	leaf.pages[i] = p
	leaf.owned |= 1 << i
	return p
}

// read fills b and reports whether no page of the range is there.
func (c *content) read(b []byte, offset uint64) (hole bool) {
	hole = true
	for len(b) > 0 {
		within := offset % pageSize
		n := min(uint64(len(b)), pageSize-within)
		if p := c.page(offset / pageSize); p != nil {
			copy(b[:n], p[within:])
			hole = false
		} else {
			clear(b[:n])
		}
		b, offset = b[n:], offset+n
	}
	return hole
}

func (c *content) write(b []byte, offset uint64) {
	for len(b) > 0 {
		within := offset % pageSize
		n := min(uint64(len(b)), pageSize-within)
		copy(c.writable(offset/pageSize, n == pageSize)[within:], b[:n])
		b, offset = b[n:], offset+n
	}
}

// zero costs what is stored in the range, not its length.
func (c *content) zero(offset, length uint64) {
	end := offset + length
	if within := offset % pageSize; within != 0 {
		n := min(length, pageSize-within)
		c.zeroPart(offset, n)
		offset += n
	}
	if whole := end / pageSize * pageSize; whole > offset {
		if c.owner == nil {
			c.owner = new(owner)
		}
		c.drop(&c.root, c.height, 0, offset/pageSize, whole/pageSize)
		offset = whole
	}
	if offset < end {
		c.zeroPart(offset, end-offset)
	}
}

// zeroPart zeroes bytes of one page.
func (c *content) zeroPart(offset, length uint64) {
	if c.page(offset/pageSize) != nil {
		clear(c.writable(offset/pageSize, false)[offset%pageSize:][:length])
	}
}

// drop removes the pages from first up to, without, end. The node at link begins
// at page base.
func (c *content) drop(link **node, level int, base, first, end uint64) {
	width := uint64(1) << (fanBits * level) // pages of one place
	if *link == nil || end <= base || base+width*fan <= first {
		return
	}
	if level > 0 && first <= base && base+width*fan <= end {
		*link = nil
		return
	}
	n := c.own(link, level)
	from := (max(first, base) - base) / width
	to := min((end-base+width-1)/width, fan)
	for i := from; i < to; i++ {
		if level > 0 {
			c.drop(&n.below[i], level-1, base+i*width, first, end)
			continue
		}
		if n.owned>>i&1 == 1 && n.pages[i] != nil && len(c.spare) < spareMax {
			c.spare = append(c.spare, n.pages[i])
		}
		n.pages[i] = nil
		n.owned &^= 1 << i
	}
}
