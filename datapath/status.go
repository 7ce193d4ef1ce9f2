package datapath

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Status is the result of a request: one of a closed set, each with one errno.
// The zero value is success. A Status is never formatted on the data path.
type Status uint8

// The statuses. Exports map them to their own wire codes.
const (
	StatusOK           Status = iota // done as asked
	StatusIO                         // the device failed; data may be lost (EIO)
	StatusNoSpace                    // no space left for new data; old data is intact (ENOSPC)
	StatusInvalid                    // the request breaks a rule of the device (EINVAL)
	StatusNotSupported               // the device cannot do this operation (EOPNOTSUPP)
	StatusReadOnly                   // a change was asked of a read-only device (EPERM)
	StatusOverflow                   // the request is longer than the device can serve (EOVERFLOW)
	StatusShutdown                   // the device is closing (ESHUTDOWN)
	StatusCorrupt                    // stored data failed its checksum and no good copy exists (EIO on the wire)
	statusCount
)

var statusNames = [statusCount]string{
	"ok", "I/O error", "no space", "invalid", "not supported", "read-only", "overflow", "shutting down", "corrupt",
}

var statusErrno = [statusCount]unix.Errno{
	0, unix.EIO, unix.ENOSPC, unix.EINVAL, unix.EOPNOTSUPP, unix.EPERM, unix.EOVERFLOW, unix.ESHUTDOWN, unix.EIO,
}

// String names the status for logs and tests.
func (s Status) String() string {
	if s >= statusCount {
		return fmt.Sprintf("status(%d)", uint8(s))
	}
	return statusNames[s]
}

// Errno is the one errno that stands for s; 0 for [StatusOK].
func (s Status) Errno() unix.Errno {
	if s >= statusCount {
		return unix.EIO
	}
	return statusErrno[s]
}

// Err returns nil for [StatusOK] and a *StatusError otherwise. It allocates and
// is for callers outside the data path.
func (s Status) Err() error {
	if s == StatusOK {
		return nil
	}
	return &StatusError{Status: s}
}

// StatusError is a Status as a Go error.
type StatusError struct{ Status Status }

// Error implements error.
func (e *StatusError) Error() string { return "datapath: " + e.Status.String() }

// Unwrap gives the errno, so that errors.Is(err, unix.ENOSPC) works.
func (e *StatusError) Unwrap() error { return e.Status.Errno() }

// StatusOfErrno maps a kernel errno to the status a client should see. Anything
// that is not about space, permission or support is an I/O error: a client
// cannot act on more than that.
func StatusOfErrno(errno unix.Errno) Status {
	switch errno {
	case 0:
		return StatusOK
	case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
		return StatusNoSpace
	case unix.EINVAL:
		return StatusInvalid
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return StatusNotSupported
	case unix.EROFS, unix.EPERM, unix.EACCES:
		return StatusReadOnly
	case unix.EOVERFLOW:
		return StatusOverflow
	case unix.ESHUTDOWN:
		return StatusShutdown
	}
	return StatusIO
}
