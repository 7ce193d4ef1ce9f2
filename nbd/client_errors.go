package nbd

import (
	"errors"
	"fmt"
	"syscall"
)

// Errors of a [Client].
var (
	// ErrClientClosed ends requests that were submitted after Close or
	// Shutdown, or that a Shutdown could not wait for.
	ErrClientClosed = errors.New("nbd: client is closed")
	// ErrDowngrade ends a handshake that would go on in plaintext although TLS
	// is required.
	ErrDowngrade = errors.New("nbd: TLS is required and the server does not start it")
	// ErrNotAdvertised refuses a command or flag that the server does not offer,
	// or that does not fit the command. Nothing was sent.
	ErrNotAdvertised = errors.New("nbd: command or flag not advertised by the server")
	// ErrOutside refuses a request that reaches past the end of the export.
	// Nothing was sent.
	ErrOutside = errors.New("nbd: request reaches past the end of the export")
	// ErrTooLong refuses a request longer than its header or the server's payload
	// limit can carry. Nothing was sent.
	ErrTooLong = errors.New("nbd: request is too long")
	// ErrUnaligned refuses a request that is not a multiple of the minimum block
	// size which the server advertised. Nothing was sent.
	ErrUnaligned = errors.New("nbd: request is not aligned to the minimum block size")
	// ErrReadOnly refuses a change of an export that is read-only. Nothing was sent.
	ErrReadOnly = errors.New("nbd: export is read-only")
	// ErrRequest refuses a Request whose fields contradict each other. Nothing was sent.
	ErrRequest = errors.New("nbd: malformed request")
)

// ViolationError says how the server broke the protocol. The connection is
// dead: nothing that arrives on it can be understood any more.
type ViolationError struct{ What string }

// Error implements error.
func (e *ViolationError) Error() string { return "nbd: the server broke the protocol: " + e.What }

func violationf(format string, args ...any) error {
	return &ViolationError{What: fmt.Sprintf(format, args...)}
}

// OptionError is the server's refusal of a handshake option.
type OptionError struct {
	Option  uint32 // proto.md, "Option types"
	Reply   uint32 // proto.md, "Option reply types"; the top bit is set
	Message string // from the server, "" if it sent none
}

var clientOptionNames = map[option]string{
	optExportName: "EXPORT_NAME", optAbort: "ABORT", optList: "LIST", optStartTLS: "STARTTLS", optInfo: "INFO", optGo: "GO",
	optStructuredReply: "STRUCTURED_REPLY", optListMetaContext: "LIST_META_CONTEXT", optSetMetaContext: "SET_META_CONTEXT",
	optExtendedHeaders: "EXTENDED_HEADERS",
}

var clientReplyNames = map[optionReply]string{
	repErrUnsupported: "not supported", repErrPolicy: "forbidden by policy", repErrInvalid: "invalid", repErrPlatform: "not supported on its platform",
	repErrTLSRequired: "TLS required", repErrUnknown: "unknown export", repErrShutdown: "shutting down", repErrBlockSize: "block size negotiation required",
	repErrTooBig: "too big", repErrExtendedNeeded: "extended headers required",
}

// Error implements error.
func (e *OptionError) Error() string {
	reply, ok := clientReplyNames[optionReply(e.Reply)]
	if !ok {
		reply = fmt.Sprintf("reply %#x", e.Reply)
	}
	s := fmt.Sprintf("nbd: the server refuses %s: %s", clientOptionNames[option(e.Option)], reply)
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// CommandError is an error the server replied to one request. The connection
// lives on.
type CommandError struct {
	Command Command
	Errno   Error
	Message string // from the server, "" if it sent none

	// Located says that the server named the Offset at which the request failed.
	Located bool
	Offset  uint64 // bytes, on the export
}

var clientCommandNames = [...]string{
	CommandRead: "read", CommandWrite: "write", CommandDisconnect: "disconnect", CommandFlush: "flush", CommandTrim: "trim",
	CommandCache: "cache", CommandWriteZeroes: "write-zeroes", CommandBlockStatus: "block-status", CommandResize: "resize",
}

// Error implements error.
func (e *CommandError) Error() string {
	name := fmt.Sprintf("command %d", e.Command)
	if int(e.Command) < len(clientCommandNames) {
		name = clientCommandNames[e.Command]
	}
	s := "nbd: " + name
	if e.Located {
		s += fmt.Sprintf(" at offset %d", e.Offset)
	}
	s += ": " + e.errno().Error()
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// errno is the system's number for the error; the wire's numbers are Linux's.
// A number outside the protocol means EINVAL (proto.md, "Error values").
func (e *CommandError) errno() syscall.Errno {
	switch e.Errno {
	case ErrnoPerm:
		return syscall.EPERM
	case ErrnoIO:
		return syscall.EIO
	case ErrnoNoMem:
		return syscall.ENOMEM
	case ErrnoNoSpace:
		return syscall.ENOSPC
	case ErrnoOverflow:
		return syscall.EOVERFLOW
	case ErrnoNotSupported:
		return syscall.EOPNOTSUPP
	case ErrnoShutdown:
		return syscall.ESHUTDOWN
	}
	return syscall.EINVAL
}

// Unwrap gives the wire's and the system's error number, so that both
// errors.Is(err, ErrnoNoSpace) and errors.Is(err, syscall.ENOSPC) work.
func (e *CommandError) Unwrap() []error { return []error{e.Errno, e.errno()} }
