package daemon

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

// TestRequestsFailAfterTheDeadTimeout: of an export of a server that does not come back.
func TestRequestsFailAfterTheDeadTimeout(t *testing.T) {
	checkLeaks(t)
	below, lower := startExport(t, Source{Memory: mib}, 0)
	above, upper := startExport(t, Source{URI: "nbd+unix:///?socket=" + lower}, time.Second)
	client, err := nbd.Dial(t.Context(), "unix", upper, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(client.Write(t.Context(), make([]byte, 4096), 0, 0), below.Stop(t.Context())); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := client.Write(t.Context(), make([]byte, 4096), 0, 0); !errors.Is(err, unix.EIO) || time.Since(begin) < time.Second {
		t.Errorf("after %v: %v", time.Since(begin), err)
	}
	if err := errors.Join(client.Close(), above.Stop(t.Context())); err != nil {
		t.Error(err)
	}
}

// TestDevicesHaveTheDeadTimeout: of the operator, and without one that of the packages.
func TestDevicesHaveTheDeadTimeout(t *testing.T) {
	checkLeaks(t)
	c := ServeConfig{DataDir: t.TempDir(), Log: quiet(), Reactors: ReactorConfig{Reactors: 1, Poll: reactor.PollOff}}
	reactors, err := c.Reactors.start(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer stopReactors(reactors)
	for _, dead := range []time.Duration{0, 7 * time.Second, DeadNever} {
		c.DeadTimeout = dead
		d, err := newDevices(nil, nil, reactors, &c)
		if err != nil {
			t.Fatal(err)
		}
		config := d.ways[controlpb.Via_VIA_NBD].(*nbdWay).config("x", deviceOptions{})
		if config.DeadTimeout != dead || d.dead != dead {
			t.Errorf("want %v, have %v for a daemon and %v for a server", dead, config.DeadTimeout, d.dead)
		}
	}
}
