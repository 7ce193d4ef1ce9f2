package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

// everyHeaders runs a test with each form of messages.
func everyHeaders(t *testing.T, test func(*testing.T, Headers)) {
	for _, headers := range []Headers{HeadersExtended, HeadersStructured, HeadersSimple} {
		t.Run(headers.String(), func(t *testing.T) { test(t, headers) })
	}
}

func TestClientCommands(t *testing.T) {
	everyHeaders(t, func(t *testing.T, headers Headers) {
		checkClientGoroutines(t)
		ctx := t.Context()
		c := dialFake(t, memoryServer(t, headers, nil), Options{})
		if c.Headers() != headers || c.Size() != fakeSize || c.Flags()&allFakeFlags != allFakeFlags || c.TLS() || c.Info().Name != "" {
			t.Fatalf("headers %s, info %+v, TLS %v", c.Headers(), c.Info(), c.TLS())
		}
		for _, size := range []int{1, 512, clientCopyMax, clientCopyMax + 1, 128 << 10, fakeSize} {
			want := randomBytes(rand.New(rand.NewPCG(1, uint64(size))), size)
			if err := c.Write(ctx, want, uint64(fakeSize-size), CommandFlagFUA); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if err := c.Read(ctx, got, uint64(fakeSize-size), CommandFlagDF); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes read differ from those written", size)
			}
		}
		for name, err := range map[string]error{
			"flush": c.Flush(ctx),
			"trim":  c.Trim(ctx, 0, 4096, 0),
			"zero":  c.WriteZeroes(ctx, 4096, 4096, CommandFlagFastZero|CommandFlagNoHole|CommandFlagFUA),
			"cache": c.Cache(ctx, 0, fakeSize, 0),
			"empty": c.Read(ctx, nil, 0, 0),
		} {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		got := make([]byte, 16)
		if n, err := c.ReadAt(got, 4096); n != 16 || err != nil || !allZero(got) {
			t.Errorf("after zeroing: %d %v % x", n, err, got)
		}
		if _, err := c.BlockStatus(ctx, 0, 4096, 0); !errors.Is(err, ErrNotAdvertised) {
			t.Errorf("block status without contexts: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestClientReaderAtAndWriterAt(t *testing.T) {
	c := dialFake(t, memoryServer(t, HeadersStructured, nil), Options{})
	want := randomBytes(rand.New(rand.NewPCG(1, 2)), fakeSize)
	if n, err := io.Copy(io.NewOffsetWriter(c, 0), bytes.NewReader(want)); n != fakeSize || err != nil {
		t.Fatal(n, err)
	}
	got, err := io.ReadAll(io.NewSectionReader(c, 0, math.MaxInt64))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read back %d bytes: %v", len(got), err)
	}
	if n, err := c.ReadAt(make([]byte, 10), fakeSize-4); n != 4 || err != io.EOF {
		t.Errorf("read across the end: %d %v", n, err)
	}
	if n, err := c.ReadAt(make([]byte, 1), fakeSize); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d %v", n, err)
	}
	for _, offset := range []int64{-1, fakeSize + 1} {
		if n, err := c.ReadAt(make([]byte, 1), offset); n != 0 || !errors.Is(err, ErrOutside) {
			t.Errorf("read at %d: %d %v", offset, n, err)
		}
		if n, err := c.WriteAt(make([]byte, 1), offset); n != 0 || !errors.Is(err, ErrOutside) {
			t.Errorf("write at %d: %d %v", offset, n, err)
		}
	}
	if n, err := c.WriteAt(make([]byte, 10), fakeSize-4); n != 0 || !errors.Is(err, ErrOutside) {
		t.Errorf("write across the end: %d %v", n, err)
	}
}

func TestClientBlockStatus(t *testing.T) {
	options := Options{MetaContexts: []string{ContextAllocation, fakeDirty, "qemu:absent"}}
	for _, headers := range []Headers{HeadersExtended, HeadersStructured} {
		t.Run(headers.String(), func(t *testing.T) {
			c := dialFake(t, memoryServer(t, headers, nil), options)
			if got := fmt.Sprint(c.Contexts()); got != "[{7 base:allocation} {9 qemu:dirty-bitmap:x}]" {
				t.Fatalf("contexts %s", got)
			}
			for range 2 {
				got, err := c.BlockStatus(t.Context(), 4096, 128<<10, 0)
				if err != nil {
					t.Fatal(err)
				}
				first := datapath.Extent{Length: 64 << 10, State: 1}
				if headers == HeadersExtended {
					first = datapath.Extent{Length: 128 << 10, State: 1<<40 | 3}
				}
				want := []ContextStatus{{7, []datapath.Extent{first}}, {9, []datapath.Extent{{Length: 64 << 10, State: 1}}}}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("got %v, want %v", got, want)
				}
			}
			got, err := c.BlockStatus(t.Context(), 0, 4096, 0, fakeDirtyID)
			if headers == HeadersStructured {
				if !errors.Is(err, ErrNotAdvertised) {
					t.Errorf("payload without the flag: %v", err)
				}
				return
			}
			if err != nil || fmt.Sprint(got) != "[{9 [{4096 1}]}]" {
				t.Errorf("one context: %v %v", got, err)
			}
			for _, ids := range [][]uint32{{8}, {fakeDirtyID, fakeDirtyID}} {
				if _, err := c.BlockStatus(t.Context(), 0, 4096, 0, ids...); !errors.Is(err, ErrRequest) {
					t.Errorf("contexts %v: %v", ids, err)
				}
			}
		})
	}
}

// TestClientExtentsEndWithTheExport answers with extents that run far past it.
func TestClientExtentsEndWithTheExport(t *testing.T) {
	address := fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersExtended, allFakeFlags)
		q := f.next()
		f.chunk(q, chunkFlagDone, chunkBlockStatusExt, be32(nil, fakeAllocationID, 0), be64(nil, 512, 1, math.MaxUint64, 2))
		f.wait()
	})
	c := dialFake(t, address, Options{MetaContexts: []string{ContextAllocation}})
	got, err := c.BlockStatus(t.Context(), 4096, 4096, 0)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("[{7 [{512 1} {%d 2}]}]", fakeSize-4096-512); fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

// TestClientReassemblesPieces reads from a server that answers out of order, in
// pieces out of order, with holes, while many requests are in flight.
func TestClientReassemblesPieces(t *testing.T) {
	everyHeaders(t, func(t *testing.T, headers Headers) {
		checkClientGoroutines(t)
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		c := dialFake(t, memoryServer(t, headers, rand.New(rand.NewPCG(seed, 0))), Options{Depth: 16})
		runModel(t, c, make([]byte, fakeSize), seed, 16, 100)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// modelStripe is a part of the export where one request at a time is in flight.
type modelStripe struct {
	Request
	c      *Client
	t      *testing.T
	random *rand.Rand
	base   uint64
	want   []byte // what the stripe must hold
	ops    int    // left to do
	ended  *sync.WaitGroup
}

// runModel runs random requests, one at a time in each stripe and all stripes at
// once, each submitted by the Done function of the one before, and compares what
// is read with model, which is what the export holds before and after.
func runModel(t *testing.T, c *Client, model []byte, seed uint64, stripes, ops int) {
	t.Helper()
	var ended sync.WaitGroup
	size := len(model) / stripes
	for i := range stripes {
		s := &modelStripe{
			c: c, t: t, random: rand.New(rand.NewPCG(seed, uint64(i)+1)), base: uint64(i * size),
			want: model[i*size : (i+1)*size], ops: ops, ended: &ended,
		}
		s.Buf = make([]byte, 0, size)
		s.Done = func(*Request) { s.step() }
		ended.Add(1)
		s.submit()
	}
	ended.Wait()
	got := make([]byte, len(model))
	if err := c.Read(t.Context(), got, 0, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Errorf("seed %d: the export differs from the model at the end", seed)
	}
}

// step judges the request that ended and submits the next.
func (s *modelStripe) step() {
	at := s.Offset - s.base
	switch {
	case s.Err != nil:
		s.t.Errorf("command %d of %d bytes at %d: %v", s.Command, s.Length, s.Offset, s.Err)
	case s.Command == CommandRead && !bytes.Equal(s.Buf, s.want[at:at+s.Length]):
		s.t.Errorf("read of %d bytes at %d differs from the model", s.Length, s.Offset)
	default:
		if s.ops--; s.ops > 0 {
			s.submit()
			return
		}
	}
	s.ended.Done()
}

func (s *modelStripe) submit() {
	length := 512 * (1 + s.random.IntN(len(s.want)/512/4))
	at := 512 * s.random.IntN(len(s.want)/512-length/512+1)
	s.Offset, s.Length, s.Flags = s.base+uint64(at), uint64(length), 0
	s.Buf = s.Buf[:length]
	switch s.random.IntN(8) {
	case 0:
		s.Command, s.Offset, s.Length, s.Buf = CommandFlush, 0, 0, s.Buf[:0]
		if s.c.Flags()&FlagSendFlush == 0 {
			s.Command, s.Offset, s.Length, s.Buf = CommandRead, s.base, 512, s.Buf[:512]
		}
	case 1, 2:
		if s.c.Flags()&FlagSendWriteZeroes != 0 {
			s.Command, s.Buf = CommandWriteZeroes, s.Buf[:0]
			clear(s.want[at:][:length])
			break
		}
		fallthrough
	case 3, 4:
		s.Command = CommandWrite
		fillRandom(s.random, s.Buf)
		copy(s.want[at:], s.Buf)
		if s.random.IntN(4) == 0 && s.c.Flags()&FlagSendFUA != 0 {
			s.Flags = CommandFlagFUA
		}
	default:
		s.Command = CommandRead
	}
	if s.Command == CommandFlush {
		s.Offset = 0
	}
	s.c.Submit(&s.Request)
}

func fillRandom(random *rand.Rand, b []byte) {
	for i := 0; i < len(b); i += 8 {
		v := random.Uint64()
		for j := i; j < min(i+8, len(b)); j++ {
			b[j] = byte(v >> (8 * (j - i)))
		}
	}
}

func randomBytes(random *rand.Rand, n int) []byte {
	b := make([]byte, n)
	fillRandom(random, b)
	return b
}

func TestClientSplitsLongTransfers(t *testing.T) {
	var lengths []uint64
	address := fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersSimple, allFakeFlags, fakeBlocks(512, 4096, 300<<10+100))
		for {
			q := f.next()
			if q.command == CommandDisconnect {
				return
			}
			lengths = append(lengths, q.length)
			f.ok(q)
		}
	})
	c := dialFake(t, address, Options{})
	if err := c.Write(t.Context(), make([]byte, 1<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	r := &Request{Command: CommandWrite, Buf: make([]byte, 400<<10), Length: 400 << 10}
	if err := submitAndWait(c, r); !errors.Is(err, ErrTooLong) {
		t.Errorf("long request: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(lengths); got != fmt.Sprint([]uint64{300 << 10, 300 << 10, 300 << 10, 124 << 10}) {
		t.Errorf("lengths %s", got)
	}
}

// submitAndWait submits one request and waits for its end.
func submitAndWait(c *Client, r *Request) error {
	ended := make(chan struct{})
	r.Done = func(*Request) { close(ended) }
	c.Submit(r)
	<-ended
	return r.Err
}

func TestClientEffectsLongerThan32Bits(t *testing.T) {
	for _, headers := range []Headers{HeadersExtended, HeadersStructured} {
		t.Run(headers.String(), func(t *testing.T) {
			const size = 5 << 30
			var lengths []uint64
			address := fakeServer(t, func(f *fakePeer) {
				f.negotiate(headers, allFakeFlags, fakeInfoExport(size, allFakeFlags)) // the later one counts
				for {
					q := f.next()
					if q.command == CommandDisconnect {
						return
					}
					lengths = append(lengths, q.length)
					f.ok(q)
				}
			})
			c := dialFake(t, address, Options{})
			if err := c.WriteZeroes(t.Context(), 0, size, 0); err != nil {
				t.Fatal(err)
			}
			err := submitAndWait(c, &Request{Command: CommandTrim, Length: size})
			want := []uint64{size, size}
			if headers == HeadersStructured {
				want = []uint64{1 << 31, 1 << 31, 1 << 30}
				if !errors.Is(err, ErrTooLong) {
					t.Errorf("request of %d bytes: %v", uint64(size), err)
				}
			} else if err != nil {
				t.Error(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(lengths) != fmt.Sprint(want) {
				t.Errorf("lengths %v, want %v", lengths, want)
			}
		})
	}
}

func TestClientRefusesWhatTheServerDidNotOffer(t *testing.T) {
	bare := fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersStructured, FlagHasFlags, fakeBlocks(512, 512, 1<<20))
		f.wait()
	})
	readOnly := fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersExtended, allFakeFlags|FlagReadOnly)
		f.wait()
	})
	block := make([]byte, 512)
	for _, tt := range []struct {
		name    string
		address string
		r       Request
		want    error
	}{
		{"flush", bare, Request{Command: CommandFlush}, ErrNotAdvertised},
		{"trim", bare, Request{Command: CommandTrim, Length: 512}, ErrNotAdvertised},
		{"zeroes", bare, Request{Command: CommandWriteZeroes, Length: 512}, ErrNotAdvertised},
		{"cache", bare, Request{Command: CommandCache, Length: 512}, ErrNotAdvertised},
		{"status", bare, Request{Command: CommandBlockStatus, Length: 512}, ErrNotAdvertised},
		{"resize", bare, Request{Command: CommandResize, Offset: 512}, ErrNotAdvertised},
		{"unknown", bare, Request{Command: 300}, ErrNotAdvertised},
		{"fua", bare, Request{Command: CommandWrite, Buf: block, Length: 512, Flags: CommandFlagFUA}, ErrNotAdvertised},
		{"df", bare, Request{Command: CommandRead, Buf: block, Length: 512, Flags: CommandFlagDF}, ErrNotAdvertised},
		{"flag", bare, Request{Command: CommandRead, Buf: block, Length: 512, Flags: CommandFlagReqOne}, ErrNotAdvertised},
		{"unknown flag", bare, Request{Command: CommandRead, Buf: block, Length: 512, Flags: 1 << 12}, ErrNotAdvertised},
		{"payload flag", bare, Request{Command: CommandWrite, Buf: block, Length: 512, Flags: CommandFlagPayloadLen}, ErrNotAdvertised},
		{"unaligned offset", bare, Request{Command: CommandRead, Buf: block, Length: 512, Offset: 1}, ErrUnaligned},
		{"unaligned length", bare, Request{Command: CommandRead, Buf: block[:1], Length: 1}, ErrUnaligned},
		{"past the end", bare, Request{Command: CommandRead, Buf: block, Length: 512, Offset: fakeSize}, ErrOutside},
		{"far past the end", bare, Request{Command: CommandRead, Buf: block, Length: 512, Offset: math.MaxUint64 - 511}, ErrOutside},
		{"disconnect", bare, Request{Command: CommandDisconnect}, ErrRequest},
		{"short buffer", bare, Request{Command: CommandRead, Buf: block, Length: 1024}, ErrRequest},
		{"buffer without use", bare, Request{Command: CommandTrim, Buf: block, Length: 512}, ErrRequest},
		{"contexts without use", bare, Request{Command: CommandTrim, Length: 512, ContextIDs: []uint32{1}}, ErrRequest},
		{"contexts in a read", bare, Request{Command: CommandRead, Buf: block, Length: 512, ContextIDs: []uint32{1}}, ErrRequest},
		{"buffer for a status", bare, Request{Command: CommandBlockStatus, Buf: block, Length: 512}, ErrRequest},
		{"empty read", bare, Request{Command: CommandRead}, ErrRequest},
		{"flush of a range", readOnly, Request{Command: CommandFlush, Length: 512}, ErrRequest},
		{"write to read-only", readOnly, Request{Command: CommandWrite, Buf: block, Length: 512}, ErrReadOnly},
		{"trim on read-only", readOnly, Request{Command: CommandTrim, Length: 512}, ErrReadOnly},
		{"zeroes on read-only", readOnly, Request{Command: CommandWriteZeroes, Length: 512}, ErrReadOnly},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dialFake(t, tt.address, Options{})
			if err := submitAndWait(c, &tt.r); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if err := c.Err(); err != nil {
				t.Errorf("the client died: %v", err)
			}
		})
	}
}

func TestClientErrorsOfCommands(t *testing.T) {
	message := strings.Repeat("m", stringMax)
	for _, tt := range []struct {
		name    string
		headers Headers
		reply   func(*fakePeer, *fakeRequest)
		want    CommandError
		is      error
	}{
		{"simple", HeadersSimple, func(f *fakePeer, q *fakeRequest) { f.simple(q.cookie, ErrnoNoSpace, nil) }, CommandError{Errno: ErrnoNoSpace}, syscall.ENOSPC},
		{"unknown number", HeadersSimple, func(f *fakePeer, q *fakeRequest) { f.simple(q.cookie, 1234, nil) }, CommandError{Errno: 1234}, syscall.EINVAL},
		{"chunk", HeadersStructured, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, chunkFlagDone, chunkError, be16(be32(nil, uint32(ErrnoPerm)), 0), nil)
		}, CommandError{Errno: ErrnoPerm}, syscall.EPERM},
		{"message", HeadersExtended, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, chunkFlagDone, chunkError, be16(be32(nil, uint32(ErrnoNoMem)), stringMax), []byte(message))
		}, CommandError{Errno: ErrnoNoMem, Message: message}, syscall.ENOMEM},
		{"offset", HeadersExtended, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, 0, chunkOffsetData, be64(nil, q.offset), make([]byte, 512))
			f.chunk(q, 0, chunkErrorOffset, append(be16(be32(nil, uint32(ErrnoIO)), 4), "disk"...), be64(nil, q.offset+512))
			f.chunk(q, 0, chunkError, be16(be32(nil, uint32(ErrnoShutdown)), 0), nil) // the first counts
			f.chunk(q, chunkFlagDone, chunkNone, nil, nil)
		}, CommandError{Errno: ErrnoIO, Message: "disk", Located: true, Offset: 8192 + 512}, syscall.EIO},
		{"unknown kind", HeadersStructured, func(f *fakePeer, q *fakeRequest) {
			f.chunk(q, chunkFlagDone, chunkErrorBit|77, append(be16(be32(nil, uint32(ErrnoOverflow)), 2), "hi"...), make([]byte, 1000))
		}, CommandError{Errno: ErrnoOverflow, Message: "hi"}, syscall.EOVERFLOW},
		{"not supported", HeadersSimple, func(f *fakePeer, q *fakeRequest) { f.simple(q.cookie, ErrnoNotSupported, nil) }, CommandError{Errno: ErrnoNotSupported}, syscall.EOPNOTSUPP},
		{"shutdown", HeadersSimple, func(f *fakePeer, q *fakeRequest) { f.simple(q.cookie, ErrnoShutdown, nil) }, CommandError{Errno: ErrnoShutdown}, syscall.ESHUTDOWN},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dialFake(t, fakeServer(t, func(f *fakePeer) {
				f.negotiate(tt.headers, allFakeFlags)
				tt.reply(f, f.next())
				f.ok(f.next())
				f.wait()
			}), Options{})
			err := c.Read(t.Context(), make([]byte, 4096), 8192, 0)
			got := new(CommandError)
			if !errors.As(err, &got) || *got != tt.want {
				t.Errorf("got %v (%+v), want %+v", err, got, tt.want)
			}
			if !errors.Is(err, tt.is) || !errors.Is(err, tt.want.Errno) {
				t.Errorf("%v is not %v", err, tt.is)
			}
			if err := c.Flush(t.Context()); err != nil {
				t.Errorf("the next request: %v", err)
			}
		})
	}
}

func TestClientErrorTexts(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{&CommandError{Command: CommandWrite, Errno: ErrnoNoSpace}, "nbd: write: " + syscall.ENOSPC.Error()},
		{&CommandError{Command: CommandRead, Errno: ErrnoIO, Message: "bad\x00", Located: true, Offset: 9}, "nbd: read at offset 9: " + syscall.EIO.Error() + ` ("bad\x00")`},
		{&CommandError{Command: 99, Errno: ErrnoInvalid}, "nbd: command 99: " + syscall.EINVAL.Error()},
		{&OptionError{Option: uint32(optGo), Reply: uint32(repErrUnknown), Message: "no such"}, `nbd: the server refuses GO: unknown export ("no such")`},
		{&OptionError{Option: uint32(optList), Reply: uint32(repError | 99)}, "nbd: the server refuses LIST: reply 0x80000063"},
		{violationf("x"), "nbd: the server broke the protocol: x"},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// TestClientKeepsToItsDepth submits more than the depth and wants the server to
// see no more than that at once, and the rest as replies make room.
func TestClientKeepsToItsDepth(t *testing.T) {
	checkClientGoroutines(t)
	const depth, total = 4, 50
	address := fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersSimple, allFakeFlags)
		var waiting []*fakeRequest
		for range depth {
			waiting = append(waiting, f.next())
		}
		for n := depth; len(waiting) > 0; n++ {
			if f.in.Buffered() > 0 {
				panic(fmt.Errorf("more than %d requests at once", depth))
			}
			f.ok(waiting[0])
			waiting = waiting[1:]
			if n < total {
				waiting = append(waiting, f.next())
			}
		}
		f.wait()
	})
	c := dialFake(t, address, Options{Depth: depth})
	var ended sync.WaitGroup
	for range total {
		ended.Add(1)
		c.Submit(&Request{Command: CommandFlush, Done: func(r *Request) {
			if r.Err != nil {
				t.Error(r.Err)
			}
			ended.Done()
		}})
	}
	ended.Wait()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestClientCloseDrainsAndSaysGoodbye(t *testing.T) {
	everyHeaders(t, func(t *testing.T, headers Headers) {
		checkClientGoroutines(t)
		saw := make(chan Command, 10)
		address := fakeServer(t, func(f *fakePeer) {
			f.negotiate(headers, allFakeFlags)
			q := f.next()
			time.Sleep(50 * time.Millisecond) // so that Close has to wait
			f.ok(q)
			q = f.next()
			saw <- q.command
			f.wait()
			close(saw)
		})
		c := dialFake(t, address, Options{})
		r := &Request{Command: CommandFlush, Done: func(*Request) {}}
		c.Submit(r)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if r.Err != nil {
			t.Errorf("the request in flight: %v", r.Err)
		}
		if command := <-saw; command != CommandDisconnect {
			t.Errorf("the server saw command %d, want DISC", command)
		}
		if command, more := <-saw; more {
			t.Errorf("the server saw command %d behind DISC", command)
		}
		<-c.Done()
		if !errors.Is(c.Err(), ErrClientClosed) {
			t.Errorf("Err: %v", c.Err())
		}
		if err := submitAndWait(c, &Request{Command: CommandFlush}); !errors.Is(err, ErrClientClosed) {
			t.Errorf("request after Close: %v", err)
		}
		if err := c.Flush(t.Context()); !errors.Is(err, ErrClientClosed) {
			t.Errorf("call after Close: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	})
}

func TestClientShutdownCutsADeafServer(t *testing.T) {
	checkClientGoroutines(t)
	c := dialFake(t, fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersStructured, allFakeFlags)
		f.next()
		f.wait()
	}), Options{Depth: 1})
	var requests []*Request
	var ended sync.WaitGroup
	for range 3 { // one in flight, two in the queue
		r := &Request{Command: CommandFlush, Done: func(*Request) { ended.Done() }}
		requests = append(requests, r)
		ended.Add(1)
		c.Submit(r)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v", err)
	}
	ended.Wait()
	for i, r := range requests {
		if !errors.Is(r.Err, ErrClientClosed) {
			t.Errorf("request %d: %v", i, r.Err)
		}
	}
}

func TestClientConnectionLossEndsEverything(t *testing.T) {
	checkClientGoroutines(t)
	c := dialFake(t, fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersStructured, allFakeFlags)
		f.next()
	}), Options{Depth: 2})
	const count = 5
	results := make(chan error, count)
	for range count {
		c.Submit(&Request{Command: CommandFlush, Done: func(r *Request) { results <- r.Err }})
	}
	for range count {
		if err := <-results; !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("request ended with %v", err)
		}
	}
	<-c.Done()
	want := c.Err()
	if err := c.Flush(t.Context()); !errors.Is(err, want) {
		t.Errorf("later request: %v, want %v", err, want)
	}
	if err := c.Close(); !errors.Is(err, want) {
		t.Errorf("Close: %v, want %v", err, want)
	}
}

// TestClientResubmitsToAnother moves the requests of a dead client to a new one,
// as a reconnecting layer would.
func TestClientResubmitsToAnother(t *testing.T) {
	good := dialFake(t, memoryServer(t, HeadersStructured, nil), Options{})
	bad := dialFake(t, fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersStructured, allFakeFlags)
		f.next()
	}), Options{Depth: 1})
	results := make(chan error, 4)
	for i := range cap(results) {
		buf := bytes.Repeat([]byte{byte(i + 1)}, 4096)
		c := bad
		c.Submit(&Request{Command: CommandWrite, Buf: buf, Length: 4096, Offset: uint64(i) * 4096, Done: func(r *Request) {
			if c == bad && r.Err != nil {
				c = good
				c.Submit(r)
				return
			}
			results <- r.Err
		}})
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	got := make([]byte, 4*4096)
	if err := good.Read(t.Context(), got, 0, 0); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != byte(i/4096+1) {
			t.Fatalf("byte %d is %d", i, got[i])
		}
	}
}

func TestClientContextCancelsWaiting(t *testing.T) {
	everyHeaders(t, func(t *testing.T, headers Headers) {
		checkClientGoroutines(t)
		release := make(chan struct{})
		c := dialFake(t, fakeServer(t, func(f *fakePeer) {
			f.negotiate(headers, allFakeFlags)
			q := f.next()
			<-release
			data := bytes.Repeat([]byte{0xaa}, int(q.length))
			if headers == HeadersSimple {
				f.simple(q.cookie, ErrnoOK, data)
			} else {
				f.chunk(q, chunkFlagDone, chunkOffsetData, be64(nil, q.offset), data)
			}
			f.ok(f.next()) // the flush; the queued one was never sent
			f.wait()
		}), Options{Depth: 1})
		p := make([]byte, 64<<10)
		inFlight, cancelInFlight := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancelInFlight()
		if err := c.Read(inFlight, p, 0, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("in flight: %v", err)
		}
		queued, cancelQueued := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancelQueued()
		if err := c.Read(queued, p, 0, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("in the queue: %v", err)
		}
		if err := c.Read(queued, p, 0, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with a context that has ended: %v", err)
		}
		close(release)
		if err := c.Flush(t.Context()); err != nil {
			t.Errorf("the client does not live on: %v", err)
		}
		if !allZero(p) {
			t.Error("the buffer of a canceled read was written to")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestClientCancelInAStuckTransfer cancels while half of the data is there.
func TestClientCancelInAStuckTransfer(t *testing.T) {
	checkClientGoroutines(t)
	c := dialFake(t, fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersSimple, allFakeFlags)
		q := f.next()
		f.simple(q.cookie, ErrnoOK, make([]byte, q.length/2))
		f.wait()
	}), Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := c.Read(ctx, make([]byte, 256<<10), 0, 0)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Read: %v", err)
	}
	if c.Err() == nil {
		t.Error("the client lives with half a reply on the way")
	}
}

// TestClientKeepsBuffersUntilSent replies to a write before its data was read.
func TestClientKeepsBuffersUntilSent(t *testing.T) {
	checkClientGoroutines(t)
	const length = 1 << 20 // more than a socket buffers
	replied := make(chan struct{})
	goOn := make(chan struct{})
	address := fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersSimple, allFakeFlags)
		b := f.read(make([]byte, sizeRequest))
		f.simple(uint64(b[8])<<56|uint64(b[9])<<48|uint64(b[10])<<40|uint64(b[11])<<32|uint64(b[12])<<24|uint64(b[13])<<16|uint64(b[14])<<8|uint64(b[15]), ErrnoOK, nil)
		close(replied)
		<-goOn
		f.read(make([]byte, length))
		f.ok(f.next())
		f.wait()
	})
	c := dialFake(t, address, Options{})
	ended := make(chan struct{})
	c.Submit(&Request{Command: CommandWrite, Buf: make([]byte, length), Length: length, Done: func(*Request) { close(ended) }})
	<-replied
	select {
	case <-ended:
		t.Error("the write ended while its buffer was being sent")
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	<-ended
	if err := c.Flush(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestClientNamesTheCauseOfABrokenPipe hangs up while the client writes, having
// said what is wrong or nothing.
func TestClientNamesTheCauseOfABrokenPipe(t *testing.T) {
	const length = 1 << 20 // more than a socket buffers
	for _, speak := range []bool{false, true} {
		checkClientGoroutines(t)
		c := dialFake(t, fakeServer(t, func(f *fakePeer) {
			f.negotiate(HeadersSimple, allFakeFlags)
			f.read(make([]byte, sizeRequest))
			if speak {
				f.write([]byte("an essay instead of a reply"))
			}
		}), Options{})
		err := c.Write(t.Context(), make([]byte, length), 0, 0)
		if broken := new(ViolationError); errors.As(err, &broken) != speak {
			t.Errorf("spoke %v: %v", speak, err)
		}
	}
}

// TestClientReadsAwayWhatNobodyWaitsFor cancels one call of each kind; their
// replies come later.
func TestClientReadsAwayWhatNobodyWaitsFor(t *testing.T) {
	checkClientGoroutines(t)
	release := make(chan struct{})
	c := dialFake(t, fakeServer(t, func(f *fakePeer) {
		f.negotiate(HeadersStructured, allFakeFlags)
		read, status, flush := f.next(), f.next(), f.next()
		<-release
		f.chunk(read, 0, chunkOffsetHole, be64(nil, read.offset), be32(nil, 512))
		f.chunk(read, chunkFlagDone, chunkOffsetData, be64(nil, read.offset+512), make([]byte, 512))
		f.chunk(status, chunkFlagDone, chunkBlockStatus, be32(nil, fakeAllocationID), be32(nil, 512, 0, 512, 1))
		f.chunk(flush, chunkFlagDone, chunkError, be16(be32(nil, uint32(ErrnoIO)), 0), nil)
		f.ok(f.next())
		f.wait()
	}), Options{MetaContexts: []string{ContextAllocation}})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	p := bytes.Repeat([]byte{0xee}, 1024)
	calls := []func() error{
		func() error { return c.Read(ctx, p, 4096, 0) },
		func() error { _, err := c.BlockStatus(ctx, 0, 1024, 0); return err },
		func() error { return c.Flush(ctx) },
	}
	var ended sync.WaitGroup
	for _, call := range calls {
		submitted := make(chan struct{})
		ended.Go(func() {
			close(submitted)
			if err := call(); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("canceled call: %v", err)
			}
		})
		<-submitted
		time.Sleep(10 * time.Millisecond) // so that they arrive in this order
	}
	ended.Wait()
	close(release)
	if err := c.Trim(t.Context(), 0, 512, 0); err != nil {
		t.Errorf("the client does not live on: %v", err)
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{0xee}, 1024)) {
		t.Error("the buffer of a canceled read was written to")
	}
}

func TestClientAllocatesNothing(t *testing.T) {
	everyHeaders(t, func(t *testing.T, headers Headers) {
		c := dialFake(t, memoryServer(t, headers, nil), Options{MetaContexts: []string{ContextAllocation, fakeDirty}})
		ended := make(chan struct{}, 64)
		done := func(*Request) { ended <- struct{}{} }
		for _, size := range []int{512, 4096, 128 << 10} {
			requests := make([]Request, 16)
			for i := range requests {
				requests[i] = Request{Command: Command(i % 2), Offset: uint64(i) * 512, Length: uint64(size), Buf: make([]byte, size), Done: done}
			}
			if headers != HeadersSimple {
				requests[2] = Request{Command: CommandBlockStatus, Length: fakeSize, Done: done}
			}
			round := func() {
				for i := range requests {
					c.Submit(&requests[i])
				}
				for range requests {
					<-ended
				}
			}
			if n := testing.AllocsPerRun(100, round); n > 0 {
				t.Errorf("%d bytes, pipelined: %v allocations in %d requests", size, n, len(requests))
			}
			p := make([]byte, size)
			blocking := func() {
				if _, err := c.WriteAt(p, 0); err != nil {
					t.Error(err)
				}
				if _, err := c.ReadAt(p, 0); err != nil {
					t.Error(err)
				}
			}
			if n := testing.AllocsPerRun(100, blocking); n > 0 {
				t.Errorf("%d bytes, blocking: %v allocations", size, n)
			}
			for i := range requests {
				if requests[i].Err != nil {
					t.Fatal(requests[i].Err)
				}
			}
		}
	})
}

func TestClientOptionsAreChecked(t *testing.T) {
	long := strings.Repeat("x", stringMax+1)
	for _, options := range []Options{
		{Depth: -1}, {Depth: clientDepthMax + 1}, {Export: long}, {MetaContexts: []string{long}}, {MetaContexts: make([]string, clientContextsMax+1)},
	} {
		client, server := net.Pipe()
		if _, err := NewClient(t.Context(), client, options); err == nil {
			t.Errorf("options were accepted")
		}
		if _, err := server.Read(make([]byte, 1)); err == nil {
			t.Error("the connection was left open")
		}
	}
	if _, err := Dial(t.Context(), "unix", t.TempDir()+"/absent", Options{}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("no server: %v", err)
	}
	if _, err := DialURI(t.Context(), "nbd+unix:///x", Options{}); err == nil {
		t.Error("a bad URI was accepted")
	}
}

func TestClientCoverage(t *testing.T) {
	const n = 64
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 0))
		var v clientCoverage
		v.reset()
		var have [n]bool
		for range 60 {
			start := random.IntN(n)
			end := start + 1 + random.IntN(min(8, n-start))
			want := true
			for i := start; i < end; i++ {
				want = want && !have[i]
			}
			if got := v.add(uint64(start), uint64(end)); got != want {
				t.Fatalf("seed %d: add(%d, %d) to %v: %v", seed, start, end, v.spans, got)
			}
			full := true
			for i := range have {
				have[i] = have[i] || want && i >= start && i < end
				full = full && have[i]
			}
			if got := v.complete(0, n); got != full {
				t.Fatalf("seed %d: complete: %v with %v", seed, got, v.spans)
			}
		}
	}
	var v clientCoverage
	for i := range uint64(clientSpansMax) {
		if !v.add(2*i, 2*i+1) {
			t.Fatalf("span %d was refused", i)
		}
	}
	if v.add(1<<20, 1<<20+1) || !v.add(1, 2) || len(v.spans) != clientSpansMax-1 {
		t.Errorf("%d spans at the bound", len(v.spans))
	}
	v.reset()
	if cap(v.spans) > clientSpansKept || !v.complete(5, 5) {
		t.Errorf("after reset: %d spans are kept", cap(v.spans))
	}
}
