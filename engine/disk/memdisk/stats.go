package memdisk

import "github.com/ashlar-storage/ashlar/datapath"

// Stats counts the requests a disk has done. Bytes are those of the requests.
type Stats struct {
	Reads, ReadBytes       uint64
	Writes, WriteBytes     uint64
	Zeroes, ZeroBytes      uint64 // write-zeroes
	Discards, DiscardBytes uint64
	Flushes                uint64
	FUA                    uint64 // of the writes, write-zeroes and discards
	Failed                 uint64 // requests of any kind, counted nowhere else
}

func (s *Stats) count(r *datapath.Request) {
	switch r.Op {
	case datapath.OpWrite:
		s.Writes++
		s.WriteBytes += r.Length
	case datapath.OpWriteZeroes:
		s.Zeroes++
		s.ZeroBytes += r.Length
	case datapath.OpDiscard:
		s.Discards++
		s.DiscardBytes += r.Length
	}
	if r.Flags&datapath.FlagFUA != 0 {
		s.FUA++
	}
}

// Stats is what was done since the disk was made or ResetStats was called.
func (d *Disk) Stats() Stats {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	return d.stats
}

// ResetStats begins to count anew and returns what was counted.
func (d *Disk) ResetStats() Stats {
	d.group.mu.Lock()
	defer d.group.mu.Unlock()
	s := d.stats
	d.stats = Stats{}
	return s
}
