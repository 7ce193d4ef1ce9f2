// go-nbd has its ioctls for no other architecture without cgo.

//go:build amd64

package nbd

import (
	"errors"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	gonbd "github.com/pojntfx/go-nbd/pkg/client"
)

// TestGoNBDClientListsOurExports drives the one part of go-nbd's client that
// needs no kernel device. It greets with no flags at all, so it also shows that
// options of such clients are honoured.
func TestGoNBDClientListsOurExports(t *testing.T) {
	exports := &ExportSet{}
	for _, name := range []string{"disk", "other"} {
		if err := exports.Add(&Export{Name: name, Device: nil}); err != nil {
			t.Fatal(err)
		}
	}
	// go-nbd reads one reply of LIST; the protocol sends one per export. So it sees
	// the first.
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	deadline := time.Now().Add(10 * time.Second)
	ended := make(chan error, 1)
	go func() { // ends with the conversation
		ours, err := l.Accept()
		if err == nil {
			defer func() { _ = ours.Close() }()
			_ = ours.SetDeadline(deadline) // fails for a closed socket only
			_, err = negotiate(ours, handshakeConfig{exports: exports, listing: true})
		}
		ended <- err
	}()
	theirs, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = theirs.Close() }()
	if err := theirs.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	names, err := gonbd.List(theirs)
	if err != nil {
		t.Fatalf("go-nbd's List: %v", err)
	}
	if !slices.Equal(names, []string{"disk"}) {
		t.Errorf("go-nbd sees %q, want the first export", names)
	}
	if err := <-ended; !errors.Is(err, errDisconnect) {
		t.Errorf("the handshake ended with %v, want a proper ABORT", err)
	}
}
