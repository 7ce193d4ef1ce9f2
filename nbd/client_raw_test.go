package nbd

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"
)

// rawTimeout ends a test whose server does not answer.
const rawTimeout = 10 * time.Second

// rawConn is the client's side of a connection in the hands of a test: it sends
// whatever it is told, right or wrong, and fails the test when an answer does not
// parse.
type rawConn struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
}

// rawOptionReply is a reply to an option.
type rawOptionReply struct {
	opt  option
	kind optionReply
	data []byte
}

// rawChunk is a chunk of a structured or extended reply.
type rawChunk struct {
	flags, kind uint16
	cookie      uint64
	offset      uint64 // extended only: of the request
	payload     []byte
}

// newRawConn takes over conn, closes it at the end of the test and gives every
// read and write on it rawTimeout from now.
func newRawConn(t testing.TB, conn net.Conn) *rawConn {
	t.Helper()
	t.Cleanup(func() { _ = conn.Close() }) // may be closed by the test
	if err := conn.SetDeadline(time.Now().Add(rawTimeout)); err != nil {
		t.Fatal(err)
	}
	return &rawConn{t: t, conn: conn, in: bufio.NewReader(conn)}
}

// rawDial connects to a server and greets it with the given client flags.
func rawDial(t testing.TB, network, address string, flags uint32) *rawConn {
	t.Helper()
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	r := newRawConn(t, conn)
	r.greet(flags)
	return r
}

// send writes bytes as they are.
func (r *rawConn) send(b []byte) {
	r.t.Helper()
	if _, err := r.conn.Write(b); err != nil {
		r.t.Fatalf("write: %v", err)
	}
}

// read reads n bytes.
func (r *rawConn) read(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r.in, b); err != nil {
		r.t.Fatalf("read of %d bytes: %v", n, err)
	}
	return b
}

// greet reads the server's greeting, answers with flags and returns the server's.
func (r *rawConn) greet(flags uint32) uint16 {
	r.t.Helper()
	b := r.read(sizeGreeting)
	if binary.BigEndian.Uint64(b) != magicInit || binary.BigEndian.Uint64(b[8:]) != magicOption {
		r.t.Fatalf("greeting % x", b)
	}
	r.send(binary.BigEndian.AppendUint32(nil, flags))
	return binary.BigEndian.Uint16(b[16:])
}

// sendOption sends an option with correct framing.
func (r *rawConn) sendOption(opt option, data []byte) {
	r.t.Helper()
	r.send(appendOption(nil, opt, data))
}

// readOptionReply reads one reply.
func (r *rawConn) readOptionReply() rawOptionReply {
	r.t.Helper()
	b := r.read(sizeOptionReplyHeader)
	if magic := binary.BigEndian.Uint64(b); magic != magicOptionReply {
		r.t.Fatalf("option reply begins with %#x", magic)
	}
	length := binary.BigEndian.Uint32(b[16:])
	if length > 1<<20 {
		r.t.Fatalf("option reply of %d bytes", length)
	}
	return rawOptionReply{option(binary.BigEndian.Uint32(b[8:])), optionReply(binary.BigEndian.Uint32(b[12:])), r.read(int(length))}
}

// option sends an option and reads its replies up to and with the ACK or error.
func (r *rawConn) option(opt option, data []byte) []rawOptionReply {
	r.t.Helper()
	r.sendOption(opt, data)
	var replies []rawOptionReply
	for {
		reply := r.readOptionReply()
		if reply.opt != opt {
			r.t.Fatalf("reply to option %d while %d was sent", reply.opt, opt)
		}
		replies = append(replies, reply)
		if reply.kind == repAck || reply.kind&repError != 0 {
			return replies
		}
	}
}

// optionResult sends an option and returns the type of its last reply.
func (r *rawConn) optionResult(opt option, data []byte) optionReply {
	r.t.Helper()
	replies := r.option(opt, data)
	return replies[len(replies)-1].kind
}

// mustOption is optionResult for options that must be acknowledged.
func (r *rawConn) mustOption(opt option, data []byte) {
	r.t.Helper()
	if kind := r.optionResult(opt, data); kind != repAck {
		r.t.Fatalf("option %d: reply %#x", opt, uint32(kind))
	}
}

// startTLS sends STARTTLS, wants an ACK and goes on in TLS.
func (r *rawConn) startTLS(config *tls.Config) {
	r.t.Helper()
	r.mustOption(optStartTLS, nil)
	if n := r.in.Buffered(); n != 0 {
		r.t.Fatalf("%d bytes behind the reply to STARTTLS", n)
	}
	conn := tls.Client(r.conn, config)
	if err := conn.Handshake(); err != nil {
		r.t.Fatal(err)
	}
	r.conn, r.in = conn, bufio.NewReader(conn)
}

// rawInfo is the data of INFO and GO.
func rawInfo(name string, requests ...uint16) []byte {
	b := appendOptionString(nil, name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(requests)))
	for _, request := range requests {
		b = binary.BigEndian.AppendUint16(b, request)
	}
	return b
}

// rawContexts is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func rawContexts(name string, queries ...string) []byte {
	b := appendOptionString(nil, name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, query := range queries {
		b = appendOptionString(b, query)
	}
	return b
}

// setContexts selects metadata contexts and returns their ids by name.
func (r *rawConn) setContexts(export string, queries ...string) map[string]uint32 {
	r.t.Helper()
	ids := make(map[string]uint32)
	for _, reply := range r.option(optSetMetaContext, rawContexts(export, queries...)) {
		switch {
		case reply.kind == repMetaContext && len(reply.data) > 4:
			ids[string(reply.data[4:])] = binary.BigEndian.Uint32(reply.data)
		case reply.kind != repAck:
			r.t.Fatalf("SET_META_CONTEXT: reply %#x %q", uint32(reply.kind), reply.data)
		}
	}
	return ids
}

// goExport enters transmission by GO and returns the size and flags of the export.
func (r *rawConn) goExport(name string, requests ...uint16) (size uint64, flags TransmissionFlags) {
	r.t.Helper()
	replies := r.option(optGo, rawInfo(name, requests...))
	if last := replies[len(replies)-1]; last.kind != repAck {
		r.t.Fatalf("GO %q: reply %#x %q", name, uint32(last.kind), last.data)
	}
	for _, reply := range replies {
		if reply.kind == repInfo && len(reply.data) == sizeInfoExport && binary.BigEndian.Uint16(reply.data) == infoExport {
			return binary.BigEndian.Uint64(reply.data[2:]), TransmissionFlags(binary.BigEndian.Uint16(reply.data[10:]))
		}
	}
	r.t.Fatalf("GO %q: no INFO_EXPORT", name)
	return 0, 0
}

// sendRequest sends a compact request.
func (r *rawConn) sendRequest(flags CommandFlags, command Command, cookie, offset uint64, length uint32, payload []byte) {
	r.t.Helper()
	r.send(append(appendRequest(nil, false, flags, command, cookie, offset, uint64(length)), payload...))
}

// sendRequestExtended sends an extended request.
func (r *rawConn) sendRequestExtended(flags CommandFlags, command Command, cookie, offset, length uint64, payload []byte) {
	r.t.Helper()
	r.send(append(appendRequest(nil, true, flags, command, cookie, offset, length), payload...))
}

// readSimpleReply reads the header of a simple reply; data is up to the caller.
func (r *rawConn) readSimpleReply() (errno Error, cookie uint64) {
	r.t.Helper()
	b := r.read(sizeSimpleReply)
	if magic := binary.BigEndian.Uint32(b); magic != magicSimpleReply {
		r.t.Fatalf("simple reply begins with %#x", magic)
	}
	return Error(binary.BigEndian.Uint32(b[4:])), binary.BigEndian.Uint64(b[8:])
}

// readStructuredReply reads one chunk.
func (r *rawConn) readStructuredReply() rawChunk {
	r.t.Helper()
	b := r.read(sizeStructuredReply)
	if magic := binary.BigEndian.Uint32(b); magic != magicStructuredReply {
		r.t.Fatalf("structured reply begins with %#x", magic)
	}
	return r.readPayload(rawChunk{
		flags: binary.BigEndian.Uint16(b[4:]), kind: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
	}, uint64(binary.BigEndian.Uint32(b[16:])))
}

// readExtendedReply reads one chunk.
func (r *rawConn) readExtendedReply() rawChunk {
	r.t.Helper()
	b := r.read(sizeExtendedReply)
	if magic := binary.BigEndian.Uint32(b); magic != magicExtendedReply {
		r.t.Fatalf("extended reply begins with %#x", magic)
	}
	return r.readPayload(rawChunk{
		flags: binary.BigEndian.Uint16(b[4:]), kind: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]),
	}, binary.BigEndian.Uint64(b[24:]))
}

func (r *rawConn) readPayload(chunk rawChunk, length uint64) rawChunk {
	r.t.Helper()
	if length > 2*payloadMax {
		r.t.Fatalf("chunk of %d bytes", length)
	}
	chunk.payload = r.read(int(length))
	return chunk
}

// errno is the error of an error chunk, and ErrnoOK for any other.
func (c rawChunk) errno() Error {
	if c.kind&chunkErrorBit == 0 || len(c.payload) < 6 {
		return ErrnoOK
	}
	return Error(binary.BigEndian.Uint32(c.payload))
}

// done reports whether the chunk is the last of its reply.
func (c rawChunk) done() bool { return c.flags&chunkFlagDone != 0 }

// expectClosed wants the server to close the connection without another byte.
func (r *rawConn) expectClosed() {
	r.t.Helper()
	b, err := r.in.ReadByte()
	switch {
	case err == nil:
		r.t.Fatalf("got byte %#x, want the connection closed", b)
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.t.Fatal("the connection stays open, want it closed")
	}
}

// TestClientRawAgainstNBDKit shows that the hand-made messages are good ones.
func TestClientRawAgainstNBDKit(t *testing.T) {
	socket := nbdkit(t, "memory", "1M")

	r := rawDial(t, "unix", socket, clientFixedNewstyle|clientNoZeroes)
	if kind := r.optionResult(option(99), []byte("anything")); kind != repErrUnsupported {
		t.Errorf("unknown option: reply %#x", uint32(kind))
	}
	r.mustOption(optStructuredReply, nil)
	ids := r.setContexts("", ContextAllocation)
	size, flags := r.goExport("", infoBlockSize)
	if size != 1<<20 || flags&FlagHasFlags == 0 {
		t.Errorf("size %d, flags %#x", size, flags)
	}
	r.sendRequest(0, CommandWrite, 1, 0, 4, []byte("word"))
	for chunk := r.readAnyReply(); !chunk.done(); chunk = r.readAnyReply() {
		t.Log("write: another chunk")
	}
	r.sendRequest(0, CommandRead, 2, 0, 4, nil)
	if chunk := r.readStructuredReply(); chunk.kind != chunkOffsetData || string(chunk.payload[8:]) != "word" || chunk.cookie != 2 || chunk.offset != 0 {
		t.Errorf("read: %+v", chunk)
	}
	r.sendRequest(0, CommandBlockStatus, 3, 0, 1<<20, nil)
	if chunk := r.readStructuredReply(); chunk.kind != chunkBlockStatus || binary.BigEndian.Uint32(chunk.payload) != ids[ContextAllocation] {
		t.Errorf("block status: %+v", chunk)
	}
	r.sendRequest(0, CommandRead, 4, 1<<20, 4, nil)
	if chunk := r.readStructuredReply(); chunk.errno() != ErrnoInvalid {
		t.Errorf("read past the end: %+v", chunk)
	}
	r.send(slices.Repeat([]byte{0xff}, sizeRequest))
	r.expectClosed()

	simple := rawDial(t, "unix", socket, clientFixedNewstyle|clientNoZeroes)
	simple.goExport("")
	simple.sendRequest(0, CommandRead, 9, 0, 4, nil)
	if errno, cookie := simple.readSimpleReply(); errno != ErrnoOK || cookie != 9 {
		t.Errorf("simple read: error %d, cookie %d", errno, cookie)
	}
	if got := string(simple.read(4)); got != "word" {
		t.Errorf("simple read: %q", got)
	}
}

// TestClientRawAgainstFake shows the same for extended headers, which the
// servers above may not have.
func TestClientRawAgainstFake(t *testing.T) {
	r := rawDial(t, "unix", memoryServer(t, HeadersExtended, nil), clientFixedNewstyle|clientNoZeroes)
	r.mustOption(optExtendedHeaders, nil)
	ids := r.setContexts("", ContextAllocation, fakeDirty)
	r.goExport("")
	r.sendRequestExtended(CommandFlagPayloadLen, CommandWrite, 1, 512, 4, []byte("word"))
	if chunk := r.readExtendedReply(); chunk.kind != chunkNone || !chunk.done() || chunk.cookie != 1 || chunk.offset != 512 {
		t.Errorf("write: %+v", chunk)
	}
	r.sendRequestExtended(0, CommandRead, 2, 513, 2, nil)
	if chunk := r.readExtendedReply(); chunk.kind != chunkOffsetData || string(chunk.payload[8:]) != "or" || chunk.errno() != ErrnoOK {
		t.Errorf("read: %+v", chunk)
	}
	payload := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, 4096), ids[fakeDirty])
	r.sendRequestExtended(CommandFlagPayloadLen, CommandBlockStatus, 3, 0, uint64(len(payload)), payload)
	if chunk := r.readExtendedReply(); chunk.kind != chunkBlockStatus || binary.BigEndian.Uint32(chunk.payload) != fakeDirtyID {
		t.Errorf("block status: %+v", chunk)
	}
}

// readAnyReply reads a simple reply, as an empty or error chunk, or a structured
// one: servers may answer all but reads with either.
func (r *rawConn) readAnyReply() rawChunk {
	r.t.Helper()
	b, err := r.in.Peek(4)
	if err != nil {
		r.t.Fatal(err)
	}
	if binary.BigEndian.Uint32(b) != magicSimpleReply {
		return r.readStructuredReply()
	}
	errno, cookie := r.readSimpleReply()
	if errno == ErrnoOK {
		return rawChunk{flags: chunkFlagDone, kind: chunkNone, cookie: cookie}
	}
	payload := binary.BigEndian.AppendUint32(nil, uint32(errno))
	return rawChunk{flags: chunkFlagDone, kind: chunkError, cookie: cookie, payload: append(payload, 0, 0)}
}
