//go:build !linux

package uring

import "errors"

// ErrUnsupported marks a system in which io_uring cannot be used.
var ErrUnsupported = errors.New("uring: not supported (needs Linux 5.11)")
