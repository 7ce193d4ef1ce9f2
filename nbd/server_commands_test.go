package nbd

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// randomData is length bytes that look random, by a seed.
func randomData(seed uint64, length int) []byte {
	b := make([]byte, length)
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	_, _ = random.Read(b) // never fails
	return b
}

// commandNames name commands in tests.
var commandNames = map[Command]string{
	CommandRead: "read", CommandWrite: "write", CommandFlush: "flush", CommandTrim: "trim", CommandCache: "cache",
	CommandWriteZeroes: "write-zeroes", CommandBlockStatus: "block-status", CommandResize: "resize", 9: "9", 0xffff: "65535",
}

// TestServerFlagTable sends every command with every single flag, and all of
// them, in every form of replies.
func TestServerFlagTable(t *testing.T) {
	// With contexts negotiated and everything advertised.
	allowed := map[Command]CommandFlags{
		CommandRead: CommandFlagFUA | CommandFlagDF, CommandWrite: CommandFlagFUA, CommandFlush: CommandFlagFUA, CommandTrim: CommandFlagFUA,
		CommandCache: CommandFlagFUA, CommandWriteZeroes: CommandFlagFUA | CommandFlagNoHole | CommandFlagFastZero,
		CommandBlockStatus: CommandFlagFUA | CommandFlagReqOne,
	}
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	onModes(t, func(t *testing.T, mode Headers) {
		contexts := []string{ContextAllocation}
		if mode == HeadersSimple {
			contexts = nil
		}
		s := rig.openSession(mode, "", contexts...)
		s.t = t
		for _, command := range []Command{CommandRead, CommandWrite, CommandFlush, CommandTrim, CommandCache, CommandWriteZeroes, CommandBlockStatus, CommandResize, 9, 0xffff} {
			for bit := range 17 {
				flags := CommandFlags(1) << bit
				if bit == 16 {
					flags = 0
				}
				offset, length := uint64(4096), uint64(4096)
				if command == CommandFlush {
					offset, length = 0, 0
				}
				var payload []byte
				wire := length
				if command == CommandWrite {
					payload = make([]byte, length)
				}
				if mode == HeadersExtended && flags == CommandFlagPayloadLen && command != CommandWrite {
					payload = make([]byte, 100) // of no meaning, but there
					wire, length = 100, 100
				}
				ok := flags&^allowed[command] == 0 && commandNames[command] != "resize" && command < 8
				switch {
				case command == CommandWrite && mode == HeadersExtended && flags == CommandFlagPayloadLen:
					ok = true
				case flags == CommandFlagDF && mode == HeadersSimple:
					ok = false
				case command == CommandBlockStatus && mode == HeadersSimple:
					ok = false
				}
				s.cookie++
				a := s.add(&asked{flags: flags, command: command, cookie: s.cookie, offset: offset, length: length}, wire, payload)
				s.push()
				s.wait(a)
				want := ErrnoOK
				if !ok {
					want = ErrnoInvalid
				}
				if a.errno != want {
					t.Errorf("%s with flags %#x: %v, want %v", commandNames[command], flags, a.errno, want)
				}
			}
		}
	})
}

// TestServerRefusesWhatIsNotAdvertised: flags and commands of a poor device.
func TestServerRefusesWhatIsNotAdvertised(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: &describedDevice{memory(t, 1<<20), func(i *datapath.Info) { i.Features = 0; i.Contexts = nil }}})
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		for _, c := range []struct {
			flags   CommandFlags
			command Command
			want    Error
		}{
			{0, CommandRead, ErrnoOK}, {CommandFlagFUA, CommandRead, ErrnoInvalid}, {CommandFlagFUA, CommandWrite, ErrnoInvalid}, {0, CommandWrite, ErrnoOK},
			{0, CommandFlush, ErrnoInvalid}, {0, CommandTrim, ErrnoInvalid}, {0, CommandWriteZeroes, ErrnoInvalid},
			{CommandFlagFastZero, CommandWriteZeroes, ErrnoInvalid}, {0, CommandBlockStatus, ErrnoInvalid},
			{0, CommandCache, ErrnoOK}, // a hint that need not be advertised
		} {
			length, payload := uint64(512), []byte(nil)
			if c.command == CommandFlush {
				length = 0
			}
			if c.command == CommandWrite {
				payload = make([]byte, 512)
			}
			if a := s.ask(c.flags, c.command, 0, length, payload); a.errno != c.want {
				t.Errorf("%s with flags %#x: %v, want %v", commandNames[c.command], c.flags, a.errno, c.want)
			}
		}
	})
}

// TestServerErrorTable is NBD's table of which misuse gets which error.
func TestServerErrorTable(t *testing.T) {
	const size = 1<<20 + 4096
	rig := startServer(t, serverSetup{},
		&Export{Name: "rw", Device: memory(t, size)},
		&Export{Name: "ro", Device: memory(t, size), ReadOnly: true},
		&Export{Name: "4k", Device: &describedDevice{memory(t, size), func(i *datapath.Info) { i.MinIO = 4096 }}},
	)
	const huge = math.MaxUint64
	for _, c := range []struct {
		export         string
		command        Command
		offset, length uint64
		want           Error
	}{
		{"rw", CommandRead, size - 512, 512, ErrnoOK},
		{"rw", CommandRead, size - 512, 513, ErrnoInvalid},
		{"rw", CommandRead, size, 1, ErrnoInvalid},
		{"rw", CommandRead, size + 1, 0, ErrnoInvalid},
		{"rw", CommandRead, huge, 1, ErrnoInvalid},
		{"rw", CommandRead, huge - 511, 512, ErrnoInvalid}, // the sum is 0
		{"rw", CommandRead, size, 0, ErrnoOK},
		{"rw", CommandRead, 0, payloadMax + 1, ErrnoInvalid},
		{"rw", CommandRead, 0, math.MaxUint32, ErrnoInvalid},
		{"rw", CommandWrite, size - 512, 512, ErrnoOK},
		{"rw", CommandWrite, size - 512, 513, ErrnoNoSpace},
		{"rw", CommandWrite, size, 1, ErrnoNoSpace},
		{"rw", CommandWrite, huge, 1, ErrnoNoSpace},
		{"rw", CommandWrite, huge - 511, 512, ErrnoNoSpace},
		{"rw", CommandWrite, size, 0, ErrnoOK},
		{"rw", CommandWriteZeroes, size - 512, 513, ErrnoNoSpace},
		{"rw", CommandWriteZeroes, 0, math.MaxUint32, ErrnoNoSpace},
		{"rw", CommandWriteZeroes, huge - 511, 512, ErrnoNoSpace},
		{"rw", CommandTrim, size - 512, 513, ErrnoInvalid},
		{"rw", CommandTrim, huge - 511, 512, ErrnoInvalid},
		{"rw", CommandCache, size - 512, 513, ErrnoInvalid},
		{"rw", CommandCache, huge, math.MaxUint32, ErrnoInvalid},
		{"rw", CommandBlockStatus, size - 512, 513, ErrnoInvalid},
		{"rw", CommandBlockStatus, size, 512, ErrnoInvalid},
		{"rw", CommandBlockStatus, huge - 511, 512, ErrnoInvalid},
		{"rw", CommandBlockStatus, 0, 0, ErrnoInvalid},
		{"rw", CommandTrim, 0, 0, ErrnoOK},
		{"rw", CommandWriteZeroes, 0, 0, ErrnoOK},
		{"rw", CommandCache, 0, 0, ErrnoOK},
		{"rw", CommandFlush, 0, 0, ErrnoOK},
		{"rw", CommandFlush, 4096, 0, ErrnoInvalid},
		{"rw", CommandFlush, 0, 4096, ErrnoInvalid},
		{"rw", CommandResize, 4096, 0, ErrnoInvalid},
		{"rw", 9, 0, 512, ErrnoInvalid},
		{"rw", CommandRead, 1, 3, ErrnoOK},
		{"rw", CommandWrite, 511, 2, ErrnoOK},
		{"rw", CommandWriteZeroes, 4095, 2, ErrnoOK},
		{"rw", CommandTrim, 1, 4096, ErrnoOK},

		{"ro", CommandRead, 0, 512, ErrnoOK},
		{"ro", CommandFlush, 0, 0, ErrnoOK},
		{"ro", CommandWrite, 0, 512, ErrnoPerm},
		{"ro", CommandWrite, size, 512, ErrnoPerm},
		{"ro", CommandTrim, 0, 512, ErrnoPerm},
		{"ro", CommandTrim, huge, 512, ErrnoPerm},
		{"ro", CommandWriteZeroes, 0, 512, ErrnoPerm},
		{"ro", CommandWriteZeroes, size, 512, ErrnoPerm},
		{"ro", CommandBlockStatus, 0, 512, ErrnoOK},

		{"4k", CommandRead, 4096, 4096, ErrnoOK},
		{"4k", CommandRead, 512, 4096, ErrnoInvalid},
		{"4k", CommandRead, 0, 512, ErrnoInvalid},
		{"4k", CommandWrite, 512, 4096, ErrnoInvalid},
		{"4k", CommandWriteZeroes, 0, 4095, ErrnoInvalid},
		{"4k", CommandTrim, 1, 4096, ErrnoInvalid},
		{"4k", CommandBlockStatus, 0, 512, ErrnoInvalid},
	} {
		for _, mode := range sessionModes {
			if mode == HeadersSimple && c.command == CommandBlockStatus {
				continue
			}
			var contexts []string
			if c.command == CommandBlockStatus {
				contexts = []string{ContextAllocation}
			}
			s := rig.openSession(mode, c.export, contexts...)
			var payload []byte
			if c.command == CommandWrite {
				payload = make([]byte, c.length)
			}
			if a := s.ask(0, c.command, c.offset, c.length, payload); a.errno != c.want {
				t.Errorf("%s: %s of %d at %d on %s: %v, want %v", mode, commandNames[c.command], c.length, c.offset, c.export, a.errno, c.want)
			}
			if mode == HeadersExtended && c.command != CommandRead && c.command != CommandWrite && c.length == math.MaxUint32 {
				if a := s.ask(0, c.command, c.offset, huge, nil); a.errno != c.want {
					t.Errorf("%s of 2^64-1 at %d: %v, want %v", commandNames[c.command], c.offset, a.errno, c.want)
				}
			}
			s.readAt(0, 4096) // the connection goes on, in step
			s.disconnect()
		}
	}
}

func TestServerReadsBackWhatWasWritten(t *testing.T) {
	const size = 64<<20 + 4097
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := memory(t, size)
		rig := startServer(t, serverSetup{engine: engine}, &Export{Device: d})
		data := randomData(1, payloadMax)
		onModes(t, func(t *testing.T, mode Headers) {
			s := rig.openSession(mode, "")
			s.t = t
			s.deadline(3 * rawTimeout)
			for _, c := range []struct{ offset, length uint64 }{
				{0, 1}, {0, 512}, {511, 2}, {4095, 4098}, {1<<20 - 1, 2}, {1<<20 - 1, 1<<20 + 2}, {3, 5 << 20}, {size - 1, 1}, {size - 4097, 4097},
				{0, payloadMax}, {size - payloadMax, payloadMax}, {12345, payloadMax - 1},
			} {
				if serverRace && (c.length > 6<<20 && (c.offset != 12345 || mode != HeadersExtended) || c.length > 1<<21 && engine == reactor.EngineEpoll) {
					continue // copying is slow there, and not the point
				}
				s.write(c.offset, data[:c.length])
				if got := s.readAt(c.offset, c.length); !bytes.Equal(got, data[:c.length]) {
					t.Errorf("%d bytes at %d differ", c.length, c.offset)
				}
				stored := make([]byte, c.length)
				d.Store().Read(stored, c.offset)
				if !bytes.Equal(stored, data[:c.length]) {
					t.Errorf("%d bytes stored at %d differ", c.length, c.offset)
				}
				if a := s.ask(0, CommandTrim, 0, size, nil); a.errno != ErrnoOK {
					t.Fatal(a.errno)
				}
			}
			s.disconnect()
		})
	})
}

// TestServerTakesPayloadAboveTheBoundAsAnAttack: up to 32 MiB a payload is read
// and answered, whatever is wrong with it.
func TestServerTakesPayloadAboveTheBoundAsAnAttack(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		s.deadline(3 * rawTimeout)
		if a := s.ask(0, CommandWrite, 0, payloadMax, make([]byte, payloadMax)); a.errno != ErrnoNoSpace {
			t.Errorf("32 MiB past the end: %v", a.errno)
		}
		s.readAt(0, 1<<20)
		s.queue(0, CommandWrite, 0, payloadMax+1, nil)
		s.push()
		s.expectClosed()
	})
	for _, command := range []Command{CommandRead, CommandBlockStatus, CommandTrim, 77} {
		s := rig.openSession(HeadersExtended, "")
		s.queue(CommandFlagPayloadLen, command, 0, payloadMax+1, nil)
		s.push()
		s.expectClosed()
	}
}

func TestServerDropsBadRequestMagic(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		s.send(append(appendRequest(nil, mode != HeadersExtended, 0, CommandRead, 1, 0, 512), make([]byte, 32)...)) // the other form
		s.expectClosed()
	})
}

func TestServerKeepsCookiesAsTheyAre(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		for _, cookie := range []uint64{0, 0, 0, math.MaxUint64, math.MaxUint64, 0x6744669800000000, 1} {
			s.add(&asked{command: CommandRead, cookie: cookie, offset: 512, length: 100}, 100, nil)
		}
		s.push()
		s.waitAll()
	})
}

func TestServerMarksHolesInStructuredReads(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 8<<20)})
	for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
		s := rig.openSession(mode, "")
		word := []byte("something")
		s.write(3<<20+100, word)
		a := s.ask(0, CommandRead, 0, 8<<20, nil)
		if a.errno != ErrnoOK || a.holes != 7<<20 || a.chunks != 8 {
			t.Errorf("%s: %v, %d bytes of holes, %d chunks", mode, a.errno, a.holes, a.chunks)
		}
		if !bytes.Equal(a.data[3<<20+100:][:len(word)], word) || len(bytes.Trim(a.data, "\x00")) != len(word) {
			t.Errorf("%s: the data are wrong", mode)
		}
		if a := s.ask(CommandFlagDF, CommandRead, 0, 1<<20, nil); a.errno != ErrnoOK || a.holes != 0 || a.chunks != 1 {
			t.Errorf("%s, DF: %v, %d bytes of holes, %d chunks", mode, a.errno, a.holes, a.chunks)
		}
		s.ask(0, CommandTrim, 0, 8<<20, nil)
	}
}

func TestServerDoesNotFragmentWithDF(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 8<<20)})
	data := randomData(2, 8<<20)
	for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
		s := rig.openSession(mode, "")
		s.write(0, data)
		for _, length := range []uint64{1, 512, dfMin, dfMin + 1, pieceMax} {
			for _, offset := range []uint64{0, 1, pieceMax - 1, 8<<20 - length} {
				a := s.ask(CommandFlagDF, CommandRead, offset, length, nil)
				if a.errno != ErrnoOK || a.chunks != 1 || !bytes.Equal(a.data, data[offset:offset+length]) {
					t.Errorf("%s: %d bytes at %d: %v, %d chunks", mode, length, offset, a.errno, a.chunks)
				}
			}
		}
		if a := s.ask(CommandFlagDF, CommandRead, 0, pieceMax+1, nil); a.errno != ErrnoOverflow {
			t.Errorf("%s: a read too long for one chunk: %v", mode, a.errno)
		}
		if a := s.ask(0, CommandRead, 0, 8<<20, nil); a.chunks < 8 || !bytes.Equal(a.data, data) {
			t.Errorf("%s: %d chunks", mode, a.chunks)
		}
	}
}

// recordingDevice keeps the flags and lengths of requests that reach it.
type recordingDevice struct {
	datapath.Device
	trace *filter.Trace
}

func recorded(t testing.TB, below datapath.Device) *recordingDevice {
	t.Helper()
	trace := filter.NewTrace(below, 1<<14)
	return &recordingDevice{trace, trace}
}

func TestServerPassesFlagsToTheDevice(t *testing.T) {
	d := recorded(t, nulldev.New(1<<40))
	rig := startServer(t, serverSetup{}, &Export{Device: d})
	s := rig.openSession(HeadersExtended, "", ContextAllocation)
	for _, c := range []struct {
		flags          CommandFlags
		command        Command
		offset, length uint64
		op             datapath.Op
		want           datapath.Flags
	}{
		{CommandFlagFUA, CommandWrite, 512, 1024, datapath.OpWrite, datapath.FlagFUA},
		{0, CommandWrite, 512, 1024, datapath.OpWrite, 0},
		{CommandFlagFUA, CommandRead, 512, 1024, datapath.OpRead, 0},
		{CommandFlagFUA, CommandTrim, 0, 1 << 33, datapath.OpDiscard, datapath.FlagFUA},
		{CommandFlagFUA | CommandFlagNoHole, CommandWriteZeroes, 1, 1 << 33, datapath.OpWriteZeroes, datapath.FlagFUA | datapath.FlagNoUnmap},
		{CommandFlagFastZero, CommandWriteZeroes, 0, 1 << 40, datapath.OpWriteZeroes, datapath.FlagFastZero},
		{0, CommandCache, 0, 1 << 40, datapath.OpCache, 0},
		{0, CommandFlush, 0, 0, datapath.OpFlush, 0},
		{CommandFlagReqOne, CommandBlockStatus, 1 << 30, 1 << 35, datapath.OpExtents, datapath.FlagOneExtent},
	} {
		var payload []byte
		if c.command == CommandWrite {
			payload = make([]byte, c.length)
		}
		before := len(d.trace.Records())
		if a := s.ask(c.flags, c.command, c.offset, c.length, payload); a.errno != ErrnoOK {
			t.Errorf("%s with flags %#x: %v", commandNames[c.command], c.flags, a.errno)
		}
		records := d.trace.Records()[before:]
		if len(records) != 1 || records[0].Op != c.op || records[0].Flags&^datapath.FlagLend != c.want || records[0].Offset != c.offset || records[0].Length != c.length {
			t.Errorf("%s with flags %#x reaches the device as %v", commandNames[c.command], c.flags, records)
		}
	}
	// A long write with FUA has it on each piece.
	before := len(d.trace.Records())
	s.ask(CommandFlagFUA, CommandWrite, 4096, 4<<20, make([]byte, 4<<20))
	var sum uint64
	for _, r := range d.trace.Records()[before:] {
		if r.Flags != datapath.FlagFUA || r.Op != datapath.OpWrite {
			t.Errorf("%v", r)
		}
		sum += r.Length
	}
	if sum != 4<<20 {
		t.Errorf("%d bytes", sum)
	}
}

func TestServerWriteZeroes(t *testing.T) {
	d := memory(t, 1<<20)
	rig := startServer(t, serverSetup{}, &Export{Device: d})
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		data := randomData(3, 1<<20)
		s.write(0, data)
		for _, flags := range []CommandFlags{0, CommandFlagNoHole, CommandFlagFastZero, CommandFlagFUA} {
			s.write(0, data)
			if a := s.ask(flags, CommandWriteZeroes, 1000, 300000, nil); a.errno != ErrnoOK {
				t.Errorf("flags %#x: %v", flags, a.errno)
			}
			want := slices.Clone(data)
			clear(want[1000:301000])
			if !bytes.Equal(s.readAt(0, 1<<20), want) {
				t.Errorf("flags %#x: the content is wrong", flags)
			}
			if full := d.Store().Allocated() == 1<<20; full != (flags == CommandFlagNoHole) {
				t.Errorf("flags %#x: %d bytes allocated", flags, d.Store().Allocated())
			}
		}
	})
}

// TestServerMapsDeviceErrors makes the device end every operation with every
// status.
func TestServerMapsDeviceErrors(t *testing.T) {
	f := faulty(t, 1<<20)
	features := &describedDevice{f, func(i *datapath.Info) { i.Features |= datapath.FeatureCache }}
	rig := startServer(t, serverSetup{}, &Export{Device: features})
	base := map[datapath.Status]Error{
		datapath.StatusIO: ErrnoIO, datapath.StatusNoSpace: ErrnoNoSpace, datapath.StatusInvalid: ErrnoInvalid, datapath.StatusNotSupported: ErrnoInvalid,
		datapath.StatusReadOnly: ErrnoPerm, datapath.StatusOverflow: ErrnoOverflow, datapath.StatusShutdown: ErrnoShutdown, datapath.StatusCorrupt: ErrnoIO,
	}
	onModes(t, func(t *testing.T, mode Headers) {
		var contexts []string
		if mode != HeadersSimple {
			contexts = []string{ContextAllocation}
		}
		s := rig.openSession(mode, "", contexts...)
		s.t = t
		for status, errno := range base {
			if err := f.SetRules([]filter.FaultRule{{Action: filter.FaultFail, Status: status, Transient: true}}); err != nil {
				t.Fatal(err)
			}
			for _, command := range []Command{CommandRead, CommandWrite, CommandFlush, CommandTrim, CommandCache, CommandWriteZeroes, CommandBlockStatus} {
				for _, flags := range []CommandFlags{0, CommandFlagFastZero} {
					if command == CommandBlockStatus && mode == HeadersSimple || flags != 0 && command != CommandWriteZeroes {
						continue
					}
					want := errno
					switch {
					case status == datapath.StatusNotSupported && flags == CommandFlagFastZero:
						want = ErrnoNotSupported // the only case
					case status == datapath.StatusNotSupported && (command == CommandTrim || command == CommandCache):
						want = ErrnoOK // hints
					case status == datapath.StatusOverflow && flags == CommandFlagFastZero:
						want = ErrnoNotSupported // never EOVERFLOW; nothing was changed
					case status == datapath.StatusOverflow && command == CommandWrite:
						want = ErrnoIO // EOVERFLOW is for requests without payload
					}
					length, payload := uint64(4096), []byte(nil)
					switch command {
					case CommandFlush:
						length = 0
					case CommandWrite:
						payload = make([]byte, length)
					}
					if a := s.ask(flags, command, 0, length, payload); a.errno != want {
						t.Errorf("%s, flags %#x, device says %q: %v, want %v", commandNames[command], flags, status, a.errno, want)
					}
				}
			}
		}
		if err := f.SetRules(nil); err != nil {
			t.Fatal(err)
		}
		s.readAt(0, 1<<20) // all is well again
	})
}

// TestServerReportsAnErrorInTheMiddleOfARead: the pieces around it arrive.
func TestServerReportsAnErrorInTheMiddleOfARead(t *testing.T) {
	const size = 8 << 20
	for _, status := range []datapath.Status{datapath.StatusIO, datapath.StatusNoSpace} {
		f := faulty(t, size, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Offset: 3<<20 + 5, Length: 1, Status: status},
			filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Offset: size - 1, Length: 1, Status: datapath.StatusIO})
		rig := startServer(t, serverSetup{}, &Export{Device: f})
		data := randomData(4, size)
		for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
			s := rig.openSession(mode, "")
			s.write(0, data)
			a := s.ask(0, CommandRead, 100, size-100, nil)
			if a.errno == ErrnoOK || !slices.Equal(slices.Sorted(slices.Values(a.errorsAt)), []uint64{3 << 20, 7 << 20}) {
				t.Errorf("%s: %v, errors at %d", mode, a.errno, a.errorsAt)
			}
			for _, c := range a.covered {
				if !bytes.Equal(a.data[c.from:c.to], data[100+c.from:100+c.to]) {
					t.Errorf("%s: bytes %d to %d differ", mode, c.from, c.to)
				}
				if c.from < 4<<20-100 && c.to > 3<<20-100 {
					t.Errorf("%s: data %v where the device failed", mode, c)
				}
			}
			if a.chunks != 6 {
				t.Errorf("%s: %d chunks of data", mode, a.chunks)
			}
			if got := s.readAt(0, 3<<20); !bytes.Equal(got, data[:3<<20]) {
				t.Errorf("%s: the connection is out of step", mode)
			}
		}
		// A simple reply has one answer for all, before any data.
		s := rig.openSession(HeadersSimple, "")
		for range 3 {
			if a := s.ask(0, CommandRead, 100, size-100, nil); a.errno == ErrnoOK {
				t.Error("simple: no error")
			}
		}
		if got := s.readAt(0, 3<<20); !bytes.Equal(got, data[:3<<20]) {
			t.Error("simple: the connection is out of step")
		}
		rig.stop()
	}
}

func TestServerReportsAnErrorInTheMiddleOfAWrite(t *testing.T) {
	f := faulty(t, 8<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpWrite}, Offset: 3 << 20, Length: 1, Status: datapath.StatusNoSpace})
	rig := startServer(t, serverSetup{}, &Export{Device: f})
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		if a := s.ask(0, CommandWrite, 0, 8<<20, make([]byte, 8<<20)); a.errno != ErrnoNoSpace {
			t.Errorf("%v", a.errno)
		}
		s.write(0, make([]byte, 3<<20))
	})
}

// TestServerCompletesOutOfOrder: a slow request does not hold up those behind it.
func TestServerCompletesOutOfOrder(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Length: 4096, Action: filter.FaultHang})
		rig := startServer(t, serverSetup{engine: engine}, &Export{Device: f})
		onModes(t, func(t *testing.T, mode Headers) {
			s := rig.openSession(mode, "")
			s.t = t
			slow := s.queue(0, CommandRead, 0, 4096, nil)
			for i := range 100 {
				s.queue(0, CommandRead, uint64(4096+i*512), 512, nil)
			}
			s.push()
			for len(s.pending) > 1 {
				s.next()
			}
			if slow.done {
				t.Error("the slow request has ended")
			}
			s.write(8192, []byte("still served"))
			f.Release()
			s.wait(slow)
		})
	})
}

func TestServerInterleavesRepliesOfManyReads(t *testing.T) {
	d := filter.NewDelay(memory(t, 16<<20), filter.DelayConfig{
		Latency: map[datapath.Op]filter.Latency{datapath.OpRead: {Jitter: 2e6}, datapath.OpWrite: {Jitter: 2e6}}, Seed: 5,
	})
	rig := startServer(t, serverSetup{}, &Export{Device: d})
	data := randomData(6, 16<<20)
	onModes(t, func(t *testing.T, mode Headers) {
		s := rig.openSession(mode, "")
		s.t = t
		s.write(0, data)
		random := rand.New(rand.NewPCG(1, 2))
		var all []*asked
		for range 16 {
			offset, length := random.Uint64N(8<<20), random.Uint64N(3<<20)+1
			all = append(all, s.queue(0, CommandRead, offset, length, nil))
		}
		s.push()
		s.waitAll()
		for _, a := range all {
			if a.errno != ErrnoOK || !bytes.Equal(a.data, data[a.offset:a.offset+a.length]) {
				t.Errorf("read of %d at %d: %v, or it differs", a.length, a.offset, a.errno)
			}
		}
	})
}

// TestServerExtendedWriteWithoutPayloadFlag: clients exist that leave it out.
func TestServerExtendedWriteWithoutPayloadFlag(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	s := rig.openSession(HeadersExtended, "")
	data := randomData(7, 5000)
	a := s.add(&asked{command: CommandWrite, cookie: 1, offset: 3, length: 5000}, 5000, data)
	s.push()
	s.wait(a)
	if got := s.readAt(3, 5000); a.errno != ErrnoOK || !bytes.Equal(got, data) {
		t.Errorf("%v", a.errno)
	}
}

func TestServerServesEffectsBeyondFourGiB(t *testing.T) {
	const size = 1 << 42
	rig := startServer(t, serverSetup{}, &Export{Name: "null", Device: nulldev.New(size)}, &Export{Name: "mem", Device: sparse(t, 16<<30+512)})
	s := rig.openSession(HeadersExtended, "null", ContextAllocation)
	for _, command := range []Command{CommandTrim, CommandWriteZeroes, CommandCache} {
		if a := s.ask(0, command, 512, size-512, nil); a.errno != ErrnoOK {
			t.Errorf("%s: %v", commandNames[command], a.errno)
		}
	}
	a := s.ask(0, CommandBlockStatus, 1, size-1, nil)
	if e := a.extents[1]; len(e) != 1 || e[0].Length != size-1 {
		t.Errorf("block status: %v", e)
	}
	s = rig.openSession(HeadersExtended, "mem", ContextAllocation)
	s.write(5<<30, []byte("data"))
	for _, flags := range []CommandFlags{0, CommandFlagReqOne} {
		a := s.ask(flags, CommandBlockStatus, 0, 16<<30+512, nil)
		want := fmt.Sprint([]datapath.Extent{{Length: 5 << 30, State: 3}, {Length: memdev.PageSize}, {Length: 11<<30 + 512 - memdev.PageSize, State: 3}})
		if flags != 0 {
			want = fmt.Sprint([]datapath.Extent{{Length: 5 << 30, State: 3}})
		}
		if got := fmt.Sprint(a.extents[1]); got != want {
			t.Errorf("flags %#x: %v, want %v", flags, got, want)
		}
	}
	if a := s.ask(0, CommandWriteZeroes, 1, 16<<30, nil); a.errno != ErrnoOK {
		t.Error(a.errno)
	}
	if got := s.readAt(5<<30, 4); !bytes.Equal(got, make([]byte, 4)) {
		t.Errorf("%q", got)
	}
	// Compact headers reach up to 4 GiB - 1.
	s = rig.openSession(HeadersStructured, "mem", ContextAllocation)
	a = s.ask(0, CommandBlockStatus, 4<<30, math.MaxUint32, nil)
	if e := a.extents[1]; len(e) != 1 || e[0].Length != math.MaxUint32 {
		t.Errorf("%v", e)
	}
	if a := s.ask(0, CommandWriteZeroes, 1<<30, math.MaxUint32, nil); a.errno != ErrnoOK {
		t.Error(a.errno)
	}
}

// sparse is a large device in memory, which takes address space only.
func sparse(t testing.TB, size uint64) datapath.Device { return memory(t, size) }

// TestServerFlushCoversWritesOfOtherConnections: a write that was replied to on
// one connection reaches the device before the flush of another does.
func TestServerFlushCoversWritesOfOtherConnections(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := recorded(t, memory(t, 1<<20))
		rig := startServer(t, serverSetup{engine: engine, reactors: 2}, &Export{Device: d})
		first, second := rig.openSession(HeadersExtended, ""), rig.openSession(HeadersSimple, "")
		if first.flags&FlagCanMultiConn == 0 {
			t.Fatal("the export does not say that it can")
		}
		for i := range 50 {
			writer, flusher := first, second
			if i%2 == 1 {
				writer, flusher = second, first
			}
			writer.write(uint64(i)*512, []byte{byte(i), 1, 2, 3})
			if a := flusher.ask(0, CommandFlush, 0, 0, nil); a.errno != ErrnoOK {
				t.Fatal(a.errno)
			}
			if got := flusher.readAt(uint64(i)*512, 1); got[0] != byte(i) {
				t.Errorf("write %d is not visible on the other connection", i)
			}
		}
		var order []datapath.Op
		for _, r := range d.trace.Records() {
			if r.Op != datapath.OpRead {
				order = append(order, r.Op)
			}
		}
		for i, op := range order {
			if want := []datapath.Op{datapath.OpWrite, datapath.OpFlush}[i%2]; op != want {
				t.Fatalf("request %d at the device is %v", i, op)
			}
		}
	})
}

// TestServerFlushWaitsForTheDevice: neither flush nor FUA is answered early.
func TestServerFlushWaitsForTheDevice(t *testing.T) {
	f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpFlush}, Action: filter.FaultHang},
		filter.FaultRule{Ops: []datapath.Op{datapath.OpWrite}, Flags: datapath.FlagFUA, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{}, &Export{Device: f})
	s := rig.openSession(HeadersSimple, "")
	flush := s.queue(0, CommandFlush, 0, 0, nil)
	fua := s.queue(CommandFlagFUA, CommandWrite, 0, 512, make([]byte, 512))
	s.push()
	eventually(t, "both reach the device", func() bool { return f.Hanging() == 2 })
	s.write(4096, []byte("not held up"))
	if flush.done || fua.done {
		t.Error("answered before the device did")
	}
	f.Release()
	s.waitAll()
}

func TestServerReportsAFailedFlushEachTime(t *testing.T) {
	f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpFlush}, Count: 1})
	rig := startServer(t, serverSetup{}, &Export{Device: f})
	s := rig.openSession(HeadersStructured, "")
	for range 3 {
		if a := s.ask(0, CommandFlush, 0, 0, nil); a.errno != ErrnoIO {
			t.Errorf("%v", a.errno)
		}
	}
	s.readAt(0, 512)
}

// TestServerFollowsADeviceThatGrows: a range past the old end is looked at again.
func TestServerFollowsADeviceThatGrows(t *testing.T) {
	d, err := memdev.New(memdev.Config{Size: 1 << 20, SizeMax: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	rig := startServer(t, serverSetup{bare: true}, &Export{Device: d})
	s := rig.openSession(HeadersStructured, "")
	if a := s.ask(0, CommandRead, 1<<20, 512, nil); a.errno != ErrnoInvalid {
		t.Errorf("%v", a.errno)
	}
	if err := d.Resize(4 << 20); err != nil {
		t.Fatal(err)
	}
	s.write(4<<20-512, make([]byte, 512))
	s.readAt(1<<20, 3<<20)
	if a := s.ask(0, CommandWrite, 4<<20, 512, make([]byte, 512)); a.errno != ErrnoNoSpace {
		t.Errorf("%v", a.errno)
	}
}
