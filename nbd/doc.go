// Package nbd speaks the Network Block Device protocol, as a server that exports
// datapath devices and as a client.
//
// It follows the protocol document (github.com/NetworkBlockDevice/nbd,
// doc/proto.md) in fixed newstyle, with structured replies, extended headers
// (branch extension-ext-header) and metadata contexts. RESIZE is not served: the
// branch that defines it has no implementer.
//
// The way of one connection: a listener accepts it; an ordinary goroutine
// negotiates options and TLS under a deadline (handshake.go); then the socket
// leaves Go's poller and belongs to one reactor until it closes (conn.go,
// receive.go, reply.go). There one read brings many requests, each is given to
// the export's datapath.Queue, and the replies of a turn leave in one system
// call. A TLS connection keeps its goroutines: they carry plain bytes between
// the TLS stream and a socket pair whose other end the reactor serves (tls.go),
// so that there is one transmission path.
//
// Invariants: a client's bytes are bounded before memory is given to them; a
// connection that makes no progress holds no more than its own share and is
// dropped in the end; nothing but a protocol violation or a timeout ends a
// connection that still has requests in flight, and its device requests always
// run to their end before the buffers are reused.
package nbd
