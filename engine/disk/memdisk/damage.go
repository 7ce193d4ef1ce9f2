package memdisk

import (
	"math/rand/v2"

	"github.com/ashlar-storage/ashlar/internal/invariant"
)

// Corrupt is bit rot: it flips one bit in each of one to eight bytes of the
// range, by the seed, and nobody is told. The bytes differ afterwards from what
// reads saw and from what is durable; writing them again heals them.
func (d *Disk) Corrupt(offset, length, seed uint64) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.insideLocked(offset, length)
	invariant.Check(length > 0, "memdisk: nothing to corrupt")
	random := rand.New(rand.NewPCG(seed, d.config.Seed))
	done := make(map[uint64]bool)
	for range 1 + random.Uint64N(min(length, 8)) {
		at := offset + random.Uint64N(length)
		if done[at] { // a second flip could undo the first
			continue
		}
		done[at] = true
		durable := d.medium.durable.freeze().fork()
		resolve(&durable, d.medium.log, nil)
		var seen, kept [1]byte
		d.visible.read(seen[:], at)
		durable.read(kept[:], at)
		bit := random.IntN(8)
		if seen[0]^1<<bit == kept[0] {
			bit = (bit + 1) % 8
		}
		d.pokeLocked(at, []byte{seen[0] ^ 1<<bit})
	}
}

// Poke puts data on the disk: visible and durable at once, past every fault and
// uncounted. A trace shows it.
func (d *Disk) Poke(offset uint64, data []byte) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.insideLocked(offset, uint64(len(data)))
	if len(data) > 0 {
		d.pokeLocked(offset, data)
	}
}

func (d *Disk) pokeLocked(offset uint64, data []byte) {
	data = d.keepLocked(data)
	order := d.group.recordLocked(Event{Disk: d.index, Op: OpPoke, Offset: offset, Length: uint64(len(data)), Data: data, Stored: offset})
	d.group.endLocked(order)
	d.storeLocked(poked(order, offset, data))
}

func poked(order, offset uint64, data []byte) change {
	return change{order: order, op: OpPoke, offset: offset, length: uint64(len(data)), data: data, ended: order, durable: true}
}

// BadSector makes the sectors of the range unreadable: reads that touch one end
// with StatusIO, until all of that sector is written, zeroed or discarded. Being
// healed outlives a crash, whatever becomes of the write.
func (d *Disk) BadSector(offset, length uint64) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.insideLocked(offset, length)
	if d.bad == nil {
		d.bad = make(map[uint64]struct{})
	}
	sector := uint64(d.config.Sector)
	for i := offset / sector; i*sector < offset+length; i++ {
		d.bad[i] = struct{}{}
	}
}

func (d *Disk) badLocked(offset, length uint64) bool {
	sector := uint64(d.config.Sector)
	for i := range d.bad {
		if i*sector < offset+length && offset < (i+1)*sector {
			return true
		}
	}
	return false
}

func (d *Disk) healLocked(s span) {
	sector := uint64(d.config.Sector)
	for i := range d.bad {
		if s.from <= i*sector && min((i+1)*sector, d.config.Size) <= s.to {
			delete(d.bad, i)
		}
	}
}

// LoseWrite makes writes, discards and write-zeroes for which lost returns true
// succeed without doing anything. nil ends it.
//
// Context: lost runs on reactors, under the disk's lock; it must not use the
// disk. The event's Data is the request's buffer.
func (d *Disk) LoseWrite(lost func(e Event) bool) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.lose = lost
}

// Misdirect makes one write go to offset to instead: the next for which when
// returns true, the very next when it is nil. A write that would pass the end of
// the disk goes to the end. when runs as LoseWrite's function does.
func (d *Disk) Misdirect(to uint64, when func(e Event) bool) {
	if when == nil {
		when = func(Event) bool { return true }
	}
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.misdirect, d.target = when, to
}

// Vanish pulls the disk out: every request from now on ends with StatusIO.
// Content and size stay as they are, for those who look past the queues.
func (d *Disk) Vanish() { d.vanish(true) }

// Return plugs a disk that has vanished in again, with the content it had. A
// loss of power in between is another matter: Crash.
func (d *Disk) Return() { d.vanish(false) }

func (d *Disk) vanish(gone bool) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.vanished = gone
}

// ReadOnly makes the disk refuse changes with StatusReadOnly, or take them again.
func (d *Disk) ReadOnly(on bool) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.config.ReadOnly = on
}

// Truncate changes the size, at once and durably. What lies past a smaller size
// is gone, and requests there end with StatusIO; a larger disk has zeros at its
// end. A trace shows it.
func (d *Disk) Truncate(size uint64) {
	invariant.Check(size > 0 && size < 1<<62, "memdisk: disk of %d bytes", size)
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	old := d.config.Size
	d.config.Size = size
	d.medium.cut(size, old)
	if size < old {
		d.visible.zero(size, old-size)
	}
	d.group.endLocked(d.group.recordLocked(Event{Disk: d.index, Op: OpResize, Length: size}))
}
