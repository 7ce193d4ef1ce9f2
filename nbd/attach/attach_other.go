//go:build !linux

package attach

import (
	"context"
	"errors"
	"fmt"
)

var errOther = fmt.Errorf("attach: %w: the nbd driver is Linux's", errors.ErrUnsupported)

// Driver stands for the kernel's nbd driver, which is not here.
type Driver struct{}

// Open fails.
func Open(Options) (*Driver, error) { return nil, errOther }

// Close does nothing.
func (*Driver) Close() error { return nil }

// List fails.
func (*Driver) List() ([]Device, error) { return nil, errOther }

// Status fails.
func (*Driver) Status(Index) (Device, error) { return Device{}, errOther }

// Find fails.
func (*Driver) Find(string) (Device, error) { return Device{}, errOther }

// FreeIndex fails.
func (*Driver) FreeIndex(Index) (Index, error) { return 0, errOther }

// Connect fails.
func (*Driver) Connect(context.Context, Config) (Device, error) { return Device{}, errOther }

// Reconfigure fails.
func (*Driver) Reconfigure(context.Context, Index, Config) (Device, error) {
	return Device{}, errOther
}

// Served fails.
func (*Driver) Served(Index) (bool, error) { return false, errOther }

// Resize fails.
func (*Driver) Resize(Index, uint64) (Device, error) { return Device{}, errOther }

// Disconnect fails.
func (*Driver) Disconnect(context.Context, Index, DisconnectOptions) error { return errOther }

// Keep fails.
func (*Driver) Keep(context.Context, Index, Config) error { return errOther }
