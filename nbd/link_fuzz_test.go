package nbd

import (
	"bufio"
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
)

// FuzzLinkReplies gives the same bytes to the decoder of a Link, in pieces, and to
// that of a Client, at once: both must end the same requests in the same way, and
// see the same breaches of the protocol.
func FuzzLinkReplies(f *testing.F) {
	addReplySeeds(f)
	in := bufio.NewReaderSize(nil, clientReadBuffer) // a process runs one input at a time
	rx := make([]byte, receiveSize)
	f.Fuzz(func(t *testing.T, how uint8, data []byte) {
		options := Options{Depth: len(fuzzRequests)}
		if err := options.setDefaults(); err != nil {
			t.Fatal(err)
		}
		in.Reset(bytes.NewReader(data))
		h := &clientHandshake{
			conn: bytesConn{}, in: in, options: &options, headers: Headers(how % 3), info: ExportInfo{Size: fakeSize, Flags: allFakeFlags},
			contexts: []Context{{fakeAllocationID, ContextAllocation}, {fakeDirtyID, fakeDirty}},
		}
		c := newClient(h)
		l := &Link{info: h.info, headers: h.headers, contexts: h.contexts, slots: make([]linkSlot, len(fuzzRequests))}
		l.rx = rx
		for i := range l.slots {
			l.free = append(l.free, uint32(len(l.slots)-1-i))
		}
		count := len(fuzzRequests)
		theirs, ours := make([]Request, count), make([]LinkRequest, count)
		ended, linkEnded := make([]int, count), make([]int, count)
		for i, r := range fuzzRequests {
			theirs[i] = r
			q := &ours[i]
			*q = LinkRequest{Command: r.Command, Flags: r.Flags, Offset: r.Offset, Length: r.Length, Context: i % 2, Extents: make([]datapath.Extent, 0, 8)}
			if r.Command == CommandRead || r.Command == CommandWrite {
				theirs[i].Buf, q.Buf = make([]byte, r.Length), make([]byte, r.Length)
			}
			theirs[i].Done = func(*Request) { ended[i]++ }
			q.Done = func(*LinkRequest) { linkEnded[i]++ }
			c.mu.Lock()
			c.takeSlotLocked(&theirs[i])
			c.mu.Unlock()
			l.waiting.push(q)
			if s := l.take(); s.cookie != 1<<32|uint64(i) {
				t.Fatalf("request %d has cookie %#x", i, s.cookie)
			} else {
				s.sending = false
			}
		}
		err := c.readReplies()
		linkErr := feed(l, data, 1+int(how/3))
		if broken := new(ViolationError); errors.As(err, &broken) && linkErr == nil && l.state == linkHeader && l.rxStart == l.rxEnd { // else it waits for the rest
			t.Errorf("the client says %v, the link nothing", err)
		}
		for i := range ours {
			q, r := &ours[i], &theirs[i]
			if ended[i] != linkEnded[i] {
				t.Errorf("request %d ended %d times, on a client %d times", i, linkEnded[i], ended[i])
			}
			if ended[i] == 0 {
				continue
			}
			want := ErrnoOK
			if refused := new(CommandError); errors.As(r.Err, &refused) {
				want = refused.Errno
			}
			if q.Errno != want {
				t.Errorf("request %d: error %d, on a client %d", i, q.Errno, want)
			}
			if want != ErrnoOK {
				continue
			}
			if !bytes.Equal(q.Buf, r.Buf) {
				t.Errorf("request %d: other bytes than on a client", i)
			}
			if q.Zero && slices.ContainsFunc(q.Buf, func(b byte) bool { return b != 0 }) {
				t.Errorf("request %d: data that is said to be zero is not", i)
			}
			for _, status := range r.Statuses {
				if status.ID == l.contexts[q.Context].ID && !slices.Equal(q.Extents, status.Extents[:min(len(status.Extents), 8)]) {
					t.Errorf("request %d: extents %v, on a client %v", i, q.Extents, status.Extents)
				}
			}
		}
	})
}

// feed has l decode data that arrives in pieces.
func feed(l *Link, data []byte, piece int) error {
	for len(data) > 0 {
		if l.rxStart > 0 {
			l.rxEnd = copy(l.rx, l.rx[l.rxStart:l.rxEnd])
			l.rxStart = 0
		}
		n := copy(l.rx[l.rxEnd:], data[:min(piece, len(data))])
		l.rxEnd += n
		data = data[n:]
		if err := l.decode(); err != nil {
			return err
		}
	}
	return nil
}
