//go:build amd64 || arm64

package observe

import (
	"cmp"
	"errors"

	"github.com/cilium/ebpf"

	"github.com/ashlar-storage/ashlar/observe/bpf"
)

type ringKind = bpf.RingsKind

// ringNames are those of enum request_kind, in its order.
var ringNames = []string{"read", "write", "sync", "socket", "wait", "command", "other"}

func (o *Observer) ringsGroup() *group {
	return &group{
		name: GroupRings,
		spec: bpf.LoadRings,
		prepare: func(spec *ebpf.CollectionSpec) error {
			return errors.Join(spec.Variables[bpf.RingsVarProcess].Set(uint32(o.process)), o.setPace(spec.Variables[bpf.RingsVarPace]))
		},
		required: [][]string{{bpf.RingsProgIoUringSubmitReq, bpf.RingsProgIoUringSubmitSqe}, {bpf.RingsProgIoUringComplete}},
	}
}

// setPace says from which rate on only some events are timed.
func (o *Observer) setPace(v *ebpf.VariableSpec) error {
	if o.config.Every {
		return nil
	}
	return v.Set(cmp.Or(o.config.pace, usualPace))
}

func (o *Observer) readRings(g *group, s *Snapshot) error {
	for kind, name := range ringNames {
		if err := g.collection.Maps[bpf.RingsMapKinds].Lookup(uint32(kind), &o.rings); err != nil {
			return err
		}
		r := Ring{Kind: name}
		for i := range o.rings {
			r.Submitted += o.rings[i].Submitted
			r.Time.addRaw(o.rings[i].Time.Sum, &o.rings[i].Time.Counts)
		}
		if r.Submitted > 0 {
			s.Rings = append(s.Rings, r)
		}
	}
	return nil
}
