package nbd

// Names and numbers of the NBD protocol, from its specification (github.com/
// NetworkBlockDevice/nbd, doc/proto.md, "Values") and the extension branch
// extension-ext-header. All integers on the wire are big-endian.

// Handshake magics.
const (
	magicInit        uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      uint64 = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply uint64 = 0x0003e889045565a9
	magicOldstyle    uint64 = 0x00420281861253
)

// Transmission magics.
const (
	magicRequest         uint32 = 0x25609513
	magicRequestExtended uint32 = 0x21e41c71
	magicSimpleReply     uint32 = 0x67446698
	magicStructuredReply uint32 = 0x668e33ef
	magicExtendedReply   uint32 = 0x6e8a278c
)

// Handshake flags of the server, and the client's answer to them.
const (
	handshakeFixedNewstyle uint16 = 1 << 0
	handshakeNoZeroes      uint16 = 1 << 1

	clientFixedNewstyle uint32 = 1 << 0
	clientNoZeroes      uint32 = 1 << 1
)

// option is a handshake option.
type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optPeekExport      option = 4 // withdrawn
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
	optExtendedHeaders option = 11
)

// optionReply is the type of a reply to an option; errors have the top bit set.
type optionReply uint32

const (
	repAck         optionReply = 1
	repServer      optionReply = 2
	repInfo        optionReply = 3
	repMetaContext optionReply = 4

	repError             optionReply = 1 << 31
	repErrUnsupported    optionReply = repError | 1
	repErrPolicy         optionReply = repError | 2
	repErrInvalid        optionReply = repError | 3
	repErrPlatform       optionReply = repError | 4
	repErrTLSRequired    optionReply = repError | 5
	repErrUnknown        optionReply = repError | 6
	repErrShutdown       optionReply = repError | 7
	repErrBlockSize      optionReply = repError | 8
	repErrTooBig         optionReply = repError | 9
	repErrExtendedNeeded optionReply = repError | 10
)

// Information types of INFO and GO.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// TransmissionFlags describe what an export can do (proto.md, "Transmission
// flags").
type TransmissionFlags uint16

// The transmission flags.
const (
	FlagHasFlags           TransmissionFlags = 1 << 0
	FlagReadOnly           TransmissionFlags = 1 << 1
	FlagSendFlush          TransmissionFlags = 1 << 2
	FlagSendFUA            TransmissionFlags = 1 << 3
	FlagRotational         TransmissionFlags = 1 << 4
	FlagSendTrim           TransmissionFlags = 1 << 5
	FlagSendWriteZeroes    TransmissionFlags = 1 << 6
	FlagSendDF             TransmissionFlags = 1 << 7
	FlagCanMultiConn       TransmissionFlags = 1 << 8
	FlagSendResize         TransmissionFlags = 1 << 9
	FlagSendCache          TransmissionFlags = 1 << 10
	FlagSendFastZero       TransmissionFlags = 1 << 11
	FlagBlockStatusPayload TransmissionFlags = 1 << 12
)

// Command is the type of a transmission request.
type Command uint16

// The commands (proto.md, "Request types").
const (
	CommandRead        Command = 0
	CommandWrite       Command = 1
	CommandDisconnect  Command = 2
	CommandFlush       Command = 3
	CommandTrim        Command = 4
	CommandCache       Command = 5
	CommandWriteZeroes Command = 6
	CommandBlockStatus Command = 7
	CommandResize      Command = 8
)

// CommandFlags modify a command (proto.md, "Command flags").
type CommandFlags uint16

// The command flags.
const (
	CommandFlagFUA        CommandFlags = 1 << 0
	CommandFlagNoHole     CommandFlags = 1 << 1
	CommandFlagDF         CommandFlags = 1 << 2 // do not fragment
	CommandFlagReqOne     CommandFlags = 1 << 3
	CommandFlagFastZero   CommandFlags = 1 << 4
	CommandFlagPayloadLen CommandFlags = 1 << 5
)

// Types of structured and extended reply chunks. Errors have the top bit set.
const (
	chunkNone             uint16 = 0
	chunkOffsetData       uint16 = 1
	chunkOffsetHole       uint16 = 2
	chunkBlockStatus      uint16 = 5
	chunkBlockStatusExt   uint16 = 6
	chunkErrorBit         uint16 = 1 << 15
	chunkError            uint16 = chunkErrorBit | 1
	chunkErrorOffset      uint16 = chunkErrorBit | 2
	chunkFlagDone         uint16 = 1 << 0
	sizeRequest                  = 28
	sizeRequestExtended          = 32
	sizeSimpleReply              = 16
	sizeStructuredReply          = 20
	sizeExtendedReply            = 32
	sizeOptionHeader             = 16
	sizeOptionReplyHeader        = 20
)

// Error is an error code on the wire (proto.md, "Error values").
type Error uint32

// The error values.
const (
	ErrnoOK           Error = 0
	ErrnoPerm         Error = 1
	ErrnoIO           Error = 5
	ErrnoNoMem        Error = 12
	ErrnoInvalid      Error = 22
	ErrnoNoSpace      Error = 28
	ErrnoOverflow     Error = 75
	ErrnoNotSupported Error = 95
	ErrnoShutdown     Error = 108
)

// Bounds of the protocol document.
const (
	// stringMax is the longest name, description or message ("String values").
	stringMax = 4096
	// payloadMax is the payload every server should take ("Size constraints").
	payloadMax = 32 << 20
	// dfMin is the length up to which a read with DF must work.
	dfMin = 64 << 10
	// extentsMax is the most extents one reply may carry.
	extentsMax = 1 << 20
)

// ContextAllocation is the metadata context every export offers.
const ContextAllocation = "base:allocation"
