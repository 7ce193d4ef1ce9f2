package nbd

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// statusDevice answers OpExtents by a function of the context and the range, and
// everything else like the device below.
type statusDevice struct {
	datapath.Device
	extents func(context string, offset, length uint64) ([]datapath.Extent, datapath.Status)
}

type statusQueue struct {
	datapath.Queue
	dev         *statusDevice
	completions datapath.Completions
}

// OpenQueue implements datapath.Device.
func (d *statusDevice) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	below, err := d.Device.OpenQueue(r, depth)
	if err != nil {
		return nil, err
	}
	q := &statusQueue{Queue: below, dev: d}
	q.completions.Init(r, depth)
	return q, nil
}

// Submit implements datapath.Queue.
func (q *statusQueue) Submit(r *datapath.Request) {
	if r.Op != datapath.OpExtents {
		q.Queue.Submit(r)
		return
	}
	list, status := q.dev.extents(r.Context, r.Offset, r.Length)
	if r.Flags&datapath.FlagOneExtent != 0 && len(list) > 0 {
		list = list[:1]
		list[0].Length = min(list[0].Length, r.Length)
	}
	if status == datapath.StatusOK {
		r.Extents = append(r.Extents[:0], list[:min(len(list), cap(r.Extents))]...)
	}
	q.completions.Add(r, status)
}

// dirtyContexts are names of as many dirty bitmaps.
func dirtyContexts(n int) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprintf("%sb%02d", datapath.ContextDirtyPrefix, i))
	}
	return names
}

// numbered is a device whose context i, in the order of names, has state i
// everywhere.
func numbered(below datapath.Device, names ...string) datapath.Device {
	return &statusDevice{withContexts(below, names...), func(context string, _, length uint64) ([]datapath.Extent, datapath.Status) {
		return []datapath.Extent{{Length: length, State: uint64(slices.Index(names, context))}}, datapath.StatusOK
	}}
}

func TestServerAnswersEachContextOnce(t *testing.T) {
	names := append([]string{ContextAllocation, datapath.ContextDepth}, dirtyContexts(contextsMax-2)...)
	rig := startServer(t, serverSetup{}, &Export{Device: numbered(memory(t, 1<<20), names...)})
	for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
		for _, chosen := range [][]string{names[:1], names[1:2], names[2:5], names} {
			s := rig.openSession(mode, "", chosen...)
			for _, flags := range []CommandFlags{0, CommandFlagReqOne, CommandFlagFUA} {
				a := s.ask(flags, CommandBlockStatus, 4096, 8192, nil)
				if a.errno != ErrnoOK || len(a.extents) != len(chosen) {
					t.Fatalf("%s, %d contexts: %v, %d answered", mode, len(chosen), a.errno, len(a.extents))
				}
				for id, name := range s.contexts {
					want := datapath.Extent{Length: 8192, State: uint64(slices.Index(names, name))}
					if e := a.extents[id]; len(e) != 1 || e[0] != want {
						t.Errorf("%s, %s: %v, want %v", mode, name, e, want)
					}
				}
			}
			s.disconnect()
		}
	}
}

// TestServerAnswersPipelinedBlockStatus: one after the other, each once, while
// other requests overtake them.
func TestServerAnswersPipelinedBlockStatus(t *testing.T) {
	names := append([]string{ContextAllocation}, dirtyContexts(3)...)
	for _, latency := range []filter.Latency{{}, {Fixed: 200 * time.Microsecond, Jitter: time.Millisecond}} {
		d := filter.NewDelay(numbered(memory(t, 1<<20), names...), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{datapath.OpExtents: latency}})
		rig := startServer(t, serverSetup{config: ServerConfig{Depth: 16}}, &Export{Device: d})
		for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
			s := rig.openSession(mode, "", names...)
			for i := range 60 {
				s.queue(CommandFlags(i%2)*CommandFlagReqOne, CommandBlockStatus, uint64(i)*512, 512, nil)
				s.queue(0, CommandRead, uint64(i)*512, 512, nil)
			}
			s.push()
			s.waitAll()
			s.disconnect()
		}
		rig.stop()
	}
}

// TestServerBlockStatusWithoutAFreePiece: a read holds every piece while a status
// waits for one.
func TestServerBlockStatusWithoutAFreePiece(t *testing.T) {
	f := faulty(t, 4<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{config: ServerConfig{Depth: 2}}, &Export{Device: f})
	s := rig.openSession(HeadersStructured, "", ContextAllocation)
	s.queue(0, CommandRead, 0, 2<<20, nil)
	s.queue(0, CommandBlockStatus, 0, 512, nil)
	s.queue(0, CommandBlockStatus, 512, 512, nil)
	s.push()
	eventually(t, "the read holds both pieces", func() bool { return f.Hanging() == 2 })
	f.Release()
	s.waitAll()
}

func TestServerJoinsAndCutsExtents(t *testing.T) {
	const size = 1 << 20
	lists := map[string]struct {
		device []datapath.Extent
		want   string
	}{
		"one":              {[]datapath.Extent{{Length: 4096, State: 1}}, "[{4096 1}]"},
		"past the end":     {[]datapath.Extent{{Length: math.MaxUint64, State: 1}}, "[{65536 1}]"},
		"neighbours":       {[]datapath.Extent{{Length: 512, State: 1}, {Length: 512, State: 1}, {Length: 512, State: 0}, {Length: 1 << 40, State: 0}}, "[{1024 1} {64512 0}]"},
		"last past":        {[]datapath.Extent{{Length: 65535, State: 1}, {Length: 4096, State: 2}}, "[{65535 1} {1 2}]"},
		"beyond the range": {[]datapath.Extent{{Length: 65536, State: 1}, {Length: 4096, State: 2}, {Length: 1, State: 3}}, "[{65536 1}]"},
	}
	var answer atomic.Pointer[[]datapath.Extent]
	d := &statusDevice{memory(t, size), func(string, uint64, uint64) ([]datapath.Extent, datapath.Status) {
		return slices.Clone(*answer.Load()), datapath.StatusOK
	}}
	rig := startServer(t, serverSetup{bare: true}, &Export{Device: d})
	for name, c := range lists {
		answer.Store(&c.device)
		for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
			s := rig.openSession(mode, "", ContextAllocation)
			if got := fmt.Sprint(s.ask(0, CommandBlockStatus, 0, 65536, nil).extents[1]); got != c.want {
				t.Errorf("%s, %s: %s, want %s", name, mode, got, c.want)
			}
			if e := s.ask(CommandFlagReqOne, CommandBlockStatus, 0, 65536, nil).extents[1]; len(e) != 1 {
				t.Errorf("%s, %s, one extent: %v", name, mode, e)
			}
			s.disconnect()
		}
	}
}

// TestServerCutsLongExtentLists: a reply may stop early, and says so by its sum.
func TestServerCutsLongExtentLists(t *testing.T) {
	const size = 16 << 20
	d := &statusDevice{memory(t, size), func(_ string, offset, length uint64) (list []datapath.Extent, _ datapath.Status) {
		for at := offset; at < offset+length; at += 512 {
			list = append(list, datapath.Extent{Length: 512, State: at / 512 % 2})
		}
		return list, datapath.StatusOK
	}}
	rig := startServer(t, serverSetup{}, &Export{Device: d})
	for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
		s := rig.openSession(mode, "", ContextAllocation)
		var at uint64
		for rounds := 0; at < size; rounds++ {
			a := s.ask(0, CommandBlockStatus, at, size-at, nil)
			e := a.extents[1]
			if a.errno != ErrnoOK || len(e) > statusExtents || rounds > 2*size/512/statusExtents {
				t.Fatalf("%v, %d extents", a.errno, len(e))
			}
			for i := range e {
				if e[i].State != at/512%2 || e[i].Length != 512 {
					t.Fatalf("extent at %d: %v", at, e[i])
				}
				at += e[i].Length
			}
		}
	}
}

func TestServerShowsWhatIsAllocated(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Name: "mem", Device: memory(t, 1<<20)},
		&Export{Name: "unknowing", Device: &describedDevice{memory(t, 1<<20), func(i *datapath.Info) { i.Features &^= datapath.FeatureExtents; i.Contexts = nil }}})
	for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
		s := rig.openSession(mode, "mem", ContextAllocation)
		s.write(128<<10, make([]byte, 64<<10))
		s.ask(0, CommandWriteZeroes, 512<<10, 64<<10, nil)
		if got := fmt.Sprint(s.ask(0, CommandBlockStatus, 0, 1<<20, nil).extents[1]); got != "[{131072 3} {65536 0} {851968 3}]" {
			t.Errorf("%s: %s", mode, got)
		}
		if got := fmt.Sprint(s.ask(0, CommandBlockStatus, 128<<10+1, 5, nil).extents[1]); got != "[{5 0}]" {
			t.Errorf("%s: %s", mode, got)
		}
		s = rig.openSession(mode, "unknowing", ContextAllocation)
		if got := fmt.Sprint(s.ask(0, CommandBlockStatus, 512, 1<<19, nil).extents[1]); got != "[{524288 0}]" {
			t.Errorf("%s: %s", mode, got)
		}
	}
}

func TestServerReportsStatusErrors(t *testing.T) {
	names := append([]string{ContextAllocation}, dirtyContexts(2)...)
	for failing := range names {
		d := &statusDevice{withContexts(memory(t, 1<<20), names...), func(context string, _, length uint64) ([]datapath.Extent, datapath.Status) {
			if context == names[failing] {
				return nil, datapath.StatusIO
			}
			return []datapath.Extent{{Length: length}}, datapath.StatusOK
		}}
		rig := startServer(t, serverSetup{}, &Export{Device: d})
		for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
			s := rig.openSession(mode, "", names...)
			for range 3 {
				s.queue(0, CommandBlockStatus, 0, 4096, nil)
			}
			s.push()
			for len(s.pending) > 0 {
				if a := s.next(); a.done && a.errno != ErrnoIO {
					t.Errorf("%s, context %d fails: %v", mode, failing, a.errno)
				}
			}
			s.readAt(0, 4096)
		}
		rig.stop()
	}
}

// TestServerBlockStatusPayload: with extended headers a request may name the
// contexts it wants.
func TestServerBlockStatusPayload(t *testing.T) {
	names := append([]string{ContextAllocation}, dirtyContexts(contextsMax-1)...)
	rig := startServer(t, serverSetup{}, &Export{Device: numbered(memory(t, 1<<20), names...)})
	s := rig.openSession(HeadersExtended, "", names...)
	payload := func(length uint64, ids ...uint32) []byte {
		b := binary.BigEndian.AppendUint64(nil, length)
		for _, id := range ids {
			b = binary.BigEndian.AppendUint32(b, id)
		}
		return b
	}
	all := make([]uint32, contextsMax)
	for i := range all {
		all[i] = uint32(contextsMax - i)
	}
	for name, c := range map[string]struct {
		offset  uint64
		payload []byte
		ids     []uint32 // nil: refused
	}{
		"one":             {0, payload(4096, 1), []uint32{1}},
		"another":         {0, payload(4096, 3), []uint32{3}},
		"the last":        {0, payload(4096, contextsMax), []uint32{contextsMax}},
		"some":            {0, payload(1<<20, 2, 1), []uint32{2, 1}},
		"all":             {512, payload(1, all...), all},
		"0":               {0, payload(4096, 0), nil},
		"unknown":         {0, payload(4096, contextsMax+1), nil},
		"65":              {0, payload(4096, 65), nil},
		"2^32-1":          {0, payload(4096, math.MaxUint32), nil},
		"twice":           {0, payload(4096, 1, 2, 1), nil},
		"too many":        {0, payload(4096, append(all, 1)...), nil},
		"none":            {0, payload(4096), nil},
		"nothing":         {0, nil, nil},
		"short":           {0, payload(4096, 1)[:11], nil},
		"odd":             {0, append(payload(4096, 1), 0), nil},
		"very long":       {0, make([]byte, 1<<20), nil},
		"no effect":       {0, payload(0, 1), nil},
		"past the end":    {512, payload(1<<20, 1), nil},
		"far past":        {0, payload(math.MaxUint64, 1), nil},
		"the sum is 0":    {512, payload(math.MaxUint64-511, 1), nil},
		"offset past":     {1 << 20, payload(1, 1), nil},
		"offset 2^64 - 1": {math.MaxUint64, payload(1, 1), nil},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			for _, flags := range []CommandFlags{0, CommandFlagReqOne, CommandFlagNoHole} {
				s.cookie++
				a := &asked{flags: flags | CommandFlagPayloadLen, command: CommandBlockStatus, cookie: s.cookie, offset: c.offset, ids: c.ids}
				if len(c.payload) >= 8 {
					a.length = binary.BigEndian.Uint64(c.payload)
				}
				s.add(a, uint64(len(c.payload)), c.payload)
				behind := s.queue(0, CommandRead, 0, 512, nil) // the payload is consumed, come what may
				s.push()
				s.wait(a)
				s.wait(behind)
				ok := c.ids != nil && flags != CommandFlagNoHole
				if ok != (a.errno == ErrnoOK) || (!ok && a.errno != ErrnoInvalid) {
					t.Errorf("flags %#x: %v", flags, a.errno)
				}
				for id, e := range a.extents {
					if ok && e[0].State != uint64(id-1) {
						t.Errorf("context %d: %v", id, e)
					}
				}
			}
		})
	}
}

func TestServerConsumesStatusPayloadItDoesNotTake(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	s := rig.openSession(HeadersExtended, "") // without contexts
	payload := make([]byte, 12)
	binary.BigEndian.PutUint64(payload, 4096)
	payload[11] = 1
	a := s.add(&asked{flags: CommandFlagPayloadLen, command: CommandBlockStatus, cookie: 1, length: 4096}, 12, payload)
	s.push()
	s.wait(a)
	if a.errno != ErrnoInvalid {
		t.Errorf("%v", a.errno)
	}
	s.readAt(0, 512)
}
