package memdisk

import "sync"

// Group is disks that lose power together. Their changes have one order, and a
// trace holds the events of all of them.
type Group struct {
	disks []*Disk // immutable once made

	mu      sync.Mutex // guards what follows and all of the disks
	clock   uint64     // the number of the last event, recorded or not
	tracing bool
	trace   []Event // its numbers have no gaps
	marks   int     // in trace
}

// NewGroup makes a disk of zeros for each Config.
func NewGroup(configs ...Config) *Group {
	g := &Group{}
	for i, c := range configs {
		g.disks = append(g.disks, newDisk(g, i, c))
	}
	return g
}

// Disks are the disks of the group, in the order of their Configs. The slice is
// the group's.
func (g *Group) Disks() []*Disk { return g.disks }

// Disk is disk i.
func (g *Group) Disk(i int) *Disk { return g.disks[i] }

// Clone clones every disk, at one moment; see [Disk.Clone].
func (g *Group) Clone() *Group {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.cloneLocked()
}

func (g *Group) cloneLocked() *Group {
	clone := &Group{clock: g.clock}
	for i, d := range g.disks {
		clone.disks = append(clone.disks, d.cloneLocked(clone, i))
	}
	return clone
}
