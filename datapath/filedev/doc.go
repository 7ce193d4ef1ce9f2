// Package filedev is a raw file or block device as a datapath.Device.
//
// How the bytes are reached is chosen when the device opens, by probing what the
// kernel does with this file (see [Access]):
//
//   - direct: O_DIRECT through the reactor's engine. The way for disks and for
//     files on disk filesystems.
//   - inline: pread and pwrite on the reactor itself. For files that live in
//     memory (tmpfs), where io_uring would hand each request to a kernel worker
//     thread and take several times as long.
//   - buffered: through the page cache; what is cached is served inline with
//     RWF_NOWAIT, the rest by the engine. For filesystems without O_DIRECT, and
//     on request.
//
// In direct mode requests that are not multiples of what the kernel wants are
// served by read-modify-write of the enclosing blocks, under a lock that keeps
// aligned writes of the same region out, so that no neighbour's write is lost. In
// the other modes reads and writes of a region are kept apart, since the page
// cache would show a read half of a write. Zeroing in inline mode and pages that
// are lent (FlagLend) are not: a block may be seen half changed while its change
// is in flight.
//
// A request that has to wait, for a region, for a place in the disk's queue or
// for a bounce buffer, is parked by its queue; none of them is passed by requests
// that come later, on whatever queue. Queues wake each other by messages.
//
// Durability: a flush is fdatasync(2), one at a time over all queues; flushes that
// wait together share one. FUA is RWF_DSYNC on a direct write, and otherwise the
// change followed by fdatasync. A failed fdatasync is final: the kernel may have
// dropped the dirty pages, and tells of it once, so every later flush and FUA
// fails until the device is opened anew. So does a failed RWF_DSYNC, unless it
// was for want of space.
//
// A file that shrinks under the device gives I/O errors for what is gone; it
// never gives zeros in place of lost data. Once a read has noticed, changes and
// flushes fail too. What nobody can notice is a write past the new end before any
// read there: it makes the file longer again.
package filedev
