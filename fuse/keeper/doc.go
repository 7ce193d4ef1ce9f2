// Package keeper holds descriptors for a process that may be killed: a small process
// of its own ([Server], ashlar fuse-keeper) to which another ([Client]) hands each
// connection of the FUSE driver. While it holds one, the kernel keeps the mount and
// everything on it waiting for whoever takes the descriptor next.
//
// An entry has a name, some bytes of state that only the client reads, and one
// descriptor. It belongs to the connection that put or took it, until that ends, which
// it does with its process: so the keeper knows whether an entry's owner lives, and
// never gives one entry to two.
//
// The protocol is one message for a request and one for its answer, over a SOCK_SEQPACKET
// socket of the unix domain that only root, and the keeper's own user, may use;
// message.go has the layout. Messages, names, states and the number of entries are
// bounded.
//
// Invariants:
//
//  1. A descriptor is received close-on-exec, and closed where its message is refused.
//  2. An entry without an owner stays until it is taken and removed, or the keeper ends.
//  3. A keeper that ends takes nothing with it while the owners live: a [Client] notices,
//     starts another where it was told how, and puts its entries again.
//
// What it leaves to others: what the descriptors are (package fuse), where the keeper
// runs. In the control group of the daemon's service it would end with the service.
package keeper
