//go:build amd64 || arm64

package observe

import (
	"errors"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/ashlar-storage/ashlar/observe/bpf"
)

type nbdClient = bpf.NbdClient

// nbdMemory is about how much the counters of NBD devices may take, on all CPUs
// together: 5 KiB a CPU and device.
const nbdMemory = 8 << 20

func (o *Observer) nbdGroup() *group {
	return &group{
		name:   GroupNBD,
		module: "nbd",
		spec:   bpf.LoadNbd,
		prepare: func(spec *ebpf.CollectionSpec) error {
			clients := spec.Maps[bpf.NbdMapClients]
			clients.MaxEntries = scale(nbdMemory, int(clients.ValueSize), o.cpus, 64, 512)
			return nil
		},
		required: [][]string{{bpf.NbdProgNbdSendRequest}, {bpf.NbdProgNbdPayloadSent}, {bpf.NbdProgNbdHeaderReceived}, {bpf.NbdProgNbdPayloadReceived}},
	}
}

// ublkGroup is never loaded: the driver has no tracepoints up to Linux 6.18.
func ublkGroup() *group {
	return &group{name: GroupUblk, reason: "the driver ublk_drv has no tracepoints; its devices are observed as disks"}
}

func (o *Observer) readNBD(g *group, s *Snapshot) error {
	var refused uint64
	if err := g.collection.Variables[bpf.NbdVarRefused].Get(&refused); err == nil && refused > 0 {
		s.Unobserved = append(s.Unobserved, Unobserved{GroupNBD, "there are more NBD devices than counters"})
	}
	devices, err := keys[uint32](g.collection.Maps[bpf.NbdMapClients])
	if err != nil {
		return err
	}
	slices.Sort(devices)
	for _, device := range devices {
		d := Disk{Number: numberOf(device), Name: numberOf(device).String()}
		if !o.kernel.rename(&d) {
			if err := g.collection.Maps[bpf.NbdMapClients].Delete(device); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
			continue
		}
		switch err := g.collection.Maps[bpf.NbdMapClients].Lookup(device, &o.clients); {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			continue // it went meanwhile
		case err != nil:
			return err
		}
		n := NBDDevice{Name: d.Name, Number: d.Number}
		for i := range o.clients {
			c := &o.clients[i]
			n.Send.addRaw(c.Send.Sum, &c.Send.Counts)
			n.Wait.addRaw(c.Wait.Sum, &c.Wait.Counts)
			n.Receive.addRaw(c.Receive.Sum, &c.Receive.Counts)
		}
		s.NBD = append(s.NBD, n)
	}
	slices.SortFunc(s.NBD, func(a, b NBDDevice) int { return strings.Compare(a.Name, b.Name) })
	return nil
}
