package nbd

import (
	"encoding/binary"
	"net"
)

const (
	clientBatchBytes   = 128 << 10 // headers and copied payloads of one system call
	clientBatchVectors = 256       // pieces of one system call; the kernel takes 1024 (UIO_MAXIOV)
	clientCopyMax      = 1 << 10   // a longer payload is worth a piece of its own
	clientCopyMaxTLS   = 16 << 10  // over TLS a piece is a record and a system call; records end at 16 KiB
)

// clientBatch is what the writer sends at once: headers and small payloads
// copied one behind the other, and between them the buffers of large payloads.
type clientBatch struct {
	head    []byte      // of fixed capacity: vectors point into it
	vectors [][]byte    // of fixed capacity
	rest    net.Buffers // what is left of vectors, while sending
	start   int         // head[start:] is in no vector yet
	held    []uint32    // slots whose buffers are in vectors

	refused clientQueue // requests taken off the queue unsent
	ended   clientQueue // for letGo
}

func (b *clientBatch) init(contexts int) {
	b.head = make([]byte, 0, clientBatchBytes+sizeRequestExtended+8+4*contexts)
	b.vectors = make([][]byte, 0, clientBatchVectors+3)
	b.held = make([]uint32, 0, clientBatchVectors)
}

func (b *clientBatch) reset() {
	clear(b.vectors)
	b.head, b.vectors, b.held, b.start = b.head[:0], b.vectors[:0], b.held[:0], 0
}

func (b *clientBatch) empty() bool { return len(b.head) == 0 && b.refused.First() == nil }

func copiesPayload(r *Request, tls bool) bool {
	limit := clientCopyMax
	if tls {
		limit = clientCopyMaxTLS
	}
	return len(r.Buf) <= limit
}

// fits reports whether add may be called.
func (b *clientBatch) fits(r *Request, tls bool) bool {
	need := 0
	if r.Command == CommandWrite && copiesPayload(r, tls) {
		need = len(r.Buf)
	}
	return len(b.head)+need <= clientBatchBytes && len(b.vectors) < clientBatchVectors
}

// add appends a request and reports whether the batch refers to its buffer from
// now on.
func (b *clientBatch) add(s *clientSlot, r *Request, extended, tls bool) (held bool) {
	flags, length := r.Flags, r.Length
	switch {
	case r.Command == CommandWrite && extended:
		flags |= CommandFlagPayloadLen
	case len(r.ContextIDs) > 0:
		flags |= CommandFlagPayloadLen
		length = 8 + 4*uint64(len(r.ContextIDs))
	}
	b.head = appendRequest(b.head, extended, flags, r.Command, s.cookie, r.Offset, length)
	if len(r.ContextIDs) > 0 {
		b.head = binary.BigEndian.AppendUint64(b.head, r.Length)
		for _, id := range r.ContextIDs {
			b.head = binary.BigEndian.AppendUint32(b.head, id)
		}
	}
	if r.Command != CommandWrite {
		return false
	}
	if copiesPayload(r, tls) {
		b.head = append(b.head, r.Buf...)
		return false
	}
	b.vectors = append(b.vectors, b.head[b.start:], r.Buf)
	b.start = len(b.head)
	b.held = append(b.held, uint32(s.cookie))
	return true
}

// send writes the batch to conn, in one system call where conn can.
func (b *clientBatch) send(conn net.Conn) error {
	if b.start < len(b.head) {
		b.vectors = append(b.vectors, b.head[b.start:])
	}
	if len(b.vectors) == 0 {
		return nil
	}
	if len(b.vectors) == 1 {
		_, err := conn.Write(b.vectors[0])
		return err
	}
	b.rest = b.vectors
	_, err := b.rest.WriteTo(conn)
	return err
}
