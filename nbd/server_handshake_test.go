package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

// twoExports are what most handshake tests serve.
func twoExports(t testing.TB) []*Export {
	return []*Export{
		{Name: "first", Description: "the first one", Device: memory(t, 1<<20)},
		{Name: "second", Device: memory(t, 2<<20), ReadOnly: true},
	}
}

func TestServerGreetsInFixedNewstyle(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := newRawConn(t, rig.connect())
	if flags := r.greet(clientFixedNewstyle); flags != handshakeFixedNewstyle|handshakeNoZeroes {
		t.Errorf("handshake flags %#x", flags)
	}
	r.mustOption(optAbort, nil)
	r.expectClosed()
}

// connect dials without a greeting.
func (rig *serverRig) connect() net.Conn {
	rig.t.Helper()
	conn, err := net.Dial("unix", rig.address)
	if err != nil {
		rig.t.Fatal(err)
	}
	return conn
}

func TestServerDropsUnknownClientFlags(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for _, flags := range []uint32{4, 1 << 31, clientFixedNewstyle | 8, 0xffffffff} {
		r := rawDial(t, "unix", rig.address, flags)
		r.expectClosed()
	}
	if n := rig.server.Stats().HandshakesFailed; n != 4 {
		t.Errorf("%d handshakes failed, want 4", n)
	}
}

func TestServerDropsBadOptionMagic(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for _, magic := range []uint64{0, magicInit, magicOption + 1, magicOptionReply} {
		r := rig.dial()
		b := binary.BigEndian.AppendUint64(nil, magic)
		r.send(append(b, make([]byte, 8)...))
		r.expectClosed()
	}
}

// TestServerOptionTable sends each option with good and bad data, each followed
// by one that must still parse.
func TestServerOptionTable(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	long := strings.Repeat("n", stringMax)
	u32 := func(n ...uint32) (b []byte) {
		for _, v := range n {
			b = binary.BigEndian.AppendUint32(b, v)
		}
		return b
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, c := range []struct {
		name string
		opt  option
		data []byte
		want optionReply
	}{
		{"unknown", 99, nil, repErrUnsupported},
		{"unknown with data", 0xffffffff, make([]byte, 70000), repErrUnsupported},
		{"zero", 0, []byte("x"), repErrUnsupported},
		{"peek export", optPeekExport, []byte("first"), repErrUnsupported},
		{"list", optList, nil, repAck},
		{"list with data", optList, []byte("x"), repErrInvalid},
		{"starttls without TLS", optStartTLS, nil, repErrPolicy},
		{"starttls with data", optStartTLS, []byte("x"), repErrInvalid},
		{"structured with data", optStructuredReply, []byte("x"), repErrInvalid},
		{"extended with data", optExtendedHeaders, make([]byte, 100), repErrInvalid},

		{"info", optInfo, rawInfo("first"), repAck},
		{"info of the default", optInfo, rawInfo(""), repAck},
		{"info with requests", optInfo, rawInfo("second", infoName, infoBlockSize, infoDescription, infoExport, 77, 0xffff), repAck},
		{"info with a request twice", optInfo, rawInfo("second", infoBlockSize, infoBlockSize), repAck},
		{"info of an unknown one", optInfo, rawInfo("third"), repErrUnknown},
		{"go to an unknown one", optGo, rawInfo("third"), repErrUnknown},
		{"go by a path", optGo, rawInfo("../first"), repErrUnknown},
		{"go to ..", optGo, rawInfo(".."), repErrUnknown},
		{"go in other letters", optGo, rawInfo("First"), repErrUnknown},
		{"go with a longest name", optGo, rawInfo(long), repErrUnknown},
		{"go with a name too long", optGo, rawInfo(long + "n"), repErrInvalid},
		{"go with a NUL", optGo, rawInfo("first\x00"), repErrInvalid},
		{"go with no UTF-8", optGo, rawInfo("\xff\xfe"), repErrInvalid},
		{"go without data", optGo, nil, repErrInvalid},
		{"go with 3 bytes", optGo, []byte{0, 0, 0}, repErrInvalid},
		{"go without a count", optGo, rawInfo("first")[:9], repErrInvalid},
		{"go with half a count", optGo, rawInfo("first")[:10], repErrInvalid},
		{"go with too few requests", optGo, append(rawInfo("first")[:9], 0, 2, 0, 3), repErrInvalid},
		{"go with too many requests", optGo, append(rawInfo("first"), 0, 3), repErrInvalid},
		{"go with a byte behind", optGo, append(rawInfo("first"), 0), repErrInvalid},
		{"go with a name past the end", optGo, join(u32(100), []byte("first\x00\x00")), repErrInvalid},
		{"go with a name of 4 GiB", optGo, join(u32(0xffffffff), []byte("first\x00\x00")), repErrInvalid},
		{"go with a name into the count", optGo, join(u32(7), []byte("first\x00\x00")), repErrInvalid},
		{"go with very much data", optGo, make([]byte, 1<<20), repErrTooBig},
		{"info with 65535 requests", optInfo, rawInfo("first", make([]uint16, 65535)...), repErrTooBig},

		{"list contexts", optListMetaContext, rawContexts("first"), repAck},
		{"list contexts of an unknown export", optListMetaContext, rawContexts("third"), repErrUnknown},
		{"list contexts without data", optListMetaContext, nil, repErrInvalid},
		{"list contexts without a count", optListMetaContext, rawContexts("first")[:9], repErrInvalid},
		{"list contexts with too few queries", optListMetaContext, join(rawContexts("first")[:9], u32(1)), repErrInvalid},
		{"list contexts with 2^32-1 queries", optListMetaContext, join(rawContexts("first")[:9], u32(0xffffffff)), repErrInvalid},
		{"list contexts with a query past the end", optListMetaContext, join(rawContexts("first")[:9], u32(1, 5), []byte("base")), repErrInvalid},
		{"list contexts with bytes behind", optListMetaContext, append(rawContexts("first", "base:"), 0), repErrInvalid},
		{"list contexts with a query too long", optListMetaContext, rawContexts("first", "base:"+long), repErrInvalid},
		{"list contexts with no UTF-8", optListMetaContext, rawContexts("first", "\xff"), repErrInvalid},
		{"list contexts with very much data", optListMetaContext, make([]byte, contextDataMax+1), repErrTooBig},
		{"list contexts with too many queries", optListMetaContext, rawContexts("first", make([]string, queriesMax+1)...), repErrTooBig},
		{"set contexts without structured replies", optSetMetaContext, rawContexts("first", ContextAllocation), repErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rawDial(t, "unix", rig.address, clientFixedNewstyle)
			replies := r.option(c.opt, c.data)
			last := replies[len(replies)-1]
			if last.kind != c.want {
				t.Fatalf("reply %#x %q, want %#x", uint32(last.kind), last.data, uint32(c.want))
			}
			if last.kind == repAck && len(last.data) != 0 {
				t.Errorf("ACK with %d bytes", len(last.data))
			}
			if last.kind&repError != 0 && len(last.data) > stringMax {
				t.Errorf("message of %d bytes", len(last.data))
			}
			// The next option parses, and GO needs no 124 zeroes even where the
			// client did not set NO_ZEROES.
			if size, _ := r.goExport("second"); size != 2<<20 {
				t.Errorf("size %d", size)
			}
			r.sendRequest(0, CommandRead, 1, 0, 1, nil)
			if errno, cookie := r.readSimpleReply(); errno != ErrnoOK || cookie != 1 {
				t.Errorf("read: %v, cookie %d", errno, cookie)
			}
		})
	}
}

func TestServerDropsOptionsTooLongToSkip(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for _, c := range []struct {
		opt    option
		length uint32
	}{
		{99, discardMax + 1}, {optGo, 0xffffffff}, {optList, 1 << 31}, {optExportName, stringMax + 1}, {optExportName, 0xffffffff}, {optSetMetaContext, 0xffffffff},
	} {
		r := rig.dial()
		b := binary.BigEndian.AppendUint64(nil, magicOption)
		b = binary.BigEndian.AppendUint32(b, uint32(c.opt))
		r.send(binary.BigEndian.AppendUint32(b, c.length))
		r.expectClosed()
	}
}

func TestServerSkipsTheLongestOption(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rig.dial()
	for _, opt := range []option{99, optGo} {
		if kind := r.optionResult(opt, make([]byte, discardMax)); kind&repError == 0 {
			t.Errorf("option %d of 32 MiB: reply %#x", opt, uint32(kind))
		}
	}
	r.goExport("first")
}

func TestServerExportNameForms(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for _, c := range []struct {
		flags  uint32
		name   string
		zeroes int
		size   uint64
	}{
		{clientFixedNewstyle, "first", 124, 1 << 20},
		{clientFixedNewstyle | clientNoZeroes, "second", 0, 2 << 20},
		{0, "", 124, 1 << 20}, // without fixed newstyle this is the only option
		{clientNoZeroes, "first", 0, 1 << 20},
	} {
		r := rawDial(t, "unix", rig.address, c.flags)
		r.sendOption(optExportName, []byte(c.name))
		b := r.read(10)
		flags := TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
		if size := binary.BigEndian.Uint64(b); size != c.size || flags&FlagHasFlags == 0 || (flags&FlagReadOnly != 0) != (c.name == "second") {
			t.Errorf("%q: size %d, flags %#x", c.name, size, flags)
		}
		if zeroes := r.read(c.zeroes); bytes.Count(zeroes, []byte{0}) != c.zeroes {
			t.Errorf("%q: % x for zeroes", c.name, zeroes)
		}
		r.sendRequest(0, CommandRead, 7, 512, 512, nil)
		if errno, cookie := r.readSimpleReply(); errno != ErrnoOK || cookie != 7 {
			t.Errorf("%q: read: %v, cookie %d", c.name, errno, cookie)
		}
		r.read(512)
	}
}

func TestServerExportNameHasNoErrorReply(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for _, name := range []string{"third", "..", "first\x00", "\xff", strings.Repeat("n", stringMax)} {
		r := rig.dial()
		r.sendOption(optExportName, []byte(name))
		r.expectClosed()
	}
	r := rig.dial()
	r.mustOption(optExtendedHeaders, nil)
	r.sendOption(optExportName, []byte("first"))
	r.expectClosed()
}

func TestServerExportNameAfterStructuredReply(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rig.dial()
	r.mustOption(optStructuredReply, nil)
	r.setContexts("first", ContextAllocation)
	r.sendOption(optExportName, []byte("first"))
	if flags := TransmissionFlags(binary.BigEndian.Uint16(r.read(10)[8:])); flags&FlagSendDF == 0 {
		t.Errorf("flags %#x without DF", flags)
	}
	r.sendRequest(0, CommandBlockStatus, 1, 0, 4096, nil)
	if chunk := r.readStructuredReply(); chunk.kind != chunkBlockStatus {
		t.Errorf("%+v", chunk)
	}
}

// TestServerHonoursOptionsWithoutFixedNewstyle: clients exist that leave the flag
// out and negotiate all the same. For them there is no TLS.
func TestServerHonoursOptionsWithoutFixedNewstyle(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rawDial(t, "unix", rig.address, 0)
	for _, c := range []struct {
		opt  option
		want optionReply
	}{{99, repErrUnsupported}, {optStartTLS, repErrPolicy}, {optList, repAck}, {optStructuredReply, repAck}} {
		if kind := r.optionResult(c.opt, nil); kind != c.want {
			t.Errorf("option %d: reply %#x, want %#x", c.opt, uint32(kind), uint32(c.want))
		}
	}
	if size, _ := r.goExport("second"); size != 2<<20 {
		t.Errorf("size %d", size)
	}
}

func TestServerAbort(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rig.dial()
	r.mustOption(optAbort, []byte("bye, and thanks"))
	r.expectClosed()
	// One that leaves before the ACK harms nothing and is no failure.
	for range 20 {
		r := rig.dial()
		r.sendOption(optAbort, nil)
		_ = r.conn.Close() // the point of the test
	}
	eventually(t, "handshakes end", func() bool { return rig.server.Stats().Negotiating == 0 })
	if s := rig.server.Stats(); s.HandshakesFailed != 0 {
		t.Errorf("%d handshakes failed\n%s", s.HandshakesFailed, rig.log)
	}
}

func TestServerSurvivesHangUpAnywhereInTheHandshake(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	talk := binary.BigEndian.AppendUint32(nil, clientFixedNewstyle)
	talk = appendOption(talk, optStructuredReply, nil)
	talk = appendOption(talk, optListMetaContext, rawContexts("first"))
	talk = appendOption(talk, optSetMetaContext, rawContexts("first", ContextAllocation))
	talk = appendOption(talk, optInfo, rawInfo("first", infoBlockSize))
	talk = appendOption(talk, optGo, rawInfo("first"))
	talk = appendRequest(talk, false, 0, CommandWrite, 1, 0, 4096)
	talk = append(talk, make([]byte, 2048)...)
	for n := range talk {
		if n > 256 && n%97 != 0 {
			continue
		}
		conn := rig.connect()
		if _, err := conn.Write(talk[:n]); err != nil {
			t.Fatal(err)
		}
		_ = conn.Close() // the point of the test
	}
	eventually(t, "all connections end", func() bool { s := rig.server.Stats(); return s.Negotiating+s.Connections == 0 })
	rig.openSession(HeadersStructured, "first").write(0, []byte("alive"))
}

func TestServerList(t *testing.T) {
	exports := twoExports(t)
	exports = append(exports, &Export{Name: "..", Device: memory(t, 4096), Description: strings.Repeat("é", stringMax)})
	rig := startServer(t, serverSetup{}, exports...)
	r := rig.dial()
	replies := r.option(optList, nil)
	var names []string
	for _, reply := range replies[:len(replies)-1] {
		n := binary.BigEndian.Uint32(reply.data)
		if reply.kind != repServer || int(n) > len(reply.data)-4 {
			t.Fatalf("%+v", reply)
		}
		name, description := string(reply.data[4:4+n]), string(reply.data[4+n:])
		names = append(names, name)
		switch {
		case name == "first" && description != "the first one", name == "second" && description != "":
			t.Errorf("%q is described as %q", name, description)
		case name == ".." && description != strings.Repeat("é", stringMax/2):
			t.Errorf("a long description becomes %d bytes", len(description))
		}
	}
	if !slices.Equal(names, []string{"..", "first", "second"}) {
		t.Errorf("names %q", names)
	}
	if size, _ := r.goExport(".."); size != 4096 {
		t.Errorf("size %d", size)
	}
}

func TestServerListIsRefusedByPolicy(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{NoList: true}}, twoExports(t)...)
	r := rig.dial()
	if kind := r.optionResult(optList, nil); kind != repErrPolicy {
		t.Errorf("reply %#x", uint32(kind))
	}
	r.goExport("first")
}

// TestServerBoundsWhatListSends asks for the list again and again.
func TestServerBoundsWhatListSends(t *testing.T) {
	var exports []*Export
	for i := range 32 {
		exports = append(exports, &Export{Name: fmt.Sprintf("%04d%s", i, strings.Repeat("n", stringMax-4)), Device: memory(t, 4096), Description: strings.Repeat("d", stringMax)})
	}
	rig := startServer(t, serverSetup{bare: true}, exports...)
	conn := rig.connect()
	defer func() { _ = conn.Close() }() // the server has closed it
	talk := binary.BigEndian.AppendUint32(nil, clientFixedNewstyle)
	for range optionsMax {
		talk = appendOption(talk, optList, nil)
	}
	go func() { _, _ = conn.Write(talk) }() // ends with the connection
	total, _ := io.Copy(io.Discard, conn)   // ends with a reset when options were left unread
	if total > listBytesMax+64<<10 || total < listBytesMax/2 {
		t.Errorf("%d bytes were listed, at most %d should be", total, listBytesMax)
	}
}

func TestServerInfoAndGoAnswerAlike(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for _, headers := range sessionModes {
		for _, name := range []string{"", "first", "second"} {
			r := rig.dial()
			switch headers {
			case HeadersStructured:
				r.mustOption(optStructuredReply, nil)
			case HeadersExtended:
				r.mustOption(optExtendedHeaders, nil)
			}
			if headers != HeadersSimple {
				r.setContexts(name, ContextAllocation)
			}
			request := rawInfo(name, infoName, infoDescription, infoBlockSize, 1000)
			info, again, went := r.option(optInfo, request), r.option(optInfo, request), r.option(optGo, request)
			plain := func(replies []rawOptionReply) string {
				var b strings.Builder
				for _, reply := range replies {
					fmt.Fprintf(&b, "%#x %q\n", uint32(reply.kind), reply.data)
				}
				return b.String()
			}
			if plain(info) != plain(went) || plain(info) != plain(again) {
				t.Errorf("%s %q: INFO\n%sINFO again\n%sGO\n%s", headers, name, plain(info), plain(again), plain(went))
			}
		}
	}
}

func TestServerInfoContents(t *testing.T) {
	exports := twoExports(t)
	exports[1].Device = &describedDevice{exports[1].Device, func(i *datapath.Info) { i.MinIO, i.PreferredIO = 4096, 65536 }}
	rig := startServer(t, serverSetup{}, exports...)
	r := rig.dial()
	replies := r.option(optInfo, rawInfo("first", infoBlockSize, infoName, infoDescription, infoBlockSize, infoName))
	want := []string{
		"\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00", // and the flags
		"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00",
		"\x00\x01first",
		"\x00\x02the first one",
		"",
	}
	for i, reply := range replies {
		if i >= len(want) || !strings.HasPrefix(string(reply.data), want[i]) || (i > 0 && len(reply.data) != len(want[i])) {
			t.Errorf("reply %d: %#x %q", i, uint32(reply.kind), reply.data)
		}
	}
	if len(replies) != len(want) || len(replies[0].data) != sizeInfoExport {
		t.Errorf("%d replies, the first of %d bytes", len(replies), len(replies[0].data))
	}
	replies = r.option(optInfo, rawInfo("second", infoBlockSize, infoDescription)) // it has no description
	if len(replies) != 3 || string(replies[1].data) != "\x00\x03\x00\x00\x10\x00\x00\x01\x00\x00\x02\x00\x00\x00" {
		t.Errorf("%+v", replies)
	}
}

// TestServerTransmissionFlags compares what is advertised with what the device
// can do and what is negotiated.
func TestServerTransmissionFlags(t *testing.T) {
	everything := datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureDiscard | datapath.FeatureWriteZeroes | datapath.FeatureFastZero |
		datapath.FeatureCache | datapath.FeatureExtents | datapath.FeatureMultiQueue | datapath.FeatureRotational
	with := func(f datapath.Features, readOnly bool) *Export {
		return &Export{Device: &describedDevice{memory(t, 1<<20), func(i *datapath.Info) { i.Features, i.ReadOnly = f, readOnly }}}
	}
	all := FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagRotational | FlagSendTrim | FlagSendWriteZeroes | FlagCanMultiConn | FlagSendCache | FlagSendFastZero
	unchangeable := FlagHasFlags | FlagReadOnly | FlagSendFlush | FlagSendFUA | FlagRotational | FlagCanMultiConn | FlagSendCache
	for i, c := range []struct {
		export *Export
		want   TransmissionFlags
	}{
		{with(0, false), FlagHasFlags},
		{with(everything, false), all},
		{with(everything, true), unchangeable},
		{with(datapath.FeatureFastZero, false), FlagHasFlags}, // not without WRITE_ZEROES
		{with(datapath.FeatureMultiQueue, false), FlagHasFlags | FlagCanMultiConn},
	} {
		rig := startServer(t, serverSetup{}, c.export)
		for mode, more := range map[Headers]TransmissionFlags{HeadersSimple: 0, HeadersStructured: FlagSendDF, HeadersExtended: FlagSendDF} {
			if s := rig.openSession(mode, ""); s.flags != c.want|more {
				t.Errorf("case %d, %s: flags %#x, want %#x", i, mode, s.flags, c.want|more)
			}
		}
		if s := rig.openSession(HeadersExtended, "", ContextAllocation); s.flags != c.want|FlagSendDF|FlagBlockStatusPayload {
			t.Errorf("case %d with contexts: flags %#x", i, s.flags)
		}
		if s := rig.openSession(HeadersStructured, "", ContextAllocation); s.flags != c.want|FlagSendDF {
			t.Errorf("case %d, structured with contexts: flags %#x", i, s.flags)
		}
		rig.stop()
	}
	rig := startServer(t, serverSetup{}, &Export{Device: with(everything, false).Device, ReadOnly: true})
	if s := rig.openSession(HeadersSimple, ""); s.flags != unchangeable {
		t.Errorf("export that is read-only: flags %#x", s.flags)
	}
}

func TestServerReplayedOptions(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rig.dial()
	for _, step := range []struct {
		opt  option
		want optionReply
	}{
		{optStructuredReply, repAck}, {optStructuredReply, repErrInvalid},
		{optExtendedHeaders, repAck}, {optExtendedHeaders, repErrInvalid},
		{optStructuredReply, repErrExtendedNeeded},
		{optList, repAck}, {optList, repAck},
	} {
		if kind := r.optionResult(step.opt, nil); kind != step.want {
			t.Errorf("option %d: reply %#x, want %#x", step.opt, uint32(kind), uint32(step.want))
		}
	}
	if _, flags := r.goExport("first"); flags&FlagSendDF == 0 {
		t.Errorf("flags %#x", flags)
	}
	r.sendRequestExtended(0, CommandRead, 1, 0, 10, nil)
	for !r.readExtendedReply().done() {
	}
}

func TestServerExtendedHeadersImplyStructuredReplies(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rig.dial()
	r.mustOption(optExtendedHeaders, nil)
	if ids := r.setContexts("first", ContextAllocation); len(ids) != 1 {
		t.Errorf("ids %v", ids)
	}
	if kind := r.optionResult(optStructuredReply, nil); kind != repErrExtendedNeeded {
		t.Errorf("reply %#x", uint32(kind))
	}
	if kind := r.optionResult(optStructuredReply, []byte("x")); kind&repError == 0 {
		t.Errorf("reply %#x", uint32(kind))
	}
}

func TestServerCountsOptions(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rig.dial()
	for range optionsMax {
		if kind := r.optionResult(99, nil); kind != repErrUnsupported {
			t.Fatalf("reply %#x", uint32(kind))
		}
	}
	r.expectClosed()
}

// withContexts says that a device has these metadata contexts.
func withContexts(below datapath.Device, names ...string) datapath.Device {
	return &describedDevice{below, func(i *datapath.Info) { i.Contexts = names }}
}

func TestServerListsContexts(t *testing.T) {
	bitmap := datapath.ContextDirtyPrefix + "b0"
	all := []string{ContextAllocation, datapath.ContextDepth, bitmap, datapath.ContextDirtyPrefix + "b1"}
	rig := startServer(t, serverSetup{},
		&Export{Name: "rich", Device: withContexts(memory(t, 1<<20), all...)},
		&Export{Name: "poor", Device: &describedDevice{memory(t, 1<<20), func(i *datapath.Info) { i.Features &^= datapath.FeatureExtents; i.Contexts = nil }}},
	)
	for _, c := range []struct {
		export  string
		queries []string
		want    []string
	}{
		{"rich", nil, all},
		{"poor", nil, all[:1]},
		{"rich", []string{"base:"}, all[:1]},
		{"rich", []string{"qemu:"}, all[1:]},
		{"rich", []string{"qemu:dirty-bitmap:"}, all[2:]},
		{"rich", []string{"qemu:dirty-bitmap:b1"}, all[3:]},
		{"rich", []string{"qemu:dirty-bitmap:b2"}, nil},
		{"rich", []string{"qemu:dirty-bitmap:b"}, nil},
		{"rich", []string{"base"}, nil},
		{"rich", []string{""}, nil},
		{"rich", []string{"unknown:", "x-other:thing"}, nil},
		{"rich", []string{"qemu:", "base:allocation", "base:", "base:"}, all},
		{"rich", []string{"base:other", bitmap}, []string{bitmap}},
	} {
		r := rig.dial() // LIST needs no structured replies
		replies := r.option(optListMetaContext, rawContexts(c.export, c.queries...))
		var got []string
		for _, reply := range replies {
			if reply.kind == repMetaContext {
				if id := binary.BigEndian.Uint32(reply.data); id != 0 {
					t.Errorf("%q %q: id %d", c.export, c.queries, id)
				}
				got = append(got, string(reply.data[4:]))
			}
		}
		if last := replies[len(replies)-1].kind; last != repAck || !slices.Equal(got, c.want) {
			t.Errorf("%q %q: %q and reply %#x, want %q", c.export, c.queries, got, uint32(last), c.want)
		}
	}
}

func TestServerSetsContexts(t *testing.T) {
	bitmap := datapath.ContextDirtyPrefix + "b0"
	rig := startServer(t, serverSetup{}, &Export{Name: "rich", Device: withContexts(memory(t, 1<<20), ContextAllocation, datapath.ContextDepth, bitmap)})
	for _, c := range []struct {
		queries []string
		want    []string
	}{
		{nil, nil},
		{[]string{"base:"}, nil}, // a wildcard selects nothing
		{[]string{"qemu:", "qemu:dirty-bitmap:"}, nil},
		{[]string{ContextAllocation}, []string{ContextAllocation}},
		{[]string{ContextAllocation, ContextAllocation, "x:y"}, []string{ContextAllocation}},
		{[]string{bitmap, datapath.ContextDepth}, []string{bitmap, datapath.ContextDepth}},
	} {
		r := rig.dial()
		r.mustOption(optStructuredReply, nil)
		ids := r.setContexts("rich", c.queries...)
		seen := map[uint32]bool{}
		for _, id := range ids {
			if seen[id] {
				t.Errorf("%q: ids %v", c.queries, ids)
			}
			seen[id] = true
		}
		if len(ids) != len(c.want) {
			t.Errorf("%q: selected %v, want %q", c.queries, ids, c.want)
		}
		for _, name := range c.want {
			if _, ok := ids[name]; !ok {
				t.Errorf("%q: %q is not among %v", c.queries, name, ids)
			}
		}
	}
}

func TestServerSetReplacesWhatWasSelected(t *testing.T) {
	exports := twoExports(t)
	rig := startServer(t, serverSetup{}, exports...)
	// What a step does to the selection, and whether BLOCK_STATUS works after GO.
	for _, c := range []struct {
		name   string
		before func(r *rawConn)
		export string
		want   Error
	}{
		{"selected", func(r *rawConn) {}, "first", ErrnoOK},
		{"selected for another export", func(r *rawConn) {}, "second", ErrnoInvalid},
		{"selected for the same one by another name", func(r *rawConn) {}, "", ErrnoInvalid},
		{"selected nothing", func(r *rawConn) { r.setContexts("first") }, "first", ErrnoInvalid},
		{"selected something else", func(r *rawConn) { r.setContexts("first", "x:y") }, "first", ErrnoInvalid},
		{"selected for the other", func(r *rawConn) { r.setContexts("second", ContextAllocation) }, "second", ErrnoOK},
		{"failed: unknown export", func(r *rawConn) {
			if kind := r.optionResult(optSetMetaContext, rawContexts("third", ContextAllocation)); kind != repErrUnknown {
				r.t.Errorf("reply %#x", uint32(kind))
			}
		}, "first", ErrnoInvalid},
		{"failed: malformed", func(r *rawConn) { r.optionResult(optSetMetaContext, []byte("x")) }, "first", ErrnoInvalid},
		{"failed: too long", func(r *rawConn) { r.optionResult(optSetMetaContext, make([]byte, contextDataMax+1)) }, "first", ErrnoInvalid},
		{"listed afterwards", func(r *rawConn) { r.mustOption(optListMetaContext, rawContexts("second")) }, "first", ErrnoOK},
		{"asked for information", func(r *rawConn) { r.mustOption(optInfo, rawInfo("second")) }, "first", ErrnoOK},
		{"extended headers afterwards", func(r *rawConn) { r.mustOption(optList, nil) }, "first", ErrnoOK},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rig.dial()
			r.t = t
			r.mustOption(optStructuredReply, nil)
			r.setContexts("first", ContextAllocation)
			c.before(r)
			r.goExport(c.export)
			r.sendRequest(0, CommandBlockStatus, 1, 0, 4096, nil)
			chunk := r.readStructuredReply()
			if chunk.errno() != c.want || (c.want == ErrnoOK) != (chunk.kind == chunkBlockStatus) {
				t.Errorf("%+v, want %v", chunk, c.want)
			}
		})
	}
}

func TestServerRefusesTooManyContexts(t *testing.T) {
	var names []string
	for i := range contextsMax + 1 {
		names = append(names, fmt.Sprintf("%sb%d", datapath.ContextDirtyPrefix, i))
	}
	rig := startServer(t, serverSetup{}, &Export{Device: withContexts(memory(t, 1<<20), names...)})
	r := rig.dial()
	r.mustOption(optStructuredReply, nil)
	if kind := r.optionResult(optSetMetaContext, rawContexts("", names...)); kind != repErrTooBig {
		t.Errorf("%d contexts: reply %#x", len(names), uint32(kind))
	}
	if ids := r.setContexts("", names[:contextsMax]...); len(ids) != contextsMax {
		t.Errorf("%d contexts selected", len(ids))
	}
	r.goExport("")
}

func TestServerTellsWhoNegotiatesThatItStops(t *testing.T) {
	exports := &ExportSet{}
	if err := exports.Add(&Export{Name: "e", Device: memory(t, 4096)}); err != nil {
		t.Fatal(err)
	}
	begin := func() (*rawConn, chan error) {
		client, server := net.Pipe()
		ended := make(chan error, 1)
		go func() { // ends with the negotiation
			_, err := negotiate(server, handshakeConfig{exports: exports, listing: true, closing: func() bool { return true }})
			_ = server.Close() // the end of the test
			ended <- err
		}()
		r := newRawConn(t, client)
		r.greet(clientFixedNewstyle)
		return r, ended
	}
	r, ended := begin()
	for _, opt := range []option{optList, optGo, optStructuredReply, optStartTLS, 99} {
		if kind := r.optionResult(opt, []byte("some data")); kind != repErrShutdown {
			t.Errorf("option %d: reply %#x", opt, uint32(kind))
		}
	}
	r.mustOption(optAbort, nil)
	if err := <-ended; err != errDisconnect {
		t.Error(err)
	}
	r, ended = begin()
	r.sendOption(optExportName, nil)
	r.expectClosed()
	if err := <-ended; err != errDisconnect {
		t.Error(err)
	}
}

func TestServerDropsWhoDoesNotNegotiateInTime(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{HandshakeTimeout: 100 * time.Millisecond}}, twoExports(t)...)
	idle := newRawConn(t, rig.connect()) // says nothing at all
	half := rig.dial()
	half.send(appendOption(nil, optGo, rawInfo("first"))[:20])
	busy := rig.dial() // progress does not help
	stop := time.Now().Add(serverWait)
	for {
		if _, err := busy.conn.Write(appendOption(nil, 99, nil)[:1]); err != nil {
			break
		}
		if time.Now().After(stop) {
			t.Fatal("a slow client is never dropped")
		}
		time.Sleep(20 * time.Millisecond) // the pace of the client
	}
	idle.read(sizeGreeting)
	idle.expectClosed()
	half.expectClosed()
	// In transmission there is no such limit.
	s := rig.openSession(HeadersSimple, "first")
	time.Sleep(150 * time.Millisecond) // past the timeout
	s.readAt(0, 4096)
}

func TestServerCapsConnections(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{ConnectionsMax: 3}}, twoExports(t)...)
	sessions := []*session{rig.openSession(HeadersSimple, "first"), rig.openSession(HeadersSimple, "first")}
	waiting := rig.dial() // counts although it only negotiates
	refused := newRawConn(t, rig.connect())
	refused.expectClosed()
	if n := rig.server.Stats().Refused; n != 1 {
		t.Errorf("%d refused", n)
	}
	sessions[0].disconnect()
	rig.connections(1)
	again := rig.openSession(HeadersSimple, "second")
	again.readAt(0, 512)
	sessions[1].readAt(0, 512)
	waiting.mustOption(optAbort, nil)
}

func TestServerCapsConnectionsOfAnAddress(t *testing.T) {
	rig := startServer(t, serverSetup{config: ServerConfig{PerAddressMax: 2}}, twoExports(t)...)
	address := rig.listenTCP()
	dial := func() *rawConn {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		return newRawConn(t, conn)
	}
	first, second := dial(), dial()
	first.greet(clientFixedNewstyle)
	second.greet(clientFixedNewstyle)
	third := dial()
	third.expectClosed()
	for range 3 { // local sockets have no such bound
		rig.openSession(HeadersSimple, "first")
	}
	s := newSession(first, HeadersSimple, "first")
	s.disconnect()
	rig.connections(3)
	fourth := dial()
	fourth.greet(clientFixedNewstyle)
	newSession(fourth, HeadersSimple, "first").readAt(0, 512)
}

func TestServerDefaultExport(t *testing.T) {
	named := twoExports(t)
	rig := startServer(t, serverSetup{}, append(named, &Export{Name: "", Device: memory(t, 3<<20)})...)
	if s := rig.openSession(HeadersSimple, ""); s.size != 3<<20 {
		t.Errorf("an export with the empty name is not the default: size %d", s.size)
	}
	rig.server.config.Exports.Remove("")
	if s := rig.openSession(HeadersSimple, ""); s.size != 1<<20 {
		t.Errorf("the first export is not the default: size %d", s.size)
	}
	rig.server.config.Exports.Remove("first")
	if kind := rig.dial().optionResult(optInfo, rawInfo("")); kind != repErrUnknown {
		t.Errorf("reply %#x", uint32(kind))
	}
}

func TestExportSetRefusesNames(t *testing.T) {
	set := &ExportSet{}
	d := memory(t, 4096)
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	for name, ok := range map[string]bool{
		"": true, "..": true, "a/b": true, "größe": true, strings.Repeat("n", stringMax): true,
		"a\x00b": false, "\xff": false, strings.Repeat("n", stringMax+1): false,
	} {
		if err := set.Add(&Export{Name: name, Device: d}); (err == nil) != ok {
			t.Errorf("%.20q: %v", name, err)
		}
	}
	if err := set.Add(&Export{Name: "..", Device: d}); err == nil {
		t.Error("a name was taken twice")
	}
	if err := ValidateName("a\x00"); err == nil || !strings.Contains(err.Error(), "NUL") {
		t.Error(err)
	}
}

func TestNewServerRefusesBadConfigurations(t *testing.T) {
	rig := startServer(t, serverSetup{})
	for name, c := range map[string]ServerConfig{
		"no reactors":       {Exports: &ExportSet{}},
		"no exports":        {Reactors: rig.reactors},
		"unknown TLS":       {Reactors: rig.reactors, Exports: &ExportSet{}, TLS: "perhaps"},
		"TLS without files": {Reactors: rig.reactors, Exports: &ExportSet{}, TLS: TLSForced},
		"depth":             {Reactors: rig.reactors, Exports: &ExportSet{}, Depth: 513},
		"negative depth":    {Reactors: rig.reactors, Exports: &ExportSet{}, Depth: -1},
	} {
		if _, err := NewServer(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
