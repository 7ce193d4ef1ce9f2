// Package attach makes NBD exports block devices of this host, through the kernel's
// nbd driver and its generic netlink interface (drivers/block/nbd.c,
// include/uapi/linux/nbd-netlink.h).
//
// The way of one device: Connect opens unix sockets to the server and runs their
// handshakes in this process (nbd.Negotiate; the driver has no handshake and knows
// simple replies only); the descriptors go to the kernel with one message, and from
// then on requests pass between the kernel and the server. This process is needed no
// more. Keep watches a device, here or in any other process, and hands over fresh
// connections when the old ones died, which is how a device outlives its server.
//
// What is attached stands in the kernel alone: in the driver's status and in sysfs,
// where the backend identifier names the volume. Nothing is remembered elsewhere, so
// nothing can disagree.
//
// How requests survive a server that is killed:
//
//   - New requests wait inside the driver until there is a connection, at most for
//     the dead timeout. Then they fail, once for all of them.
//   - Requests that were on a connection when it died wait for their own timer
//     (Config.RetryAfter), and are then sent again. The driver has no way to send
//     them earlier, so the pause after a kill is at least what is left of the timer.
//     It does not apply to a server that drains before it ends.
//   - With several connections the timer also cuts the connection of a server that is
//     alive and slow, and sends the request a second time while the first may still
//     be under way. A server has to order the two: a write that was replied to must
//     not be overwritten by an older copy of it. Ours does; see
//     docs/internals/write-order.md. With one connection the driver waits for a live
//     server without end.
//
// Invariants: a device gets connections only to an export that has at least its size
// and can do what it could; a device that is mounted or held is never detached; a
// descriptor handed over is closed here in every case, since the kernel keeps
// references of its own.
//
// It leaves to others: which volume goes where (the caller), the server's own
// restart (the daemon), other drivers (packages ublk and fuse).
package attach
