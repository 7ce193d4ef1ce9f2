package fuse

import (
	"encoding/binary"
	"fmt"
)

// sessionVersion is the first byte of a session as the keeper has it. 1: the first.
const sessionVersion = 1

// sessionSize is the length of an encoded session without the path.
const sessionSize = 32

// session is what a connection was made with, once and for all: INIT is never sent
// again. The keeper has it for whoever recovers.
//
//	offset size meaning (encoded, little-endian)
//	     0    1 version
//	     1    1 1: read-only
//	     2    2 requests in the background
//	     4    4 minor version of the protocol
//	     8    8 flags of INIT
//	    16    4 longest read or write
//	    20    4 logical block
//	    24    4 device number of the mount: the name of the connection
//	    28    4 length of the path
//	    32      path of the mount, as whoever made it saw it
type session struct {
	minor      uint32
	flags      uint64
	background uint16
	ioMax      uint32 // bytes
	block      uint32 // bytes
	readOnly   bool
	connection uint32
	file       string
}

func (s *session) encode() []byte {
	b := make([]byte, sessionSize, sessionSize+len(s.file))
	b[0] = sessionVersion
	if s.readOnly {
		b[1] = 1
	}
	binary.LittleEndian.PutUint16(b[2:], s.background)
	binary.LittleEndian.PutUint32(b[4:], s.minor)
	binary.LittleEndian.PutUint64(b[8:], s.flags)
	binary.LittleEndian.PutUint32(b[16:], s.ioMax)
	binary.LittleEndian.PutUint32(b[20:], s.block)
	binary.LittleEndian.PutUint32(b[24:], s.connection)
	binary.LittleEndian.PutUint32(b[28:], uint32(len(s.file)))
	return append(b, s.file...)
}

func (s *session) decode(b []byte) error {
	if len(b) < sessionSize || b[0] != sessionVersion || b[1] > 1 ||
		uint64(binary.LittleEndian.Uint32(b[28:])) != uint64(len(b)-sessionSize) {
		return fmt.Errorf("fuse: the keeper's entry is not of this version of ashlar")
	}
	*s = session{
		readOnly:   b[1] == 1,
		background: binary.LittleEndian.Uint16(b[2:]),
		minor:      binary.LittleEndian.Uint32(b[4:]),
		flags:      binary.LittleEndian.Uint64(b[8:]),
		ioMax:      binary.LittleEndian.Uint32(b[16:]),
		block:      binary.LittleEndian.Uint32(b[20:]),
		connection: binary.LittleEndian.Uint32(b[24:]),
		file:       string(b[sessionSize:]),
	}
	if s.ioMax < ioMaxLeast || s.ioMax > ioMaxLimit || s.ioMax%ioMaxLeast != 0 || s.block < blockMin || s.block > blockDefault || s.block&(s.block-1) != 0 {
		return fmt.Errorf("fuse: the keeper's entry has blocks of %d bytes and requests of up to %d", s.block, s.ioMax)
	}
	return nil
}

// resends tells whether the kernel can send requests again.
func (s *session) resends() bool { return s.flags&initHasResend != 0 }
