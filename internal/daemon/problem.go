package daemon

import (
	"context"
	"errors"
	"strings"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// reasons tells what an error of the engine means to a client. The first that fits
// counts: what is more telling stands first.
var reasons = []struct {
	err    error
	reason control.Reason
}{
	{engine.ErrClosed, control.ErrUnavailable},
	{engine.ErrBusy, control.ErrUnavailable},
	{engine.ErrAmbiguous, control.ErrInvalid},
	{engine.ErrNoDefault, control.ErrInvalid},
	{engine.ErrVolumes, control.ErrHasVolumes},
	{pool.ErrHasSnapshots, control.ErrHasSnapshots},
	{pool.ErrCorrupt, control.ErrCorrupt},
	{pool.ErrStopped, control.ErrStopped},
	{pool.ErrInUse, control.ErrInUse},
	{pool.ErrReadOnly, control.ErrReadOnly},
	{pool.ErrForeign, control.ErrForeign},
	{pool.ErrNotPool, control.ErrNotPool},
	{pool.ErrUnsupported, control.ErrUnsupportedFormat},
	{pool.ErrNotSupported, control.ErrNotSupported},
	{pool.ErrOverProvisioned, control.ErrOverProvisioned},
	{pool.ErrNoSpace, control.ErrNoSpace},
	{pool.ErrExists, control.ErrExists},
	{pool.ErrInvalid, control.ErrInvalid},
	{pool.ErrNotFound, control.ErrNotFound},
	{context.DeadlineExceeded, control.ErrTimeout},
	{context.Canceled, control.ErrCanceled},
}

// problem is err as a client of the control API is told; nil stays nil.
func problem(kind, name string, err error) error {
	if err == nil {
		return nil
	}
	var told *control.Error
	if errors.As(err, &told) {
		return told
	}
	reason := reasonOf(err)
	var device *engine.DeviceError
	named := errors.As(err, &device)
	if named && reason == control.ErrInternal {
		reason = control.ErrPrecondition // the world's
	}
	told = control.Errorf(reason, kind, name, "%w", err)
	if name != "" && !strings.Contains(err.Error(), name) {
		told = control.Errorf(reason, kind, name, "%s %s: %w", kind, name, err)
	}
	if reason == control.ErrInvalid && told.Message != kind+" "+name+": "+pool.ErrInvalid.Error() {
		told.Message = strings.TrimSuffix(told.Message, ": "+pool.ErrInvalid.Error()) // what stands before says how
	}
	if named && (device.Remedy != "" || reason == control.ErrNotFound) { // the usual ones are about pools
		told.Remedy = device.Remedy
	}
	return told
}

func reasonOf(err error) control.Reason {
	var missing *pool.MissingError
	var closed *engine.NotOpenError
	if errors.As(err, &missing) {
		return control.ErrMissingDevice
	}
	// What a pool that is not open holds is unknown, whatever kept it from opening:
	// "not found" would tell a client that its volume is gone.
	if errors.As(err, &closed) {
		switch {
		case errors.Is(err, pool.ErrCorrupt):
			return control.ErrCorrupt
		case errors.Is(err, pool.ErrUnsupported):
			return control.ErrUnsupportedFormat
		}
		return control.ErrUnavailable
	}
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.reason
		}
	}
	return control.ErrInternal
}
