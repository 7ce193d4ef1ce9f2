package nbd

import "github.com/ashlar-storage/ashlar/datapath"

// ExportCounters add up what connections did.
type ExportCounters struct {
	Requests     [datapath.OpCount]uint64 // by operation
	BytesRead    uint64
	BytesWritten uint64
	Errors       uint64 // replies with an error
	InFlight     int64  // requests begun and not answered
}

func (e *ExportCounters) add(c *conn) {
	for i := range e.Requests {
		e.Requests[i] += c.counters.requests[i].Load()
	}
	e.BytesRead += c.counters.read.Load()
	e.BytesWritten += c.counters.written.Load()
	e.Errors += c.counters.errors.Load()
}

// ServerStats is what a server has done since it was made.
type ServerStats struct {
	Accepted         uint64 // connections taken
	Refused          uint64 // connections turned away: too many
	HandshakesFailed uint64
	Connections      int // in transmission now
	Negotiating      int // in handshake now
	Totals           ExportCounters
}

// Stats is a snapshot. Any goroutine.
func (s *Server) Stats() ServerStats {
	st := ServerStats{Accepted: s.accepted.Load(), Refused: s.refused.Load(), HandshakesFailed: s.handshakes.Load()}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Connections, st.Negotiating = len(s.conns), len(s.pending)
	st.Totals = s.past
	for c := range s.conns {
		st.Totals.add(c)
		st.Totals.InFlight += c.counters.inFlight.Load()
	}
	return st
}
