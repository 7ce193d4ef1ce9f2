package powerfail

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// The NBD protocol (doc/proto.md of NetworkBlockDevice/nbd), as far as a client
// needs it that speaks simple replies only.
const (
	nbdOptionMagic  = 0x49484156454f5054
	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698

	nbdRead        = 0
	nbdWrite       = 1
	nbdFlush       = 3
	nbdTrim        = 4
	nbdWriteZeroes = 6

	nbdFUA = 1
)

// client is one connection. Requests are sent by one goroutine and their replies
// read by another; what was read from the connection was acknowledged, whatever
// happens to the daemon afterwards.
type client struct {
	c    net.Conn
	in   *bufio.Reader
	size int64
}

func dialNBD(socket, export string) (*client, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	n := &client{c: c, in: bufio.NewReaderSize(c, 256<<10)}
	var greeting [18]byte
	var reply [10]byte
	b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	b = binary.BigEndian.AppendUint64(b, nbdOptionMagic)
	b = binary.BigEndian.AppendUint32(b, 1) // EXPORT_NAME
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(export))), export...)
	_, err = io.ReadFull(n.in, greeting[:])
	if err == nil {
		_, err = c.Write(b)
	}
	if err == nil {
		_, err = io.ReadFull(n.in, reply[:])
	}
	if err != nil {
		_ = c.Close() // it never worked
		return nil, fmt.Errorf("export %s: %w", export, err)
	}
	n.size = int64(binary.BigEndian.Uint64(reply[:]))
	return n, nil
}

func (n *client) close() { _ = n.c.Close() } // whatever is still owed is not wanted

// send sends one request; data is what a write writes.
func (n *client) send(kind, flags uint16, cookie uint64, offset, length int64, data []byte) error {
	b := make([]byte, 0, 28+len(data))
	b = binary.BigEndian.AppendUint32(b, nbdRequestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(offset))
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	_, err := n.c.Write(append(b, data...))
	return err
}

// receive waits for a reply to a request that is no read.
func (n *client) receive() (cookie uint64, errno uint32, err error) {
	var b [16]byte
	if _, err := io.ReadFull(n.in, b[:]); err != nil {
		return 0, 0, err
	}
	if m := binary.BigEndian.Uint32(b[0:]); m != nbdReplyMagic {
		return 0, 0, fmt.Errorf("reply magic %#x", m)
	}
	return binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[4:]), nil
}

// readAll reads an export from one end to the other.
func readAll(socket, export string) ([]byte, error) {
	n, err := dialNBD(socket, export)
	if err != nil {
		return nil, err
	}
	defer n.close()
	const step = 1 << 20
	data := make([]byte, n.size)
	for offset := int64(0); offset < n.size; offset += step {
		part := data[offset:min(offset+step, n.size)]
		if err := n.send(nbdRead, 0, 1, offset, int64(len(part)), nil); err != nil {
			return nil, err
		}
		_, errno, err := n.receive()
		if err == nil && errno != 0 {
			err = fmt.Errorf("errno %d", errno)
		}
		if err == nil {
			_, err = io.ReadFull(n.in, part)
		}
		if err != nil {
			return nil, fmt.Errorf("read of %s at %d: %w", export, offset, err)
		}
	}
	return data, nil
}

// ended reports whether err is how a connection ends whose daemon is killed.
func ended(err error) bool {
	var network *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &network)
}
