package attach

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestServed: a device has a server while its connections live, and when somebody
// replaces the one that is offered.
func TestServed(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	device := attached(t, d, s.config())
	if _, err := d.Served(3); !errors.Is(err, ErrNotAttached) {
		t.Errorf("a device without anything: %v", err)
	}
	k.file("proc/self/net/unix", "Num       RefCount Protocol Flags    Type St Inode Path\n")
	for range 2 {
		if served, err := d.Served(device.Index); err != nil || !served {
			t.Errorf("its connections live: %v, %v", served, err)
		}
	}
	if r := k.last(commandReconfigure); len(r.sockets) != 1 || r.backend != device.Backend {
		t.Errorf("offered %+v", r)
	}
	k.fail[commandReconfigure] = []error{unix.EPERM}
	if _, err := d.Served(device.Index); !errors.Is(err, ErrPermission) {
		t.Errorf("without the right: %v", err)
	}

	// The kernel keeps the socket that it took, and lists it.
	k.lose(device.Index, 1)
	k.taken = func(inode uint64) {
		k.file("proc/self/net/unix", fmt.Sprintf("Num       RefCount Protocol Flags    Type St Inode Path\nffff888 00000002 00000000 00000000 0001 03 %d\nffff888 00000003 00000000 00000000 0001 03 7 /run/x\n", inode))
	}
	if served, err := d.Served(device.Index); err != nil || served {
		t.Errorf("nobody replaces what died: %v, %v", served, err)
	}
}

func TestServedReadsTheTableOfSockets(t *testing.T) {
	k, d := newFakeKernel(t)
	if d.host.socket(1) {
		t.Error("a socket of no table")
	}
	k.file("proc/self/net/unix", strings.Join([]string{
		"Num       RefCount Protocol Flags    Type St Inode Path",
		"0000000000000000: 00000002 00000000 00010000 0001 01 16165 /run/16166",
		"0000000000000000: 00000003 00000000 00000000 0001 03 99",
		"short line", "",
	}, "\n"))
	for inode, want := range map[uint64]bool{16165: true, 99: true, 16166: false, 9: false, 3: false} {
		if got := d.host.socket(inode); got != want {
			t.Errorf("%d: %v", inode, got)
		}
	}
}
