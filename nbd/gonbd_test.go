package nbd

import (
	"bytes"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
)

// goNBD serves exports with github.com/pojntfx/go-nbd until the end of the test.
func goNBD(t *testing.T, options *server.Options, exports ...*server.Export) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "gonbd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { // ends when l is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { // ends when the client closes
				defer conn.Close()
				if err := server.Handle(conn, exports, options); err != nil {
					t.Logf("go-nbd: %v", err) // it reports a client's leaving in the handshake too
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close() // nothing is pending
		running.Wait()
	})
	return socket
}

func memoryExport(name string) *server.Export {
	return &server.Export{Name: name, Description: "memory of go-nbd", Backend: backend.NewMemoryBackend(make([]byte, fakeSize))}
}

// TestGoNBDServer runs the client against go-nbd's server, which has simple
// replies, no flush, and a handshake with GO only.
func TestGoNBDServer(t *testing.T) {
	checkClientGoroutines(t)
	socket := goNBD(t, nil, memoryExport("a"), memoryExport("b"))
	c := dialFake(t, socket, Options{Export: "b", MetaContexts: []string{ContextAllocation}})
	if c.Headers() != HeadersSimple || c.Size() != fakeSize || c.Flags() != FlagHasFlags|FlagCanMultiConn || len(c.Contexts()) != 0 {
		t.Errorf("headers %s, size %d, flags %#x, contexts %v", c.Headers(), c.Size(), c.Flags(), c.Contexts())
	}
	if info := c.Info(); info.BlockMin != 1 || info.BlockPreferred != 4096 || info.PayloadMax != 32<<20 || info.Description != "memory of go-nbd" {
		t.Errorf("info %+v", info)
	}
	runModel(t, c, make([]byte, fakeSize), 1, 16, 50)

	// Another connection to the same export sees the data; one to another export
	// does not.
	want := bytes.Repeat([]byte("stone"), 1000)
	if _, err := c.WriteAt(want, 12345); err != nil {
		t.Fatal(err)
	}
	for export, same := range map[string]bool{"a": false, "b": true} {
		other := dialFake(t, socket, Options{Export: export, Headers: HeadersSimple})
		got := make([]byte, len(want))
		if _, err := other.ReadAt(got, 12345); err != nil || bytes.Equal(got, want) != same {
			t.Errorf("export %s: %v, same %v", export, err, bytes.Equal(got, want))
		}
		if err := other.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestGoNBDListAndInfo(t *testing.T) {
	checkClientGoroutines(t)
	// It puts all its exports into one reply, of which the protocol sees the first;
	// so there is one here.
	socket := goNBD(t, nil, memoryExport("only"))
	exports, err := List(t.Context(), "unix", socket, Options{})
	if err != nil || len(exports) != 1 || exports[0].Name != "only" {
		t.Errorf("List: %v %v", exports, err)
	}
	info, err := Info(t.Context(), "unix", socket, Options{Export: "only"})
	if err != nil || info.Name != "only" || info.Description != "memory of go-nbd" || info.Size != fakeSize {
		t.Errorf("Info: %+v %v", info, err)
	}
	if _, err := Dial(t.Context(), "unix", socket, Options{Export: "absent"}); err == nil {
		t.Error("an unknown export was opened")
	}
}

// TestGoNBDReadOnly finds an export read-only by the server's answers: it does
// not advertise it.
func TestGoNBDReadOnly(t *testing.T) {
	checkClientGoroutines(t)
	socket := goNBD(t, &server.Options{ReadOnly: true}, memoryExport(""))
	c := dialFake(t, socket, Options{})
	if c.Flags() != 0 {
		t.Errorf("flags %#x", c.Flags())
	}
	if err := c.Write(t.Context(), make([]byte, 512), 0, 0); !errors.Is(err, ErrnoPerm) {
		t.Errorf("write: %v", err)
	}
	if err := c.Read(t.Context(), make([]byte, 512), 0, 0); err != nil {
		t.Errorf("read after it: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
