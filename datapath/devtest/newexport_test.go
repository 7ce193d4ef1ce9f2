package devtest_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// The export of docs/new-export.md.

// dump is an export with one client, a writer, that is sent the whole device.
// Everything but done belongs to the reactor.
type dump struct {
	reactor *reactor.Reactor
	queue   datapath.Queue
	info    datapath.Info
	to      io.Writer
	request datapath.Request
	resume  reactor.Deferred
	done    chan error
}

// Dump copies d to w through r and waits for the end.
func Dump(r *reactor.Reactor, d datapath.Device, w io.Writer) error {
	x := &dump{reactor: r, info: d.Info(), to: w, done: make(chan error, 1)}
	x.request.Done, x.resume.Func = x.read, x.next
	if err := r.Run(func(*reactor.Reactor) { x.start(d) }); err != nil {
		return err
	}
	return <-x.done
}

func (x *dump) start(d datapath.Device) {
	queue, err := d.OpenQueue(x.reactor, 1) // one request in flight
	if err != nil {
		x.done <- err
		return
	}
	x.queue = queue
	x.next()
}

// next begins the next request. Where there is no buffer it waits for one, and so
// does the client: this is the only place that may make it wait.
func (x *dump) next() {
	r := &x.request
	r.Op, r.Length = datapath.OpRead, min(64<<10, x.info.Size-r.Offset)
	if r.Length == 0 {
		x.end(nil)
		return
	}
	if r.Buf = x.reactor.Buffers().Alloc(int(r.Length)); r.Buf == nil {
		x.reactor.WaitBuffers(&x.resume)
		return
	}
	if status := datapath.Validate(&x.info, r); status != datapath.StatusOK {
		x.reactor.FreeBuffer(r.Buf)
		x.end(status.Err())
		return
	}
	x.queue.Submit(r)
}

// read is called once for each request, never inside Submit.
func (x *dump) read(r *datapath.Request) {
	err := r.Status.Err()
	if err == nil {
		_, err = x.to.Write(r.Buf) // a real export queues it and sends it with others
	}
	x.reactor.FreeBuffer(r.Buf)
	if err != nil {
		x.end(err)
		return
	}
	r.Offset += r.Length
	x.next()
}

func (x *dump) end(err error) {
	if closeErr := x.queue.Close(); err == nil {
		err = closeErr
	}
	x.done <- err
}

func TestDump(t *testing.T) {
	d, err := memdev.New(memdev.Config{Size: 1<<20 + 512})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	d.Store().Write([]byte("the middle"), 512<<10)
	want := make([]byte, 1<<20+512)
	copy(want[512<<10:], "the middle")
	var got bytes.Buffer
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	if err := Dump(r, datapath.Checked(d), &got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Error("other bytes arrived")
	}
}
