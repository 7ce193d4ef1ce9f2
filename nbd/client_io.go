package nbd

import (
	"context"
	"fmt"
	"io"
	"time"
)

// clientCancelGrace is how long a canceled call waits for a transfer of its
// buffer that has begun, before the connection is given up for stuck; and how
// long a failed write waits for the reader.
const clientCancelGrace = time.Second

// clientCall is a request somebody waits for.
type clientCall struct {
	Request
	ended chan struct{} // of capacity 1
}

// call takes a request from the ones kept. It comes zero but for Done.
func (c *Client) call() *clientCall {
	c.mu.Lock()
	if n := len(c.calls); n > 0 {
		k := c.calls[n-1]
		c.calls = c.calls[:n-1]
		c.mu.Unlock()
		return k
	}
	c.mu.Unlock()
	k := &clientCall{ended: make(chan struct{}, 1)}
	k.Done = func(*Request) { k.ended <- struct{}{} }
	return k
}

func (c *Client) putCall(k *clientCall) {
	k.Request = Request{Done: k.Done}
	c.mu.Lock()
	if len(c.calls) < c.options.Depth {
		c.calls = append(c.calls, k)
	}
	c.mu.Unlock()
}

// wait submits and waits for the end or for ctx.
func (c *Client) wait(ctx context.Context, k *clientCall) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.Submit(&k.Request)
	select {
	case <-k.ended:
		return k.Err
	case <-ctx.Done():
	}
	if c.abandon(&k.Request) {
		return ctx.Err()
	}
	stuck := time.AfterFunc(clientCancelGrace, func() {
		c.fail(fmt.Errorf("nbd: canceled in the middle of a transfer that does not move: %w", ctx.Err()))
	})
	defer stuck.Stop()
	<-k.ended
	return k.Err
}

// one submits a single request and waits.
func (c *Client) one(ctx context.Context, command Command, flags CommandFlags, offset, length uint64, p []byte) error {
	k := c.call()
	k.Command, k.Flags, k.Offset, k.Length, k.Buf = command, flags, offset, length, p
	err := c.wait(ctx, k)
	c.putCall(k)
	return err
}

// Read fills p from offset. Reads longer than PayloadMax are sent in pieces.
//
// The blocking methods return when the request has ended or ctx has; then the
// buffer is the caller's again, though the server may still carry out what was
// sent. A transfer that has begun is waited for; if it does not move either, the
// client dies.
func (c *Client) Read(ctx context.Context, p []byte, offset uint64, flags CommandFlags) error {
	_, err := c.transfer(ctx, CommandRead, p, offset, flags)
	return err
}

// Write stores p at offset. Writes longer than PayloadMax are sent in pieces.
func (c *Client) Write(ctx context.Context, p []byte, offset uint64, flags CommandFlags) error {
	_, err := c.transfer(ctx, CommandWrite, p, offset, flags)
	return err
}

// transfer moves p in pieces of at most the payload limit and returns how many
// bytes were moved before an error.
func (c *Client) transfer(ctx context.Context, command Command, p []byte, offset uint64, flags CommandFlags) (moved int, err error) {
	step := int(c.alignDown(uint64(c.PayloadMax())))
	for moved < len(p) {
		piece := p[moved:min(len(p), moved+step)]
		if err := c.one(ctx, command, flags, offset+uint64(moved), uint64(len(piece)), piece); err != nil {
			return moved, err
		}
		moved += len(piece)
	}
	return moved, nil
}

func (c *Client) alignDown(n uint64) uint64 {
	least := uint64(max(c.info.BlockMin, 1))
	return max(n&^(least-1), least)
}

// Flush makes every write that ended before durable.
func (c *Client) Flush(ctx context.Context) error {
	return c.one(ctx, CommandFlush, 0, 0, 0, nil)
}

// Trim tells the server that a range is not needed; its content is undefined
// until written.
func (c *Client) Trim(ctx context.Context, offset, length uint64, flags CommandFlags) error {
	return c.effect(ctx, CommandTrim, offset, length, flags)
}

// WriteZeroes makes a range read back as zeros.
func (c *Client) WriteZeroes(ctx context.Context, offset, length uint64, flags CommandFlags) error {
	return c.effect(ctx, CommandWriteZeroes, offset, length, flags)
}

// Cache tells the server that a range will be read soon.
func (c *Client) Cache(ctx context.Context, offset, length uint64, flags CommandFlags) error {
	return c.effect(ctx, CommandCache, offset, length, flags)
}

// effectMax is the longest range of one command without payload.
func (c *Client) effectMax() uint64 {
	if c.headers == HeadersExtended {
		return clientSizeMax
	}
	return 1 << 31 // the largest power of two in 32 bits: aligned to everything
}

// effect sends a command without payload, in pieces where the header is too
// narrow for its length.
func (c *Client) effect(ctx context.Context, command Command, offset, length uint64, flags CommandFlags) error {
	for {
		n := min(length, c.effectMax())
		if err := c.one(ctx, command, flags, offset, n, nil); err != nil {
			return err
		}
		offset += n
		if length -= n; length == 0 {
			return nil
		}
	}
}

// BlockStatus asks for the extents from offset on in the negotiated contexts, or
// in those that ids name. The answer may cover less than length, but at least one
// extent; its last extent may run past length, though not past the export.
func (c *Client) BlockStatus(ctx context.Context, offset, length uint64, flags CommandFlags, ids ...uint32) ([]ContextStatus, error) {
	k := c.call()
	k.Command, k.Flags, k.Offset, k.Length, k.ContextIDs = CommandBlockStatus, flags, offset, min(length, c.effectMax()), ids
	err := c.wait(ctx, k)
	statuses := k.Statuses
	c.putCall(k)
	if err != nil {
		return nil, err
	}
	return statuses, nil
}

// ReadAt implements [io.ReaderAt]. It waits without a limit; the client's death
// ends it.
func (c *Client) ReadAt(p []byte, offset int64) (int, error) {
	if offset < 0 || uint64(offset) > c.info.Size {
		return 0, ErrOutside
	}
	var end error
	if left := c.info.Size - uint64(offset); uint64(len(p)) > left {
		p, end = p[:left], io.EOF
	}
	n, err := c.transfer(context.Background(), CommandRead, p, uint64(offset), 0)
	if err != nil {
		return n, err
	}
	return n, end
}

// WriteAt implements [io.WriterAt]. It waits without a limit; the client's death
// ends it.
func (c *Client) WriteAt(p []byte, offset int64) (int, error) {
	if offset < 0 || uint64(offset) > c.info.Size || uint64(len(p)) > c.info.Size-uint64(offset) {
		return 0, ErrOutside
	}
	return c.transfer(context.Background(), CommandWrite, p, uint64(offset), 0)
}

var (
	_ io.ReaderAt = (*Client)(nil)
	_ io.WriterAt = (*Client)(nil)
	_ io.Closer   = (*Client)(nil)
)
