package vm

import (
	"runtime"
	"testing"
)

// TestGoNBDClient attaches an export of bin/ashlar with the client of go-nbd, which is the
// kernel's driver and a handshake of its own.
func TestGoNBDClient(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("go-nbd has its ioctls for amd64 only, without cgo (make test-uml does not skip it there)")
	}
	guestTests(t, guestLimit, requireGuest(t), "../../nbd")
}
