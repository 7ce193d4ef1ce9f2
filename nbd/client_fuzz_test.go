package nbd

import (
	"bufio"
	"bytes"
	"net"
	"testing"
	"time"
)

// bytesConn is a connection whose peer says data and listens to nothing.
type bytesConn struct{ *bytes.Reader }

func (bytesConn) Write(p []byte) (int, error)      { return len(p), nil }
func (bytesConn) Close() error                     { return nil }
func (bytesConn) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (bytesConn) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (bytesConn) SetDeadline(time.Time) error      { return nil }
func (bytesConn) SetReadDeadline(time.Time) error  { return nil }
func (bytesConn) SetWriteDeadline(time.Time) error { return nil }

// fuzzGreeting is a server's greeting.
func fuzzGreeting(flags uint16) []byte {
	return be16(be64(nil, magicInit, magicOption), flags)
}

func FuzzClientHandshake(f *testing.F) {
	const fixed = handshakeFixedNewstyle | handshakeNoZeroes
	answers := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{fuzzGreeting(fixed)}, parts...), nil) }
	ack := func(opt option) []byte { return appendFakeReply(nil, opt, repAck, nil) }
	refused := func(opt option) []byte { return appendFakeReply(nil, opt, repErrUnsupported, []byte("no")) }
	export := func(opt option) []byte {
		return appendFakeReply(nil, opt, repInfo, fakeInfoExport(fakeSize, allFakeFlags))
	}
	const open, list, inquire = 0, 1, 2
	f.Add(uint8(open), answers(ack(optExtendedHeaders), appendFakeReply(nil, optSetMetaContext, repMetaContext, fakeContext(1, ContextAllocation)),
		ack(optSetMetaContext), export(optGo), appendFakeReply(nil, optGo, repInfo, fakeBlocks(512, 4096, 1<<20)), ack(optGo)))
	f.Add(uint8(open), answers(refused(optExtendedHeaders), ack(optStructuredReply), refused(optSetMetaContext), export(optGo), ack(optGo)))
	f.Add(uint8(open), answers(refused(optExtendedHeaders), refused(optStructuredReply), refused(optGo), be16(be64(nil, fakeSize), 1)))
	f.Add(uint8(open), append(be16(be64(fuzzGreeting(0), fakeSize), 1), make([]byte, exportNameZeroes)...))
	f.Add(uint8(open), be64(nil, magicInit, magicOldstyle, 0, 0))
	f.Add(uint8(list), answers(appendFakeReply(nil, optList, repServer, append(appendOptionString(nil, "name"), "description"...)), ack(optList), ack(optAbort)))
	f.Add(uint8(inquire), answers(ack(optExtendedHeaders), export(optInfo), appendFakeReply(nil, optInfo, repInfo, append(be16(nil, infoName), "n"...)), ack(optInfo),
		appendFakeReply(nil, optListMetaContext, repMetaContext, fakeContext(0, ContextAllocation)), ack(optListMetaContext), ack(optAbort)))
	f.Fuzz(func(t *testing.T, what uint8, data []byte) {
		options := Options{Export: "x", MetaContexts: []string{ContextAllocation, "qemu:"}}
		if err := options.setDefaults(); err != nil {
			t.Fatal(err)
		}
		rest := (*clientHandshake).open
		switch what % 3 {
		case list:
			rest = func(h *clientHandshake) error { _, err := h.list(); return err }
		case inquire:
			rest = (*clientHandshake).inquire
		}
		h, err := negotiateClient(t.Context(), bytesConn{bytes.NewReader(data)}, &options, rest)
		if err != nil {
			return
		}
		if h.info.Size > clientSizeMax || len(h.contexts) > clientContextsMax || h.info.BlockMin > clientBlockMin {
			t.Errorf("accepted %+v with %d contexts", h.info, len(h.contexts))
		}
	})
}

// The requests of FuzzClientReplies, by the index of their slot.
var fuzzRequests = []Request{
	{Command: CommandRead, Offset: 4096, Length: 600},
	{Command: CommandRead, Offset: 0, Length: 16, Flags: CommandFlagDF},
	{Command: CommandWrite, Offset: 512, Length: 32},
	{Command: CommandBlockStatus, Offset: 1024, Length: 8192},
	{Command: CommandBlockStatus, Offset: 0, Length: 512, Flags: CommandFlagReqOne},
	{Command: CommandFlush},
	{Command: CommandRead, Offset: 8192, Length: 64}, // abandoned
}

const fuzzAbandoned = 6

// addReplySeeds adds replies to fuzzRequests, in every form.
func addReplySeeds(f *testing.F) {
	query := func(i int) *fakeRequest {
		return &fakeRequest{cookie: 1<<32 | uint64(i), offset: fuzzRequests[i].Offset}
	}
	f.Add(uint8(HeadersSimple), bytes.Join([][]byte{
		appendFakeSimple(nil, query(0).cookie, ErrnoOK, make([]byte, 600)), appendFakeSimple(nil, query(2).cookie, ErrnoOK, nil), appendFakeSimple(nil, query(5).cookie, ErrnoIO, nil),
		appendFakeSimple(nil, query(fuzzAbandoned).cookie, ErrnoOK, make([]byte, 64)),
	}, nil))
	for _, headers := range []Headers{HeadersStructured, HeadersExtended} {
		chunk := func(i int, flags, kind uint16, head, tail []byte) []byte {
			return appendFakeChunk(nil, headers, query(i), flags, kind, head, tail)
		}
		f.Add(uint8(headers), bytes.Join([][]byte{
			chunk(0, 0, chunkOffsetData, be64(nil, 4096+100), make([]byte, 500)), chunk(1, chunkFlagDone, chunkOffsetData, be64(nil, 0), make([]byte, 16)),
			chunk(0, 0, chunkOffsetHole, be64(nil, 4096), be32(nil, 100)), chunk(5, chunkFlagDone, chunkNone, nil, nil), chunk(0, chunkFlagDone, chunkNone, nil, nil),
			chunk(fuzzAbandoned, chunkFlagDone, chunkOffsetData, be64(nil, 8192), make([]byte, 64)),
		}, nil))
		f.Add(uint8(headers), bytes.Join([][]byte{
			chunk(3, 0, chunkBlockStatus, be32(nil, fakeAllocationID), be32(nil, 4096, 1, 1<<20, 3)), chunk(3, chunkFlagDone, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, 8192, 1)),
			chunk(4, 0, chunkErrorOffset, be16(be32(nil, 5), 0), be64(nil, 1)), chunk(4, chunkFlagDone, chunkError, append(be16(be32(nil, 22), 2), "no"...), nil),
			chunk(2, chunkFlagDone, chunkErrorBit|9, be16(be32(nil, 75), 0), make([]byte, 9)),
		}, nil))
	}
	f.Add(uint8(HeadersExtended), appendFakeChunk(nil, HeadersExtended, query(3), chunkFlagDone, chunkBlockStatusExt, be32(nil, fakeDirtyID, 2), be64(nil, 4096, 1<<40, 1<<50, 2)))
}

func FuzzClientReplies(f *testing.F) {
	addReplySeeds(f)
	in := bufio.NewReaderSize(nil, clientReadBuffer) // a process runs one input at a time
	f.Fuzz(func(t *testing.T, headers uint8, data []byte) {
		options := Options{Depth: len(fuzzRequests)}
		if err := options.setDefaults(); err != nil {
			t.Fatal(err)
		}
		in.Reset(bytes.NewReader(data))
		h := &clientHandshake{
			conn: bytesConn{}, in: in, options: &options, headers: Headers(headers % 3), info: ExportInfo{Size: fakeSize, Flags: allFakeFlags},
			contexts: []Context{{fakeAllocationID, ContextAllocation}, {fakeDirtyID, fakeDirty}},
		}
		c := newClient(h)
		const guard = 64
		buffers := make([][]byte, len(fuzzRequests))
		requests := make([]Request, len(fuzzRequests))
		ended := make([]int, len(fuzzRequests))
		for i := range requests {
			r := &requests[i]
			*r = fuzzRequests[i]
			if r.Command == CommandRead || r.Command == CommandWrite {
				buffers[i] = bytes.Repeat([]byte{0xee}, guard+int(r.Length)+guard)
				r.Buf = buffers[i][guard:][:r.Length]
			}
			r.Done = func(*Request) { ended[i]++ }
			c.mu.Lock()
			s := c.takeSlotLocked(r)
			c.mu.Unlock()
			if s.cookie != 1<<32|uint64(i) {
				t.Fatalf("request %d has cookie %#x", i, s.cookie)
			}
		}
		if !c.abandon(&requests[fuzzAbandoned]) {
			t.Fatal("cannot abandon")
		}
		if err := c.readReplies(); err == nil {
			t.Fatal("the end of the stream is no error")
		}
		for i := range requests {
			r := &requests[i]
			if ended[i] > 1 || i == fuzzAbandoned && ended[i] > 0 {
				t.Errorf("request %d ended %d times", i, ended[i])
			}
			if b := buffers[i]; b != nil {
				edge := bytes.Repeat([]byte{0xee}, guard)
				if !bytes.Equal(b[:guard], edge) || !bytes.Equal(b[len(b)-guard:], edge) || i == fuzzAbandoned && !bytes.Equal(r.Buf[:guard], edge) {
					t.Errorf("request %d: its data went elsewhere", i)
				}
			}
			if ended[i] == 0 || r.Err != nil || r.Command != CommandBlockStatus {
				continue
			}
			if len(r.Statuses) != 2 {
				t.Errorf("request %d: %d contexts", i, len(r.Statuses))
			}
			for _, status := range r.Statuses {
				at := r.Offset
				for _, extent := range status.Extents {
					if at += extent.Length; extent.Length == 0 || at > fakeSize {
						t.Errorf("request %d: extents %v", i, status.Extents)
					}
				}
			}
		}
	})
}
