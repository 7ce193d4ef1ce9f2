package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// modelClient sends random requests to a part of the export that is its own, many
// at a time, and compares all it gets with bytes it keeps. Requests in flight at
// the same time do not overlap, since no order is promised for those.
type modelClient struct {
	*session
	random *rand.Rand
	from   uint64
	bytes  []byte // what the part has to hold
	flying []*modelRequest
}

type modelRequest struct {
	*asked
	want  []byte // of a read, as it was when the read was sent
	errno Error
}

// place chooses a range that overlaps nothing in flight: often short or odd,
// sometimes of sectors, now and then of several pieces.
func (m *modelClient) place() (offset, length uint64, ok bool) {
	size := uint64(len(m.bytes))
	for range 10 {
		switch m.random.IntN(5) {
		case 0:
			length = 1 + m.random.Uint64N(600)
		case 1:
			length = 512 * (1 + m.random.Uint64N(64))
		case 2:
			length = 4096 * (1 + m.random.Uint64N(32))
		case 3:
			length = 1 + m.random.Uint64N(200<<10)
		case 4:
			length = 1 + m.random.Uint64N(size/2)
		}
		offset = m.random.Uint64N(size - length + 1)
		if m.random.IntN(2) == 0 {
			offset &^= 511
		}
		clash := false
		for _, f := range m.flying {
			at := f.offset - m.from
			clash = clash || (f.offset >= m.from && offset < at+f.length && at < offset+length)
		}
		if !clash {
			return offset, length, true
		}
	}
	return 0, 0, false
}

func (m *modelClient) step() {
	offset, length, ok := m.place()
	if !ok {
		m.collect(1)
		return
	}
	here := m.bytes[offset : offset+length]
	var a *asked
	r := &modelRequest{}
	fua := CommandFlags(m.random.IntN(2)) * CommandFlagFUA
	switch m.random.IntN(11) {
	case 0, 1, 2:
		flags := fua
		if m.mode != HeadersSimple && length <= pieceMax && m.random.IntN(4) == 0 {
			flags |= CommandFlagDF
		}
		a = m.queue(flags, CommandRead, m.from+offset, length, nil)
		r.want = bytes.Clone(here)
	case 3, 4, 5:
		data := randomData(m.random.Uint64(), int(length))
		a = m.queue(fua, CommandWrite, m.from+offset, length, data)
		copy(here, data)
	case 6:
		flags := fua | CommandFlags(m.random.IntN(2))*CommandFlagNoHole | CommandFlags(m.random.IntN(2))*CommandFlagFastZero
		a = m.queue(flags, CommandWriteZeroes, m.from+offset, length, nil)
		clear(here)
	case 7:
		a = m.queue(fua, CommandTrim, m.from+offset, length, nil)
		clear(here) // this device zeroes what it discards
	case 8:
		a = m.queue(0, CommandFlush, 0, 0, nil)
	case 9:
		if m.mode == HeadersSimple {
			a = m.queue(0, CommandCache, m.from+offset, length, nil)
			break
		}
		a = m.queue(CommandFlags(m.random.IntN(2))*CommandFlagReqOne, CommandBlockStatus, m.from+offset, length, nil)
		r.want = bytes.Clone(here)
	case 10: // refused
		switch m.random.IntN(4) {
		case 0:
			a, r.errno = m.queue(0, CommandRead, m.size, 1+m.random.Uint64N(1<<20), nil), ErrnoInvalid
		case 1:
			n := 1 + m.random.Uint64N(300<<10)
			a, r.errno = m.queue(0, CommandWrite, m.size-m.random.Uint64N(n), n, make([]byte, n)), ErrnoNoSpace
		case 2:
			a, r.errno = m.queue(CommandFlagDF|CommandFlagReqOne, CommandTrim, m.from+offset, length, nil), ErrnoInvalid
		case 3:
			a, r.errno = m.queue(0, 200, m.from+offset, length, nil), ErrnoInvalid
		}
	}
	r.asked = a
	m.flying = append(m.flying, r)
	if m.random.IntN(3) == 0 {
		m.push()
	}
	if len(m.flying) >= 40 {
		m.collect(m.random.IntN(40))
	}
}

// collect waits for replies until at most n requests are in flight.
func (m *modelClient) collect(n int) {
	m.push()
	for len(m.flying) > n {
		m.next()
		kept := m.flying[:0]
		for _, f := range m.flying {
			if f.done {
				m.check(f)
			} else {
				kept = append(kept, f)
			}
		}
		m.flying = kept
	}
}

func (m *modelClient) check(r *modelRequest) {
	what := fmt.Sprintf("command %d, flags %#x, %d bytes at %d", r.command, r.flags, r.length, r.offset)
	if r.errno != r.asked.errno {
		m.t.Errorf("%s: %v, want %v", what, r.asked.errno, r.errno)
		return
	}
	switch {
	case r.command == CommandRead && r.want != nil && !bytes.Equal(r.data, r.want):
		for i := range r.want {
			if r.data[i] != r.want[i] {
				m.t.Errorf("%s: byte %d is %#x, want %#x", what, i, r.data[i], r.want[i])
				return
			}
		}
	case r.command == CommandBlockStatus:
		at := uint64(0)
		for _, e := range r.extents[1] {
			end := min(at+e.Length, r.length)
			if e.State&datapath.ExtentZero != 0 && len(bytes.Trim(r.want[at:end], "\x00")) != 0 {
				m.t.Errorf("%s: bytes %d to %d are said to be zero", what, at, end)
			}
			at = end
		}
		if at < r.length && r.flags&CommandFlagReqOne == 0 {
			m.t.Errorf("%s: extents cover %d bytes", what, at)
		}
	}
}

// TestServerKeepsWhatRandomClientsWrite runs clients of every form of replies at
// once over a device that completes in any order.
func TestServerKeepsWhatRandomClientsWrite(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	steps, part := 2000, uint64(2<<20)
	if serverRace {
		steps = 400
	}
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		const clients = 6
		size := clients*part + 4096 + 513 // the end is in no block, and nobody's
		store := memory(t, size)
		d := filter.NewDelay(store, filter.DelayConfig{Seed: seed, Latency: map[datapath.Op]filter.Latency{
			datapath.OpRead: {Jitter: 300 * time.Microsecond}, datapath.OpWrite: {Jitter: 300 * time.Microsecond},
			datapath.OpWriteZeroes: {Jitter: 100 * time.Microsecond}, datapath.OpDiscard: {Jitter: 100 * time.Microsecond}, datapath.OpExtents: {Jitter: 100 * time.Microsecond},
		}})
		// Half of the clients run straight on the memory, which takes writes at once.
		rig := startServer(t, serverSetup{engine: engine, reactors: 2, buffers: 8 << 20, config: ServerConfig{BytesMax: 3 << 20, Depth: 24}},
			&Export{Name: "slow", Device: d}, &Export{Name: "fast", Device: shareMemory(t, store, size)})
		models := make([]*modelClient, clients)
		for i := range models {
			var contexts []string
			if mode := sessionModes[i%3]; mode != HeadersSimple {
				contexts = []string{ContextAllocation}
			}
			s := rig.openSession(sessionModes[i%3], []string{"slow", "fast"}[i/3], contexts...)
			s.deadline(6 * rawTimeout)
			models[i] = &modelClient{session: s, random: rand.New(rand.NewPCG(seed, uint64(i))), from: uint64(i)*part + 100, bytes: make([]byte, part)}
		}
		var group sync.WaitGroup
		for _, m := range models {
			group.Go(func() { // ends after its steps
				for range steps {
					m.step()
				}
				m.collect(0)
			})
		}
		group.Wait()
		if t.Failed() {
			return
		}
		for i, m := range models {
			stored := make([]byte, part)
			store.Store().Read(stored, m.from)
			if !bytes.Equal(stored, m.bytes) {
				t.Errorf("what client %d wrote is not what is stored", i)
			}
			m.disconnect()
		}
	})
}

// shareMemory is a second device over the memory of one.
func shareMemory(t testing.TB, d *memdev.Device, size uint64) datapath.Device {
	t.Helper()
	second, err := memdev.New(memdev.Config{Size: size, Store: d.Store()})
	if err != nil {
		t.Fatal(err)
	}
	return second
}
