package remote

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

const testSize = 4 << 20

func fill(b []byte, value byte) []byte {
	for i := range b {
		b[i] = value
	}
	return b
}

func block(value byte) []byte { return fill(make([]byte, 512), value) }

// client opens a queue of d on a reactor of its own.
func client(t *testing.T, d datapath.Device) *devtest.Client {
	t.Helper()
	return devtest.NewClient(t, devtest.Reactors(t, reactor.EngineAuto, 1)[0], d, 16)
}

// TestCutsAtEveryByte cuts the connection after every number of bytes, of the
// handshake and of requests, in both directions. One run takes each third number,
// beginning by the seed.
func TestCutsAtEveryByte(t *testing.T) {
	step := 3
	if testing.Short() || raceEnabled {
		step = 37
	}
	first := int(devtest.Seed(t) % uint64(step))
	for _, headers := range []nbd.Headers{nbd.HeadersExtended, nbd.HeadersStructured, nbd.HeadersSimple} {
		t.Run(headers.String(), func(t *testing.T) {
			n := newNode(t)
			m := n.memory(memdev.Config{Size: testSize})
			n.start(m)
			p := newProxy(t, n.address)
			d := open(t, Config{URI: p.uri(), headers: headers, backoff: time.Millisecond, resend: 5 * time.Millisecond})
			c := client(t, d)
			defer c.Close()
			for _, direction := range []string{"up", "down"} {
				for at := first; ; at += step {
					cuts, value := p.cutCount(), byte(at)
					if direction == "up" {
						p.limit(at, -1)
					} else {
						p.limit(-1, at)
					}
					p.cut()
					first, second, read := block(value), fill(make([]byte, 1024), value+1), make([]byte, 1024)
					requests := []*datapath.Request{
						{Op: datapath.OpWrite, Offset: 4096, Length: 512, Buf: first},
						{Op: datapath.OpWrite, Offset: 4096, Length: 1024, Buf: second}, // over the first
						{Op: datapath.OpWriteZeroes, Offset: 8192, Length: 4096},
						{Op: datapath.OpRead, Offset: 1 << 20, Length: 1024, Buf: read},
						{Op: datapath.OpFlush},
					}
					if headers != nbd.HeadersSimple {
						requests = append(requests, &datapath.Request{Op: datapath.OpExtents, Length: testSize, Context: datapath.ContextAllocation, Extents: make([]datapath.Extent, 0, 4)})
					}
					c.Do(requests...)
					for _, r := range requests {
						if r.Status != datapath.StatusOK {
							t.Fatalf("cut %s at byte %d: %s: %s", direction, at, r.Op, r.Status)
						}
					}
					if got := c.Read(4096, 1024); !bytes.Equal(got, second) {
						t.Fatalf("cut %s at byte %d: the later of two writes is not what is read", direction, at)
					}
					if p.limit(-1, -1); p.cutCount() == cuts { // all went through before the limit
						if at < 800 {
							t.Fatalf("nothing was cut %s at byte %d", direction, at)
						}
						t.Logf("%s: %d bytes", direction, at)
						break
					}
				}
			}
			if got := d.State(); got.Condition != Online || got.Reconnects == 0 {
				t.Errorf("in the end: %+v", got)
			}
		})
	}
}

// TestRestartsLoseNothing has workers on ranges of their own read back what they
// wrote, while the server is stopped and killed, loses what was not flushed, and
// comes back.
func TestRestartsLoseNothing(t *testing.T) {
	for _, connections := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d connections", connections), func(t *testing.T) {
			seed := devtest.Seed(t)
			restarts := 25
			if testing.Short() || raceEnabled {
				restarts = 6
			}
			n := newNode(t)
			v := newVolatile(n, testSize)
			n.start(v)
			d := open(t, Config{URI: n.uri(), Connections: connections})
			var stop atomic.Bool
			var group sync.WaitGroup
			const workers, share = 3, 256 << 10
			models := make([][]byte, workers)
			for i, r := range devtest.Reactors(t, reactor.EngineAuto, workers) {
				models[i] = make([]byte, share)
				c := devtest.NewClient(t, r, d, 8)
				group.Add(1)
				go func() { // ends when stop is set
					defer group.Done()
					defer c.Close()
					work(t, c, rand.New(rand.NewPCG(seed, uint64(i))), uint64(i)*share, models[i], &stop)
				}()
			}
			random := rand.New(rand.NewPCG(seed, 99))
			for i := range restarts {
				time.Sleep(time.Duration(random.IntN(30)) * time.Millisecond)
				if i%3 == 0 {
					n.stop()
				} else {
					n.kill()
				}
				v.crash(random)
				n.start(v)
				if i%5 != 0 { // else it goes again before the device is back
					reach(t, d, Online)
				}
			}
			stop.Store(true)
			group.Wait()
			if t.Failed() {
				return
			}
			c := client(t, d)
			c.Flush()
			c.Close()
			n.kill()
			v.crash(random)
			for i, model := range models {
				got := make([]byte, share)
				v.Store().Read(got, uint64(i)*share)
				if !bytes.Equal(got, model) {
					t.Errorf("worker %d: what was flushed is not on the server", i)
				}
			}
			t.Logf("%d sessions, %d flushes", d.State().Reconnects+1, v.flushCount())
		})
	}
}

// work changes and reads a range at random and compares with model.
func work(t *testing.T, c *devtest.Client, random *rand.Rand, offset uint64, model []byte, stop *atomic.Bool) {
	for count := 0; !stop.Load() && !t.Failed(); count++ {
		length := uint64(1+random.IntN(24)) * 512
		at := random.Uint64N((uint64(len(model))-length)/512) * 512
		r := &datapath.Request{Offset: offset + at, Length: length}
		switch n := random.IntN(100); {
		case n < 50:
			r.Op, r.Buf = datapath.OpWrite, make([]byte, length)
			for i := range r.Buf {
				r.Buf[i] = byte(random.Uint32())
			}
			copy(model[at:], r.Buf)
		case n < 58:
			r.Op = datapath.OpWriteZeroes
			clear(model[at:][:length])
		case n < 60:
			r.Op, r.Offset, r.Length = datapath.OpFlush, 0, 0
		default:
			r.Op, r.Buf = datapath.OpRead, make([]byte, length)
		}
		if r.Modifies() && random.IntN(10) == 0 {
			r.Flags = datapath.FlagFUA
		}
		c.Do(r)
		if r.Status != datapath.StatusOK {
			t.Errorf("%s: %s", r.Op, r.Status)
		}
		if r.Op == datapath.OpRead && !bytes.Equal(r.Buf, model[at:][:length]) {
			t.Errorf("a read of %d bytes at %d is not what was written", length, r.Offset)
		}
	}
}

// TestOverlapsHaveOneOrderAcrossRestarts checks the history of every block while
// several queues write and read the same few.
func TestOverlapsHaveOneOrderAcrossRestarts(t *testing.T) {
	seed := devtest.Seed(t)
	const blocks, workers = 4, 3
	restarts := 20
	if testing.Short() || raceEnabled {
		restarts = 6
	}
	n := newNode(t)
	v := newVolatile(n, testSize)
	n.start(v)
	d := open(t, Config{URI: n.uri(), Connections: 3})
	var history devtest.History
	var stop atomic.Bool
	var group sync.WaitGroup
	for i, r := range devtest.Reactors(t, reactor.EngineAuto, workers) {
		c := devtest.NewClient(t, r, d, 8)
		recorder := history.Recorder()
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		group.Add(1)
		go func() { // ends when stop is set
			defer group.Done()
			defer c.Close()
			next := uint64(i+1) << 32
			for !stop.Load() && !t.Failed() {
				var requests []*datapath.Request
				var tokens []int
				for range 1 + random.IntN(4) {
					at := uint64(random.IntN(blocks))
					r := &datapath.Request{Op: datapath.OpRead, Offset: at * 512, Length: 512, Buf: make([]byte, 512)}
					if random.IntN(2) == 0 {
						next++
						r.Op = datapath.OpWrite
						putValue(r.Buf, next)
						tokens = append(tokens, recorder.Write(at, next))
					} else {
						tokens = append(tokens, recorder.Read(at))
					}
					requests = append(requests, r)
				}
				c.Do(requests...)
				for i, r := range requests {
					switch {
					case r.Status != datapath.StatusOK:
						t.Errorf("%s: %s", r.Op, r.Status)
					case r.Op == datapath.OpWrite:
						recorder.Wrote(tokens[i])
					default:
						recorder.Got(tokens[i], value(r.Buf))
					}
				}
			}
		}()
	}
	random := rand.New(rand.NewPCG(seed, 99))
	for range restarts {
		time.Sleep(time.Duration(5+random.IntN(20)) * time.Millisecond)
		n.kill()
		v.crash(random)
		n.start(v)
	}
	stop.Store(true)
	group.Wait()
	if err := history.Check(); err != nil {
		t.Error(err)
	}
}

func putValue(b []byte, value uint64) {
	for i := range 8 {
		b[i] = byte(value >> (8 * i))
	}
}

func value(b []byte) (value uint64) {
	for i := range 8 {
		value |= uint64(b[i]) << (8 * i)
	}
	return value
}

func TestDeadTimeoutEndsWhatWaits(t *testing.T) {
	n := newNode(t)
	m := n.memory(memdev.Config{Size: testSize})
	n.start(m)
	d := open(t, Config{URI: n.uri(), DeadTimeout: 300 * time.Millisecond})
	c := client(t, d)
	defer c.Close()
	c.Write(0, block(1)) // not flushed
	n.kill()
	fresh := n.memory(memdev.Config{Size: testSize}) // the old one's data is gone
	reach(t, d, Waiting)
	requests := []*datapath.Request{
		{Op: datapath.OpWrite, Offset: 4096, Length: 512, Buf: block(2)},
		{Op: datapath.OpWrite, Offset: 4096, Length: 512, Buf: block(3)},
		{Op: datapath.OpRead, Length: 512, Buf: make([]byte, 512)},
		{Op: datapath.OpFlush},
	}
	c.Do(requests...)
	for _, r := range requests {
		if r.Status != datapath.StatusIO {
			t.Errorf("%s after the dead timeout: %s", r.Op, r.Status)
		}
	}
	if s := d.State(); s.Condition != Failed || !strings.Contains(s.Reason, "300ms") {
		t.Errorf("state %+v", s)
	}
	late := &datapath.Request{Op: datapath.OpRead, Length: 512, Buf: make([]byte, 512)}
	if c.Do(late); late.Status != datapath.StatusIO {
		t.Errorf("a read while the device has failed: %s", late.Status)
	}
	n.start(fresh)
	reach(t, d, Online)
	if !bytes.Equal(c.Read(0, 512), block(1)) {
		t.Error("what was acknowledged before is gone")
	}
	c.Flush()
}

func TestSilentServerIsGivenUp(t *testing.T) {
	n := newNode(t)
	f, err := filter.NewFault(n.memory(memdev.Config{Size: testSize}), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	n.start(f)
	d := open(t, Config{URI: n.uri(), StallTimeout: 200 * time.Millisecond})
	c := client(t, d)
	defer c.Close()
	if err := f.SetRules([]filter.FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, Action: filter.FaultHang, Count: 1}}); err != nil {
		t.Fatal(err)
	}
	wait := c.Start(&datapath.Request{Op: datapath.OpWrite, Length: 512, Buf: block(1)})
	eventually(t, "a second session", func() bool { return d.State().Reconnects >= 1 })
	wait()
	f.Release()
	if !bytes.Equal(c.Read(0, 512), block(1)) {
		t.Error("the write was not sent again")
	}
}

// TestChangesOnTheWireAreNotSentAgainAtOnce: the server may still have the first
// copy of them. What was not on the wire does not wait.
func TestChangesOnTheWireAreNotSentAgainAtOnce(t *testing.T) {
	const resend = 400 * time.Millisecond
	n := newNode(t)
	f, err := filter.NewFault(n.memory(memdev.Config{Size: testSize}), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	n.start(f)
	p := newProxy(t, n.address)
	d := open(t, Config{URI: p.uri(), resend: resend})
	c := client(t, d)
	defer c.Close()
	c.Read(0, 512)
	if err := f.SetRules([]filter.FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, Action: filter.FaultHang, Count: 1}}); err != nil {
		t.Fatal(err)
	}
	wait := c.Start(&datapath.Request{Op: datapath.OpWrite, Length: 512, Buf: block(1)})
	eventually(t, "the write is at the server", func() bool { return f.Hanging() == 1 })
	cut := time.Now()
	p.cut()
	wait()
	if took := time.Since(cut); took < resend {
		t.Errorf("sent again within %v", took)
	}
	f.Release()
	if !bytes.Equal(c.Read(0, 512), block(1)) {
		t.Error("the write is not there")
	}
}

func TestAnotherExportIsRefused(t *testing.T) {
	n := newNode(t)
	m := n.memory(memdev.Config{Size: testSize, MinIO: 512})
	n.start(m)
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	for _, test := range []struct {
		device datapath.Device
		want   string
	}{
		{n.memory(memdev.Config{Size: testSize / 2, MinIO: 512}), "with 2097152 bytes instead of 4194304"},
		{n.memory(memdev.Config{Size: testSize, ReadOnly: true, MinIO: 512}), "read-only"},
		{n.memory(memdev.Config{Size: testSize, MinIO: 4096}), "blocks of 4096 bytes instead of 512"},
		{without{m, datapath.FeatureWriteZeroes}, "without write-zeroes"},
	} {
		n.kill()
		n.start(test.device)
		if s := reach(t, d, Failed); !strings.Contains(s.Reason, test.want) {
			t.Errorf("reason %q, want %q", s.Reason, test.want)
		}
		r := &datapath.Request{Op: datapath.OpRead, Length: 512, Buf: make([]byte, 512)}
		if c.Do(r); r.Status != datapath.StatusIO {
			t.Errorf("read: %s", r.Status)
		}
		n.kill()
		n.start(m)
		reach(t, d, Online)
		c.Write(0, block(1))
	}
}

// without hides features of a device.
type without struct {
	datapath.Device
	features datapath.Features
}

// Info implements datapath.Device.
func (w without) Info() datapath.Info {
	i := w.Device.Info()
	i.Features &^= w.features
	return i
}

func TestServerThatForgetsAndRefusesIsNotServed(t *testing.T) {
	n := newNode(t)
	n.start(n.memory(memdev.Config{Size: testSize}))
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	c.Write(4096, block(1))
	n.kill()
	f, err := filter.NewFault(n.memory(memdev.Config{Size: testSize}), filter.FaultConfig{
		Rules: []filter.FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, Action: filter.FaultFail, Status: datapath.StatusIO}},
	})
	if err != nil {
		t.Fatal(err)
	}
	n.start(f)
	if s := reach(t, d, Failed); !strings.Contains(s.Reason, "refuses a write of 512 bytes at 4096 that it had acknowledged: I/O error") {
		t.Errorf("reason %q", s.Reason)
	}
	r := &datapath.Request{Op: datapath.OpRead, Offset: 4096, Length: 512, Buf: make([]byte, 512)}
	if c.Do(r); r.Status != datapath.StatusIO {
		t.Errorf("a read of what cannot be there: %s", r.Status)
	}
	if err := f.SetRules(nil); err != nil {
		t.Fatal(err)
	}
	reach(t, d, Online)
	if !bytes.Equal(c.Read(4096, 512), block(1)) {
		t.Error("the write was not made again")
	}
}

func TestFailedFlushIsSticky(t *testing.T) {
	n := newNode(t)
	f, err := filter.NewFault(n.memory(memdev.Config{Size: testSize}), filter.FaultConfig{
		Rules: []filter.FaultRule{{Ops: []datapath.Op{datapath.OpFlush}, Action: filter.FaultFail, Status: datapath.StatusIO, Count: 1, Transient: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	n.start(f)
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	for range 3 {
		c.Write(0, block(1))
		r := &datapath.Request{Op: datapath.OpFlush}
		if c.Do(r); r.Status != datapath.StatusIO {
			t.Errorf("flush: %s", r.Status)
		}
	}
}

func TestErrorsOfTheServerReachTheClient(t *testing.T) {
	n := newNode(t)
	f, err := filter.NewFault(n.memory(memdev.Config{Size: testSize}), filter.FaultConfig{})
	if err != nil {
		t.Fatal(err)
	}
	n.start(f)
	d := open(t, Config{URI: n.uri()})
	c := client(t, d)
	defer c.Close()
	for _, status := range []datapath.Status{datapath.StatusIO, datapath.StatusNoSpace, datapath.StatusInvalid, datapath.StatusReadOnly, datapath.StatusOverflow} {
		if err := f.SetRules([]filter.FaultRule{{Action: filter.FaultFail, Status: status}}); err != nil {
			t.Fatal(err)
		}
		requests := []*datapath.Request{
			{Op: datapath.OpRead, Length: 512, Buf: make([]byte, 512)},
			{Op: datapath.OpWriteZeroes, Length: 512},
		}
		c.Do(requests...)
		if got := requests[0].Status; got != status {
			t.Errorf("read: %s, want %s", got, status)
		}
		if got := requests[1].Status; got != status {
			t.Errorf("write-zeroes: %s, want %s", got, status)
		}
	}
	if s := d.State(); s.Reconnects != 0 {
		t.Errorf("an error of the device was taken for one of the connection: %+v", s)
	}
}

// TestMemoryForUnflushedDataIsBounded writes far more than is retained without a
// flush, crashes, and reads all of it.
func TestMemoryForUnflushedDataIsBounded(t *testing.T) {
	n := newNode(t)
	v := newVolatile(n, 64<<20)
	n.start(v)
	d := open(t, Config{URI: n.uri(), RetainBytes: retainMin})
	c := client(t, d)
	defer c.Close()
	const length = 3 << 20 // cuts fall into the middle of writes
	const count = 20
	for i := 0; i < count; i += 4 {
		var requests []*datapath.Request
		for j := range 4 {
			requests = append(requests, &datapath.Request{Op: datapath.OpWrite, Offset: uint64(i+j) * length, Length: length, Buf: fill(make([]byte, length), byte(i+j+1))})
		}
		c.Do(requests...)
		for _, r := range requests {
			if r.Status != datapath.StatusOK {
				t.Fatal(r.Status)
			}
		}
	}
	if v.flushCount() == 0 {
		t.Error("the device did not flush of its own accord")
	}
	n.kill()
	v.crash(rand.New(rand.NewPCG(1, 1)))
	n.start(v)
	for i := range count {
		if got := c.Read(uint64(i)*length, length); !bytes.Equal(got, fill(make([]byte, length), byte(i+1))) {
			t.Fatalf("write %d is gone", i)
		}
	}
}

// TestLongRangesGoInPieces discards more than a compact header can say.
func TestLongRangesGoInPieces(t *testing.T) {
	const size = 5 << 30
	n := newNode(t)
	m := n.memory(memdev.Config{Size: size})
	n.start(m)
	d := open(t, Config{URI: n.uri(), headers: nbd.HeadersStructured})
	c := client(t, d)
	defer c.Close()
	for _, at := range []uint64{0, 3 << 30, size - 512} {
		c.Write(at, block(1))
	}
	zero := &datapath.Request{Op: datapath.OpWriteZeroes, Length: size}
	if c.Do(zero); zero.Status != datapath.StatusOK {
		t.Fatal(zero.Status)
	}
	for _, at := range []uint64{0, 3 << 30, size - 512} {
		if !bytes.Equal(c.Read(at, 512), block(0)) {
			t.Errorf("byte %d was not zeroed", at)
		}
	}
}
