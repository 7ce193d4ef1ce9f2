package observe

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// ioctls of linux/nbd.h.
const (
	nbdSetSock, nbdSetBlockSize, nbdSetSize, nbdDoIt, nbdClearSock, nbdDisconnect = 0xab00, 0xab01, 0xab02, 0xab03, 0xab04, 0xab08
)

// nbdDevice is a device of the kernel's NBD client whose server, in this process,
// needs the given time for each request.
func nbdDevice(t *testing.T, size int, delay time.Duration) *os.File {
	t.Helper()
	testenv.RequireRoot(t)
	devices, _ := filepath.Glob("/dev/nbd*") // the pattern is well-formed
	if _, err := os.Stat("/sys/module/nbd"); err != nil || len(devices) == 0 {
		missing(t, "the driver nbd")
	}
	f, err := os.OpenFile(devices[0], os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		request uint
		value   int
	}{{nbdSetSock, pair[0]}, {nbdSetBlockSize, 4096}, {nbdSetSize, size}} {
		if err := unix.IoctlSetInt(int(f.Fd()), x.request, x.value); err != nil {
			t.Fatalf("ioctl %#x: %v", x.request, err)
		}
	}
	file := os.NewFile(uintptr(pair[1]), "nbd server")
	connection, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	_ = file.Close() // the connection has a descriptor of its own
	served, ended := make(chan error, 1), make(chan struct{})
	go func() { served <- serveNBD(connection, delay) }() // ends with the connection
	go func() {                                           // ends with nbdDisconnect
		defer close(ended)
		_ = unix.IoctlSetInt(int(f.Fd()), nbdDoIt, 0) // it reports how the connection ended, which the test decides
	}()
	t.Cleanup(func() {
		if err := unix.IoctlSetInt(int(f.Fd()), nbdDisconnect, 0); err != nil {
			t.Error(err)
		}
		<-ended
		_ = unix.IoctlSetInt(int(f.Fd()), nbdClearSock, 0) // the device may have done so
		_ = unix.Close(pair[0])                            // the kernel has it no more
		if err := <-served; err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		_ = f.Close() // what it wrote is nowhere
	})
	return f
}

// serveNBD answers requests for zeros until the client says goodbye.
func serveNBD(c net.Conn, delay time.Duration) error {
	defer func() { _ = c.Close() }() // all has been said
	var request [28]byte
	for {
		if _, err := io.ReadFull(c, request[:]); err != nil {
			return err
		}
		length := int64(binary.BigEndian.Uint32(request[24:]))
		reply := binary.BigEndian.AppendUint32(nil, 0x67446698)
		reply = binary.BigEndian.AppendUint32(reply, 0)
		reply = append(reply, request[8:16]...)
		switch binary.BigEndian.Uint16(request[6:]) {
		case 0: // read
			reply = append(reply, make([]byte, length)...)
		case 1: // write
			if _, err := io.CopyN(io.Discard, c, length); err != nil {
				return err
			}
		case 2: // goodbye
			return nil
		}
		time.Sleep(delay)
		if _, err := c.Write(reply); err != nil {
			return err
		}
	}
}

func TestPhasesOfTheKernelsNBDClient(t *testing.T) {
	const delay, reads, writes = 5 * time.Millisecond, 20, 30
	f := nbdDevice(t, 1<<20, delay)
	o := observing(t, Config{Groups: []string{GroupDisks, GroupNBD}})
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	number := Number{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	find := func() NBDDevice {
		s := o.Snapshot()
		if i := slices.IndexFunc(s.NBD, func(d NBDDevice) bool { return d.Number == number }); i >= 0 {
			return s.NBD[i]
		}
		return NBDDevice{}
	}
	before := find()
	b := aligned(t, 4096)
	for i := range writes {
		if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	for i := range reads {
		if _, err := f.ReadAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	d := find()
	if d.Name != filepath.Base(f.Name()) {
		t.Errorf("%s is called %q", f.Name(), d.Name)
	}
	for _, h := range []struct {
		name        string
		all, before *Histogram
		least       time.Duration
	}{{"send", &d.Send, &before.Send, 0}, {"wait", &d.Wait, &before.Wait, delay * 9 / 10}, {"receive", &d.Receive, &before.Receive, 0}} {
		h.all.Sub(h.before)
		if n := h.all.Count(); n < (reads+writes)*9/10 { // others may look at the device too
			t.Errorf("%s: %d times, want %d", h.name, n, reads+writes)
		}
		if p50 := h.all.Quantile(0.5); p50 < h.least*7/8 {
			t.Errorf("%s: half took up to %v", h.name, p50)
		}
		plausible(t, h.name, h.all)
		t.Logf("%s: %d times, p50 %v", h.name, h.all.Count(), h.all.Quantile(0.5))
	}
	w := disk(o.Snapshot(), number).operation("write")
	if w.Count != writes || w.Depth != 0 || w.Service.Quantile(0.5) < delay*7/8 {
		t.Errorf("%d writes, %d in flight, service p50 %v", w.Count, w.Depth, w.Service.Quantile(0.5))
	}
}

func TestThereIsNothingToSeeOfUblk(t *testing.T) {
	o := observing(t, Config{Groups: []string{GroupReactors}})
	if got := reason(o.Unobserved(), GroupUblk); got != "it is switched off" {
		t.Errorf("switched off: %q", got)
	}
	o = with(t, Config{}, real())
	if got := reason(o.Unobserved(), GroupUblk); !strings.Contains(got, "observed as disks") {
		t.Errorf("ublk: %q", got)
	}
}
