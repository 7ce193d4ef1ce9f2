package ublk

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/ashlar-storage/ashlar/datapath"
)

const (
	sectorShift = 9
	sectorSize  = 1 << sectorShift

	attributeReadOnly      = 1 << 0
	attributeRotational    = 1 << 1
	attributeVolatileCache = 1 << 2
	attributeFUA           = 1 << 3

	paramBasic   = 1 << 0
	paramDiscard = 1 << 1

	// changeMax bounds one discard or write-zeroes. The kernel splits longer ones.
	changeMax = 2 << 30
	// ioMaxDefault is the longest read or write: what file systems and fio send at
	// most, and small enough that a queue's depth of them fits an arena.
	ioMaxDefault = 512 << 10
	// ioMaxLimit is the largest buffer of an arena. In /dev/ublkcN there would be room
	// for 32 MiB.
	ioMaxLimit = 4 << 20
)

// params is struct ublk_params as far as it is used.
//
//	offset size meaning
//	     0    4 length of the structure
//	     4    4 which parts are valid: 1 basic, 2 discard, 4 device numbers
//	     8    4 basic: attributes
//	    12    1 basic: log2 of the logical block
//	    13    1 basic: log2 of the physical block
//	    14    1 basic: log2 of the optimal I/O
//	    15    1 basic: log2 of the smallest I/O
//	    16    4 basic: most sectors of a read or write
//	    20    4 basic: sectors no request crosses a multiple of
//	    24    8 basic: sectors of the device
//	    32    8 basic: virtual boundary
//	    40    4 discard: alignment
//	    44    4 discard: granularity
//	    48    4 discard: most sectors
//	    52    4 discard: most sectors of a write-zeroes
//	    56    2 discard: most segments
//	    58    2 reserved
//	    60   16 device numbers; read only
type params struct {
	types      uint32
	attributes uint32
	logical    uint8 // these four are log2 of bytes
	physical   uint8
	optimal    uint8
	smallest   uint8
	ioMax      uint32 // sectors
	chunk      uint32 // sectors
	size       uint64 // sectors

	granularity    uint32 // bytes
	discardMax     uint32 // sectors
	writeZeroesMax uint32 // sectors
}

func (p *params) encode(b []byte) {
	_ = b[paramsSize-1]
	clear(b[:paramsSize])
	binary.NativeEndian.PutUint32(b, paramsSize)
	binary.NativeEndian.PutUint32(b[4:], p.types)
	binary.NativeEndian.PutUint32(b[8:], p.attributes)
	b[12], b[13], b[14], b[15] = p.logical, p.physical, p.optimal, p.smallest
	binary.NativeEndian.PutUint32(b[16:], p.ioMax)
	binary.NativeEndian.PutUint32(b[20:], p.chunk)
	binary.NativeEndian.PutUint64(b[24:], p.size)
	if p.types&paramDiscard != 0 {
		binary.NativeEndian.PutUint32(b[44:], p.granularity)
		binary.NativeEndian.PutUint32(b[48:], p.discardMax)
		binary.NativeEndian.PutUint32(b[52:], p.writeZeroesMax)
		binary.NativeEndian.PutUint16(b[56:], 1) // the driver takes no other number
	}
}

func (p *params) decode(b []byte) {
	_ = b[paramsSize-1]
	*p = params{
		types:      binary.NativeEndian.Uint32(b[4:]),
		attributes: binary.NativeEndian.Uint32(b[8:]),
		logical:    b[12], physical: b[13], optimal: b[14], smallest: b[15],
		ioMax:          binary.NativeEndian.Uint32(b[16:]),
		chunk:          binary.NativeEndian.Uint32(b[20:]),
		size:           binary.NativeEndian.Uint64(b[24:]),
		granularity:    binary.NativeEndian.Uint32(b[44:]),
		discardMax:     binary.NativeEndian.Uint32(b[48:]),
		writeZeroesMax: binary.NativeEndian.Uint32(b[52:]),
	}
}

// ioMaxOf is the longest read or write of a device, in bytes.
func ioMaxOf(info *datapath.Info, wanted int) int {
	if wanted == 0 {
		wanted = ioMaxDefault
	}
	if info.MaxIO != 0 {
		wanted = min(wanted, int(info.MaxIO))
	}
	return min(wanted, ioMaxLimit) &^ (datapath.BlockSize - 1)
}

// paramsOf is what the kernel is told of a device.
func paramsOf(info *datapath.Info, ioMax int) (params, error) {
	logical := max(info.MinIO, sectorSize)
	switch {
	case logical&(logical-1) != 0 || logical > datapath.BlockSize:
		return params{}, fmt.Errorf("ublk: device with a smallest I/O of %d bytes: must be a power of two up to %d", info.MinIO, datapath.BlockSize)
	case info.Size < uint64(logical):
		return params{}, fmt.Errorf("ublk: device of %d bytes: smaller than its block of %d", info.Size, logical)
	case ioMax < datapath.BlockSize:
		return params{}, fmt.Errorf("ublk: device with a largest I/O of %d bytes: at least %d", info.MaxIO, datapath.BlockSize)
	}
	log2 := func(n uint32) uint8 { return uint8(bits.Len32(n) - 1) }
	p := params{
		types:    paramBasic,
		logical:  log2(logical),
		physical: log2(datapath.BlockSize),
		smallest: log2(datapath.BlockSize),
		ioMax:    uint32(ioMax >> sectorShift),
		size:     sectorsOf(info),
	}
	p.optimal = p.smallest
	if info.PreferredIO > datapath.BlockSize {
		p.optimal = log2(info.PreferredIO)
	}
	set := func(have bool, attribute uint32) {
		if have {
			p.attributes |= attribute
		}
	}
	set(info.ReadOnly, attributeReadOnly)
	set(info.Has(datapath.FeatureRotational), attributeRotational)
	set(info.Has(datapath.FeatureFlush), attributeVolatileCache)
	set(info.Has(datapath.FeatureFlush|datapath.FeatureFUA), attributeFUA)
	if !info.ReadOnly && info.Features&(datapath.FeatureDiscard|datapath.FeatureWriteZeroes) != 0 {
		p.types |= paramDiscard
		p.granularity = datapath.BlockSize
		if info.Has(datapath.FeatureDiscard) {
			p.discardMax = changeMax >> sectorShift
		}
		if info.Has(datapath.FeatureWriteZeroes) {
			p.writeZeroesMax = changeMax >> sectorShift
		}
	}
	return p, nil
}

// sectorsOf is the size of a device in sectors; what is left of a block at its end
// is not shown.
func sectorsOf(info *datapath.Info) uint64 {
	logical := uint64(max(info.MinIO, sectorSize))
	return info.Size / logical * logical >> sectorShift
}

// requestOf makes a request of what the kernel wrote down. It reports false for an
// operation nobody asked the kernel to send. Descriptors are the kernel's, but they
// lie in memory: nothing of them is believed before datapath.Validate.
func (d *descriptor) requestOf(r *datapath.Request) bool {
	r.Flags = 0
	if d.flags&kernelFUA != 0 {
		r.Flags = datapath.FlagFUA
	}
	if d.first > 1<<(64-sectorShift)-1 {
		d.first = 1<<(64-sectorShift) - 1 // past the end of any device, and stays so as bytes
	}
	r.Offset, r.Length = d.first<<sectorShift, uint64(d.sectors)<<sectorShift
	switch d.flags & 0xff {
	case kernelRead:
		r.Op, r.Flags = datapath.OpRead, 0
	case kernelWrite:
		r.Op = datapath.OpWrite
	case kernelFlush:
		r.Op, r.Flags, r.Offset, r.Length = datapath.OpFlush, 0, 0, 0
	case kernelDiscard:
		r.Op = datapath.OpDiscard
	case kernelWriteZeroes:
		r.Op = datapath.OpWriteZeroes
		if d.flags&kernelNoUnmap != 0 {
			r.Flags |= datapath.FlagNoUnmap
		}
	default:
		return false
	}
	return true
}
