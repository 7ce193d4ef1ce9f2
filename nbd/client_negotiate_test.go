package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"
)

// dialPlain connects to a server without a client.
func dialPlain(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // mostly closed
	return conn
}

// wantClosed fails t unless conn was closed on this side.
func wantClosed(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is open: %v", err)
	}
}

func TestNegotiateLeavesAConnectionInTransmission(t *testing.T) {
	checkClientGoroutines(t)
	everyHeaders(t, func(t *testing.T, offered Headers) {
		address := fakeServer(t, func(f *fakePeer) {
			f.negotiate(offered, FlagHasFlags|FlagSendFlush|FlagCanMultiConn, fakeBlocks(512, 4096, 1<<20))
			if f.headers != HeadersSimple {
				t.Errorf("%v headers were negotiated", f.headers)
			}
			q := f.next()
			f.simple(q.cookie, ErrnoOK, bytes.Repeat([]byte{5}, int(q.length)))
			f.wait()
		})
		conn := dialPlain(t, address)
		info, err := Negotiate(t.Context(), conn, Options{Export: "x"})
		if err != nil {
			t.Fatal(err)
		}
		if info.Name != "x" || info.Size != fakeSize || info.Flags != FlagHasFlags|FlagSendFlush|FlagCanMultiConn || info.BlockMin != 512 {
			t.Errorf("%+v", info)
		}
		if _, err := conn.Write(appendRequest(nil, false, 0, CommandRead, 77, 512, 1024)); err != nil {
			t.Fatal(err)
		}
		reply := make([]byte, 16+1024)
		if _, err := io.ReadFull(conn, reply); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(reply[:8], []byte{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0}) || binary.BigEndian.Uint64(reply[8:]) != 77 || reply[16] != 5 {
			t.Errorf("reply % x", reply[:17])
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestNegotiateRefusesWhatCannotBeHandedOver(t *testing.T) {
	checkClientGoroutines(t)
	for name, options := range map[string]Options{
		"TLS":          {TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12}},
		"required TLS": {TLSRequired: true},
		"contexts":     {MetaContexts: []string{ContextAllocation}},
		"a long name":  {Export: string(make([]byte, stringMax+1))},
	} {
		t.Run(name, func(t *testing.T) {
			address := fakeServer(t, func(f *fakePeer) { f.wait() })
			conn := dialPlain(t, address)
			if _, err := Negotiate(t.Context(), conn, options); err == nil {
				t.Error("no error")
			}
			wantClosed(t, conn)
		})
	}
}

func TestNegotiateClosesAConnectionThatFails(t *testing.T) {
	checkClientGoroutines(t)
	for _, tt := range []struct {
		name   string
		script func(*fakePeer)
		want   func(error) bool
	}{
		{"unknown export", func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle | handshakeNoZeroes)
			f.wantOption(optGo)
			f.reply(optGo, repErrUnknown, nil)
			f.wait()
		}, func(err error) bool { return errors.As(err, new(*OptionError)) }},
		{"hang-up", func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle)
			f.wantOption(optGo)
		}, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		{"bytes behind the handshake", func(f *fakePeer) {
			f.greet(handshakeFixedNewstyle | handshakeNoZeroes)
			f.wantOption(optGo)
			b := appendFakeReply(nil, optGo, repInfo, fakeInfoExport(fakeSize, FlagHasFlags))
			b = appendFakeReply(b, optGo, repAck, nil)
			f.write(slices.Concat(b, []byte("not asked for"))) // one write, one read
			f.wait()
		}, func(err error) bool { return errors.As(err, new(*ViolationError)) }},
		{"silence", func(f *fakePeer) { f.wait() }, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := dialPlain(t, fakeServer(t, tt.script))
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			if tt.name == "silence" {
				cancel()
				ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
			}
			defer cancel()
			if _, err := Negotiate(ctx, conn, Options{}); !tt.want(err) {
				t.Errorf("%v", err)
			}
			wantClosed(t, conn)
		})
	}
}

func TestNegotiateWithTheServer(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Name: "x", Device: memory(t, 1<<20)})
	conn := dialPlain(t, rig.address)
	info, err := Negotiate(t.Context(), conn, Options{Export: "x"})
	if err != nil || info.Size != 1<<20 || info.Flags&FlagSendDF != 0 {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := conn.Write(appendRequest(nil, false, 0, CommandRead, 1, 0, 512)); err != nil {
		t.Error(err)
	}
	if n, err := io.ReadFull(conn, make([]byte, 16+512)); err != nil {
		t.Errorf("%d bytes: %v", n, err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}
