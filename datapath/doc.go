// Package datapath is the narrow waist of Ashlar: how a request moves between
// something that exports a block device (NBD, ublk, a FUSE file) and something
// that stores one (a raw file, memory, a pool volume, a filter over another
// device).
//
// An export knows only [Device], [Queue] and [Request]; so does a store. Every
// pair of them works together and every store passes the same conformance
// suite, datapath/devtest.
//
// The way of one request: the export, running on a reactor, fills a Request it
// owns and calls [Queue.Submit]. The queue hands it down (to a lower queue, to
// the reactor's ring, to memory), and some turns later the request ends through
// [Request.Complete], which calls [Request.Done] on the same reactor. There the
// export replies to its client and reuses the Request.
//
// Invariants, checked by devtest and by the [Checked] device in builds with
// -tags invariants:
//
//  1. One exit. Submit returns nothing; every request ends once, through Done,
//     on the reactor that submitted it, never inside Submit.
//  2. No waiting inside and no "try again". OpenQueue reserved what depth
//     requests need in every layer below; a full queue is seen by the export,
//     the only place that can make its client wait.
//  3. Buffers belong to the export. A layer reads or fills them until Done and
//     keeps nothing.
//  4. Order: none between requests in flight. A flush covers every write, of any
//     queue of the device, that completed before the flush was submitted. FUA
//     covers its own write.
//  5. A failed write leaves each block old or new, then stable from its first
//     read on. A failed flush is sticky: the device keeps reporting it.
//  6. No allocation per request; per-layer state is an array of depth slots.
//
// A request that carries a [Timing] takes down where its time goes, [Stage] by stage:
// each layer marks what it knows, and the export ends it with the reply.
//
// What it leaves to others: who may open a device (internal/daemon), when to
// poll (datapath/reactor), what bytes mean on a disk or a wire.
package datapath
