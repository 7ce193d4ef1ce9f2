package memdisk

import (
	"math/rand/v2"

	"github.com/ashlar-storage/ashlar/internal/invariant"
)

// Crash is a loss of power: each change that is not durable is kept, lost or torn
// between sectors, in any order where changes overlap, by the seed. What is left
// is durable. Every queue is closed before; the disk can be used at once. A trace
// ends here.
func (d *Disk) Crash(seed uint64) { d.crash(func() { d.crashLocked(seed) }) }

// CrashLose is a loss of power that loses every change that is not durable.
func (d *Disk) CrashLose() { d.crash(func() { d.resolveLocked(nil) }) }

// CrashKeep is a crash of the process that uses the disk: nothing is lost, and
// what was not durable is not durable now. Every queue is closed before.
func (d *Disk) CrashKeep() {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.idleLocked()
}

func (d *Disk) crash(do func()) {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	d.idleLocked()
	d.group.tracing = false
	do()
}

func (d *Disk) idleLocked() {
	invariant.Check(d.queues == 0, "memdisk: crash with %d queues open: close them, or crash a clone", d.queues)
}

// Crash is [Disk.Crash] of every disk.
func (g *Group) Crash(seed uint64) { g.crash(func(d *Disk) { d.crashLocked(seed) }) }

// CrashLose is [Disk.CrashLose] of every disk.
func (g *Group) CrashLose() { g.crash(func(d *Disk) { d.resolveLocked(nil) }) }

// CrashKeep is [Disk.CrashKeep] of every disk.
func (g *Group) CrashKeep() {
	for _, d := range g.disks {
		d.CrashKeep()
	}
}

func (g *Group) crash(do func(*Disk)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tracing = false
	for _, d := range g.disks {
		d.idleLocked()
		do(d)
	}
}

// crashLocked draws a share of changes to keep first, because bugs hide where
// nearly all or nearly none of them arrived.
func (d *Disk) crashLocked(seed uint64) {
	random := rand.New(rand.NewPCG(seed, mix(d.config.Seed)+uint64(d.index)))
	keep := [...]float64{0.1, 0.5, 0.9}[random.IntN(3)]
	var picks []pick
	for i := range d.medium.log {
		c := &d.medium.log[i]
		if c.durable || c.length == 0 {
			continue
		}
		if sectorCount(c, d.config.Sector) > 1 && random.IntN(3) == 0 {
			picks = append(picks, pick{index: i, torn: true, parts: tear(c, d.config.Sector, random)})
		} else if random.Float64() < keep {
			picks = append(picks, pick{index: i})
		}
	}
	if random.IntN(2) == 0 {
		random.Shuffle(len(picks), func(i, j int) { picks[i], picks[j] = picks[j], picks[i] })
	}
	d.resolveLocked(picks)
}

// resolveLocked makes what a crash leaves the content of the disk.
func (d *Disk) resolveLocked(picks []pick) {
	resolve(&d.medium.durable, d.medium.log, picks)
	clear(d.medium.log)
	d.medium.log = d.medium.log[:0]
	d.visible = d.medium.durable.freeze().fork()
}

// mix is the finalizer of splitmix64: a number that looks random, from a count.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// sectorCount is how many sectors a change touches.
func sectorCount(c *change, sector int) uint64 {
	s := uint64(sector)
	return (c.offset+c.length+s-1)/s - c.offset/s
}

// tear keeps a prefix, a suffix or any of the sectors of a change.
func tear(c *change, sector int, random *rand.Rand) []span {
	count := sectorCount(c, sector)
	switch random.IntN(3) {
	case 0:
		return prefix(c, sector, 1+random.Uint64N(count-1))
	case 1:
		return suffix(c, sector, 1+random.Uint64N(count-1))
	}
	return mask(c, sector, random)
}

// prefix is the first n sectors of a change.
func prefix(c *change, sector int, n uint64) []span {
	s := uint64(sector)
	return []span{{c.offset, min((c.offset/s+n)*s, c.offset+c.length)}}
}

// suffix is the last n sectors of a change.
func suffix(c *change, sector int, n uint64) []span {
	s := uint64(sector)
	first := c.offset/s + sectorCount(c, sector) - n
	return []span{{max(first*s, c.offset), c.offset + c.length}}
}

const maskPieces = 1 << 12 // of one change; the sectors of a longer one stay together in runs

// mask is any of the sectors of a change.
func mask(c *change, sector int, random *rand.Rand) []span {
	s := uint64(sector)
	step := (sectorCount(c, sector) + maskPieces - 1) / maskPieces * s
	var parts []span
	end := c.offset + c.length
	for from := c.offset; from < end; {
		to := min(from/s*s+step, end)
		if random.IntN(2) == 0 {
			if n := len(parts); n > 0 && parts[n-1].to == from {
				parts[n-1].to = to
			} else {
				parts = append(parts, span{from, to})
			}
		}
		from = to
	}
	return parts
}
