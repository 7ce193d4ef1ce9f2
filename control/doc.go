// Package control is the client of the control API, and the errors both sides
// speak. The API itself is controlpb/control.proto; internal/daemon serves it.
//
// One call: [Dial] connects to a daemon on a unix socket or, with mutual TLS, on
// TCP. A method of one of the services in [Client] sends the request, bounded by
// the context or by Options.Timeout. What fails comes back as an [*Error]: with a
// [Reason] to act on, the name of what it is about, and what may help. A daemon
// that cannot be reached is an [*Error] too, [ErrUnavailable], and names the
// address. A connection that is lost is made again by itself, by the next call.
//
// The daemon returns an [*Error] from its handlers as it is: gRPC finds its
// GRPCStatus and sends the reason as a controlpb.Problem. Both directions are one
// table, in error.go; a reason that this side does not know yet is told by its
// gRPC code.
//
// Invariants: no call of a Client returns a gRPC status bare, and no error is
// shown without the name of what it is about. What a call means is left to the
// daemon, and to controlpb/control.proto.
package control
