package attach

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const fakeFamilyID = 33

func dialFake(f genltest.Func) func() (*genetlink.Conn, error) {
	return func() (*genetlink.Conn, error) { return genltest.Dial(f), nil }
}

func fakeFamily(f genltest.Func, groups ...genetlink.MulticastGroup) genltest.Func {
	return genltest.ServeFamily(genetlink.Family{ID: fakeFamilyID, Version: familyVersion, Name: familyName, Groups: groups}, f)
}

func TestFamilyCarriesCommands(t *testing.T) {
	var got []genetlink.Message
	var flags []netlink.HeaderFlags
	f, err := openFamily(dialFake(fakeFamily(func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		got, flags = append(got, m), append(flags, n.Header.Flags)
		if n.Header.Type != fakeFamilyID {
			t.Errorf("family %d", n.Header.Type)
		}
		if m.Header.Command == commandConnect {
			return []genetlink.Message{{Header: genetlink.Header{Command: commandConnect}, Data: []byte{8, 0, 1, 0, 5, 0, 0, 0}}}, nil
		}
		return nil, genltest.Error(0)
	})), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	reply, err := f.execute(commandConnect, []byte{4, 0, 7, 128}, true)
	if err != nil {
		t.Fatal(err)
	}
	if index, err := decodeIndex(reply); err != nil || index != 5 {
		t.Errorf("%v, %v", index, err)
	}
	if _, err := f.execute(commandDisconnect, []byte{8, 0, 1, 0, 5, 0, 0, 0}, false); err != nil {
		t.Error(err)
	}
	if len(got) != 2 || got[0].Header.Version != 1 || !bytes.Equal(got[0].Data, []byte{4, 0, 7, 128}) {
		t.Errorf("%+v", got)
	}
	if flags[0]&netlink.Acknowledge != 0 || flags[1]&netlink.Acknowledge == 0 {
		t.Errorf("flags %v", flags)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// TestFamilyIsFoundAgainAfterReloading has the module unloaded, and loaded with another id.
func TestFamilyIsFoundAgainAfterReloading(t *testing.T) {
	id, loaded, sent := uint16(fakeFamilyID), true, 0
	f, err := openFamily(dialFake(func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if !loaded || n.Header.Type >= fakeFamilyID && uint16(n.Header.Type) != id {
			return nil, genltest.Error(int(unix.ENOENT))
		}
		family := genetlink.Family{ID: id, Version: familyVersion, Name: familyName}
		return genltest.ServeFamily(family, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			sent++
			return nil, genltest.Error(0)
		})(m, n)
	}), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	loaded = false
	if _, err := f.execute(commandDisconnect, nil, false); !errors.Is(err, ErrNoDriver) || !errors.Is(netlinkError("status", err), ErrNoDriver) {
		t.Errorf("unloaded: %v", err)
	}
	loaded, id = true, fakeFamilyID+7
	for range 2 {
		if _, err := f.execute(commandDisconnect, nil, false); err != nil {
			t.Errorf("loaded again: %v", err)
		}
	}
	if sent != 2 {
		t.Errorf("%d commands arrived", sent)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestFamilyWantsOneReply(t *testing.T) {
	f, err := openFamily(dialFake(fakeFamily(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) { return nil, io.EOF })), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.execute(commandStatus, nil, true); err == nil {
		t.Error("no reply, and no error")
	}
}

func TestOpenWithoutADriver(t *testing.T) {
	none := func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.ENOENT))
	}
	sys := t.TempDir()
	if _, err := openFamily(dialFake(none), sys); !errors.Is(err, ErrNoDriver) {
		t.Errorf("no module: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(sys, "module/nbd"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := openFamily(dialFake(none), sys); !errors.As(err, new(*KernelError)) {
		t.Errorf("a module without netlink: %v", err)
	}
	for dialErr, want := range map[error]error{
		os.NewSyscallError("socket", unix.EPROTONOSUPPORT): ErrNoDriver,
		os.NewSyscallError("socket", unix.EPERM):           ErrPermission,
		os.NewSyscallError("socket", unix.EMFILE):          unix.EMFILE,
	} {
		if _, err := openFamily(func() (*genetlink.Conn, error) { return nil, dialErr }, sys); !errors.Is(err, want) {
			t.Errorf("%v: %v", dialErr, err)
		}
	}
	denied := func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.EPERM))
	}
	if _, err := openFamily(dialFake(denied), sys); !errors.Is(err, ErrPermission) {
		t.Errorf("%v", err)
	}
}

func TestListenNeedsTheGroup(t *testing.T) {
	f, err := openFamily(dialFake(fakeFamily(nil)), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.listen(); !errors.As(err, new(*KernelError)) {
		t.Errorf("%v", err)
	}
	f, err = openFamily(dialFake(fakeFamily(nil, genetlink.MulticastGroup{ID: 7, Name: groupName})), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.listen(); err == nil { // the fake socket has no groups
		t.Error("joined")
	}
}

func TestNoticesAreThoseOfDeadConnections(t *testing.T) {
	turn := 0
	n := &kernelNotices{conn: genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		dead := func(data ...byte) genetlink.Message {
			return genetlink.Message{Header: genetlink.Header{Command: commandLinkDead}, Data: data}
		}
		turn++
		switch turn {
		case 1:
			return []genetlink.Message{{Header: genetlink.Header{Command: commandStatus}}}, nil // of no concern
		case 2:
			return []genetlink.Message{dead(8, 0, 1, 0, 5, 0, 0, 0), dead(8, 0, 1, 0, 6, 0, 0, 0)}, nil
		case 3:
			return nil, &netlink.OpError{Op: "receive", Err: unix.ENOBUFS}
		case 4:
			return []genetlink.Message{dead()}, nil // without an index
		}
		return nil, &netlink.OpError{Op: "receive", Err: unix.EBADF}
	})}
	for _, want := range []struct {
		index Index
		lost  bool
		err   error
	}{{5, false, nil}, {6, false, nil}, {0, true, nil}, {0, true, nil}, {0, false, unix.EBADF}} {
		index, lost, err := n.receive()
		if index != want.index || lost != want.lost || !errors.Is(err, want.err) {
			t.Errorf("%v, %v, %v; want %v", index, lost, err, want)
		}
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}

func TestKernelsOwnWordsArePassedOn(t *testing.T) {
	err := netlinkError("connect", &netlink.OpError{Op: "receive", Err: unix.EINVAL, Message: "Attribute failed policy validation"})
	if want := "attach: connect: the kernel refuses: Attribute failed policy validation: invalid argument"; err.Error() != want || !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v", err)
	}
}

// FuzzDecode reads what only the kernel sends: it is enough not to fall over.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 5, 0, 0, 0})
	f.Add([]byte{24, 0, 9, 0, 20, 0, 1, 0, 8, 0, 1, 0, 5, 0, 0, 0, 5, 0, 2, 0, 1, 0, 0, 0})
	f.Add([]byte{3, 0, 1, 0})
	f.Add([]byte{7, 0, 1, 0, 1, 2, 3, 0})
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = decodeIndex(b)  // an error is an answer, too
		_, _ = decodeStatus(b) // the same
	})
}
