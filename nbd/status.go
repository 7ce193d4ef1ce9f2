package nbd

import (
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath"
)

// errnoOf maps a device's status to the wire (proto.md, "Error values"). Nothing
// but the values of that section goes out; ENOTSUP only where a fast zero was
// refused.
func errnoOf(s datapath.Status) Error {
	switch s {
	case datapath.StatusOK:
		return ErrnoOK
	case datapath.StatusNoSpace:
		return ErrnoNoSpace
	case datapath.StatusInvalid, datapath.StatusNotSupported:
		return ErrnoInvalid
	case datapath.StatusReadOnly:
		return ErrnoPerm
	case datapath.StatusOverflow:
		return ErrnoOverflow
	case datapath.StatusShutdown:
		return ErrnoShutdown
	}
	return ErrnoIO
}

var errnoNames = map[Error]string{
	ErrnoOK: "ok", ErrnoPerm: "operation not permitted", ErrnoIO: "I/O error", ErrnoNoMem: "out of memory",
	ErrnoInvalid: "invalid argument", ErrnoNoSpace: "no space left", ErrnoOverflow: "value too large",
	ErrnoNotSupported: "not supported", ErrnoShutdown: "server is shutting down",
}

// Error implements error: e as a client meets it.
func (e Error) Error() string {
	if name, ok := errnoNames[e]; ok {
		return "nbd: " + name
	}
	return fmt.Sprintf("nbd: error %d", uint32(e))
}
