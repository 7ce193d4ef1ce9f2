// Package remote is a device over an export of an NBD server, ours or another's,
// that outlives its connections.
//
// A device has a reactor of its own, and on it one link, or several where the
// server says that a flush on one covers all (NBD_FLAG_CAN_MULTI_CONN). Everything
// about requests has that one owner. A queue hands its requests over by a lock-free
// ring and gets them back the same way, which costs each a hop between threads and
// lets any number of queues share the few connections a server grants.
//
// The way of a request: Submit pushes it, the core takes it, holds it while an
// earlier change of the same bytes is not answered, reserves room for its data,
// gives it to a link, and on the answer hands it back, whose Done then runs on
// the queue's reactor.
//
// A fault of the transport is never an I/O error. When a link fails, when the server
// says that it shuts down, or does not say anything for the stall timeout, all
// links are cut and the device waits while it connects again. Then, in this order:
//
//  1. Changes that were acknowledged but not flushed are written again. The server
//     may have restarted and lost them, and NBD has no word for that, so their data is
//     kept until a flush has covered them: at most RetainBytes, after half of which
//     the device flushes of its own accord.
//  2. Changes that were on the wire are sent again, at the earliest 0.6 s after the
//     old connection broke, so that the server is done with what came on that. No
//     two of them overlap, since overlapping ones are never sent together, so
//     their order is kept.
//  3. Reads, flushes and everything that waited go out. No read is answered before,
//     so none sees older bytes than one before it did.
//
// A flush therefore keeps its promise across any number of connections: what was
// acknowledged before it is on the server, or kept here, when it is sent.
//
// A request waits up to the dead timeout without any progress of the device; then
// it and all others end with StatusIO, and so does what is submitted until the
// server is back. What was acknowledged is kept beyond that.
//
// A server that comes back with less than it had (a smaller size, read-only, a
// feature gone, larger blocks) is taken for the wrong one, and so is one that
// refuses data it once acknowledged: requests fail, State says why, and the device
// goes on looking. A larger size is taken over and shown by Info.
//
// Limits, all of the protocol: the device takes itself for the only writer of the
// export. A server that does not offer flush gets no second copy of what it
// acknowledged. And no client can know that a server no longer works on a connection
// that is gone: one that begins a write from it later than that, after the same write
// was sent again, may undo a newer one. Ours does not (nbd/resend.go).
package remote
