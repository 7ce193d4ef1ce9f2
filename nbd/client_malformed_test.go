package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"
)

// TestClientDiesOfViolations sends one wrong reply and wants the violation named
// in the result of every request, then and later.
func TestClientDiesOfViolations(t *testing.T) {
	const offset, length = 4096, 8192
	read := Request{Command: CommandRead, Offset: offset, Length: length, Buf: make([]byte, length)}
	readDF := read
	readDF.Flags = CommandFlagDF
	write := Request{Command: CommandWrite, Offset: offset, Length: length, Buf: make([]byte, length)}
	status := Request{Command: CommandBlockStatus, Offset: offset, Length: length}
	statusOne := status
	statusOne.Flags = CommandFlagReqOne
	data := make([]byte, length)
	const done = chunkFlagDone
	const chunked = -1 // with structured headers and with extended ones

	for _, tt := range []struct {
		name    string
		headers int
		r       Request
		reply   func(*fakePeer, *fakeRequest)
		want    string
	}{
		{"no magic", chunked, read, func(f *fakePeer, _ *fakeRequest) { f.write(make([]byte, 64)) }, "begins with 0x0"},
		{"no magic, simple", int(HeadersSimple), read, func(f *fakePeer, _ *fakeRequest) { f.write(make([]byte, 64)) }, "begins with 0x0"},
		{"chunk to simple headers", int(HeadersSimple), read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkOffsetData, be64(nil, offset), data)
		}, "begins with 0x668e33ef, with simple"},
		{"structured reply to extended headers", int(HeadersExtended), write, func(f *fakePeer, q *fakeRequest) {
			f.headers = HeadersStructured
			f.chunk(q, done, chunkNone, nil, make([]byte, 12))
		}, "begins with 0x668e33ef, with extended"},
		{"extended reply to structured headers", int(HeadersStructured), write, func(f *fakePeer, q *fakeRequest) {
			f.headers = HeadersExtended
			f.chunk(q, done, chunkNone, nil, nil)
		}, "begins with 0x6e8a278c, with structured"},
		{"simple reply to extended headers", int(HeadersExtended), write, func(f *fakePeer, q *fakeRequest) {
			f.simple(q.cookie, ErrnoOK, make([]byte, 16))
		}, "begins with 0x67446698, with extended"},
		{"simple reply to a read", int(HeadersStructured), read, func(f *fakePeer, q *fakeRequest) {
			f.simple(q.cookie, ErrnoOK, data)
		}, "simple reply to a read"},
		{"simple error to a read", int(HeadersStructured), read, func(f *fakePeer, q *fakeRequest) {
			f.simple(q.cookie, ErrnoIO, nil)
		}, "simple reply to a read"},
		{"simple reply to a block status", int(HeadersStructured), status, func(f *fakePeer, q *fakeRequest) {
			f.simple(q.cookie, ErrnoOK, nil)
		}, "simple reply to a successful block status"},
		{"simple reply behind chunks", int(HeadersStructured), status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkBlockStatus, be32(nil, fakeAllocationID), be32(nil, length, 0))
			f.simple(q.cookie, ErrnoIO, nil)
		}, "behind chunks"},
		{"unknown cookie, simple", int(HeadersSimple), read, func(f *fakePeer, q *fakeRequest) {
			f.simple(q.cookie^0x100, ErrnoOK, data)
		}, "unknown cookie"},
		{"unknown cookie", chunked, read, func(f *fakePeer, q *fakeRequest) {
			q.cookie = math.MaxUint64
			f.chunk(q, done, chunkOffsetData, be64(nil, offset), data)
		}, "unknown cookie"},
		{"cookie of another generation", chunked, read, func(f *fakePeer, q *fakeRequest) {
			q.cookie += 1 << 32
			f.chunk(q, done, chunkOffsetData, be64(nil, offset), data)
		}, "unknown cookie"},
		{"second reply", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.ok(q)
			f.ok(q)
		}, "unknown cookie"},
		{"second reply, simple", int(HeadersSimple), write, func(f *fakePeer, q *fakeRequest) {
			f.ok(q)
			f.ok(q)
		}, "unknown cookie"},
		{"chunk behind DONE", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkOffsetData, be64(nil, offset), data)
			f.chunk(q, done, chunkNone, nil, nil)
		}, "unknown cookie"},
		{"wrong offset", int(HeadersExtended), write, func(f *fakePeer, q *fakeRequest) {
			q.offset++
			f.ok(q)
		}, "reply for offset 4097 to a request at 4096"},
		{"unknown chunk", chunked, read, func(f *fakePeer, q *fakeRequest) { f.chunk(q, done, 99, nil, nil) }, "chunk of type 99"},
		{"data in reply to a write", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkOffsetData, be64(nil, offset), data)
		}, "chunk of type 1 in reply to command 1"},
		{"hole in reply to a write", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkOffsetHole, be64(nil, offset), be32(nil, 1))
		}, "chunk of type 2 in reply to command 1"},
		{"status in reply to a read", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeAllocationID), be32(nil, length, 0))
		}, "chunk of type 5 in reply to command 0"},
		{"extended status with structured headers", int(HeadersStructured), status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatusExt, be32(nil, fakeAllocationID, 1), be64(nil, length, 0))
		}, "chunk of type 6"},
		{"empty chunk with a payload", chunked, write, func(f *fakePeer, q *fakeRequest) { f.chunk(q, done, chunkNone, nil, []byte{1}) }, "empty chunk with 1 bytes"},
		{"empty chunk without DONE", chunked, write, func(f *fakePeer, q *fakeRequest) { f.chunk(q, 0, chunkNone, nil, nil) }, "not the last"},
		{"huge chunk", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.write(appendFakeChunkHeader(nil, f.headers, q, 0, chunkOffsetData, math.MaxUint32))
		}, "data chunk of 4294967295 bytes"},
		{"endless chunk", int(HeadersExtended), read, func(f *fakePeer, q *fakeRequest) {
			f.write(appendFakeChunkHeader(nil, f.headers, q, 0, chunkOffsetData, math.MaxUint64))
		}, "data chunk of 18446744073709551615 bytes"},
		{"data chunk without data", chunked, read, func(f *fakePeer, q *fakeRequest) { f.chunk(q, 0, chunkOffsetData, be64(nil, offset), nil) }, "data chunk of 8 bytes"},
		{"data before the range", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset-1), data[:2])
		}, "data for 2 bytes at 4095"},
		{"data past the range", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset+length-1), data[:2])
		}, "data for 2 bytes at 12287"},
		{"data far past the range", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, math.MaxUint64), data[:2])
		}, "data for 2 bytes at 18446744073709551615"},
		{"data twice", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset), data[:1024])
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset+1023), data[:1024])
		}, "arrived twice"},
		{"hole over data", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset+512), data[:1])
			f.chunk(q, 0, chunkOffsetHole, be64(nil, offset), be32(nil, 513))
		}, "arrived twice"},
		{"data missing", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkOffsetData, be64(nil, offset), data[:length-1])
		}, "ends before its data"},
		{"gap", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset), data[:1024])
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset+1025), data[:length-1025])
			f.chunk(q, done, chunkNone, nil, nil)
		}, "ends before its data"},
		{"no data", chunked, read, func(f *fakePeer, q *fakeRequest) { f.ok(q) }, "ends before its data"},
		{"hole of no length", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetHole, be64(nil, offset), be32(nil, 0))
		}, "empty hole"},
		{"hole of the wrong size", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetHole, be64(nil, offset), be64(nil, 1))
		}, "hole chunk of 16 bytes"},
		{"hole past the range", chunked, read, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetHole, be64(nil, offset+1), be32(nil, length))
		}, "data for 8192 bytes at 4097"},
		{"two chunks with DF", chunked, readDF, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, offset), data[:512])
			f.chunk(q, done, chunkOffsetData, be64(nil, offset+512), data[512:])
		}, "with DF"},
		{"short error chunk", chunked, write, func(f *fakePeer, q *fakeRequest) { f.chunk(q, done, chunkError, be32(nil, 5), nil) }, "error chunk of 4 bytes"},
		{"huge error chunk", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.write(appendFakeChunkHeader(nil, f.headers, q, done, chunkErrorBit|50, 1<<20))
		}, "error chunk of 1048576 bytes"},
		{"error chunk without an error", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkError, be16(be32(nil, 0), 0), nil)
		}, "without an error"},
		{"error message too long", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkError, be16(be32(nil, 5), stringMax+1), make([]byte, stringMax+1))
		}, "a message of 4097"},
		{"error message longer than its chunk", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkError, be16(be32(nil, 5), 3), []byte{1})
		}, "a message of 3"},
		{"error message shorter than its chunk", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkError, be16(be32(nil, 5), 3), make([]byte, 4))
		}, "a message of 3"},
		{"error offset missing", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkErrorOffset, be16(be32(nil, 5), 0), nil)
		}, "error chunk of 6 bytes"},
		{"error outside the request", chunked, write, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkErrorOffset, be16(be32(nil, 5), 0), be64(nil, offset+length))
		}, "an error at 12288"},
		{"status for an unknown context", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, 1), be32(nil, length, 0))
		}, "context 1, which was not asked for"},
		{"status twice", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, length, 0))
			f.chunk(q, 0, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, length, 0))
		}, "second block status for context 9"},
		{"status missing", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, length, 0))
		}, "lacks a context"},
		{"no status", chunked, status, func(f *fakePeer, q *fakeRequest) { f.ok(q) }, "lacks a context"},
		{"status without extents", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), nil)
		}, "block status chunk of 4 bytes"},
		{"status of an odd size", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, 1, 2, 3))
		}, "block status chunk of 16 bytes"},
		{"status with too many extents", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.write(appendFakeChunkHeader(nil, f.headers, q, done, chunkBlockStatus, 4+8*(extentsMax+1)))
		}, "block status chunk of 8388620 bytes"},
		{"extended status with a wrong count", int(HeadersExtended), status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatusExt, be32(nil, fakeDirtyID, 2), be64(nil, length, 0))
		}, "1 descriptors that says 2"},
		{"extended status of an odd size", int(HeadersExtended), status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatusExt, be32(nil, fakeDirtyID, 0), be64(nil, length, 0, 1))
		}, "block status chunk of 32 bytes"},
		{"extent of no length", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, 0, 1))
		}, "extent of length 0"},
		{"extents past the end of the request", chunked, status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, length, 1, 512, 0))
		}, "goes on past the end"},
		{"extents that overflow", int(HeadersExtended), status, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatusExt, be32(nil, fakeDirtyID, 0), be64(nil, 512, 1, math.MaxUint64-511, 0, 512, 0))
		}, "goes on past the end"},
		{"more than one extent", chunked, statusOne, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, 512, 1, 512, 0))
		}, "2 extents in reply to a request for one"},
		{"one extent that is too long", chunked, statusOne, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, done, chunkBlockStatus, be32(nil, fakeDirtyID), be32(nil, length+1, 1))
		}, "one extent of 8193 bytes"},
	} {
		forms := []Headers{Headers(tt.headers)}
		if tt.headers == chunked {
			forms = []Headers{HeadersStructured, HeadersExtended}
		}
		for _, headers := range forms {
			t.Run(tt.name+"/"+headers.String(), func(t *testing.T) {
				checkClientGoroutines(t)
				c := dialFake(t, fakeServer(t, func(f *fakePeer) {
					f.negotiate(headers, allFakeFlags)
					q := f.next()
					f.next() // a flush, never answered
					tt.reply(f, q)
					f.wait()
				}), Options{MetaContexts: []string{ContextAllocation, fakeDirty}})
				first := tt.r
				results := make(chan error, 2)
				first.Done = func(r *Request) { results <- r.Err }
				second := Request{Command: CommandFlush, Done: first.Done}
				c.Submit(&first)
				c.Submit(&second)
				<-results
				err := <-results // a reply may have been good for one of them
				if broken := new(ViolationError); !errors.As(err, &broken) || !strings.Contains(broken.What, tt.want) {
					t.Fatalf("got %v, want %q", err, tt.want)
				}
				<-c.Done()
				if c.Err() != err {
					t.Errorf("Err: %v", c.Err())
				}
				if late := submitAndWait(c, &Request{Command: CommandFlush}); late != err {
					t.Errorf("a later request: %v", late)
				}
				if closing := c.Close(); closing != err {
					t.Errorf("Close: %v", closing)
				}
			})
		}
	}
}

// infiniteData is too long for any reply; only its header is sent.
const infiniteData = math.MaxUint32

// fakeReplyHeader is the header of a reply to an option that promises length bytes.
func fakeReplyHeader(opt option, kind optionReply, length uint32) []byte {
	b := appendFakeReply(nil, opt, kind, nil)
	binary.BigEndian.PutUint32(b[16:], length)
	return b
}

func TestClientHandshakeRefusesNonsense(t *testing.T) {
	const fixed = handshakeFixedNewstyle | handshakeNoZeroes
	// toGo plays up to GO with the given headers and answers it with replies.
	toGo := func(replies func(*fakePeer)) func(*fakePeer) {
		return func(f *fakePeer) {
			f.greet(fixed)
			f.wantOption(optExtendedHeaders)
			f.reply(optExtendedHeaders, repErrUnsupported, nil)
			f.wantOption(optStructuredReply)
			f.reply(optStructuredReply, repAck, nil)
			f.wantOption(optSetMetaContext)
			f.reply(optSetMetaContext, repAck, nil)
			f.wantOption(optGo)
			replies(f)
			f.wait()
		}
	}
	contexts := func(replies func(*fakePeer)) func(*fakePeer) {
		return func(f *fakePeer) {
			f.greet(fixed)
			f.wantOption(optExtendedHeaders)
			f.reply(optExtendedHeaders, repAck, nil)
			f.wantOption(optSetMetaContext)
			replies(f)
			f.reply(optSetMetaContext, repAck, nil)
			f.wait()
		}
	}
	info := func(data []byte) func(*fakePeer) {
		return toGo(func(f *fakePeer) {
			f.reply(optGo, repInfo, data)
			f.reply(optGo, repAck, nil)
		})
	}
	for _, tt := range []struct {
		name   string
		script func(*fakePeer)
		want   string
	}{
		{"no greeting", func(f *fakePeer) {}, "unexpected EOF"},
		{"not NBD", func(f *fakePeer) { f.write([]byte("SSH-2.0-OpenSSH_10.0\r\n")) }, "not an NBD server"},
		{"oldstyle", func(f *fakePeer) { f.write(append(be64(nil, magicInit, magicOldstyle), make([]byte, 136)...)) }, "oldstyle"},
		{"unknown style", func(f *fakePeer) { f.write(be64(nil, magicInit, 77, 0)) }, "goes on with 0x4d"},
		{"no reply magic", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.write(make([]byte, sizeOptionReplyHeader))
			f.wait()
		}, "option reply begins with 0x0"},
		{"reply to another option", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.reply(optList, repAck, nil)
			f.wait()
		}, "reply to option 3 while 11 was sent"},
		{"unknown reply", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.reply(optExtendedHeaders, 50, nil)
			f.wait()
		}, "reply of type 50"},
		{"wrong reply", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.reply(optExtendedHeaders, repServer, make([]byte, 8))
			f.wait()
		}, "reply of type 2"},
		{"ACK with data", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.reply(optExtendedHeaders, repAck, []byte{1})
			f.wait()
		}, "has 1 bytes (at most 0)"},
		{"endless error", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.write(fakeReplyHeader(optExtendedHeaders, repErrPolicy, infiniteData))
			f.wait()
		}, "has 4294967295 bytes (at most 4096)"},
		{"shutting down", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.reply(optExtendedHeaders, repErrShutdown, nil)
			f.wait()
		}, "shutting down"},
		{"TLS wanted", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
			f.reply(optExtendedHeaders, repErrTLSRequired, []byte("please"))
			f.wait()
		}, `TLS required ("please")`},
		{"unknown export", toGo(func(f *fakePeer) { f.reply(optGo, repErrUnknown, nil) }), "unknown export"},
		{"no INFO_EXPORT", toGo(func(f *fakePeer) { f.reply(optGo, repAck, nil) }), "GO without INFO_EXPORT"},
		{"endless INFO", toGo(func(f *fakePeer) { f.write(fakeReplyHeader(optGo, repInfo, infiniteData)) }), "at most 4098"},
		{"too many INFOs", toGo(func(f *fakePeer) {
			for range clientInfosMax + 1 {
				f.reply(optGo, repInfo, be16(nil, 99))
			}
		}), "more than 64 replies"},
		{"empty INFO", info([]byte{0}), "information of 1 bytes"},
		{"short INFO_EXPORT", info(be16(nil, infoExport, 0)), "INFO_EXPORT of 4 bytes"},
		{"long INFO_EXPORT", info(append(fakeInfoExport(1, 1), 0)), "INFO_EXPORT of 13 bytes"},
		{"size over 2^63", info(fakeInfoExport(1<<63, 1)), "export of 9223372036854775808 bytes"},
		{"short block sizes", info(be16(nil, infoBlockSize, 1)), "INFO_BLOCK_SIZE of 4 bytes"},
		{"zero block size", info(fakeBlocks(0, 4096, 1<<20)), "block sizes 0"},
		{"odd block size", info(fakeBlocks(513, 4096, 1<<20)), "block sizes 513"},
		{"large block size", info(fakeBlocks(128<<10, 128<<10, 1<<20)), "block sizes 131072"},
		{"odd preferred size", info(fakeBlocks(512, 4097, 1<<20)), "block sizes 512, 4097"},
		{"preferred under minimum", info(fakeBlocks(4096, 512, 1<<20)), "block sizes 4096, 512"},
		{"payload under preferred", info(fakeBlocks(512, 4096, 512)), "block sizes 512, 4096, 512"},
		{"extended headers without GO", func(f *fakePeer) {
			f.greet(fixed)
			f.wantOption(optExtendedHeaders)
			f.reply(optExtendedHeaders, repAck, nil)
			f.wantOption(optSetMetaContext)
			f.reply(optSetMetaContext, repErrInvalid, nil)
			f.wantOption(optGo)
			f.reply(optGo, repErrUnsupported, nil)
			f.wait()
		}, "extended headers without GO"},
		{"short context", contexts(func(f *fakePeer) { f.reply(optSetMetaContext, repMetaContext, be32(nil, 1)) }), "metadata context of 4 bytes"},
		{"endless context", contexts(func(f *fakePeer) {
			f.write(fakeReplyHeader(optSetMetaContext, repMetaContext, infiniteData))
		}), "at most 4100"},
		{"context nobody asked for", contexts(func(f *fakePeer) { f.reply(optSetMetaContext, repMetaContext, fakeContext(1, "base:other")) }), "was not asked for"},
		{"context twice", contexts(func(f *fakePeer) {
			f.reply(optSetMetaContext, repMetaContext, fakeContext(1, ContextAllocation))
			f.reply(optSetMetaContext, repMetaContext, fakeContext(2, ContextAllocation))
		}), "appears twice"},
		{"context id twice", contexts(func(f *fakePeer) {
			f.reply(optSetMetaContext, repMetaContext, fakeContext(1, ContextAllocation))
			f.reply(optSetMetaContext, repMetaContext, fakeContext(1, "qemu:a"))
		}), "appears twice"},
		{"too many contexts", contexts(func(f *fakePeer) {
			for i := range uint32(clientContextsMax + 1) {
				f.reply(optSetMetaContext, repMetaContext, fakeContext(i, fmt.Sprintf("qemu:%d", i)))
			}
		}), "more than 64 metadata contexts"},
		{"hang-up at GO", func(f *fakePeer) {
			f.greet(fixed)
			f.readOption()
		}, "unexpected EOF"},
		{"hang-up at EXPORT_NAME", func(f *fakePeer) {
			f.greet(0)
			f.wantOption(optExportName)
		}, `hung up on export "x"`},
		{"size over 2^63 at EXPORT_NAME", func(f *fakePeer) {
			f.greet(handshakeNoZeroes)
			f.wantOption(optExportName)
			f.write(be16(be64(nil, math.MaxUint64), 1))
			f.wait()
		}, "export of 18446744073709551615 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkClientGoroutines(t)
			c, err := Dial(t.Context(), "unix", fakeServer(t, tt.script), Options{Export: "x", MetaContexts: []string{ContextAllocation, "qemu:"}})
			if err == nil {
				_ = c.Close() // the failure is that it exists
				t.Fatal("the handshake succeeded")
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "nbd: ") {
				t.Errorf("got %q, want %q", err, tt.want)
			}
		})
	}
}

func TestClientHandshakeFallsBack(t *testing.T) {
	memory := make([]byte, fakeSize)
	exportName := func(f *fakePeer, zeroes int) {
		if name := f.wantOption(optExportName); string(name) != "x" {
			panic(fmt.Errorf("export %q", name))
		}
		f.write(append(be16(be64(nil, fakeSize), uint16(allFakeFlags)), make([]byte, zeroes)...))
		f.serveMemory(memory, nil)
	}
	for _, tt := range []struct {
		name    string
		options Options
		script  func(*fakePeer)
		headers Headers
		flags   TransmissionFlags
	}{
		{"newstyle that is not fixed", Options{}, func(f *fakePeer) {
			if flags := f.greet(0); flags != 0 {
				panic(fmt.Errorf("client flags %#x", flags))
			}
			exportName(f, exportNameZeroes)
		}, HeadersSimple, allFakeFlags},
		{"no zeroes", Options{}, func(f *fakePeer) {
			if flags := f.greet(handshakeNoZeroes | 1<<9); flags != clientNoZeroes {
				panic(fmt.Errorf("client flags %#x", flags))
			}
			exportName(f, 0)
		}, HeadersSimple, allFakeFlags},
		{"asked for EXPORT_NAME", Options{ExportNameOnly: true}, func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			exportName(f, exportNameZeroes)
		}, HeadersSimple, allFakeFlags},
		{"no GO", Options{}, func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle | handshakeNoZeroes)
			for range 3 {
				opt, _ := f.readOption()
				f.reply(opt, repErrUnsupported, nil)
			}
			exportName(f, 0)
		}, HeadersSimple, allFakeFlags},
		{"no flags", Options{Headers: HeadersSimple}, func(f *fakePeer) {
			f.negotiate(HeadersSimple, FlagSendFlush) // not HAS_FLAGS
			f.serveMemory(memory, nil)
		}, HeadersSimple, 0},
		{"structured when extended is forbidden", Options{}, func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			f.wantOption(optExtendedHeaders)
			f.reply(optExtendedHeaders, repErrPolicy, []byte("no"))
			f.wantOption(optStructuredReply)
			f.reply(optStructuredReply, repAck, nil)
			f.headers = HeadersStructured
			f.wantOption(optGo)
			f.reply(optGo, repInfo, fakeInfoExport(fakeSize, allFakeFlags))
			f.reply(optGo, repInfo, be16(nil, 1234, 5)) // a kind of the future
			f.reply(optGo, repAck, nil)
			f.serveMemory(memory, nil)
		}, HeadersStructured, allFakeFlags},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkClientGoroutines(t)
			tt.options.Export = "x"
			c := dialFake(t, fakeServer(t, tt.script), tt.options)
			if c.Headers() != tt.headers || c.Flags() != tt.flags || c.Size() != fakeSize || len(c.Contexts()) != 0 {
				t.Errorf("headers %s, flags %#x, size %d", c.Headers(), c.Flags(), c.Size())
			}
			if n, err := c.WriteAt([]byte("word"), 5); n != 4 || err != nil {
				t.Error(n, err)
			}
			got := make([]byte, 4)
			if n, err := c.ReadAt(got, 5); n != 4 || err != nil || string(got) != "word" {
				t.Error(n, err, got)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestClientHandshakeIsBoundedInTime(t *testing.T) {
	checkClientGoroutines(t)
	address := fakeServer(t, func(f *fakePeer) {
		f.greet(handshakeFixedNewstyle)
		f.wait()
	})
	if _, err := Dial(t.Context(), "unix", address, Options{HandshakeTimeout: 30 * time.Millisecond}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a timeout: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(30*time.Millisecond, cancel)
	if _, err := Dial(ctx, "unix", address, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context: %v", err)
	}
}

// TestClientRefusesDowngrade lets a server, or somebody on the way to it, refuse
// or break STARTTLS; no option of substance may follow.
func TestClientRefusesDowngrade(t *testing.T) {
	after := func(f *fakePeer) {
		if b, err := io.ReadAll(f.in); err != nil || len(b) > 0 {
			panic(fmt.Errorf("the client went on with % x (%v)", b, err))
		}
	}
	refuse := func(kind optionReply) func(*fakePeer) {
		return func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			f.wantOption(optStartTLS)
			f.reply(optStartTLS, kind, nil)
			after(f)
		}
	}
	for _, tt := range []struct {
		name      string
		script    func(*fakePeer)
		downgrade bool
		want      string
	}{
		{"not supported", refuse(repErrUnsupported), true, "not supported"},
		{"policy", refuse(repErrPolicy), true, "policy"},
		{"invalid", refuse(repErrInvalid), true, "invalid"},
		{"unknown error", refuse(repError | 12345), true, "0x80003039"},
		{"no options", func(f *fakePeer) {
			f.greet(0)
			after(f)
		}, true, "no options"},
		{"plaintext behind the reply", func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			f.wantOption(optStartTLS)
			f.write(appendFakeReply(appendFakeReply(nil, optStartTLS, repAck, nil), optExtendedHeaders, repAck, nil))
			after(f)
		}, false, "20 bytes of plaintext"},
		{"ACK, then no TLS", func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			f.wantOption(optStartTLS)
			f.reply(optStartTLS, repAck, nil)
			f.read(make([]byte, 5))
			f.write(make([]byte, 100))
			f.wait()
		}, false, "tls"},
		{"reply of another type", refuse(repInfo), false, "reply of type 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkClientGoroutines(t)
			address := fakeServer(t, tt.script)
			for _, config := range []*tls.Config{nil, {ServerName: "x"}} {
				_, err := Dial(t.Context(), "unix", address, Options{TLSRequired: true, TLSConfig: config})
				if err == nil || errors.Is(err, ErrDowngrade) != tt.downgrade || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
			}
			if _, err := List(t.Context(), "unix", address, Options{TLSRequired: true}); err == nil {
				t.Error("List went on")
			}
		})
	}
}

func TestClientOpportunisticTLSFallsBack(t *testing.T) {
	for _, flags := range []uint16{0, handshakeFixedNewstyle} {
		address := fakeServer(t, func(f *fakePeer) {
			f.greet(flags)
			if flags != 0 {
				f.wantOption(optStartTLS)
				f.reply(optStartTLS, repErrUnsupported, nil)
			}
			f.wantOption(optExportName)
			f.write(append(be16(be64(nil, fakeSize), uint16(allFakeFlags)), make([]byte, exportNameZeroes)...))
			f.wait()
		})
		c := dialFake(t, address, Options{TLSConfig: &tls.Config{ServerName: "x"}, ExportNameOnly: true})
		if c.TLS() {
			t.Error("TLS without TLS")
		}
	}
}

func TestClientListAndInfo(t *testing.T) {
	checkClientGoroutines(t)
	long := strings.Repeat("d", stringMax)
	address := fakeServer(t, func(f *fakePeer) {
		f.greet(handshakeFixedNewstyle)
		for {
			switch opt, data := f.readOption(); opt {
			case optList:
				f.reply(opt, repServer, appendOptionString(nil, "one"))
				f.reply(opt, repServer, append(appendOptionString(nil, ""), long...))
				f.reply(opt, repAck, nil)
			case optInfo:
				f.reply(opt, repInfo, fakeInfoExport(fakeSize, allFakeFlags))
				f.reply(opt, repInfo, append(be16(nil, infoName), "canonical"...))
				f.reply(opt, repInfo, append(be16(nil, infoDescription), long...))
				f.reply(opt, repInfo, fakeBlocks(1, 4096, 32<<20))
				f.reply(opt, repAck, nil)
			case optListMetaContext:
				if string(data) != string(rawContexts("x")) {
					panic(fmt.Errorf("LIST_META_CONTEXT % x", data))
				}
				f.reply(opt, repMetaContext, fakeContext(0, ContextAllocation))
				f.reply(opt, repMetaContext, fakeContext(0, fakeDirty))
				f.reply(opt, repAck, nil)
			case optAbort:
				f.reply(opt, repAck, nil)
				f.wait()
				return
			default:
				f.reply(opt, repAck, nil)
			}
		}
	})
	exports, err := List(t.Context(), "unix", address, Options{})
	if want := fmt.Sprint([]ListedExport{{"one", ""}, {"", long}}); err != nil || fmt.Sprint(exports) != want {
		t.Errorf("List: %v %v", exports, err)
	}
	info, err := Info(t.Context(), "unix", address, Options{Export: "x"})
	want := ExportInfo{"canonical", long, fakeSize, allFakeFlags, 1, 4096, 32 << 20, []string{ContextAllocation, fakeDirty}}
	if err != nil || fmt.Sprint(info) != fmt.Sprint(want) {
		t.Errorf("Info: %+v %v", info, err)
	}
}

func TestClientListRefusesNonsense(t *testing.T) {
	list := func(replies func(*fakePeer)) func(*fakePeer) {
		return func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			f.wantOption(optList)
			replies(f)
			f.wait()
		}
	}
	huge := append(appendOptionString(nil, ""), make([]byte, stringMax)...)
	for _, tt := range []struct {
		name   string
		script func(*fakePeer)
		want   string
	}{
		{"forbidden", list(func(f *fakePeer) { f.reply(optList, repErrPolicy, []byte("secret")) }), `forbidden by policy ("secret")`},
		{"short", list(func(f *fakePeer) { f.reply(optList, repServer, []byte{0, 0, 0}) }), "listed export of 3 bytes"},
		{"name past the end", list(func(f *fakePeer) { f.reply(optList, repServer, be32(nil, 1)) }), "name of 1 bytes in a reply of 4"},
		{"name too long", list(func(f *fakePeer) {
			f.reply(optList, repServer, appendOptionString(nil, strings.Repeat("x", stringMax+1)))
		}), "name of 4097 bytes"},
		{"endless", list(func(f *fakePeer) { f.write(fakeReplyHeader(optList, repServer, infiniteData)) }), "at most 8196"},
		{"endless list", list(func(f *fakePeer) {
			for {
				f.reply(optList, repServer, huge)
			}
		}), "list of more than"},
		{"not fixed", func(f *fakePeer) { f.greet(0); f.wait() }, "no options"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkClientGoroutines(t)
			if _, err := List(t.Context(), "unix", fakeServer(t, tt.script), Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := Info(t.Context(), "unix", fakeServer(t, func(f *fakePeer) { f.greet(0); f.wait() }), Options{}); err == nil {
		t.Error("Info without options")
	}
}
