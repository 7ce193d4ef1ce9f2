package filedev

import (
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestRequestsWithRegisteredBuffers is of those that cannot be served; package ublk has
// the drivers that register some.
func TestRequestsWithRegisteredBuffers(t *testing.T) {
	testenv.RequireIOURing(t)
	r := startReactor(t, reactor.Config{Engine: reactor.EngineRing})
	var place int
	if err := r.Run(func(r *reactor.Reactor) { place, _ = r.AddBuffers(4) }); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name           string
		path           string
		access         Access
		refusal        string
		offset, length uint64
	}{
		{"nothing registered", testenv.TempFileOn(t, ".", 1<<20), AccessDirect, "", 8192, 4096}, // the kernel answers EFAULT
		{"unaligned", testenv.TempFileOn(t, ".", 1<<20), AccessDirect, "", 8192 + 100, 4096},
		{"the ragged end", testenv.TempFileOn(t, ".", 1<<20+100), AccessDirect, "", 1 << 20, 100},
		{"buffered", testenv.TempFileOn(t, ".", 1<<20), AccessBuffered, "past the page cache", 8192, 4096},
		{"in memory", testenv.TempFileOn(t, "/dev/shm", 1<<20), AccessAuto, "past the page cache", 8192, 4096},
		{"in memory, directly", testenv.TempFileOn(t, "/dev/shm", 1<<20), AccessDirect, "in memory", 8192, 4096},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, err := Open(test.path, Options{Access: test.access})
			if err != nil {
				t.Skipf("no such access here: %v", err)
			}
			t.Cleanup(func() { _ = d.Close() }) // nothing was written
			align, err := datapath.FixedBuffersOf(datapath.Checked(d))
			if test.refusal == "" && (err != nil || align != d.align) || test.refusal != "" && (err == nil || !strings.Contains(err.Error(), test.refusal)) {
				t.Errorf("takes multiples of %d, %v", align, err)
			}
			if test.refusal != "" {
				return
			}
			c := newClient(t, d, r, 1)
			for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite} {
				ended := make(chan datapath.Status, 1)
				request := &datapath.Request{Op: op, Offset: test.offset, Length: test.length, Fixed: uint16(place) + 1,
					Done: func(r *datapath.Request) { ended <- r.Status }}
				if err := r.Run(func(*reactor.Reactor) { c.queue.Submit(request) }); err != nil {
					t.Fatal(err)
				}
				if status := <-ended; status != datapath.StatusNotSupported {
					t.Errorf("%s: %s", op, status)
				}
			}
			// The slot serves others as before, also those that it makes of its own.
			for _, op := range []datapath.Op{datapath.OpWriteZeroes, datapath.OpFlush} {
				ended := make(chan datapath.Status, 1)
				request := &datapath.Request{Op: op, Done: func(r *datapath.Request) { ended <- r.Status }}
				if op == datapath.OpWriteZeroes {
					request.Length, request.Flags = 1<<16, datapath.FlagNoUnmap
				}
				if err := r.Run(func(*reactor.Reactor) { c.queue.Submit(request) }); err != nil {
					t.Fatal(err)
				}
				if status := <-ended; status != datapath.StatusOK {
					t.Errorf("%s: %s", op, status)
				}
			}
		})
	}
	memory := datapath.Device(nil)
	if _, err := datapath.FixedBuffersOf(memory); err == nil {
		t.Error("no device takes them")
	}
}
