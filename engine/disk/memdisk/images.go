package memdisk

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/ashlar-storage/ashlar/datapath"
)

// Defaults of ImageOptions.
const (
	subsetsDefault = 5 // 32 images a cut, each some milliseconds of recovery
	randomDefault  = 8
	tornDefault    = 2 // a commit ends in one or two writes
	masksDefault   = 2
)

// ImageOptions say which images a trace gives. In every count, 0 is the default
// and a negative number is none.
type ImageOptions struct {
	Seed uint64 // of what is random

	// Subsets: at a cut with at most so many pending changes (not durable yet),
	// there is an image for each set of them that could have been kept; default 5.
	// With more pending changes, those that keep none, all, all but one, one
	// alone, and in a group those of one disk alone or all but those.
	Subsets int
	// Each bounds, with more pending changes than Subsets, the changes that are
	// missing or alone to the newest; default: all of them.
	Each int
	// Random: as many more images, there, of changes kept, lost and torn at
	// random, and in any order where they overlap; default 8.
	Random int
	// Torn: the last so many pending changes are each torn, to prefixes and
	// suffixes in sectors (every one of up to four sectors; of longer changes the
	// first, the half, and all but one) and to Masks random sets, while all other
	// changes are kept and while none is; default 2.
	Torn int
	// Masks: random sets of sectors for each torn change; default 2.
	Masks int

	// Repeat: every cut has all of its images. Else an image is left out when one
	// with the same changes kept was at an earlier cut, with the same mark and the
	// same changes durable.
	Repeat bool
	// Only, unless nil, chooses the cuts that have images.
	Only func(Cut) bool
}

func (o *ImageOptions) setDefaults() {
	for _, n := range []struct {
		field  *int
		preset int
	}{{&o.Subsets, subsetsDefault}, {&o.Random, randomDefault}, {&o.Torn, tornDefault}, {&o.Masks, masksDefault}, {&o.Each, 1 << 30}} {
		if *n.field == 0 {
			*n.field = n.preset
		}
		*n.field = max(*n.field, 0)
	}
	o.Subsets = min(o.Subsets, 24) // 16 million images
}

// Cut is a moment of a trace: the one right after an event. What had completed
// before that event is complete; what completed later is not. So a flush counts
// from the event after its completion on, which for a test that waits for it and
// marks the trace is the mark.
type Cut struct {
	Index   int    // events before the cut: it lies after trace[Index-1]
	Settled bool   // the last cut: everything that completed after the last event is complete too
	Mark    int    // the last mark before the cut, 0 for none
	Label   string // of that mark
}

// Image is what a loss of power can leave at one cut. It is valid as long as it
// is kept, and may be used from any goroutine; several images at once.
type Image struct {
	Cut Cut

	moment *moment
	picks  []pick
}

// moment is the disks at one cut; immutable.
type moment struct {
	event  string // before the cut
	length int    // of the trace
	clock  uint64
	disks  []frozen
}

// frozen is a disk that does not change.
type frozen struct {
	config   Config
	durable  snapshot
	log      []change
	bad      map[uint64]struct{}
	vanished bool
}

// Group makes the disks of the image. Each call makes new ones, which share pages
// with the base and with other images until they are written.
func (im *Image) Group() *Group {
	g := &Group{clock: im.moment.clock}
	for k, f := range im.moment.disks {
		d := newDisk(g, k, f.config)
		d.bad, d.vanished = maps.Clone(f.bad), f.vanished
		d.medium.durable = f.durable.fork()
		var picks []pick
		for _, p := range im.picks {
			if p.disk == k {
				picks = append(picks, p)
			}
		}
		resolve(&d.medium.durable, f.log, picks)
		d.visible = d.medium.durable.freeze().fork()
		g.disks = append(g.disks, d)
	}
	return g
}

// Disk makes the first disk of the image, which is the only one unless the base
// is of a larger group.
func (im *Image) Disk() *Disk { return im.Group().disks[0] }

// String says where the cut is and what became of the changes that were not
// durable, by their Seq.
func (im *Image) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "cut %d of %d after %q", im.Cut.Index, im.moment.length, im.moment.event)
	if im.Cut.Mark > 0 {
		fmt.Fprintf(&b, ", mark %d %q", im.Cut.Mark, im.Cut.Label)
	}
	if im.Cut.Settled {
		b.WriteString(", settled")
	}
	b.WriteString(": kept")
	if len(im.picks) == 0 {
		b.WriteString(" nothing")
	}
	for _, p := range im.picks {
		c := &im.moment.disks[p.disk].log[p.index]
		fmt.Fprintf(&b, " #%d", c.order)
		if p.torn {
			b.WriteString(" torn to")
			for i, s := range p.parts {
				if i == 4 && len(p.parts) > 5 {
					fmt.Fprintf(&b, " and %d more", len(p.parts)-i)
					break
				}
				fmt.Fprintf(&b, " [%d,%d)", s.from, s.to)
			}
		}
	}
	return b.String()
}

// Images are the images of the disk's group; see [Group.Images].
func (d *Disk) Images(trace []Event, o ImageOptions) iter.Seq[*Image] {
	return d.group.Images(trace, o)
}

// Images are what a loss of power can leave of the group, which is the base of
// the trace: its state at StartTrace. There is a cut before the first event, one
// after each, and one when all that completed is complete. The trace may be a
// prefix of what was recorded. The same options give the same images in the same
// order. Changes the base holds that are not durable are pending like those of the
// trace, until a flush covers them.
//
// The base is copied when the iteration begins, and is not changed.
func (g *Group) Images(trace []Event, o ImageOptions) iter.Seq[*Image] {
	o.setDefaults()
	return func(yield func(*Image) bool) {
		w := &walk{group: g.Clone(), trace: trace, options: &o, yield: yield, seen: make(map[[sha256.Size]byte]bool)}
		w.run()
	}
}

// walk replays a trace and stops at every cut.
type walk struct {
	group   *Group // replayed; nobody else knows it
	trace   []Event
	options *ImageOptions
	yield   func(*Image) bool

	cut     Cut
	moment  *moment                    // of this cut; made when an image needs it
	pending []pick                     // every change that is not durable, by order
	overlap bool                       // some of them overlap
	seen    map[[sha256.Size]byte]bool // hashes: what is kept of a thousand changes is kilobytes
	key     []byte
	random  *rand.Rand
}

func (w *walk) run() {
	ends := make([][]int, len(w.trace)) // by the index of the last event before: what completed then
	for i, e := range w.trace {
		if e.Ended != 0 && e.Ended-w.trace[0].Seq < uint64(len(w.trace)) {
			at := e.Ended - w.trace[0].Seq
			ends[at] = append(ends[at], i)
		}
	}
	if !w.visit() {
		return
	}
	for i := range w.trace {
		if i > 0 {
			w.complete(ends[i-1])
		}
		w.submit(&w.trace[i])
		w.cut.Index = i + 1
		if !w.visit() {
			return
		}
	}
	w.cut.Settled = true
	if n := len(w.trace); n > 0 {
		w.complete(ends[n-1])
	}
	w.visit()
}

func (w *walk) submit(e *Event) {
	d := w.group.disks[e.Disk]
	w.group.clock = e.Seq
	switch e.Op {
	case OpMark:
		w.cut.Mark, w.cut.Label = e.Mark, e.Label
		clear(w.seen)
	case OpPoke:
		d.medium.add(poked(e.Seq, e.Stored, e.Data))
		clear(w.seen)
	case OpResize:
		d.medium.cut(e.Length, d.config.Size)
		d.config.Size = e.Length
		clear(w.seen)
	case datapath.OpFlush:
	default:
		if !e.Lost && e.Length > 0 && !(e.Op == datapath.OpDiscard && d.config.DiscardKeeps) {
			d.medium.add(change{order: e.Seq, op: e.Op, offset: e.Stored, length: e.Length, data: e.Data, fua: e.FUA})
		}
	}
}

// complete ends events that completed between two others.
func (w *walk) complete(events []int) {
	changed := false
	for _, i := range events {
		e := &w.trace[i]
		m := &w.group.disks[e.Disk].medium
		if e.Op == datapath.OpFlush {
			changed = m.flush(e.Seq) || changed
		} else {
			changed = m.end(e.Seq, e.Ended) || changed
		}
	}
	if changed {
		clear(w.seen)
	}
}

// visit yields the images of the cut, and is false when no more are wanted.
func (w *walk) visit() bool {
	if w.options.Only != nil && !w.options.Only(w.cut) {
		return true
	}
	if w.options.Repeat {
		clear(w.seen)
	}
	w.moment = nil
	w.pending = w.pending[:0]
	for k, d := range w.group.disks {
		for i := range d.medium.log {
			if c := &d.medium.log[i]; !c.durable && c.length > 0 {
				w.pending = append(w.pending, pick{disk: k, index: i})
			}
		}
	}
	slices.SortFunc(w.pending, func(a, b pick) int { return cmp.Compare(w.change(a).order, w.change(b).order) })
	w.random = rand.New(rand.NewPCG(w.options.Seed, uint64(2*w.cut.Index)+uint64(len(w.pending))<<32))
	n := len(w.pending)
	if n <= w.options.Subsets {
		for bits := range 1 << n {
			// From all to none: the nearest to what a test expects comes first.
			if !w.keep(func(i int) bool { return bits>>i&1 == 0 }) {
				return false
			}
		}
		return w.reversed() && w.tornOnes()
	}
	if !w.keep(func(int) bool { return true }) || !w.keep(func(int) bool { return false }) {
		return false
	}
	for one := n - 1; one >= max(0, n-w.options.Each); one-- {
		if !w.keep(func(i int) bool { return i != one }) || !w.keep(func(i int) bool { return i == one }) {
			return false
		}
	}
	for k := range w.group.disks {
		if len(w.group.disks) > 1 && (!w.keep(func(i int) bool { return w.pending[i].disk != k }) ||
			!w.keep(func(i int) bool { return w.pending[i].disk == k })) {
			return false
		}
	}
	return w.reversed() && w.tornOnes() && w.randomOnes()
}

func (w *walk) change(p pick) *change { return &w.group.disks[p.disk].medium.log[p.index] }

func (w *walk) sector(p pick) int { return w.group.disks[p.disk].config.Sector }

// keep yields the image with the pending changes that kept chooses.
func (w *walk) keep(kept func(i int) bool) bool {
	var picks []pick
	for i, p := range w.pending {
		if kept(i) {
			picks = append(picks, p)
		}
	}
	return w.emit(picks)
}

// overlaps reports whether any two pending changes do. Only then their order
// matters.
func (w *walk) overlaps() bool {
	byPlace := slices.Clone(w.pending)
	slices.SortFunc(byPlace, func(a, b pick) int {
		return cmp.Or(cmp.Compare(a.disk, b.disk), cmp.Compare(w.change(a).offset, w.change(b).offset))
	})
	for i := 1; i < len(byPlace); i++ {
		a, b := byPlace[i-1], byPlace[i]
		if a.disk == b.disk && w.change(b).offset < w.change(a).span().to {
			return true
		}
	}
	return false
}

// reversed yields the image in which everything is kept, but older changes win
// where changes overlap.
func (w *walk) reversed() bool {
	if w.overlap = w.overlaps(); !w.overlap {
		return true
	}
	picks := slices.Clone(w.pending)
	slices.Reverse(picks)
	return w.emit(picks)
}

// tornOnes yields the images in which one of the last changes is torn.
func (w *walk) tornOnes() bool {
	n := len(w.pending)
	for i := n - 1; i >= max(0, n-w.options.Torn); i-- {
		c, sector := w.change(w.pending[i]), w.sector(w.pending[i])
		count := sectorCount(c, sector)
		if count < 2 {
			continue
		}
		lengths := []uint64{1, count / 2, count - 1}
		if count <= 4 {
			lengths = []uint64{1, 2, 3}[:count-1]
		}
		var tears [][]span
		for _, n := range lengths {
			tears = append(tears, prefix(c, sector, n), suffix(c, sector, n))
		}
		for range w.options.Masks {
			tears = append(tears, mask(c, sector, w.random))
		}
		for _, parts := range tears {
			torn := w.pending[i]
			torn.torn, torn.parts = true, parts
			all := slices.Clone(w.pending)
			all[i] = torn
			if !w.emit(all) || !w.emit([]pick{torn}) {
				return false
			}
		}
	}
	return true
}

// randomOnes yields images of changes kept, lost and torn at random.
func (w *walk) randomOnes() bool {
	for range w.options.Random {
		chance := [...]float64{0.1, 0.5, 0.9}[w.random.IntN(3)]
		var picks []pick
		for _, p := range w.pending {
			if c := w.change(p); sectorCount(c, w.sector(p)) > 1 && w.random.IntN(4) == 0 {
				p.torn, p.parts = true, tear(c, w.sector(p), w.random)
			} else if w.random.Float64() >= chance {
				continue
			}
			picks = append(picks, p)
		}
		if w.overlap && w.random.IntN(2) == 0 {
			w.random.Shuffle(len(picks), func(i, j int) { picks[i], picks[j] = picks[j], picks[i] })
		}
		if !w.emit(picks) {
			return false
		}
	}
	return true
}

// emit yields an image unless it has been seen. It takes over picks.
func (w *walk) emit(picks []pick) bool {
	picks = slices.DeleteFunc(picks, func(p pick) bool { return p.torn && len(p.parts) == 0 })
	w.key = w.key[:0]
	for i := range picks {
		p := &picks[i]
		if p.torn && p.parts[0] == w.change(*p).span() {
			p.torn, p.parts = false, nil
		}
		w.key = binary.AppendUvarint(w.key, w.change(*p).order)
		w.key = binary.AppendUvarint(w.key, uint64(len(p.parts)))
		for _, s := range p.parts {
			w.key = binary.AppendUvarint(w.key, s.from)
			w.key = binary.AppendUvarint(w.key, s.to)
		}
	}
	hash := sha256.Sum256(w.key)
	if w.seen[hash] {
		return true
	}
	w.seen[hash] = true
	if w.moment == nil {
		w.freeze()
	}
	return w.yield(&Image{Cut: w.cut, moment: w.moment, picks: picks})
}

func (w *walk) freeze() {
	m := &moment{event: "start", length: len(w.trace), clock: w.group.clock}
	if w.cut.Index > 0 {
		m.event = w.trace[w.cut.Index-1].String()
	}
	for _, d := range w.group.disks {
		m.disks = append(m.disks, frozen{
			config: d.config, durable: d.medium.durable.freeze(), log: slices.Clone(d.medium.log),
			bad: d.bad, vanished: d.vanished,
		})
	}
	w.moment = m
}
