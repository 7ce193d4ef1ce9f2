package nbd

import (
	"bytes"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// TestServerDropsOldChangesOfAClientThatLeft: what lay unread for so long that the
// client may have sent it again elsewhere is not begun when the client is gone.
func TestServerDropsOldChangesOfAClientThatLeft(t *testing.T) {
	for name, waiting := range map[string]func(*session){
		"a write unread":    func(s *session) { s.queue(0, CommandWrite, 8192, 4096, randomData(2, 4096)) },
		"a write half read": func(s *session) { s.queue(0, CommandWrite, 8192, 1<<20, randomData(2, 1<<20)) },
		"a trim":            func(s *session) { s.queue(0, CommandTrim, 8192, 4096, nil) },
		"zeros behind a read": func(s *session) {
			s.queue(0, CommandRead, 0, 512, nil)
			s.queue(0, CommandWriteZeroes, 8192, 4096, nil)
		},
		"nothing": func(*session) {},
	} {
		t.Run(name, func(t *testing.T) {
			onEngines(t, func(t *testing.T, engine reactor.EngineKind) {
				f := faulty(t, 4<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpWrite}, Length: 4096, Action: filter.FaultHang})
				rig := startServer(t, serverSetup{engine: engine, reactors: 2, config: ServerConfig{Depth: 1}}, &Export{Device: f})
				before := bytes.Repeat([]byte{7}, 4096)
				other := rig.openSession(HeadersSimple, "")
				other.write(8192, before)
				s := rig.openSession(HeadersSimple, "")
				s.queue(0, CommandWrite, 0, 4096, make([]byte, 4096)) // hangs, and takes the only place
				waiting(s)
				out := s.out
				sent := make(chan struct{})
				go func() { defer close(sent); _, _ = s.conn.Write(out) }() // ends with the connection
				eventually(t, "the first write hangs", func() bool { return f.Hanging() == 1 })
				time.Sleep(resendAfter + 100*time.Millisecond)
				if err := s.conn.Close(); err != nil {
					t.Fatal(err)
				}
				<-sent
				f.Release()
				rig.connections(1)
				if got := other.readAt(8192, 4096); !bytes.Equal(got, before) {
					t.Error("a change was begun after its client had gone")
				}
				other.disconnect()
			})
		})
	}
}

// TestServerAnswersReadsOfAClientThatHasEndedItsStreamLongAgo: reads do no harm.
func TestServerAnswersReadsOfAClientThatHasEndedItsStreamLongAgo(t *testing.T) {
	f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpRead}, Length: 512, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{config: ServerConfig{Depth: 1}}, &Export{Device: f})
	s := rig.openSession(HeadersSimple, "")
	s.queue(0, CommandRead, 0, 512, nil)
	s.queue(0, CommandRead, 4096, 512, nil)
	s.push()
	s.closeWrite()
	eventually(t, "the first read hangs", func() bool { return f.Hanging() == 1 })
	time.Sleep(resendAfter + 100*time.Millisecond)
	f.Release()
	s.waitAll()
	s.expectClosed()
}

// TestServerBeginsOldChangesOfAClientThatStays: age alone is no reason.
func TestServerBeginsOldChangesOfAClientThatStays(t *testing.T) {
	f := faulty(t, 1<<20, filter.FaultRule{Ops: []datapath.Op{datapath.OpWrite}, Length: 4096, Action: filter.FaultHang})
	rig := startServer(t, serverSetup{config: ServerConfig{Depth: 1}}, &Export{Device: f})
	s := rig.openSession(HeadersSimple, "")
	data := randomData(3, 4096)
	s.queue(0, CommandWrite, 0, 4096, data)
	s.queue(0, CommandWrite, 8192, 4096, data)
	s.push()
	eventually(t, "the first write hangs", func() bool { return f.Hanging() == 1 })
	time.Sleep(resendAfter + 100*time.Millisecond)
	f.Release()
	s.waitAll()
	if got := s.readAt(8192, 4096); !bytes.Equal(got, data) {
		t.Error("the second write is missing")
	}
	s.disconnect()
}
