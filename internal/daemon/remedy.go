package daemon

import (
	"errors"
	"strings"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// remedied is err with what helps in this case, where err is for that reason.
func remedied(err error, reason control.Reason, remedy string) error {
	var told *control.Error
	if !errors.As(err, &told) || told.Reason != reason {
		return err
	}
	other := *told
	other.Remedy = remedy
	return &other
}

// detachFirst is err, which may say that something is in use, with the remedy for what
// the devices of these paths use.
func detachFirst(err error, paths []string) error {
	switch len(paths) {
	case 0:
		return err
	case 1:
		return remedied(err, control.ErrInUse, "detach it first: ashlar detach "+paths[0])
	}
	return remedied(err, control.ErrInUse, "detach first what is attached: "+strings.Join(paths, ", "))
}

// plain is err without the bare word that marks it as pool.ErrInvalid: what stands
// before says how it is.
func plain(err error) error {
	if err == nil {
		return nil
	}
	if text, marked := strings.CutSuffix(err.Error(), ": "+pool.ErrInvalid.Error()); marked {
		return &plainError{err, text}
	}
	return err
}

type plainError struct {
	error
	text string
}

// Error implements error.
func (e *plainError) Error() string { return e.text }

// Unwrap is the error with the word.
func (e *plainError) Unwrap() error { return e.error }
