package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func FuzzParseRequest(f *testing.F) {
	for _, extended := range []bool{false, true} {
		f.Add(appendRequest(nil, extended, CommandFlagFUA, CommandWrite, 1, 4096, 512), extended)
		f.Add(appendRequest(nil, extended, 0xffff, 0xffff, math.MaxUint64, math.MaxUint64, math.MaxUint64), extended)
		f.Add(appendRequest(nil, !extended, 0, CommandRead, 0, 0, 0), extended)
	}
	f.Fuzz(func(t *testing.T, b []byte, extended bool) {
		size := sizeRequest
		if extended {
			size = sizeRequestExtended
		}
		if len(b) < size {
			return
		}
		q, ok := parseRequest(b, extended)
		again := appendRequest(nil, extended, q.flags, q.command, q.cookie, q.offset, q.length)
		if ok != bytes.Equal(again[:4], b[:4]) || !bytes.Equal(again[4:], b[4:size]) {
			t.Errorf("% x becomes %+v, %v", b[:size], q, ok)
		}
	})
}

func FuzzParseInfo(f *testing.F) {
	f.Add(rawInfo(""))
	f.Add(rawInfo("name", infoBlockSize, infoName, infoBlockSize))
	f.Add(rawInfo("na\x00me"))
	f.Add(append(rawInfo("name", 1), 1))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		name, wanted, ok := parseInfo(b)
		if !ok {
			return
		}
		if err := ValidateName(name); err != nil {
			t.Error(err)
		}
		rest := b[4+len(name):]
		if int(binary.BigEndian.Uint16(rest))*2 != len(rest)-2 {
			t.Errorf("the lengths of % x do not agree", b)
		}
		if len(wanted) > len(rest)-2 || len(wanted)%2 != 0 {
			t.Errorf("% x wants % x", b, wanted)
		}
		for i := 0; i < len(wanted); i += 2 {
			for j := 0; j < i; j += 2 {
				if bytes.Equal(wanted[i:i+2], wanted[j:j+2]) {
					t.Errorf("% x is wanted twice", wanted[i:i+2])
				}
			}
		}
	})
}

func FuzzParseContexts(f *testing.F) {
	f.Add(rawContexts(""))
	f.Add(rawContexts("name", ContextAllocation, "qemu:", ""))
	f.Add(rawContexts("name", make([]string, 9)...))
	f.Add(append(rawContexts("name", "base:"), 0))
	f.Add([]byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		name, queries, ok := parseContexts(b)
		if !ok {
			return
		}
		for _, s := range append(queries, name) {
			if err := ValidateName(s); err != nil {
				t.Error(err)
			}
		}
		if len(queries) > queriesMax+1 {
			t.Errorf("%d queries are kept", len(queries))
		}
		if len(queries) <= queriesMax && !bytes.Equal(rawContexts(name, queries...), b) {
			t.Errorf("% x becomes %q %q", b, name, queries)
		}
	})
}

// seedTalks are conversations for the fuzzers to begin with.
func seedTalks() (talks [][]byte) {
	hello := binary.BigEndian.AppendUint32(nil, clientFixedNewstyle|clientNoZeroes)
	add := func(parts ...[]byte) { talks = append(talks, slices.Concat(append([][]byte{hello}, parts...)...)) }
	opt := func(o option, data []byte) []byte { return appendOption(nil, o, data) }
	add()
	add(opt(optExportName, []byte("open")))
	add(opt(optAbort, nil))
	add(opt(optList, nil), opt(optPeekExport, []byte("x")), opt(99, make([]byte, 300)), opt(optGo, rawInfo("open", infoBlockSize)))
	add(opt(optStructuredReply, nil), opt(optSetMetaContext, rawContexts("open", ContextAllocation)), opt(optListMetaContext, rawContexts("open")), opt(optInfo, rawInfo("open")), opt(optGo, rawInfo("open")))
	add(opt(optExtendedHeaders, nil), opt(optExtendedHeaders, nil), opt(optStructuredReply, nil), opt(optGo, rawInfo("secret")), opt(optExportName, []byte("open")))
	add(opt(optStartTLS, nil), opt(optStructuredReply, nil), opt(optGo, rawInfo("open")))
	add(opt(optGo, rawInfo("open"))[:20])
	add(opt(optGo, nil), opt(optGo, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}), opt(optSetMetaContext, []byte("x")))
	talks = append(talks, unmeasuredGo("closed", "open"), unmeasuredGo("open")[:30], append(unmeasuredGo("open")[:28], 0xff, 0xff))
	talks = append(talks, []byte{0, 0, 0, 0}, []byte{0xff, 0xff, 0xff, 0xff}, []byte{0, 0})
	return talks
}

// fuzzExports are what the handshake is fuzzed with.
func fuzzExports(f *testing.F) *ExportSet {
	set := &ExportSet{}
	for _, e := range []*Export{
		{Name: "open", Device: memory(f, 1<<20), Description: "words"},
		{Name: "secret", Device: memory(f, 1<<20), TLSOnly: true, ClientNames: []string{"host"}},
	} {
		if err := set.Add(e); err != nil {
			f.Fatal(err)
		}
	}
	return set
}

// FuzzServerHandshake has the server negotiate with any bytes. It must come to an
// end, answer in whole messages, and hold little memory.
func FuzzServerHandshake(f *testing.F) {
	p := newServerPKI(f)
	exports, tlsConfig := fuzzExports(f), p.serverConfig(false)
	for i, talk := range seedTalks() {
		f.Add(talk, uint8(i))
		f.Add(talk, uint8(i+1))
	}
	modes := []TLSMode{TLSOff, TLSSelective, TLSForced}
	f.Fuzz(func(t *testing.T, talk []byte, mode uint8) {
		client, server := net.Pipe()
		deadline := time.Now().Add(serverWait)
		if err := errors.Join(client.SetDeadline(deadline), server.SetDeadline(deadline)); err != nil {
			t.Fatal(err)
		}
		go func() { // ends with the connection
			_, _ = client.Write(talk) // the server may close first
			time.AfterFunc(0, func() { _ = client.Close() })
		}()
		heard := make(chan []byte, 1)
		go func() { // likewise
			b, _ := io.ReadAll(client) // whatever came until the end
			heard <- b
		}()
		h := &handshake{conn: server, config: handshakeConfig{
			exports: exports, tlsMode: modes[int(mode)%len(modes)], tlsConfig: tlsConfig, listing: mode&64 == 0, closing: func() bool { return mode&128 != 0 },
		}}
		n, err := h.run()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("the handshake does not end")
		}
		_ = server.Close() // the end
		if (n == nil) == (err == nil) {
			t.Errorf("result %v, error %v", n, err)
		}
		if cap(h.data) > contextDataMax || h.out.Cap() > 4*listBytesMax {
			t.Errorf("%d bytes kept for options, %d for replies", cap(h.data), h.out.Cap())
		}
		if n != nil {
			if n.export == nil || n.export.TLSOnly && h.config.tlsMode != TLSOff || len(n.contexts) > 0 && !n.structured || n.extended && !n.structured || h.config.tlsMode == TLSForced {
				t.Errorf("%+v", n)
			}
		}
		checkOptionReplies(t, <-heard, n != nil)
	})
}

// checkOptionReplies checks that all the server said are whole messages, unless
// TLS took over. The client may have left before the last of them.
func checkOptionReplies(t *testing.T, b []byte, entered bool) {
	t.Helper()
	if len(b) == 0 {
		return
	}
	if len(b) < sizeGreeting || binary.BigEndian.Uint64(b) != magicInit {
		t.Fatalf("greeting % x", b)
	}
	for b = b[sizeGreeting:]; len(b) >= sizeOptionReplyHeader; {
		if binary.BigEndian.Uint64(b) != magicOptionReply {
			break
		}
		opt, kind := option(binary.BigEndian.Uint32(b[8:])), optionReply(binary.BigEndian.Uint32(b[12:]))
		length := int(binary.BigEndian.Uint32(b[16:]))
		b = b[sizeOptionReplyHeader:]
		if kind&repError != 0 && length > stringMax {
			t.Fatalf("message of %d bytes", length)
		}
		if opt == optStartTLS && kind == repAck {
			return // what follows is TLS
		}
		if len(b) < length {
			return // the client left
		}
		b = b[length:]
	}
	if len(b) != 0 && len(b) != 10 && len(b) != 10+124 && entered {
		t.Fatalf("left behind: % x", b)
	}
}

// script makes a conversation of bytes: options in odd orders, then requests,
// both now and then malformed.
type script struct {
	in       []byte
	out      []byte
	extended bool
}

func (s *script) next() byte {
	if len(s.in) == 0 {
		return 0
	}
	b := s.in[0]
	s.in = s.in[1:]
	return b
}

// raw takes up to n bytes as they are.
func (s *script) raw(n int) []byte {
	n = max(min(n, len(s.in)), 0)
	b := s.in[:n]
	s.in = s.in[n:]
	return b
}

func (s *script) option(o option, data []byte) { s.out = appendOption(s.out, o, data) }

// talk is the whole conversation of one client.
func (s *script) talk() []byte {
	flags := uint32(clientFixedNewstyle | clientNoZeroes)
	if b := s.next(); b >= 0xf0 {
		flags = uint32(b)
	}
	s.out = binary.BigEndian.AppendUint32(s.out, flags)
	for range 24 {
		if s.options() {
			break
		}
	}
	for range 48 {
		if len(s.in) == 0 {
			break
		}
		s.request()
	}
	return s.out
}

// options adds an option and reports whether it enters transmission.
func (s *script) options() (entered bool) {
	names := []string{"open", "slow", "secret", "third", ""}
	name := names[int(s.next())%len(names)]
	switch s.next() % 16 {
	case 0:
		s.option(optStructuredReply, nil)
	case 1:
		s.option(optExtendedHeaders, nil)
		s.extended = true
	case 2, 3:
		s.option(optSetMetaContext, rawContexts(name, ContextAllocation, string(s.raw(3))))
	case 4:
		s.option(optListMetaContext, rawContexts(name))
	case 5:
		s.option(optInfo, rawInfo(name, uint16(s.next()), infoBlockSize))
	case 6:
		s.option(optList, s.raw(int(s.next()%2)))
	case 7:
		s.option(option(s.next()), s.raw(int(s.next())))
	case 8:
		s.option(optStartTLS, nil)
		s.out = append(s.out, s.raw(int(s.next()))...)
	case 9:
		s.out = append(s.out, s.raw(int(s.next()))...)
	case 10:
		s.option(optGo, s.raw(int(s.next())))
	case 11:
		s.option(optSetMetaContext, s.raw(int(s.next())))
	case 12:
		s.option(optAbort, nil)
	case 13:
		s.option(optExportName, []byte(name))
		return true
	default:
		s.option(optGo, rawInfo(name))
		return true
	}
	return false
}

func (s *script) request() {
	lengths := []uint64{0, 1, 511, 512, 4096, 32<<10 + 1, 65536, 100_000, 1<<20 + 1, math.MaxUint32, 1 << 33, math.MaxUint64}
	offsets := []uint64{0, 1, 512, 1 << 20, 2<<20 + 7, 4<<20 - 512, 4 << 20, math.MaxUint64 - 511, math.MaxUint64}
	command, flags := Command(s.next()%10), CommandFlags(0)
	if b := s.next(); b < 0x80 {
		flags = CommandFlags(b)
	}
	offset, length := offsets[int(s.next())%len(offsets)], lengths[int(s.next())%len(lengths)]
	how := s.next()
	payload := command == CommandWrite || s.extended && flags&CommandFlagPayloadLen != 0
	if payload && length > 2<<20 && how < 0xf0 {
		length = 512
	}
	s.out = appendRequest(s.out, s.extended, flags, command, uint64(how), offset, length)
	switch {
	case how == 0xff:
		s.out = append(s.out, s.raw(9)...) // out of step
	case payload && command == CommandBlockStatus:
		b := binary.BigEndian.AppendUint64(nil, length)
		b = append(b, s.raw(int(length)-8)...)
		s.out = append(s.out, b[:min(length, uint64(len(b)))]...)
		if n := int(length) - len(b); n > 0 && length <= 2<<20 {
			s.out = append(s.out, make([]byte, n)...)
		}
	case payload && length <= 2<<20:
		s.out = append(s.out, make([]byte, length)...)
	}
}

// FuzzServerConversation has a running server talk to clients that follow a
// script, cut off anywhere. Each connection must end soon after its client has
// nothing more to say, everything must be given back, and others are served.
func FuzzServerConversation(f *testing.F) {
	p := newServerPKI(f)
	delay := filter.NewDelay(memory(f, 4<<20), filter.DelayConfig{Latency: map[datapath.Op]filter.Latency{
		datapath.OpRead: {Jitter: 100 * time.Microsecond}, datapath.OpWrite: {Jitter: 100 * time.Microsecond}, datapath.OpExtents: {Jitter: 100 * time.Microsecond},
	}})
	rig := startServer(f, serverSetup{buffers: 8 << 20, config: ServerConfig{Depth: 6, BytesMax: 2 << 20, TLS: TLSSelective, TLSConfig: p.serverConfig(false)}},
		&Export{Name: "open", Device: memory(f, 4<<20)}, &Export{Name: "slow", Device: delay}, &Export{Name: "secret", Device: memory(f, 1<<20), TLSOnly: true},
	)
	other := rig.openSession(HeadersStructured, "open")
	_ = other.conn.SetDeadline(time.Time{}) // it lives as long as the fuzzer
	enter := func(extended, slow byte) []byte { return []byte{0, 0, extended, slow, 2, 'x', 'y', 'z', slow, 14} }
	for _, extended := range []byte{0, 1} {
		for _, slow := range []byte{0, 1} {
			for command := range byte(10) {
				b := append(enter(extended, slow), command, 0, 2, 4, 1, command, 0x20, 1, 3, 2)
				f.Add(b, uint16(0))
				f.Add(b, uint16(300))
			}
		}
	}
	f.Add([]byte{0, 0, 8, 20, 0x49, 0x48, 0x41, 0x56, 0x45, 0x4f, 0x50, 0x54}, uint16(0))
	f.Add([]byte{0, 4, 13, 7, 0, 2, 5, 0}, uint16(0))
	f.Fuzz(func(t *testing.T, in []byte, cut uint16) {
		out := (&script{in: in}).talk()
		if cut > 0 {
			out = out[:int(cut)%(len(out)+1)]
		}
		conn, err := net.Dial("unix", rig.address)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }() // done with
		if err := conn.SetDeadline(time.Now().Add(serverWait)); err != nil {
			t.Fatal(err)
		}
		go func() { // ends with the connection
			_, _ = conn.Write(out) // the server may close first
			_ = conn.(*net.UnixConn).CloseWrite()
		}()
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the connection does not end\n%s", rig.log)
		}
		eventually(t, "the connection is gone", func() bool { s := rig.server.Stats(); return s.Connections == 1 && s.Negotiating == 0 })
		var used int64
		if err := rig.reactors[0].Run(func(r *reactor.Reactor) { used = r.Buffers().Used() }); err != nil || used != 0 {
			t.Fatalf("%d bytes of buffers in use, %v", used, err)
		}
		other.t = t
		other.readAt(0, 4096)
		if rig.log.size() > 1<<20 {
			rig.log.reset()
		}
	})
}
