package writelog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The log begins with a superblock in a sector of its own:
//
//	offset size
//	     0    8 magic
//	     8    8 version
//	    16    8 number of entries
//	    24    4 size of a sector, of which all positions and lengths are multiples
//
// Each entry is a sector with this header, then the data of a write. A mark has its
// text in the sector of the header; a discard has no data.
//
//	offset size
//	     0    8 sector of the device
//	     8    8 number of sectors
//	    16    8 flags
//	    24    8 length of a mark's text
//
// All numbers are little-endian.
const (
	magic   = 0x6a736677736872
	version = 1

	superSize = 28
	entrySize = 32

	sectorSizeMax = 64 << 10 // above any disk's; a bound for what is allocated
	entriesMax    = 1 << 24  // of 512 bytes at least: a log of 8 GiB
)

// ErrFormat is wrapped by what Read says of bytes that are no log, or not all of one.
var ErrFormat = errors.New("writelog: not a log of dm-log-writes")

// Flags say what an entry was.
type Flags uint64

// The flags of dm-log-writes.
const (
	Flush Flags = 1 << iota // the cache was flushed before; all entries before are durable
	FUA                     // durable by itself
	Discard
	Mark
	Metadata // the file system called it so
)

// Entry is one thing done to the device, in the order in which they became durable:
// an unflushed write stands before the flush that covered it.
type Entry struct {
	Flags  Flags
	Offset int64  // of the device
	Length int64  // bytes; 0: a bare flush, or a mark
	Text   string // of a mark

	data int64 // where the data are in the log
}

// Durable reports whether power that fails right after e finds all before it on the
// disk: a crash there is a state worth a look.
func (e *Entry) Durable() bool { return e.Flags&(Flush|FUA) != 0 }

// Writes reports whether e changes the device.
func (e *Entry) Writes() bool { return e.Length > 0 }

// Log is a log that has been read.
type Log struct {
	Entries    []Entry
	SectorSize int64

	from io.ReaderAt
}

// Read reads the entries of a log; their data are read when they are wanted.
func Read(from io.ReaderAt) (*Log, error) {
	var b [superSize]byte
	if _, err := from.ReadAt(b[:], 0); err != nil {
		return nil, fmt.Errorf("%w: superblock: %w", ErrFormat, err)
	}
	if m := binary.LittleEndian.Uint64(b[0:]); m != magic {
		return nil, fmt.Errorf("%w: magic %#x", ErrFormat, m)
	}
	if v := binary.LittleEndian.Uint64(b[8:]); v != version {
		return nil, fmt.Errorf("%w: version %d", ErrFormat, v)
	}
	count, sector := binary.LittleEndian.Uint64(b[16:]), int64(binary.LittleEndian.Uint32(b[24:]))
	if sector < 512 || sector > sectorSizeMax || sector&(sector-1) != 0 {
		return nil, fmt.Errorf("%w: sectors of %d bytes", ErrFormat, sector)
	}
	if count > entriesMax {
		return nil, fmt.Errorf("%w: %d entries", ErrFormat, count)
	}
	l := &Log{SectorSize: sector, from: from}
	at, header := sector, make([]byte, sector)
	for i := range count {
		if _, err := from.ReadAt(header, at); err != nil {
			return nil, fmt.Errorf("%w: entry %d of %d: %w", ErrFormat, i, count, err)
		}
		e, stored, err := l.entry(header)
		if err != nil {
			return nil, fmt.Errorf("%w: entry %d of %d at %d: %w", ErrFormat, i, count, at, err)
		}
		at += sector
		e.data = at
		at += stored
		l.Entries = append(l.Entries, e)
	}
	return l, nil
}

// entry decodes the sector of an entry and says how many bytes of data follow it.
func (l *Log) entry(b []byte) (e Entry, stored int64, err error) {
	sector, sectors := binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint64(b[8:])
	e.Flags = Flags(binary.LittleEndian.Uint64(b[16:]))
	text := binary.LittleEndian.Uint64(b[24:])
	const max = 1 << 40 // sectors; offsets stay far from an overflow
	switch {
	case e.Flags&^(Flush|FUA|Discard|Mark|Metadata) != 0:
		return e, 0, fmt.Errorf("unknown flags %#x", e.Flags)
	case sector > max || sectors > max:
		return e, 0, fmt.Errorf("%d sectors at sector %d", sectors, sector)
	case e.Flags&Mark != 0 && (sectors != 0 || text > uint64(len(b)-entrySize)):
		return e, 0, fmt.Errorf("a mark of %d bytes and %d sectors", text, sectors)
	case e.Flags&Mark == 0 && text != 0:
		return e, 0, fmt.Errorf("%d bytes of text without a mark", text)
	}
	e.Offset, e.Length = int64(sector)*l.SectorSize, int64(sectors)*l.SectorSize
	if e.Flags&Mark != 0 {
		e.Text = string(bytes.TrimRight(b[entrySize:entrySize+text], "\x00"))
	}
	if e.Flags&Discard == 0 {
		stored = e.Length
	}
	return e, stored, nil
}

// Device is what a log is replayed onto.
type Device interface {
	io.WriterAt
	Discard(offset, length int64) error
}

// Apply does e again.
func (l *Log) Apply(d Device, e *Entry) error {
	return l.ApplyPart(d, e, 0, e.Length)
}

// ApplyPart does again what e did to length bytes from offset of its range: of a
// write that tore, some sectors.
func (l *Log) ApplyPart(d Device, e *Entry, offset, length int64) error {
	switch {
	case length == 0:
		return nil
	case e.Flags&Discard != 0:
		return d.Discard(e.Offset+offset, length)
	}
	buf := make([]byte, min(length, 1<<20))
	for done := int64(0); done < length; {
		part := buf[:min(length-done, int64(len(buf)))]
		if _, err := l.from.ReadAt(part, e.data+offset+done); err != nil {
			return fmt.Errorf("writelog: data of the entry for %d+%d: %w", e.Offset, e.Length, err)
		}
		if _, err := d.WriteAt(part, e.Offset+offset+done); err != nil {
			return err
		}
		done += int64(len(part))
	}
	return nil
}
