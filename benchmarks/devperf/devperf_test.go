package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// exportServer is an NBD server of one export that holds nothing: reads give
// zeros. It answers in order, simple or structured as negotiated.
type exportServer struct {
	size    uint64
	fail    uint32 // error of every reply
	silent  bool   // never replies
	chunked bool   // splits a structured read in two chunks
	torn    bool   // writes replies in small pieces
}

func (s exportServer) start(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() { // ends when the listener closes
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends with its connection
				defer c.Close()
				_ = s.serve(c) // the client sees what it sees
			}()
		}
	}()
	return "nbd+unix:///vol?socket=" + filepath.Join(dir, "s")
}

func (s exportServer) serve(c net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.Write(hello); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		return err
	}
	structured := false
	for ready := false; !ready; {
		var head [16]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return err
		}
		option := binary.BigEndian.Uint32(head[8:])
		data := make([]byte, binary.BigEndian.Uint32(head[12:]))
		if _, err := io.ReadFull(c, data); err != nil {
			return err
		}
		reply := func(kind uint32, body []byte) error {
			b := binary.BigEndian.AppendUint64(nil, magicOptReply)
			b = binary.BigEndian.AppendUint32(b, option)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
			_, err := c.Write(append(b, body...))
			return err
		}
		switch {
		case option == optStructuredReply:
			structured = true
		case string(data[4:len(data)-2]) != "vol":
			return reply(repErrorBit|6, []byte("no such export"))
		default:
			info := binary.BigEndian.AppendUint64([]byte{0, infoExport}, s.size)
			if err := reply(repInfo, append(info, 0, 1)); err != nil {
				return err
			}
			ready = true
		}
		if err := reply(repAck, nil); err != nil {
			return err
		}
	}
	var out []byte
	for {
		var q [requestBytes]byte
		if _, err := io.ReadFull(c, q[:]); err != nil {
			return err
		}
		command, length := binary.BigEndian.Uint16(q[6:]), binary.BigEndian.Uint32(q[24:])
		offset := binary.BigEndian.Uint64(q[16:])
		if binary.BigEndian.Uint32(q[:]) != magicRequest || command != cmdDisc && command != cmdFlush && offset+uint64(length) > s.size {
			return errors.New("bad request")
		}
		switch command {
		case cmdDisc:
			return nil
		case cmdWrite:
			if _, err := io.CopyN(io.Discard, c, int64(length)); err != nil {
				return err
			}
		}
		if s.silent {
			continue
		}
		var data []byte
		if command == cmdRead {
			data = make([]byte, length)
		}
		out = s.reply(out[:0], q[8:16], structured, data)
		for piece := out; len(piece) > 0; {
			n := len(piece)
			if s.torn {
				n = min(n, 7)
			}
			if _, err := c.Write(piece[:n]); err != nil {
				return err
			}
			piece = piece[n:]
		}
	}
}

func (s exportServer) reply(b, cookie []byte, structured bool, data []byte) []byte {
	if !structured {
		b = binary.BigEndian.AppendUint32(b, magicSimple)
		b = binary.BigEndian.AppendUint32(b, s.fail)
		b = append(b, cookie...)
		if s.fail != 0 {
			return b
		}
		return append(b, data...)
	}
	chunk := func(flags, kind uint16, body []byte) {
		b = binary.BigEndian.AppendUint32(b, magicChunk)
		b = binary.BigEndian.AppendUint16(b, flags)
		b = binary.BigEndian.AppendUint16(b, kind)
		b = append(b, cookie...)
		b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
		b = append(b, body...)
	}
	switch {
	case s.fail != 0:
		chunk(chunkFlagDone, chunkErrorBit|1, []byte{0, 0, 0, byte(s.fail), 0, 0})
	case s.chunked && len(data) > 1:
		half := len(data) / 2
		chunk(0, 1, append(make([]byte, 8), data[:half]...))
		chunk(0, 1, append(make([]byte, 8), data[half:]...))
		chunk(chunkFlagDone, 0, nil)
	case data != nil:
		chunk(chunkFlagDone, 1, append(make([]byte, 8), data...))
	default:
		chunk(chunkFlagDone, 0, nil)
	}
	return b
}

// measureFor loads an export or a device for a moment, and counts what was done.
func measureFor(t *testing.T, arguments ...string) (map[string]uint64, error) {
	t.Helper()
	o, p, err := parse(append(arguments, "--ramp", "20ms", "--runtime", "100ms"))
	if err != nil {
		t.Fatal(err)
	}
	target, err := open(o, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.Check(target.Size()); err != nil {
		return nil, err
	}
	r, err := measure(target, p, nil, o)
	ops := map[string]uint64{}
	for name, op := range r.Ops {
		ops[name] = op.Count
	}
	return ops, err
}

// wantOperations measures until there is one of each operation: on a busy machine there
// may be none in as short a time.
func wantOperations(t *testing.T, want []string, measured func() (map[string]uint64, error)) {
	t.Helper()
	var ops map[string]uint64
	for range 20 {
		var err error
		if ops, err = measured(); err != nil {
			t.Fatal(err)
		}
		for op := range ops {
			if !slices.Contains(want, op) {
				t.Fatalf("operations %v, want %v", ops, want)
			}
		}
		if len(ops) == len(want) {
			return
		}
	}
	t.Errorf("operations %v, want %v", ops, want)
}

func needLinux(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux")
	}
}

func TestLoadsOfEveryKindAreServed(t *testing.T) {
	needLinux(t)
	for name, c := range map[string]struct {
		server    exportServer
		arguments []string
		want      []string
	}{
		"reads":              {exportServer{}, []string{"--op", "randread"}, []string{"read"}},
		"writes":             {exportServer{}, []string{"--op", "write", "--flush-every", "3"}, []string{"write", "flush"}},
		"mixed, two jobs":    {exportServer{}, []string{"--op", "randrw", "--connections", "2", "--depth", "7"}, []string{"read", "write"}},
		"structured":         {exportServer{}, []string{"--op", "randrw", "--structured"}, []string{"read", "write"}},
		"structured, chunks": {exportServer{chunked: true}, []string{"--structured"}, []string{"read"}},
		"torn replies":       {exportServer{torn: true}, []string{"--op", "randrw", "--block", "512"}, []string{"read", "write"}},
		"beyond one buffer":  {exportServer{}, []string{"--op", "randrw", "--block", "2MiB", "--depth", "3"}, []string{"read", "write"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.server.size = 64 << 20
			uri := c.server.start(t)
			wantOperations(t, c.want, func() (map[string]uint64, error) {
				return measureFor(t, append(c.arguments, "--uri", uri)...)
			})
		})
	}
}

func TestErrorsOfTheServerEndTheRun(t *testing.T) {
	needLinux(t)
	for name, c := range map[string]struct {
		server    exportServer
		arguments []string
		want      string
	}{
		"simple":     {exportServer{fail: 5}, nil, "error 5"},
		"structured": {exportServer{fail: 5}, []string{"--structured"}, "error chunk"},
	} {
		t.Run(name, func(t *testing.T) {
			c.server.size = 1 << 20
			if _, err := measureFor(t, append(c.arguments, "--uri", c.server.start(t))...); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	uri := exportServer{size: 1 << 20}.start(t)
	if _, err := measureFor(t, "--uri", strings.Replace(uri, "vol", "other", 1)); err == nil || !strings.Contains(err.Error(), "no such export") {
		t.Errorf("an unknown export: %v", err)
	}
}

func TestAnIdleConnectionMeasuresNothing(t *testing.T) {
	needLinux(t)
	ops, err := measureFor(t, "--op", "none", "--uri", exportServer{size: 1 << 20, silent: true}.start(t))
	if err != nil || len(ops) != 0 {
		t.Errorf("%v, %v", ops, err)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for want, arguments := range map[string][]string{
		"no export":  {},
		"op":         {"--uri", "nbd://h", "--op", "erase"},
		"unexpected": {"--uri", "nbd://h", "x"},
		"runtime":    {"--uri", "nbd://h", "--runtime", "0s"},
		"ramp":       {"--uri", "nbd://h", "--ramp", "-1s"},
	} {
		if _, _, err := parse(arguments); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", arguments, err, want)
		}
	}
	if _, err := parseCPUs("1,x"); err == nil {
		t.Error("a CPU called x")
	}
	needLinux(t)
	for _, uri := range []string{"http://h", "nbd+unix:///x", "%"} {
		if _, err := openNBD(uri, false, 0); err == nil {
			t.Errorf("%s accepted", uri)
		}
	}
}

func FuzzReplies(f *testing.F) {
	f.Add(exportServer{}.reply(nil, make([]byte, 8), false, make([]byte, 16)), 3)
	f.Add(exportServer{chunked: true}.reply(nil, make([]byte, 8), true, make([]byte, 16)), 5)
	f.Fuzz(func(t *testing.T, stream []byte, cut int) {
		var r replies
		r.readLength = func(cookie uint64) (int, bool) { return 16, cookie == 0 }
		if cut <= 0 {
			cut = 1
		}
		var waiting []byte
		for len(stream) > 0 {
			n := min(cut, len(stream))
			waiting = append(waiting, stream[:n]...)
			stream = stream[n:]
			used, err := r.Decode(waiting, func(cookie uint64) {
				if cookie != 0 {
					t.Error("a request that was never sent is done")
				}
			})
			if err != nil {
				return
			}
			if used < 0 || used > len(waiting) || len(waiting)-used >= chunkBytes {
				t.Fatalf("used %d of %d", used, len(waiting))
			}
			waiting = waiting[used:]
		}
	})
}

func TestARequestIsAnsweredBeforeTheBound(t *testing.T) {
	if replyMax <= wakeUp || drainMax <= replyMax || wakeUp < time.Millisecond {
		t.Error("a hung server must be told from a slow one before the run is given up")
	}
}
