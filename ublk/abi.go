package ublk

import "encoding/binary"

// The interface of ublk_drv (include/uapi/linux/ublk_cmd.h). Structures are encoded
// by offset, in the machine's byte order, so that no layout of Go's is relied on.

// Numbers of control commands, and of I/O commands.
const (
	commandGetDevInfo               = 0x02
	commandAddDev                   = 0x04
	commandDelDev                   = 0x05
	commandStartDev                 = 0x06
	commandStopDev                  = 0x07
	commandSetParams                = 0x08
	commandGetParams                = 0x09
	commandStartUserRecovery        = 0x10
	commandEndUserRecovery          = 0x11
	commandGetDevInfo2              = 0x12
	commandGetFeatures              = 0x13 // Linux 6.5
	commandUpdateSize               = 0x15 // Linux 6.16
	commandQuiesceDev               = 0x16 // Linux 6.16
	commandFetchRequest             = 0x20
	commandCommitAndFetch           = 0x21
	commandFirstEncodedOnly         = commandGetFeatures // this and later ones have no legacy number
	commandQueueNone                = 0xffff             // queue of a command that is not for a queue
	commandDeviceNone               = 0xffffffff         // device of ADD_DEV: any
	controlCommandSize              = 32
	devInfoSize                     = 64
	descriptorSize                  = 24
	ioCommandSize                   = 16
	paramsSize                      = 76   // up to and with the device numbers; the driver takes shorter and longer ones
	queueDepthMax                   = 4096 // UBLK_MAX_QUEUE_DEPTH; the maps of the queues lie this far apart
	devicesMax                      = 1 << 20
	ioOffsetBase             int64  = 0x80000000 // UBLKSRV_IO_BUF_OFFSET
	ioOffsetTagShift                = 25         // UBLK_TAG_OFF
	ioOffsetQueueShift              = 41         // UBLK_QID_OFF
	autoBufferFallback       uint64 = 1 << 16    // UBLK_AUTO_BUF_REG_FALLBACK in its place
	autoBufferNone           uint64 = 0xffff     // a place no table has
)

// Results of an I/O command. Other negative ones are errors of the command.
const (
	ioResultOK    = 0
	ioResultAbort = -19 // ENODEV: the device stops or is quiesced; the slot is not fetched again
)

// encode is a command's number as ioctl numbers are made (asm-generic/ioctl.h):
// direction, size of the argument, 'u', number. Linux 6.4.
func encode(number, size uint32, writes bool) uint32 {
	direction := uint32(2) // _IOR
	if writes {
		direction = 3 // _IOWR
	}
	return direction<<30 | size<<16 | 'u'<<8 | number
}

// controlNumber is the number of a control command for a driver that takes encoded
// ones, or only the plain ones before that.
func controlNumber(number uint32, encoded bool) uint32 {
	if !encoded && number < commandFirstEncodedOnly {
		return number
	}
	switch number {
	case commandGetDevInfo, commandGetDevInfo2, commandGetParams, commandGetFeatures:
		return encode(number, controlCommandSize, false)
	}
	return encode(number, controlCommandSize, true)
}

func ioNumber(number uint32, encoded bool) uint32 {
	if !encoded {
		return number
	}
	return encode(number, ioCommandSize, true)
}

// Features are what a driver can do, or what a device was made with (UBLK_F_...).
type Features uint64

// The features this package knows.
const (
	FeatureZeroCopy        Features = 1 << 0
	FeatureRecovery        Features = 1 << 3
	FeatureReissue         Features = 1 << 4
	FeatureUnprivileged    Features = 1 << 5
	FeatureEncodedCommands Features = 1 << 6
	FeatureUserCopy        Features = 1 << 7  // Linux 6.5
	FeatureZoned           Features = 1 << 8  // Linux 6.6
	FeatureRecoveryFailIO  Features = 1 << 9  // Linux 6.13; never asked for: it answers with errors
	FeatureUpdateSize      Features = 1 << 10 // Linux 6.16
	FeatureAutoBuffer      Features = 1 << 11 // Linux 6.16
	FeatureQuiesce         Features = 1 << 12 // Linux 6.16
	FeaturePerIODaemon     Features = 1 << 13 // Linux 6.16
	FeatureBufferAnyTask   Features = 1 << 14 // Linux 6.17
	FeatureBatch           Features = 1 << 15
	FeatureIntegrity       Features = 1 << 16
	FeatureSafeStop        Features = 1 << 17 // Linux 7.0
	FeatureNoPartitionScan Features = 1 << 18
	FeatureSharedMemory    Features = 1 << 19
	FeatureDescriptorSize  Features = 1 << 20
)

var featureNames = []struct {
	feature Features
	name    string
}{
	{FeatureZeroCopy, "zero-copy"}, {FeatureRecovery, "recovery"}, {FeatureReissue, "reissue"},
	{FeatureUnprivileged, "unprivileged"}, {FeatureEncodedCommands, "encoded-commands"}, {FeatureUserCopy, "user-copy"},
	{FeatureZoned, "zoned"}, {FeatureRecoveryFailIO, "recovery-fail-io"}, {FeatureUpdateSize, "update-size"},
	{FeatureAutoBuffer, "auto-buffer"}, {FeatureQuiesce, "quiesce"}, {FeaturePerIODaemon, "per-io-daemon"},
	{FeatureBufferAnyTask, "buffer-any-task"}, {FeatureBatch, "batch"}, {FeatureIntegrity, "integrity"}, {FeatureSafeStop, "safe-stop"},
	{FeatureNoPartitionScan, "no-partition-scan"}, {FeatureSharedMemory, "shared-memory"}, {FeatureDescriptorSize, "descriptor-size"},
}

// Has reports whether every feature in g is present.
func (f Features) Has(g Features) bool { return f&g == g }

// Names are the features known by name.
func (f Features) Names() []string {
	var names []string
	for _, n := range featureNames {
		if f.Has(n.feature) {
			names = append(names, n.name)
		}
	}
	return names
}

// State is the state of a device.
type State uint16

// The states.
const (
	StateDead     State = 0 // made and not started, or stopped
	StateLive     State = 1
	StateQuiesced State = 2 // its server is gone; requests wait for Recover
	StateFailIO   State = 3 // its server is gone; requests fail
)

// String names the state for people.
func (s State) String() string {
	switch s {
	case StateDead:
		return "dead"
	case StateLive:
		return "live"
	case StateQuiesced:
		return "quiesced"
	case StateFailIO:
		return "failing"
	}
	return "unknown"
}

// controlCommand is struct ublksrv_ctrl_cmd, the command area of a control entry.
//
//	offset size meaning
//	     0    4 device
//	     4    2 queue, 0xffff for none
//	     6    2 length of the buffer
//	     8    8 address of the buffer
//	    16    8 data of the command itself
//	    24    2 length of the device's path at the start of the buffer (unprivileged, GET_DEV_INFO2)
//	    26    6 reserved
type controlCommand struct {
	device     uint32
	length     uint16
	address    uint64
	data       uint64
	pathLength uint16
}

func (c *controlCommand) encode(b []byte) {
	_ = b[controlCommandSize-1]
	clear(b[:controlCommandSize])
	binary.NativeEndian.PutUint32(b, c.device)
	binary.NativeEndian.PutUint16(b[4:], commandQueueNone)
	binary.NativeEndian.PutUint16(b[6:], c.length)
	binary.NativeEndian.PutUint64(b[8:], c.address)
	binary.NativeEndian.PutUint64(b[16:], c.data)
	binary.NativeEndian.PutUint16(b[24:], c.pathLength)
}

// devInfo is struct ublksrv_ctrl_dev_info.
//
//	offset size meaning
//	     0    2 hardware queues
//	     2    2 depth of each
//	     4    2 state
//	     6    2 size of a descriptor, where that was asked for (descriptor-size); not used
//	     8    4 bytes of the largest I/O buffer
//	    12    4 device
//	    16    4 process id of the server, -1 for none
//	    20    4 reserved
//	    24    8 features
//	    32    8 for the server's use: the tag
//	    40    4 owner's user id
//	    44    4 owner's group id
//	    48   16 reserved
type devInfo struct {
	queues, depth uint16
	state         State
	ioMax         uint32
	device        uint32
	pid           int32
	features      Features
	tag           uint64
	uid, gid      uint32
}

func (d *devInfo) encode(b []byte) {
	_ = b[devInfoSize-1]
	clear(b[:devInfoSize])
	binary.NativeEndian.PutUint16(b, d.queues)
	binary.NativeEndian.PutUint16(b[2:], d.depth)
	binary.NativeEndian.PutUint16(b[4:], uint16(d.state))
	binary.NativeEndian.PutUint32(b[8:], d.ioMax)
	binary.NativeEndian.PutUint32(b[12:], d.device)
	binary.NativeEndian.PutUint32(b[16:], uint32(d.pid))
	binary.NativeEndian.PutUint64(b[24:], uint64(d.features))
	binary.NativeEndian.PutUint64(b[32:], d.tag)
	binary.NativeEndian.PutUint32(b[40:], d.uid)
	binary.NativeEndian.PutUint32(b[44:], d.gid)
}

func (d *devInfo) decode(b []byte) {
	_ = b[devInfoSize-1]
	*d = devInfo{
		queues:   binary.NativeEndian.Uint16(b),
		depth:    binary.NativeEndian.Uint16(b[2:]),
		state:    State(binary.NativeEndian.Uint16(b[4:])),
		ioMax:    binary.NativeEndian.Uint32(b[8:]),
		device:   binary.NativeEndian.Uint32(b[12:]),
		pid:      int32(binary.NativeEndian.Uint32(b[16:])),
		features: Features(binary.NativeEndian.Uint64(b[24:])),
		tag:      binary.NativeEndian.Uint64(b[32:]),
		uid:      binary.NativeEndian.Uint32(b[40:]),
		gid:      binary.NativeEndian.Uint32(b[44:]),
	}
}

// Operations of a descriptor, and its flags.
const (
	kernelRead        = 0
	kernelWrite       = 1
	kernelFlush       = 2
	kernelDiscard     = 3
	kernelWriteZeroes = 5

	kernelFUA        uint32 = 1 << 13
	kernelNoUnmap    uint32 = 1 << 15
	kernelNeedBuffer uint32 = 1 << 17 // UBLK_IO_F_NEED_REG_BUF: the data could not be registered
)

// descriptor is struct ublksrv_io_desc, a request as the kernel describes it.
//
//	offset size meaning
//	     0    4 operation (bits 0-7), flags (the rest)
//	     4    4 sectors
//	     8    8 first sector
//	    16    8 address of the slot's buffer, as it was fetched with
type descriptor struct {
	flags   uint32 // with the operation
	sectors uint32
	first   uint64
}

func (d *descriptor) decode(b []byte) {
	_ = b[descriptorSize-1]
	d.flags = binary.NativeEndian.Uint32(b)
	d.sectors = binary.NativeEndian.Uint32(b[4:])
	d.first = binary.NativeEndian.Uint64(b[8:])
}

// encodeIOCommand writes struct ublksrv_io_cmd, the command area of an I/O entry.
//
//	offset size meaning
//	     0    2 queue
//	     2    2 tag
//	     4    4 result of the request: bytes, or a negative errno
//	     8    8 address of the slot's buffer; 0 with user copy
func encodeIOCommand(b *[ioCommandSize]byte, queue, tag uint16, result int32, address uint64) {
	binary.NativeEndian.PutUint16(b[:], queue)
	binary.NativeEndian.PutUint16(b[2:], tag)
	binary.NativeEndian.PutUint32(b[4:], uint32(result))
	binary.NativeEndian.PutUint64(b[8:], address)
}

// autoBufferOf is where the driver registers the data of the next request, in the table of
// the ring that the command came by: struct ublk_auto_buf_reg as it lies in the entry's
// address. Where it cannot, it says so in the descriptor instead of failing the request.
func autoBufferOf(place uint64) uint64 { return place | autoBufferFallback }

// ioOffset is where in /dev/ublkcN the data of a request lies, with user copy.
func ioOffset(queue, tag uint16) int64 {
	return ioOffsetBase + int64(queue)<<ioOffsetQueueShift + int64(tag)<<ioOffsetTagShift
}
