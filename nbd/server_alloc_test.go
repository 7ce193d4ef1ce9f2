package nbd

import (
	"io"
	"runtime"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// TestServerAllocatesNothingPerRequest counts what the whole process allocates
// while a client that allocates nothing itself sends batches of requests.
func TestServerAllocatesNothingPerRequest(t *testing.T) {
	if serverRace {
		t.Skip("the race detector allocates; the tests without it do not skip this")
	}
	const batch, length = 64, 4096
	requests := 200_000
	if testing.Short() {
		requests = 20_000
	}
	onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
		for _, c := range []struct {
			name    string
			mode    Headers
			command Command
			reply   int // bytes of one
			slow    bool
		}{
			{"simple reads", HeadersSimple, CommandRead, sizeSimpleReply + length, false},
			{"structured reads", HeadersStructured, CommandRead, sizeStructuredReply + 8 + length, false},
			{"extended reads", HeadersExtended, CommandRead, sizeExtendedReply + 8 + length, false},
			{"simple writes", HeadersSimple, CommandWrite, sizeSimpleReply, false},
			{"extended writes", HeadersExtended, CommandWrite, sizeExtendedReply, false},
			{"flushes", HeadersStructured, CommandFlush, sizeSimpleReply, false},
			{"refused reads", HeadersExtended, CommandRead, sizeExtendedReply + 6, false},
			{"status", HeadersExtended, CommandBlockStatus, sizeExtendedReply + 8 + 16, false},
			{"delayed reads", HeadersStructured, CommandRead, sizeStructuredReply + 8 + length, true},
		} {
			t.Run(c.name, func(t *testing.T) {
				var d datapath.Device = nulldev.New(1 << 30)
				requests := requests
				if c.slow {
					d = filter.NewDelay(d, filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{datapath.OpRead: {Jitter: 100e3}}})
					requests /= 10
				}
				rig := startServer(t, serverSetup{engine: engine, bare: true}, &Export{Device: d})
				var contexts []string
				if c.command == CommandBlockStatus {
					contexts = []string{ContextAllocation}
				}
				s := rig.openSession(c.mode, "", contexts...)
				s.deadline(6 * rawTimeout)
				var payload []byte
				size, offset := uint64(length), uint64(0)
				switch {
				case c.command == CommandFlush:
					size = 0
				case c.command == CommandWrite:
					payload = make([]byte, length)
				case c.name == "refused reads":
					offset = 1 << 40
				}
				for range batch {
					s.queue(0, c.command, offset, size, payload)
				}
				out, in := s.out, make([]byte, batch*c.reply)
				round := func(n int) {
					for range n {
						if _, err := s.conn.Write(out); err != nil {
							t.Fatal(err)
						}
						if _, err := io.ReadFull(s.conn, in); err != nil {
							t.Fatal(err)
						}
					}
				}
				round(200) // grows what grows once
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				round(requests / batch)
				runtime.ReadMemStats(&after)
				per := float64(after.Mallocs-before.Mallocs) / float64(requests)
				t.Logf("%.5f allocations a request", per)
				if per >= 0.01 {
					t.Errorf("%.4f allocations a request", per)
				}
			})
		}
	})
}
