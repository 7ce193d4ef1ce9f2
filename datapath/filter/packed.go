package filter

import (
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/histogram"
)

// PackedStats is a StatsSnapshot in little memory, for those who keep many: some
// kilobytes for each operation that was used. It does not change.
type PackedStats [datapath.OpCount]*packedOp

type packedOp struct {
	count, errors, bytes uint64
	inFlight             int64
	latency              histogram.Packed
	stages               [datapath.StageCount]histogram.Packed
}

// Pack is what s has, for keeping.
func (s *StatsSnapshot) Pack() *PackedStats {
	p := &PackedStats{}
	for op, o := range s {
		if o != nil {
			p[op] = o.pack()
		}
	}
	return p
}

func (o *OpStats) pack() *packedOp {
	p := &packedOp{count: o.Count, errors: o.Errors, bytes: o.Bytes, inFlight: o.InFlight, latency: o.Latency.Pack()}
	for i, h := range o.Stages {
		if h != nil {
			p.stages[i] = h.Pack()
		}
	}
	return p
}

// AddPacked adds what p has; nil has nothing.
func (s *StatsSnapshot) AddPacked(p *PackedStats) {
	if p == nil {
		return
	}
	for op, from := range p {
		if from == nil {
			continue
		}
		if s[op] == nil {
			s[op] = &OpStats{}
		}
		o := s[op]
		o.Count += from.count
		o.Errors += from.errors
		o.Bytes += from.bytes
		o.InFlight += from.inFlight
		o.Latency.AddPacked(&from.latency)
		for i := range from.stages {
			if from.stages[i].Count() == 0 {
				continue
			}
			if o.Stages[i] == nil {
				o.Stages[i] = &histogram.Histogram{}
			}
			o.Stages[i].AddPacked(&from.stages[i])
		}
	}
}
