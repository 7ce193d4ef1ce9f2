//go:build !linux

package keeper

import (
	"context"
	"errors"
	"fmt"
)

var errSystem = fmt.Errorf("keeper: %w (needs Linux)", errors.ErrUnsupported)

// Server holds descriptors.
type Server struct{}

// Start listens.
func Start(Config) (*Server, error) { return nil, errSystem }

// Run keeps until stop says so.
func (*Server) Run(<-chan struct{}) error { return errSystem }

// Close ends the keeper.
func (*Server) Close() error { return errSystem }

// Client is a process's connection to its keeper.
type Client struct{}

// Open connects to the keeper.
func Open(context.Context, Options) (*Client, error) { return nil, errSystem }

// Socket is the path of the keeper's socket.
func (*Client) Socket() string { return "" }

// Close ends the connection.
func (*Client) Close() error { return errSystem }

// Put has the keeper hold a descriptor.
func (*Client) Put(context.Context, string, []byte, int) error { return errSystem }

// Take makes an entry this client's.
func (*Client) Take(context.Context, string) (state []byte, fd int, err error) {
	return nil, -1, errSystem
}

// Release leaves an entry with the keeper.
func (*Client) Release(context.Context, string) error { return errSystem }

// Remove has the keeper close an entry's descriptor.
func (*Client) Remove(context.Context, string) error { return errSystem }

// List returns what the keeper holds.
func (*Client) List(context.Context) ([]Entry, error) { return nil, errSystem }

// SelfCommand starts a keeper from this process's own program.
func SelfCommand(string) ([]string, error) { return nil, errSystem }

// Launch starts a command that outlives this process.
func Launch([]string) error { return errSystem }
