package pool

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// hangAfter is when a request counts as lost.
const hangAfter = 20 * time.Second

// port is a queue and who waits for its requests.
type port struct {
	r *reactor.Reactor
	q datapath.Queue
}

func openPort(r *reactor.Reactor, d datapath.Device, depth int) (*port, error) {
	p := &port{r: r}
	var err error
	if e := r.Run(func(r *reactor.Reactor) { p.q, err = d.OpenQueue(r, depth) }); e != nil {
		return nil, e
	}
	return p, err
}

func (p *port) close() (err error) {
	if e := p.r.Run(func(*reactor.Reactor) { err = p.q.Close() }); e != nil {
		return e
	}
	return err
}

var errHang = errors.New("requests did not end")

// do submits requests in one turn and waits for all of them.
func (p *port) do(requests ...*datapath.Request) error {
	var left atomic.Int64
	left.Store(int64(len(requests)))
	done := make(chan struct{})
	for i, r := range requests {
		r.Tag, r.Status = uint32(i), datapath.Status(0xff)
		r.Done = func(*datapath.Request) {
			if left.Add(-1) == 0 {
				close(done)
			}
		}
	}
	if err := p.r.Run(func(*reactor.Reactor) {
		for _, r := range requests {
			p.q.Submit(r)
		}
	}); err != nil {
		return err
	}
	select {
	case <-done:
		return nil
	case <-time.After(hangAfter):
		return errHang
	}
}

func (p *port) one(op datapath.Op, flags datapath.Flags, offset uint64, b []byte, length uint64) (datapath.Status, error) {
	r := &datapath.Request{Op: op, Flags: flags, Offset: offset, Length: length, Buf: b}
	err := p.do(r)
	return r.Status, err
}

// worldLayer is a layer as it should be: what it was when it was frozen, and in which
// clusters it differs from its parent.
type worldLayer struct {
	parent  *worldLayer
	size    uint64
	blocks  map[uint64][]byte // by number; what is missing is zeros; the slices are immutable
	touched map[uint64]bool   // clusters
}

func (l *worldLayer) child() *worldLayer {
	return &worldLayer{parent: l, size: l.size, blocks: maps.Clone(l.blocks), touched: map[uint64]bool{}}
}

func (l *worldLayer) read(offset, length uint64) []byte {
	b := make([]byte, length)
	for i := range b {
		at := offset + uint64(i)
		if i > 0 && at%blockSize != 0 {
			continue
		}
		if data := l.blocks[at/blockSize]; data != nil {
			copy(b[i:], data[at%blockSize:])
		}
	}
	return b
}

func (l *worldLayer) write(offset uint64, b []byte) {
	for len(b) > 0 {
		n := min(uint64(len(b)), blockSize-offset%blockSize)
		block := make([]byte, blockSize)
		copy(block, l.blocks[offset/blockSize])
		copy(block[offset%blockSize:], b[:n])
		l.blocks[offset/blockSize] = block
		l.touched[offset/clusterSize] = true
		offset, b = offset+n, b[n:]
	}
}

type worldVolume struct {
	name  string
	thick bool
	head  *worldLayer
	snaps map[string]*worldLayer
	dev   datapath.Device
	port  *port
}

// world is a pool and what it should hold.
type world struct {
	*rapid.T
	outer       testing.TB
	r           *reactor.Reactor
	group       *memdisk.Group
	extra       []*memdisk.Disk // not yet part of the pool
	disks       []*memdisk.Disk
	config      Config
	pool        *Pool
	volumes     map[string]*worldVolume
	names       int
	fills       uint64
	sizeMax     uint64
	seed, draws uint64
}

// draw is one of n numbers, each as likely as the others: rapid alone prefers small
// ones, and pools would never fill up.
func (w *world) draw(n int, label string) int {
	w.draws++
	x := (w.seed + w.draws*0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9
	return int((uint64(rapid.IntRange(0, n-1).Draw(w.T, label)) + x>>33) % uint64(n))
}

func drawFrom[T any](w *world, list []T, label string) T { return list[w.draw(len(list), label)] }

func (w *world) check(err error, what string) {
	if err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

func (w *world) open() {
	w.config.Disks = nil
	for i, d := range w.disks {
		w.config.Disks = append(w.config.Disks, Disk{Path: fmt.Sprintf("mem%d", i), Device: d})
	}
	p, err := Open(w.config)
	w.check(err, "open")
	w.pool = p
	for _, v := range w.volumes {
		w.openVolume(v)
	}
}

func (w *world) openVolume(v *worldVolume) {
	var err error
	v.dev, err = w.pool.OpenVolume(v.name)
	w.check(err, "open volume")
	v.port, err = openPort(w.r, v.dev, 16)
	w.check(err, "open queue")
}

func (w *world) closeVolume(v *worldVolume) {
	if v.port != nil {
		w.check(v.port.close(), "close queue")
		w.check(v.dev.Close(), "close volume")
	}
	v.port, v.dev = nil, nil
}

func (w *world) closeVolumes() {
	for _, v := range w.volumes {
		w.closeVolume(v)
	}
}

func (w *world) pick() *worldVolume {
	if len(w.volumes) == 0 {
		w.create()
	}
	if len(w.volumes) == 0 {
		w.Skip("the pool has no room for a volume")
	}
	names := slices.Sorted(maps.Keys(w.volumes))
	return w.volumes[drawFrom(w, names, "volume")]
}

func (w *world) pickSnap(v *worldVolume) string {
	if len(v.snaps) == 0 {
		return ""
	}
	return drawFrom(w, slices.Sorted(maps.Keys(v.snaps)), "snapshot")
}

func (w *world) name(prefix string) string {
	w.names++
	return fmt.Sprintf("%s%d", prefix, w.names)
}

func (w *world) create() {
	if len(w.volumes) >= 5 {
		return
	}
	size := uint64((1 + w.draw(int(w.sizeMax/blockSize), "blocks"))) * blockSize
	thick := w.draw(3+1, "thick") == 0
	v := &worldVolume{name: w.name("v"), thick: thick, snaps: map[string]*worldLayer{},
		head: &worldLayer{size: size, blocks: map[uint64][]byte{}, touched: map[uint64]bool{}}}
	if _, err := w.pool.CreateVolume(VolumeSpec{Name: v.name, Size: size, Thick: thick}); err != nil {
		if errors.Is(err, ErrNoSpace) {
			return
		}
		w.Fatalf("create: %v", err)
	}
	w.volumes[v.name] = v
	w.openVolume(v)
}

// span draws a range of the volume; aligned ranges are as likely as others.
func (w *world) span(v *worldVolume, most uint64) (offset, length uint64) {
	size := v.head.size
	unit := drawFrom(w, []uint64{blockSize, 1, 512, clusterSize}, "unit")
	if unit > size {
		unit = blockSize
	}
	offset = uint64(w.draw(int((size-1)/unit)+1, "offset")) * unit
	length = uint64((1 + w.draw(int(max(most/unit, 1)), "length"))) * unit
	return offset, min(length, size-offset)
}

func (w *world) fill(n uint64) []byte {
	b := make([]byte, n)
	for i := range b {
		if i%64 == 0 {
			w.fills = w.fills*6364136223846793005 + 1442695040888963407
		}
		b[i] = byte(w.fills>>33) + byte(i) | 1
	}
	return b
}

// change does one change, and learns what became of it where it found no space.
func (w *world) change(v *worldVolume, op datapath.Op, flags datapath.Flags, offset uint64, data []byte, length uint64) {
	status, err := v.port.one(op, flags, offset, data, length)
	w.check(err, op.String())
	if op != datapath.OpWrite {
		data = make([]byte, length)
	}
	switch status {
	case datapath.StatusOK:
		v.head.write(offset, data)
	case datapath.StatusNoSpace:
		w.learn(v, op, offset, data, length)
	default:
		w.Fatalf("%s of %d bytes at %d: %v (%v)", op, length, offset, status, w.pool.failed())
	}
}

// learn finds out what a change did that found no space: each block is old or new.
func (w *world) learn(v *worldVolume, op datapath.Op, offset uint64, data []byte, length uint64) {
	if v.thick {
		w.Fatalf("a thick volume found no space: %+v", w.pool.Info())
	}
	got := make([]byte, length)
	if s, err := v.port.one(datapath.OpRead, 0, offset, got, length); err != nil || s != datapath.StatusOK {
		w.Fatalf("read after %s: %v %v", op, s, err)
	}
	old := v.head.read(offset, length)
	for at := uint64(0); at < length; {
		n := min(length-at, blockSize-(offset+at)%blockSize)
		if x := got[at : at+n]; !bytes.Equal(x, old[at:at+n]) && !bytes.Equal(x, data[at:at+n]) {
			w.Fatalf("%s of %d bytes at %d found no space, and block %d is neither old nor new", op, length, offset, (offset+at)/blockSize)
		}
		at += n
	}
	v.head.write(offset, got)
}

func (w *world) compare(name string, p *port, l *worldLayer, offset, length uint64) {
	got := bytes.Repeat([]byte{0xa5}, int(length))
	r := &datapath.Request{Op: datapath.OpRead, Offset: offset, Length: length, Buf: got}
	w.check(p.do(r), "read")
	if r.Status != datapath.StatusOK {
		w.Fatalf("%s: read of %d bytes at %d: %v", name, length, offset, r.Status)
	}
	if want := l.read(offset, length); !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				w.Fatalf("%s: byte %d (cluster %d, block %d of it) is %#x, want %#x", name, offset+uint64(i),
					(offset+uint64(i))/clusterSize, (offset+uint64(i))%clusterSize/blockSize, got[i], want[i])
			}
		}
	}
}

func (w *world) compareAll() {
	for _, name := range slices.Sorted(maps.Keys(w.volumes)) {
		v := w.volumes[name]
		if got := v.dev.Info().Size; got != v.head.size {
			w.Fatalf("%s has %d bytes, want %d", name, got, v.head.size)
		}
		w.compare(name, v.port, v.head, 0, v.head.size)
		infos, err := w.pool.Snapshots(name)
		w.check(err, "snapshots")
		if len(infos) != len(v.snaps) {
			w.Fatalf("%s has %d snapshots, want %d", name, len(infos), len(v.snaps))
		}
		for snap, l := range v.snaps {
			d, err := w.pool.OpenSnapshot(name, snap)
			w.check(err, "open snapshot")
			p, err := openPort(w.r, d, 4)
			w.check(err, "open queue")
			if d.Info().Size != l.size {
				w.Fatalf("%s@%s has %d bytes, want %d", name, snap, d.Info().Size, l.size)
			}
			w.compare(name+"@"+snap, p, l, 0, l.size)
			w.check(p.close(), "close queue")
			w.check(d.Close(), "close snapshot")
		}
	}
	if got := len(w.pool.Volumes()); got != len(w.volumes) {
		w.Fatalf("%d volumes, want %d", got, len(w.volumes))
	}
}

// changedClusters is what may have changed from since to l; ok is false when l does
// not come after since.
func changedClusters(l, since *worldLayer) (clusters map[uint64]bool, ok bool) {
	clusters = map[uint64]bool{}
	for x := l; x != since; x = x.parent {
		if x == nil {
			return nil, false
		}
		maps.Copy(clusters, x.touched)
	}
	return clusters, true
}

func (w *world) changes() {
	v := w.pick()
	since, until := w.pickSnap(v), ""
	to, from := v.head, (*worldLayer)(nil)
	if since != "" {
		from = v.snaps[since]
	}
	if w.draw(2, "until") == 0 {
		if until = w.pickSnap(v); until != "" {
			to = v.snaps[until]
		}
	}
	touched, ok := changedClusters(to, from)
	limit := (1 + w.draw(20, "limit"))
	changed, zero := map[uint64]bool{}, map[uint64]bool{}
	for offset := uint64(0); offset < to.size; {
		list, next, err := w.pool.Changes(v.name, since, until, offset, limit)
		if !ok {
			if !errors.Is(err, ErrInvalid) {
				w.Fatalf("changes of %s from %q to %q, which are not in one line: %v", v.name, since, until, err)
			}
			return
		}
		w.check(err, "changes")
		if next <= offset || len(list) > limit {
			w.Fatalf("changes from %d on: %d runs, next %d", offset, len(list), next)
		}
		for _, c := range list {
			if c.Offset%blockSize != 0 || c.Length%blockSize != 0 || c.Length == 0 || c.Offset < offset || c.Offset+c.Length > next {
				w.Fatalf("changes from %d to %d: %+v", offset, next, c)
			}
			for b := c.Offset / blockSize; b < (c.Offset+c.Length)/blockSize; b++ {
				changed[b], zero[b] = true, c.Zero
			}
		}
		offset = next
	}
	zeros := make([]byte, blockSize)
	for b := range to.size / blockSize {
		now, was := to.read(b*blockSize, blockSize), zeros
		if from != nil && b < from.size/blockSize {
			was = from.read(b*blockSize, blockSize)
		}
		switch {
		case !changed[b] && !bytes.Equal(now, was):
			w.Fatalf("%s: block %d has changed from %q to %q, and is not listed", v.name, b, since, until)
		case changed[b] && !touched[b*blockSize/clusterSize]:
			w.Fatalf("%s: block %d is listed as changed from %q to %q, and nothing was written near it", v.name, b, since, until)
		case zero[b] && !bytes.Equal(now, zeros):
			w.Fatalf("%s: block %d is listed as zero from %q to %q, and is not", v.name, b, since, until)
		}
	}
}

// extents asks for one context over the whole volume.
func (w *world) extents() {
	v := w.pick()
	context := drawFrom(w, v.dev.Info().Contexts, "context")
	zeros := make([]byte, blockSize)
	var from *worldLayer
	touched := map[uint64]bool{}
	if name, ok := bytes.CutPrefix([]byte(context), []byte(datapath.ContextDirtyPrefix)); ok {
		from = v.snaps[string(name)]
		if touched, ok = changedClusters(v.head, from); !ok {
			w.Fatalf("%s offers the context %s, which is not in its line", v.name, context)
		}
	}
	depth := 1
	if i, err := w.pool.Volume(v.name); err == nil {
		depth = i.Depth
	}
	for at := uint64(0); at < v.head.size; {
		r := &datapath.Request{Op: datapath.OpExtents, Offset: at, Length: v.head.size - at, Context: context, Extents: make([]datapath.Extent, 0, 7)}
		w.check(v.port.do(r), "extents")
		if r.Status != datapath.StatusOK || len(r.Extents) == 0 {
			w.Fatalf("extents of %s at %d: %v, %d", context, at, r.Status, len(r.Extents))
		}
		for _, e := range r.Extents {
			if e.Length == 0 {
				w.Fatalf("extents of %s at %d: an empty one", context, at)
			}
			for b := at / blockSize; b < min(at+e.Length, v.head.size)/blockSize; b++ {
				now := v.head.read(b*blockSize, blockSize)
				switch {
				case context == datapath.ContextAllocation && e.State&datapath.ExtentZero != 0 && !bytes.Equal(now, zeros),
					context == datapath.ContextDepth && (e.State == 0 && !bytes.Equal(now, zeros) || e.State > uint64(depth)):
					w.Fatalf("%s: %s of block %d is %d", v.name, context, b, e.State)
				case from == nil:
				case e.State == 1 && !touched[b*blockSize/clusterSize]:
					w.Fatalf("%s: %s says that block %d has changed", v.name, context, b)
				case e.State == 0:
					was := zeros
					if b < from.size/blockSize {
						was = from.read(b*blockSize, blockSize)
					}
					if !bytes.Equal(now, was) {
						w.Fatalf("%s: %s does not say that block %d has changed", v.name, context, b)
					}
				}
			}
			at += e.Length
		}
	}
}

// space checks the accounting.
func (w *world) space(when string) {
	i := w.pool.Info()
	if i.Total != i.Allocated+i.Metadata+i.Free {
		w.Fatalf("%s: %d bytes in all, but %d allocated, %d metadata, %d free", when, i.Total, i.Allocated, i.Metadata, i.Free)
	}
	p := w.pool
	p.alloc.mu.Lock()
	if a := &p.alloc; a.free+a.grace+a.forming < a.reserved+a.owedClusters(0) {
		w.Errorf("%s: %d clusters are free or will be, but %d are reserved and %d pages of metadata owed", when, a.free+a.grace+a.forming, a.reserved, a.owed.Load())
	}
	p.alloc.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	owner := map[uint32]uint32{}
	for id, l := range p.layers {
		l.each(0, func(v uint32, e entry) bool {
			if c := e.cluster(); c != noCluster {
				if other, ok := owner[c]; ok {
					w.Fatalf("%s: cluster %d belongs to layers %d and %d", when, c, id, other)
				}
				if !p.alloc.used(c, p.zoneClusters) {
					w.Fatalf("%s: cluster %d of layer %d counts as free", when, c, id)
				}
				owner[c] = id
			}
			return true
		})
	}
	if p.config.Manual && uint64(len(owner))<<clusterShift != i.Allocated {
		w.Fatalf("%s: layers own %d clusters, %d count as allocated", when, len(owner), i.Allocated>>clusterShift)
	}
}

func (w *world) maintain() {
	w.jobs()
	w.check(w.pool.Maintain(), "maintain")
	w.space("after maintenance")
}

// jobs waits for background work.
func (w *world) jobs() {
	if w.pool.config.Manual {
		return
	}
	for _, j := range w.pool.Jobs() {
		if !j.Ended.IsZero() || j.Note != "" {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		_, _ = w.pool.WaitJob(ctx, j.ID) // a merge may wait for other layers
		cancel()
	}
}

func (w *world) kill() {
	w.closeVolumes()
	w.pool.fail(errors.New("killed by the test"))
	w.check(w.pool.Close(), "close after a kill")
	w.pool = nil
}

func (w *world) flushAll() {
	for _, v := range w.volumes {
		s, err := v.port.one(datapath.OpFlush, 0, 0, nil, 0)
		w.check(err, "flush")
		if s != datapath.StatusOK {
			w.Fatalf("flush: %v (%v)", s, w.pool.failed())
		}
	}
}

var worldOps = map[string]func(w *world){
	"write": func(w *world) {
		v := w.pick()
		offset, length := w.span(v, drawFrom(w, []uint64{blockSize, 64 << 10, 600 << 10}, "most"))
		var flags datapath.Flags
		if w.draw(4+1, "fua") == 0 {
			flags = datapath.FlagFUA
		}
		w.change(v, datapath.OpWrite, flags, offset, w.fill(length), length)
	},
	"together": func(w *world) { // neighbours that share blocks, in one turn
		v := w.pick()
		offset := uint64(w.draw(int(v.head.size/512-1)+1, "offset")) * 512
		var requests []*datapath.Request
		for range 12 {
			n := min(uint64((1 + w.draw(3000, "length"))), v.head.size-offset)
			if n == 0 {
				break
			}
			requests = append(requests, &datapath.Request{Op: datapath.OpWrite, Offset: offset, Length: n, Buf: w.fill(n)})
			offset += n
		}
		w.check(v.port.do(requests...), "writes")
		for _, r := range requests {
			if r.Status == datapath.StatusOK {
				v.head.write(r.Offset, r.Buf)
			} else if r.Status != datapath.StatusNoSpace {
				w.Fatalf("write: %v", r.Status)
			}
		}
		for _, r := range requests {
			if r.Status == datapath.StatusNoSpace {
				w.learn(v, r.Op, r.Offset, r.Buf, r.Length)
			}
		}
	},
	"fill": func(w *world) {
		v := w.pick()
		data := w.fill(1 << 20)
		for at := uint64(0); at < min(v.head.size, 12<<20); at += 1 << 20 {
			n := min(v.head.size-at, 1<<20)
			w.change(v, datapath.OpWrite, 0, at, data[:n], n)
		}
	},
	"zero": func(w *world) {
		v := w.pick()
		offset, length := w.span(v, 2<<20)
		flags := drawFrom(w, []datapath.Flags{0, datapath.FlagNoUnmap, datapath.FlagFUA, datapath.FlagFastZero}, "flags")
		w.change(v, datapath.OpWriteZeroes, flags, offset, nil, length)
	},
	"discard": func(w *world) {
		v := w.pick()
		offset, length := w.span(v, 4<<20)
		w.change(v, datapath.OpDiscard, 0, offset, nil, length)
	},
	"read": func(w *world) {
		v := w.pick()
		offset, length := w.span(v, 2<<20)
		w.compare(v.name, v.port, v.head, offset, length)
	},
	"flush":  func(w *world) { w.pick(); w.flushAll() },
	"create": (*world).create,
	"snapshot": func(w *world) {
		v := w.pick()
		if len(v.snaps) >= 8 {
			return
		}
		name := w.name("s")
		if _, err := w.pool.CreateSnapshot(v.name, name, nil); err != nil {
			if errors.Is(err, ErrNoSpace) {
				return
			}
			w.Fatalf("snapshot: %v", err)
		}
		v.snaps[name] = v.head
		v.head = v.head.child()
	},
	"group": func(w *world) {
		var names []string
		for _, name := range slices.Sorted(maps.Keys(w.volumes)) {
			if len(w.volumes[name].snaps) < 8 && w.draw(3, "of the group") > 0 {
				names = append(names, name)
			}
		}
		if len(names) == 0 {
			return
		}
		snapshot := w.name("g")
		if _, err := w.pool.CreateSnapshotGroup(snapshot, names, nil); err != nil {
			if errors.Is(err, ErrNoSpace) {
				return
			}
			w.Fatalf("group: %v", err)
		}
		for _, name := range names {
			v := w.volumes[name]
			v.snaps[snapshot] = v.head
			v.head = v.head.child()
		}
	},
	"delete snapshot": func(w *world) {
		v := w.pick()
		if name := w.pickSnap(v); name != "" {
			_, err := w.pool.DeleteSnapshot(v.name, name)
			w.check(err, "delete snapshot")
			delete(v.snaps, name)
		}
	},
	"clone": func(w *world) {
		v := w.pick()
		name := w.pickSnap(v)
		if name == "" || len(w.volumes) >= 6 {
			return
		}
		c := &worldVolume{name: w.name("c"), snaps: map[string]*worldLayer{}, head: v.snaps[name].child()}
		if _, err := w.pool.Clone(v.name, name, VolumeSpec{Name: c.name}); err != nil {
			if errors.Is(err, ErrNoSpace) {
				return
			}
			w.Fatalf("clone: %v", err)
		}
		w.volumes[c.name] = c
		w.openVolume(c)
	},
	"revert": func(w *world) {
		v := w.pick()
		name := w.pickSnap(v)
		if name == "" {
			return
		}
		w.closeVolume(v)
		if err := w.pool.Revert(v.name, name); err == nil {
			size := v.head.size
			v.head = v.snaps[name].child()
			v.head.size = max(size, v.head.size)
		} else if !errors.Is(err, ErrNoSpace) {
			w.Fatalf("revert: %v", err)
		}
		w.openVolume(v)
	},
	"resize": func(w *world) {
		v := w.pick()
		size := v.head.size + uint64(w.draw(300+1, "more"))*blockSize
		if size > 2*w.sizeMax {
			return
		}
		if err := w.pool.Resize(v.name, size); err == nil {
			v.head.size = size
		} else if !errors.Is(err, ErrNoSpace) {
			w.Fatalf("resize: %v", err)
		}
	},
	"delete volume": func(w *world) {
		v := w.pick()
		cascade := w.draw(2, "cascade") == 0
		w.closeVolume(v)
		_, err := w.pool.DeleteVolume(v.name, cascade)
		if len(v.snaps) > 0 && !cascade {
			if !errors.Is(err, ErrHasSnapshots) {
				w.Fatalf("a volume with snapshots was deleted: %v", err)
			}
			w.openVolume(v)
			return
		}
		w.check(err, "delete volume")
		delete(w.volumes, v.name)
	},
	"maintain":   (*world).maintain,
	"checkpoint": func(w *world) { w.check(w.pool.checkpoint(), "checkpoint") },
	"clean":      func(w *world) { w.check(w.pool.cleanRegions(0), "clean") },
	"forget":     func(w *world) { w.pool.dropSums() },
	"ready": func(w *world) { // as a stream asks for it
		w.pool.makeReady(streamAsk{uint32(w.draw(30, "region")), w.draw(4, "change") > 0}, alignedBytes(streamGroup*pairSize))
		if w.config.Manual {
			w.check(w.pool.commitAll(), "commit") // at this point, not at some
		}
	},
	"scrub": func(w *world) {
		j, err := w.pool.Scrub(1 << 40)
		w.check(err, "scrub")
		if j, err = w.pool.WaitJob(context.Background(), j.ID); err != nil || j.Err != "" || j.Found != 0 {
			w.Fatalf("scrub: %+v, %v", j, err)
		}
	},
	"reopen": func(w *world) {
		w.closeVolumes()
		w.check(w.pool.Close(), "close")
		w.open()
		w.compareAll()
	},
	"die": func(w *world) { // the process; what was acknowledged stays
		w.kill()
		w.open()
		w.compareAll()
	},
	"power": func(w *world) { // what was flushed stays
		w.flushAll()
		w.kill()
		w.group.CrashLose()
		_ = os.Remove(w.config.CrashLog) // of another run of the kernel
		w.open()
		w.compareAll()
	},
	"grow": func(w *world) {
		d := w.disks[len(w.disks)-1]
		if size := d.Info().Size; size < 100<<20 {
			d.Truncate(size + uint64((1+w.draw(80, "more")))*clusterSize)
			w.check(w.pool.Grow(), "grow")
		}
	},
	"add disk": func(w *world) {
		if len(w.extra) == 0 {
			return
		}
		if w.draw(3, "closed") == 0 {
			w.closeVolumes()
		}
		d := w.extra[0]
		w.extra = w.extra[1:]
		w.disks = append(w.disks, d)
		w.check(w.pool.AddDisk(Disk{Path: fmt.Sprintf("mem%d", len(w.disks)-1), Device: d}), "add disk")
		for _, v := range w.volumes {
			if v.port == nil {
				w.openVolume(v)
			}
		}
	},
	"changes": (*world).changes,
	"extents": (*world).extents,
	"space":   func(w *world) { w.space("now") },
}

// worldWeights make a run mostly of changes.
var worldWeights = map[string]int{"write": 30, "fill": 3, "together": 6, "zero": 8, "discard": 8, "read": 6, "flush": 4, "create": 5, "snapshot": 8, "group": 3, "delete snapshot": 8,
	"clone": 5, "revert": 3, "resize": 3, "delete volume": 3, "maintain": 5, "checkpoint": 4, "clean": 3, "forget": 3, "ready": 5, "scrub": 2, "reopen": 3, "die": 4,
	"power": 4, "grow": 1, "add disk": 1, "changes": 5, "extents": 5, "space": 2}

// TestRandomOperationsAgreeWithModel runs random operations on pools of many shapes
// against a model in memory. A failure is shrunk; rapid prints the seed.
func TestRandomOperationsAgreeWithModel(t *testing.T) {
	checks, steps := "60", 70
	switch {
	case longTests:
		checks, steps = "1000", 150
	case testing.Short():
		checks = "200" // of which rapid does a fifth
	}
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		_ = flag.Set("rapid.checks", checks) // a number
	}
	_ = flag.Set("rapid.nofailfile", "true") // what fails is kept as a script of its own
	_ = flag.Set("rapid.shrinktime", "20s")
	var deck []string
	for _, name := range slices.Sorted(maps.Keys(worldWeights)) {
		deck = append(deck, slices.Repeat([]string{name}, worldWeights[name])...)
	}
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	dir := t.TempDir()
	if d, err := os.MkdirTemp("/dev/shm", "ashlar"); err == nil {
		t.Cleanup(func() { _ = os.RemoveAll(d) }) // a directory of the test
		dir = d
	}
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{T: rt, outer: t, r: r, volumes: map[string]*worldVolume{}, seed: rapid.Uint64().Draw(rt, "seed")}
		regions := 1 + w.draw(8, "regions a zone")
		count := 1 + w.draw(3, "disks")
		var configs []memdisk.Config
		most := drawFrom(w, []int{1, 40, 300}, "largest disk")
		for i := range count + 2 {
			configs = append(configs, memdisk.Config{Size: 7<<20 + uint64(w.draw(most, "size"))*clusterSize + 4096*uint64(i), Shuffle: i == 1})
		}
		w.group = memdisk.NewGroup(configs...)
		w.disks, w.extra = slices.Clone(w.group.Disks()[:count]), w.group.Disks()[count:]
		var disks []Disk
		for i, d := range w.disks {
			disks = append(disks, Disk{Path: fmt.Sprintf("mem%d", i), Device: d})
		}
		journal := drawFrom(w, []uint64{256 << 10, 384 << 10, 1 << 20}, "journal")
		if _, err := Format(FormatConfig{Name: "p", Disks: disks, Reactor: r, JournalBytes: journal, ZoneRegions: regions}); err != nil {
			rt.Fatal(err)
		}
		w.config = Config{Reactor: r, Log: quiet(), CrashLog: filepath.Join(dir, "pending"), Manual: w.draw(3, "background") > 0}
		w.config.SumCacheBytes = drawFrom(w, []int64{pageSize, 4 * pageSize, 0}, "sum cache")
		w.sizeMax = drawFrom(w, []uint64{256 << 10, 2 << 20, 8 << 20, 20 << 20, 60 << 20}, "largest volume")
		w.open()
		defer func() {
			if w.pool != nil { // the run failed, or ends
				for _, v := range w.volumes {
					if v.port != nil {
						_, _ = v.port.close(), v.dev.Close()
					}
				}
				_ = w.pool.Close() // whatever of it works
			}
			_ = os.Remove(w.config.CrashLog) // of this run
		}()
		for range rapid.IntRange(steps/4, steps).Draw(rt, "steps") {
			worldOps[drawFrom(w, deck, "operation")](w)
		}
		w.compareAll()
		w.maintain()
		w.compareAll()
		w.everythingComesBack()
	})
}

// everythingComesBack deletes all volumes.
func (w *world) everythingComesBack() {
	w.closeVolumes()
	for name := range w.volumes {
		_, err := w.pool.DeleteVolume(name, true)
		w.check(err, "delete volume")
	}
	clear(w.volumes)
	for range 2 {
		w.maintain()
	}
	if i := w.pool.Info(); i.Allocated != 0 || i.Reserved != 0 || i.Volumes+i.Snapshots != 0 {
		w.Fatalf("all volumes were deleted, and there are: %+v", i)
	}
	if n := len(w.pool.layers); n != 0 {
		w.Fatalf("all volumes were deleted, and there are %d layers", n)
	}
}
