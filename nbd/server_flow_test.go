package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// closeWrite ends the client's stream, leaving the other direction open.
func (s *session) closeWrite() {
	s.t.Helper()
	if err := s.conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		s.t.Fatal(err)
	}
}

// TestServerAnswersAClientThatHasEndedItsStream: all replies arrive, then the
// server closes. Done many times, since requests and end arrive together or not.
func TestServerAnswersAClientThatHasEndedItsStream(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := filter.NewDelay(memory(t, 4<<20), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{datapath.OpRead: {Jitter: time.Millisecond}}})
		rig := startServer(t, serverSetup{engine: engine}, &Export{Device: d})
		address := rig.listenTCP()
		for i := range 60 {
			var s *session
			mode := sessionModes[i%3]
			if i%2 == 0 {
				s = rig.openSession(mode, "")
			} else {
				s = newSession(rawDial(t, "tcp", address, clientFixedNewstyle), mode, "")
			}
			for range 5 {
				s.queue(0, CommandRead, 0, 1<<uint(i%22), nil)
			}
			s.push()
			s.closeWrite()
			s.waitAll()
			s.expectClosed()
		}
		// One that ends its stream at once, or in the middle of something.
		for _, n := range []int{0, 1, 27, 28 + 100} {
			s := rig.openSession(HeadersSimple, "")
			b := append(appendRequest(nil, false, 0, CommandWrite, 1, 0, 512), make([]byte, 512)...)
			s.send(b[:n])
			s.closeWrite()
			s.expectClosed()
		}
	})
}

func TestServerFinishesWhatIsInFlightAtDisconnect(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpWrite}, Action: filter.FaultHang})
		rig := startServer(t, serverSetup{engine: engine}, &Export{Device: f})
		onModes(t, func(t *testing.T, mode Headers) {
			s := rig.openSession(mode, "")
			s.t = t
			for i := range 10 {
				s.queue(0, CommandWrite, uint64(i)*512, 512, make([]byte, 512))
			}
			s.out = appendRequest(s.out, mode == HeadersExtended, 0, CommandDisconnect, 99, 0, 0)
			s.out = appendRequest(s.out, mode == HeadersExtended, 0, CommandRead, 100, 0, 512) // behind DISC: not answered
			s.push()
			eventually(t, "the writes reach the device", func() bool { return f.Hanging() == 10 })
			f.Release()
			s.waitAll()
			s.expectClosed()
		})
		rig.connections(0)
	})
}

// TestServerLetsRequestsOfAGoneClientEnd: buffers are not reused before.
func TestServerLetsRequestsOfAGoneClientEnd(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		f := faulty(t, 8<<20, filter.FaultRule{Action: filter.FaultHang})
		rig := startServer(t, serverSetup{engine: engine}, &Export{Device: f})
		address := rig.listenTCP()
		r := rawDial(t, "tcp", address, clientFixedNewstyle)
		s := newSession(r, HeadersStructured, "", ContextAllocation)
		s.queue(0, CommandRead, 0, 4<<20, nil)
		s.queue(0, CommandWrite, 0, 3<<20, make([]byte, 3<<20))
		s.queue(0, CommandBlockStatus, 0, 4096, nil)
		s.queue(0, CommandWrite, 0, 1<<20, make([]byte, 1<<19)) // half
		s.push()
		eventually(t, "all hang", func() bool { return f.Hanging() == 8 })
		if err := r.conn.(*net.TCPConn).SetLinger(0); err != nil { // a reset instead of an end
			t.Fatal(err)
		}
		if err := r.conn.Close(); err != nil {
			t.Fatal(err)
		}
		other := rig.openSession(HeadersSimple, "")
		if err := f.SetRules(nil); err != nil {
			t.Fatal(err)
		}
		other.write(0, []byte("served meanwhile"))
		if n := f.Hanging(); n != 8 {
			t.Errorf("%d requests hang, want 8", n)
		}
		f.Release()
		rig.connections(1)
		if used := rig.arenaUsed(); used != 0 {
			t.Errorf("%d bytes of buffers in use", used)
		}
	})
}

func TestServerSurvivesResetsAtAnyMoment(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := filter.NewDelay(memory(t, 8<<20), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{
			datapath.OpRead: {Jitter: time.Millisecond}, datapath.OpWrite: {Jitter: time.Millisecond}, datapath.OpExtents: {Jitter: time.Millisecond},
		}})
		rig := startServer(t, serverSetup{engine: engine}, &Export{Device: d})
		address := rig.listenTCP()
		rig.openSession(HeadersSimple, "").write(0, randomData(10, 300<<10))
		rounds := 60
		if serverRace {
			rounds = 20
		}
		for i := range rounds {
			r := rawDial(t, "tcp", address, clientFixedNewstyle)
			s := newSession(r, sessionModes[1+i%2], "", ContextAllocation)
			for range 20 {
				s.queue(0, CommandRead, 0, 300<<10, nil)
				s.queue(0, CommandBlockStatus, 0, 4096, nil)
				s.queue(0, CommandWrite, 4<<20, 50<<10, make([]byte, 50<<10))
			}
			go func() { _, _ = r.conn.Write(s.out) }() // ends with the connection
			r.read(1 + i*i*50)                         // somewhere in the replies
			_ = r.conn.(*net.TCPConn).SetLinger(0)     // fails with the connection
			_ = r.conn.Close()                         // the point of the test
		}
		rig.connections(1)
		if used := rig.arenaUsed(); used != 0 {
			t.Errorf("%d bytes of buffers in use", used)
		}
		rig.openSession(HeadersStructured, "").readAt(0, 8<<20)
	})
}

// fill has the client not take replies until the server's socket is full and data
// wait in the server's buffers. The export holds data in its first MiB.
func (s *session) fill(rig *serverRig) {
	s.t.Helper()
	s.write(0, randomData(9, 1<<20))
	for range 64 {
		before := rig.server.Stats().Totals.Requests[datapath.OpRead]
		s.queue(0, CommandRead, 0, 1<<20, nil)
		s.push()
		eventually(s.t, "the read is answered", func() bool {
			totals := rig.server.Stats().Totals
			return totals.Requests[datapath.OpRead] > before && totals.InFlight == 0
		})
		if rig.arenaUsed() > 0 {
			return
		}
	}
	s.t.Fatal("the socket takes 64 MiB")
}

// TestServerDropsAClientThatNeverReads, and serves others meanwhile.
func TestServerDropsAClientThatNeverReads(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		rig := startServer(t, serverSetup{engine: engine, config: ServerConfig{StallTimeout: 200 * time.Millisecond}}, &Export{Device: memory(t, 64<<20)})
		onModes(t, func(t *testing.T, mode Headers) {
			if engine == reactor.EngineEpoll && mode != HeadersSimple {
				return // each takes two timeouts, and the engine makes no difference to the form of replies
			}
			lazy := rig.openSession(mode, "")
			lazy.t = t
			lazy.fill(rig)
			for range 100 {
				lazy.queue(0, CommandRead, 0, 1<<20, nil)
			}
			_, _ = lazy.conn.Write(lazy.out) // it may be dropped already
			other := rig.openSession(mode, "")
			other.t = t
			var worst time.Duration
			eventually(t, "the drop is in the log", func() bool {
				for range 20 {
					start := time.Now()
					other.readAt(0, 4096)
					worst = max(worst, time.Since(start))
				}
				return strings.Contains(rig.log.String(), "no progress for 200ms")
			})
			rig.log.reset()
			if worst > time.Second { // usually below a millisecond
				t.Errorf("another client waited %v for a read", worst)
			}
			other.disconnect()
			rig.connections(0)
		})
		if used := rig.arenaUsed(); used != 0 {
			t.Errorf("%d bytes of buffers in use", used)
		}
	})
}

// TestServerDropsAClientThatStopsInTheMiddle of a header, a payload or what is
// thrown away; one that is merely idle stays.
func TestServerDropsAClientThatStopsInTheMiddle(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{StallTimeout: 150 * time.Millisecond}}, &Export{Device: memory(t, 1<<20)}, &Export{Name: "ro", Device: memory(t, 1<<20), ReadOnly: true})
	idle := rig.openSession(HeadersSimple, "")
	var stuck []*session
	request := append(appendRequest(nil, false, 0, CommandWrite, 1, 0, 1<<20), make([]byte, 1<<20)...)
	for _, n := range []int{1, 27, 28, 29, 100000, len(request) - 1} {
		for _, name := range []string{"", "ro"} {
			s := rig.openSession(HeadersSimple, name)
			s.send(request[:n])
			stuck = append(stuck, s)
		}
	}
	status := rig.openSession(HeadersExtended, "", ContextAllocation)
	status.send(append(appendRequest(nil, true, CommandFlagPayloadLen, CommandBlockStatus, 1, 0, 12), 1, 2, 3))
	for _, s := range append(stuck, status) {
		s.expectClosed()
	}
	idle.readAt(0, 512)
	if used := rig.arenaUsed(); used != 0 {
		t.Errorf("%d bytes of buffers in use", used)
	}
}

// TestServerKeepsASlowClient: as long as something moves it is served.
func TestServerKeepsASlowClient(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{StallTimeout: 400 * time.Millisecond}}, &Export{Device: memory(t, 1<<20)})
	s := rig.openSession(HeadersExtended, "")
	a := s.queue(0, CommandWrite, 100, 3000, randomData(11, 3000))
	out := slices.Clone(s.out)
	s.out = s.out[:0]
	for chunk := range slices.Chunk(out, len(out)/12) {
		s.send(chunk)
		time.Sleep(60 * time.Millisecond) // the pace of the client
	}
	s.wait(a)
	if got := s.readAt(100, 3000); a.errno != ErrnoOK || !bytes.Equal(got, randomData(11, 3000)) {
		t.Errorf("%v", a.errno)
	}
}

func TestServerKeepsAClientWhoseDeviceIsSlow(t *testing.T) {
	f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{config: ServerConfig{StallTimeout: 50 * time.Millisecond, Depth: 4}}, &Export{Device: f})
	s := rig.openSession(HeadersSimple, "")
	for range 10 { // more than the depth: receiving stops
		s.queue(0, CommandRead, 0, 512, nil)
	}
	s.push()
	eventually(t, "reads hang", func() bool { return f.Hanging() == 4 })
	time.Sleep(200 * time.Millisecond) // past the timeout
	if err := f.SetRules(nil); err != nil {
		t.Fatal(err)
	}
	f.Release()
	s.waitAll()
}

// TestServerGoesOnAfterRepliesWereHeldUp: a client that did not read for a while
// gets everything once it does, however little the replies hold.
func TestServerGoesOnAfterRepliesWereHeldUp(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	for _, mode := range []Headers{HeadersSimple, HeadersExtended} {
		s := rig.openSession(mode, "")
		const count = 200_000 // replies for more than all socket buffers
		request := appendRequest(nil, mode == HeadersExtended, 0, CommandRead, 7, 0, 0)
		out, size := bytes.Repeat(request, count), sizeSimpleReply
		if mode == HeadersExtended {
			size = sizeExtendedReply
		}
		sent := make(chan error, 1)
		go func() { // ends when the server has taken all
			_, err := s.conn.Write(out)
			sent <- err
		}()
		taken := uint64(0)
		eventually(t, "the server takes no more", func() bool {
			before := taken
			time.Sleep(20 * time.Millisecond) // within which it takes thousands
			taken = rig.server.Stats().Totals.Requests[datapath.OpRead]
			return taken > 0 && taken == before
		})
		if _, err := io.CopyN(io.Discard, s.in, int64(count*size)); err != nil {
			t.Fatalf("%s: %v", mode, err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		s.readAt(0, 512)
	}
}

// TestServerBoundsTheHeadersOfUnreadReplies: reads of holes take little room on
// the wire and much in headers.
func TestServerBoundsTheHeadersOfUnreadReplies(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{BytesMax: 1 << 20}}, &Export{Device: memory(t, 64<<20)})
	for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
		s := rig.openSession(mode, "")
		s.deadline(2 * rawTimeout)
		s.fill(rig)
		for range 10 {
			s.queue(0, CommandRead, 32<<20, 32<<20, nil) // in small pieces, since the client's share is used up
			s.queue(0, CommandFlush, 0, 0, nil)
		}
		before := rig.server.Stats().Totals.Requests[datapath.OpRead]
		s.push()
		eventually(t, "requests are taken", func() bool { return rig.server.Stats().Totals.Requests[datapath.OpRead] > before })
		s.waitAll()
		s.disconnect()
	}
}

// TestServerWatchesAClientThatWaitedForBuffers: the time it waited for others
// does not excuse it afterwards.
func TestServerWatchesAClientThatWaitedForBuffers(t *testing.T) {
	f := faulty(t, 64<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Offset: 32 << 20, Length: 1 << 20, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{buffers: 4 << 20, config: ServerConfig{StallTimeout: 500 * time.Millisecond}}, &Export{Device: f})
	holder := rig.openSession(HeadersStructured, "")
	holder.fill(rig)
	for range 8 {
		holder.queue(0, CommandRead, 0, 1<<20, nil)
	}
	holder.push()
	eventually(t, "the buffers are used up", func() bool { return rig.arenaUsed() == 4<<20 })
	s := rig.openSession(HeadersStructured, "")
	s.queue(0, CommandRead, 32<<20, 1<<20, nil) // takes the reserve, and hangs
	s.out = append(s.out, appendRequest(nil, false, 0, CommandWrite, 7, 0, 1<<20)...)
	s.out = append(s.out, make([]byte, 1<<19)...)           // half of the payload
	go func(out []byte) { _, _ = s.conn.Write(out) }(s.out) // ends with the connection
	eventually(t, "the read hangs", func() bool { return f.Hanging() == 1 })
	holder.waitAll()
	s.expectClosed()
	f.Release()
	rig.connections(1)
}

// TestServerServesOthersWhileOneHoldsAllBuffers: each connection has a reserve.
func TestServerServesOthersWhileOneHoldsAllBuffers(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		f := faulty(t, 64<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead, datapath.OpWrite}, Length: 32 << 20, Action: filter.FaultHang})
		rig := startServer(t, serverSetup{engine: engine, buffers: 8 << 20}, &Export{Device: f})
		attacker := rig.openSession(HeadersStructured, "")
		for range 30 {
			attacker.queue(0, CommandRead, 0, 1<<20, nil)
		}
		attacker.push()
		eventually(t, "the buffers are used up", func() bool { return rig.arenaUsed() == 8<<20 })
		data := randomData(12, 3<<20)
		for _, mode := range []Headers{HeadersStructured, HeadersExtended} {
			s := rig.openSession(mode, "")
			for _, length := range []int{1, 512, 4096, 32 << 10, 64 << 10, 3 << 20} {
				s.write(40<<20, data[:length])
				if got := s.readAt(40<<20, uint64(length)); !bytes.Equal(got, data[:length]) {
					t.Errorf("%s: %d bytes differ", mode, length)
				}
			}
			s.disconnect()
		}
		s := rig.openSession(HeadersSimple, "") // one piece each, so up to the reserve
		s.write(40<<20, data)
		if got := s.readAt(40<<20, reserveSize); !bytes.Equal(got, data[:reserveSize]) {
			t.Error("data differ")
		}
		big := s.queue(0, CommandRead, 40<<20, 2<<20, nil)
		s.push()
		if err := f.SetRules(nil); err != nil {
			t.Fatal(err)
		}
		f.Release()
		attacker.waitAll()
		if s.wait(big); !bytes.Equal(big.data, data[:2<<20]) {
			t.Error("data differ")
		}
		if used := rig.arenaUsed(); used != 0 {
			t.Errorf("%d bytes of buffers in use", used)
		}
	})
}

// TestServerHoldsAConnectionToItsShare of the buffers.
func TestServerHoldsAConnectionToItsShare(t *testing.T) {
	const share = 3 << 20
	f := faulty(t, 64<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead, datapath.OpWrite}, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{config: ServerConfig{BytesMax: share}}, &Export{Device: f})
	for _, command := range []Command{CommandRead, CommandWrite} {
		s := rig.openSession(HeadersExtended, "")
		var payload []byte
		if command == CommandWrite {
			payload = make([]byte, 1<<20)
		}
		var out []byte
		for range 12 {
			s.queue(0, command, 0, 1<<20, payload)
		}
		out, s.out = s.out, nil
		sent := make(chan struct{})
		go func() { // ends when all is taken
			defer close(sent)
			_, _ = s.conn.Write(out) // a failure shows in the replies
		}()
		eventually(t, "the share is used up", func() bool { return f.Hanging() == 4 }) // the last in the reserve
		if used := rig.arenaUsed(); used != share {
			t.Errorf("command %d: %d bytes of buffers in use, the share is %d", command, used, share)
		}
		for len(s.pending) > 0 {
			f.Release()
			if s.in.Buffered() == 0 {
				_ = s.conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond)) // look again for requests that hang
				_, err := s.in.Peek(1)
				s.deadline(rawTimeout)
				if err != nil {
					continue
				}
			}
			s.next()
		}
		<-sent
		s.disconnect()
	}
}

func TestServerServesMoreRequestsThanItsDepth(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{Depth: 2}}, &Export{Device: memory(t, 4<<20)})
	onModes(t, func(t *testing.T, mode Headers) {
		var contexts []string
		if mode != HeadersSimple {
			contexts = []string{ContextAllocation}
		}
		s := rig.openSession(mode, "", contexts...)
		s.t = t
		for i := range 300 {
			s.queue(0, CommandWrite, uint64(i)*100, 100, make([]byte, 100))
			s.queue(0, CommandRead, uint64(i)*100, 100, nil)
			s.queue(0, CommandFlush, 0, 0, nil)
			s.queue(0, CommandRead, math32, 1, nil) // refused
			if contexts != nil {
				s.queue(0, CommandBlockStatus, 0, 512, nil)
			}
		}
		s.queue(0, CommandRead, 0, 4<<20, nil)
		s.push()
		s.waitAll()
	})
}

const math32 = 1<<32 - 1

// TestServerSharesMemoryForLargeSimpleReads: they need one run of memory each,
// of which there is a bound; all are served in the end.
func TestServerSharesMemoryForLargeSimpleReads(t *testing.T) {
	rig := startServer(t, serverSetup{reactors: 2}, &Export{Device: memory(t, 8<<20)})
	var group sync.WaitGroup
	for range hugeMax + 4 {
		s := rig.openSession(HeadersSimple, "")
		s.deadline(3 * rawTimeout)
		for range 2 {
			s.queue(0, CommandRead, 0, wholeMax+1, nil)
		}
		s.push()
		group.Go(func() { // ends with the replies
			s.waitAll()
			s.disconnect()
		})
	}
	group.Wait()
	rig.connections(0)
	if n := rig.server.huge.Load(); n != 0 {
		t.Errorf("%d of the bound are in use", n)
	}
}

func TestServerServesAmongManyIdleClients(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	for i := range 150 {
		r := newRawConn(t, rig.connect())
		switch i % 3 {
		case 1:
			r.greet(clientFixedNewstyle)
			r.send(appendOption(nil, optGo, rawInfo(""))[:i%10])
		case 2:
			r.greet(clientFixedNewstyle)
			newSession(r, HeadersSimple, "")
		}
	}
	s := rig.openSession(HeadersStructured, "")
	var worst time.Duration
	for range 500 {
		start := time.Now()
		s.readAt(0, 4096)
		worst = max(worst, time.Since(start))
	}
	if worst > time.Second {
		t.Errorf("a read took %v", worst)
	}
	if n := rig.server.Stats().Negotiating; n < 100 {
		t.Errorf("%d negotiate", n)
	}
}

// TestServerWaitsForDescriptors: without any left, who is connected goes on, and
// who waits is taken when there are some.
func TestServerWaitsForDescriptors(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 1<<20)})
	s := rig.openSession(HeadersSimple, "")
	s.write(0, []byte("served")) // a reactor has it, with a descriptor of its own
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	client := os.NewFile(uintptr(fd), "client")
	defer func() { _ = client.Close() }() // done with
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = 512
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Skipf("needs a limit of open files that can be lowered (%v)", err)
	}
	var held []int
	restore := func() {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) // back to what it was
		for _, fd := range held {
			_ = unix.Close(fd) // opened to use them up
		}
		held = nil
	}
	defer restore()
	for {
		extra, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			break
		}
		held = append(held, extra)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: rig.address}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "accepting fails", func() bool { return strings.Contains(rig.log.String(), "accepting a connection failed") })
	s.write(0, []byte("still served"))
	restore()
	b := make([]byte, sizeGreeting)
	if n, err := client.Read(b); err != nil || n != len(b) || binary.BigEndian.Uint64(b) != magicInit {
		t.Errorf("%d bytes % x, %v", n, b, err)
	}
}

// TestServerCarriesAnyConnection: one without a descriptor goes over a socket
// pair, as in TLS.
func TestServerCarriesAnyConnection(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 4<<20)})
	client, server := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- rig.server.ServeConn(server) }() // ends with the connection
	r := newRawConn(t, client)
	r.greet(clientFixedNewstyle)
	s := newSession(r, HeadersStructured, "")
	data := randomData(13, 2<<20)
	s.write(5, data)
	if !bytes.Equal(s.readAt(5, 2<<20), data) {
		t.Error("data differ")
	}
	s.disconnect()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestServerCountsWhatItDoes(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Device: memory(t, 4<<20)})
	s := rig.openSession(HeadersStructured, "", ContextAllocation)
	s.write(0, make([]byte, 3<<20))
	s.readAt(0, 2<<20)
	s.ask(0, CommandFlush, 0, 0, nil)
	s.ask(0, CommandRead, 4<<20, 1, nil)
	s.ask(0, CommandBlockStatus, 0, 1, nil)
	check := func(when string) {
		t.Helper()
		st := rig.server.Stats()
		want := [datapath.OpCount]uint64{datapath.OpRead: 1, datapath.OpWrite: 1, datapath.OpFlush: 1, datapath.OpExtents: 1}
		if st.Totals.Requests != want || st.Totals.BytesRead != 2<<20 || st.Totals.BytesWritten != 3<<20 || st.Totals.Errors != 1 || st.Totals.InFlight != 0 || st.Accepted != 1 {
			t.Errorf("%s: %+v", when, st)
		}
	}
	check("during the connection")
	s.disconnect()
	rig.connections(0)
	check("after it")
}

func TestServeReportsABrokenListener(t *testing.T) {
	rig := startServer(t, serverSetup{})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := rig.server.Serve(l); err == nil || err == ErrServerClosed {
		t.Errorf("%v", err)
	}
}
