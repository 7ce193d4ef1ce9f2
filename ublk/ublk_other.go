//go:build !linux

package ublk

import (
	"context"
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath"
)

var errSystem = fmt.Errorf("%w (needs Linux 6.0)", ErrUnsupported)

// Target is a device that this process serves.
type Target struct{}

// Stats is what a target has done.
type Stats struct {
	Requests [datapath.OpCount]uint64
	Read     uint64
	Written  uint64
	Passed   uint64
	Errors   uint64
	InFlight int
	Lost     int
}

// Supported reports why this system cannot have ublk devices.
func Supported() error { return errSystem }

// DriverFeatures are what the running driver can do.
func DriverFeatures() (Features, error) { return 0, errSystem }

// ZeroCopySupported reports why every byte is copied.
func ZeroCopySupported() error { return errSystem }

// DevicesMax is the driver's parameter ublks_max.
func DevicesMax() (int, error) { return 0, errSystem }

// Start makes a block device of the kernel's and serves it.
func Start(context.Context, Config) (*Target, error) { return nil, errSystem }

// Recover takes over a device whose server is gone.
func Recover(context.Context, Config) (*Target, error) { return nil, errSystem }

// List returns every ublk device of the system.
func List(context.Context) ([]Info, error) { return nil, errSystem }

// Find returns one device.
func Find(context.Context, int) (Info, error) { return Info{}, errSystem }

// Remove removes a device whose server is gone.
func Remove(context.Context, int) error { return errSystem }

// RemoveInUse removes a device whose server is gone even from under a mount.
func RemoveInUse(context.Context, int) error { return errSystem }

// ID is the number in the device's path.
func (*Target) ID() int { return AnyID }

// Path is the block device.
func (*Target) Path() string { return "" }

// Features are those of the device.
func (*Target) Features() Features { return 0 }

// Copies says why the bytes of requests pass through this process.
func (*Target) Copies() error { return errSystem }

// Queues is how many hardware queues the kernel made.
func (*Target) Queues() int { return 0 }

// Depth is how many requests each queue has in flight at most.
func (*Target) Depth() int { return 0 }

// Stop removes the device from the system.
func (*Target) Stop(context.Context) error { return errSystem }

// StopInUse removes the device even from under a mount.
func (*Target) StopInUse(context.Context) error { return errSystem }

// Detach leaves the device to another process.
func (*Target) Detach(context.Context) error { return errSystem }

// Resize shows the device's present size to the kernel.
func (*Target) Resize(context.Context) error { return errSystem }

// Stats adds up all queues.
func (*Target) Stats() Stats { return Stats{} }
