package fuse

import (
	"encoding/binary"
	"errors"
)

// The kernel's side of the protocol, include/uapi/linux/fuse.h. Everything is in the
// machine's byte order.
const (
	protocolMajor = 7
	protocolMinor = 40 // of Linux 6.9, which sends requests again
	minorLeast    = 28 // of Linux 4.20, which has max_pages

	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opFlush       = 25
	opInit        = 26
	opAccess      = 34
	opInterrupt   = 36
	opDestroy     = 38
	opFallocate   = 43
	opBatchForget = 42

	notifyResend = 7

	initAsyncRead  = 1 << 0
	initBigWrites  = 1 << 5
	initAsyncDIO   = 1 << 15
	initMaxPages   = 1 << 22
	initExtended   = 1 << 30
	initHasResend  = 1 << 39
	openDirectIO   = 1 << 0
	openKeepCache  = 1 << 1
	openNoFlush    = 1 << 5 // Linux 5.16; a process that is killed must not wait in close
	openParallelIO = 1 << 6 // Linux 6.2: writes do not wait for each other

	rootNode   = 1
	fileHandle = 1

	headerInSize  = 40
	headerOutSize = 16
	// headSize is what is read apart from a write's data: headers of a write.
	headSize = headerInSize + 40
	// readLeast is the shortest buffer that the kernel takes (FUSE_MIN_READ_BUFFER).
	readLeast = 8192

	initInLeast = 16
	initInSize  = 64
	initOutSize = 64
	attrOutSize = 104
	openOutSize = 16
	statfsSize  = 80
	outSizeMax  = headerOutSize + attrOutSize
	pageSize    = 4096
	fallocKeep  = 1 // FALLOC_FL_KEEP_SIZE
	fallocPunch = 2 // FALLOC_FL_PUNCH_HOLE
	fallocZero  = 16
	modeRegular = 0o100000
	fileMode    = modeRegular | 0o600
	attrSeconds = 1 << 31
)

// errWire marks bytes that are no request.
var errWire = errors.New("fuse: the kernel sent what is no request")

// call is a request of the kernel's.
//
//	offset size meaning
//	     0    4 length of all of it
//	     4    4 operation
//	     8    8 unique: goes into the answer
//	    16    8 node
//	    24   16 user, group, process, extensions
//	    40      by operation
//
// READ and WRITE: handle 8, offset 8, size 4, flags 4, lock owner 8, flags 4, reserved 4;
// a write's data follows. FALLOCATE: handle 8, offset 8, length 8, mode 4, reserved 4.
type call struct {
	op     uint32
	unique uint64
	node   uint64
	offset uint64
	length uint64 // of the range
	mode   uint32 // FALLOCATE
}

// decode takes apart a request of n bytes, of which head has the first, up to headSize.
// Of a write, the n-headSize bytes of data were read elsewhere.
func (c *call) decode(head []byte, n int) error {
	if n < headerInSize || len(head) < min(n, headSize) || uint64(binary.NativeEndian.Uint32(head)) != uint64(n) {
		return errWire
	}
	*c = call{
		op:     binary.NativeEndian.Uint32(head[4:]),
		unique: binary.NativeEndian.Uint64(head[8:]),
		node:   binary.NativeEndian.Uint64(head[16:]),
	}
	switch c.op {
	case opRead, opWrite:
		if n < headSize {
			return errWire
		}
		c.offset = binary.NativeEndian.Uint64(head[48:])
		c.length = uint64(binary.NativeEndian.Uint32(head[56:]))
		if c.op == opWrite && c.length != uint64(n-headSize) {
			return errWire
		}
	case opFallocate:
		if n < headerInSize+32 {
			return errWire
		}
		c.offset = binary.NativeEndian.Uint64(head[48:])
		c.length = binary.NativeEndian.Uint64(head[56:])
		c.mode = binary.NativeEndian.Uint32(head[64:])
	}
	return nil
}

// putHeader writes the header of an answer with size bytes after it.
func putHeader(b []byte, size int, errno int32, unique uint64) {
	binary.NativeEndian.PutUint32(b, uint32(headerOutSize+size))
	binary.NativeEndian.PutUint32(b[4:], uint32(-errno))
	binary.NativeEndian.PutUint64(b[8:], unique)
}

// initIn is what the kernel offers with INIT.
//
//	offset size meaning (after the header)
//	     0    8 major and minor version
//	     8    4 read-ahead
//	    12    4 flags
//	    16    4 more flags, when flags have initExtended
type initIn struct {
	major, minor uint32
	readAhead    uint32
	flags        uint64
}

// decode takes apart the part of INIT after the header.
func (i *initIn) decode(b []byte) error {
	if len(b) < initInLeast {
		return errWire
	}
	*i = initIn{
		major: binary.NativeEndian.Uint32(b), minor: binary.NativeEndian.Uint32(b[4:]),
		readAhead: binary.NativeEndian.Uint32(b[8:]), flags: uint64(binary.NativeEndian.Uint32(b[12:])),
	}
	if i.flags&initExtended != 0 {
		if len(b) < 20 {
			return errWire
		}
		i.flags |= uint64(binary.NativeEndian.Uint32(b[16:])) << 32
	}
	return nil
}

// initWanted is what the server wants of what the kernel offers.
const initWanted = initAsyncRead | initBigWrites | initAsyncDIO | initMaxPages | initExtended | initHasResend

// putInit writes the answer to INIT.
//
//	offset size meaning (after the header)
//	     0    8 major and minor version
//	     8    4 read-ahead
//	    12    4 flags
//	    16    2 requests in the background, asynchronous ones
//	    18    2 how many make the kernel see congestion
//	    20    4 longest write
//	    24    4 unit of times in ns
//	    28    2 pages of the longest request
//	    30    2 alignment of DAX mappings
//	    32    4 more flags
func putInit(b []byte, s *session) {
	clear(b[:initOutSize])
	binary.NativeEndian.PutUint32(b, protocolMajor)
	binary.NativeEndian.PutUint32(b[4:], s.minor)
	binary.NativeEndian.PutUint32(b[8:], 0) // pages are cached above the loop device
	binary.NativeEndian.PutUint32(b[12:], uint32(s.flags))
	binary.NativeEndian.PutUint16(b[16:], s.background)
	binary.NativeEndian.PutUint16(b[18:], s.background)
	binary.NativeEndian.PutUint32(b[20:], s.ioMax)
	binary.NativeEndian.PutUint32(b[24:], 1)
	binary.NativeEndian.PutUint16(b[28:], uint16(s.ioMax/pageSize))
	binary.NativeEndian.PutUint32(b[32:], uint32(s.flags>>32))
}

// putAttr writes the answer to GETATTR. It is valid for ever, so that looking at a loop
// device, which asks for the number of the file, does not wait for a server that is
// away; who wants to know a new size asks past what the kernel has (AT_STATX_FORCE_SYNC).
//
//	offset size meaning (after the header)
//	     0   16 valid for: seconds 8, nanoseconds 4, reserved 4
//	    16    8 inode
//	    24    8 size
//	    32    8 blocks of 512 bytes
//	    40   36 times
//	    76    4 mode
//	    80    4 links
//	    84   12 user, group, device
//	    96    4 block size
//	   100    4 flags
func putAttr(b []byte, size uint64) {
	clear(b[:attrOutSize])
	binary.NativeEndian.PutUint64(b, attrSeconds)
	binary.NativeEndian.PutUint64(b[16:], rootNode)
	binary.NativeEndian.PutUint64(b[24:], size)
	binary.NativeEndian.PutUint64(b[32:], size/512)
	binary.NativeEndian.PutUint32(b[76:], fileMode)
	binary.NativeEndian.PutUint32(b[80:], 1)
	binary.NativeEndian.PutUint32(b[96:], pageSize)
}

// putOpen writes the answer to OPEN.
func putOpen(b []byte) {
	clear(b[:openOutSize])
	binary.NativeEndian.PutUint64(b, fileHandle)
	binary.NativeEndian.PutUint32(b[8:], openDirectIO|openNoFlush|openParallelIO)
}

// putStatfs writes the answer to STATFS. The block size becomes the granularity of the
// loop device's discards.
//
//	offset size meaning (after the header)
//	     0   24 blocks, free blocks, available blocks
//	    24   16 files, free files
//	    40    4 block size
//	    44    4 longest name
//	    48    4 fragment size
func putStatfs(b []byte, size uint64) {
	clear(b[:statfsSize])
	binary.NativeEndian.PutUint64(b, size/pageSize)
	binary.NativeEndian.PutUint64(b[24:], 1)
	binary.NativeEndian.PutUint32(b[40:], pageSize)
	binary.NativeEndian.PutUint32(b[44:], 255)
	binary.NativeEndian.PutUint32(b[48:], pageSize)
}
