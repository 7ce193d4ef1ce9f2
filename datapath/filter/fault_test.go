package filter

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func TestFaultRules(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	flush := func() *datapath.Request { return &datapath.Request{Op: datapath.OpFlush} }
	fua := func(offset uint64) *datapath.Request {
		r := write(offset, 1)
		r.Flags = datapath.FlagFUA
		return r
	}
	ok, eio := datapath.StatusOK, datapath.StatusIO
	for _, test := range []struct {
		name     string
		rules    []FaultRule
		requests []*datapath.Request
		want     []datapath.Status
	}{
		{"none", nil, []*datapath.Request{write(0, 1), flush()}, []datapath.Status{ok, ok}},
		{"every write, sticky", []FaultRule{{Ops: []datapath.Op{datapath.OpWrite}}},
			[]*datapath.Request{write(0, 1), read(0, 1), fua(0)}, []datapath.Status{eio, ok, eio}},
		{"once", []FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, Count: 1}},
			[]*datapath.Request{write(0, 1), write(0, 1)}, []datapath.Status{eio, ok}},
		{"second and third", []FaultRule{{After: 1, Count: 2}},
			[]*datapath.Request{read(0, 1), read(0, 1), write(0, 1), read(0, 1)}, []datapath.Status{ok, eio, eio, ok}},
		{"range", []FaultRule{{Offset: 2 * block, Length: block, Status: datapath.StatusNoSpace}},
			[]*datapath.Request{write(0, 2), write(block, 2), write(2*block, 1), write(3*block, 1), flush()},
			[]datapath.Status{ok, datapath.StatusNoSpace, datapath.StatusNoSpace, ok, ok}},
		{"FUA only", []FaultRule{{Flags: datapath.FlagFUA}},
			[]*datapath.Request{write(0, 1), fua(0)}, []datapath.Status{ok, eio}},
		{"failed flush is sticky", []FaultRule{{Ops: []datapath.Op{datapath.OpFlush}, Count: 1}},
			[]*datapath.Request{flush(), write(0, 1), flush()}, []datapath.Status{eio, ok, eio}},
		{"unless it is transient", []FaultRule{{Ops: []datapath.Op{datapath.OpFlush}, Count: 1, Transient: true}},
			[]*datapath.Request{flush(), flush()}, []datapath.Status{eio, ok}},
		{"first rule that strikes", []FaultRule{
			{Count: 1, Status: datapath.StatusShutdown}, {Count: 1, Status: datapath.StatusCorrupt},
		}, []*datapath.Request{read(0, 1), read(0, 1), read(0, 1)}, []datapath.Status{datapath.StatusShutdown, datapath.StatusCorrupt, ok}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := fault(t, memory(t, memdev.Config{}), FaultConfig{Rules: test.rules})
			defer closeDevice(t, d)
			c := devtest.NewClient(t, reactors[0], datapath.Checked(d), 8)
			for i, r := range test.requests {
				if c.Do(r); r.Status != test.want[i] {
					t.Errorf("request %d, %s: %s, want %s", i, r.Op, r.Status, test.want[i])
				}
			}
			c.Close()
		})
	}
}

func TestFailedWriteLeavesTheOldData(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	m := memory(t, memdev.Config{})
	d := fault(t, m, FaultConfig{Rules: []FaultRule{{Ops: []datapath.Op{datapath.OpWrite}, After: 1}}})
	defer closeDevice(t, d)
	c := devtest.NewClient(t, reactors[0], d, 8)
	old := bytes.Repeat([]byte{1}, 4*block)
	c.Write(0, old)
	r := write(0, 4)
	if c.Do(r); r.Status != datapath.StatusIO {
		t.Errorf("status %s", r.Status)
	}
	if got := c.Read(0, 4*block); !bytes.Equal(got, old) {
		t.Error("a write that failed changed data")
	}
	c.Close()
}

func TestPartialWriteLeavesEachBlockOldOrNew(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	cuts := map[int]bool{}
	for seed := range uint64(40) {
		m := memory(t, memdev.Config{})
		d := fault(t, m, FaultConfig{Seed: seed, Rules: []FaultRule{
			{Ops: []datapath.Op{datapath.OpWrite, datapath.OpWriteZeroes}, After: 1, Action: FaultPartial, Status: datapath.StatusNoSpace},
		}})
		c := devtest.NewClient(t, reactors[0], datapath.Checked(d), 8)
		c.Write(0, bytes.Repeat([]byte{1}, 8*block))
		const offset, length = 300, 4*block + 500 // six blocks, the first and last in part
		r := &datapath.Request{Op: datapath.OpWrite, Offset: offset, Length: length, Buf: bytes.Repeat([]byte{2}, length)}
		c.Do(r)
		if r.Status != datapath.StatusNoSpace || len(r.Buf) != length || r.Length != length {
			t.Fatalf("seed %d: status %s, length %d, buffer %d", seed, r.Status, r.Length, len(r.Buf))
		}
		got := c.Read(0, 8*block)
		n := bytes.Count(got, []byte{2})
		cuts[n] = true
		if !bytes.Equal(got[offset:offset+n], bytes.Repeat([]byte{2}, n)) {
			t.Fatalf("seed %d: what was written is not one piece", seed)
		}
		if n != 0 && n != length && (offset+n)%block != 0 {
			t.Fatalf("seed %d: block torn at %d", seed, offset+n)
		}
		z := &datapath.Request{Op: datapath.OpWriteZeroes, Length: 8 * block}
		if c.Do(z); z.Status != datapath.StatusNoSpace || z.Length != 8*block {
			t.Fatalf("seed %d: write-zeroes: %s", seed, z.Status)
		}
		c.Close()
		closeDevice(t, d)
	}
	if len(cuts) < 4 {
		t.Errorf("40 seeds cut at %d places", len(cuts))
	}
}

func TestHungRequestsGoOnWhenReleased(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	d := fault(t, memory(t, memdev.Config{}), FaultConfig{Rules: []FaultRule{
		{Ops: []datapath.Op{datapath.OpWrite}, Action: FaultHang, Count: 1},
		{Ops: []datapath.Op{datapath.OpWrite}, Action: FaultHang, Count: 1, Status: datapath.StatusIO},
	}})
	defer closeDevice(t, d)
	c, other := devtest.NewClient(t, reactors[0], d, 8), devtest.NewClient(t, reactors[0], d, 8)
	done, lost, free := write(0, 1), write(block, 1), write(2*block, 1)
	fill := func(r *datapath.Request) { copy(r.Buf, bytes.Repeat([]byte{9}, block)) }
	fill(done)
	fill(lost)
	fill(free)
	wait := c.Start(done, lost, free)
	for end := time.Now().Add(5 * time.Second); d.Hanging() != 2 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if got := other.Read(0, 3*block); bytes.Count(got, []byte{9}) != block {
		t.Errorf("%d bytes written while two of three writes hang", bytes.Count(got, []byte{9}))
	}
	d.Release()
	wait()
	if done.Status != datapath.StatusOK || lost.Status != datapath.StatusIO || free.Status != datapath.StatusOK {
		t.Errorf("statuses %s, %s, %s", done.Status, lost.Status, free.Status)
	}
	if got := other.Read(0, 3*block); bytes.Count(got, []byte{9}) != 2*block || d.Struck() != 2 {
		t.Errorf("%d bytes written, %d struck", bytes.Count(got, []byte{9}), d.Struck())
	}
	c.Close()
	other.Close()
}

func TestDropNeedsALyingDevice(t *testing.T) {
	rules := []FaultRule{{Action: FaultDrop, Count: 1}}
	m := memory(t, memdev.Config{})
	if _, err := NewFault(m, FaultConfig{Rules: rules}); !errors.Is(err, ErrLying) {
		t.Errorf("got %v, want %v", err, ErrLying)
	}
	if _, err := NewFault(m, FaultConfig{Rules: []FaultRule{{Action: 99}}}); err == nil {
		t.Error("an unknown action was taken")
	}
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	d := fault(t, m, FaultConfig{Rules: rules, Lying: true})
	defer closeDevice(t, d)
	c := devtest.NewClient(t, reactors[0], d, 8)
	c.Read(0, block) // reads are not dropped
	c.Write(0, bytes.Repeat([]byte{1}, block))
	if got := c.Read(0, block); !bytes.Equal(got, make([]byte, block)) {
		t.Error("the write was not dropped")
	}
	c.Write(0, bytes.Repeat([]byte{1}, block))
	if got := c.Read(0, block); got[0] != 1 {
		t.Error("the second write was dropped")
	}
	c.Close()
}

func TestProbabilityFollowsTheSeed(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	pattern := func(seed uint64) (s string, failed int) {
		d := fault(t, memory(t, memdev.Config{}), FaultConfig{Seed: seed, Rules: []FaultRule{{Probability: 0.25}}})
		defer closeDevice(t, d)
		c := devtest.NewClient(t, reactors[0], d, 64)
		for range 8 {
			var batch []*datapath.Request
			for range 50 {
				batch = append(batch, read(0, 1))
			}
			c.Do(batch...)
			for _, r := range batch {
				if r.Status == datapath.StatusOK {
					s += "."
				} else {
					s += "x"
					failed++
				}
			}
		}
		c.Close()
		return s, failed
	}
	one, n := pattern(1)
	if n < 60 || n > 140 {
		t.Errorf("%d of 400 requests failed, want about 100", n)
	}
	if again, _ := pattern(1); again != one {
		t.Error("one seed failed in two ways")
	}
	if other, _ := pattern(2); other == one {
		t.Error("two seeds failed in the same way")
	}
}
