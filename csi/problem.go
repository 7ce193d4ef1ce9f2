package csi

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// problem is err with the code the specification has for it; nil stays nil. What
// is a gRPC status already stays as it is.
func problem(err error) error {
	if err == nil {
		return nil
	}
	var told *control.Error
	if errors.As(err, &told) {
		return status.Error(told.Reason.Code(), told.Error())
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	return status.Error(codes.Internal, err.Error())
}

// invalid is INVALID_ARGUMENT.
func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// missing is INVALID_ARGUMENT of a field that a request must have.
func missing(field string) error { return invalid("the request has no %s", field) }

// needs refuses a request without one of its fields: each is a name and a value.
func needs(fields ...string) error {
	for f := fields; len(f) > 0; f = f[2:] {
		if f[1] == "" {
			return missing(f[0])
		}
	}
	return nil
}

// absolute refuses a path that depends on where the driver runs.
func absolute(what, path string) error {
	if !filepath.IsAbs(path) {
		return invalid("the %s %q is not absolute", what, path)
	}
	return nil
}

// spaceProblem is problem, with the figures of the pool when it is full.
func spaceProblem(ctx context.Context, c *control.Client, pool string, err error) error {
	if !errors.Is(err, control.ErrNoSpace) && !errors.Is(err, control.ErrOverProvisioned) {
		return problem(err)
	}
	p, poolErr := c.Pools.Get(ctx, &controlpb.GetPoolRequest{Name: pool})
	if poolErr != nil {
		return problem(err)
	}
	return status.Errorf(codes.ResourceExhausted, "%v (%s)", err, figures(p))
}

// figures says how full a pool is.
func figures(p *controlpb.Pool) string {
	text := fmt.Sprintf("pool %s: %s of %s available, %s allocated, %s promised to %d volumes", p.GetName(),
		units.FormatSize(p.GetAvailableBytes()), units.FormatSize(p.GetTotalBytes()), units.FormatSize(p.GetAllocatedBytes()),
		units.FormatSize(p.GetProvisionedBytes()), p.GetVolumeCount())
	if p.GetOverProvisionPercent() > 0 {
		text += fmt.Sprintf(", at most %d%% may be", p.GetOverProvisionPercent())
	}
	return text
}

// foreign is what a call for another node's volume is told.
func foreign(id, node, here string) error {
	return &foreignError{fmt.Sprintf("%s is on node %s, and this is the driver of node %s: ask the one there", id, node, here), codes.FailedPrecondition}
}

// foreignError is about what lies on another node.
type foreignError struct {
	message string
	code    codes.Code
}

func (e *foreignError) Error() string { return e.message }

// GRPCStatus makes it the status of a call.
func (e *foreignError) GRPCStatus() *status.Status { return status.New(e.code, e.message) }

// elsewhere is err for CreateVolume: that the source lies on another node means that
// the volume cannot be made where it is wanted, on which the provisioner gives the
// claim back to the scheduler (csi.proto, CreateVolume Errors, "Unable to provision in
// accessible_topology").
func elsewhere(err error) error {
	var f *foreignError
	if errors.As(err, &f) {
		return &foreignError{f.message, codes.ResourceExhausted}
	}
	return err
}
