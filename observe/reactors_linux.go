//go:build amd64 || arm64

package observe

import (
	"errors"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/ashlar-storage/ashlar/observe/bpf"
)

func (o *Observer) reactorsGroup() *group {
	return &group{
		name: GroupReactors,
		spec: bpf.LoadReactors,
		prepare: func(spec *ebpf.CollectionSpec) error {
			return spec.Variables[bpf.ReactorsVarProcess].Set(int32(o.process))
		},
		required: [][]string{{bpf.ReactorsProgSchedSwitch}, {bpf.ReactorsProgSchedWakeup}},
		arm:      func() error { return o.setThreadsLocked(o.threads) },
	}
}

func (o *Observer) setThreadsLocked(ids []int) error {
	g := o.group(GroupReactors)
	if g.collection == nil {
		o.threads = slices.Clone(ids)
		return nil // they will be when it is loaded
	}
	threads := g.collection.Maps[bpf.ReactorsMapThreads]
	for _, id := range o.threads {
		if !slices.Contains(ids, id) {
			if err := threads.Delete(int32(id)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
		}
	}
	for _, id := range ids {
		if err := threads.Update(int32(id), &bpf.ReactorsThread{}, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return err
		}
	}
	o.threads = slices.Clone(ids)
	return nil
}

func (o *Observer) readThreads(g *group, s *Snapshot) error {
	var t bpf.ReactorsThread
	for _, id := range o.threads {
		if err := g.collection.Maps[bpf.ReactorsMapThreads].Lookup(int32(id), &t); err != nil {
			return err
		}
		thread := Thread{ID: id}
		thread.OffCPU.addRaw(t.OffCpu.Sum, &t.OffCpu.Counts)
		thread.Waiting.addRaw(t.Waiting.Sum, &t.Waiting.Counts)
		thread.Wakeup.addRaw(t.Wakeup.Sum, &t.Wakeup.Counts)
		s.Threads = append(s.Threads, thread)
	}
	return nil
}
