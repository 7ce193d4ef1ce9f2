package uring

// Opcodes of submission entries (io_uring.h, enum io_uring_op).
const (
	OpNop         uint8 = 0
	OpReadv       uint8 = 1
	OpWritev      uint8 = 2
	OpFsync       uint8 = 3
	OpReadFixed   uint8 = 4
	OpWriteFixed  uint8 = 5
	OpPollAdd     uint8 = 6
	OpPollRemove  uint8 = 7
	OpSendmsg     uint8 = 9
	OpRecvmsg     uint8 = 10
	OpTimeout     uint8 = 11
	OpAsyncCancel uint8 = 14
	OpFallocate   uint8 = 17
	OpRead        uint8 = 22
	OpWrite       uint8 = 23
	OpFadvise     uint8 = 24
	OpURingCmd    uint8 = 46
)

// Flags of a submission entry.
const (
	SQEFixedFile uint8 = 1 << 0 // FD is an index into the registered files
	SQEIODrain   uint8 = 1 << 1
	SQEIOLink    uint8 = 1 << 2
	SQEAsync     uint8 = 1 << 4
)

// FsyncDataSync asks OpFsync for fdatasync, in OpFlags.
const FsyncDataSync uint32 = 1

// PollAddMulti makes OpPollAdd report every wake-up, in Length.
const PollAddMulti uint32 = 1

// Flags of a completion entry.
const (
	CQEBuffer uint32 = 1 << 0
	CQEMore   uint32 = 1 << 1 // the request stays armed and will complete again
)

// Setup flags (io_uring_setup(2)).
const (
	SetupCQSize       uint32 = 1 << 3
	SetupClamp        uint32 = 1 << 4
	SetupSubmitAll    uint32 = 1 << 7
	SetupCoopTaskrun  uint32 = 1 << 8
	SetupTaskrunFlag  uint32 = 1 << 9
	SetupSQE128       uint32 = 1 << 10
	SetupCQE32        uint32 = 1 << 11
	SetupSingleIssuer uint32 = 1 << 12
	SetupDeferTaskrun uint32 = 1 << 13
	SetupNoSQArray    uint32 = 1 << 16
)

// Feature bits the kernel reports at setup.
const (
	FeatureSingleMmap uint32 = 1 << 0
	FeatureNoDrop     uint32 = 1 << 1
	FeatureExtArg     uint32 = 1 << 8
)

const (
	enterGetEvents uint32 = 1 << 0
	enterExtArg    uint32 = 1 << 3

	sqCQOverflow uint32 = 1 << 1
	sqTaskrun    uint32 = 1 << 2

	offSQRing uint64 = 0
	offCQRing uint64 = 0x8000000
	offSQEs   uint64 = 0x10000000

	registerProbe         = 8
	registerBuffers2      = 15
	registerBuffersUpdate = 16
	registerFiles2        = 13
	registerFilesUpdate2  = 14

	rsrcRegisterSparse uint32 = 1 << 0

	probeSupported uint16 = 1 << 0
	probeOpsMax           = 256
)

// SQE is a submission entry.
//
//	offset size meaning
//	     0    1 opcode
//	     1    1 flags (SQE...)
//	     2    2 I/O priority, or op-specific flags
//	     4    4 file descriptor or registered index
//	     8    8 offset in the file, or command opcode (OpURingCmd)
//	    16    8 address of the data
//	    24    4 length of the data
//	    28    4 op-specific flags (rw_flags, fsync_flags, poll events...)
//	    32    8 user data, returned in the CQE
//	    40    2 registered buffer index
//	    42    2 personality
//	    44    4 splice fd / file slot
//	    48   16 op-specific; with SQE128 the command area begins here and is 80 bytes
type SQE struct {
	Opcode      uint8
	Flags       uint8
	IOPrio      uint16
	FD          int32
	Offset      uint64
	Addr        uint64
	Length      uint32
	OpFlags     uint32
	UserData    uint64
	BufIndex    uint16
	Personality uint16
	FileSlot    int32
	Addr3       uint64
	_           uint64
}

// CQE is a completion entry.
//
//	offset size meaning
//	     0    8 user data of the SQE
//	     8    4 result: >= 0, or a negative errno
//	    12    4 flags (CQE...)
type CQE struct {
	UserData uint64
	Result   int32
	Flags    uint32
}

type sqOffsets struct {
	Head, Tail, RingMask, RingEntries, Flags, Dropped, Array, _ uint32
	UserAddr                                                    uint64
}

type cqOffsets struct {
	Head, Tail, RingMask, RingEntries, Overflow, CQEs, Flags, _ uint32
	UserAddr                                                    uint64
}

type setupParams struct {
	SQEntries, CQEntries, Flags, SQThreadCPU, SQThreadIdle, Features, WQFd uint32
	_                                                                      [3]uint32
	SQOff                                                                  sqOffsets
	CQOff                                                                  cqOffsets
}

type getEventsArg struct {
	Sigmask     uint64
	SigmaskSize uint32
	MinWait     uint32 // microseconds; Linux 6.12, zero before
	Timeout     uint64 // address of a timespec
}

type timespec struct{ Sec, Nsec int64 }

type rsrcRegister struct {
	Count, Flags uint32
	_            uint64
	Data, Tags   uint64
}

type rsrcUpdate2 struct {
	Offset, _  uint32
	Data, Tags uint64
	Count, _   uint32
}

type iovec struct {
	Base uint64
	Len  uint64
}

type probeHeader struct {
	LastOp, OpsLen uint8
	_              uint16
	_              [3]uint32
}

type probeOp struct {
	Op, _ uint8
	Flags uint16
	_     uint32
}
