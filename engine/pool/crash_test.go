package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// lab opens pools on disks that crash, all on one reactor. One test goroutine
// uses it.
type lab struct {
	*testing.T
	r   *reactor.Reactor
	dir string
	log string // the crash log of the session that runs; renewed by its opens

	buffer []byte
	opens  int // pools opened
	images int // images looked at
	deep   int // of how many images one is used after the recovery
	cuts   int // about how many moments of an operation are looked at; 0: all
	again  int // of how many the recovery is crashed, too; 0: of none
}

func newLab(t *testing.T) *lab {
	dir := t.TempDir()
	if d, err := os.MkdirTemp("/dev/shm", "ashlar"); err == nil { // the log is 2 MiB, and made thousands of times
		t.Cleanup(func() { _ = os.RemoveAll(d) }) // a directory of a test
		dir = d
	}
	r, err := reactor.Start(reactor.Config{Poll: reactor.PollOff, Log: quiet()}) // there are two processors for everything
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	return &lab{T: t, r: r, dir: dir, log: filepath.Join(dir, "pending"), buffer: alignedBytes(4 << 20), deep: 1}
}

// tap is a disk that tells of each request before it is submitted, on the
// reactor.
type tap struct {
	datapath.Device
	before func(*datapath.Request)
}

type tapQueue struct {
	datapath.Queue
	t *tap
}

func (t *tap) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	q, err := t.Device.OpenQueue(r, depth)
	return &tapQueue{q, t}, err
}

func (q *tapQueue) Submit(r *datapath.Request) {
	if q.t.before != nil {
		q.t.before(r)
	}
	q.Queue.Submit(r)
}

// session is one run of a pool, from its open to its end.
type session struct {
	*lab
	group   *memdisk.Group
	before  func(*datapath.Request) // of the taps
	pool    *Pool
	clients map[string]*client
}

// session opens the pool on the disks. log is the crash log, "" for none.
func (l *lab) session(group *memdisk.Group, log string, before func(*datapath.Request)) (*session, error) {
	var disks []Disk
	for i, d := range group.Disks() {
		x := Disk{Path: fmt.Sprintf("mem%d", i), Device: &tap{d, before}}
		if i > 0 {
			if _, err := Probe(l.r, Disk{Path: x.Path, Device: d}); errors.Is(err, ErrNotPool) {
				continue // is to be added yet
			}
		}
		disks = append(disks, x)
	}
	l.opens++
	p, err := Open(Config{Disks: disks, Reactor: l.r, Manual: true, Log: quiet(), CrashLog: log})
	if err != nil {
		return nil, err
	}
	return &session{lab: l, group: group, before: before, pool: p, clients: map[string]*client{}}, nil
}

func (l *lab) mustSession(group *memdisk.Group, log string) *session {
	l.Helper()
	s, err := l.session(group, log, nil)
	if err != nil {
		l.Fatal(err)
	}
	return s
}

var errKilled = errors.New("killed by the test")

// kill ends the session as the death of its process does: nothing more is written.
func (s *session) kill() {
	s.closeClients()
	s.pool.fail(errKilled)
	if err := s.pool.Close(); err != nil {
		s.Fatalf("after a kill: %v", err)
	}
}

// close ends the session in order.
func (s *session) close() {
	s.Helper()
	s.closeClients()
	if err := s.pool.Close(); err != nil {
		s.Fatal(err)
	}
}

func (s *session) closeClients() {
	for name, c := range s.clients {
		c.close()
		delete(s.clients, name)
	}
}

// client does requests of a volume or VOLUME@SNAPSHOT and waits for them.
type client struct {
	s        *session
	dev      datapath.Device
	q        datapath.Queue
	requests [8]datapath.Request
	done     chan struct{}
	left     int
}

// RunTask implements [reactor.Task].
func (c *client) RunTask(*reactor.Reactor) {
	for i := range c.left {
		c.q.Submit(&c.requests[i])
	}
}

func (s *session) client(name string) *client {
	s.Helper()
	if c := s.clients[name]; c != nil {
		return c
	}
	c := &client{s: s, done: make(chan struct{}, 1)}
	var err error
	if volume, snapshot, ok := strings.Cut(name, "@"); ok {
		c.dev, err = s.pool.OpenSnapshot(volume, snapshot)
	} else {
		c.dev, err = s.pool.OpenVolume(name)
	}
	if err != nil {
		s.Fatal(err)
	}
	if e := s.r.Run(func(r *reactor.Reactor) { c.q, err = c.dev.OpenQueue(r, len(c.requests)) }); e != nil || err != nil {
		s.Fatal(e, err)
	}
	for i := range c.requests {
		c.requests[i].Tag = uint32(i)
		c.requests[i].Done = func(*datapath.Request) {
			if c.left--; c.left == 0 {
				c.done <- struct{}{}
			}
		}
	}
	s.clients[name] = c
	return c
}

func (c *client) close() {
	var err error
	if e := c.s.r.Run(func(*reactor.Reactor) { err = c.q.Close() }); e != nil || err != nil {
		c.s.Fatal(e, err)
	}
	if err := c.dev.Close(); err != nil {
		c.s.Fatal(err)
	}
}

// do submits requests together and returns the first bad status.
func (c *client) do(requests ...datapath.Request) datapath.Status {
	for i, r := range requests {
		q := &c.requests[i]
		q.Op, q.Flags, q.Offset, q.Length, q.Buf = r.Op, r.Flags, r.Offset, r.Length, r.Buf
	}
	c.left = len(requests)
	c.s.r.Post(c)
	<-c.done
	for i := range requests {
		if s := c.requests[i].Status; s != datapath.StatusOK {
			return s
		}
	}
	return datapath.StatusOK
}

func write(v value, offset, length uint64, flags datapath.Flags) datapath.Request {
	return datapath.Request{Op: datapath.OpWrite, Flags: flags, Offset: offset, Length: length, Buf: fillWrite(v, offset, length)}
}

// lookBytes is how much of the beginning of each volume is read; beyond it, what
// the model knows of.
const lookBytes = 4*clusterSize + 16*blockSize

const lookWindow = 16 << 10

var zeroBlock [blockSize]byte

// looker reads several places of several volumes in one turn of the reactor.
type looker struct {
	reads []*lookRead
	done  chan struct{}
	left  int
}

type lookRead struct {
	q       datapath.Queue
	request datapath.Request
	name    string
}

// RunTask implements [reactor.Task].
func (k *looker) RunTask(*reactor.Reactor) {
	for _, r := range k.reads {
		r.q.Submit(&r.request)
	}
}

// observe reads the names and contents of everything there is. m says where to
// look beyond the beginnings; it may be nil.
func (s *session) observe(m *model) (*observation, error) {
	s.Helper()
	s.closeClients()
	o := &observation{content: map[string]map[uint64]value{}}
	sizes := map[string]uint64{}
	var names, lines []string
	windows := map[string]map[uint64]bool{} // of a volume and its snapshots
	if m != nil {
		for name, v := range m.volumes {
			at := map[uint64]bool{}
			windows[name] = at
			for i := range v.sectors {
				if i*sectorSize >= lookBytes {
					at[i*sectorSize/lookWindow] = true
				}
			}
			for _, f := range v.snapshots {
				for i := range f.sectors {
					if i*sectorSize >= lookBytes {
						at[i*sectorSize/lookWindow] = true
					}
				}
			}
		}
	}
	for _, v := range s.pool.Volumes() {
		names = append(names, v.Name)
		sizes[v.Name] = v.Size
		snapshots, err := s.pool.Snapshots(v.Name)
		if err != nil {
			return nil, err
		}
		for _, x := range snapshots {
			names = append(names, v.Name+"@"+x.Name)
			sizes[v.Name+"@"+x.Name] = x.Size
		}
	}
	sort.Strings(names)
	k := &looker{done: make(chan struct{}, 1)}
	var devices []datapath.Device
	first := map[string]int{}
	used := 0
	add := func(n string, offset, length uint64) {
		length = min(length, sizes[n]-offset)
		if used+int(length) > len(s.buffer) {
			s.buffer, used = alignedBytes(max(2*len(s.buffer), int(length))), 0 // what is in the old one stays with its reads
		}
		r := &lookRead{name: n}
		r.request = datapath.Request{Op: datapath.OpRead, Tag: uint32(len(k.reads) - first[n]), Offset: offset, Length: length, Buf: s.buffer[used : used+int(length) : used+int(length)],
			Done: func(*datapath.Request) {
				if k.left--; k.left == 0 {
					k.done <- struct{}{}
				}
			}}
		used += int(length)
		k.reads = append(k.reads, r)
	}
	for _, n := range names {
		lines = append(lines, fmt.Sprintf("%s:%d", n, sizes[n]))
		first[n] = len(k.reads)
		add(n, 0, lookBytes)
		volume, _, _ := strings.Cut(n, "@")
		for w := range windows[volume] {
			if w*lookWindow < sizes[n] {
				add(n, w*lookWindow, lookWindow)
			}
		}
		o.content[n] = map[uint64]value{}
	}
	o.catalog = strings.Join(lines, " ")
	k.left = len(k.reads)
	var err error
	queues := map[string]datapath.Queue{}
	for _, n := range names {
		var d datapath.Device
		if volume, snapshot, ok := strings.Cut(n, "@"); ok {
			d, err = s.pool.OpenSnapshot(volume, snapshot)
		} else {
			d, err = s.pool.OpenVolume(n)
		}
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	if e := s.r.Run(func(r *reactor.Reactor) {
		for i, n := range names {
			count := len(k.reads) - first[n]
			if i+1 < len(names) {
				count = first[names[i+1]] - first[n]
			}
			if queues[n], err = devices[i].OpenQueue(r, count); err != nil {
				return
			}
		}
	}); e != nil || err != nil {
		s.Fatal(e, err)
	}
	for _, r := range k.reads {
		r.q = queues[r.name]
	}
	if len(k.reads) > 0 {
		s.r.Post(k)
		<-k.done
	}
	if e := s.r.Run(func(*reactor.Reactor) {
		for _, q := range queues {
			if e := q.Close(); e != nil {
				err = e
			}
		}
	}); e != nil || err != nil {
		s.Fatal(e, err)
	}
	for _, d := range devices {
		if err := d.Close(); err != nil {
			s.Fatal(err)
		}
	}
	for _, r := range k.reads {
		q := &r.request
		if q.Status != datapath.StatusOK {
			return nil, fmt.Errorf("read of %s, %d bytes at %d: %v", r.name, q.Length, q.Offset, q.Status)
		}
		content := o.content[r.name]
		for i := uint64(0); i < q.Length; {
			if i%blockSize == 0 && bytes.Equal(q.Buf[i:i+blockSize], zeroBlock[:]) {
				i += blockSize
				continue
			}
			at := (q.Offset + i) / sectorSize
			if v := sectorValue(q.Buf[i:i+sectorSize], at); v != 0 {
				content[at] = v
			}
			i += sectorSize
		}
	}
	return o, nil
}

// audit checks what must be so in every pool that is open and idle.
func (s *session) audit() error {
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	owner := map[uint32]string{}
	own := func(c uint32, what string) error {
		if o, taken := owner[c]; taken {
			return fmt.Errorf("cluster %d belongs to %s and to %s", c, o, what)
		}
		owner[c] = what
		return nil
	}
	children := map[uint32]int{}
	heads := map[string]bool{}
	for id, l := range p.layers {
		if id != l.id || l.rec.id != id || l.gone || l.removed {
			return fmt.Errorf("layer %d is out of place", id)
		}
		if id >= p.nextLayer.Load() {
			return fmt.Errorf("layer %d, the next is %d", id, p.nextLayer.Load())
		}
		parent := l.parent.Load()
		if (l.rec.parent != 0) != (parent != nil) || parent != nil && (parent.id != l.rec.parent || p.layers[parent.id] != parent) {
			return fmt.Errorf("layer %d: its parent is %d", id, l.rec.parent)
		}
		if parent != nil {
			children[parent.id]++
			if parent.rec.flags&layerFrozen == 0 {
				return fmt.Errorf("layer %d stands on %d, which is not frozen", id, parent.id)
			}
		}
		if l.rec.flags&layerFrozen == 0 {
			v := p.volumes[l.rec.name]
			if v == nil || v.head.Load() != l || heads[l.rec.name] {
				return fmt.Errorf("layer %d is a head, but not of the volume %q", id, l.rec.name)
			}
			heads[l.rec.name] = true
			if v.size.Load() != l.rec.size {
				return fmt.Errorf("volume %s has %d bytes, its record %d", v.name, v.size.Load(), l.rec.size)
			}
		}
		owned := int64(0)
		var bad error
		l.each(0, func(v uint32, e entry) bool {
			switch {
			case uint64(v) >= clustersOf(l.rec.size):
				bad = fmt.Errorf("layer %d: cluster %d is past its end", id, v)
			case e.cluster() == noCluster && e.mask() != 0:
				bad = fmt.Errorf("layer %d: cluster %d has no place", id, v)
			case e.cluster() != noCluster:
				owned++
				bad = own(e.cluster(), fmt.Sprintf("layer %d, cluster %d", id, v))
				if bad == nil && !p.alloc.used(e.cluster(), p.zoneClusters) {
					bad = fmt.Errorf("layer %d: cluster %d lies in the free cluster %d", id, v, e.cluster())
				}
			}
			return bad == nil
		})
		if bad != nil {
			return bad
		}
		if owned != l.owned.Load() {
			return fmt.Errorf("layer %d owns %d clusters, counted %d", id, owned, l.owned.Load())
		}
	}
	if len(heads) != len(p.volumes) {
		return fmt.Errorf("%d volumes, %d heads", len(p.volumes), len(heads))
	}
	for id, l := range p.layers {
		if l.children != children[id] {
			return fmt.Errorf("layer %d has %d children, counted %d", id, l.children, children[id])
		}
	}
	metas := int64(0)
	for _, z := range *p.zones.Load() {
		for i := range p.zoneClusters {
			if z.meta.isMeta(i) {
				metas++
				if err := own(z.index*p.zoneClusters+i, "metadata"); err != nil {
					return err
				}
			}
		}
	}
	if metas != p.metaCount.Load() {
		return fmt.Errorf("%d metadata clusters, counted %d", metas, p.metaCount.Load())
	}
	p.grace.Lock()
	for _, g := range p.grace.waiting {
		for _, c := range g.clusters {
			if err := own(c, "the grace list"); err != nil {
				p.grace.Unlock()
				return err
			}
		}
	}
	p.grace.Unlock()
	p.freed.Lock()
	for _, c := range p.freed.clusters {
		if err := own(c, "the list of freed"); err != nil {
			p.freed.Unlock()
			return err
		}
	}
	p.freed.Unlock()
	for zone := range p.alloc.zones {
		z := &p.alloc.zones[zone]
		free := uint32(0)
		for i := range z.count {
			c := uint32(zone)*p.zoneClusters + i
			_, owned := owner[c]
			if used := z.bits[i/64]&(1<<(i%64)) != 0; used != owned {
				return fmt.Errorf("cluster %d: in use %t, owner %q", c, used, owner[c])
			} else if !used {
				free++
			}
		}
		if free != z.free {
			return fmt.Errorf("zone %d has %d free clusters, counted %d", zone, z.free, free)
		}
	}
	// Each pair of metadata pages is free or belongs to one thing.
	pairs := map[uint64]string{}
	pair := func(n uint64, what string) error {
		if owner[uint32(n/metaPairs)] != "metadata" {
			return fmt.Errorf("pair %d, of %s, is not in a metadata cluster", n, what)
		}
		if o, taken := pairs[n]; taken {
			return fmt.Errorf("pair %d belongs to %s and to %s", n, o, what)
		}
		pairs[n] = what
		return nil
	}
	for _, n := range p.pairs {
		if err := pair(n, "the free pairs"); err != nil {
			return err
		}
	}
	for _, r := range p.removedPairs {
		if err := pair(uint64(r.pair), "the removed pairs"); err != nil {
			return err
		}
	}
	for id, l := range p.layers {
		if l.pair >= 0 {
			if err := pair(uint64(l.pair), fmt.Sprintf("layer %d", id)); err != nil {
				return err
			}
		}
		var bad error
		l.pages(func(m *mapPage) bool {
			if m.pair >= 0 {
				bad = pair(uint64(m.pair), fmt.Sprintf("page %d of layer %d", m.index, id))
			}
			return bad == nil
		})
		if bad != nil {
			return bad
		}
	}
	if int64(len(pairs)) != metas*metaPairs {
		return fmt.Errorf("%d pairs are known, there are %d", len(pairs), metas*metaPairs)
	}
	if p.journal.used() > p.journal.capacity() {
		return fmt.Errorf("the journal uses %d of %d bytes", p.journal.used(), p.journal.capacity())
	}
	return nil
}

// step is what the oracle allows from a mark to the next.
type step struct {
	what string
	any  []*model // one of them
}

// moment is the state at the death of the process: the disks, and the crash log.
type deathMoment struct {
	mark    int
	group   *memdisk.Group
	pending []byte
	event   string
}

// pendingKeep is how much of the crash log is kept of each moment: more than a
// script needs.
const pendingKeep = pendingHeader + 4096*8*pendingWords

func readLog(path string) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, pendingKeep)
	n, _ := f.Read(b) // what is there is there
	return b[:n]
}

func (l *lab) writeLog(b []byte) string {
	path := filepath.Join(l.dir, "dead")
	_ = os.Remove(path) // may not be there
	if b == nil {
		return path
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		l.Fatal(err)
	}
	if err := os.Truncate(path, pendingHeader+8*pendingWords*pendingSlots); err != nil {
		l.Fatal(err)
	}
	return path
}

// base is a pool to begin with: disks, and what is on them.
type base struct {
	name  string
	group *memdisk.Group
	model *model
	next  value
	taken int // numbers of snapshots
}

// machine runs a script of operations on a pool and keeps what the oracle allows
// at each moment.
type machine struct {
	*session
	model *model
	next  value
	steps []step // by mark
	mark  atomic.Int64
	count map[byte]int
	kills []deathMoment
	keep  bool // keep the moments of the death of the process
}

// run executes ops on a copy of b and returns the machine, whose pool is killed,
// with the trace and the base of its images. With deaths set, the moments of the
// last operation are kept.
func (l *lab) run(b base, ops string, deaths bool) (*machine, *memdisk.Group, []memdisk.Event) {
	l.Helper()
	group := b.group.Clone()
	_ = os.Remove(l.log) // may not be there
	m := &machine{model: b.model.clone(), next: b.next, count: map[byte]int{'s': b.taken}}
	s, err := l.session(group, l.log, func(r *datapath.Request) {
		if !m.keep || r.Op == datapath.OpRead {
			return
		}
		m.kills = append(m.kills, deathMoment{mark: int(m.mark.Load()), group: group.Clone(), pending: readLog(l.log), event: fmt.Sprintf("before %v %d @ %d", r.Op, r.Length, r.Offset)})
	})
	if err != nil {
		l.Fatalf("%s: %v", b.name, err)
	}
	m.session = s
	images := group.StartTrace()
	m.steps = []step{{"start", []*model{m.model.clone()}}}
	for i := range len(ops) {
		if deaths && i == len(ops)-1 {
			if err := s.r.Run(func(*reactor.Reactor) { m.keep = true }); err != nil {
				l.Fatal(err)
			}
		}
		m.do(ops[i])
	}
	if err := s.r.Run(func(*reactor.Reactor) { m.keep = false }); err != nil {
		l.Fatal(err)
	}
	if deaths {
		m.kills = append(m.kills, deathMoment{mark: int(m.mark.Load()), group: group.Clone(), pending: readLog(l.log), event: "the end"})
	}
	if err := s.audit(); err != nil {
		l.Fatalf("%s %s: %v", b.name, ops, err)
	}
	if o, err := s.observe(m.model); err != nil {
		l.Fatalf("%s %s: %v", b.name, ops, err)
	} else if d := m.model.differences(o, noLoss); d != "" {
		l.Fatalf("%s %s: without a crash:\n\t%s", b.name, ops, d)
	}
	trace := group.StopTrace()
	s.kill()
	return m, images, trace
}

// during marks the beginning of an operation: until it has ended one of the
// models holds.
func (m *machine) during(what string, any ...*model) {
	m.steps = append(m.steps, step{"during " + what, any})
	m.mark.Store(int64(m.group.Mark("during " + what)))
}

// after marks its end.
func (m *machine) after(what string) {
	m.steps = append(m.steps, step{"after " + what, []*model{m.model.clone()}})
	m.mark.Store(int64(m.group.Mark("after " + what)))
}

// change does writes, discards and zeroes together, on one volume, as one
// operation; a full pool refuses all or nothing of a single one.
func (m *machine) change(what, volume string, requests ...datapath.Request) {
	m.Helper()
	flight := m.model.clone()
	values := make([]value, len(requests))
	flushes := false
	for i := range requests {
		r := &requests[i]
		switch r.Op {
		case datapath.OpWrite:
			m.next++
			values[i] = m.next
			r.Buf = fillWrite(m.next, r.Offset, r.Length)
		case datapath.OpFlush:
			flushes = true
			continue
		}
		flight.volumes[volume].begin(r.Offset, r.Length, values[i])
	}
	c := m.client(volume)
	m.during(what, flight)
	v := m.model.volumes[volume]
	if s := c.do(requests...); s == datapath.StatusNoSpace {
		// Each part of it has been done, or not.
		for i, r := range requests {
			b := alignedBytes(int(r.Length+blockSize-1) &^ (blockSize - 1))[:r.Length]
			if s := c.do(datapath.Request{Op: datapath.OpRead, Offset: r.Offset, Length: r.Length, Buf: b}); s != datapath.StatusOK {
				m.Fatalf("%s: %v", what, s)
			}
			for at := uint64(0); at < r.Length; at += sectorSize {
				if sectorValue(b[at:at+sectorSize], (r.Offset+at)/sectorSize) == values[i] {
					v.complete(r.Offset+at, sectorSize, values[i], false)
				}
			}
		}
		m.after(what + " (no space)")
		return
	} else if s != datapath.StatusOK {
		m.Fatalf("%s: %v", what, s)
	}
	if flushes {
		v.flushed() // what had completed before
	}
	for i, r := range requests {
		if r.Op != datapath.OpFlush {
			v.complete(r.Offset, r.Length, values[i], r.Flags&datapath.FlagFUA != 0)
		}
	}
	m.after(what)
}

// catalog does an operation that has happened or not.
func (m *machine) catalog(what string, change func(*model), do func() error) {
	m.Helper()
	next := m.model.clone()
	change(next)
	m.during(what, m.model.clone(), next)
	if err := do(); err != nil {
		m.Fatalf("%s: %v", what, err)
	}
	m.model = next
	m.after(what)
}

const (
	tinySize = 3*clusterSize + 3*blockSize
	farSize  = mapEntries<<clusterShift + 2*clusterSize + 3*blockSize // its map has a second page
)

// alphabet are the operations of scripts.
//
//	w  write 8 KiB where nothing was, without flush
//	b  write 4 KiB to the volume b, where nothing was
//	o  overwrite parts of blocks and whole ones, of v and of its newest clone
//	u  write with FUA: mapped at first, then new
//	f  flush
//	t  trim: a whole cluster, then some blocks
//	z  write zeros: parts of blocks, then keeping them mapped
//	x  three writes and a flush in one turn
//	s  snapshot        d  delete the oldest    e  delete the newest
//	c  clone of the newest snapshot            D  delete the newest clone, or b
//	r  resize, first into another page of the map
//	R  revert to the newest snapshot           m  Maintain
//	k  make regions clean, and nothing else
//	S  snapshot of v and b as a group
//
// and these, of which there are too few to be tried everywhere:
//
//	T  a thick volume: make, write, trim, snapshot of it, make it larger, delete it
//	g  grow                                    a  add the disk that is not part of the pool yet
const alphabet = "wboufztxsdecDrRmkS"

// do does one operation.
func (m *machine) do(op byte) {
	m.Helper()
	n := m.count[op]
	m.count[op]++
	v := m.model.volumes["v"]
	what := fmt.Sprintf("%c%d", op, n)
	newest := func(of *modelVolume) string {
		if k := len(of.order); k > 0 {
			return of.order[k-1]
		}
		return ""
	}
	clone := ""
	for name := range m.model.volumes {
		if name[0] == 'c' && name > clone {
			clone = name
		}
	}
	request := func(op datapath.Op, offset, length uint64, flags datapath.Flags) datapath.Request {
		return datapath.Request{Op: op, Offset: offset, Length: length, Flags: flags}
	}
	nothing := func() { m.during(what+" (nothing)", m.model.clone()); m.after(what + " (nothing)") }
	switch op {
	case 'w':
		at := uint64(2*clusterSize + 8*blockSize*n)
		switch {
		case v.size > farSize-1:
			at = v.size - 2*blockSize*uint64(n+1)
		case n%2 == 0:
			at = clusterSize + uint64(n+6)*2*blockSize
		}
		m.change(what, "v", request(datapath.OpWrite, at, 2*blockSize, 0))
	case 'b':
		if b := m.model.volumes["b"]; b == nil {
			nothing()
		} else {
			m.change(what, "b", request(datapath.OpWrite, uint64(1+n*59%120)*clusterSize, blockSize, 0)) // entries in several sectors of a map page
		}
	case 'o':
		m.change(what, "v", request(datapath.OpWrite, 3*sectorSize, 2*blockSize, 0))
		if clone != "" {
			m.change(what+" of the clone", clone, request(datapath.OpWrite, blockSize, blockSize, 0))
		}
	case 'u':
		m.change(what, "v", request(datapath.OpWrite, uint64(2+20*n)*blockSize, blockSize, datapath.FlagFUA))
	case 'f':
		m.change(what, "v", request(datapath.OpFlush, 0, 0, 0))
	case 't':
		switch n % 3 {
		case 0:
			m.change(what, "v", request(datapath.OpDiscard, 0, clusterSize, 0))
		case 1:
			m.change(what, "v", request(datapath.OpDiscard, clusterSize+blockSize, 2*blockSize, 0))
		default:
			m.change(what, "v", request(datapath.OpDiscard, 0, 2*clusterSize+sectorSize, datapath.FlagFUA))
		}
	case 'z':
		if n%2 == 0 {
			m.change(what, "v", request(datapath.OpWriteZeroes, 3*sectorSize, 3*blockSize, 0))
		} else {
			m.change(what, "v", request(datapath.OpWriteZeroes, clusterSize, 2*blockSize, datapath.FlagNoUnmap))
		}
	case 'x':
		m.change(what, "v", request(datapath.OpWrite, 0, blockSize, 0), request(datapath.OpWrite, uint64(5+n)*blockSize, 2*blockSize, 0),
			request(datapath.OpFlush, 0, 0, 0), request(datapath.OpWrite, 2*clusterSize-blockSize, 2*blockSize, 0))
	case 's':
		name := fmt.Sprintf("s%d", n+1)
		m.catalog(what, func(next *model) {
			v := next.volumes["v"]
			v.flushed()
			v.snapshots[name] = v.freeze()
			v.order = append(v.order, name)
		}, func() error { _, err := m.pool.CreateSnapshot("v", name, nil); return err })
	case 'S':
		name, volumes := fmt.Sprintf("g%d", n), []string{"v"}
		if m.model.volumes["b"] != nil {
			volumes = append(volumes, "b")
		}
		m.catalog(what, func(next *model) {
			for _, volume := range volumes {
				v := next.volumes[volume]
				v.flushed()
				v.snapshots[name] = v.freeze()
				v.order = append(v.order, name)
			}
		}, func() error { _, err := m.pool.CreateSnapshotGroup(name, volumes, nil); return err })
	case 'T':
		m.thick(what, n)
	case 'g':
		m.catalog(what, func(*model) {}, m.pool.Grow)
	case 'a':
		m.catalog(what, func(*model) {}, func() error {
			i := len(m.pool.disks)
			return m.pool.AddDisk(Disk{Path: fmt.Sprintf("mem%d", i), Device: &tap{m.group.Disk(i), m.before}})
		})
	case 'd', 'e':
		name := newest(v)
		if op == 'd' && name != "" {
			name = v.order[0]
		}
		if name == "" {
			nothing()
			return
		}
		m.catalog(what, func(next *model) {
			v := next.volumes["v"]
			delete(v.snapshots, name)
			for i, s := range v.order {
				if s == name {
					v.order = append(v.order[:i], v.order[i+1:]...)
					break
				}
			}
		}, func() error { _, err := m.pool.DeleteSnapshot("v", name); return err })
	case 'c':
		from, name := newest(v), fmt.Sprintf("c%d", n)
		if from == "" {
			nothing()
			return
		}
		m.catalog(what, func(next *model) {
			s := next.volumes["v"].snapshots[from]
			c := newModelVolume(s.size)
			c.sectors = s.thaw()
			next.volumes[name] = c
		}, func() error { _, err := m.pool.Clone("v", from, VolumeSpec{Name: name}); return err })
	case 'D':
		name := clone
		if name == "" {
			name = "b"
		}
		if m.model.volumes[name] == nil {
			nothing()
			return
		}
		m.closeClients()
		m.catalog(what, func(next *model) { delete(next.volumes, name) },
			func() error { _, err := m.pool.DeleteVolume(name, true); return err })
	case 'r':
		size := uint64(farSize)
		if v.size >= size {
			size = v.size + 5*blockSize
		}
		m.catalog(what, func(next *model) { next.volumes["v"].size = size }, func() error { return m.pool.Resize("v", size) })
	case 'R':
		name := newest(v)
		if name == "" {
			nothing()
			return
		}
		m.closeClients()
		m.catalog(what, func(next *model) {
			v := next.volumes["v"]
			s := v.snapshots[name]
			v.sectors, v.size = s.thaw(), max(v.size, s.size)
		}, func() error { return m.pool.Revert("v", name) })
	case 'm':
		m.during(what, m.model.clone())
		if err := m.pool.Maintain(); err != nil {
			m.Fatal(err)
		}
		for _, v := range m.model.volumes {
			v.flushed()
		}
		m.after(what)
	case 'k':
		m.during(what, m.model.clone())
		m.clean()
		m.after(what)
	default:
		m.Fatalf("no operation %q", op)
	}
}

// thick does the next operation on the thick volume.
func (m *machine) thick(what string, n int) {
	m.Helper()
	const size = 3 * clusterSize
	switch n % 6 {
	case 0:
		m.catalog(what, func(next *model) { next.volumes["thick"] = newModelVolume(size) },
			func() error {
				_, err := m.pool.CreateVolume(VolumeSpec{Name: "thick", Size: size, Thick: true})
				return err
			})
	case 1:
		m.change(what, "thick", datapath.Request{Op: datapath.OpWrite, Offset: clusterSize, Length: clusterSize + blockSize, Flags: datapath.FlagFUA})
	case 2:
		m.change(what, "thick", datapath.Request{Op: datapath.OpDiscard, Offset: clusterSize, Length: clusterSize})
	case 3:
		m.catalog(what, func(next *model) {
			v := next.volumes["thick"]
			v.flushed()
			v.snapshots["t"] = v.freeze()
			v.order = append(v.order, "t")
		}, func() error { _, err := m.pool.CreateSnapshot("thick", "t", nil); return err })
	case 4:
		m.catalog(what, func(next *model) { next.volumes["thick"].size = 2 * size }, func() error { return m.pool.Resize("thick", 2*size) })
	case 5:
		m.closeClients()
		m.catalog(what, func(next *model) { delete(next.volumes, "thick") },
			func() error { _, err := m.pool.DeleteVolume("thick", true); return err })
	}
}

// clean makes regions clean and waits until the journal says so.
func (m *machine) clean() {
	m.Helper()
	p := m.pool
	dirty := func() int {
		p.sumsMu.Lock()
		defer p.sumsMu.Unlock()
		return len(p.dirty)
	}
	before, next := dirty(), p.journal.next.Load()
	if err := p.cleanRegions(0); err != nil {
		m.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); dirty() < before && p.journal.next.Load() == next; {
		if time.Now().After(end) {
			m.Fatal("the journal does not hear of clean regions")
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// survives looks at what a crash left: the pool opens, is sound, holds what the
// oracle allows, does so again after another crash, and works. It takes the
// group over. log is the crash log, "" for none.
func (l *lab) survives(group *memdisk.Group, log string, st step, kind crashKind) (err error) {
	l.images++
	s, err := l.session(group, log, nil)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	alive := s
	defer func() {
		if alive != nil {
			alive.kill()
		}
	}()
	if err := s.audit(); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	o, err := s.observe(st.any[0])
	if err != nil {
		return err
	}
	found, why := (*model)(nil), ""
	for _, m := range st.any {
		if d := m.differences(o, kind); d == "" {
			found = m
			break
		} else if why == "" || m.catalog() == o.catalog {
			why = d
		}
	}
	if found == nil {
		return errors.New(why)
	}
	// What has been read is what is there from now on: another crash changes nothing.
	now := found.settleOn(o)
	if l.images%l.deep != 0 {
		return nil
	}
	if kind == powerLoss {
		s.kill()
		alive = nil
		group.CrashLose()
		if s, err = l.session(group, "", nil); err != nil {
			return fmt.Errorf("second open: %w", err)
		}
		alive = s
		if err := l.same(s, now, "second open"); err != nil {
			return err
		}
	}
	return l.goOn(s, &alive, now)
}

func (l *lab) same(s *session, m *model, when string) error {
	if err := s.audit(); err != nil {
		return fmt.Errorf("%s: audit: %w", when, err)
	}
	o, err := s.observe(m)
	if err != nil {
		return fmt.Errorf("%s: %w", when, err)
	}
	if d := m.differences(o, noLoss); d != "" {
		return fmt.Errorf("%s: %s", when, d)
	}
	return nil
}

// goOn uses a recovered pool, and looks again after another loss of power.
func (l *lab) goOn(s *session, alive **session, now *model) error {
	const fresh = value(1 << 30)
	v := now.volumes["v"]
	for i, at := range []uint64{blockSize, clusterSize + 17*blockSize, v.size - blockSize} {
		x := fresh + value(i)
		status := s.client("v").do(write(x, at, blockSize, 0))
		if status == datapath.StatusNoSpace {
			continue
		}
		if status != datapath.StatusOK {
			return fmt.Errorf("a write after recovery: %v", status)
		}
		v.complete(at, blockSize, x, true)
	}
	if _, err := s.pool.CreateSnapshot("v", "later", nil); err != nil {
		return fmt.Errorf("after recovery: %w", err)
	}
	v.snapshots["later"] = v.freeze()
	if len(v.order) > 0 {
		if _, err := s.pool.DeleteSnapshot("v", v.order[0]); err != nil {
			return fmt.Errorf("after recovery: %w", err)
		}
		delete(v.snapshots, v.order[0])
	}
	if status := s.client("v").do(write(fresh+9, 2*clusterSize, 2*blockSize, 0)); status == datapath.StatusOK {
		v.complete(2*clusterSize, 2*blockSize, fresh+9, true)
	}
	if status := s.client("v").do(datapath.Request{Op: datapath.OpFlush}); status != datapath.StatusOK {
		return fmt.Errorf("a flush after recovery: %v", status)
	}
	if l.images/l.deep%2 == 0 {
		if err := s.pool.Maintain(); err != nil {
			return fmt.Errorf("after recovery: %w", err)
		}
	}
	if err := l.same(s, now, "after recovery"); err != nil {
		return err
	}
	if l.images/l.deep%3 == 0 {
		s.close()
	} else {
		s.kill()
	}
	*alive = nil
	s.group.CrashLose()
	s, err := l.session(s.group, "", nil)
	if err != nil {
		return fmt.Errorf("open after recovery: %w", err)
	}
	*alive = s
	return l.same(s, now, "open after recovery")
}

// crashes tries the images of the last operation of ops, and says how many.
func (l *lab) crashes(b base, ops string, o memdisk.ImageOptions, power, deaths bool) {
	l.Helper()
	m, disks, trace := l.run(b, ops, deaths)
	from := 2*len(ops) - 1
	if power {
		start := 0
		for i, e := range trace {
			if e.Op == memdisk.OpMark && e.Mark == from {
				start = i
			}
		}
		random := rand.New(rand.NewPCG(o.Seed, 2))
		o.Only = func(c memdisk.Cut) bool {
			return c.Mark >= from && (l.cuts == 0 || c.Settled || random.IntN(len(trace)-start) < l.cuts)
		}
		for image := range disks.Images(trace, o) {
			st := m.steps[image.Cut.Mark]
			if l.again > 0 && l.images%l.again == 0 {
				if err := l.recoveries(image.Group(), nil, st, powerLoss, memdisk.ImageOptions{Seed: o.Seed, Subsets: 2, Each: 2, Random: 1, Torn: 1, Masks: 1}); err != nil {
					l.Fatalf("%s %s, %s, loss of power at %s:\n\t%v\n%s", b.name, ops, st.what, image, err, memdisk.Script(trace))
				}
			}
			if err := l.survives(image.Group(), "", st, powerLoss); err != nil {
				l.Fatalf("%s %s, %s, loss of power at %s:\n\t%v\n%s", b.name, ops, st.what, image, err, memdisk.Script(trace))
			}
		}
	}
	for i, k := range m.kills {
		if k.mark < from {
			continue
		}
		st := m.steps[k.mark]
		if l.cuts > 0 && int((o.Seed+uint64(i))%1000)%len(m.kills) >= l.cuts {
			continue
		}
		if l.again > 0 && l.images%l.again == 0 {
			if err := l.recoveries(k.group.Clone(), k.pending, st, processDeath, memdisk.ImageOptions{}); err != nil {
				l.Fatalf("%s %s, %s, death of the process %s:\n\t%v\n%s", b.name, ops, st.what, k.event, err, memdisk.Script(trace))
			}
		}
		if err := l.survives(k.group, l.writeLog(k.pending), st, processDeath); err != nil {
			l.Fatalf("%s %s, %s, death of the process %s:\n\t%v\n%s", b.name, ops, st.what, k.event, err, memdisk.Script(trace))
		}
	}
}

// recoveries crashes the recovery from what a crash left, at each of its events,
// in both ways, and looks at what is left then.
func (l *lab) recoveries(group *memdisk.Group, log []byte, st step, kind crashKind, o memdisk.ImageOptions) error {
	l.Helper()
	path := ""
	if kind == processDeath {
		path = l.writeLog(log)
	}
	var kills []deathMoment
	disks := group.StartTrace()
	keep := true
	s, err := l.session(group, path, func(r *datapath.Request) {
		if keep && r.Op != datapath.OpRead {
			k := deathMoment{group: group.Clone(), event: fmt.Sprintf("before %v %d @ %d", r.Op, r.Length, r.Offset)}
			if path != "" {
				k.pending = readLog(path)
			}
			kills = append(kills, k)
		}
	})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if status := s.client("v").do(datapath.Request{Op: datapath.OpFlush}); status != datapath.StatusOK {
		return fmt.Errorf("a flush after the recovery: %v", status)
	}
	if err := s.pool.Maintain(); err != nil {
		return err
	}
	if err := s.r.Run(func(*reactor.Reactor) { keep = false }); err != nil {
		l.Fatal(err)
	}
	trace := group.StopTrace()
	s.kill()
	if l.cuts > 0 {
		random := rand.New(rand.NewPCG(o.Seed, 3))
		o.Only = func(memdisk.Cut) bool { return random.IntN(len(trace)) < l.cuts }
	}
	if kind == powerLoss {
		// Nothing but what a recovery does has been lost.
		for image := range disks.Images(trace, o) {
			if err := l.survives(image.Group(), "", st, powerLoss); err != nil {
				return fmt.Errorf("loss of power in the recovery at %s: %w\n%s", image, err, memdisk.Script(trace))
			}
		}
	}
	for i, k := range kills {
		if l.cuts > 0 && i%(len(kills)/l.cuts+1) != 0 {
			continue
		}
		death := path
		if path != "" {
			death = l.writeLog(k.pending)
		}
		if err := l.survives(k.group, death, st, kind); err != nil {
			return fmt.Errorf("death of the process in the recovery %s: %w\n%s", k.event, err, memdisk.Script(trace))
		}
	}
	return nil
}

// makeBase formats a pool and runs a script on it; prepare may add to it.
func (l *lab) makeBase(name string, disks int, size uint64, ops string, prepare func(m *machine)) base {
	l.Helper()
	var configs []memdisk.Config
	for range disks {
		configs = append(configs, memdisk.Config{Size: size})
	}
	group := memdisk.NewGroup(configs...)
	return l.makeBaseOn(name, group, group.Disks(), ops, prepare)
}

// makeBaseOn makes a base on some of the disks of a group.
func (l *lab) makeBaseOn(name string, group *memdisk.Group, disks []*memdisk.Disk, ops string, prepare func(m *machine)) base {
	l.Helper()
	var list []Disk
	for i, d := range disks {
		list = append(list, Disk{Path: fmt.Sprintf("mem%d", i), Device: d})
	}
	if _, err := Format(FormatConfig{Name: "p", Disks: list, Reactor: l.r, JournalBytes: journalMin, ZoneRegions: 1}); err != nil {
		l.Fatal(err)
	}
	s := l.mustSession(group, "")
	m := &machine{session: s, model: &model{volumes: map[string]*modelVolume{}}, count: map[byte]int{}}
	for name, size := range map[string]uint64{"v": tinySize, "b": 128 * clusterSize} {
		if _, err := s.pool.CreateVolume(VolumeSpec{Name: name, Size: size}); err != nil {
			l.Fatal(err)
		}
		m.model.volumes[name] = newModelVolume(size)
	}
	for i := range len(ops) {
		m.do(ops[i])
	}
	if prepare != nil {
		prepare(m)
		s.kill()
	} else {
		s.close()
	}
	group.CrashLose()
	for _, v := range m.model.volumes {
		v.flushed()
	}
	return base{name: name, group: group, model: m.model, next: m.next, taken: m.count['s']}
}
