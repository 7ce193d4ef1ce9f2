package remote

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/nbd"
)

// Every test of the suite has a server of its own, with memory behind it.
func TestConformance(t *testing.T) {
	const size = 6 << 20
	for _, test := range []struct {
		name        string
		connections int
		headers     nbd.Headers
		brief       bool // runs with the race detector, too
	}{
		{"one connection", 1, nbd.HeadersExtended, true},
		{"several", 3, nbd.HeadersExtended, false},
		{"structured replies", 1, nbd.HeadersStructured, false},
		{"simple replies", 1, nbd.HeadersSimple, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if raceEnabled && !test.brief {
				t.Skip("runs without the race detector")
			}
			memories := map[datapath.Device]*memdev.Device{}
			make := func(readOnly bool) func(t *testing.T) datapath.Device {
				return func(t *testing.T) datapath.Device {
					n := newNode(t)
					m := n.memory(memdev.Config{Size: size, SizeMax: 2 * size, ReadOnly: readOnly})
					n.start(m)
					d := openUnclosed(t, Config{URI: n.uri(), Connections: test.connections, headers: test.headers})
					memories[d] = m
					if got := d.State().Connections; got != test.connections {
						t.Errorf("%d connections, want %d", got, test.connections)
					}
					return d
				}
			}
			devtest.Run(t, make(false), devtest.Options{
				DiscardZeroes: true, ReadOnly: make(true),
				Resize: func(d datapath.Device, size uint64) error {
					if err := memories[d].Resize(size); err != nil {
						return err
					}
					r := d.(*Device)
					before := r.State().Reconnects
					r.dropSession("to see the new size")
					eventually(t, "a new session", func() bool { return r.State().Reconnects > before && r.State().Condition == Online })
					return nil
				},
			})
		})
	}
}
