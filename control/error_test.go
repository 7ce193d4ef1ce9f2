package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// TestReasonsAndCodes is the mapping that control.proto promises.
func TestReasonsAndCodes(t *testing.T) {
	want := map[controlpb.Reason]codes.Code{
		controlpb.Reason_REASON_NOT_FOUND: codes.NotFound, controlpb.Reason_REASON_EXISTS: codes.AlreadyExists,
		controlpb.Reason_REASON_INVALID: codes.InvalidArgument, controlpb.Reason_REASON_IN_USE: codes.FailedPrecondition,
		controlpb.Reason_REASON_HAS_SNAPSHOTS: codes.FailedPrecondition, controlpb.Reason_REASON_HAS_VOLUMES: codes.FailedPrecondition,
		controlpb.Reason_REASON_NO_SPACE: codes.ResourceExhausted, controlpb.Reason_REASON_OVER_PROVISIONED: codes.ResourceExhausted,
		controlpb.Reason_REASON_READ_ONLY: codes.FailedPrecondition, controlpb.Reason_REASON_STOPPED: codes.FailedPrecondition,
		controlpb.Reason_REASON_CORRUPT: codes.DataLoss, controlpb.Reason_REASON_MISSING_DEVICE: codes.FailedPrecondition,
		controlpb.Reason_REASON_NOT_POOL: codes.FailedPrecondition, controlpb.Reason_REASON_FOREIGN: codes.FailedPrecondition,
		controlpb.Reason_REASON_UNSUPPORTED_FORMAT: codes.FailedPrecondition, controlpb.Reason_REASON_NOT_SUPPORTED: codes.Unimplemented,
		controlpb.Reason_REASON_IO: codes.Internal, controlpb.Reason_REASON_UNAVAILABLE: codes.Unavailable, controlpb.Reason_REASON_INTERNAL: codes.Internal,
	}
	for number, name := range controlpb.Reason_name {
		wire := controlpb.Reason(number)
		if wire == controlpb.Reason_REASON_UNSPECIFIED {
			continue
		}
		r := reasonOfWire(wire, codes.Unknown)
		if r == ErrUnknown || r.Code() != want[wire] || r.Error() == "" {
			t.Errorf("%s is %d (%v) with code %v, want %v", name, r, r, r.Code(), want[wire])
		}
	}
	for r := range reasonCount {
		if (r > ErrUnknown && r < ErrPrecondition) != (reasons[r].wire != controlpb.Reason_REASON_UNSPECIFIED) || r.Error() == "" {
			t.Errorf("reason %d: %+v", r, reasons[r])
		}
	}
	if reasonCount.Code() != codes.Unknown || reasonCount.Error() == "" || (&Error{Reason: reasonCount}).GRPCStatus().Code() != codes.Unknown {
		t.Error("a reason out of the table")
	}
}

func TestCodesWithoutAReason(t *testing.T) {
	for code, want := range map[codes.Code]Reason{
		codes.NotFound: ErrNotFound, codes.AlreadyExists: ErrExists, codes.InvalidArgument: ErrInvalid, codes.OutOfRange: ErrInvalid,
		codes.FailedPrecondition: ErrPrecondition, codes.Aborted: ErrPrecondition, codes.ResourceExhausted: ErrNoSpace, codes.DataLoss: ErrCorrupt,
		codes.Unimplemented: ErrNotSupported, codes.Unavailable: ErrUnavailable, codes.Internal: ErrInternal, codes.DeadlineExceeded: ErrTimeout,
		codes.Canceled: ErrCanceled, codes.PermissionDenied: ErrDenied, codes.Unauthenticated: ErrDenied, codes.Unknown: ErrUnknown,
	} {
		if e := fromStatus(status.New(code, "so it is")); e.Reason != want || !strings.Contains(e.Error(), "so it is") {
			t.Errorf("%v: %#v, want %d", code, e, want)
		}
	}
	if e := fromStatus(status.New(codes.NotFound, "")); e.Error() != "not found" {
		t.Errorf("without a message: %q", e)
	}
}

func TestErrorfAndItsWay(t *testing.T) {
	cause := errors.New("disk 2 is gone")
	for _, tt := range []struct {
		err  error
		want string
	}{
		{Errorf(ErrNotFound, "volume", "vm1", ""), "volume vm1: not found; `ashlar volume list` shows what there is"},
		{Errorf(ErrNotFound, "device", "/dev/sdx", ""), "device /dev/sdx: not found"},
		{Errorf(ErrInUse, "volume", "vm1", ""), "volume vm1: in use; disconnect its clients first"},
		{Errorf(ErrInUse, "pool", "tank", "pool tank: a scrub is running"), "pool tank: a scrub is running"},
		{Errorf(ErrIO, "pool", "tank", "pool tank: %w", cause), "pool tank: disk 2 is gone; look at `ashlar events` and at the kernel's log"},
		{&Error{Reason: ErrExists, Kind: "volume", Name: "vm1", Message: "volume vm1 already exists", SameSpec: true}, "volume vm1 already exists"},
		{fmt.Errorf("while starting: %w", Errorf(ErrExists, "pool", "tank", "")), "while starting: pool tank: already exists; choose another name"},
	} {
		if tt.err.Error() != tt.want {
			t.Errorf("got %q, want %q", tt.err, tt.want)
		}
		s, ok := status.FromError(tt.err)
		var sent *Error
		if !ok || !errors.As(tt.err, &sent) {
			t.Fatalf("%v has no status", tt.err)
		}
		got := fromStatus(s)
		if got.Error() != tt.want || got.Reason != sent.Reason || got.Kind != sent.Kind || got.Name != sent.Name || got.SameSpec != sent.SameSpec {
			t.Errorf("sent %#v, received %#v", sent, got)
		}
	}
	if err := Errorf(ErrIO, "", "", "x: %w", cause); !errors.Is(err, cause) || !errors.Is(err, ErrIO) || errors.Is(err, ErrCorrupt) || errors.Is(err, context.Canceled) {
		t.Errorf("errors.Is does not find the cause and the reason of %#v", err)
	}
	if s := Errorf(ErrIO, "pool", "tank", "\xff").GRPCStatus(); s.Code() != codes.Internal {
		t.Errorf("a message that is no UTF-8: %v", s)
	}
	if e := fromStatus(Errorf(ErrInternal, "", "", "xxx").GRPCStatus()); e.Reason != ErrInternal {
		t.Errorf("%#v", e)
	}
}
