package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd/attach"
)

// slowDriver is the kernel's nbd driver with one device, whose cache it writes back for
// as long as a test wants.
type slowDriver struct {
	writing chan struct{} // has a message once Disconnect is at it
	written chan error    // with which Disconnect ends
	lost    chan error    // with which Keep ends
}

func (d *slowDriver) Keep(ctx context.Context, _ attach.Index, _ attach.Config) error {
	select {
	case err := <-d.lost:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *slowDriver) Status(attach.Index) (attach.Device, error) { return attach.Device{}, nil }

func (d *slowDriver) Reconfigure(context.Context, attach.Index, attach.Config) (attach.Device, error) {
	return attach.Device{}, nil
}

func (d *slowDriver) Disconnect(context.Context, attach.Index, attach.DisconnectOptions) error {
	d.writing <- struct{}{}
	return <-d.written
}

// TestNBDDeviceIsLookedAtWhileItIsDetached: a probe of the daemon's health, say, comes
// while the kernel writes back what is cached.
func TestNBDDeviceIsLookedAtWhileItIsDetached(t *testing.T) {
	checkLeaks(t)
	c := ServeConfig{Log: quiet(), Reactors: ReactorConfig{Reactors: 1, Poll: reactor.PollOff}}
	reactors, err := c.Reactors.start(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer stopReactors(reactors)
	way, err := newNBDWay(reactors, 0, c.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer way.shutdown(t.Context())
	driver := &slowDriver{writing: make(chan struct{}, 1), written: make(chan error, 1), lost: make(chan error, 1)}
	a := &nbdAttachment{way: way, driver: driver, config: attach.Config{Export: "x"}, node: "/dev/nbd0"}
	a.keep()
	want := func(state controlpb.DeviceState) {
		t.Helper()
		if got, why := a.state(); got != state {
			t.Errorf("%v (%s), want %v", got, why, state)
		}
	}
	detached := make(chan error, 1)
	detach := func() { detached <- a.detach(t.Context(), false) }
	want(controlpb.DeviceState_DEVICE_STATE_WAITING) // nobody has connected

	go detach() // ends with what is written
	<-driver.writing
	want(controlpb.DeviceState_DEVICE_STATE_WAITING)
	driver.written <- &attach.BusyError{}
	if err := <-detached; !errors.Is(err, control.ErrInUse) {
		t.Errorf("a device in use: %v", err)
	}
	want(controlpb.DeviceState_DEVICE_STATE_WAITING) // it is kept on

	driver.lost <- attach.ErrNotAttached
	for deadline := time.Now().Add(serveWait); a.failure() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the end of keep is not seen")
		}
	}
	want(controlpb.DeviceState_DEVICE_STATE_FAILED)
	if err := a.detach(t.Context(), false); err != nil { // the kernel is not asked: it may be another's by now
		t.Errorf("a device that is gone: %v", err)
	}
}
