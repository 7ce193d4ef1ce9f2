package main

import (
	"encoding/binary"
	"fmt"
)

// Numbers of the NBD protocol, doc/proto.md of the NetworkBlockDevice project.
const (
	magicServer   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicSimple   = 0x67446698
	magicChunk    = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optGo              = 7
	optStructuredReply = 8

	repAck      = 1
	repInfo     = 3
	repErrorBit = 1 << 31

	infoExport = 0

	cmdRead  = 0
	cmdWrite = 1
	cmdDisc  = 2
	cmdFlush = 3

	chunkFlagDone = 1 << 0
	chunkErrorBit = 1 << 15
)

// A request header, all big-endian:
//
//	offset size
//	0      4    magicRequest
//	4      2    flags
//	6      2    command
//	8      8    cookie, the slot here
//	16     8    offset
//	24     4    length
const requestBytes = 28

func putRequest(b []byte, command uint16, cookie, offset uint64, length uint32) {
	_ = b[requestBytes-1]
	binary.BigEndian.PutUint32(b[0:], magicRequest)
	binary.BigEndian.PutUint16(b[4:], 0)
	binary.BigEndian.PutUint16(b[6:], command)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint64(b[16:], offset)
	binary.BigEndian.PutUint32(b[24:], length)
}

// The two reply headers, all big-endian:
//
//	simple: magicSimple(4) error(4) cookie(8), then the data of a read
//	chunk:  magicChunk(4) flags(2) type(2) cookie(8) length(4), then length bytes
const (
	simpleBytes = 16
	chunkBytes  = 20
)

// replies takes the reply stream apart. Decode is fed what arrived, in any
// pieces, and calls done once for each finished request.
type replies struct {
	readLength func(cookie uint64) (length int, ok bool) // data after a simple reply; !ok for a cookie not in flight

	skip   int    // bytes of payload still to come
	cookie uint64 // whose payload that is
	last   bool   // the request ends with that payload
}

// Decode consumes from b and returns how much; the rest is the begin of a
// header and must be there again, with more behind it, at the next call.
func (r *replies) Decode(b []byte, done func(cookie uint64)) (used int, err error) {
	total := len(b)
	for {
		if r.skip > 0 {
			n := min(r.skip, len(b))
			b = b[n:]
			if r.skip -= n; r.skip > 0 {
				return total - len(b), nil
			}
			if r.last {
				done(r.cookie)
			}
		}
		if len(b) < simpleBytes {
			return total - len(b), nil
		}
		switch magic := binary.BigEndian.Uint32(b); magic {
		case magicSimple:
			if code := binary.BigEndian.Uint32(b[4:]); code != 0 {
				return total - len(b), fmt.Errorf("nbd: the server answered error %d", code)
			}
			r.cookie, r.last = binary.BigEndian.Uint64(b[8:]), true
			length, ok := r.readLength(r.cookie)
			if !ok {
				return total - len(b), fmt.Errorf("nbd: reply to request %d, which is not in flight", r.cookie)
			}
			r.skip = length
			b = b[simpleBytes:]
		case magicChunk:
			if len(b) < chunkBytes {
				return total - len(b), nil
			}
			flags, kind := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
			if kind&chunkErrorBit != 0 {
				return total - len(b), fmt.Errorf("nbd: the server answered an error chunk of type %#x", kind)
			}
			r.cookie, r.last = binary.BigEndian.Uint64(b[8:]), flags&chunkFlagDone != 0
			if _, ok := r.readLength(r.cookie); !ok {
				return total - len(b), fmt.Errorf("nbd: reply to request %d, which is not in flight", r.cookie)
			}
			r.skip = int(binary.BigEndian.Uint32(b[16:]))
			b = b[chunkBytes:]
		default:
			return total - len(b), fmt.Errorf("nbd: reply magic %#x", magic)
		}
		if r.skip == 0 && r.last {
			done(r.cookie)
		}
	}
}
