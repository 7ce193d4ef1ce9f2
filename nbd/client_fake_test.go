package nbd

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// checkClientGoroutines fails t when it ends with goroutines it did not begin
// with. Call it first.
func checkClientGoroutines(t testing.TB) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

// errFakeDone ends a script that has nothing more to say.
var errFakeDone = errors.New("script is over")

// fakePeer is the server's side of one connection, which follows a script. Its
// methods end the script by a panic with an error when the client is gone.
type fakePeer struct {
	conn    net.Conn
	in      *bufio.Reader
	headers Headers
	out     []byte
}

// fakeRequest is a request as the fake server received it.
type fakeRequest struct {
	flags          CommandFlags
	command        Command
	cookie, offset uint64
	length         uint64
	payload        []byte
}

// fakeServer listens on a unix socket and runs script on each connection, which
// is closed when the script returns. The test waits for all scripts.
func fakeServer(t testing.TB, script func(*fakePeer)) (address string) {
	t.Helper()
	address = filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	serveFake(t, l, script)
	return address
}

func serveFake(t testing.TB, l net.Listener, script func(*fakePeer)) {
	var running sync.WaitGroup
	running.Go(func() { // ends when l is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { // ends when the client closes, at the latest by the deadline
				defer conn.Close()
				if err := conn.SetDeadline(time.Now().Add(rawTimeout)); err != nil {
					t.Error(err)
				}
				if err := runScript(conn, script); !isDisconnect(err) {
					t.Errorf("fake server: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close() // nothing is pending
		running.Wait()
	})
}

func runScript(conn net.Conn, script func(*fakePeer)) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = r.(error) // the scripts panic with nothing else
		}
	}()
	script(&fakePeer{conn: conn, in: bufio.NewReader(conn), headers: HeadersSimple})
	return errFakeDone
}

func isDisconnect(err error) bool {
	var op *net.OpError
	return errors.Is(err, errFakeDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &op) && !op.Timeout()
}

func (f *fakePeer) write(b []byte) {
	if _, err := f.conn.Write(b); err != nil {
		panic(err)
	}
}

func (f *fakePeer) read(b []byte) []byte {
	if _, err := io.ReadFull(f.in, b); err != nil {
		panic(err)
	}
	return b
}

// wait returns when the client has closed the connection.
func (f *fakePeer) wait() { _, _ = io.Copy(io.Discard, f.in) } // an error is a close too

// greet sends the greeting with flags and returns the client's flags.
func (f *fakePeer) greet(flags uint16) uint32 {
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	f.write(binary.BigEndian.AppendUint16(b, flags))
	return binary.BigEndian.Uint32(f.read(make([]byte, 4)))
}

// readOption reads one option.
func (f *fakePeer) readOption() (option, []byte) {
	b := f.read(make([]byte, sizeOptionHeader))
	if magic := binary.BigEndian.Uint64(b); magic != magicOption {
		panic(fmt.Errorf("option begins with %#x", magic))
	}
	return option(binary.BigEndian.Uint32(b[8:])), f.read(make([]byte, binary.BigEndian.Uint32(b[12:])))
}

// wantOption reads one option, which must be opt.
func (f *fakePeer) wantOption(opt option) []byte {
	got, data := f.readOption()
	if got != opt {
		panic(fmt.Errorf("got option %d, want %d", got, opt))
	}
	return data
}

// reply sends a reply to an option.
func (f *fakePeer) reply(opt option, kind optionReply, data []byte) {
	f.write(appendFakeReply(nil, opt, kind, data))
}

func appendFakeReply(b []byte, opt option, kind optionReply, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptionReply)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(kind))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// startTLS acknowledges STARTTLS and goes on in TLS.
func (f *fakePeer) startTLS(config *tls.Config) {
	f.wantOption(optStartTLS)
	f.reply(optStartTLS, repAck, nil)
	conn := tls.Server(f.conn, config)
	if err := conn.Handshake(); err != nil {
		panic(io.ErrUnexpectedEOF) // the tests look at the client's side of it
	}
	f.conn, f.in = conn, bufio.NewReader(conn)
}

// fakeInfoExport is the data of INFO_EXPORT.
func fakeInfoExport(size uint64, flags TransmissionFlags) []byte {
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, uint16(flags))
}

// fakeContext is the data of a metadata context.
func fakeContext(id uint32, name string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, id), name...)
}

// fakeBlocks is the data of INFO_BLOCK_SIZE.
func fakeBlocks(least, preferred, most uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, least)
	b = binary.BigEndian.AppendUint32(b, preferred)
	return binary.BigEndian.AppendUint32(b, most)
}

// allFakeFlags offers every command, block status payloads aside.
const allFakeFlags = FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes | FlagSendDF | FlagSendCache | FlagSendFastZero | FlagCanMultiConn

// The metadata contexts of the fake server.
const (
	fakeAllocationID = 7
	fakeDirtyID      = 9
	fakeDirty        = "qemu:dirty-bitmap:x"
)

// fakeSize is the size of the fake export.
const fakeSize = 1 << 20

// negotiate plays a good server that has the given headers, up to transmission.
func (f *fakePeer) negotiate(headers Headers, flags TransmissionFlags, infos ...[]byte) {
	f.greet(handshakeFixedNewstyle | handshakeNoZeroes)
	for {
		switch opt, data := f.readOption(); {
		case opt == optExtendedHeaders && headers == HeadersExtended, opt == optStructuredReply && headers == HeadersStructured:
			f.headers = headers
			f.reply(opt, repAck, nil)
		case opt == optSetMetaContext && headers != HeadersSimple:
			for _, query := range fakeQueries(data) {
				switch query {
				case ContextAllocation:
					f.reply(opt, repMetaContext, fakeContext(fakeAllocationID, query))
				case fakeDirty:
					f.reply(opt, repMetaContext, fakeContext(fakeDirtyID, query))
				}
			}
			f.reply(opt, repAck, nil)
		case opt == optGo:
			f.reply(opt, repInfo, fakeInfoExport(fakeSize, flags))
			for _, info := range infos {
				f.reply(opt, repInfo, info)
			}
			f.reply(opt, repAck, nil)
			return
		default:
			f.reply(opt, repErrUnsupported, nil)
		}
	}
}

// fakeQueries are the queries in the data of SET_META_CONTEXT.
func fakeQueries(data []byte) (queries []string) {
	data = data[4+binary.BigEndian.Uint32(data):]
	for data = data[4:]; len(data) > 0; {
		n := binary.BigEndian.Uint32(data)
		queries = append(queries, string(data[4:4+n]))
		data = data[4+n:]
	}
	return queries
}

// request reads one request into q, whose payload's memory it reuses.
func (f *fakePeer) request(q *fakeRequest) {
	size, want := sizeRequest, magicRequest
	if f.headers == HeadersExtended {
		size, want = sizeRequestExtended, magicRequestExtended
	}
	b, err := f.in.Peek(size)
	if err != nil {
		panic(err)
	}
	if magic := binary.BigEndian.Uint32(b); magic != want {
		panic(fmt.Errorf("request begins with %#x", magic))
	}
	q.flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	q.command = Command(binary.BigEndian.Uint16(b[6:]))
	q.cookie = binary.BigEndian.Uint64(b[8:])
	q.offset = binary.BigEndian.Uint64(b[16:])
	q.length = uint64(binary.BigEndian.Uint32(b[24:]))
	if size == sizeRequestExtended {
		q.length = binary.BigEndian.Uint64(b[24:])
	}
	if _, err := f.in.Discard(size); err != nil {
		panic(err)
	}
	q.payload = q.payload[:0]
	if q.command == CommandWrite || q.flags&CommandFlagPayloadLen != 0 {
		if q.length > payloadMax {
			panic(fmt.Errorf("payload of %d bytes", q.length))
		}
		if uint64(cap(q.payload)) < q.length {
			q.payload = make([]byte, q.length)
		}
		q.payload = f.read(q.payload[:q.length])
	}
}

// next reads one request.
func (f *fakePeer) next() *fakeRequest {
	q := new(fakeRequest)
	f.request(q)
	return q
}

// simple sends a simple reply.
func (f *fakePeer) simple(cookie uint64, errno Error, data []byte) {
	f.out = appendFakeSimple(f.out[:0], cookie, errno, data)
	f.write(f.out)
}

func appendFakeSimple(b []byte, cookie uint64, errno Error, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, uint32(errno))
	b = binary.BigEndian.AppendUint64(b, cookie)
	return append(b, data...)
}

// chunk sends a chunk in reply to q, whose payload is the parts in a row.
func (f *fakePeer) chunk(q *fakeRequest, flags, kind uint16, head, tail []byte) {
	f.out = appendFakeChunk(f.out[:0], f.headers, q, flags, kind, head, tail)
	f.write(f.out)
}

func appendFakeChunk(b []byte, headers Headers, q *fakeRequest, flags, kind uint16, head, tail []byte) []byte {
	b = appendFakeChunkHeader(b, headers, q, flags, kind, uint64(len(head)+len(tail)))
	b = append(b, head...)
	return append(b, tail...)
}

func appendFakeChunkHeader(b []byte, headers Headers, q *fakeRequest, flags, kind uint16, length uint64) []byte {
	if headers == HeadersExtended {
		b = binary.BigEndian.AppendUint32(b, magicExtendedReply)
	} else {
		b = binary.BigEndian.AppendUint32(b, magicStructuredReply)
	}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, q.cookie)
	if headers == HeadersExtended {
		b = binary.BigEndian.AppendUint64(b, q.offset)
		return binary.BigEndian.AppendUint64(b, length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// ok replies that a command without a result succeeded.
func (f *fakePeer) ok(q *fakeRequest) {
	if f.headers == HeadersSimple {
		f.simple(q.cookie, ErrnoOK, nil)
		return
	}
	f.chunk(q, chunkFlagDone, chunkNone, nil, nil)
}

// be16, be32 and be64 write numbers of one width in a row.
func be16(b []byte, n ...uint16) []byte {
	for _, v := range n {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return b
}

func be32(b []byte, n ...uint32) []byte {
	for _, v := range n {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func be64(b []byte, n ...uint64) []byte {
	for _, v := range n {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// serveMemory plays a good server with a memory export until the client leaves.
// With a nil random it answers in order and in one piece, and allocates nothing;
// else replies are reordered and reads come in pieces, in any order, zeros as
// holes.
func (f *fakePeer) serveMemory(memory []byte, random *rand.Rand) {
	var q fakeRequest
	var replies [][]byte
	var out, head []byte
	for {
		if random != nil && len(replies) > 0 && (f.in.Buffered() == 0 || random.IntN(4) == 0) {
			random.Shuffle(len(replies), func(i, j int) { replies[i], replies[j] = replies[j], replies[i] })
			for _, reply := range replies {
				f.write(reply)
			}
			replies = replies[:0]
		}
		f.request(&q)
		out = out[:0]
		switch q.command {
		case CommandDisconnect:
			return
		case CommandWrite:
			copy(memory[q.offset:], q.payload)
		case CommandWriteZeroes, CommandTrim:
			clear(memory[q.offset:][:q.length])
		case CommandRead:
			data := memory[q.offset:][:q.length]
			switch {
			case f.headers == HeadersSimple:
				out = appendFakeSimple(out, q.cookie, ErrnoOK, data)
			case random == nil || q.flags&CommandFlagDF != 0:
				head = be64(head[:0], q.offset)
				out = appendFakeChunk(out, f.headers, &q, chunkFlagDone, chunkOffsetData, head, data)
			default:
				out = appendFakePieces(out, f.headers, &q, data, random)
			}
		case CommandBlockStatus:
			length := q.length
			if q.flags&CommandFlagPayloadLen != 0 {
				length = binary.BigEndian.Uint64(q.payload)
			}
			for i, id := range []uint32{fakeAllocationID, fakeDirtyID} {
				if q.flags&CommandFlagPayloadLen != 0 && binary.BigEndian.Uint32(q.payload[8:]) != id {
					continue
				}
				head = be32(head[:0], id)
				kind := chunkBlockStatus
				if f.headers == HeadersExtended && i == 0 {
					kind = chunkBlockStatusExt
					head = be64(be32(head, 1), length, 1<<40|3)
				} else {
					head = be32(head, uint32(min(length, 1<<16)), 1)
				}
				out = appendFakeChunk(out, f.headers, &q, 0, kind, head, nil)
			}
			out = appendFakeChunk(out, f.headers, &q, chunkFlagDone, chunkNone, nil, nil)
		}
		if len(out) == 0 {
			if f.headers == HeadersSimple {
				out = appendFakeSimple(out, q.cookie, ErrnoOK, nil)
			} else {
				out = appendFakeChunk(out, f.headers, &q, chunkFlagDone, chunkNone, nil, nil)
			}
		}
		if random == nil {
			f.write(out)
		} else {
			replies = append(replies, append([]byte(nil), out...))
		}
	}
}

// appendFakePieces answers a read in pieces of random sizes and order.
func appendFakePieces(b []byte, headers Headers, q *fakeRequest, data []byte, random *rand.Rand) []byte {
	var cuts [][2]int
	for at := 0; at < len(data); {
		n := min(1+random.IntN(len(data)), len(data)-at)
		cuts = append(cuts, [2]int{at, at + n})
		at += n
	}
	random.Shuffle(len(cuts), func(i, j int) { cuts[i], cuts[j] = cuts[j], cuts[i] })
	last := random.IntN(2) == 0 // DONE on the last piece, or on an empty chunk
	for i, cut := range cuts {
		flags := uint16(0)
		if last && i == len(cuts)-1 {
			flags = chunkFlagDone
		}
		piece := data[cut[0]:cut[1]]
		offset := be64(nil, q.offset+uint64(cut[0]))
		if allZero(piece) {
			b = appendFakeChunk(b, headers, q, flags, chunkOffsetHole, offset, be32(nil, uint32(len(piece))))
		} else {
			b = appendFakeChunk(b, headers, q, flags, chunkOffsetData, offset, piece)
		}
	}
	if !last {
		b = appendFakeChunk(b, headers, q, chunkFlagDone, chunkNone, nil, nil)
	}
	return b
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// memoryServer is a fakeServer with an export of fakeSize bytes.
func memoryServer(t testing.TB, headers Headers, random *rand.Rand) (address string) {
	memory := make([]byte, fakeSize)
	return fakeServer(t, func(f *fakePeer) {
		flags := allFakeFlags
		if headers == HeadersExtended {
			flags |= FlagBlockStatusPayload
		}
		f.negotiate(headers, flags)
		f.serveMemory(memory, random)
	})
}

// dialFake connects a client that is closed at the end of the test.
func dialFake(t testing.TB, address string, options Options) *Client {
	t.Helper()
	c, err := Dial(t.Context(), "unix", address, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // the tests look at the errors they are about
	return c
}
