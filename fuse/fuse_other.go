//go:build !linux

package fuse

import (
	"context"
	"fmt"

	"github.com/ashlar-storage/ashlar/fuse/keeper"
)

var errSystem = fmt.Errorf("%w (needs Linux 5.8)", ErrUnsupported)

// Target is a device that this process serves.
type Target struct{}

// Supported reports why this system cannot have such devices.
func Supported() error { return errSystem }

// Recoverable reports why a device does not survive its server.
func Recoverable() error { return errSystem }

// Start makes a block device of the kernel's and serves it.
func Start(context.Context, Config) (*Target, error) { return nil, errSystem }

// Recover takes over a device whose server is gone.
func Recover(context.Context, Config) (*Target, error) { return nil, errSystem }

// List returns the devices of Ashlar.
func List(context.Context, *keeper.Client) ([]Info, error) { return nil, errSystem }

// Find returns the device of a name.
func Find(context.Context, string, *keeper.Client) (Info, error) { return Info{}, errSystem }

// Remove removes a device whose server is gone.
func Remove(context.Context, string, *keeper.Client) error { return errSystem }

// Path is the block device.
func (*Target) Path() string { return "" }

// Loop is the number in Path.
func (*Target) Loop() int { return AnyLoop }

// File is where the mount is.
func (*Target) File() string { return "" }

// Connection is the number of the connection.
func (*Target) Connection() uint32 { return 0 }

// Kept tells whether the device survives this process.
func (*Target) Kept() bool { return false }

// Queues is how many reactors serve.
func (*Target) Queues() int { return 0 }

// Depth is how many requests are in flight at most.
func (*Target) Depth() int { return 0 }

// Stop removes the device from the system.
func (*Target) Stop(context.Context) error { return errSystem }

// Detach leaves the device to another process.
func (*Target) Detach(context.Context) error { return errSystem }

// Resize shows the device's present size to the kernel.
func (*Target) Resize(context.Context) error { return errSystem }

// Stats adds up all queues.
func (*Target) Stats() Stats { return Stats{} }
