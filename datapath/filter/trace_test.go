package filter

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func TestTraceTellsTheOrderOfWritesAndFlushes(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 2)
	d := NewTrace(fault(t, memory(t, memdev.Config{}), FaultConfig{Rules: []FaultRule{
		{Offset: 5 * block, Length: block, Status: datapath.StatusNoSpace},
	}}), 100)
	defer closeDevice(t, d)
	a, b := devtest.NewClient(t, reactors[0], d, 8), devtest.NewClient(t, reactors[1], d, 8)
	a.Write(0, make([]byte, 2*block))
	b.Do(&datapath.Request{Op: datapath.OpWrite, Flags: datapath.FlagFUA, Offset: block, Length: block, Buf: make([]byte, block)})
	a.Read(0, block)
	a.Flush()
	b.Do(&datapath.Request{Op: datapath.OpWriteZeroes, Flags: datapath.FlagNoUnmap, Length: block},
		&datapath.Request{Op: datapath.OpDiscard, Offset: 5 * block, Length: block})
	b.Close()
	c := devtest.NewClient(t, reactors[0], d, 8) // takes over the ring of b
	c.Write(9*block, make([]byte, block))
	const want = `write 0+8192
write 4096+4096 fua
flush
write-zeroes 0+4096 no-unmap
discard 20480+4096: no space
write 36864+4096
`
	if got := d.Golden(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	var text, lines strings.Builder
	if err := d.WriteText(&text); err != nil {
		t.Error(err)
	}
	if n := strings.Count(text.String(), "\n"); n != 7 || !strings.Contains(text.String(), "read 0+4096: ok in ") {
		t.Errorf("text has %d lines:\n%s", n, text.String())
	}
	if err := d.WriteJSON(&lines); err != nil {
		t.Error(err)
	}
	var records []map[string]any
	for line := range strings.Lines(lines.String()) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	if len(records) != 7 || records[1]["op"] != "write" || records[1]["length"] != 4096.0 || records[1]["status"] != "ok" ||
		records[1]["queue"] != 1.0 || records[5]["status"] != "no space" {
		t.Errorf("records %v", records)
	}
	a.Close()
	c.Close()
}

func TestTraceShowsWhatIsInFlightAndKeepsTheLast(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	hang := fault(t, memory(t, memdev.Config{}), FaultConfig{Rules: []FaultRule{{Action: FaultHang, Count: 1}}})
	d := NewTrace(hang, 4)
	defer closeDevice(t, d)
	c, other := devtest.NewClient(t, reactors[0], d, 2), devtest.NewClient(t, reactors[0], d, 2)
	wait := c.Start(write(block, 1))
	for hang.Hanging() != 1 {
	}
	if got := d.Golden(); got != "write 4096+4096: in flight\n" {
		t.Errorf("got %q", got)
	}
	hang.Release()
	wait()
	for i := range 10 {
		other.Write(uint64(i)*block, make([]byte, block))
	}
	records := d.Records()
	if len(records) != 5 || records[0].Queue != 0 || records[4].Offset != 9*block || !records[0].Ended {
		t.Errorf("records %v", records)
	}
	c.Close()
	other.Close()
}

func TestTraceIsReadWhileItIsWritten(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 1)
	d := NewTrace(memory(t, memdev.Config{}), 8)
	defer closeDevice(t, d)
	c := devtest.NewClient(t, reactors[0], d, 8)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			last := uint64(0)
			for _, r := range d.Records() {
				// Every write is as long as its offset says: a mixed record shows.
				if r.Op != datapath.OpWrite || r.Length != r.Offset || r.Sequence <= last || r.Ended && r.Status != datapath.StatusOK {
					t.Errorf("record %+v after %d", r, last)
				}
				last = r.Sequence
			}
		}
	})
	for i := range 300 {
		var batch []*datapath.Request
		for k := range 8 {
			n := 1 + (i+k)%16
			batch = append(batch, write(uint64(n)*block, n))
		}
		c.Do(batch...)
	}
	close(stop)
	wg.Wait()
	c.Close()
}
