package control

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// Reason says what kept a call from being done. It is an error, so that
// errors.Is(err, control.ErrNotFound) asks for it.
type Reason uint8

// The reasons. Their meaning is in controlpb/control.proto.
const (
	ErrUnknown Reason = iota // told by no code and no reason
	ErrNotFound
	ErrExists
	ErrInvalid
	ErrInUse
	ErrHasSnapshots
	ErrHasVolumes
	ErrNoSpace
	ErrOverProvisioned
	ErrReadOnly
	ErrStopped
	ErrCorrupt
	ErrMissingDevice
	ErrNotPool
	ErrForeign
	ErrUnsupportedFormat
	ErrNotSupported
	ErrIO
	ErrUnavailable
	ErrInternal

	// Told by gRPC codes alone: a Problem has no reason for them.
	ErrPrecondition // FAILED_PRECONDITION of a reason that this side does not know
	ErrTimeout      // also context.DeadlineExceeded
	ErrCanceled     // also context.Canceled
	ErrDenied       // the daemon does not know or allow this client
	reasonCount
)

// reasons are what is known of each reason. The text completes the name of what
// an error is about; the remedy is an order, where one helps whatever the case.
var reasons = [reasonCount]struct {
	code   codes.Code
	wire   controlpb.Reason
	text   string
	remedy string
}{
	ErrUnknown:           {codes.Unknown, controlpb.Reason_REASON_UNSPECIFIED, "failed", ""},
	ErrNotFound:          {codes.NotFound, controlpb.Reason_REASON_NOT_FOUND, "not found", ""}, // by kind, see remedyOf
	ErrExists:            {codes.AlreadyExists, controlpb.Reason_REASON_EXISTS, "already exists", "choose another name"},
	ErrInvalid:           {codes.InvalidArgument, controlpb.Reason_REASON_INVALID, "invalid", ""},
	ErrInUse:             {codes.FailedPrecondition, controlpb.Reason_REASON_IN_USE, "in use", "disconnect its clients first"},
	ErrHasSnapshots:      {codes.FailedPrecondition, controlpb.Reason_REASON_HAS_SNAPSHOTS, "has snapshots", "delete them first, or give --snapshots to delete them with it"},
	ErrHasVolumes:        {codes.FailedPrecondition, controlpb.Reason_REASON_HAS_VOLUMES, "has volumes", "delete them first, or give --volumes to destroy them with it"},
	ErrNoSpace:           {codes.ResourceExhausted, controlpb.Reason_REASON_NO_SPACE, "no space left", "grow the pool, add a device, or delete snapshots or volumes"},
	ErrOverProvisioned:   {codes.ResourceExhausted, controlpb.Reason_REASON_OVER_PROVISIONED, "over-provisioned", "grow the pool, add a device, or raise --over-provision of `ashlar serve`"},
	ErrReadOnly:          {codes.FailedPrecondition, controlpb.Reason_REASON_READ_ONLY, "read-only", "close the pool and import it with all its devices"},
	ErrStopped:           {codes.FailedPrecondition, controlpb.Reason_REASON_STOPPED, "stopped", "look at `ashlar pool status`, mend the device, then close and import the pool"},
	ErrCorrupt:           {codes.DataLoss, controlpb.Reason_REASON_CORRUPT, "damaged", "look at `ashlar events`, and restore it from a copy or a snapshot"},
	ErrMissingDevice:     {codes.FailedPrecondition, controlpb.Reason_REASON_MISSING_DEVICE, "has devices missing", "connect them, or give --read-only to save what is left"},
	ErrNotPool:           {codes.FailedPrecondition, controlpb.Reason_REASON_NOT_POOL, "no pool on it", "`ashlar pool scan` shows where pools are"},
	ErrForeign:           {codes.FailedPrecondition, controlpb.Reason_REASON_FOREIGN, "holds something else", "give --force to overwrite it"},
	ErrUnsupportedFormat: {codes.FailedPrecondition, controlpb.Reason_REASON_UNSUPPORTED_FORMAT, "unsupported format", "use the version of ashlar that wrote it, or a later one"},
	ErrNotSupported:      {codes.Unimplemented, controlpb.Reason_REASON_NOT_SUPPORTED, "not supported", "compare `ashlar version` here with that of the daemon"},
	ErrIO:                {codes.Internal, controlpb.Reason_REASON_IO, "a device failed", "look at `ashlar events` and at the kernel's log"},
	ErrUnavailable:       {codes.Unavailable, controlpb.Reason_REASON_UNAVAILABLE, "not available now", "try again"},
	ErrInternal:          {codes.Internal, controlpb.Reason_REASON_INTERNAL, "failed", "look at the daemon's log"},
	ErrPrecondition:      {codes.FailedPrecondition, controlpb.Reason_REASON_UNSPECIFIED, "not possible now", ""},
	ErrTimeout:           {codes.DeadlineExceeded, controlpb.Reason_REASON_UNSPECIFIED, "took too long", ""},
	ErrCanceled:          {codes.Canceled, controlpb.Reason_REASON_UNSPECIFIED, "canceled", ""},
	ErrDenied:            {codes.PermissionDenied, controlpb.Reason_REASON_UNSPECIFIED, "not allowed", ""},
}

// Error implements error.
func (r Reason) Error() string {
	if r >= reasonCount {
		return reasons[ErrUnknown].text
	}
	return reasons[r].text
}

// Code is the gRPC code that stands for r.
func (r Reason) Code() codes.Code {
	if r >= reasonCount {
		return codes.Unknown
	}
	return reasons[r].code
}

// reasonOfWire is the reason a Problem names, or else the one its code stands for.
func reasonOfWire(wire controlpb.Reason, code codes.Code) Reason {
	if wire != controlpb.Reason_REASON_UNSPECIFIED {
		for r := range reasonCount {
			if reasons[r].wire == wire {
				return r
			}
		}
	}
	switch code {
	case codes.NotFound:
		return ErrNotFound
	case codes.AlreadyExists:
		return ErrExists
	case codes.InvalidArgument, codes.OutOfRange:
		return ErrInvalid
	case codes.FailedPrecondition, codes.Aborted:
		return ErrPrecondition
	case codes.ResourceExhausted:
		return ErrNoSpace
	case codes.DataLoss:
		return ErrCorrupt
	case codes.Unimplemented:
		return ErrNotSupported
	case codes.Unavailable:
		return ErrUnavailable
	case codes.Internal:
		return ErrInternal
	case codes.DeadlineExceeded:
		return ErrTimeout
	case codes.Canceled:
		return ErrCanceled
	case codes.PermissionDenied, codes.Unauthenticated:
		return ErrDenied
	}
	return ErrUnknown
}

// Error is what kept a call from being done.
type Error struct {
	Reason   Reason
	Kind     string // of what it is about: pool, volume, snapshot, job, device; "" for the call itself
	Name     string // of what it is about
	Message  string // one sentence with the name in it, without a full stop
	Remedy   string // an order without a full stop, or ""
	SameSpec bool   // ErrExists: what exists is what was asked for

	cause error
}

// Errorf makes an Error about the kind and name given; the message is formatted,
// and what %w wraps in it stays within reach of errors.Is. An empty format gives
// the usual message of the reason.
func Errorf(reason Reason, kind, name, format string, args ...any) *Error {
	e := &Error{Reason: reason, Kind: kind, Name: name, Remedy: remedyOf(reason, kind)}
	if format == "" {
		e.Message = strings.TrimSpace(kind + " " + name + ": " + reason.Error())
		return e
	}
	err := fmt.Errorf(format, args...)
	e.Message, e.cause = err.Error(), errors.Unwrap(err)
	return e
}

// Error implements error: what happened; what helps.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + "; " + e.Remedy
}

// Is says whether target is the reason of e.
func (e *Error) Is(target error) bool {
	switch target {
	case context.DeadlineExceeded:
		return e.Reason == ErrTimeout
	case context.Canceled:
		return e.Reason == ErrCanceled
	}
	return target == e.Reason
}

// Unwrap is the cause, where there is one on this side of the connection.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus has a gRPC server send e as it is.
func (e *Error) GRPCStatus() *status.Status {
	s := status.New(e.Reason.Code(), e.Message)
	if e.Reason < reasonCount && reasons[e.Reason].wire == controlpb.Reason_REASON_UNSPECIFIED && e.Name == "" {
		return s
	}
	wire := controlpb.Reason_REASON_UNSPECIFIED
	if e.Reason < reasonCount {
		wire = reasons[e.Reason].wire
	}
	detailed, err := s.WithDetails(&controlpb.Problem{Reason: wire, Kind: e.Kind, Name: e.Name, Remedy: e.Remedy, SameSpec: e.SameSpec})
	if err != nil { // a message that cannot be encoded: not valid UTF-8
		return s
	}
	return detailed
}

// remedyOf is the usual remedy for a reason.
func remedyOf(r Reason, kind string) string {
	if r >= reasonCount {
		return ""
	}
	if r == ErrNotFound {
		switch kind {
		case "pool", "volume", "snapshot", "job":
			return "`ashlar " + kind + " list` shows what there is"
		}
	}
	if r == ErrInUse && kind != "volume" && kind != "snapshot" {
		return ""
	}
	return reasons[r].remedy
}

// fromStatus makes an Error of what a call returned; s is not OK.
func fromStatus(s *status.Status) *Error {
	e := &Error{Message: s.Message()}
	var wire controlpb.Reason
	for _, d := range s.Details() {
		if p, ok := d.(*controlpb.Problem); ok {
			wire, e.Kind, e.Name, e.Remedy, e.SameSpec = p.GetReason(), p.GetKind(), p.GetName(), p.GetRemedy(), p.GetSameSpec()
			break
		}
	}
	e.Reason = reasonOfWire(wire, s.Code())
	if s.Code() == codes.Unimplemented && wire == controlpb.Reason_REASON_UNSPECIFIED { // gRPC itself, not the daemon
		e.Message, e.Remedy = "the daemon does not know this call ("+s.Message()+")", reasons[ErrNotSupported].remedy
	}
	if e.Remedy != "" { // an Error that was wrapped before it was sent has it in its text
		e.Message = strings.TrimSuffix(e.Message, "; "+e.Remedy)
	}
	if e.Message == "" {
		e.Message = strings.TrimSpace(e.Kind+" "+e.Name) + ": " + e.Reason.Error()
		e.Message = strings.TrimPrefix(e.Message, ": ")
	}
	return e
}
