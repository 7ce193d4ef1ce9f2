package pool

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
)

// The oracle knows which content each volume and snapshot may have after a crash.
//
// The unit is a sector of 512 bytes, because that is what a disk writes whole. A
// value is the number of the write that put it there, 0 for zeros; the bytes of a
// sector follow from its value and place, so a read gives the value back.
//
//   - Loss of power: what was flushed (FUA, or completed before a flush that has
//     completed was called), or anything newer.
//   - Death of the process: what completed last, or what was under way.
//   - A snapshot holds exactly what was completed when it was called. It is there
//     when the call has returned, and never changes.
//   - Volumes and snapshots appear and vanish as a whole; a call under way has
//     either happened or not.

const sectorSize = 512

// value is what a sector holds.
type value uint32

const damaged = ^value(0)

// fillSector writes the bytes of a value at a sector.
func fillSector(b []byte, v value, sector uint64) {
	if v == 0 {
		clear(b[:sectorSize])
		return
	}
	seed := uint64(v)<<32 | sector
	for i := 0; i < sectorSize; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], seed)
		seed = seed*6364136223846793005 + 1442695040888963407
	}
}

// sectorValue is the value of the bytes at a sector, damaged when no write made
// them.
func sectorValue(b []byte, sector uint64) value {
	seed := binary.LittleEndian.Uint64(b)
	v := value(seed >> 32)
	if seed != 0 && seed&(1<<32-1) != sector {
		return damaged
	}
	for i := 8; i < sectorSize; i += 8 {
		if seed != 0 {
			seed = seed*6364136223846793005 + 1442695040888963407
		}
		if binary.LittleEndian.Uint64(b[i:]) != seed {
			return damaged
		}
	}
	return v
}

// fillWrite is the content of a write of v.
func fillWrite(v value, offset, length uint64) []byte {
	b := alignedBytes(int(length+blockSize-1) &^ (blockSize - 1))[:length]
	for i := uint64(0); i < length; i += sectorSize {
		fillSector(b[i:], v, (offset+i)/sectorSize)
	}
	return b
}

// sector is what is known of one sector of a volume.
type sector struct {
	old    value   // durable
	newer  []value // completed since, in order
	flight []value // under way
}

func (s sector) visible() value {
	if n := len(s.newer); n > 0 {
		return s.newer[n-1]
	}
	return s.old
}

// crashKind is what was lost.
type crashKind int

const (
	powerLoss    crashKind = iota // everything not flushed may be lost
	processDeath                  // nothing that completed is lost
	noLoss                        // nothing at all
)

func (s sector) allows(v value, kind crashKind) bool {
	if kind == powerLoss {
		return v == s.old || slices.Contains(s.newer, v) || slices.Contains(s.flight, v)
	}
	return v == s.visible() || kind == processDeath && slices.Contains(s.flight, v)
}

// modelVolume is a volume with its snapshots.
type modelVolume struct {
	size      uint64
	sectors   map[uint64]sector // missing: zeros
	snapshots map[string]modelSnapshot
	order     []string // of snapshots, oldest first
}

// modelSnapshot does not change; its maps are shared.
type modelSnapshot struct {
	size    uint64
	sectors map[uint64]value
}

// model is a pool.
type model struct {
	volumes map[string]*modelVolume
}

func (m *model) clone() *model {
	c := &model{volumes: map[string]*modelVolume{}}
	for name, v := range m.volumes {
		n := &modelVolume{size: v.size, sectors: maps.Clone(v.sectors), snapshots: maps.Clone(v.snapshots), order: slices.Clone(v.order)}
		c.volumes[name] = n
	}
	return c
}

func newModelVolume(size uint64) *modelVolume {
	return &modelVolume{size: size, sectors: map[uint64]sector{}, snapshots: map[string]modelSnapshot{}}
}

// begin notes a write that is under way; complete that it has ended.
func (v *modelVolume) begin(offset, length uint64, x value) {
	for s := offset / sectorSize; s < (offset+length)/sectorSize; s++ {
		h := v.sectors[s]
		h.flight = append(slices.Clone(h.flight), x)
		v.sectors[s] = h
	}
}

func (v *modelVolume) complete(offset, length uint64, x value, durable bool) {
	for s := offset / sectorSize; s < (offset+length)/sectorSize; s++ {
		h := v.sectors[s]
		h.flight = slices.DeleteFunc(slices.Clone(h.flight), func(y value) bool { return x == y })
		if durable {
			h.old, h.newer = x, nil
		} else {
			h.newer = append(slices.Clone(h.newer), x)
		}
		v.sectors[s] = h
	}
}

// flushed notes that everything completed is durable.
func (v *modelVolume) flushed() {
	for s, h := range v.sectors {
		if len(h.newer) > 0 {
			v.sectors[s] = sector{old: h.visible(), flight: h.flight}
		}
	}
}

// freeze is the volume as it is.
func (v *modelVolume) freeze() modelSnapshot {
	s := modelSnapshot{size: v.size, sectors: map[uint64]value{}}
	for i, h := range v.sectors {
		if x := h.visible(); x != 0 {
			s.sectors[i] = x
		}
	}
	return s
}

// thaw makes a snapshot's content that of a volume.
func (s modelSnapshot) thaw() map[uint64]sector {
	sectors := map[uint64]sector{}
	for i, x := range s.sectors {
		sectors[i] = sector{old: x}
	}
	return sectors
}

// catalog is what is there, without content.
func (m *model) catalog() string {
	var lines []string
	for name, v := range m.volumes {
		lines = append(lines, fmt.Sprintf("%s:%d", name, v.size))
		for s, x := range v.snapshots {
			lines = append(lines, fmt.Sprintf("%s@%s:%d", name, s, x.size))
		}
	}
	sort.Strings(lines)
	return strings.Join(lines, " ")
}

// observation is what was read of a pool: sectors that are not zeros, of what was
// looked at.
type observation struct {
	catalog string
	content map[string]map[uint64]value // by VOLUME or VOLUME@SNAPSHOT
}

// differences says how what was read is not what m allows, "" when it is.
func (m *model) differences(o *observation, kind crashKind) string {
	if c := m.catalog(); c != o.catalog {
		return fmt.Sprintf("there is %q, there should be %q", o.catalog, c)
	}
	var bad []string
	miss := func(what string, s uint64, have value, want any) {
		if len(bad) < 6 {
			bad = append(bad, fmt.Sprintf("%s: sector %d (cluster %d, block %d) holds %s, allowed: %v", what, s, s/256, s%256/8, have, want))
		}
	}
	for name, v := range m.volumes {
		have := o.content[name]
		for s, h := range v.sectors {
			if x := have[s]; !h.allows(x, kind) {
				miss(name, s, x, h)
			}
		}
		for s, x := range have {
			if _, known := v.sectors[s]; !known && x != 0 {
				miss(name, s, x, "zeros")
			}
		}
		for snap, f := range v.snapshots {
			have := o.content[name+"@"+snap]
			for s, x := range f.sectors {
				if have[s] != x {
					miss(name+"@"+snap, s, have[s], x)
				}
			}
			for s, x := range have {
				if f.sectors[s] != x {
					miss(name+"@"+snap, s, x, f.sectors[s])
				}
			}
		}
	}
	sort.Strings(bad)
	return strings.Join(bad, "\n\t")
}

// String names a value in messages.
func (v value) String() string {
	if v == damaged {
		return "damaged"
	}
	return fmt.Sprintf("#%d", uint32(v))
}

// settleOn is m with the content that was read, which from now on is what is
// there.
func (m *model) settleOn(o *observation) *model {
	c := m.clone()
	for name, v := range c.volumes {
		v.sectors = map[uint64]sector{}
		for s, x := range o.content[name] {
			v.sectors[s] = sector{old: x}
		}
	}
	return c
}
