package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
)

// unmeasuredGo is what the client of go-nbd says after the server's greeting, to each
// export in turn.
func unmeasuredGo(names ...string) []byte {
	b := make([]byte, 4) // no client flags
	for _, name := range names {
		b = append(appendOption(b, optGo, nil), rawInfo(name)...)
	}
	return b
}

// readReplies reads the replies to one GO.
func (r *rawConn) readReplies() (replies []rawOptionReply) {
	for {
		reply := r.readOptionReply()
		replies = append(replies, reply)
		if reply.opt != optGo {
			r.t.Fatalf("reply to option %d", reply.opt)
		}
		if reply.kind != repInfo {
			return replies
		}
	}
}

func TestUnmeasuredGo(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Name: "coarse", Device: &describedDevice{memory(t, 1<<20), func(i *datapath.Info) { i.PreferredIO = 1 << 20 }}})
	r := newRawConn(t, rig.connect())
	r.read(sizeGreeting)
	for _, piece := range bytes.SplitAfter(unmeasuredGo("absent", "coarse"), []byte("e")) { // as it may come from a network
		r.send(piece)
	}
	if replies := r.readReplies(); len(replies) != 1 || replies[0].kind != repErrUnknown {
		t.Errorf("an unknown export: %v", replies)
	}
	replies := r.readReplies()
	if len(replies) != 3 || replies[2].kind != repAck {
		t.Fatalf("replies %v", replies)
	}
	if b := replies[0].data; binary.BigEndian.Uint16(b) != infoExport || binary.BigEndian.Uint64(b[2:]) != 1<<20 {
		t.Errorf("export: % x", b)
	}
	if b := replies[1].data; binary.BigEndian.Uint16(b) != infoBlockSize || binary.BigEndian.Uint32(b[6:]) != unmeasuredBlockMax {
		t.Errorf("block size: % x", b)
	}
	want := bytes.Repeat([]byte("go"), 256)
	r.sendRequest(0, CommandWrite, 1, 4096, 512, want)
	if errno, cookie := r.readSimpleReply(); errno != ErrnoOK || cookie != 1 {
		t.Errorf("write: %v, cookie %d", errno, cookie)
	}
	r.sendRequest(0, CommandRead, 2, 4096, 512, nil)
	if errno, cookie := r.readSimpleReply(); errno != ErrnoOK || cookie != 2 || !bytes.Equal(r.read(512), want) {
		t.Errorf("read: %v, cookie %d", errno, cookie)
	}
	r.sendRequest(0, CommandDisconnect, 3, 0, 0, nil)
	r.expectClosed()
}

func TestUnmeasuredGoIsForOneClientOnly(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	r := rawDial(t, "unix", rig.address, clientFixedNewstyle)
	if got := r.optionResult(optGo, nil); got != repErrInvalid {
		t.Errorf("GO without data, in fixed newstyle: %#x", uint32(got))
	}
	r = rawDial(t, "unix", rig.address, 0)
	if got := r.optionResult(optInfo, nil); got != repErrInvalid {
		t.Errorf("INFO without data: %#x", uint32(got))
	}
	r.goExport("first") // with its length, from the same client
}

func TestUnmeasuredGoThatIsWrong(t *testing.T) {
	rig := startServer(t, serverSetup{}, twoExports(t)...)
	for name, data := range map[string][]byte{
		"a name of 4 GiB":      {0xff, 0xff, 0xff, 0xff, 0, 0},
		"a name too long":      rawInfo(strings.Repeat("n", stringMax+1)),
		"no name":              rawInfo("first")[:3],
		"half a name":          rawInfo("first")[:6],
		"no count":             rawInfo("first")[:10],
		"fewer than its count": rawInfo("first", make([]uint16, 512)...)[:1000],
		"65535 requests":       rawInfo("first", make([]uint16, 65535)...),
	} {
		t.Run(name, func(t *testing.T) {
			r := rawDial(t, "unix", rig.address, 0)
			_, _ = r.conn.Write(append(appendOption(nil, optGo, nil), data...)) // the server may close first
			if c, ok := r.conn.(*net.UnixConn); ok {
				_ = c.CloseWrite() // likewise
			}
			if b, err := io.ReadAll(r.in); len(b) > 0 && err == nil {
				t.Errorf("answered with % x", b)
			}
		})
	}
	r := rawDial(t, "unix", rig.address, 0)
	r.send(append(appendOption(nil, optGo, nil), rawInfo("fi\xffrst")...))
	if replies := r.readReplies(); replies[0].kind != repErrInvalid {
		t.Errorf("a name that is no UTF-8: %v", replies)
	}
	r.send(append(appendOption(nil, optGo, nil), rawInfo("first", make([]uint16, 512)...)...))
	if replies := r.readReplies(); replies[len(replies)-1].kind != repAck {
		t.Errorf("with 512 requests: %v", replies)
	}
}
