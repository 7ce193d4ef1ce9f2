package nbd

import (
	"io"
	"runtime"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// sumOfStages is what the stages of an operation took together.
func sumOfStages(o *filter.OpStats) (sum time.Duration) {
	for _, h := range o.Stages {
		if h != nil {
			sum += h.Sum
		}
	}
	return sum
}

// checkTimed wants every request that a device completed timed exactly once, in
// stages that make up the whole. Its connections have ended.
func checkTimed(t testing.TB, d *filter.Stats) {
	t.Helper()
	s := d.Snapshot()
	for op := range datapath.OpCount {
		if o := s.Op(op); o.Latency.Count != o.Count || sumOfStages(o) != o.Latency.Sum {
			t.Errorf("%d of %d %s requests timed; %v, in stages %v", o.Latency.Count, o.Count, op, o.Latency.Sum, sumOfStages(o))
		}
	}
}

// stage is the sum of a stage of an operation, once at least count requests have been
// timed, and none is under way.
func stage(t *testing.T, d *filter.Stats, op datapath.Op, count uint64, s datapath.Stage) (sum time.Duration, entered uint64) {
	t.Helper()
	var o *filter.OpStats
	eventually(t, "the requests are timed", func() bool {
		o = d.Snapshot().Op(op)
		return o.Latency.Count >= count && o.Latency.Count == o.Count && o.InFlight == 0
	})
	if h := o.Stages[s]; h != nil {
		return h.Sum, h.Count
	}
	return 0, 0
}

const timingPause = 30 * time.Millisecond

func TestASlowPayloadIsReceiving(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := filter.NewStats(memory(t, 4<<20), filter.StatsConfig{})
		rig := startServer(t, serverSetup{engine: engine, bare: true}, &Export{Device: d})
		s := rig.openSession(HeadersStructured, "")
		a := s.queue(0, CommandWrite, 0, 2<<20, make([]byte, 2<<20))
		s.send(s.out[:1000])
		eventually(t, "the header arrives", func() bool { return rig.server.Stats().Totals.Requests[datapath.OpWrite] == 1 })
		time.Sleep(timingPause)
		s.send(s.out[1000:])
		s.out = s.out[:0]
		s.wait(a)
		// Two pieces, each of which began with the request.
		if sum, n := stage(t, d, datapath.OpWrite, 2, datapath.StageReceive); n != 2 || sum < 2*timingPause {
			t.Errorf("%d pieces were received in %v together", n, sum)
		}
		if sum, _ := stage(t, d, datapath.OpWrite, 2, datapath.StageDevice); sum >= timingPause {
			t.Errorf("the device took %v", sum)
		}
		checkTimed(t, d)
	})
}

func TestASlowDeviceIsTheDevice(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		slow := filter.NewDelay(memory(t, 4<<20), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{
			datapath.OpRead: {Fixed: timingPause}, datapath.OpWrite: {Fixed: timingPause}, datapath.OpExtents: {Fixed: timingPause},
		}})
		d := filter.NewStats(slow, filter.StatsConfig{})
		rig := startServer(t, serverSetup{engine: engine, bare: true}, &Export{Device: d})
		for i, mode := range sessionModes {
			var contexts []string
			if mode != HeadersSimple {
				contexts = []string{ContextAllocation}
			}
			s := rig.openSession(mode, "", contexts...)
			s.write(0, make([]byte, 4096))
			s.readAt(0, 8192)
			if len(contexts) > 0 {
				s.ask(0, CommandBlockStatus, 0, 1<<20, nil)
			}
			count := uint64(i + 1)
			for _, op := range []datapath.Op{datapath.OpRead, datapath.OpWrite} {
				if sum, n := stage(t, d, op, count, datapath.StageDevice); n != count || sum < time.Duration(count)*timingPause {
					t.Errorf("%d %s requests were at the device for %v", n, op, sum)
				}
				if _, n := stage(t, d, op, count, datapath.StageReply); n != count {
					t.Errorf("%d of %d %s requests came to their reply", n, count, op)
				}
			}
		}
		checkTimed(t, d)
	})
}

func TestAClientThatDoesNotReadIsTheReply(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := filter.NewStats(nulldev.New(1<<30), filter.StatsConfig{})
		rig := startServer(t, serverSetup{engine: engine, bare: true}, &Export{Device: d})
		s := rig.openSession(HeadersStructured, "")
		const count = 32 // of a megabyte: more than sockets hold
		for i := range uint64(count) {
			s.queue(0, CommandRead, i<<20, 1<<20, nil)
		}
		s.push()
		time.Sleep(4 * timingPause)
		s.waitAll()
		sum, n := stage(t, d, datapath.OpRead, count, datapath.StageReply)
		if n < count || sum < timingPause { // for want of buffers some are cut
			t.Errorf("%d replies took %v", n, sum)
		}
		checkTimed(t, d)
	})
}

func TestWaitingForRoomIsTheQueue(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		for _, c := range []struct {
			name    string
			config  ServerConfig
			command Command
			length  uint64
		}{
			{"reads, too many", ServerConfig{Depth: 1}, CommandRead, 4096},
			{"reads, too long", ServerConfig{BytesMax: 64 << 10}, CommandRead, 64 << 10},
			{"writes, too many", ServerConfig{Depth: 1}, CommandWrite, 4096},
			{"writes, too long", ServerConfig{BytesMax: 64 << 10}, CommandWrite, 64 << 10},
		} {
			t.Run(c.name, func(t *testing.T) {
				slow := filter.NewDelay(memory(t, 4<<20), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{
					datapath.OpRead: {Fixed: timingPause}, datapath.OpWrite: {Fixed: timingPause},
				}})
				d := filter.NewStats(slow, filter.StatsConfig{})
				rig := startServer(t, serverSetup{engine: engine, bare: true, config: c.config}, &Export{Device: d})
				s := rig.openSession(HeadersStructured, "")
				for i := range uint64(4) {
					var payload []byte
					if c.command == CommandWrite {
						payload = make([]byte, c.length)
					}
					s.queue(0, c.command, i*c.length, c.length, payload)
				}
				s.push()
				s.waitAll()
				op := commandOps[c.command]
				// With buffers for one, the small reserve lets pieces of others pass.
				if sum, n := stage(t, d, op, 4, datapath.StageQueue); sum < timingPause {
					t.Errorf("%d were in the queue for %v", n, sum)
				}
				checkTimed(t, d)
			})
		}
	})
}

func TestRepliesThatDoNotGoOutAreTimedToTheEnd(t *testing.T) {
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		f := faulty(t, 8<<20, filter.FaultRule{Action: filter.FaultHang, Count: 4})
		d := filter.NewStats(f, filter.StatsConfig{})
		rig := startServer(t, serverSetup{engine: engine, bare: true}, &Export{Device: d})
		s := rig.openSession(HeadersStructured, "")
		for range 4 {
			s.queue(0, CommandRead, 0, 4096, nil)
		}
		for range 2 * repliesMax {
			s.queue(0, CommandRead, 0, 64<<10, nil) // nobody reads the replies
		}
		s.push()
		eventually(t, "some hang", func() bool { return f.Hanging() == 4 })
		if err := s.conn.Close(); err != nil {
			t.Fatal(err)
		}
		f.Release()
		rig.connections(0)
		checkTimed(t, d)
	})
}

func TestServerAllocatesNothingForTiming(t *testing.T) {
	if serverRace {
		t.Skip("the race detector allocates; the tests without it do not skip this")
	}
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		d := filter.NewStats(nulldev.New(1<<30), filter.StatsConfig{Slow: filter.NewSlowRequests(time.Hour)})
		rig := startServer(t, serverSetup{engine: engine, bare: true}, &Export{Device: d})
		for _, c := range []struct {
			name    string
			command Command
			reply   int // bytes of one
		}{
			{"reads", CommandRead, sizeStructuredReply + 8 + 4096}, {"writes", CommandWrite, sizeSimpleReply},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := rig.openSession(HeadersStructured, "")
				s.t = t
				var payload []byte
				if c.command == CommandWrite {
					payload = make([]byte, 4096)
				}
				const batch = 64
				for range batch {
					s.queue(0, c.command, 0, 4096, payload)
				}
				if per := allocationsPerRound(t, s, batch*c.reply, 300) / batch; per >= 0.01 {
					t.Errorf("%.4f allocations a request", per)
				}
			})
		}
	})
}

// allocationsPerRound is what the process allocates while a session sends what it has
// queued, and reads as many bytes of replies.
func allocationsPerRound(t *testing.T, s *session, replies, rounds int) float64 {
	t.Helper()
	s.deadline(6 * rawTimeout)
	out, in := s.out, make([]byte, replies)
	run := func(n int) {
		for range n {
			if _, err := s.conn.Write(out); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s.conn, in); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(200) // grows what grows once
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	run(rounds)
	runtime.ReadMemStats(&after)
	return float64(after.Mallocs-before.Mallocs) / float64(rounds)
}
